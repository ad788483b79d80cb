// The packed weight of kernels/marlin_layout.py, by strips of 16 rows and 128 input channels, on the tensor cores
// through mma.sync. Macros: BF16 (activations), SCALE_BF16 (scales), GROUP (32, 64 or 128 channels).
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#include "marlin_ptx.cuh"

constexpr int GROUPS = 128 / GROUP;              // groups of a strip
constexpr int SCALES = 1024;                     // where a strip's scales begin, in bytes
constexpr int ZEROS = SCALES + 32 * GROUPS;      // and its zero points
constexpr int STRIP_BYTES = ZEROS + 16 * GROUPS;
constexpr int TILES = GROUP / 16;                // mma steps of a group

// What `unpack` adds to codes of rows 0 to 7 of a strip, and of rows 8 to 15.
constexpr int LOW_BASE = BF16 ? 32 : 16, HIGH_BASE = BF16 ? 32 : 256;
// For numbers from such a base on: the bits of the negated base as a float, and how far they are from those of one more.
constexpr u32 LOW_BITS = BF16 ? 0xC2000000u : 0xC1800000u, LOW_STEP = BF16 ? 0x40000u : 0x80000u;
constexpr u32 HIGH_BITS = BF16 ? 0xC2000000u : 0xC3800000u, HIGH_STEP = BF16 ? 0x40000u : 0x8000u;

__device__ __forceinline__ u32 rotated(u32 word, u32 bits) { return __funnelshift_r(word, word, bits); }

// A word's codes, in pairs, as numbers: four bits of a mantissa whose exponent is that of a base, so that neither a
// conversion nor a subtraction is needed. Of float16's mantissa either the four bits from bit 6 on have the last worth 1
// (16 + q) or those from bit 2 on (256 + q), so that one rotation serves four pairs; bfloat16's has room for one pair.
__device__ __forceinline__ void unpack(u32 (&a)[4], u32 word) {
#if BF16
  a[0] = masked(rotated(word, 4), 0x003C003Cu, 0x42004200u);
  a[1] = masked(rotated(word, 8), 0x003C003Cu, 0x42004200u);
  a[2] = masked(rotated(word, 12), 0x003C003Cu, 0x42004200u);
  a[3] = masked(word, 0x003C003Cu, 0x42004200u);
#else
  const u32 turned = rotated(word, 8);
  a[0] = masked(word, 0x03C003C0u, 0x4C004C00u);
  a[1] = masked(turned, 0x003C003Cu, 0x5C005C00u);
  a[2] = masked(turned, 0x03C003C0u, 0x4C004C00u);
  a[3] = masked(word, 0x003C003Cu, 0x5C005C00u);
#endif
}

__device__ __forceinline__ float bfloat_to_float(u16 bits) { return __uint_as_float(u32(bits) << 16); }

__device__ __forceinline__ float scale_to_float(u16 bits) {
#if SCALE_BF16
  return bfloat_to_float(bits);
#else
  return half_to_float(bits);
#endif
}

__device__ __forceinline__ float to_float(u16 bits) {
#if BF16
  return bfloat_to_float(bits);
#else
  return half_to_float(bits);
#endif
}

// Half a strip's activations, 64 channels, in the order of the second operand: b[step][token tile]. They lie in rows
// of 128 bytes, one for each token; the 16-byte pieces of row r are swizzled: piece c is at c ^ (r & 7).
template <int NT>
__device__ __forceinline__ void load_x(u32 (&b)[4][NT][2], u32 x, int tokens, int lane) {
#pragma unroll
  for (int t = 0; t < NT; ++t) {
    // Columns of the product are independent: those beyond the last token repeat it and are not stored.
    const int row = min(t * 8 + (lane & 7), tokens - 1);
#pragma unroll
    for (int p = 0; p < 2; ++p)
      load_matrices(b[2 * p][t][0], b[2 * p][t][1], b[2 * p + 1][t][0], b[2 * p + 1][t][1],
                    x + row * 128 + ((p * 4 + (lane >> 3)) ^ (row & 7)) * 16);
  }
}

// y += W x for S strips of weights; x and x + half_bytes are the activations of the halves of their 128 channels.
// The product is taken with base + q; what that adds, (base + z) times the sum of the group's activations, is known
// exactly and subtracted before the scale is applied. Strips take turns, so that no product waits for the last.
// Sums of activations are a product with ones that has the activations as its first operand: what a lane has of 32
// channels of 8 tokens are the registers of the first operand for 16 rows, half of the channels of token r in row r and
// half in row r + 8. So one product sums 32 channels, where ones first would take two, but sums come to other lanes.
template <int NT, int S>
__device__ __forceinline__ void multiply(float (&y)[S][NT][4], const u8* strips, u32 x, int half_bytes, int tokens,
                                         int lane) {
  const u32 ones[2] = {BF16 ? 0x3F803F80u : 0x3C003C00u, BF16 ? 0x3F803F80u : 0x3C003C00u};
  float sums[NT][4], acc[S][NT][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 words[S];
#pragma unroll
    for (int strip = 0; strip < S; ++strip)
      words[strip] = reinterpret_cast<const uint4*>(strips + strip * STRIP_BYTES)[half * 32 + lane];
    u32 b[4][NT][2];
    load_x<NT>(b, x + half * half_bytes, tokens, lane);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int step = half * 4 + s;
      if (step % TILES == 0) {
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[t][i] = 0.f;
#pragma unroll
            for (int strip = 0; strip < S; ++strip) acc[strip][t][i] = 0.f;
          }
      }
#pragma unroll
      for (int strip = 0; strip < S; ++strip) {
        u32 a[4];
        unpack(a, s == 0 ? words[strip].x : s == 1 ? words[strip].y : s == 2 ? words[strip].z : words[strip].w);
#pragma unroll
        for (int t = 0; t < NT; ++t) mma(acc[strip][t], a, b[s][t]);
      }
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        const u32 pair[4] = {b[s & ~1][t][0], b[s & ~1][t][1], b[s | 1][t][0], b[s | 1][t][1]};
        if (s & 1) mma(sums[t], pair, ones);
      }
      if ((step + 1) % TILES) continue;
      // Lane l has the sums of token l / 4; it wants those of its columns of the product.
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        const float own = sums[t][0] + sums[t][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) sums[t][i] = sums[t][i + 2] = from_lane(own, (lane & 3) * 8 + i * 4);
      }
#pragma unroll
      for (int strip = 0; strip < S; ++strip) {
        const int pair = (step / TILES) * 8 + (lane >> 2);
        const u8* own = strips + strip * STRIP_BYTES;
        const u32 scale = reinterpret_cast<const u32*>(own + SCALES)[pair];
        const u32 zero = reinterpret_cast<const u16*>(own + ZEROS)[pair];
        const float scales[2] = {scale_to_float(u16(scale)), scale_to_float(u16(scale >> 16))};
        // -(base + z), for z up to 16, put together from its bits: conversions run at a quarter of the rate.
        const float offsets[2] = {__uint_as_float(LOW_BITS + (zero & 255u) * LOW_STEP),
                                  __uint_as_float(HIGH_BITS + (zero >> 8) * HIGH_STEP)};
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            y[strip][t][i] += scales[i >> 1] * __fmaf_rn(offsets[i >> 1], sums[t][i], acc[strip][t][i]);
      }
    }
  }
}
