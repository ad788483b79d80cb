// y = W x + bias for up to 16 tokens at a time: a stream of packed weights, read once.
//
// A block of the grid has a share of the strips (16 rows each), STRIPS of them at a time, and of the input channels
// (rank of SPLIT). Its WARPS take turns at 128 channels of all these strips. Every warp owns a ring of DEPTH pieces,
// weights and activations, and fills it itself, so nothing is shared until the strips are done: then sums meet in
// shared memory in the order of the warps, and those of the ranks in the order of the ranks. HOPPER copies weights
// in bulk, starts that before the kernel ahead has ended, and joins ranks in a cluster; elsewhere copies are cp.async
// and ranks join through `partials` and the kernel of marlin_join.cu. Macros: those of marlin_block.cuh, TOKENS (8 or
// 16), WARPS, STRIPS, ROUNDS (of STRIPS strips in a share), DEPTH, SPLIT, HOPPER.
#include "marlin_block.cuh"

constexpr int NT = TOKENS / 8;
constexpr int ROWS = STRIPS * 16;
constexpr int ROW = ROWS + 4;  // floats of one token's sums: lanes of a warp then write to different banks
constexpr int WEIGHT_BYTES = STRIPS * STRIP_BYTES;
constexpr int X_HALF = TOKENS * 128;  // bytes of the activations of 64 channels
constexpr int X_BYTES = 2 * X_HALF;
constexpr int RING_BYTES = WARPS * DEPTH * (X_BYTES + WEIGHT_BYTES);

extern __shared__ __align__(128) u8 shared[];

