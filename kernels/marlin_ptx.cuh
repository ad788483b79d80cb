// Single instructions of Ampere and later GPUs as functions. Macro: BF16 (activations are bfloat16).
__device__ __forceinline__ u32 masked(u32 word, u32 mask, u32 bits) {
  u32 out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(word), "r"(mask), "r"(bits));
  return out;
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ float half_to_float(u16 bits) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
  return out;
}

__device__ __forceinline__ u16 from_float(float value) {
  u16 out;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
#endif
  return out;
}

// Two numbers in one register, the first in its lower half.
__device__ __forceinline__ u32 from_floats(float low, float high) {
  u32 out;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#endif
  return out;
}

__device__ __forceinline__ u32 subtract2(u32 a, u32 b) {
  u32 out;
#if BF16
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#else
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#endif
  return out;
}

__device__ __forceinline__ u32 multiply2(u32 a, u32 b) {
  u32 out;
#if BF16
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#else
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#endif
  return out;
}

// Both halves of a register as its lower half, and as its upper: operands that an instruction reads as they are.
__device__ __forceinline__ u32 lower_twice(u32 pair) {
  u32 out;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\nmov.b32 %0, {low, low};\n}" : "=r"(out) : "r"(pair));
  return out;
}

__device__ __forceinline__ u32 upper_twice(u32 pair) {
  u32 out;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\nmov.b32 %0, {high, high};\n}" : "=r"(out) : "r"(pair));
  return out;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// 2, 4 or 16 bytes of shared memory, read behind the barrier that is passed in front of this.
__device__ __forceinline__ u32 load_shared2(u32 address) {
  u16 out;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(out) : "r"(address) : "memory");
  return out;
}

__device__ __forceinline__ u32 load_shared4(u32 address) {
  u32 out;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(out) : "r"(address) : "memory");
  return out;
}

__device__ __forceinline__ void load_shared16(u32 (&out)[4], u32 address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
}

// Four matrices of 8 rows of 16 bytes: lanes 8 i to 8 i + 7 name the rows of the i-th.
__device__ __forceinline__ void load_matrices(u32& a, u32& b, u32& c, u32& d, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address));
}

__device__ __forceinline__ float from_lane(float value, int lane) { return __shfl_sync(~0u, value, lane); }

// 16 bytes to shared memory, or as many zeros where `bytes` is 0; it is there after wait_for_copies.
__device__ __forceinline__ void copy16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all committed copies of this thread but the last N sets.
template <int N>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
