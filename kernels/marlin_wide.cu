// y = W x + bias for many tokens, on Hopper's wgmma: weights are dequantized in registers, activations come from
// shared memory.
//
// A block of the grid has 128 rows and TOKENS tokens and walks along the channels, 128 at a time, through a ring of
// STAGES stages that four threads fill: two copy weights in bulk, two activations through a tensor map, which swizzles
// them. Two warpgroups have 64 rows each; a third, which those threads are of, leaves them its registers. With
// ROW_BLOCKS 4 it is 256 rows and four warpgroups, and the threads copy weights, two of them activations too. SPLIT blocks
// with consecutive numbers share the channels; each of them adds up the sums of some of the tokens. Macros: those of
// marlin_block.cuh, TOKENS (32, 64 or 128), SPLIT, STAGES, ROW_BLOCKS (2 or 4).
#include "marlin_block.cuh"
#include "marlin_bulk.cuh"
#include "marlin_wgmma.cuh"
#include "marlin_dequant.cuh"
#include "marlin_sums.cuh"

constexpr int BLOCKS = ROW_BLOCKS;  // of 64 rows, one for each warpgroup
constexpr int ROWS = 64 * BLOCKS;
constexpr int BLOCK_BYTES = 4 * STRIP_BYTES;
constexpr int X_HALF = TOKENS * 128;  // bytes of the activations of 64 channels
constexpr int STAGE_BYTES = 2 * X_HALF + (BLOCKS * BLOCK_BYTES + 1023) / 1024 * 1024;
constexpr int CONSUMERS = 128 * BLOCKS;
constexpr int COPIERS = 4;  // for the blocks of weights, and for the halves of the activations
constexpr int X_COPIERS = BLOCKS == 2 ? 2 : 0;  // the first copier of activations
// Registers of a thread that copies, and of one that multiplies: what the block was launched with, shared out anew.
constexpr int FEW_REGISTERS = 40, REGISTERS = BLOCKS == 2 ? 232 : 104;
constexpr int CHUNKS = TOKENS / 8;                       // of 8 tokens, for which a thread has four sums
constexpr int OWNERS = SPLIT < CHUNKS ? SPLIT : CHUNKS;  // blocks that add up,
constexpr int OWN = CHUNKS / OWNERS;                     // so many chunks each

extern __shared__ __align__(1024) u8 shared[];

