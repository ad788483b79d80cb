// y = W x + bias for many tokens, on Hopper's wgmma, by blocks that stay for as many tiles as they have time for.
//
// A tile is ROW_BLOCKS times 64 rows and TOKENS tokens. Two warpgroups have half of the rows each, dequantize them in
// registers and multiply; a third copies, through a ring of STAGES stages of 128 channels, and runs ahead into the next
// tile while the sums of this one leave through shared memory of their own. Which steps of which tiles a block has, says
// marlin_share.cuh. Of a tile that several share, all but the first leave their sums in `partials` and raise a flag; the
// first, which comes to it last, adds them in their order. Such a flag is `tag`, a number of 63 random bits, so nothing
// has to be cleared before; who waited for it clears it. Blocks that are waited for have smaller numbers, and so begin
// earlier. With CLUSTER blocks are two to a tile and a cluster, and each adds up half of the rows in shared memory.
//
// With RESCALED the products are those of the integers q - z, which are exact, and sums are kept in units of the scale
// of the last group: from one group to the next they are multiplied by the ratio of the two. Scales below 2**-80 count
// as 0. Macros: those of marlin_block.cuh, TOKENS (128 or 256), ROW_BLOCKS (2 or 4), STAGES, CLUSTER, RESCALED (for
// GROUP 128).
#include "marlin_block.cuh"
#include "marlin_bulk.cuh"
#include "marlin_dequant.cuh"
#include "marlin_share.cuh"
#include "marlin_wgmma.cuh"

constexpr int EACH = ROW_BLOCKS / 2;  // blocks of 64 rows of a warpgroup
constexpr int UNITS = 2 * EACH;       // what a warpgroup dequantizes and multiplies at a time: 64 rows, 64 channels
constexpr int BLOCK_BYTES = 4 * STRIP_BYTES;
constexpr int X_HALF = TOKENS * 128;  // bytes of the activations of 64 channels
constexpr int W_STAGE = ROW_BLOCKS * BLOCK_BYTES;
constexpr int CONSUMERS = 256;
constexpr int COPIERS = 4;       // for halves of the weights, and for halves of the activations
constexpr int CHUNK = 16;        // tokens that leave at a time
constexpr int CHUNK_BYTES = CHUNK * 128;
constexpr int QUADS = TOKENS / 8;   // of a thread's sums of 64 rows
constexpr int ABREAST = 2048 / TOKENS;  // tiles of tokens that go through the rows together
// Where things lie in shared memory: activations, weights, sums that leave, barriers.
constexpr int W_RING = STAGES * 2 * X_HALF, STAGED = W_RING + STAGES * W_STAGE, FULL = STAGED + 4 * CHUNK_BYTES;
constexpr int EMPTY = FULL + 8 * STAGES;
#if CLUSTER && ROW_BLOCKS != 4
#error "each block of a cluster sums half of the rows of a warpgroup"
#endif
#if RESCALED && GROUP != 128
#error "a step has one scale a row"
#endif

extern __shared__ __align__(1024) u8 shared[];

// The first row block and the first token of a tile.
__device__ __forceinline__ void place(int tile, int row_tiles, int token_tiles, int& block, int& token) {
  const int group = tile / (ABREAST * row_tiles), within = tile - group * ABREAST * row_tiles;
  const int width = min(ABREAST, token_tiles - group * ABREAST);
  block = within / width * ROW_BLOCKS;
  token = (group * ABREAST + within % width) * TOKENS;
}

#if RESCALED
// Sums in units of `own` become sums in units of the scales of `next`, unless those that there are were the last.
__device__ __forceinline__ void change(float (&acc)[TOKENS / 2], float (&own)[2], const Packed& next, bool last) {
  float ratio[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float now = last ? own[i] : next.scale(i);
    ratio[i] = now == 0.f ? 1.f : __fdividef(own[i], now);
    own[i] = now == 0.f ? own[i] : now;
  }
  settle(acc);
#pragma unroll
  for (int i = 0; i < TOKENS / 2; ++i) acc[i] *= ratio[i >> 1 & 1];
}
#endif

__device__ __forceinline__ float4 quad(const float (&acc)[TOKENS / 2], int q) {
  return make_float4(acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]);
}

// What a thread has of 64 rows, as float4: `lanes` threads side by side.
__device__ __forceinline__ void leave(float4* to, int lanes, const float (&acc)[TOKENS / 2]) {
#pragma unroll
  for (int q = 0; q < QUADS; ++q)
    __stcg(to + q * lanes, quad(acc, q));
}

