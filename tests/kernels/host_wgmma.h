// In the place of kernels/marlin_wgmma.cuh on the host. Products are taken when they are waited for, as late as they
// may be: with the operands that are there then, in registers and in shared memory.
#include <deque>
#include <vector>

struct Product {
  float* acc;
  const u32* a;
  u64 b;
  int add;
};
static std::deque<std::vector<Product>> committed[MOST_THREADS];
static std::vector<Product> issued[MOST_THREADS];

static void take(const Product& p) {
  auto& own = shown[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) own[lane][i] = p.a[i];
  __syncwarp();
  float rows[2][16];
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < 16; ++k)
      rows[r][k] = element(u16(own[lane / 4 * 4 + k % 8 / 2][r + k / 8 * 2] >> k % 2 * 16));
  for (int i = 0; i < TOKENS / 2; i += 4)
    for (int j = 0; j < 2; ++j) {
      const int token = i / 4 * 8 + lane % 4 * 2 + j;
      double sums[2] = {};
      for (int k = 0; k < 16; ++k) {
        const u32 at = u32(p.b & 0x3FFF) * 16 + token * 128 + k * 2;
        const float x = element(reinterpret_cast<const u16*>(shared)[(at ^ (at >> 7 & 7) << 4) / 2]);
        for (int r = 0; r < 2; ++r) sums[r] += double(rows[r][k]) * x;
      }
      for (int r = 0; r < 2; ++r) {
        float& y = p.acc[i + 2 * r + j];
        y = float(sums[r] + (p.add ? y : 0.f));
      }
    }
  __syncwarp();
}

static void wgmma(float (&acc)[TOKENS / 2], const u32 (&a)[4], u64 b, int add) {
  issued[threadIdx.x].push_back({acc, a, b, add});
}
static void begin_products() {}
static void commit_products() {
  committed[threadIdx.x].push_back(std::move(issued[threadIdx.x]));
  issued[threadIdx.x].clear();
}
template <int N> static void wait_for_products() {
  auto& own = committed[threadIdx.x];
  for (; own.size() > N; own.pop_front())
    for (const Product& product : own.front()) take(product);
}
static void settle(float (&)[TOKENS / 2]) {}

static Barrier warpgroups[MOST_THREADS / 128], multiplying;
static void warpgroup_barrier(int group) { warpgroups[group].wait(128); }
template <int THREADS> static void warpgroups_barrier() { multiplying.wait(THREADS); }
