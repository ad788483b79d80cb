// y = W x + bias for many tokens, on Hopper's wgmma, by blocks that stay for as many tiles as they have time for.
//
// A tile is 128 rows and TOKENS tokens. Two warpgroups have 64 rows each, dequantize them in registers and multiply; a
// third copies, through a ring of STAGES stages of 128 channels, and runs ahead into the next tile while the sums of
// this one leave through its last stage. Which steps of which tiles a block has, says marlin_share.cuh. Of a tile that
// several share, all but the first leave their sums in `partials` and raise flags; the first, which comes to it last,
// adds them in their order, copied through its ring. A raised flag is `tag`, a number of 63 random bits, so nothing has
// to be cleared before; who waited for it clears it. Blocks that are waited for have smaller numbers, and so begin
// earlier. With CLUSTER blocks are two to a tile and a cluster, and each adds up half of the tokens in shared memory.
// Macros: those of marlin_block.cuh, TOKENS (32, 64, 128 or 256), STAGES, CLUSTER.
#include "marlin_block.cuh"
#include "marlin_bulk.cuh"
#include "marlin_share.cuh"
#include "marlin_wgmma.cuh"
#include "marlin_dequant.cuh"
#include "marlin_sums.cuh"

constexpr int ROW_BLOCKS = 2;  // of 64 rows, one for each warpgroup that multiplies
constexpr int BLOCK_BYTES = 4 * STRIP_BYTES;
constexpr int X_HALF = TOKENS * 128;  // bytes of the activations of 64 channels, and of sums of 64 rows when they leave
constexpr int STAGE_BYTES = 2 * X_HALF + (ROW_BLOCKS * BLOCK_BYTES + 1023) / 1024 * 1024;
constexpr int CONSUMERS = 128 * ROW_BLOCKS;
constexpr int COPIERS = 4;  // for the blocks of weights, and for the halves of the activations
constexpr int FEW_REGISTERS = 56, REGISTERS = 224;  // of those who copy, and of those who multiply
constexpr int SUMS = TOKENS / 2;        // of a thread
constexpr int ABREAST = 2048 / TOKENS;  // tiles of tokens that go through the rows together
// Where barriers lie in shared memory, behind the stages.
constexpr int FULL = STAGES * STAGE_BYTES, EMPTY = FULL + 16 * STAGES;

extern __shared__ __align__(1024) u8 shared[];

