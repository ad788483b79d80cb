// y = x @ W.T on 4-bit weights in words along K, without matrix instructions: what CUDA and HIP share.
//
// Word (r, n) holds the codes of input channels 8r .. 8r+7 of column n: channel i in the low half of byte i and
// channel 4 + i in its high half, i < 4. A lane owns COLUMNS columns, a warp some chunks of 32 channels, a block
// 32 * COLUMNS columns and a share of the channels.
//
// Products are of integers: a chunk of a token's activations becomes integers of 14 bits, in steps of a power of
// two that its largest decides. Their products with codes are summed exactly, a chunk's sum is scaled and added
// in float32; warps are added in order, then shares. Nothing overflows, whatever the activations are.
// No shuffles, so that lanes and warps are arithmetic on the thread index, whatever the hardware's wave is.
//
// Macros: COLUMNS (1, 2, 4 or 8), TOKENS (of a block), WARPS, BLOCKS (that a multiprocessor is to hold), BFLOAT
// (x and y: bfloat16, else float16), SCALES (0 float16, 1 bfloat16, 2 float32), DEPENDENT (launched before the
// predecessor has ended).
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

constexpr int CHUNK = 32;                        // channels
constexpr int ROWS = CHUNK / 8;                  // rows of words of a chunk
constexpr int WIDTH = COLUMNS < 4 ? COLUMNS : 4; // words of one load
constexpr int LOADS = COLUMNS / WIDTH;
constexpr int THREADS = 32 * WARPS;
constexpr float MAGIC = 12582912.f;              // 1.5 * 2^23: integers within 2^22 of it are floats, in order
constexpr u32 MAGIC_BITS = 0x4b400000;
constexpr u32 LEAST = 14;                        // exponent below which a chunk's steps do not shrink further

#ifdef __HIP__  // whose second bound is another
#define BOUNDS __launch_bounds__(THREADS)
#else
#define BOUNDS __launch_bounds__(THREADS, BLOCKS)
#endif

// Loads of so many bytes.
template <int N> struct Bytes;
template <> struct Bytes<1> { typedef u8 type; };
template <> struct Bytes<2> { typedef u16 type; };
template <> struct Bytes<4> { typedef u32 type; };
template <> struct Bytes<8> { typedef uint2 type; };
template <> struct Bytes<16> { typedef uint4 type; };

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

#if SCALES == 2
typedef float Scale;
#else
typedef u16 Scale;
#endif

__device__ __forceinline__ float scale(Scale value) {
#if SCALES == 2
  return value;
#elif SCALES == 1
  return bfloat_to_float(value);
#else
  return half_to_float(value);
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

// sum + x[0] * codes[0] + x[1] * codes[1]: two integers of 16 bits, and the lower or the upper two bytes.
__device__ __forceinline__ int dot_low(u32 x, u32 codes, int sum) {
#ifdef __HIP__
  return sum + short(x) * int(codes & 255) + (int(x) >> 16) * int(codes >> 8 & 255);
#else
  int out;
  asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(codes), "r"(sum));
  return out;
#endif
}

