// y = x @ W.T on 4-bit weights in words along K, without matrix instructions: what CUDA and HIP share.
//
// Word (r, n) holds the codes of input channels 8r .. 8r+7 of column n: channel i in the low half of byte i and
// channel 4 + i in its high half, i < 4. A lane owns COLUMNS columns, a warp some chunks of 32 channels, a block
// 32 * COLUMNS columns and a share of the channels. Sums are float32: warps are added in order, then shares.
// No shuffles, so that lanes and warps are arithmetic on the thread index, whatever the hardware's wave is.
//
// Macros: COLUMNS (1, 2, 4 or 8), TOKENS (of a block), WARPS, BFLOAT (x and y: bfloat16, else float16),
// SCALES (0 float16, 1 bfloat16, 2 float32), DEPENDENT (launched before the predecessor has ended).
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

constexpr int CHUNK = 32;                        // channels
constexpr int ROWS = CHUNK / 8;                  // rows of words of a chunk
constexpr int WIDTH = COLUMNS < 4 ? COLUMNS : 4; // words of one load
constexpr int LOADS = COLUMNS / WIDTH;
constexpr int THREADS = 32 * WARPS;

template <int N> struct Words;
template <> struct Words<1> { typedef u32 type; };
template <> struct Words<2> { typedef uint2 type; };
template <> struct Words<4> { typedef uint4 type; };

__device__ __forceinline__ float half_to_float(u16 bits) {
#ifdef __HIP__
  return float(__builtin_bit_cast(_Float16, bits));
#else
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
  return out;
#endif
}

__device__ __forceinline__ float bfloat_to_float(u16 bits) { return __uint_as_float(u32(bits) << 16); }

__device__ __forceinline__ float to_float(u16 bits) {
#if BFLOAT
  return bfloat_to_float(bits);
#else
  return half_to_float(bits);
#endif
}

__device__ __forceinline__ u16 from_float(float value) {
#if BFLOAT
  const u32 bits = __float_as_uint(value);
  return value != value ? u16(0x7fc0) : u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#elif defined(__HIP__)
  return __builtin_bit_cast(u16, _Float16(value));
#else
  u16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
#endif
}

__device__ __forceinline__ float scale(const void* scales, long index) {
#if SCALES == 2
  return static_cast<const float*>(scales)[index];
#elif SCALES == 1
  return bfloat_to_float(static_cast<const u16*>(scales)[index]);
#else
  return half_to_float(static_cast<const u16*>(scales)[index]);
#endif
}

__device__ __forceinline__ void wait_for_predecessor() {
#if DEPENDENT && !defined(__HIP__)
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The four codes in the low halves of the bytes of `nibbles`, each as 128 + q: the byte becomes the last places
// of a float between 128 and 256. One instruction a code, no conversion.
__device__ __forceinline__ void above_128(float (&out)[4], u32 nibbles) {
  out[0] = __uint_as_float(__byte_perm(nibbles, 0x43000000, 0x7044));
  out[1] = __uint_as_float(__byte_perm(nibbles, 0x43000000, 0x7144));
  out[2] = __uint_as_float(__byte_perm(nibbles, 0x43000000, 0x7244));
  out[3] = __uint_as_float(__byte_perm(nibbles, 0x43000000, 0x7344));
}

// Where column c of a lane lies: groups of WIDTH columns, one of each lane after the other.
__device__ __forceinline__ int column_of(int lane, int c) {
  return blockIdx.x * 32 * COLUMNS + c / WIDTH * 32 * WIDTH + lane * WIDTH + c % WIDTH;
}

// Products of a (m, k) x and columns of the weight. Grid: columns, shares of the chunks, tokens. With one share
// the result goes to y (m, n), else its float32 terms to partial (shares, m, n).
// words (chunks * ROWS, stride); scales, zeros (groups, stride); bias (n) like x, or null.
extern "C" __global__ void __launch_bounds__(THREADS)
    product(u16* __restrict__ y, float* __restrict__ partial, const u16* __restrict__ x,
            const u32* __restrict__ words, const void* __restrict__ scales, const u8* __restrict__ zeros,
            const u16* __restrict__ bias, int m, int n, int k, int stride, int chunks, int group_chunks) {
  typedef typename Words<WIDTH>::type Load;
  extern __shared__ __align__(16) float shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int block_first = int(long(chunks) * blockIdx.y / gridDim.y);
  const int block_last = int(long(chunks) * (blockIdx.y + 1) / gridDim.y);
  const int block_chunks = block_last - block_first;
  const int first = block_first + block_chunks * warp / WARPS;
  const int last = block_first + block_chunks * (warp + 1) / WARPS;
  const int token = blockIdx.z * TOKENS;

  // Weights do not depend on what ran before: the first are on their way while x is waited for.
  Load next[ROWS][LOADS];
  const u32* source = words + long(first) * ROWS * stride + column_of(lane, 0);
  if (first < last) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int l = 0; l < LOADS; ++l)
        next[r][l] = *reinterpret_cast<const Load*>(source + long(r) * stride + l * 32 * WIDTH);
  }
  wait_for_predecessor();

  // x of the block's share as float32, and its sum over each chunk.
  float* sums = shared + TOKENS * block_chunks * CHUNK;
  const int channels = block_chunks * CHUNK, start = block_first * CHUNK;
  for (int t = 0; t < TOKENS; ++t) {
    const u16* from = x + long(token + t) * k + start;
    const int present = token + t < m ? k - start : 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < channels; i += THREADS)
      shared[t * channels + i] = i < present ? to_float(from[i]) : 0.f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < TOKENS * block_chunks; i += THREADS) {
    float sum = 0.f;
    for (int j = 0; j < CHUNK; ++j) sum += shared[i * CHUNK + (j + threadIdx.x) % CHUNK];
    sums[i] = sum;
  }
  __syncthreads();

  float total[COLUMNS][TOKENS] = {}, acc[COLUMNS][TOKENS] = {}, sum[TOKENS] = {};
  for (int chunk = first; chunk < last; ++chunk) {
    Load now[ROWS][LOADS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int l = 0; l < LOADS; ++l) now[r][l] = next[r][l];
    source += long(ROWS) * stride;
    if (chunk + 1 < last) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int l = 0; l < LOADS; ++l)
          next[r][l] = *reinterpret_cast<const Load*>(source + long(r) * stride + l * 32 * WIDTH);
    }
    const int local = chunk - block_first;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) sum[t] += sums[t * block_chunks + local];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const u32* codes = reinterpret_cast<const u32*>(now[r]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float weight[COLUMNS][4];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) above_128(weight[c], codes[c] >> 4 * half & 0x0f0f0f0f);
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
          const float4 v = *reinterpret_cast<const float4*>(shared + t * channels + local * CHUNK + r * 8 + half * 4);
