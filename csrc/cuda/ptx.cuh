// PTX instructions, one thin function each: the only file with assembly. tests/emulator/ptx/ptx_emu.h declares the same
// functions for g++; a test compares the two lists, and another one assembles every function for every architecture.
// The comment of each names the instruction and the oldest architecture that has it. A 32-bit `shared` is an address in
// shared memory (shared_address() gives it); pointers point to global memory.
#pragma once

#include "cuda/port.cuh"

#if !defined(__CUDACC__)

#include "emulator/ptx/ptx_emu.h"

namespace qops {
namespace ptx = ::emu::ptx;
}

#else

namespace qops::ptx {

// --- addresses -------------------------------------------------------------------------------------------------------

// cvta.to.shared.u64, sm_20: the address in shared memory that the instructions below take
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- asynchronous copies, global to shared ---------------------------------------------------------------------------

// cp.async.ca.shared.global, sm_80: 4, 8 or 16 bytes through L1
template <int kBytes>
  requires(kBytes == 4 || kBytes == 8 || kBytes == 16)
__device__ __forceinline__ void cp_async_ca(uint32_t shared, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(__cvta_generic_to_global(source)),
               "n"(kBytes)
               : "memory");
}

// cp.async.ca.shared.global with src-size, sm_80: the bytes after the first `source_bytes` are zeros
template <int kBytes>
  requires(kBytes == 4 || kBytes == 8 || kBytes == 16)
__device__ __forceinline__ void cp_async_ca_zfill(uint32_t shared, const void* source, uint32_t source_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(__cvta_generic_to_global(source)),
               "n"(kBytes), "r"(source_bytes)
               : "memory");
}

// cp.async.cg.shared.global, sm_80: 16 bytes past L1
__device__ __forceinline__ void cp_async_cg(uint32_t shared, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(__cvta_generic_to_global(source))
               : "memory");
}

// cp.async.cg.shared.global with src-size, sm_80: the bytes after the first `source_bytes` of 16 are zeros
__device__ __forceinline__ void cp_async_cg_zfill(uint32_t shared, const void* source, uint32_t source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(source)),
               "r"(source_bytes)
               : "memory");
}

// cp.async.cg.shared.global.L2::cache_hint with src-size, sm_80: the same under a policy of createpolicy
__device__ __forceinline__ void cp_async_cg_zfill_hint(uint32_t shared, const void* source, uint32_t source_bytes,
                                                       uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared),
               "l"(__cvta_generic_to_global(source)), "r"(source_bytes), "l"(policy)
               : "memory");
}

// cp.async.commit_group, sm_80: closes the group of the copies that this thread has issued since the last one
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group, sm_80: until at most the kPending newest groups of this thread are in flight
template <int kPending>
  requires(kPending >= 0)
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// cp.async.wait_all, sm_80: until every copy of this thread has landed, committed or not
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// --- words in shared memory ------------------------------------------------------------------------------------------

// ld.shared.v2.u32, sm_20: two neighbouring words, at a multiple of 8 bytes
__device__ __forceinline__ void ld_shared(uint32_t (&d)[2], uint32_t shared) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(shared) : "memory");
}

// --- matrices in shared memory ---------------------------------------------------------------------------------------
// Lane 8 m + r gives the address of row r (16 bytes, 16-byte aligned) of matrix m; d[m] or s[m] of lane 4 r + c holds
// elements 2c and 2c + 1 of row r (of column r where transposed).

// ldmatrix.sync.aligned.m8n8.x1.shared.b16, sm_75
__device__ __forceinline__ void ldmatrix_x1(uint32_t (&d)[1], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(shared) : "memory");
}

// ldmatrix.sync.aligned.m8n8.x2.shared.b16, sm_75
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&d)[2], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared)
               : "memory");
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16, sm_75
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared)
               : "memory");
}

// ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16, sm_75
__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&d)[1], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(shared) : "memory");
}

// ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16, sm_75
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&d)[2], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared)
               : "memory");
}

// ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16, sm_75
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared)
               : "memory");
}

