// In the place of kernels/marlin_bulk.cuh on the host. Copies are there at once, in zeros for what a tensor map does not
// have; barriers count arrivals and bytes, and a thread that waits lets others go on. Where blocks run one after the
// other, a flag that is waited for must be up. Clusters are of two blocks.
#include <cstdio>
#include <map>

struct Phases {
  int arrivals, pending, bytes, phase;
  void settle() {
    if (pending == 0 && bytes == 0) pending = arrivals, ++phase;
  }
};
static std::map<u32, Phases> phases;

[[noreturn]] static void fail(const char* what) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

static bool elected() { return threadIdx.x % 32 == 0; }
static int uniform(int value) { return value; }

static void init_barrier(u32 barrier, u32 arrivals) { phases[barrier] = {int(arrivals), int(arrivals), 0, 0}; }
static void publish_barriers() {}
static void let_next_begin() {}
static void wait_for_previous() {}
template <int N> static void give_registers() {}
template <int N> static void take_registers() {}

static void arrive(u32 barrier) {
  Phases& own = phases.at(barrier);
  if (--own.pending < 0) fail("more arrivals than were expected");
  own.settle();
}
static void arrive_if(bool does, u32 barrier) {
  if (does) arrive(barrier);
}
static void expect(u32 barrier, u32 bytes) { phases.at(barrier).bytes += int(bytes), arrive(barrier); }
static void wait(u32 barrier, u32 parity) {
  for (long turns = 0; (phases.at(barrier).phase & 1u) == parity; ++turns) {
    if (turns == 1000000) fail("waits forever");
    swapcontext(&fibers[threadIdx.x], &scheduler);
  }
}
static void complete(u32 barrier, u32 bytes) {
  Phases& own = phases.at(barrier);
  own.bytes -= int(bytes);
  own.settle();
}

static void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
  if (to % 16 || bytes % 16) fail("a bulk copy is of 16 bytes or several");
  std::memcpy(reinterpret_cast<char*>(shared) + to, from, bytes);
  complete(barrier, bytes);
}

// A matrix of 16-bit numbers, `width` of a row, in boxes of `box` rows and 64 columns.
struct alignas(64) TensorMap {
  const u16* matrix;
  int width, height, box;
};
static void fetch_map(const TensorMap*) {}
static void hand_to_copies() {}
static void hand_global_to_copies() {}
static void copy_tensor(u32 to, const TensorMap* map, int channel, int token, u32 barrier) {
  if (to % 1024) fail("what is swizzled by 128 bytes lies at multiples of 1024");
  for (int row = 0; row < map->box; ++row)
    for (int column = 0; column < 64; ++column) {
      const bool there = token + row < map->height && channel + column < map->width;
      const u16 value = there ? map->matrix[long(token + row) * map->width + channel + column] : u16(0);
      const u32 at = to + row * 128 + column * 2;
      std::memcpy(reinterpret_cast<char*>(shared) + (at ^ (at >> 7 & 7) << 4), &value, 2);
    }
  complete(barrier, map->box * 128);
}

static void raise(u64* flag, u64 tag) { __atomic_store_n(flag, tag, __ATOMIC_RELEASE); }
static void await(u64* flag, u64 tag) {
  while (__atomic_load_n(flag, __ATOMIC_ACQUIRE) != tag) {
    if (!peers) fail("waits for a block that comes later");
    wait_for_others();
  }
  *flag = 0;
}

// What threads of a cluster have in common; `size` of them arrive each time.
struct Cluster {
  unsigned size, arrived, generation;
};
static Cluster* clusters;  // for all processes
static unsigned generations[MOST_THREADS];

static void make_clusters(unsigned blocks, unsigned size) {
  const size_t bytes = (blocks + 1) / 2 * sizeof(Cluster);
  clusters = static_cast<Cluster*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  for (unsigned c = 0; c < (blocks + 1) / 2; ++c) clusters[c] = {size, 0, 0};
}
static void arrive_at_cluster() {
  Cluster& own = clusters[blockIdx.x / 2];
  generations[threadIdx.x] = __atomic_load_n(&own.generation, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&own.arrived, 1, __ATOMIC_ACQ_REL) < own.size) return;
  own.arrived = 0;
  __atomic_add_fetch(&own.generation, 1, __ATOMIC_ACQ_REL);
}
static void wait_for_cluster() {
  const Cluster& own = clusters[blockIdx.x / 2];
  while (__atomic_load_n(&own.generation, __ATOMIC_ACQUIRE) == generations[threadIdx.x]) wait_for_others();
}
static void cluster_barrier() { arrive_at_cluster(), wait_for_cluster(); }
static void store4_at_rank(float4* p, u32 rank, float4 value) {
  const size_t at = reinterpret_cast<char*>(p) - reinterpret_cast<char*>(shared);
  std::memcpy(peers + (blockIdx.x / 2 * 2 + rank) * sizeof shared + at, &value, 16);
}

template <int COUNT> static void store_transposed(u32 address, const u32 (&a)[COUNT]) {
  auto& own = shown[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  own[lane][4] = address;
  __syncwarp();
  // Lane 4 r + t has columns 2 t and 2 t + 1 of row r of each matrix; row c of the transposed goes to address c.
  for (int i = 0; i < COUNT; ++i)
    for (int j = 0; j < 2; ++j) {
      const u16 value = u16(a[i] >> 16 * j);
      const u32 to = own[8 * i + 2 * (lane % 4) + j][4] + 2 * (lane / 4);
      std::memcpy(reinterpret_cast<char*>(shared) + to, &value, 2);
    }
  __syncwarp();
}
