// Sums that products leave in the registers of a warpgroup, 64 rows: on their way to others, and to y.
__device__ __forceinline__ float4 quad(const float* acc, int q) {
  return make_float4(acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]);
}

// Adds COUNT sums that another thread left, every four of them `stride` quads after those before.
template <int COUNT>
__device__ __forceinline__ void add(float* acc, const float4* from, int stride) {
#pragma unroll
  for (int q = 0; q < COUNT / 4; ++q) {
    const float4 other = from[q * stride];
    acc[4 * q] += other.x, acc[4 * q + 1] += other.y, acc[4 * q + 2] += other.z, acc[4 * q + 3] += other.w;
  }
}

// Rows `row0` to `row0` + 63 of y, of 2 COUNT tokens from `token0` on, from a warpgroup's sums, through shared memory,
// where rows of a token come to lie side by side: 128 bytes a token, in swizzled pieces of 16. `group` is the
// warpgroup's number.
template <int COUNT>
__device__ __forceinline__ void store(const float* acc, u8* staged, u16* y, const u16* bias, int row0, int token0,
                                      int tokens, int n, int group) {
  const int thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31;
  const int own = row0 + warp * 16 + (lane >> 2);
  const float low = bias && own < n ? to_float(bias[own]) : 0.f;
  const float high = bias && own + 8 < n ? to_float(bias[own + 8]) : 0.f;
  const int in = (lane >> 4) * 8 + (lane & 7);
  const u32 to = shared_address(staged) + in * 128 + ((warp * 2 + (lane >> 3 & 1)) ^ (in & 7)) * 16;
#pragma unroll
  for (int c = 0; c < COUNT; c += 8) {  // 16 tokens, or 8
    u32 pairs[COUNT < 8 ? 2 : 4];
#pragma unroll
    for (int i = 0; i < sizeof(pairs) / 4; ++i) {
      const float shift = i & 1 ? high : low;
      pairs[i] = from_floats(acc[c + 2 * i] + shift, acc[c + 2 * i + 1] + shift);
    }
    store_transposed(to + c * 256, pairs);
  }
  hand_to_copies();  // which come once these sums are read
  warpgroup_barrier(group);
  const int row = row0 + (thread & 7) * 8;
  if (row >= n) return;
  const int first = thread >> 3, end = min(COUNT * 2, tokens - token0);
  const u8* from = staged + first * 128 + ((thread & 7) ^ (first & 7)) * 16;
  u16* at = y + long(token0 + first) * n + row;
  if (n % 8 == 0) {
#pragma unroll 8
    for (int token = first; token < end; token += 16, from += 2048, at += 16 * n)
      *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(from);
  } else {
#pragma unroll 1
    for (int token = first; token < end; token += 16, from += 2048, at += 16 * n)
#pragma unroll 1
      for (int i = 0; i < min(8, n - row); ++i) at[i] = reinterpret_cast<const u16*>(from)[i];
  }
}
