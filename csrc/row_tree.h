// The order in which the squares of a row are added, on the CPU and on a GPU: a fixed tree that depends on H alone, so
// that a row has the same bits at every ISA level, in every batch and on every device.
//
// The tree is that of a thread block: T = row_threads(H) threads, thread t owns elements 8t .. 8t+7 of every 8T, so
//   1. element i belongs to partial i mod 8T; a partial adds its squares in ascending order of i;
//   2. the 8 partials of a thread are added at strides 4, 2, 1;
//   3. the 32 sums of a warp at strides 16, 8, 4, 2, 1; then the warps at strides T/64, ..., 2, 1.
// Squares are rounded before they are added (for fp16 and bf16 elements they are exact).
#pragma once

#include "kernels.h"

namespace qops {

inline constexpr int kVector = 8;
inline constexpr int kWarp = 32;
inline constexpr int kMaxRowThreads = 512;

QOPS_ALWAYS_INLINE int row_threads(int64_t h) { return h <= 1024 ? 32 : h <= 8192 ? 128 : kMaxRowThreads; }

}  // namespace qops
