// In the place of kernels/marlin_ptx.cuh on the host: what its instructions do, from the PTX manual. The lanes of a
// warp show each other their operands (host_cuda.h).
static u32 masked(u32 word, u32 mask, u32 bits) { return (word & mask) | bits; }

static float half_to_float(u16 bits) { Half half(0.f); half.bits = bits; return float(half); }

static float element(u16 bits) {
#if BF16
  return __uint_as_float(u32(bits) << 16);
#else
  return half_to_float(bits);
#endif
}

static u16 from_float(float value) {
#if BF16
  const u32 bits = __float_as_uint(value);
  return value != value ? u16(0x7fff) : u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
  return Half(value).bits;
#endif
}

static u32 from_floats(float low, float high) { return from_float(low) | u32(from_float(high)) << 16; }

// Two numbers of the activations' dtype at a time; a float holds what is between.
template <class F> static u32 in_pairs(u32 a, u32 b, F f) {
  return from_floats(f(element(u16(a)), element(u16(b))), f(element(u16(a >> 16)), element(u16(b >> 16))));
}
static u32 subtract2(u32 a, u32 b) { return in_pairs(a, b, [](float x, float y) { return x - y; }); }
static u32 multiply2(u32 a, u32 b) { return in_pairs(a, b, [](float x, float y) { return x * y; }); }

static u32 lower_twice(u32 pair) { return (pair & 0xFFFFu) * 0x10001u; }
static u32 upper_twice(u32 pair) { return (pair >> 16) * 0x10001u; }

static u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// c (16, 8) += a (16, 16) b (16, 8): lane 4 g + t has rows g and g + 8 of a, column g of b, columns 2 t, 2 t + 1 of c.
static void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  auto& own = shown[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) own[lane][i] = a[i];
  for (int i = 0; i < 2; ++i) own[lane][4 + i] = b[i];
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const u32 left = own[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], right = own[column * 4 + k % 8 / 2][4 + k / 8];
      sum += double(element(u16(left >> k % 2 * 16))) * element(u16(right >> k % 2 * 16));
    }
    c[i] = float(sum);
  }
  __syncwarp();
}

template <class T> static T load_shared(u32 address) {
  if (address % sizeof(T)) std::abort();
  T out;
  std::memcpy(&out, reinterpret_cast<const char*>(shared) + address, sizeof(T));
  return out;
}
static u32 load_shared2(u32 address) { return load_shared<u16>(address); }
static u32 load_shared4(u32 address) { return load_shared<u32>(address); }
static void load_shared16(u32 (&out)[4], u32 address) {
  if (address % 16) std::abort();
  for (int i = 0; i < 4; ++i) out[i] = load_shared<u32>(address + 4 * i);
}

static void load_matrices(u32& a, u32& b, u32& c, u32& d, u32 address) {
  auto& own = shown[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  own[lane][0] = address;
  __syncwarp();
  u32* to[4] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i)
    std::memcpy(to[i], reinterpret_cast<const char*>(shared) + own[i * 8 + lane / 4][0] + lane % 4 * 4, 4);
  __syncwarp();
}

static float from_lane(float value, int lane) { return __shfl_sync(~0u, value, lane); }

// Copies are there at once, so what waits for them too late is not found here.
static void copy16(void* to, const void* from, int bytes) {
  if (bytes) std::memcpy(to, from, 16);
  else std::memset(to, 0, 16);
}
static void commit_copies() {}
template <int N> static void wait_for_copies() {}
