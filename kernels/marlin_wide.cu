// y = W x + bias for many tokens, on Hopper's wgmma: weights are dequantized in registers, activations come from
// shared memory.
//
// A block of the grid has 128 rows and TOKENS tokens and walks along the channels, 128 at a time, through a ring of
// STAGES stages that four threads fill: two copy weights in bulk, two activations through a tensor map, which swizzles
// them. Two warpgroups have 64 rows each; a third, which those threads are of, leaves them its registers. SPLIT blocks
// share the channels and leave their sums in `partials`, for marlin_join.cu. Macros: those of marlin_block.cuh, TOKENS
// (32, 64, 128 or 256), SPLIT, STAGES.
#include "marlin_block.cuh"
#include "marlin_bulk.cuh"
#include "marlin_wgmma.cuh"

constexpr int BLOCKS = 2;  // of 64 rows, one for each warpgroup
constexpr int ROWS = 64 * BLOCKS;
constexpr int BLOCK_BYTES = 4 * STRIP_BYTES;
constexpr int X_HALF = TOKENS * 128;  // bytes of the activations of 64 channels
constexpr int STAGE_BYTES = 2 * X_HALF + (BLOCKS * BLOCK_BYTES + 1023) / 1024 * 1024;
constexpr int CONSUMERS = 128 * BLOCKS;
constexpr int COPIERS = BLOCKS + 2;  // one for each block of weights and each half of the activations
constexpr int SET = 4;  // steps of 16 channels that are dequantized, then multiplied: half a stage
constexpr int SET_GROUPS = GROUP == 32 ? 2 : 1;

extern __shared__ __align__(1024) u8 shared[];

// Matrix descriptor of activations at `address`: rows of 128 bytes, swizzled by 128 bytes, groups of 8 rows 1024 apart.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return u64((address & 0x3FFFF) >> 4) | u64(1) << 16 | u64(64) << 32 | u64(1) << 62;
}

__device__ __forceinline__ u32 subtract2(u32 a, u32 b) {
  u32 out;
#if BF16
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#else
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#endif
  return out;
}

__device__ __forceinline__ u32 multiply2(u32 a, u32 b) {
  u32 out;
#if BF16
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#else
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#endif
  return out;
}

// A number in both halves of a register, in the dtype of the activations.
__device__ __forceinline__ u32 twice(float value) { return from_float(value) * 0x10001u; }

