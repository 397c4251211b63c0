// y[N, M] = x[M, N] transposed, through a padded tile.
#pragma once

#include "cuda/ptx.cuh"

namespace transpose {

enum class Bug {
  kNone,
  kMissingBarrier,
  kRowPastEnd,       // <= where < is meant
  kUnpaddedTile,     // indexed with padding, declared without
  kStaticPastLimit,  // 49152 bytes of static shared memory are possible
};

constexpr int kTile = 32;
constexpr int kRows = 8;

template <Bug kBug>
__global__ void transpose(const float* x, float* y, int m, int n) {
  constexpr int kStride = kTile + 1;
  QOPS_SHARED(float, tile, kTile*(kBug == Bug::kUnpaddedTile ? kTile : kStride));
  if constexpr (kBug == Bug::kStaticPastLimit) {
    QOPS_SHARED(uint4, more, 3072);
    more[threadIdx.x] = uint4{};
  }
  const int column = blockIdx.x * kTile + threadIdx.x;
  for (int i = threadIdx.y; i < kTile; i += kRows) {
    const int row = blockIdx.y * kTile + i;
    if (row < m && column < n) tile[i * kStride + threadIdx.x] = x[static_cast<int64_t>(row) * n + column];
  }
  if constexpr (kBug != Bug::kMissingBarrier) __syncthreads();
  const int out_column = blockIdx.y * kTile + threadIdx.x;
  for (int i = threadIdx.y; i < kTile; i += kRows) {
    const int out_row = blockIdx.x * kTile + i;
    const bool inside = kBug == Bug::kRowPastEnd ? out_row <= n : out_row < n;
    if (inside && out_column < m) y[static_cast<int64_t>(out_row) * m + out_column] = tile[threadIdx.x * kStride + i];
  }
}

}  // namespace transpose
