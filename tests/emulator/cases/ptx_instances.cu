// One call of every function of csrc/cuda/ptx.cuh, and of every immediate operand that differs: what the test assembles
// for each architecture. Results go to memory, else the compiler would drop the instructions.
#include "cuda/ptx.cuh"

namespace ptx = qops::ptx;

__global__ void copies(const uint8_t* source, uint32_t shared, uint32_t bytes) {
  ptx::cp_async_ca<4>(shared, source);
  ptx::cp_async_ca<8>(shared, source);
  ptx::cp_async_ca<16>(shared, source);
  ptx::cp_async_ca_zfill<4>(shared, source, bytes);
  ptx::cp_async_ca_zfill<8>(shared, source, bytes);
  ptx::cp_async_ca_zfill<16>(shared, source, bytes);
  ptx::cp_async_cg(shared, source);
  ptx::cp_async_cg_zfill(shared, source, bytes);
  ptx::cp_async_cg_zfill_hint(shared, source, bytes, ptx::policy_evict_first());
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::cp_async_wait<7>();
  ptx::cp_async_wait_all();
}

__global__ void matrices(uint32_t* y, uint2* y2, uint4* y4) {
  QOPS_SHARED(uint32_t, tile, 1024);
  const uint32_t shared = ptx::shared_address(tile + 4 * threadIdx.x);
  uint32_t one[1], two[2], four[4];
  ptx::ldmatrix_x1(one, shared);
  ptx::ldmatrix_x2(two, shared);
  ptx::ldmatrix_x4(four, shared);
  ptx::st_cs(y, one[0]);
  ptx::st_cs(y2, make_uint2(two[0], two[1]));
  ptx::st_cs(y4, make_uint4(four[0], four[1], four[2], four[3]));
  ptx::ldmatrix_x1_trans(one, shared);
  ptx::ldmatrix_x2_trans(two, shared);
  ptx::ldmatrix_x4_trans(four, shared);
  ptx::st_cs(y, one[0]);
  ptx::st_cs(y2, make_uint2(two[0], two[1]));
  ptx::st_cs(y4, make_uint4(four[0], four[1], four[2], four[3]));
  ptx::ld_shared(two, shared);
  ptx::st_cs(y2, make_uint2(two[0], two[1]));
#if __CUDA_ARCH__ >= 900
  ptx::stmatrix_x1(shared, one);
  ptx::stmatrix_x2(shared, two);
  ptx::stmatrix_x4(shared, four);
  ptx::stmatrix_x1_trans(shared, one);
  ptx::stmatrix_x2_trans(shared, two);
  ptx::stmatrix_x4_trans(shared, four);
#endif
}

__global__ void tensor_cores(const uint32_t* x, float* y, int32_t* z) {
  const uint32_t a[4] = {x[0], x[1], x[2], x[3]}, b[2] = {x[4], x[5]};
  float d[4] = {y[0], y[1], y[2], y[3]};
  int32_t e[4] = {z[0], z[1], z[2], z[3]};
  ptx::mma_m16n8k16_f16(d, a, b);
  ptx::mma_m16n8k16_bf16(d, a, b);
  ptx::mma_m16n8k32_s8(e, a, b);
  const int32_t c[4] = {z[4], z[5], z[6], z[7]};
  int32_t f[4];
  ptx::mma_m16n8k32_s8_from(f, a, b, c);
  for (int i = 0; i < 4; ++i) {
    y[i] = d[i];
    z[i] = e[i];
    z[i + 4] = f[i];
  }
}

__global__ void numbers(const uint32_t* x, uint32_t* y, float f) {
  y[0] = ptx::lop3<0>(x[0], x[1], x[2]) + ptx::lop3<0xea>(x[0], x[1], x[2]) + ptx::lop3<255>(x[0], x[1], x[2]);
  y[1] = ptx::prmt(x[0], x[1], 0x5410) + ptx::prmt(x[0], x[1], x[2]);
  y[2] = ptx::cvt_rni_sat_s8(f);
  y[3] = ptx::cvt_pack_sat_s8(x[0], x[1], x[2]);
  y[4] = __float_as_uint(ptx::rcp_approx(f));
}

__global__ void hints(const uint4* x, const uint2* x2, const uint32_t* x1, uint4* y, uint2* y2, uint32_t* y1) {
  ptx::prefetch_l2(x);
  ptx::st_cs(y1, ptx::ld_nc(x1));
  ptx::st_cs(y2, ptx::ld_nc(x2));
  ptx::st_cs(y, ptx::ld_nc(x));
  ptx::st_cs(y + 1, ptx::ld_nc_no_allocate(x + 1));
  ptx::st_hint(y + 2, ptx::ld_nc_no_allocate_hint(x + 2, ptx::policy_evict_first()), ptx::policy_evict_last());
}

__global__ void between_blocks(uint32_t* x) {
  while (ptx::ld_acquire(x) == 0) ptx::nanosleep(100);
  ptx::red_release_add(x, 1);
  ptx::st_release(x + 1, ptx::atom_acq_rel_add(x + 2, 1));
}

__global__ void between_kernels() {
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
}

__global__ void __launch_bounds__(256, 1) inside_a_block(int threads) {
  ptx::bar_sync(1, 64);
  ptx::bar_sync(2, threads);
  ptx::bar_arrive(3, 64);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_inc<240>();
  } else {
    ptx::setmaxnreg_dec<24>();
  }
#endif
}
