// c[M, N] = a[M, K] b[N, K]^T by cp.async, ldmatrix and mma.sync, for 16-bit floats and int8: a k-step of mma is 32
// bytes of a row in both. A block computes 64 x 32, a warp 16 x 32; a stage holds 64 bytes of each row.
#pragma once

#include <type_traits>

#include "cuda/ptx.cuh"

namespace gemm {

using namespace qops;

enum class Bug {
  kNone,
  kMissingBarrier,     // before a stage is filled again
  kRegistersSwapped,   // a[1] and a[2]
  kUnswizzledRead,     // written swizzled, read straight
  kMmaInBranch,        // half of the warp
  kMisalignedMatrix,   // rows at multiples of 8 bytes
  kMatrixPastEnd,      // the warp after the last one's rows
  kRowPastEnd,         // stores row M
  kPlaceOfMmaDiffers,  // even and odd lanes in two branches
};

constexpr int kThreads = 128;
constexpr int kBlockM = 64;
constexpr int kBlockN = 32;
constexpr int kRowBytes = 64;
constexpr int kStages = 2;
constexpr int kStageBytes = (kBlockM + kBlockN) * kRowBytes;

// Where chunk c (16 bytes) of row r lies: eight rows of one chunk cover all banks.
__device__ inline uint32_t swizzled(int r, int c) { return r * kRowBytes + (c ^ (r / 2 & 3)) * 16; }

template <class T>
using Accumulator = std::conditional_t<sizeof(T) == 1, int32_t, float>;

template <class T>
__device__ void mma(Accumulator<T> (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    ptx::mma_m16n8k16_f16(d, a, b);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    ptx::mma_m16n8k16_bf16(d, a, b);
  } else {
    ptx::mma_m16n8k32_s8(d, a, b);
  }
}

// Rows [first, first + rows) of x [limit, k], 64 bytes from byte `offset` on; what lies outside is zero.
template <class T>
__device__ void load_rows(uint32_t shared, const T* x, int first, int rows, int limit, int k, int offset) {
  for (int i = threadIdx.x; i < rows * 4; i += kThreads) {
    const int r = i / 4, c = i % 4;
    const int row_bytes = k * static_cast<int>(sizeof(T));
    const int at = offset + c * 16;
    const bool inside = first + r < limit && at < row_bytes;
    const auto* row = reinterpret_cast<const uint8_t*>(x + static_cast<int64_t>(first + r) * k);
    ptx::cp_async_cg_zfill(shared + swizzled(r, c), inside ? row + at : reinterpret_cast<const uint8_t*>(x),
                           inside ? 16 : 0);
  }
}

template <class T, Bug kBug>
__global__ void gemm(const T* a, const T* b, Accumulator<T>* c, int m, int n, int k) {
  QOPS_DYNAMIC_SHARED(bytes);
  const uint32_t base = ptx::shared_address(bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m0 = blockIdx.y * kBlockM, n0 = blockIdx.x * kBlockN;
  const int steps = (k * static_cast<int>(sizeof(T)) + kRowBytes - 1) / kRowBytes;
  const auto load = [&](int step) {
    const uint32_t stage = base + step % kStages * kStageBytes;
    if (step < steps) {
      load_rows(stage, a, m0, kBlockM, m, k, step * kRowBytes);
      load_rows(stage + kBlockM * kRowBytes, b, n0, kBlockN, n, k, step * kRowBytes);
    }
    ptx::cp_async_commit();
  };
  Accumulator<T> acc[4][4] = {};
  load(0);
  for (int step = 0; step < steps; ++step) {
    load(step + 1);
    ptx::cp_async_wait<1>();
    __syncthreads();
    const uint32_t stage_a = base + step % kStages * kStageBytes;
    const uint32_t stage_b = stage_a + kBlockM * kRowBytes;
    for (int half = 0; half < 2; ++half) {
      const auto place = [&](int row, int chunk) -> uint32_t {
        if constexpr (kBug == Bug::kUnswizzledRead) return row * kRowBytes + chunk * 16;
        return swizzled(row, chunk) + (kBug == Bug::kMisalignedMatrix ? 8 : 0);
      };
      uint32_t fragment_a[4];
      const int row = (kBug == Bug::kMatrixPastEnd ? warp + 6 : warp) * 16 + lane % 16;
      ptx::ldmatrix_x4(fragment_a, stage_a + place(row, half * 2 + lane / 16));
      if constexpr (kBug == Bug::kRegistersSwapped) {
        const uint32_t first = fragment_a[1];
        fragment_a[1] = fragment_a[2];
        fragment_a[2] = first;
      }
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t fragment_b[4];
        ptx::ldmatrix_x4(fragment_b, stage_b + place(pair * 16 + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2));
        const uint32_t left[2] = {fragment_b[0], fragment_b[1]};
        const uint32_t right[2] = {fragment_b[2], fragment_b[3]};
        if (kBug != Bug::kMmaInBranch || lane < 16) {
          if constexpr (kBug == Bug::kPlaceOfMmaDiffers) {
            if (lane % 2 == 0) {
              mma<T>(acc[pair * 2], fragment_a, left);
            } else {
              if constexpr (std::is_same_v<T, __half>) ptx::mma_m16n8k16_f16(acc[pair * 2], fragment_a, left);
            }
          } else {
            mma<T>(acc[pair * 2], fragment_a, left);
          }
        }
        if constexpr (sizeof(T) == 1) {
          const int32_t (&sums)[4] = acc[pair * 2 + 1], before[4] = {sums[0], sums[1], sums[2], sums[3]};
          ptx::mma_m16n8k32_s8_from(acc[pair * 2 + 1], fragment_a, right, before);
        } else {
          mma<T>(acc[pair * 2 + 1], fragment_a, right);
        }
      }
    }
    if constexpr (kBug != Bug::kMissingBarrier) __syncthreads();
  }
  const int limit = kBug == Bug::kRowPastEnd ? m + 1 : m;
  for (int tile = 0; tile < 4; ++tile) {
    for (int i = 0; i < 4; ++i) {
      const int row = m0 + warp * 16 + lane / 4 + i / 2 * 8;
      const int column = n0 + tile * 8 + lane % 4 * 2 + i % 2;
      if (row < limit && column < n) c[static_cast<int64_t>(row) * n + column] = acc[tile][i];
    }
  }
}

}  // namespace gemm
