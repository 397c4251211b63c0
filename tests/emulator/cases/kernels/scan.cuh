// y[i] = x[0] + ... + x[i] within a block's 256 integers: a scan of each warp by shuffles, then one of the warps'
// totals.
#pragma once

#include "cuda/ptx.cuh"

namespace scan {

enum class Bug {
  kNone,
  kNoBound,              // adds the own value where no lane is below
  kMissingBarrier,       // before the totals of the warps are used
  kDivergentCollective,  // some lanes vote while others shuffle
  kReadsExitedLane,
};

constexpr int kThreads = 256;
constexpr unsigned kAll = 0xffffffff;

template <Bug kBug>
__global__ void scan(const int* x, int* y) {
  QOPS_SHARED(int, totals, kThreads / 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = x[blockIdx.x * kThreads + threadIdx.x];
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(kAll, sum, step);
    if (kBug == Bug::kNoBound || lane >= step) sum += below;
  }
  if (lane == 31) totals[warp] = sum;
  if constexpr (kBug == Bug::kDivergentCollective) {
    if (lane < 8) {
      sum += static_cast<int>(__ballot_sync(kAll, sum > 0)) & 0;
    } else {
      sum += __shfl_sync(kAll, sum, 0) & 0;
    }
  }
  if constexpr (kBug != Bug::kMissingBarrier) __syncthreads();
  for (int w = 0; w < warp; ++w) sum += totals[w];
  y[blockIdx.x * kThreads + threadIdx.x] = sum;
  if constexpr (kBug == Bug::kReadsExitedLane) {
    if (lane == 31) return;
    y[blockIdx.x * kThreads + threadIdx.x] = __shfl_sync(kAll, sum, 31);
  }
}

}  // namespace scan