// stmatrix.sync.aligned.m8n8.x1.shared.b16, sm_90
__device__ __forceinline__ void stmatrix_x1(uint32_t shared, const uint32_t (&s)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(shared), "r"(s[0]) : "memory");
}

// stmatrix.sync.aligned.m8n8.x2.shared.b16, sm_90
__device__ __forceinline__ void stmatrix_x2(uint32_t shared, const uint32_t (&s)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared), "r"(s[0]), "r"(s[1])
               : "memory");
}

// stmatrix.sync.aligned.m8n8.x4.shared.b16, sm_90
__device__ __forceinline__ void stmatrix_x4(uint32_t shared, const uint32_t (&s)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(s[0]), "r"(s[1]),
               "r"(s[2]), "r"(s[3])
               : "memory");
}

// stmatrix.sync.aligned.m8n8.x1.trans.shared.b16, sm_90
__device__ __forceinline__ void stmatrix_x1_trans(uint32_t shared, const uint32_t (&s)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(shared), "r"(s[0]) : "memory");
}

// stmatrix.sync.aligned.m8n8.x2.trans.shared.b16, sm_90
__device__ __forceinline__ void stmatrix_x2_trans(uint32_t shared, const uint32_t (&s)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared), "r"(s[0]), "r"(s[1])
               : "memory");
}

// stmatrix.sync.aligned.m8n8.x4.trans.shared.b16, sm_90
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t shared, const uint32_t (&s)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(s[0]),
               "r"(s[1]), "r"(s[2]), "r"(s[3])
               : "memory");
}

// --- tensor cores: d += a b, a row-major [16, K], b column-major [K, 8], d [16, 8] -----------------------------------

// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32, sm_80
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32, sm_80
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32, sm_80: sums wrap
__device__ __forceinline__ void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32, sm_80: d = a b + c
__device__ __forceinline__ void mma_m16n8k32_s8_from(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                     const int32_t (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// --- bits and numbers ------------------------------------------------------------------------------------------------

// lop3.b32, sm_50: bit i of the result is bit (a_i << 2 | b_i << 1 | c_i) of kTable
template <int kTable>
  requires(kTable >= 0 && kTable <= 255)
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// prmt.b32, sm_20: byte i of the result is byte (selector >> 4 i & 7) of b:a; with bit 3 set, its sign eight times
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// cvt.rni.sat.s8.f32, sm_20: to nearest, ties to even, clamped to [-128, 127]; NaN gives 0
__device__ __forceinline__ int32_t cvt_rni_sat_s8(float x) {
  int32_t d;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(d) : "f"(x));
  return d;
}

// cvt.pack.sat.s8.s32.b32, sm_72: b and then a, clamped to [-128, 127], in the lower two bytes, c's lower two above
__device__ __forceinline__ uint32_t cvt_pack_sat_s8(int32_t a, int32_t b, uint32_t c) {
  uint32_t d;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// rcp.approx.ftz.f32, sm_20: 1 / x, within an ulp or so; what is subnormal is 0 before and after
__device__ __forceinline__ float rcp_approx(float x) {
  float d;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

// --- global memory with cache hints ----------------------------------------------------------------------------------
// .nc is for memory that nobody writes while the kernel runs.

// createpolicy.fractional.L2::evict_first.b64, sm_80: for data that is read once
__device__ __forceinline__ uint64_t policy_evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// createpolicy.fractional.L2::evict_last.b64, sm_80: for data that other blocks read again
__device__ __forceinline__ uint64_t policy_evict_last() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// prefetch.global.L2, sm_20
__device__ __forceinline__ void prefetch_l2(const void* source) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(source)));
}

// ld.global.nc.u32, sm_32
__device__ __forceinline__ uint32_t ld_nc(const uint32_t* source) {
  uint32_t d;
  asm("ld.global.nc.u32 %0, [%1];" : "=r"(d) : "l"(__cvta_generic_to_global(source)));
  return d;
}

// ld.global.nc.v2.u32, sm_32
__device__ __forceinline__ uint2 ld_nc(const uint2* source) {
  uint2 d;
  asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "l"(__cvta_generic_to_global(source)));
  return d;
}

