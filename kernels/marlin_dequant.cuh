// What the wgmma kernels share, on top of marlin_wgmma.cuh: where in its ring a thread is, the descriptor of swizzled
// activations, weights dequantized into the registers of the first operand, and their products.
constexpr int SET = 4;             // steps of 16 channels that are loaded together: half a stage
constexpr int EACH = 2;            // steps of a part, which is dequantized while the part before it is multiplied
constexpr int PARTS = SET / EACH;  // of a set
constexpr int SET_GROUPS = GROUP == 32 ? 2 : 1;

// A stage of a ring of COUNT, BYTES apart. Who waits for stages to be full begins with parity 0; who waits for them to
// be empty with 1, since the first round is.
template <int COUNT, int BYTES>
struct RingStage {
  u32 parity;
  int slot = 0;
  u32 at = 0;  // how far it is from the first

  __device__ __forceinline__ void advance() {
    at += BYTES;
    if (++slot == COUNT) slot = 0, at = 0, parity ^= 1;
  }
};

// Matrix descriptor of activations at `address`: rows of 128 bytes, swizzled by 128 bytes, groups of 8 rows 1024 apart.
__device__ __forceinline__ u64 descriptor(u32 address) { return u64(64 | 1 << 30) << 32 | (address >> 4 | 1 << 16); }

// Where in shared memory a lane's part of a strip at `strip` lies.
struct Own {
  u32 words, scales, zeros;

  __device__ __forceinline__ Own(u32 strip, int lane)
      : words(kept(strip + lane * 16)),
        scales(kept(strip + SCALES + (lane >> 2) * 4)),
        zeros(kept(strip + ZEROS + (lane >> 2) * 2)) {}

 private:
  // From this lane to itself: what comes out of a shuffle, the compiler does not compute anew in every step.
  __device__ __forceinline__ static u32 kept(u32 value) { return __shfl_sync(~0u, value, threadIdx.x & 31); }
};

// A lane's part of a set: codes as they are stored, scales of rows 0 to 7 and of rows 8 to 15, and what to subtract from
// the numbers that `unpack` makes for either, in the dtype of the activations.
struct Packed {
  u32 words[4], scales[SET_GROUPS], offsets[SET_GROUPS];

  // The first or the second set of the strip that is `at` bytes further on than `own` says.
  __device__ __forceinline__ void load(const Own& own, u32 at, int half) {
    load_words(own, at, half);
#pragma unroll
    for (int g = 0; g < SET_GROUPS; ++g) {
      const int pair = (half * SET / TILES + g) * 8;
      const u32 scale = load_shared4(own.scales + at + pair * 4), zero = load_shared2(own.zeros + at + pair * 2);
#if BF16 == SCALE_BF16
      scales[g] = scale;
#else
      scales[g] = from_floats(scale_to_float(u16(scale)), scale_to_float(u16(scale >> 16)));
#endif
      // base + z, put together from its bits as base + q is. The upper rows' zero point is the upper byte of `zero`; in
      // float16 its last bit goes to bit 18 of the pair, and that of the lower rows to bit 6.
#if BF16
      offsets[g] = 0x42004200u + ((zero | zero << 8) & 0xFF00FFu) * 4;
#else
      offsets[g] = 0x5C004C00u + zero * 0x400 - (zero & 0xFFu) * 0x3C0;
#endif
    }
  }

  // The second set of a strip whose first is `first`.
  __device__ __forceinline__ void load_second(const Own& own, u32 at, const Packed& first) {
    if (SET / TILES) return load(own, at, 1);
    load_words(own, at, 1);
    scales[0] = first.scales[0], offsets[0] = first.offsets[0];
  }

  // A part as (q - z) s. The difference is exact; the product is rounded once.
  __device__ __forceinline__ void dequantize(u32 (&a)[EACH][4], int part) const {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int s = part * EACH + i, g = s / TILES;
      const u32 offset[2] = {lower_twice(offsets[g]), upper_twice(offsets[g])};
      const u32 scale[2] = {lower_twice(scales[g]), upper_twice(scales[g])};
      unpack(a[i], words[s]);
#pragma unroll
      for (int j = 0; j < 4; ++j) a[i][j] = multiply2(subtract2(a[i][j], offset[j & 1]), scale[j & 1]);
    }
  }

 private:
  __device__ __forceinline__ void load_words(const Own& own, u32 at, int half) {
    load_shared16(words, own.words + at + half * 512);
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

// A stage of 128 channels: its products are begun, those of the last part may still be under way. A part is dequantized
// while the one before it is multiplied. `packs` are the stage's first half, and in the end the next one's.
//
// `before_done` is called when all products of stages before are done, `halfway` before products of the second half, and
// `load_next` for what the next stage begins with.
template <class BeforeDone, class Halfway, class LoadNext>
__device__ __forceinline__ void multiply_stage(float (&acc)[TOKENS / 2], u32 (&a)[2][EACH][4], Packed (&packs)[2],
                                               const Own& own, u32 at, u64 x, int add, const BeforeDone& before_done,
                                               const Halfway& halfway, const LoadNext& load_next) {
#pragma unroll
  for (int part = 0; part < 2 * PARTS; ++part) {
    const int half = part / PARTS;
    packs[half].dequantize(a[part % 2], part % PARTS);
    if (part == 0) packs[1].load_second(own, at, packs[0]);
    if (part == PARTS) halfway();
    multiply_part(acc, a[part % 2], x + half * (TOKENS * 128 >> 4), part % PARTS, add || part);
    if (part == PARTS) load_next(packs[0]);
    wait_for_products<1>();  // the part before this one is done with its registers
    if (part == 0) before_done();
  }
}
