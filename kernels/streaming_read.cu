// Reads n pieces of 16 bytes, UNROLL of them in flight for every thread, and does nothing else.
// What is read is summed up, and written where it cannot be, so that no compiler leaves a load out.
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* data, unsigned* out, long long n) {
  uint4 sum = {0, 0, 0, 0};
  const long long step = (long long)gridDim.x * blockDim.x;
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  for (; i + (UNROLL - 1) * step < n; i += UNROLL * step) {
    uint4 part[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) part[u] = __ldcs(data + i + u * step);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) sum.x ^= part[u].x ^ part[u].y ^ part[u].z ^ part[u].w;
  }
  for (; i < n; i += step) sum.x ^= data[i].x;
  if (sum.x == 0x12345678u) *out = sum.x;
}