__device__ __forceinline__ void add(float (&acc)[TOKENS / 2], const float4* from, int lanes) {
#pragma unroll
  for (int q = 0; q < QUADS; ++q) {
    const float4 other = from[q * lanes];
    acc[4 * q] += other.x, acc[4 * q + 1] += other.y, acc[4 * q + 2] += other.z, acc[4 * q + 3] += other.w;
  }
}

// Rows `row0` to `row0` + 63 of y from a warpgroup's sums, 16 tokens at a time through shared memory, where rows of a
// token come to lie side by side.
__device__ __forceinline__ void store(const float (&acc)[TOKENS / 2], u8* staged, u16* y, const u16* bias, int row0,
                                      int token0, int tokens, int n, int group) {
  const int thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31;
  const int own = row0 + warp * 16 + (lane >> 2);
  const float low = bias && own < n ? to_float(bias[own]) : 0.f;
  const float high = bias && own + 8 < n ? to_float(bias[own + 8]) : 0.f;
  const int in = (lane >> 4) * 8 + (lane & 7), out = thread >> 3, row = row0 + (thread & 7) * 8;
  // Pieces of 16 bytes, 8 rows, are swizzled.
  const u32 to = shared_address(staged) + in * 128 + ((warp * 2 + (lane >> 3 & 1)) ^ (in & 7)) * 16;
  const u8* from = staged + out * 128 + ((thread & 7) ^ (out & 7)) * 16;
#pragma unroll
  for (int c = 0; c < TOKENS / CHUNK; ++c) {
    const float* sums = acc + 8 * c;
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float shift = i & 1 ? high : low;
      pairs[i] = from_float(sums[2 * i] + shift) | u32(from_float(sums[2 * i + 1] + shift)) << 16;
    }
    store_transposed(to + (c & 1) * CHUNK_BYTES, pairs);
    warpgroup_barrier(group);
    const int token = token0 + c * CHUNK + out;
    if (token >= tokens || row >= n) continue;
    const u8* eight = from + (c & 1) * CHUNK_BYTES;
    u16* at = y + long(token) * n + row;
    if (n % 8 == 0) {
      *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(eight);
    } else {
#pragma unroll 1
      for (int i = 0; i < min(8, n - row); ++i) at[i] = reinterpret_cast<const u16*>(eight)[i];
    }
  }
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
      init_barrier(full + 8 * i, COPIERS);
      init_barrier(empty + 8 * i, CONSUMERS / 32);
    }
    publish_barriers();
  }
  __syncthreads();
  let_next_begin();

  if (threadIdx.x >= CONSUMERS) {
    give_registers<56>();
    // One thread of each warp: copies are issued one at a time, and four threads wait for four of them at once.
    const int copier = (threadIdx.x - CONSUMERS) >> 5, half = copier & 1;
    if (threadIdx.x & 31) return;
    if (copier >= 2) wait_for_previous();
    Walk walk(shares, own_share);
    Piece piece;
    int slot = 0;
    u32 parity = 1;  // the first round of stages is free
    while (walk.next(piece)) {
      int block, token0;
      place(piece.tile, row_tiles, token_tiles, block, token0);
      block += half * EACH;
      const int there = max(0, min(EACH, row_blocks - block));
      const u8* from = packed + long(block) * k_blocks * BLOCK_BYTES;
      for (int step = piece.begin; step < piece.end; ++step) {
        const u32 barrier = full + 8 * slot;
        wait(empty + 8 * slot, parity);
        if (copier < 2) {
          expect(barrier, there * BLOCK_BYTES);
          for (int b = 0; b < there; ++b)
            copy_bulk(base + W_RING + slot * W_STAGE + (half * EACH + b) * BLOCK_BYTES,
                      from + (long(b) * k_blocks + step) * BLOCK_BYTES, BLOCK_BYTES, barrier);
        } else {
          expect(barrier, X_HALF);
          copy_tensor(base + (2 * slot + half) * X_HALF, &x_map, step * 128 + half * 64, token0, barrier);
        }
        if (++slot == STAGES) slot = 0, parity ^= 1;
      }
    }
    return;
  }

  take_registers<224>();  // what the block was launched with, less those 56
  wait_for_previous();
  const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
  const u8* strips = ring + W_RING + (group * EACH * 4 + warp) * STRIP_BYTES;  // of the first stage, block and half
  u8* staged = ring + STAGED + group * 2 * CHUNK_BYTES;
  float acc[EACH][TOKENS / 2];
  u32 a[2][SET][4];
  Packed next;
  Walk walk(shares, own_share);
  Piece piece;
  int slot = 0;
  u32 parity = 0;
  while (walk.next(piece)) {
#if RESCALED
    float unit_of[EACH][2];  // in which sums are, for the thread's two rows
#pragma unroll
    for (int b = 0; b < EACH; ++b) unit_of[b][0] = unit_of[b][1] = 1.f;
#endif
    int before = slot;
    wait(full + 8 * slot, parity);
    next.load(strips + slot * W_STAGE, 0, lane);
#if RESCALED
    change(acc[0], unit_of[0], next, false);
#endif
#pragma unroll 1
    for (int step = piece.begin; step < piece.end; ++step) {
      const u8* stage = strips + slot * W_STAGE;
      const u64 x = descriptor(base + slot * 2 * X_HALF);
      const int done = before;
      before = slot;
      if (++slot == STAGES) slot = 0, parity ^= 1;
#pragma unroll
      for (int unit = 0; unit < UNITS; ++unit) {
        const int half = unit / EACH, b = unit % EACH;
        u32(&operand)[SET][4] = a[unit & 1];
#if RESCALED
        next.integers(operand);
#else
        next.dequantize(operand);
#endif
        if (unit + 1 < UNITS) next.load(stage + (unit + 1) % EACH * BLOCK_BYTES, (unit + 1) / EACH, lane);
        begin_products();
#pragma unroll
        for (int s = 0; s < SET; ++s)
          wgmma(acc[b], operand[s], x + half * (X_HALF >> 4) + s * 2, step > piece.begin || half || s);
        commit_products();
        if (unit + 1 == UNITS && step + 1 < piece.end) {
          wait(full + 8 * slot, parity);
          next.load(strips + slot * W_STAGE, 0, lane);
        }
        // The unit before this one is done with its registers, and after a stage's first the stage before is free.
        const int following = (unit + 1) % UNITS;
        if (RESCALED && following == 0)
          wait_for_products<0>();
        else
          wait_for_products<1>();
        if (unit == 0) arrive_if(step > piece.begin && lane == 0, empty + 8 * done);
#if RESCALED
        // Of the sums that the next unit adds to, no product is under way; before the first they are not read.
        if (following < EACH) change(acc[following], unit_of[following], next, following == 0 && step + 1 == piece.end);
#endif
      }
    }
    wait_for_products<0>();
    arrive_if(lane == 0, empty + 8 * before);
#pragma unroll
    for (int b = 0; b < EACH; ++b) {
      settle(acc[b]);
#if RESCALED
#pragma unroll
      for (int i = 0; i < TOKENS / 2; ++i) acc[b][i] *= unit_of[b][i >> 1 & 1];
#endif
    }
    int block, token0;
    place(piece.tile, row_tiles, token_tiles, block, token0);
    block += group * EACH;

#if CLUSTER
    // A block adds up those rows of each warpgroup that are its rank's, and passes the others on.
    const int rank = own_share & 1;
    float4* sums = reinterpret_cast<float4*>(ring) + threadIdx.x;
    cluster_barrier();  // the ring of the other one has served
#pragma unroll
    for (int q = 0; q < QUADS; ++q)
      store4_at_rank(sums + q * CONSUMERS, 1 - rank, rank ? quad(acc[0], q) : quad(acc[1], q));
    cluster_barrier();
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) acc[0][i] = rank ? acc[1][i] : acc[0][i];
    add(acc[0], sums, CONSUMERS);
    store(acc[0], staged, y, bias, (block + rank) * 64, token0, tokens, n, group);
