// y = x^T for one 16 x 16 matrix of 16-bit elements per warp: ldmatrix transposes each quarter, stmatrix puts it down.
#pragma once

#include "cuda/ptx.cuh"

namespace flip {

using namespace qops;

enum class Bug {
  kNone,
  kMissingSyncwarp,      // before ldmatrix reads what other lanes have stored
  kMissingLastSyncwarp,  // before lanes read what stmatrix has stored elsewhere
  kNotTransposed,
};

constexpr int kSide = 16;

template <Bug kBug>
__global__ void flip(const uint16_t* x, uint16_t* y) {
  QOPS_SHARED(uint16_t, tile, kSide* kSide);
  QOPS_SHARED(uint16_t, flipped, kSide* kSide);
  const int lane = threadIdx.x;
  const int row = lane % 16, half = lane / 16;
  const auto chunk = [](const uint16_t* matrix, int r, int c) { return matrix + r * kSide + c * 8; };
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kSide * kSide;
  // Lane 2 r + h brings chunk h of row r: not the one whose row it addresses below.
  *reinterpret_cast<uint4*>(&tile[lane * 8]) = *reinterpret_cast<const uint4*>(&x[at + lane * 8]);
  if constexpr (kBug != Bug::kMissingSyncwarp) __syncwarp();
  uint32_t quarters[4];
  const uint32_t source = ptx::shared_address(chunk(tile, row, half));
  if constexpr (kBug == Bug::kNotTransposed) {
    ptx::ldmatrix_x4(quarters, source);
  } else {
    ptx::ldmatrix_x4_trans(quarters, source);
  }
  // Quarter 1 was the lower left one: it goes to the upper right.
  ptx::stmatrix_x4(ptx::shared_address(chunk(flipped, half * 8 + row % 8, row / 8)), quarters);
  if constexpr (kBug != Bug::kMissingLastSyncwarp) __syncwarp();
  *reinterpret_cast<uint4*>(&y[at + lane * 8]) = *reinterpret_cast<const uint4*>(&flipped[lane * 8]);
}

}  // namespace flip
