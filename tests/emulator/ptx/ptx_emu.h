// The instructions of csrc/cuda/ptx.cuh, for g++: the same names and signatures, and where the call stands behind them.
// What ptxas refuses in an immediate operand does not compile here either; what the hardware refuses is a fault.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "emulator/emu.h"

namespace emu::ptx {

uint32_t shared_address(const void* pointer, Site at = Site::current());

// What the templates below share.
void cp_async(uint32_t shared, const void* source, int bytes, uint32_t source_bytes, const Site& at);
void set_max_registers(const char* instruction, int registers, const Site& at);

template <int kBytes>
  requires(kBytes == 4 || kBytes == 8 || kBytes == 16)
void cp_async_ca(uint32_t shared, const void* source, Site at = Site::current()) {
  cp_async(shared, source, kBytes, kBytes, at);
}
template <int kBytes>
  requires(kBytes == 4 || kBytes == 8 || kBytes == 16)
void cp_async_ca_zfill(uint32_t shared, const void* source, uint32_t source_bytes, Site at = Site::current()) {
  cp_async(shared, source, kBytes, source_bytes, at);
}
void cp_async_cg(uint32_t shared, const void* source, Site at = Site::current());
void cp_async_cg_zfill(uint32_t shared, const void* source, uint32_t source_bytes, Site at = Site::current());
void cp_async_cg_zfill_hint(uint32_t shared, const void* source, uint32_t source_bytes, uint64_t policy,
                            Site at = Site::current());
void cp_async_commit(Site at = Site::current());
template <int kPending>
  requires(kPending >= 0)
void cp_async_wait(Site at = Site::current()) {
  copies_wait(kPending, at);
}
void cp_async_wait_all(Site at = Site::current());

void ld_shared(uint32_t (&d)[2], uint32_t shared, Site at = Site::current());

void ldmatrix_x1(uint32_t (&d)[1], uint32_t shared, Site at = Site::current());
void ldmatrix_x2(uint32_t (&d)[2], uint32_t shared, Site at = Site::current());
void ldmatrix_x4(uint32_t (&d)[4], uint32_t shared, Site at = Site::current());
void ldmatrix_x1_trans(uint32_t (&d)[1], uint32_t shared, Site at = Site::current());
void ldmatrix_x2_trans(uint32_t (&d)[2], uint32_t shared, Site at = Site::current());
void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t shared, Site at = Site::current());
void stmatrix_x1(uint32_t shared, const uint32_t (&s)[1], Site at = Site::current());
void stmatrix_x2(uint32_t shared, const uint32_t (&s)[2], Site at = Site::current());
void stmatrix_x4(uint32_t shared, const uint32_t (&s)[4], Site at = Site::current());
void stmatrix_x1_trans(uint32_t shared, const uint32_t (&s)[1], Site at = Site::current());
void stmatrix_x2_trans(uint32_t shared, const uint32_t (&s)[2], Site at = Site::current());
void stmatrix_x4_trans(uint32_t shared, const uint32_t (&s)[4], Site at = Site::current());

void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site at = Site::current());
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site at = Site::current());
void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site at = Site::current());
void mma_m16n8k32_s8_from(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int32_t (&c)[4],
                          Site at = Site::current());

template <int kTable>
  requires(kTable >= 0 && kTable <= 255)
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i) {
    if (kTable >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return d;
}
uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector);
int32_t cvt_rni_sat_s8(float x);
uint32_t cvt_pack_sat_s8(int32_t a, int32_t b, uint32_t c);
float rcp_approx(float x);

uint64_t policy_evict_first();
uint64_t policy_evict_last();
void prefetch_l2(const void* source, Site at = Site::current());
uint32_t ld_nc(const uint32_t* source, Site at = Site::current());
uint2 ld_nc(const uint2* source, Site at = Site::current());
uint4 ld_nc(const uint4* source, Site at = Site::current());
uint4 ld_nc_no_allocate(const uint4* source, Site at = Site::current());
uint4 ld_nc_no_allocate_hint(const uint4* source, uint64_t policy, Site at = Site::current());
void st_cs(uint32_t* destination, uint32_t s, Site at = Site::current());
void st_cs(uint2* destination, uint2 s, Site at = Site::current());
void st_cs(uint4* destination, uint4 s, Site at = Site::current());
void st_hint(uint4* destination, uint4 s, uint64_t policy, Site at = Site::current());

uint32_t ld_acquire(const uint32_t* source, Site at = Site::current());
void st_release(uint32_t* destination, uint32_t s, Site at = Site::current());
void red_release_add(uint32_t* destination, uint32_t s, Site at = Site::current());
uint32_t atom_acq_rel_add(uint32_t* destination, uint32_t s, Site at = Site::current());
void nanosleep(uint32_t nanoseconds, Site at = Site::current());

void griddepcontrol_launch_dependents(Site at = Site::current());
void griddepcontrol_wait(Site at = Site::current());

void bar_sync(int barrier, int threads, Site at = Site::current());
void bar_arrive(int barrier, int threads, Site at = Site::current());
template <int kRegisters>
  requires(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0)
void setmaxnreg_inc(Site at = Site::current()) {
  set_max_registers("setmaxnreg.inc", kRegisters, at);
}
template <int kRegisters>
  requires(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0)
void setmaxnreg_dec(Site at = Site::current()) {
  set_max_registers("setmaxnreg.dec", kRegisters, at);
}

}  // namespace emu::ptx