#if HOPPER
#include "marlin_bulk.cuh"
#endif

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
    small(const __grid_constant__ TensorMap x, u16* __restrict__ y, const u8* __restrict__ packed,
          const u16* __restrict__ bias, int all_tokens, int n, int all_strips, int k_blocks, int box) {
#else
    small(const u16* __restrict__ x, u16* __restrict__ y, const u8* __restrict__ packed, const u16* __restrict__ bias,
          float* __restrict__ partials, int all_tokens, int n, int all_strips, int k_blocks, int k) {
#endif
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int rank = blockIdx.x % SPLIT, strip0 = blockIdx.x / SPLIT * (STRIPS * ROUNDS);
  const int rounds = min(ROUNDS, (all_strips - strip0 + STRIPS - 1) / STRIPS);
  const int k0 = rank * k_blocks / SPLIT, k1 = (rank + 1) * k_blocks / SPLIT;
  const int tokens = min(TOKENS, all_tokens - int(blockIdx.y) * TOKENS);
  y += long(blockIdx.y) * TOKENS * n;

  // Swizzled activations begin at multiples of 1024 bytes.
  u8* rings = shared + ((1023u - (shared_address(shared) - 1u) % 1024u)) + 1024;
  u8* x_ring = rings + warp * DEPTH * X_BYTES;
  u8* ring = rings + WARPS * DEPTH * X_BYTES + warp * DEPTH * WEIGHT_BYTES;
  const int part_bytes = WARPS * tokens * ROW * 4;
  // With one round, the rings have done their work when sums are joined.
  float* parts = reinterpret_cast<float*>(rings + (ROUNDS == 1 ? 0 : RING_BYTES));

  const int first = k0 + warp;
  const Position start = {first < k1 ? 0 : rounds, first};
  Position ahead = start, ahead_x = start;

  auto strip_at = [&](const Position& p, int s) {
    const int strip = min(strip0 + p.round * STRIPS + s, all_strips - 1);
    return packed + ((long(strip >> 2) * k_blocks + p.kb) * 4 + (strip & 3)) * STRIP_BYTES;
  };
#if HOPPER
  const u32 full = shared_address(rings) - 1024 + warp * DEPTH * 8;
  auto fill_x = [&](int slot, const Position& p) {
    if (p.round >= rounds || lane >= 2) return;
    copy_tensor(shared_address(x_ring + slot * X_BYTES + lane * X_HALF), &x, p.kb * 128 + lane * 64,
                blockIdx.y * TOKENS, full + 8 * slot);
  };
  auto fill_weights = [&](int slot, const Position& p) {
    if (p.round >= rounds) return;
    const u32 to = shared_address(ring + slot * WEIGHT_BYTES), barrier = full + 8 * slot;
    // Strips of the same block are contiguous: each lane copies those of one block.
    const int begin = strip0 + p.round * STRIPS, end = min(begin + STRIPS, all_strips);
    if (lane == 0) expect(barrier, u32(end - begin) * STRIP_BYTES + box * 256);
    __syncwarp();
    const int from = max(begin, ((begin >> 2) + lane) * 4), until = min(end, ((begin >> 2) + lane) * 4 + 4);
    if (from < until)
      copy_bulk(to + (from - begin) * STRIP_BYTES, strip_at(p, from - begin), u32(until - from) * STRIP_BYTES, barrier);
  };
  if (lane == 0) {
    for (int i = 0; i < DEPTH; ++i) init_barrier(full + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
#if SPLIT > 1
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
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
             x + long(blockIdx.y * TOKENS + token) * k + min(channel, k - 8), channel < k ? 16 : 0);
    }
  };
#endif
  for (int i = 0; i < DEPTH; ++i) {
    fill_weights(i, ahead);
    ahead.advance(first, k1);
#if !HOPPER
    fill_x(i, ahead_x);
    ahead_x.advance(first, k1);
    commit_copies();
#endif
  }
#if HOPPER
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  for (int i = 0; i < DEPTH; ++i) {
    fill_x(i, ahead_x);
    ahead_x.advance(first, k1);
  }
#endif

  int slot = 0;
  [[maybe_unused]] u32 parity = 0;
  for (int round = 0; round < rounds; ++round) {
    float sums[STRIPS][NT][4] = {};
    for (int kb = first; kb < k1; kb += WARPS) {
#if HOPPER
      wait(full + 8 * slot, parity);
#else
      wait_for_copies<DEPTH - 1>();
      __syncwarp();
#endif
      multiply<NT, STRIPS>(sums, ring + slot * WEIGHT_BYTES, shared_address(x_ring + slot * X_BYTES), X_HALF, tokens, lane);
      __syncwarp();
      fill_weights(slot, ahead);
      fill_x(slot, ahead);
#if !HOPPER
      commit_copies();
#endif
      ahead.advance(first, k1);
      if (++slot == DEPTH) slot = 0, parity ^= 1;
    }
    if (ROUNDS == 1 || round) __syncthreads();  // `parts` is free
    float* own = parts + warp * tokens * ROW;
#pragma unroll
    for (int strip = 0; strip < STRIPS; ++strip)
#pragma unroll
      for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = t * 8 + (lane & 3) * 2 + (i & 1);
          if (token < tokens) own[token * ROW + strip * 16 + (i >> 1) * 8 + (lane >> 2)] = sums[strip][t][i];
        }
    __syncthreads();
#if HOPPER && SPLIT > 1
    if (round == 0) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // all ranks have started
    const int per_rank = (tokens * ROWS / 16 + 2 * SPLIT - 1) / (2 * SPLIT) * 32;
    float* gathered =
        reinterpret_cast<float*>(rings + (ROUNDS == 1 ? max(RING_BYTES, part_bytes) : RING_BYTES + part_bytes));
#endif
    for (int e = threadIdx.x; e < tokens * ROWS; e += WARPS * 32) {
      const int token = e / ROWS;
      [[maybe_unused]] const int row = (strip0 + round * STRIPS) * 16 + e % ROWS;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += parts[(w * tokens + token) * ROW + e % ROWS];
#if SPLIT == 1
      if (row < n) y[long(token) * n + row] = from_float(bias ? sum + to_float(bias[row]) : sum);
#elif HOPPER
      // Ranks take turns at 32 sums.
      store_at_rank(gathered + (rank * ROUNDS + round) * per_rank + (e >> 5) / SPLIT * 32 + (e & 31),
                    (e >> 5) % SPLIT, sum);
#else
      if (row < n) partials[(long(rank) * all_tokens + blockIdx.y * TOKENS + token) * n + row] = sum;
#endif
    }
#if HOPPER && SPLIT > 1
    if (round + 1 < rounds) continue;
    cluster_barrier();
    for (int i = threadIdx.x; i < rounds * per_rank; i += WARPS * 32) {
      const int r = i / per_rank, in_round = i - r * per_rank;
      const int e = (in_round >> 5) * 32 * SPLIT + rank * 32 + (in_round & 31);
      const int token = e / ROWS, row = (strip0 + r * STRIPS) * 16 + e % ROWS;
      float sum = 0.f;
#pragma unroll
      for (int c = 0; c < SPLIT; ++c) sum += gathered[(c * ROUNDS + r) * per_rank + in_round];
      if (token < tokens && row < n) y[long(token) * n + row] = from_float(bias ? sum + to_float(bias[row]) : sum);
    }
#endif
  }
}