#else
    // A share's part: [row block][quad][thread].
    constexpr int PART = EACH * QUADS * CONSUMERS;
    if (piece.begin > 0) {
#pragma unroll
      for (int b = 0; b < EACH; ++b)
        leave(partials + long(own_share) * PART + b * QUADS * CONSUMERS + threadIdx.x, CONSUMERS, acc[b]);
      warpgroup_barrier(group);
      if ((threadIdx.x & 127) == 0) raise(flags + own_share * 2 + group, tag);
      continue;
    }
    if (piece.end < k_blocks) {
      const int end = (piece.tile - waves * shares.blocks + 1) * k_blocks;
      for (int other = own_share + 1; other < shares.blocks && shares.first(other) < end; ++other) {
        if (shares.first(other) == shares.first(other + 1)) continue;
        if ((threadIdx.x & 127) == 0) await(flags + other * 2 + group, tag);
        warpgroup_barrier(group);
#pragma unroll
        for (int b = 0; b < EACH; ++b)
          add(acc[b], partials + long(other) * PART + b * QUADS * CONSUMERS + threadIdx.x, CONSUMERS);
      }
    }
#pragma unroll
    for (int b = 0; b < EACH; ++b) store(acc[b], staged, y, bias, (block + b) * 64, token0, tokens, n, group);
#endif
  }
}
