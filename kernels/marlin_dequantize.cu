// The packed weight back to a dense (rows, k) matrix of the activations' dtype, for products long enough that a
// dense matrix product repays it. One warp per strip; rows leave as 256 contiguous bytes.
#include "marlin_block.cuh"

extern "C" __global__ void __launch_bounds__(128)
    dequantize(u16* __restrict__ weight, const u8* __restrict__ packed, int n, int k, int k_blocks) {
  __shared__ __align__(16) u8 staged[4][16 * 272];
  const int strip = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int kb = blockIdx.x, rb = blockIdx.y;
  const u8* own = packed + ((long(rb) * k_blocks + kb) * 4 + strip) * STRIP_BYTES;
  const uint4* words = reinterpret_cast<const uint4*>(own) + lane;
  const uint4 first = __ldg(words), second = __ldg(words + 32);
  const u32 codes[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    const int pair = g * 8 + (lane >> 2);
    const u32 scale = reinterpret_cast<const u32*>(own + SCALES)[pair];
    const u32 zero = reinterpret_cast<const u16*>(own + ZEROS)[pair];
    const float scales[2] = {scale_to_float(u16(scale)), scale_to_float(u16(scale >> 16))};
    const float offsets[2] = {float(LOW_BASE + int(zero & 255u)), float(HIGH_BASE + int(zero >> 8))};
#pragma unroll
    for (int s = 0; s < TILES; ++s) {
      u32 a[4];
      unpack(a, codes[g * TILES + s]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float s0 = scales[i & 1], z0 = offsets[i & 1];
        const u32 both = from_floats((to_float(u16(a[i])) - z0) * s0, (to_float(u16(a[i] >> 16)) - z0) * s0);
        const int row = (lane >> 2) + (i & 1) * 8, column = (g * TILES + s) * 16 + (i >> 1) * 8 + (lane & 3) * 2;
        *reinterpret_cast<u32*>(staged[strip] + row * 272 + column * 2) = both;
      }
    }
  }
  __syncwarp();
  const int column = kb * 128 + (lane & 15) * 8;
#pragma unroll
  for (int r = lane >> 4; r < 16; r += 2) {
    const int row = rb * 64 + strip * 16 + r;
    if (row >= n) break;
    const u8* from = staged[strip] + r * 272 + (lane & 15) * 16;
    u16* to = weight + long(row) * k + column;
    if (column + 8 <= k && k % 8 == 0)
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    else
      for (int i = 0; i < 8 && column + i < k; ++i) to[i] = reinterpret_cast<const u16*>(from)[i];
  }
}