#if SPLIT > 1
// Gives the other blocks of a tile the sums of their chunks, and adds up those of this block's, first to last: they come
// to lie in the first of `acc`. All are there, or will be while those that are wait: blocks begin in the order of their
// numbers. A part has a flag, which is raised to `tag`, a number of 63 random bits, and cleared by who waited for it.
__device__ __forceinline__ void exchange(float (&acc)[TOKENS / 2], float4* partials, u64* flags, u64 tag, int tile,
                                         int rank, int group) {
  const int thread = threadIdx.x & 127;
  // A part: [owner][who adds to it][warpgroup], then [chunk][thread].
  const auto part = [=](int owner, int from) { return ((tile * OWNERS + owner) * SPLIT + from) * BLOCKS + group; };
#pragma unroll
  for (int owner = 0; owner < OWNERS; ++owner) {
    if (owner == rank) continue;
    float4* to = partials + long(part(owner, rank)) * OWN * 128 + thread;
#pragma unroll
    for (int c = 0; c < OWN; ++c) __stcg(to + c * 128, quad(acc, owner * OWN + c));
  }
  warpgroup_barrier(group);
  if (thread < OWNERS && thread != rank) raise(flags + part(thread, rank), tag);
  if (rank >= OWNERS) return;
#pragma unroll
  for (int owner = 1; owner < OWNERS; ++owner)
#pragma unroll
    for (int i = 0; i < 4 * OWN; ++i)
      if (owner == rank) acc[i] = acc[owner * 4 * OWN + i];
  if (thread < SPLIT && thread != rank) await(flags + part(rank, thread), tag);
  warpgroup_barrier(group);
  float sums[4 * OWN] = {};
#pragma unroll
  for (int from = 0; from < SPLIT; ++from) {
    const float4* others = partials + long(part(rank, from)) * OWN * 128 + thread;
#pragma unroll
    for (int c = 0; c < OWN; ++c) {
      const float4 other = from == rank ? quad(acc, c) : __ldcg(others + c * 128);
      sums[4 * c] += other.x, sums[4 * c + 1] += other.y, sums[4 * c + 2] += other.z, sums[4 * c + 3] += other.w;
    }
  }
#pragma unroll
  for (int i = 0; i < 4 * OWN; ++i) acc[i] = sums[i];
}
#endif

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    wide(const __grid_constant__ TensorMap x_map, u16* __restrict__ y, const u8* __restrict__ packed,
         const u16* __restrict__ bias, float4* partials, u64* flags, u64 tag, int tokens, int n, int row_blocks,
         int k_blocks, int token_tiles) {
  const int rank = blockIdx.x % SPLIT, tile = blockIdx.x / SPLIT;
  const int token0 = tile % token_tiles * TOKENS, block0 = tile / token_tiles * BLOCKS;
  const int k0 = rank * k_blocks / SPLIT, steps = (rank + 1) * k_blocks / SPLIT - k0;
  const u32 base = (shared_address(shared) + 1023) & ~1023u;
  u8* ring = shared + (base - shared_address(shared)) + 1024;
  const u32 full = base, empty = base + 8 * STAGES;

  if (threadIdx.x == CONSUMERS) {
    for (int i = 0; i < STAGES; ++i) {
      init_barrier(full + 8 * i, COPIERS);
      init_barrier(empty + 8 * i, CONSUMERS);
    }
    publish_barriers();
  }
  __syncthreads();
  let_next_begin();

  if (threadIdx.x >= CONSUMERS) {
    give_registers<FEW_REGISTERS>();
    // One thread of each warp: copies are issued one at a time, and four threads wait for four of them at once.
    const int copier = uniform((threadIdx.x - CONSUMERS) >> 5);
    if (!elected()) return;
    const bool weights = copier < BLOCKS, activations = copier >= X_COPIERS && copier < X_COPIERS + 2;
    const int half = copier - X_COPIERS;
    const u32 weight_bytes = weights && block0 + copier < row_blocks ? BLOCK_BYTES : 0;
    const u32 bytes = weight_bytes + (activations ? X_HALF : 0);
    const u32 to = shared_address(ring) + 2 * X_HALF + copier * BLOCK_BYTES;
    const u32 x_to = shared_address(ring) + half * X_HALF;
    const u8* from = packed + (long(block0 + copier) * k_blocks + k0) * BLOCK_BYTES;
    if (activations) wait_for_previous();
    RingStage<STAGES, STAGE_BYTES> stage{1};
    for (int step = 0; step < steps; ++step, stage.advance()) {
      const u32 barrier = full + 8 * stage.slot;
      wait(empty + 8 * stage.slot, stage.parity);
      expect(barrier, bytes);
      if (weight_bytes) copy_bulk(to + stage.at, from + long(step) * BLOCK_BYTES, BLOCK_BYTES, barrier);
      if (activations) copy_tensor(x_to + stage.at, &x_map, (k0 + step) * 128 + half * 64, token0, barrier);
    }
  } else {
    take_registers<REGISTERS>();
    wait_for_previous();
    const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    const Own own(base + 1024 + 2 * X_HALF + (group * 4 + warp) * STRIP_BYTES, lane);  // in the first stage
    float acc[TOKENS / 2];
    u32 a[2][EACH][4];
    Packed packs[2];  // of a stage's halves
    RingStage<STAGES, STAGE_BYTES> stage{0};
    int before = 0;
    wait(full, 0);
    packs[0].load(own, 0, 0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const u32 at = stage.at;
      const int done = before;
      before = stage.slot;
      stage.advance();
      multiply_stage(
          acc, a, packs, own, at, descriptor(base + 1024 + at), step,
          [&] { arrive_if(step, empty + 8 * done); }, [] {},
          [&](Packed& pack) {
            if (step + 1 == steps) return;
            wait(full + 8 * stage.slot, stage.parity);
            pack.load(own, stage.at, 0);
          });
    }
    wait_for_products<0>();
    settle(acc);
    warpgroups_barrier<CONSUMERS>();  // the ring has served
#if SPLIT > 1
    exchange(acc, partials, flags, tag, tile, rank, group);
    if (rank >= OWNERS) return;
#endif
    store<4 * OWN>(acc, ring + group * OWN * 1024, y, bias, (block0 + group) * 64, token0 + rank * OWN * 8, tokens, n,
                   group);
  }
}
