// Activations as integers of 16 bits in steps of a power of two.

constexpr float MAGIC = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer
constexpr u32 MAGIC_BITS = 0x4b400000;
constexpr int LEAST = 15;  // exponent below which steps do not shrink further

// A chunk of a token's activations, none from `present` on.
__device__ __forceinline__ void load_chunk(u32 (&raw)[CHUNK / 2], const u16* from, int present, bool aligned) {
  if (aligned && present >= CHUNK) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) *reinterpret_cast<uint4*>(raw + 4 * r) = reinterpret_cast<const uint4*>(from)[r];
  } else {
#pragma unroll
    for (int j = 0; j < CHUNK / 2; ++j) {
      raw[j] = 2 * j < present ? from[2 * j] : 0;
      raw[j] |= 2 * j + 1 < present ? u32(from[2 * j + 1]) << 16 : 0;
    }
  }
}

// Bits of the largest of them, without signs: in order, infinities and what is no number last.
__device__ __forceinline__ int largest(const u32 (&raw)[CHUNK / 2]) {
  int low = 0, high = 0;
#pragma unroll
  for (int i = 0; i < CHUNK / 2; ++i) {
    low = max(low, int(raw[i] & 0x7fff));
    high = max(high, int(raw[i] >> 16 & 0x7fff));
  }
  return max(low, high);
}

// The chunk as integers in steps of 2^(e - 14), if the `largest` of several is below 2^(e + 1): it becomes less than
// 2^15. Returns their sum.
__device__ __forceinline__ int to_integers(u32 (&raw)[CHUNK / 2], int largest, float& step) {
  const int exponent = __float_as_uint(to_float(u16(largest))) >> 23;  // 127 + e
  const int e = max(exponent, LEAST);
  const float up = __uint_as_float(u32(268 - e) << 23);
  u32 sum = 0;
#pragma unroll
  for (int i = 0; i < CHUNK / 2; ++i) {
    const u32 first = __float_as_uint(to_float(u16(raw[i])) * up + MAGIC);
    const u32 second = __float_as_uint(to_float(u16(raw[i] >> 16)) * up + MAGIC);
    raw[i] = first & 0xffff | second << 16;
    sum += first + second;
  }
  // One infinity or one that is no number spoils all that share a step.
  step = __uint_as_float(exponent == 255 ? 0x7fc00000 : u32(e - 14) << 23);
  return int(sum - CHUNK * MAGIC_BITS);
}

// A number for each token from shared memory.
template <class T> __device__ __forceinline__ void for_tokens(T (&out)[TOKENS], const T* from) {