__device__ __forceinline__ int dot_high(u32 x, u32 codes, int sum) {
#ifdef __HIP__
  return dot_low(x, codes >> 16, sum);
#else
  int out;
  asm("dp2a.hi.s32.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(codes), "r"(sum));
  return out;
#endif
}

// A chunk of a token's activations as integers, and what one of them stands for.
struct Chunk {
  u32 pairs[CHUNK / 2];
  float step, sum;
};

// The largest activation, below 2^(e + 1), becomes an integer below 2^13, to within a half. Exact: what has no place
// below 2^(e - 12). Where one is infinite or no number, the step is no number.
__device__ __forceinline__ void to_integers(Chunk& out, const u32 (&raw)[CHUNK / 2]) {
  int low = 0, high = 0;
#pragma unroll
  for (int i = 0; i < CHUNK / 2; ++i) {
    low = max(low, int(raw[i] & 0x7fff));
    high = max(high, int(raw[i] >> 16 & 0x7fff));
  }
  const u32 exponent = __float_as_uint(to_float(u16(max(low, high)))) >> 23;
  const u32 e = max(int(exponent), int(LEAST));
  const float up = __uint_as_float(266 - e << 23);  // 2^(12 - (e - 127))
  u32 sum = 0;
#pragma unroll
  for (int i = 0; i < CHUNK / 2; ++i) {
    const u32 first = __float_as_uint(to_float(u16(raw[i])) * up + MAGIC);
    const u32 second = __float_as_uint(to_float(u16(raw[i] >> 16)) * up + MAGIC);
    out.pairs[i] = first & 0xffff | second << 16;
    sum += first + second;
  }
  out.step = __uint_as_float(exponent == 255 ? 0x7fc00000 : e - 12 << 23);
  out.sum = float(int(sum - CHUNK * MAGIC_BITS));
}

// Where column c of a lane lies: groups of WIDTH columns, one of each lane after the other.
__device__ __forceinline__ int column_of(int lane, int c) {
  return blockIdx.x * 32 * COLUMNS + c / WIDTH * 32 * WIDTH + lane * WIDTH + c % WIDTH;
}

// Products of a (m, k) x and columns of the weight. Grid: columns, shares of the chunks, tokens. With one share
// the result goes to y (m, n), else its float32 terms to partial (shares, m, n).
// words (chunks * ROWS, stride); scales, zeros (groups, stride); bias (n) like x, or null.
extern "C" __global__ void BOUNDS
    product(u16* __restrict__ y, float* __restrict__ partial, const u16* __restrict__ x,
            const u32* __restrict__ words, const void* __restrict__ scales, const u8* __restrict__ zeros,
            const u16* __restrict__ bias, int m, int n, int k, int stride, int chunks, int group_chunks) {
  typedef typename Bytes<4 * WIDTH>::type Load;
  typedef typename Bytes<sizeof(Scale) * WIDTH>::type ScaleLoad;
  typedef typename Bytes<WIDTH>::type ZeroLoad;
  extern __shared__ __align__(16) float shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int block_first = int(long(chunks) * blockIdx.y / gridDim.y);
  const int block_last = int(long(chunks) * (blockIdx.y + 1) / gridDim.y);
  const int block_chunks = block_last - block_first;
  const int first = block_first + block_chunks * warp / WARPS;
  const int last = block_first + block_chunks * (warp + 1) / WARPS;
  const int token = blockIdx.z * TOKENS;

  // Weights do not depend on what ran before: the first are on their way while x is waited for.
  Load held[ROWS][LOADS];
  const u32* source = words + long(first) * ROWS * stride + column_of(lane, 0);
  if (first < last) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int l = 0; l < LOADS; ++l)
        held[r][l] = *reinterpret_cast<const Load*>(source + long(r) * stride + l * 32 * WIDTH);
  }
  wait_for_predecessor();

  // x of the block's share as integers, a thread for a chunk of a token: (chunks, rows of words, tokens, 8), so that
  // a warp stores what lies side by side. Behind them steps and sums (chunks, tokens).
  float2* const about = reinterpret_cast<float2*>(shared + TOKENS * block_chunks * (CHUNK / 2));
  const bool aligned = k % 8 == 0 && reinterpret_cast<unsigned long long>(x) % 16 == 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < TOKENS * block_chunks; i += THREADS) {
    const int t = i % TOKENS, chunk = i / TOKENS, start = (block_first + chunk) * CHUNK;
    const u16* from = x + long(token + t) * k + start;
    const int present = token + t < m ? k - start : 0;
    u32 raw[CHUNK / 2];
    if (aligned && present >= CHUNK) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        *reinterpret_cast<uint4*>(raw + 4 * r) = reinterpret_cast<const uint4*>(from)[r];
    } else {
#pragma unroll
      for (int j = 0; j < CHUNK / 2; ++j) {
        raw[j] = 2 * j < present ? from[2 * j] : 0;
        raw[j] |= 2 * j + 1 < present ? u32(from[2 * j + 1]) << 16 : 0;
      }
    }
    Chunk integers;
    to_integers(integers, raw);
    uint4* to = reinterpret_cast<uint4*>(shared) + chunk * ROWS * TOKENS + t;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) to[r * TOKENS] = *reinterpret_cast<const uint4*>(integers.pairs + 4 * r);
    about[i] = {integers.step, integers.sum};
  }
  __syncthreads();

  float total[COLUMNS][TOKENS] = {};
  float factor[COLUMNS], zero[COLUMNS];
  int next_group = first;
#pragma unroll 1
  for (int chunk = first; chunk < last; ++chunk) {
    const int local = chunk - block_first;
    if (chunk == next_group) {
      const int group = chunk / group_chunks;
      next_group = (group + 1) * group_chunks;
#pragma unroll
      for (int l = 0; l < LOADS; ++l) {
        const long at = long(group) * stride + column_of(lane, l * WIDTH);
        const auto s = *reinterpret_cast<const ScaleLoad*>(static_cast<const Scale*>(scales) + at);
        const auto z = *reinterpret_cast<const ZeroLoad*>(zeros + at);
#pragma unroll
        for (int c = 0; c < WIDTH; ++c) {
          factor[l * WIDTH + c] = scale(reinterpret_cast<const Scale*>(&s)[c]);
          zero[l * WIDTH + c] = float(reinterpret_cast<const u8*>(&z)[c]);
        }
      }
    }
    source += long(ROWS) * stride;
    int acc[COLUMNS][TOKENS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) acc[c][t] = MAGIC_BITS;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      u32 front[COLUMNS], back[COLUMNS];
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        const u32 codes = reinterpret_cast<const u32*>(held[r])[c];
        front[c] = codes & 0x0f0f0f0f;
        back[c] = codes >> 4 & 0x0f0f0f0f;
      }
      if (chunk + 1 < last) {
#pragma unroll
        for (int l = 0; l < LOADS; ++l)
          held[r][l] = *reinterpret_cast<const Load*>(source + long(r) * stride + l * 32 * WIDTH);
      }
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        const uint4 v = reinterpret_cast<const uint4*>(shared)[(local * ROWS + r) * TOKENS + t];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) acc[c][t] = dot_low(v.x, front[c], acc[c][t]);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) acc[c][t] = dot_high(v.y, front[c], acc[c][t]);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) acc[c][t] = dot_low(v.z, back[c], acc[c][t]);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) acc[c][t] = dot_high(v.w, back[c], acc[c][t]);
      }
    }
    // Sums of at most 32 * 15 * 2^13 < 2^22 began at MAGIC, and are floats without a conversion.
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const float2 of = about[local * TOKENS + t];
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        const float sum = __uint_as_float(u32(acc[c][t])) - MAGIC;
        total[c][t] += factor[c] * of.x * (sum - zero[c] * of.y);
      }
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
    const float s = scale(static_cast<const Scale*>(scales)[group + c]), offset = 128.f + float(zeros[group + c]);
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
