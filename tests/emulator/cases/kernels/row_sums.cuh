// y[r, w] = sum of x[r, :], rows of any stride: 16-byte loads where they are aligned, one reduction tree per block.
// Every warp w of it has the sum in the end, as a kernel needs that goes on with it.
#pragma once

#include "cuda/ptx.cuh"

namespace row_sums {

enum class Bug {
  kNone,
  kMissingBarrier,       // partial sums are read before the other warps have written them
  kMissingReuseBarrier,  // the next row overwrites partial sums that a slow warp still reads
  kBarrierInBranch,      // half of a warp waits at one barrier, half at another
  kShuffleInBranch,      // half of the lanes of a full mask
  kLaneOutsideMask,      // all lanes, with a mask that leaves one out
  kWidthNotPowerOfTwo,
  kVectorPastEnd,      // one vector more than a row has
  kMisalignedVectors,  // 16-byte loads at any stride
};

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

template <Bug kBug>
__device__ float warp_sum(float sum) {
  constexpr unsigned kMask = kBug == Bug::kLaneOutsideMask ? 0x7fffffff : 0xffffffff;
  for (int step = 16; step > 0; step /= 2) {
    if constexpr (kBug == Bug::kShuffleInBranch) {
      if (step == 1 && threadIdx.x % 32 >= 16) break;
    }
    sum += __shfl_xor_sync(kMask, sum, step, kBug == Bug::kWidthNotPowerOfTwo ? 24 : 32);
  }
  return sum;
}

template <Bug kBug>
__global__ void row_sums(const float* x, float* y, int rows, int columns, int64_t stride) {
  QOPS_SHARED(float, partial, kWarps);
  const int warp = threadIdx.x / 32;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const float* begin = x + row * stride;
    float sum = 0;
    const bool aligned = reinterpret_cast<uintptr_t>(begin) % sizeof(float4) == 0;
    const int vectors = aligned || kBug == Bug::kMisalignedVectors ? columns / 4 : 0;
    const int read = kBug == Bug::kVectorPastEnd ? vectors + 1 : vectors;
    for (int v = threadIdx.x; v < read; v += kThreads) {
      const float4 four = reinterpret_cast<const float4*>(begin)[v];
      sum += (four.x + four.y) + (four.z + four.w);
    }
    for (int c = vectors * 4 + threadIdx.x; c < columns; c += kThreads) sum += begin[c];
    sum = warp_sum<kBug>(sum);
    if (threadIdx.x % 32 == 0) partial[warp] = sum;
    if constexpr (kBug == Bug::kBarrierInBranch) {
      if (threadIdx.x < 16) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    } else if constexpr (kBug != Bug::kMissingBarrier) {
      __syncthreads();
    }
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += partial[w];
    if (threadIdx.x % 32 == 0) y[row * kWarps + warp] = total;
    if constexpr (kBug != Bug::kMissingReuseBarrier) __syncthreads();
  }
}

}  // namespace row_sums
