// y = the sum of SPLIT partial sums, in their order, + bias. Macros: BF16, SPLIT, WIDTH (elements of a thread, 1 or 4;
// a row is a multiple of them).
#define SCALE_BF16 0
#define GROUP 128
#include "marlin_block.cuh"
#include "marlin_bulk.cuh"

extern "C" __global__ void __launch_bounds__(256)
    join(u16* __restrict__ y, const float* __restrict__ partials, const u16* __restrict__ bias, int elements, int n) {
  const int e = (blockIdx.x * 256 + threadIdx.x) * WIDTH;
  let_next_begin();
  wait_for_previous();
  if (e >= elements) return;
  float part[SPLIT][WIDTH], sum[WIDTH] = {};
#pragma unroll
  for (int c = 0; c < SPLIT; ++c) {
    const float* from = partials + long(c) * elements + e;
#if WIDTH == 4
    const float4 all = *reinterpret_cast<const float4*>(from);
    part[c][0] = all.x, part[c][1] = all.y, part[c][2] = all.z, part[c][3] = all.w;
#else
    part[c][0] = *from;
#endif
  }
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
    for (int c = 0; c < SPLIT; ++c) sum[i] += part[c][i];
    if (bias) sum[i] += to_float(bias[e % n + i]);
  }
#if WIDTH == 4
  uint2 both;
  both.x = from_floats(sum[0], sum[1]);
  both.y = from_floats(sum[2], sum[3]);
  *reinterpret_cast<uint2*>(y + e) = both;
#else
  y[e] = from_float(sum[0]);
#endif
}