#pragma unroll
          for (int c = 0; c < COLUMNS; ++c) {
            acc[c][t] += weight[c][0] * v.x;
            acc[c][t] += weight[c][1] * v.y;
            acc[c][t] += weight[c][2] * v.z;
            acc[c][t] += weight[c][3] * v.w;
          }
        }
      }
    }
    if (chunk + 1 == last || (chunk + 1) % group_chunks == 0) {
      const long group = long(chunk / group_chunks) * stride;
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        const float s = scale(scales, group + column_of(lane, c));
        const float offset = 128.f + float(zeros[group + column_of(lane, c)]);
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
          total[c][t] += s * (acc[c][t] - offset * sum[t]);
          acc[c][t] = 0.f;
        }
      }
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) sum[t] = 0.f;
    }
  }

  __syncthreads();  // x is no longer needed
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) shared[((warp * TOKENS + t) * COLUMNS + c) * 32 + lane] = total[c][t];
  __syncthreads();
  for (int i = threadIdx.x; i < TOKENS * COLUMNS * 32; i += THREADS) {
    const int t = token + i / (COLUMNS * 32), column = column_of(i % 32, i / 32 % COLUMNS);
    if (t >= m || column >= n) continue;
    float result = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) result += shared[w * TOKENS * COLUMNS * 32 + i];
    if (gridDim.y > 1)
      partial[(long(blockIdx.y) * m + t) * n + column] = result;
    else
      y[long(t) * n + column] = from_float(bias ? result + to_float(bias[column]) : result);
  }
}

// y (m, n): terms (shares, m, n) added from the first share to the last, and the bias.
extern "C" __global__ void __launch_bounds__(256)
    join(u16* __restrict__ y, const float* __restrict__ partial, const u16* __restrict__ bias, int size, int n,
         int shares) {
  wait_for_predecessor();
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= size) return;
  float result = 0.f;
  for (int s = 0; s < shares; ++s) result += partial[long(s) * size + i];
  y[i] = from_float(bias ? result + to_float(bias[i % n]) : result);
}

// The dense weight (k, n), transposed: as the words lie. One column and one row of words to a thread.
extern "C" __global__ void __launch_bounds__(256)
    reconstruct(u16* __restrict__ weight, const u32* __restrict__ words, const void* __restrict__ scales,
                const u8* __restrict__ zeros, int n, int k, int stride, int group_rows) {
  const int column = (blockIdx.x * 256 + threadIdx.x) * 2, row = blockIdx.y;
  if (column >= n) return;
  const uint2 codes = *reinterpret_cast<const uint2*>(words + long(row) * stride + column);
  const long group = long(row / group_rows) * stride + column;
  float out[2][8];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float s = scale(scales, group + c), offset = 128.f + float(zeros[group + c]);
    float quads[2][4];
    above_128(quads[0], (c ? codes.y : codes.x) & 0x0f0f0f0f);
    above_128(quads[1], (c ? codes.y : codes.x) >> 4 & 0x0f0f0f0f);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[c][i] = (quads[i / 4][i % 4] - offset) * s;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (row * 8 + i >= k) break;
    u16* to = weight + long(row * 8 + i) * n + column;
    const u16 low = from_float(out[0][i]), high = from_float(out[1][i]);
    if (n % 2 == 0)
      *reinterpret_cast<u32*>(to) = u32(low) | u32(high) << 16;
    else {
      to[0] = low;
      if (column + 1 < n) to[1] = high;
    }
  }
}
