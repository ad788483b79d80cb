// y = W x + bias for up to 16 tokens at a time: a stream of packed weights, read once.
//
// A block of the grid has a share of the strips (16 rows each), STRIPS of them at a time. Its WARPS take turns at 128
// channels of all these strips. Every warp owns a ring of DEPTH pieces, weights and activations, and fills it itself, so
// nothing is shared until the strips are done: then sums meet in shared memory in the order of the warps. HOPPER copies
// weights in bulk and starts that before the kernel ahead has ended; elsewhere copies are cp.async. Macros: those of
// marlin_block.cuh, TOKENS (8 or 16), WARPS, STRIPS, ROUNDS (of STRIPS strips in a share), DEPTH, HOPPER.
//
// Fused forms: WEIGHTS weights that read the same activations are rows of one, and a residual is added where there is
// one. GATED: of two weights with as many rows, y = silu(W0 x) * W1 x; half of a block's strips are of each.
#include "marlin_block.cuh"

#ifndef WEIGHTS
#define WEIGHTS 1
#endif
#ifndef GATED
#define GATED 0
#endif

constexpr int NT = TOKENS / 8;
constexpr int ROWS = STRIPS * 16;
constexpr int ROW = ROWS + 4;  // floats of one token's sums: lanes of a warp then write to different banks
constexpr int WEIGHT_BYTES = STRIPS * STRIP_BYTES;
constexpr int X_HALF = TOKENS * 128;  // bytes of the activations of 64 channels
constexpr int X_BYTES = 2 * X_HALF;
constexpr int OWN = GATED ? STRIPS / 2 : STRIPS;  // strips of results that a block works on at a time
constexpr int RING_BYTES = WARPS * DEPTH * (X_BYTES + WEIGHT_BYTES);

extern __shared__ __align__(128) u8 shared[];

#if HOPPER
#include "marlin_bulk.cuh"
constexpr int PIECES = (OWN + 6) / 4;  // blocks of 64 rows that those strips are of
#endif

// A weight: its rows begin at strip `first` of all, a multiple of four, and `n` of them count. Bias and residual may be
// null.
struct Weight {
  const u8* packed;
  const u16* bias;
  const u16* residual;
  u16* y;
  int first, n;
};

struct Weights {
  Weight of[WEIGHTS];
};

__device__ __forceinline__ const Weight& weight_of(const Weights& weights, int strip) {
  int index = 0;
#pragma unroll
  for (int i = 1; i < (GATED ? 1 : WEIGHTS); ++i) index += strip >= weights.of[i].first;
  return weights.of[index];
}

// Where a warp's ring is filled next: its channels of the first round, then of the second.
struct Position {
  int round, kb;

