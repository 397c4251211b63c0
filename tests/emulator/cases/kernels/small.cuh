// Kernels of a few instructions each: what votes, reductions, atomics and conversions give, and launches past a limit.
#pragma once

#include "cuda/ptx.cuh"

namespace small {

using namespace qops;

constexpr unsigned kAll = 0xffffffff;
constexpr int kWarpResults = 16;

// One row of y per thread of a warp.
__global__ void warp_results(const int* x, unsigned* y) {
  const int lane = threadIdx.x;
  unsigned* row = y + lane * kWarpResults;
  const int value = x[lane];
  int all_equal;
  row[0] = __ballot_sync(kAll, value > 0);
  row[1] = __any_sync(kAll, value == 3);
  row[2] = __all_sync(kAll, value < 100);
  row[3] = __match_any_sync(kAll, value);
  row[4] = __match_all_sync(kAll, value / 100, &all_equal);
  row[5] = static_cast<unsigned>(all_equal);
  row[6] = static_cast<unsigned>(__reduce_add_sync(kAll, value));
  row[7] = static_cast<unsigned>(__reduce_min_sync(kAll, value));
  row[8] = static_cast<unsigned>(__reduce_max_sync(kAll, value));
  row[9] = __reduce_xor_sync(kAll, static_cast<unsigned>(value));
  row[10] = static_cast<unsigned>(__shfl_down_sync(kAll, value, 3, 8));
  row[11] = static_cast<unsigned>(__shfl_up_sync(kAll, value, 3, 8));
  row[12] = static_cast<unsigned>(__shfl_xor_sync(kAll, value, 9, 8));
  row[13] = static_cast<unsigned>(__shfl_sync(kAll, value, 11, 8));
  // Two halves meet on their own.
  const unsigned half = lane < 16 ? 0x0000ffff : 0xffff0000;
  row[14] = __ballot_sync(half, value > 0);
  row[15] = (__activemask() >> lane) & 1;
}

// Counts over several blocks of 48 threads: the last warp is half a warp.
__global__ void counts(const int* x, int* y, float* sums, unsigned long long* exchanged) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int positive = __syncthreads_count(x[i] > 0);
  const int all = __syncthreads_and(x[i] > -100);
  const int any = __syncthreads_or(x[i] > 100);
  QOPS_SHARED(int, maximum, 1);
  if (threadIdx.x == 0) maximum[0] = -1000;
  __syncthreads();
  atomicMax(&maximum[0], x[i]);
  atomicAdd(&sums[0], static_cast<float>(x[i]));
  atomicAdd(&y[0], x[i]);
  atomicMin(&y[1], x[i]);
  atomicCAS(exchanged, 0ull, static_cast<unsigned long long>(i) + 1);
  // Half of the threads leave: the barrier below counts those that are left.
  if (threadIdx.x % 2 == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    int* row = y + 2 + 4 * blockIdx.x;
    row[0] = positive;
    row[1] = all;
    row[2] = any;
    row[3] = maximum[0];
  }
}

__global__ void conversions(const float* x, int* y, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    y[i] = ptx::cvt_rni_sat_s8(x[i]);
    y[n + i] = ptx::cvt_pack_sat_s8(__float2int_rn(x[n - 1 - i]), __float2int_rn(x[i]), 0x12345678);
  }
}

__global__ void reciprocals(const float* x, float* y, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = ptx::rcp_approx(x[i]);
}

__global__ void nothing() {}

__global__ void touches_shared_past_end(int offset) {
  QOPS_DYNAMIC_SHARED(bytes);
  bytes[offset] = 1;
}

__global__ void gives_no_policy(const uint4* x, uint4* y) { ptx::st_hint(y, ptx::ld_nc_no_allocate_hint(x, 0), 0); }

#if !defined(__CUDACC__)
// nvcc sees this one through, and breaks down over it.
__global__ void loads_through_wrong_space(uint32_t* y) {
  QOPS_SHARED(uint32_t, word, 1);
  word[0] = 1;
  *y = ptx::ld_nc(&word[0]);
}

// For sm_90a alone.
__global__ void grows_registers_of_half_a_warp() {
  if (threadIdx.x < 16) ptx::setmaxnreg_inc<128>();
}
#endif

}  // namespace small