// 16 + z in both halves of a register, for z up to 16: like 16 + q, put together from its bits.
__device__ __forceinline__ u32 sixteen_and(u32 z) { return BF16 ? 0x41804180u + z * 0x80008u : 0x4C004C00u + z * 0x400040u; }

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

  // As (q - z) s. The difference is exact; the product is rounded once.
  __device__ __forceinline__ void dequantize(u32 (&a)[SET][4]) const {
    u32 scale[2], offset[2];
#pragma unroll
    for (int s = 0; s < SET; ++s) {
      if (s % TILES == 0) {
        const u32 pair = scales[s / TILES], zero = zeros[s / TILES];
#if BF16 == SCALE_BF16
        scale[0] = (pair & 0xFFFFu) * 0x10001u, scale[1] = (pair >> 16) * 0x10001u;
#else
        scale[0] = twice(scale_to_float(u16(pair))), scale[1] = twice(scale_to_float(u16(pair >> 16)));
#endif
        offset[0] = sixteen_and(zero & 255u), offset[1] = sixteen_and(zero >> 8);
      }
      unpack(a[s], s == 0 ? words.x : s == 1 ? words.y : s == 2 ? words.z : words.w);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[s][i] = multiply2(subtract2(a[s][i], offset[i & 1]), scale[i & 1]);
    }
  }
};

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    wide(const __grid_constant__ TensorMap x_map, u16* __restrict__ y, const u8* __restrict__ packed,
         const u16* __restrict__ bias, float* __restrict__ partials, int tokens, int n, int row_blocks, int k_blocks,
         int token_tiles) {
  const int rank = blockIdx.x % SPLIT, tile = blockIdx.x / SPLIT;
  const int token0 = tile % token_tiles * TOKENS, block0 = tile / token_tiles * BLOCKS;
  const int k0 = rank * k_blocks / SPLIT, steps = (rank + 1) * k_blocks / SPLIT - k0;
  const u32 base = (shared_address(shared) + 1023) & ~1023u;
  u8* ring = shared + (base - shared_address(shared)) + 1024;
  const u32 full = base, empty = base + 8 * STAGES;

  if (threadIdx.x == CONSUMERS) {
    for (int i = 0; i < STAGES; ++i) {
      init_barrier(full + 8 * i, COPIERS);
      init_barrier(empty + 8 * i, CONSUMERS / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;");

  if (threadIdx.x >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    // One thread of each warp: copies are issued one at a time, and four threads wait for four of them at once.
    const int copier = (threadIdx.x - CONSUMERS) >> 5;
    if (threadIdx.x & 31) return;
    const bool weights = copier < BLOCKS;
    const u32 bytes = weights ? (block0 + copier < row_blocks ? BLOCK_BYTES : 0) : X_HALF;
    const u32 to = shared_address(ring) + (weights ? 2 * X_HALF + copier * BLOCK_BYTES : (copier - BLOCKS) * X_HALF);
    const u8* from = packed + (long(block0 + copier) * k_blocks + k0) * BLOCK_BYTES;
    if (!weights) asm volatile("griddepcontrol.wait;" ::: "memory");
    int slot = 0;
    u32 parity = 1;  // the first round of stages is free
    for (int step = 0; step < steps; ++step) {
      const u32 barrier = full + 8 * slot;
      wait(empty + 8 * slot, parity);
      expect(barrier, bytes);
      if (!weights)
        copy_tensor(to + slot * STAGE_BYTES, &x_map, (k0 + step) * 128 + (copier - BLOCKS) * 64, token0, barrier);
      else if (bytes)
        copy_bulk(to + slot * STAGE_BYTES, from + long(step) * BLOCK_BYTES, BLOCK_BYTES, barrier);
      if (++slot == STAGES) slot = 0, parity ^= 1;
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");  // what the block was launched with, less those 40
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    const int own = 2 * X_HALF + (group * 4 + warp) * STRIP_BYTES;
    float acc[TOKENS / 2];
    u32 a[2][SET][4];
    Packed next;
    int slot = 0, before = 0;
    u32 parity = 0;
    wait(full, 0);
    next.load(ring + own, 0, lane);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const u8* stage = ring + slot * STAGE_BYTES;
      const u64 x = descriptor(shared_address(stage));
      const int done = before;
      before = slot;
      if (++slot == STAGES) slot = 0, parity ^= 1;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        next.dequantize(a[half]);
        if (half == 0) next.load(stage + own, 1, lane);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int s = 0; s < SET; ++s) wgmma(acc, a[half][s], x + half * (X_HALF >> 4) + s * 2, step || half || s);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (half == 1 && step + 1 < steps) {
          wait(full + 8 * slot, parity);
          next.load(ring + slot * STAGE_BYTES + own, 0, lane);
        }
        // The half before this one is done with its registers, and after a stage's first the stage before is free.
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (half == 0 && step && lane == 0) arrive(empty + 8 * done);
      }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");

    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
    // Through shared memory, so that rows leave together.
    constexpr int STRIDE = TOKENS + 2;
    float* sums = reinterpret_cast<float*>(ring);
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i += 2) {
      const int row = group * 64 + warp * 16 + (i >> 1 & 1) * 8 + (lane >> 2);
      *reinterpret_cast<float2*>(sums + row * STRIDE + i / 4 * 8 + (lane & 3) * 2) = make_float2(acc[i], acc[i + 1]);
    }
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
    const int end = min(TOKENS, tokens - token0) * ROWS;
#pragma unroll 4
    for (int e = threadIdx.x; e < end; e += CONSUMERS) {
      const int token = e / ROWS, row = block0 * 64 + e % ROWS;
      const float sum = sums[e % ROWS * STRIDE + token];
      if (row < n) {
#if SPLIT > 1
        partials[(long(rank) * tokens + token0 + token) * n + row] = sum;
#else
        y[long(token0 + token) * n + row] = from_float(bias ? sum + to_float(bias[row]) : sum);
#endif
      }
    }
  }
}
