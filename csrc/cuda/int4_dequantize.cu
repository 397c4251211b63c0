// int4_dequantize: the weights as numbers [N, K], for products so large that cuBLAS on them is the fastest way.
//
// Bound by memory: half a byte is read (and scales) and 2 or 4 are written for each weight. A warp turns one block of
// 16 rows x 64 columns: it reads 512 bytes in one range and writes 16 pieces of rows, each of 128 bytes or 256. In
// between, shared memory gathers a lane's pairs of columns into the 16 bytes that a store takes. Some 5 instructions a
// weight, where an H100 has time for 20.
#include "cuda/row.cuh"
#include "int4_layout.h"

namespace qops::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kWarps = kMaxThreads / kWarp;

// The scales, or the zeros, of a lane's two rows.
struct Pair {
  float v[2];
};

template <class T>
QOPS_DEVICE Pair load_pair(const T* p) {
  return {{widen(p[0]), widen(p[1])}};
}
QOPS_DEVICE Pair load_pair(const void* p, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kFloat16: return load_pair(static_cast<const __half*>(p) + at);
    case DType::kBFloat16: return load_pair(static_cast<const __nv_bfloat16*>(p) + at);
    default: return load_pair(static_cast<const float*>(p) + at);
  }
}
QOPS_DEVICE Pair load_zeros(const void* p, WeightKind kind, int64_t at) {
  if (kind == WeightKind::kSymmetric) return {{8.0f, 8.0f}};
  if (kind != WeightKind::kZeroPoint) return load_pair(static_cast<const float*>(p) + at);
  const uint8_t* zeros = static_cast<const uint8_t*>(p) + at;
  return {{static_cast<float>(zeros[0]), static_cast<float>(zeros[1])}};
}

// 2^23 has an ulp of 1, so the code goes into its mantissa; the difference is exact. A conversion takes four times as
// long.
QOPS_DEVICE float code_as_float(uint32_t code) { return __uint_as_float(0x4b000000u | code) - 8388608.0f; }

// One access of 4 or 8 bytes.
QOPS_DEVICE void store_pair(float* p, float a, float b) { *reinterpret_cast<float2*>(p) = make_float2(a, b); }
template <class T>
QOPS_DEVICE void store_pair(T* p, float a, float b) {
  *reinterpret_cast<uint32_t*>(p) = to_bits(narrow<T>(a)) | to_bits(narrow<T>(b)) << 16;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    dequantize_kernel(const __grid_constant__ Int4DequantizeParams p, const uint32_t steps_of_group) {
  // A row of a block, and 16 bytes (32 for float32): 8 rows of pairs of elements lie in different banks.
  constexpr int kPitch = int4::kBlockColumns + 8;
  constexpr int kPieces = static_cast<int>(sizeof(T)) * int4::kBlockColumns / 16;  // of 16 bytes, in a row
  constexpr int kPieceColumns = int4::kBlockColumns / kPieces;
  QOPS_SHARED(T, shared, kWarps * kStripRows * kPitch);
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t blocks_of_strip = int4::blocks(p.k);
  if (block >= int4::strips(p.n) * blocks_of_strip) return;  // a whole warp
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int64_t strip = block / blocks_of_strip;
  const int64_t first_step = block % blocks_of_strip * int4::kSteps;
  const uint32_t groups = static_cast<uint32_t>(p.k / p.group_size);
  T* const tile = shared + threadIdx.x / kWarp * kStripRows * kPitch;

  const uint4 four = reinterpret_cast<const uint4*>(p.packed)[block * kWarp + lane];
  const uint32_t words[int4::kSteps] = {four.x, four.y, four.z, four.w};
#pragma unroll
  for (int step = 0; step < int4::kSteps; ++step) {
    // Padding takes the last group's scale; nobody reads it.
    const uint32_t group = min(static_cast<uint32_t>(first_step + step) / steps_of_group, groups - 1);
    const int64_t at = (strip * groups + group) * kStripRows + int4::scale_place(g);
    const Pair scale = load_pair(p.scales, p.scale_dtype, at);
    const Pair zero = load_zeros(p.zeros, p.kind, at);
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const int4::Code place = int4::code_of({0, step, a});  // of lane 0
      const float s = scale.v[place.row / 8], z = zero.v[place.row / 8];
      float w[2];
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const float q = code_as_float(words[step] >> (16 * odd + 4 * a) & 15);
        w[odd] = p.kind == WeightKind::kOffset ? fmaf(s, q, z) : s * (q - z);
      }
      store_pair(tile + (place.row + g) * kPitch + place.column + 2 * t, w[0], w[1]);
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kStripRows * kPieces / kWarp; ++i) {
    const int piece = i * kWarp + lane;
    const int row_in_strip = piece / kPieces, column_in_block = piece % kPieces * kPieceColumns;
    const int64_t row = strip * kStripRows + row_in_strip;
    const int64_t column = first_step * int4::kStepColumns + column_in_block;
    if (row < p.n && column < p.k) {
      const int64_t target = p.gate_up ? gate_up_row(row, p.n) : row;
      *reinterpret_cast<uint4*>(static_cast<T*>(p.w) + target * p.k + column) =
          *reinterpret_cast<const uint4*>(tile + row_in_strip * kPitch + column_in_block);
    }
  }
}

}  // namespace

Status int4_dequantize(const Int4DequantizeParams& p, cudaStream_t stream) {
  const int64_t blocks = int4::strips(p.n) * int4::blocks(p.k);
  if (blocks == 0) return Status::kOk;  // no groups to divide by
  // A step lies in one group: sizes are multiples of 16, or there is one group of all columns.
  const uint32_t steps_of_group = static_cast<uint32_t>((p.group_size + int4::kStepColumns - 1) / int4::kStepColumns);
  return with_element(p.dtype, [&](auto element) {
    return launch_blocks(&dequantize_kernel<decltype(element)>, (blocks + kWarps - 1) / kWarps, kMaxThreads, 0, stream,
                         p, steps_of_group);
  });
}

}  // namespace qops::cuda
