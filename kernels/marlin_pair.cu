// y = W x + bias for many tokens and few rows, on Hopper's wgmma: like marlin_wide.cu, with 64 rows to a cluster of two
// blocks. The blocks have a half of the channels each; of every 128 of those, the two warpgroups of a block multiply
// 64 each. The four sums meet in shared memory, always in the same order, so no second launch has to join them: those
// of a block first, since little goes from one block's memory to the other's at a time. Macros: those of
// marlin_block.cuh, TOKENS (32, 64 or 128), STAGES.
#include "marlin_block.cuh"
#include "marlin_bulk.cuh"
#include "marlin_wgmma.cuh"
#include "marlin_dequant.cuh"
#include "marlin_sums.cuh"

constexpr int ROWS = 64;
constexpr int BLOCK_BYTES = 4 * STRIP_BYTES;
constexpr int X_HALF = TOKENS * 128;  // bytes of the activations of 64 channels
constexpr int STAGE_BYTES = 2 * X_HALF + (BLOCK_BYTES + 1023) / 1024 * 1024;
constexpr int CONSUMERS = 256;
constexpr int COPIERS = 3;  // one for the weights and one for each half of the activations

extern __shared__ __align__(1024) u8 shared[];

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    pair(const __grid_constant__ TensorMap x_map, u16* __restrict__ y, const u8* __restrict__ packed,
         const u16* __restrict__ bias, int tokens, int n, int k_blocks, int token_tiles) {
  const int rank = blockIdx.x & 1, tile = blockIdx.x >> 1;
  const int token0 = tile % token_tiles * TOKENS, block = tile / token_tiles;
  const int k0 = rank * k_blocks / 2, steps = (rank + 1) * k_blocks / 2 - k0;
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
    give_registers<40>();
    const int copier = uniform((threadIdx.x - CONSUMERS) >> 5);
    if (copier == COPIERS || !elected()) return;
    const u32 bytes = copier ? X_HALF : BLOCK_BYTES;
    const u32 to = shared_address(ring) + (copier ? (copier - 1) * X_HALF : 2 * X_HALF);
    const u8* from = packed + (long(block) * k_blocks + k0) * BLOCK_BYTES;
    if (copier) wait_for_previous();
    RingStage<STAGES, STAGE_BYTES> stage{1};
    for (int step = 0; step < steps; ++step, stage.advance()) {
      const u32 barrier = full + 8 * stage.slot;
      wait(empty + 8 * stage.slot, stage.parity);
      expect(barrier, bytes);
      if (copier)
        copy_tensor(to + stage.at, &x_map, (k0 + step) * 128 + (copier - 1) * 64, token0, barrier);
      else
        copy_bulk(to + stage.at, from + long(step) * BLOCK_BYTES, BLOCK_BYTES, barrier);
    }
  } else {
    take_registers<232>();  // what the block was launched with, less those 40
    wait_for_previous();
    const int half = uniform(threadIdx.x >> 7), warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    const Own own(base + 1024 + 2 * X_HALF + warp * STRIP_BYTES, lane);  // in the first stage
    float acc[TOKENS / 2];
    u32 a[2][EACH][4];
    Packed pack;
    RingStage<STAGES, STAGE_BYTES> stage{0};
    int before = 0;
    wait(full, 0);
    pack.load(own, 0, half);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const u64 x = descriptor(base + 1024 + half * X_HALF + stage.at);
      const int done = before;
      before = stage.slot;
      stage.advance();
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        pack.dequantize(a[part % 2], part);
        multiply_part(acc, a[part % 2], x, part, step || part);
        if (part == PARTS - 1 && step + 1 < steps) {
          wait(full + 8 * stage.slot, stage.parity);
          pack.load(own, stage.at, half);
        }
        // The part before this one is done with its registers, and after a stage's first the stage before is free.
        wait_for_products<1>();
        if (part == 0) arrive_if(step, empty + 8 * done);
      }
    }
    wait_for_products<0>();

    settle(acc);

    // Of a block, each warpgroup adds up its half of the tokens; of these, the block of that rank has the last word.
    constexpr int HALF = TOKENS / 4, QUADS = HALF / 4 * 128;  // sums of half of the tokens, and what a warpgroup passes on
    float4* passed = reinterpret_cast<float4*>(ring) + (threadIdx.x & 127);
    warpgroups_barrier<CONSUMERS>();  // the ring has served
    arrive_at_cluster();
#pragma unroll
    for (int q = 0; q < HALF / 4; ++q) passed[half * QUADS + q * 128] = half ? quad(acc, q) : quad(acc + HALF, q);
    warpgroups_barrier<CONSUMERS>();
#pragma unroll
    for (int i = 0; i < HALF; ++i) acc[i] = half ? acc[HALF + i] : acc[i];
    add<HALF>(acc, passed + (1 - half) * QUADS, 128);
    wait_for_cluster();  // the ring of the other one has served
    if (half != rank) {
#pragma unroll
      for (int q = 0; q < HALF / 4; ++q) store4_at_rank(passed + 2 * QUADS + q * 128, half, quad(acc, q));
    }
    cluster_barrier();
    if (half == rank) {
      add<HALF>(acc, passed + 2 * QUADS, 128);
      store<HALF>(acc, ring + 3 * QUADS * 16, y, bias, block * ROWS, token0 + rank * TOKENS / 2, tokens, n, half);
    }
  }
}
