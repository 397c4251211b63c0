// y = 2 x: warp 0 fills two buffers in turn, warp 1 empties them; a full and an empty barrier for each buffer. A third
// warp has other business.
#pragma once

#include "cuda/ptx.cuh"

namespace handoff {

using namespace qops;

enum class Bug {
  kNone,
  kNoWaitForEmpty,  // fills what is still being read
  kNoArrival,       // never says that a buffer is full
  kCountsDiffer,    // 64 threads on one side, 96 on the other
  kCountTooLarge,   // more threads than the block has
  kCountNotWarps,   // 48
  kSeventeenth,     // barrier 16
};

constexpr int kThreads = 96;
constexpr int kBoth = 64;

template <Bug kBug>
__global__ void handoff(const float* x, float* y, int tiles) {
  QOPS_SHARED(float, buffers, 64);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto full = [](int buffer) { return kBug == Bug::kSeventeenth ? 15 + buffer : 1 + buffer; };
  const auto empty = [](int buffer) { return 3 + buffer; };
  if (warp == 0) {
    for (int tile = 0; tile < tiles; ++tile) {
      const int buffer = tile % 2;
      if constexpr (kBug != Bug::kNoWaitForEmpty) ptx::bar_sync(empty(buffer), kBoth);
      buffers[buffer * 32 + lane] = x[tile * 32 + lane];
      constexpr int kCount = kBug == Bug::kCountsDiffer    ? 96
                             : kBug == Bug::kCountTooLarge ? 128
                             : kBug == Bug::kCountNotWarps ? 48
                                                           : kBoth;
      if constexpr (kBug != Bug::kNoArrival) ptx::bar_arrive(full(buffer), kCount);
    }
  } else if (warp == 1) {
    for (int buffer = 0; buffer < 2; ++buffer) ptx::bar_arrive(empty(buffer), kBoth);
    for (int tile = 0; tile < tiles; ++tile) {
      const int buffer = tile % 2;
      ptx::bar_sync(full(buffer), kBoth);
      y[tile * 32 + (31 - lane)] = 2 * buffers[buffer * 32 + (31 - lane)];
      if (tile + 2 < tiles) ptx::bar_arrive(empty(buffer), kBoth);
    }
  }
}

}  // namespace handoff
