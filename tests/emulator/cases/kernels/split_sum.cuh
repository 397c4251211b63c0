// y[t] = sum over s of partial sums that blocks (t, s) compute: whichever block of a tile arrives last adds them in
// order, and sets the counter back for the next launch.
#pragma once

#include "cuda/ptx.cuh"

namespace split_sum {

using namespace qops;

enum class Bug {
  kNone,
  kMissingBarrier,      // counts before all threads of the block have written
  kMissingFlagBarrier,  // reads the verdict before thread 0 has it
  kCounterNotReset,     // right once
  kOneEarly,            // takes the last but one for the last
  kWaitsForAllBlocks,   // spins until others have run, which may not be resident
};

constexpr int kThreads = 64;

template <Bug kBug>
__global__ void split_sum(const float* x, float* partial, uint32_t* counter, float* y, int columns) {
  QOPS_SHARED(bool, last, 1);
  const int tile = blockIdx.x, split = blockIdx.y, splits = gridDim.y;
  // x [tile, split, column, thread]
  const float* mine = x + (static_cast<int64_t>(tile) * splits + split) * columns * kThreads + threadIdx.x;
  float sum = 0;
  for (int c = 0; c < columns; ++c) sum += mine[c * kThreads];
  partial[(static_cast<int64_t>(tile) * splits + split) * kThreads + threadIdx.x] = sum;
  if constexpr (kBug != Bug::kMissingBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t before = ptx::atom_acq_rel_add(&counter[tile], 1);
    last[0] = before == static_cast<uint32_t>(splits - (kBug == Bug::kOneEarly ? 2 : 1));
    if constexpr (kBug == Bug::kWaitsForAllBlocks) {
      while (ptx::ld_acquire(&counter[tile]) < static_cast<uint32_t>(splits)) ptx::nanosleep(100);
    }
  }
  if constexpr (kBug != Bug::kMissingFlagBarrier) __syncthreads();
  if (!last[0]) return;
  float total = 0;
  for (int s = 0; s < splits; ++s) total += partial[(static_cast<int64_t>(tile) * splits + s) * kThreads + threadIdx.x];
  y[tile * kThreads + threadIdx.x] = total;
  if (kBug != Bug::kCounterNotReset && threadIdx.x == 0) counter[tile] = 0;
}

}  // namespace split_sum
