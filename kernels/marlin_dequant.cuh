// What the wgmma kernels share, on top of marlin_wgmma.cuh: the descriptor of swizzled activations, weights dequantized
// into the registers of the first operand, and their products.
constexpr int SET = 4;             // steps of 16 channels that are loaded together: half a stage
constexpr int EACH = 2;            // steps of a part, which is dequantized while the part before it is multiplied
constexpr int PARTS = SET / EACH;  // of a set
constexpr int SET_GROUPS = GROUP == 32 ? 2 : 1;

// Matrix descriptor of activations at `address`: rows of 128 bytes, swizzled by 128 bytes, groups of 8 rows 1024 apart.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return u64((address & 0x3FFFF) >> 4) | u64(1) << 16 | u64(64) << 32 | u64(1) << 62;
}

// A number in both halves of a register, in the dtype of the activations.
__device__ __forceinline__ u32 twice(float value) { return from_floats(value, value); }

// base + z in both halves of a register, for z up to 16: like base + q, put together from its bits.
__device__ __forceinline__ u32 low_and(u32 z) { return BF16 ? 0x42004200u + z * 0x40004u : 0x4C004C00u + z * 0x400040u; }
__device__ __forceinline__ u32 high_and(u32 z) { return BF16 ? 0x42004200u + z * 0x40004u : 0x5C005C00u + z * 0x40004u; }

// A lane's part of a set as it is stored.
struct Packed {
  uint4 words;
  u32 scales[SET_GROUPS], zeros[SET_GROUPS];

  __device__ __forceinline__ void load(const u8* strip, int half, int lane) {
    words = reinterpret_cast<const uint4*>(strip)[half * 32 + lane];
#pragma unroll
    for (int g = 0; g < SET_GROUPS; ++g) {
      const int pair = (half * SET / TILES + g) * 8 + (lane >> 2);
      scales[g] = reinterpret_cast<const u32*>(strip + SCALES)[pair];
      zeros[g] = reinterpret_cast<const u16*>(strip + ZEROS)[pair];
    }
  }

  // A part as (q - z) s. The difference is exact; the product is rounded once.
  __device__ __forceinline__ void dequantize(u32 (&a)[EACH][4], int part) const {
    u32 scale[2], offset[2];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int s = part * EACH + i;
      if (i == 0 || s % TILES == 0) {
        const u32 pair = scales[s / TILES], zero = zeros[s / TILES];
#if BF16 == SCALE_BF16
        scale[0] = (pair & 0xFFFFu) * 0x10001u, scale[1] = (pair >> 16) * 0x10001u;
#else
        scale[0] = twice(scale_to_float(u16(pair))), scale[1] = twice(scale_to_float(u16(pair >> 16)));
#endif
        offset[0] = low_and(zero & 255u), offset[1] = high_and(zero >> 8);
      }
      unpack(a[i], s == 0 ? words.x : s == 1 ? words.y : s == 2 ? words.z : words.w);
#pragma unroll
      for (int j = 0; j < 4; ++j) a[i][j] = multiply2(subtract2(a[i][j], offset[j & 1]), scale[j & 1]);
    }
  }
};

// Begins acc += a b, or with `add` 0 acc = a b, for part `part` of a set whose activations `b` describes.
__device__ __forceinline__ void multiply_part(float (&acc)[TOKENS / 2], const u32 (&a)[EACH][4], u64 b, int part,
                                              int add) {
  begin_products();
#pragma unroll
  for (int i = 0; i < EACH; ++i) wgmma(acc, a[i], b + (part * EACH + i) * 2, add || i);
  commit_products();
}