// ld.global.nc.v4.u32, sm_32
__device__ __forceinline__ uint4 ld_nc(const uint4* source) {
  uint4 d;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
      : "l"(__cvta_generic_to_global(source)));
  return d;
}

// ld.global.nc.L1::no_allocate.v4.u32, sm_70
__device__ __forceinline__ uint4 ld_nc_no_allocate(const uint4* source) {
  uint4 d;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
      : "l"(__cvta_generic_to_global(source)));
  return d;
}

// ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32, sm_80
__device__ __forceinline__ uint4 ld_nc_no_allocate_hint(const uint4* source, uint64_t policy) {
  uint4 d;
  asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
      : "l"(__cvta_generic_to_global(source)), "l"(policy));
  return d;
}

// st.global.cs.u32, sm_20: written once, not read again by this kernel
__device__ __forceinline__ void st_cs(uint32_t* destination, uint32_t s) {
  asm volatile("st.global.cs.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(destination)), "r"(s) : "memory");
}

// st.global.cs.v2.u32, sm_20
__device__ __forceinline__ void st_cs(uint2* destination, uint2 s) {
  asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(destination)), "r"(s.x), "r"(s.y)
               : "memory");
}

// st.global.cs.v4.u32, sm_20
__device__ __forceinline__ void st_cs(uint4* destination, uint4 s) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(destination)), "r"(s.x),
               "r"(s.y), "r"(s.z), "r"(s.w)
               : "memory");
}

// st.global.L2::cache_hint.v4.u32, sm_80
__device__ __forceinline__ void st_hint(uint4* destination, uint4 s, uint64_t policy) {
  asm volatile(
      "st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(__cvta_generic_to_global(destination)),
      "r"(s.x), "r"(s.y), "r"(s.z), "r"(s.w), "l"(policy)
      : "memory");
}

// --- between blocks --------------------------------------------------------------------------------------------------

// ld.acquire.gpu.global.u32, sm_70: the only load to spin on
__device__ __forceinline__ uint32_t ld_acquire(const uint32_t* source) {
  uint32_t d;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(d) : "l"(__cvta_generic_to_global(source)) : "memory");
  return d;
}

// st.release.gpu.global.u32, sm_70
__device__ __forceinline__ void st_release(uint32_t* destination, uint32_t s) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(destination)), "r"(s) : "memory");
}

// red.release.gpu.global.add.u32, sm_70
__device__ __forceinline__ void red_release_add(uint32_t* destination, uint32_t s) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(destination)), "r"(s)
               : "memory");
}

// atom.acq_rel.gpu.global.add.u32, sm_70: returns the value before the addition
__device__ __forceinline__ uint32_t atom_acq_rel_add(uint32_t* destination, uint32_t s) {
  uint32_t d;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(d)
               : "l"(__cvta_generic_to_global(destination)), "r"(s)
               : "memory");
  return d;
}

// nanosleep.u32, sm_70: at most 1 ms, a hint
__device__ __forceinline__ void nanosleep(uint32_t nanoseconds) {
  asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds));
}

// --- between kernels -------------------------------------------------------------------------------------------------
// Of a kernel that is launched as a Dependent (launch.h), and of the one before it; elsewhere nothing happens.

// griddepcontrol.launch_dependents, sm_90: the next kernel may start once all blocks have come here or ended
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// griddepcontrol.wait, sm_90: until the kernel before has ended, and all that it has written is there
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- inside a block --------------------------------------------------------------------------------------------------

// bar.sync a, b, sm_20: whole warps, `threads` of them counting arrivals; 0 <= barrier < 16
__device__ __forceinline__ void bar_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// bar.arrive a, b, sm_20: counts and does not wait
__device__ __forceinline__ void bar_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// setmaxnreg.inc.sync.aligned.u32, sm_90a: by a whole warpgroup
template <int kRegisters>
  requires(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0)
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// setmaxnreg.dec.sync.aligned.u32, sm_90a: by a whole warpgroup
template <int kRegisters>
  requires(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0)
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace qops::ptx

#endif
