// CUDA's language on the host, as far as the kernels use it: the threads of a block are fibers that take turns where
// they wait for each other; blocks run one after the other, or at a time, where they wait for each other too. Compiled in
// front of a .cu file. SHARED is the type of the shared memory that it declares.
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __HIP__ 1
#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// float16 rounded to nearest even, for compilers that do not have it in C++.
struct Half {
  uint16_t bits;
  explicit Half(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    const uint32_t sign = u >> 16 & 0x8000u, least = 0x3f000000u;  // 0.5, whose last place is that of subnormals
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) bits = uint16_t(sign | 0x7e00u);
    else if (u >= 0x477ff000u) bits = uint16_t(sign | 0x7c00u);
    else if (u >= 0x38800000u) bits = uint16_t(sign | (u + 0xfffu + (u >> 13 & 1) - 0x38000000u) >> 13);
    else {
      float small, half;
      std::memcpy(&small, &u, 4), std::memcpy(&half, &least, 4);
      small += half;
      std::memcpy(&u, &small, 4);
      bits = uint16_t(sign | (u - least));
    }
  }
  explicit operator float() const {
    const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023u;
    const float value = exponent == 31 ? (mantissa ? __builtin_nanf("") : __builtin_inff())
                        : exponent ? __builtin_ldexpf(1024.f + float(mantissa), int(exponent) - 25)
                                   : __builtin_ldexpf(float(mantissa), -24);
    return bits & 0x8000u ? -value : value;
  }
};
#define _Float16 Half

struct Size { unsigned x, y, z; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };

static Size threadIdx, blockIdx, blockDim, gridDim;
constexpr unsigned MOST_THREADS = 1024, STACK = 1 << 16;
alignas(4096) SHARED shared[(1 << 18) / sizeof(SHARED)];  // what the kernels declare extern
static char* peers;  // the shared memory of blocks that run at a time, one after the other
static ucontext_t scheduler, fibers[MOST_THREADS];
static bool ended[MOST_THREADS];
static char* stacks;
static std::function<void()> body;

// Where `size` threads wait for each other.
struct Barrier {
  unsigned arrived, generation;
  void wait(unsigned size) {
    const unsigned mine = generation;
    if (++arrived == size) arrived = 0, ++generation;
    while (generation == mine) swapcontext(&fibers[threadIdx.x], &scheduler);
  }
};
static Barrier block_barrier, warp_barriers[MOST_THREADS / 32];

static void __syncthreads() { block_barrier.wait(blockDim.x); }
static void __syncwarp() { warp_barriers[threadIdx.x / 32].wait(32); }

// What the lanes of a warp show each other, a few words each.
static uint32_t shown[MOST_THREADS / 32][32][8];
template <class T> static T __shfl_sync(unsigned, T value, int lane) {
  auto& own = shown[threadIdx.x / 32];
  static_assert(sizeof(T) == 4);
  std::memcpy(&own[threadIdx.x % 32][0], &value, 4);
  __syncwarp();
  T found;
  std::memcpy(&found, &own[lane & 31][0], 4);
  __syncwarp();
  return found;
}

template <class T> static T __ldg(const T* p) { return *p; }
template <class T> static T __ldcg(const T* p) { return *p; }
static uint32_t __funnelshift_r(uint32_t low, uint32_t high, int by) {
  return uint32_t((uint64_t(high) << 32 | low) >> (by & 31));
}
template <class T> static void __stcg(T* p, T value) { *p = value; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static float __expf(float x) { return __builtin_expf(x); }
static float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
static size_t __cvta_generic_to_shared(const void* p) { return size_t(static_cast<const char*>(p) - reinterpret_cast<const char*>(shared)); }

static float __uint_as_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
static uint32_t __float_as_uint(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }
static uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = uint64_t(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

static void fiber() {
  body();
  ended[threadIdx.x] = true;
  swapcontext(&fibers[threadIdx.x], &scheduler);
}

// Runs the threads of block `index`. Shared memory begins as NaN, so that what nobody wrote shows.
static void run(Size index) {
  blockIdx = index;
  std::memset(shared, 0xff, sizeof shared);
  block_barrier = {};
  std::memset(warp_barriers, 0, sizeof warp_barriers);
  for (unsigned t = 0; t < blockDim.x; ++t) {
    getcontext(&fibers[t]);
    fibers[t].uc_stack.ss_sp = stacks + size_t(t) * STACK, fibers[t].uc_stack.ss_size = STACK;
    makecontext(&fibers[t], fiber, 0);
    ended[t] = false;
  }
  for (bool running = true; running;) {
    running = false;
    for (unsigned t = 0; t < blockDim.x; ++t) {
      if (ended[t]) continue;
      threadIdx = {t, 0, 0};
      swapcontext(&scheduler, &fibers[t]);
      running |= !ended[t];
    }
  }
}

static void prepare(Size grid, unsigned threads, std::function<void()> kernel) {
  if (!stacks) stacks = static_cast<char*>(std::malloc(size_t(MOST_THREADS) * STACK));
  body = std::move(kernel);
  gridDim = grid, blockDim = {threads, 1, 1};
}

// Runs `kernel` for every thread of every block, one block after the other.
static void launch(Size grid, unsigned threads, std::function<void()> kernel) {
  prepare(grid, threads, std::move(kernel));
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) run({x, y, z});
}

// Runs it for all blocks at a time, a process for each. 0, or how one of them failed: with an error, or by the clock.
static int launch_together(unsigned blocks, unsigned threads, std::function<void()> kernel) {
  prepare({blocks, 1, 1}, threads, std::move(kernel));
  const int memory = memfd_create("shared", 0);
  if (memory < 0 || ftruncate(memory, off_t(blocks) * sizeof shared)) return -1;
  peers = static_cast<char*>(mmap(nullptr, blocks * sizeof shared, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0));
  std::vector<pid_t> children;
  for (unsigned x = 0; x < blocks; ++x)
    if (const pid_t child = fork()) {
      children.push_back(child);
    } else {
      alarm(100);
      mmap(shared, sizeof shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory, off_t(x) * sizeof shared);
      run({x, 0, 0});
      _exit(0);
    }
  int failed = 0, status = 0;
  for (const pid_t child : children) waitpid(child, &status, 0), failed |= status;
  munmap(peers, blocks * sizeof shared), close(memory);
  peers = nullptr;
  return failed;
}

// This thread waits for something that another block does.
static void wait_for_others() {
  sched_yield();
  swapcontext(&fibers[threadIdx.x], &scheduler);
}

// Memory that ends where no access is allowed: what reads or writes past its end stops the program.
extern "C" void* guarded(size_t bytes) {
  const size_t page = 4096, whole = (bytes + page - 1) / page * page;
  char* start = static_cast<char*>(mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  mprotect(start + whole, page, PROT_NONE);
  return start + whole - (bytes + 15) / 16 * 16;
}
