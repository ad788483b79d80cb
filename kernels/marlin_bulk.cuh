// Hopper's asynchronous copies, the barriers that they complete on, clusters, and what a block begins with.
//
// Copies take their operands from registers that a warp shares. Where the compiler knows that one lane issues them
// (`elected`), of operands that are the same in all lanes (`uniform`), it puts them there; elsewhere it goes through the
// lanes in a loop, which waits for each copy to have read its operands.

// Whether this is the lane that acts for its warp, all of whose lanes ask.
__device__ __forceinline__ bool elected() {
  u32 is;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(is));
  return is;
}

// `value`, which is the same in all lanes of the warp.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

__device__ __forceinline__ void init_barrier(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Barriers that one thread made are there for copies, and for all who pass the next barrier of the block.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// The launch after this one may begin; and this one waits for what the launch before it leaves.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// A warpgroup goes on with N registers a thread: fewer than before, or more, which others must have given.
template <int N>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Without a branch, which products under way would be waited for at.
__device__ __forceinline__ void arrive_if(bool does, u32 barrier) {
  asm volatile("{\n.reg .pred does;\nsetp.ne.b32 does, %1, 0;\n@does mbarrier.arrive.shared::cta.b64 _, [%0];\n}"
               ::"r"(barrier), "r"(int(does)) : "memory");
}

// Arrive, and let the barrier wait for `bytes` to be copied.
__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
      ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

struct alignas(64) TensorMap {
  u64 words[16];
};

// So that the first copy does not have to wait for the map.
__device__ __forceinline__ void fetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// What this thread wrote to shared memory is in order with the copies that others issue when they hear of it.
__device__ __forceinline__ void hand_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same of global memory: called by those who wrote it, and by who copies it once it has heard of that.
__device__ __forceinline__ void hand_global_to_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// A box of a matrix, from column `channel` and row `token` on.
__device__ __forceinline__ void copy_tensor(u32 to, const TensorMap* map, int channel, int token, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(channel), "r"(token) : "memory");
}

__device__ __forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_barrier() { arrive_at_cluster(), wait_for_cluster(); }

__device__ __forceinline__ u32 address_at_rank(u32 address, u32 rank) {
  u32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

__device__ __forceinline__ void store4_at_rank(float4* p, u32 rank, float4 value) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};"
               ::"r"(address_at_rank(shared_address(p), rank)), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers, as products leave them, transposed: lanes 8 i to 8 i + 7 name where the rows of
// the i-th go.
__device__ __forceinline__ void store_transposed(u32 address, const u32 (&a)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(address), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]) : "memory");
}

// Two of them.
__device__ __forceinline__ void store_transposed(u32 address, const u32 (&a)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a[0]), "r"(a[1])
               : "memory");
}

// What this thread wrote, and what it knows of others' by a barrier, is there for who sees the flag.
__device__ __forceinline__ void raise(u64* flag, u64 tag) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(tag) : "memory");
}

// Waits for a raised flag and clears it.
__device__ __forceinline__ void await(u64* flag, u64 tag) {
  u64 found;
  do asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(flag) : "memory");
  while (found != tag);
  *flag = 0;
}