// The first row block and the first token of a tile.
__device__ __forceinline__ void place(int tile, int row_tiles, int token_tiles, int& block, int& token) {
  const int group = tile / (ABREAST * row_tiles), within = tile - group * ABREAST * row_tiles;
  const int width = min(ABREAST, token_tiles - group * ABREAST);
  block = within / width * ROW_BLOCKS;
  token = (group * ABREAST + within % width) * TOKENS;
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    many(const __grid_constant__ TensorMap x_map, u16* __restrict__ y, const u8* __restrict__ packed,
         const u16* __restrict__ bias, float4* partials, u64* flags, u64 tag, int tokens, int n, int row_blocks,
         int k_blocks, int token_tiles, int waves) {
  const int row_tiles = (row_blocks + ROW_BLOCKS - 1) / ROW_BLOCKS;
  const Shares shares = {int(gridDim.x), waves, row_tiles * token_tiles, k_blocks};
  const int own_share = CLUSTER ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  const u32 base = (shared_address(shared) + 1023) & ~1023u;
  u8* ring = shared + (base - shared_address(shared));
  const u32 full = base + FULL, empty = base + EMPTY;

  if (threadIdx.x == CONSUMERS) {
    for (int i = 0; i < STAGES; ++i) {
      // The second half of the activations has a barrier of its own, so that the first can be multiplied before.
      init_barrier(full + 16 * i, COPIERS - 1);
      init_barrier(full + 16 * i + 8, 1);
      init_barrier(empty + 8 * i, CONSUMERS);
    }
    publish_barriers();
    fetch_map(&x_map);
  }
  __syncthreads();
  let_next_begin();

  if (threadIdx.x >= CONSUMERS) {
    give_registers<FEW_REGISTERS>();
    // One thread of each warp: copies are issued one at a time, and four threads wait for four of them at once.
    const int copier = uniform((threadIdx.x - CONSUMERS) >> 5), half = copier & 1;
    if (!elected()) return;
    if (copier >= 2) wait_for_previous();
    Walk walk(shares, own_share);
    RingStage<STAGES, STAGE_BYTES> stage{1};
    for (int i = 0; i < walk.pieces; ++i) {
      const Piece piece = walk.piece(i);
      int block, token0;
      place(piece.tile, row_tiles, token_tiles, block, token0);
      block += half;
      const u32 weight_bytes = block < row_blocks ? BLOCK_BYTES : 0;
      const u8* from = packed + long(block) * k_blocks * BLOCK_BYTES;
      for (int step = piece.begin; step < piece.end; ++step, stage.advance()) {
        const u32 barrier = full + 16 * stage.slot + (copier == 3 ? 8 : 0), to = base + stage.at;
        wait(empty + 8 * stage.slot, stage.parity);
        if (copier < 2) {
          expect(barrier, weight_bytes);
          if (weight_bytes)
            copy_bulk(to + 2 * X_HALF + half * BLOCK_BYTES, from + long(step) * BLOCK_BYTES, BLOCK_BYTES, barrier);
        } else {
          expect(barrier, X_HALF);
          copy_tensor(to + half * X_HALF, &x_map, step * 128 + half * 64, token0, barrier);
        }
      }
      if (CLUSTER || piece.begin > 0 || piece.end == k_blocks) continue;
      for (int other = own_share; (other = shares.after(other, piece.tile));) {
        if (copier >= 2) {
          for (int group = 0; group < 2; ++group) await(flags + other * 4 + half * 2 + group, tag);
          hand_global_to_copies();
        }
        for (int part = 0; part < 2; ++part, stage.advance()) {
          const u32 barrier = full + 16 * stage.slot + (copier == 3 ? 8 : 0);
          wait(empty + 8 * stage.slot, stage.parity);
          expect(barrier, copier < 2 ? 0 : X_HALF);
          const u8* sums = reinterpret_cast<const u8*>(partials) + (long(other) * 4 + part * 2 + half) * X_HALF;
          if (copier >= 2) copy_bulk(base + stage.at + half * X_HALF, sums, X_HALF, barrier);
        }
      }
    }
    return;
  }

  take_registers<REGISTERS>();
  wait_for_previous();
  const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
  const Own own(base + 2 * X_HALF + group * BLOCK_BYTES + warp * STRIP_BYTES, lane);  // in the first stage
  float acc[SUMS];
  u32 a[2][EACH][4];
  Packed packs[2];  // of a stage's halves
  const Walk walk(shares, own_share);
  // Where the compiler knows that all threads take as many turns, it keeps what is the same for all in shared registers.
  const int pieces = uniform(walk.pieces);
  RingStage<STAGES, STAGE_BYTES> stage{0};
#pragma unroll 1
  for (int i = 0; i < pieces; ++i) {
    const Piece piece = walk.piece(i);
    const int steps = uniform(piece.end - piece.begin);
    int before = stage.slot;
    wait(full + 16 * stage.slot, stage.parity);
    packs[0].load(own, stage.at, 0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const auto own_stage = stage;
      const int done = before;
      before = stage.slot;
      stage.advance();
      multiply_stage(
          acc, a, packs, own, own_stage.at, descriptor(base + own_stage.at), step,
          [&] { arrive_if(step, empty + 8 * done); },
          [&] { wait(full + 16 * own_stage.slot + 8, own_stage.parity); },
          [&](Packed& pack) {
            if (step + 1 == steps) return;
            wait(full + 16 * stage.slot, stage.parity);
            pack.load(own, stage.at, 0);
          });
    }
    wait_for_products<0>();
    settle(acc);
    int block, token0;
    place(piece.tile, row_tiles, token_tiles, block, token0);
    const int row0 = (block + group) * 64;

#if CLUSTER
    // Each block adds up the sums of half of the tokens, and passes the others on.
    const int rank = own_share & 1;
    float4* sums = reinterpret_cast<float4*>(ring);
    cluster_barrier();  // the ring of the other one has served
#pragma unroll
    for (int q = 0; q < SUMS / 8; ++q)
      store4_at_rank(sums + q * CONSUMERS + threadIdx.x, 1 - rank, rank ? quad(acc, q) : quad(acc + SUMS / 2, q));
    cluster_barrier();
#pragma unroll
    for (int i = 0; i < SUMS / 2; ++i) acc[i] = rank ? acc[SUMS / 2 + i] : acc[i];
    add<SUMS / 2>(acc, sums + threadIdx.x, CONSUMERS);
    u8* staged = ring + SUMS / 2 * CONSUMERS * 4 + group * X_HALF / 2;
    store<SUMS / 2>(acc, staged, y, bias, row0, token0 + rank * TOKENS / 2, tokens, n, group);
#else
    if (piece.begin > 0) {
      arrive(empty + 8 * before);
      float4* to = partials + long(own_share) * (SUMS / 4 * CONSUMERS) + threadIdx.x;  // [block][quad][thread]
#pragma unroll
      for (int q = 0; q < SUMS / 4; ++q) __stcg(to + q * CONSUMERS, quad(acc, q));
      hand_global_to_copies();
      warpgroup_barrier(group);
      // [block][thread that copies][warpgroup]
      if ((threadIdx.x & 127) < 2) raise(flags + own_share * 4 + (threadIdx.x & 127) * 2 + group, tag);
      continue;
    }
    if (piece.end < k_blocks) {
      for (int other = own_share; (other = shares.after(other, piece.tile));) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          arrive(empty + 8 * before);
          wait(full + 16 * stage.slot, stage.parity);
          wait(full + 16 * stage.slot + 8, stage.parity);
          const float4* sums = reinterpret_cast<const float4*>(ring + stage.at) + threadIdx.x;
          add<SUMS / 2>(acc + part * SUMS / 2, sums, CONSUMERS);
          before = stage.slot;
          stage.advance();
        }
      }
    }
    warpgroups_barrier<CONSUMERS>();  // the last stage has served both
    store<SUMS>(acc, ring + before * STAGE_BYTES + group * X_HALF, y, bias, row0, token0, tokens, n, group);
    arrive(empty + 8 * before);
#endif
  }
}