  __device__ __forceinline__ void advance(int first, int end) {
    kb += WARPS;
    if (kb >= end) kb = first, ++round;
  }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
#if HOPPER
    small(const __grid_constant__ TensorMap x, const __grid_constant__ Weights weights, int all_tokens, int all_strips,
          int k_blocks, int box) {
#else
    small(const u16* __restrict__ x, const __grid_constant__ Weights weights, int all_tokens, int all_strips,
          int k_blocks, int k) {
#endif
#if HOPPER
  const int warp = uniform(threadIdx.x >> 5);
#else
  const int warp = threadIdx.x >> 5;
#endif
  const int lane = threadIdx.x & 31;
  const int strip0 = blockIdx.x * (OWN * ROUNDS);
  const int rounds = min(ROUNDS, (all_strips - strip0 + OWN - 1) / OWN);
  const int token0 = int(blockIdx.y) * TOKENS, tokens = min(TOKENS, all_tokens - token0);

  // Swizzled activations begin at multiples of 1024 bytes.
  u8* rings = shared + ((1023u - (shared_address(shared) - 1u) % 1024u)) + 1024;
  u8* x_ring = rings + warp * DEPTH * X_BYTES;
  u8* ring = rings + WARPS * DEPTH * X_BYTES + warp * DEPTH * WEIGHT_BYTES;
  // With one round, the rings have done their work when sums are joined.
  float* parts = reinterpret_cast<float*>(rings + (ROUNDS == 1 ? 0 : RING_BYTES));

  const Position start = {warp < k_blocks ? 0 : rounds, warp};
  Position ahead = start;

  auto strip_at = [&](const Position& p, int s) {
    const int round = ROUNDS == 1 ? 0 : p.round;
    const int strip = min(strip0 + round * OWN + (GATED ? s % OWN : s), all_strips - 1);
    const Weight& weight = GATED ? weights.of[s / OWN] : weight_of(weights, strip);
    const int own = GATED ? strip : strip - weight.first;
    return weight.packed + ((long(own >> 2) * k_blocks + p.kb) * 4 + (own & 3)) * STRIP_BYTES;
  };
  auto finish = [&](int token, int row, float sum) {
    const Weight& weight = weight_of(weights, row >> 4);
    const int own = row - weight.first * 16;
    if (own >= weight.n) return;
    const long at = long(token0 + token) * weight.n + own;
    if (weight.bias) sum += to_float(weight.bias[own]);
    if (weight.residual) sum += to_float(weight.residual[at]);
    weight.y[at] = from_float(sum);
  };
#if HOPPER
  const u32 full = shared_address(rings) - 1024 + warp * DEPTH * 8;
  // By the elected lane of a warp.
  auto fill_x = [&](int slot, const Position& p) {
    if (p.round >= rounds) return;
    const u32 to = shared_address(x_ring + slot * X_BYTES), barrier = full + 8 * slot;
    copy_tensor(to, &x, p.kb * 128, token0, barrier);
    copy_tensor(to + X_HALF, &x, p.kb * 128 + 64, token0, barrier);
  };
  auto fill_weights = [&](int slot, const Position& p) {
    if (p.round >= rounds) return;
    const u32 to = shared_address(ring + slot * WEIGHT_BYTES), barrier = full + 8 * slot;
    const int begin = strip0 + (ROUNDS == 1 ? 0 : p.round * OWN), end = min(begin + OWN, all_strips);
    expect(barrier, u32(end - begin) * STRIP_BYTES * (GATED ? 2 : 1) + box * 256);
    // Strips of the same block are contiguous.
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      const int block = (begin >> 2) + piece, from = max(begin, block * 4), until = min(end, block * 4 + 4);
      if (from >= until) continue;
#pragma unroll
      for (int s = from - begin, i = 0; i < (GATED ? 2 : 1); ++i, s += OWN)
        copy_bulk(to + s * STRIP_BYTES, strip_at(p, s), u32(until - from) * STRIP_BYTES, barrier);
    }
  };
  if (lane == 0) {
    for (int i = 0; i < DEPTH; ++i) init_barrier(full + 8 * i, 1);
    publish_barriers();
  }
  __syncwarp();
#else
  auto fill_weights = [&](int slot, const Position& p) {
    if (p.round >= rounds) return;
    u8* to = ring + slot * WEIGHT_BYTES;
    constexpr int PIECES = STRIP_BYTES / 16;
    for (int i = lane; i < STRIPS * PIECES; i += 32)
      copy16(to + i * 16, strip_at(p, i / PIECES) + i % PIECES * 16, 16);
  };
  auto fill_x = [&](int slot, const Position& p) {
    if (p.round >= rounds) return;
    for (int i = lane; i < tokens * 16; i += 32) {
      const int token = i >> 4, piece = i & 7, channel = p.kb * 128 + (i & 15) * 8;
      // Channels past the last one: weights are padded there, and zeros keep them out of the sums.
      copy16(x_ring + slot * X_BYTES + (i >> 3 & 1) * X_HALF + token * 128 + (piece ^ (token & 7)) * 16,
             x + long(token0 + token) * k + min(channel, k - 8), channel < k ? 16 : 0);
    }
  };
#endif
#if HOPPER
  if (elected()) {
    Position p = start;
    for (int i = 0; i < DEPTH; ++i, p.advance(warp, k_blocks)) fill_weights(i, p);
  }
  let_next_begin();
  wait_for_previous();
  if (elected()) {
    Position p = start;
    for (int i = 0; i < DEPTH; ++i, p.advance(warp, k_blocks)) fill_x(i, p);
  }
  for (int i = 0; i < DEPTH; ++i) ahead.advance(warp, k_blocks);
#else
  for (int i = 0; i < DEPTH; ++i, ahead.advance(warp, k_blocks)) {
    fill_weights(i, ahead);
    fill_x(i, ahead);
    commit_copies();
  }
#endif

  int slot = 0;
  [[maybe_unused]] u32 parity = 0;
  for (int round = 0; round < rounds; ++round) {
    float sums[STRIPS][NT][4] = {};
    for (int kb = warp; kb < k_blocks; kb += WARPS) {
#if HOPPER
      wait(full + 8 * slot, parity);
#else
      wait_for_copies<DEPTH - 1>();
      __syncwarp();
#endif
      multiply<NT, STRIPS>(sums, ring + slot * WEIGHT_BYTES, shared_address(x_ring + slot * X_BYTES), X_HALF, tokens, lane);
      __syncwarp();
#if HOPPER
      if (elected()) {
        fill_weights(slot, ahead);
        fill_x(slot, ahead);
      }
#else
      fill_weights(slot, ahead);
      fill_x(slot, ahead);
      commit_copies();
#endif
      ahead.advance(warp, k_blocks);
      if (++slot == DEPTH) slot = 0, parity ^= 1;
    }
    if (ROUNDS == 1 || round) __syncthreads();  // `parts` is free
    // Of tokens that there are not, too: what is constant costs one instruction a sum.
    float* own = parts + (warp * TOKENS + (lane & 3) * 2) * ROW + (lane >> 2);
#pragma unroll
    for (int strip = 0; strip < STRIPS; ++strip)
#pragma unroll
      for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) own[(t * 8 + (i & 1)) * ROW + strip * 16 + (i >> 1) * 8] = sums[strip][t][i];
    __syncthreads();
#if GATED
    for (int e = threadIdx.x; e < tokens * OWN * 16; e += WARPS * 32) {
      const int token = e / (OWN * 16), row = (strip0 + round * OWN) * 16 + e % (OWN * 16);
      float gate = 0.f, up = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        gate += parts[(w * TOKENS + token) * ROW + e % (OWN * 16)];
        up += parts[(w * TOKENS + token) * ROW + OWN * 16 + e % (OWN * 16)];
      }
      finish(token, row, gate / (1.f + __expf(-gate)) * up);
    }
#else
    for (int e = threadIdx.x; e < tokens * ROWS; e += WARPS * 32) {
      const int token = e / ROWS;
      const int row = (strip0 + round * STRIPS) * 16 + e % ROWS;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += parts[(w * TOKENS + token) * ROW + e % ROWS];
      finish(token, row, sum);
    }
#endif
  }
}
