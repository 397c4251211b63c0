// int4_dequantize: the weights as numbers [N, K], for products so large that cuBLAS on them is the fastest way.
//
// Bound by memory: half a byte is read (and scales) and 2 or 4 are written for each weight. A warp turns one block of
// 16 rows x 64 columns: it reads 512 bytes in one range and writes 16 pieces of rows, each of 128 bytes or 256. In
// between, shared memory gathers a lane's pairs of columns into the 16 bytes that a store takes. Counted in sm_90a's
// machine code: 11 instructions a weight where one scale serves all 64 columns, 20 in groups of 16; an H100 has issue
// slots for 25 in the time that the bytes take at 3 TB/s.
#include "cuda/dense_weights.cuh"
#include "cuda/row.cuh"
#include "int4_layout.h"

namespace qops::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kWarps = kMaxThreads / kWarp;
// A thread's 100 instructions before the first strip are as many as 10 weights take.
constexpr int kStripsOfBlock = 4;

// The scales, or the zeros, of a lane's two rows.
struct Pair {
  float v[2];
};

// Pairs begin at even places: one access each.
QOPS_DEVICE Pair load_pair(const float* p) {
  const float2 both = *reinterpret_cast<const float2*>(p);
  return {{both.x, both.y}};
}
template <class T>
QOPS_DEVICE Pair load_pair(const T* p) {
  const uint32_t both = *reinterpret_cast<const uint32_t*>(p);
  return {{widen(from_bits<T>(both & 0xffff)), widen(from_bits<T>(both >> 16))}};
}
QOPS_DEVICE Pair load_pair(const void* p, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kFloat16: return load_pair(static_cast<const __half*>(p) + at);
    case DType::kBFloat16: return load_pair(static_cast<const __nv_bfloat16*>(p) + at);
    default: return load_pair(static_cast<const float*>(p) + at);
  }
}

// A weight of either row is fmaf(scale, q - subtracted, added) for every kind: adding -0 changes no product, not even
// its sign.
struct Coefficients {
  Pair scale, subtracted, added;

  // at: of the pair in both arrays.
  QOPS_DEVICE void load(const Int4DequantizeParams& p, int64_t at) {
    scale = load_pair(p.scales, p.scale_dtype, at);
    subtracted = {{8.0f, 8.0f}};
    added = {{-0.0f, -0.0f}};
    if (p.kind == WeightKind::kZeroPoint) {
      const uint32_t zeros = *reinterpret_cast<const uint16_t*>(static_cast<const uint8_t*>(p.zeros) + at);
      subtracted = {{static_cast<float>(zeros & 0xff), static_cast<float>(zeros >> 8)}};
    } else if (p.kind == WeightKind::kFloatZero) {
      subtracted = load_pair(static_cast<const float*>(p.zeros) + at);
    } else if (p.kind == WeightKind::kOffset) {
      subtracted = {{0.0f, 0.0f}};
      added = load_pair(static_cast<const float*>(p.zeros) + at);
    }
  }

  QOPS_DEVICE void multiply(const Pair& factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale.v[half] = scale.v[half] * factor.v[half];
      added.v[half] = added.v[half] * factor.v[half];
    }
  }
};

// 2^23 has an ulp of 1, so the code goes into its mantissa; the difference is exact. A conversion takes four times as
// long.
QOPS_DEVICE float code_as_float(uint32_t code) { return __uint_as_float(0x4b000000u | code) - 8388608.0f; }

// One access of 4 or 8 bytes.
QOPS_DEVICE void store_pair(float* p, float a, float b) { *reinterpret_cast<float2*>(p) = make_float2(a, b); }
template <class T>
QOPS_DEVICE void store_pair(T* p, float a, float b) {
  *reinterpret_cast<uint32_t*>(p) = to_bits(narrow<T>(a)) | to_bits(narrow<T>(b)) << 16;
}

// kByRows: times the factor of the row.
template <class T, bool kByRows>
__global__ void __launch_bounds__(kMaxThreads, 4)
    dequantize_kernel(const __grid_constant__ Int4DequantizeParams p, const uint32_t steps_of_group,
                      const float* factors) {
  // A row of a block, and 16 bytes (32 for float32): 8 rows of pairs of elements lie in different banks.
  constexpr int kPitch = int4::kBlockColumns + 8;
  constexpr int kPieces = static_cast<int>(sizeof(T)) * int4::kBlockColumns / 16;  // of 16 bytes, in a row
  constexpr int kPieceColumns = int4::kBlockColumns / kPieces;
  constexpr int kRowsAtOnce = kWarp / kPieces;
  QOPS_SHARED(T, shared, kWarps * kStripRows * kPitch);
  const int64_t blocks = int4::blocks(p.k), block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (block >= blocks) return;  // a whole warp
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  T* const tile = shared + threadIdx.x / kWarp * kStripRows * kPitch;
  const uint32_t first_step = static_cast<uint32_t>(block) * int4::kSteps;
  const int64_t groups = p.k / p.group_size;
  const bool one_group = steps_of_group % int4::kSteps == 0 || groups == 1;
  const int piece_row = lane / kPieces, piece_column = lane % kPieces * kPieceColumns;
  const int64_t column = block * int4::kBlockColumns + piece_column;

  const int64_t strips = int4::strips(p.n);
  for (int64_t strip = blockIdx.y; strip < strips; strip += gridDim.y) {
    const uint4 four = reinterpret_cast<const uint4*>(p.packed)[(strip * blocks + block) * kWarp + lane];
    const uint32_t words[int4::kSteps] = {four.x, four.y, four.z, four.w};
    Coefficients c;
    Pair factor;
    if constexpr (kByRows) factor = {{factors[strip * kStripRows + g], factors[strip * kStripRows + g + 8]}};
#pragma unroll
    for (int step = 0; step < int4::kSteps; ++step) {
      if (step == 0 || !one_group) {
        // Padding takes the last group's scale; nobody reads it.
        const int64_t group = (first_step + step) / steps_of_group;
        c.load(p, (strip * groups + (group < groups ? group : groups - 1)) * kStripRows + int4::scale_place(g));
        if constexpr (kByRows) c.multiply(factor);
      }
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const int4::Code place = int4::code_of({0, step, a});  // of lane 0
        const int half = place.row / 8;
        float w[2];
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const float q = code_as_float(words[step] >> (16 * odd + 4 * a) & 15);
          w[odd] = fmaf(c.scale.v[half], q - c.subtracted.v[half], c.added.v[half]);
        }
        store_pair(tile + (place.row + g) * kPitch + place.column + 2 * t, w[0], w[1]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int row = 0; row < kStripRows; row += kRowsAtOnce) {
      const int64_t eight = strip * kStripRows + row / 8 * 8;  // N is a multiple of 8: all of these rows exist, or none
      if (eight < p.n && column < p.k) {
        const int64_t target = (p.is_mixed ? unmixed_row(eight, p.n) : eight) + row % 8 + piece_row;
        *reinterpret_cast<uint4*>(static_cast<T*>(p.w) + target * p.k + column) =
            *reinterpret_cast<const uint4*>(tile + (row + piece_row) * kPitch + piece_column);
      }
    }
    __syncwarp();  // before the next strip is written there
  }
}

// Bound by memory: a warp reads the scales, and zeros, of one strip in whole lines, which are 1 / (2 G) of the bytes
// that dequantize_kernel writes. Four lanes share a pair of rows.
__global__ void __launch_bounds__(kMaxThreads)
    row_factor_kernel(const __grid_constant__ Int4DequantizeParams p, float* factors) {
  constexpr int kLanesOfPair = 4;
  const int64_t strip = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (strip >= int4::strips(p.n)) return;  // a whole warp
  const int lane = threadIdx.x % kWarp, g = lane % 8;
  const int64_t groups = p.k / p.group_size;
  Pair largest = {{0.0f, 0.0f}};
  for (int64_t group = lane / 8; group < groups; group += kLanesOfPair) {
    Coefficients c;
    c.load(p, (strip * groups + group) * kStripRows + int4::scale_place(g));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float code = fmaxf(fabsf(c.subtracted.v[half]), fabsf(15.0f - c.subtracted.v[half]));
      // Of a scale that is no number the whole row is none, whatever its factor.
      largest.v[half] = fmaxf(largest.v[half], fmaf(fabsf(c.scale.v[half]), code, fabsf(c.added.v[half])));
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int distance = 8; distance < kWarp; distance *= 2) {
      largest.v[half] = fmaxf(largest.v[half], __shfl_xor_sync(kAllLanes, largest.v[half], distance));
    }
    // 2^(14 - e) of a number in [2^e, 2^(e + 1)), by the bits of its exponent. The least of them, of infinity, is
    // 2^-114.
    const int exponent = min(2 * 127 + 14 - static_cast<int>(__float_as_uint(largest.v[half]) >> 23), 127 + 126);
    if (lane < 8) {
      factors[strip * kStripRows + half * 8 + g] = __uint_as_float(static_cast<uint32_t>(exponent) << 23);
    }
  }
}

template <class T, bool kByRows>
Status launch_dequantize(const Int4DequantizeParams& p, const float* factors, const Queue& queue) {
  const int64_t strips = int4::strips(p.n), blocks = int4::blocks(p.k);
  if (strips == 0 || blocks == 0) return Status::kOk;  // no groups to divide by
  // A step lies in one group: sizes are multiples of 16, or there is one group of all columns.
  const uint32_t steps_of_group = static_cast<uint32_t>((p.group_size + int4::kStepColumns - 1) / int4::kStepColumns);
  const int64_t rows_of_blocks = (strips + kStripsOfBlock - 1) / kStripsOfBlock;
  constexpr int64_t kMaxGridY = 65535;
  const dim3 grid(static_cast<unsigned>((blocks + kWarps - 1) / kWarps),
                  static_cast<unsigned>(rows_of_blocks < kMaxGridY ? rows_of_blocks : kMaxGridY));
  return launch(&dequantize_kernel<T, kByRows>, grid, dim3(kMaxThreads), 0, queue, p, steps_of_group, factors);
}

}  // namespace

Status int4_dequantize(const Int4DequantizeParams& p, const Queue& queue) {
  return with_element(p.dtype,
                      [&](auto element) { return launch_dequantize<decltype(element), false>(p, nullptr, queue); });
}

Status int4_dequantize_by_rows(const Int4DequantizeParams& p, const float* factors, const Queue& queue) {
  return launch_dequantize<__half, true>(p, factors, queue);
}

Status int4_row_factors(const Int4DequantizeParams& p, float* factors, const Queue& queue) {
  const int64_t strips = int4::strips(p.n);
  if (strips == 0 || p.k == 0) return Status::kOk;
  return launch(&row_factor_kernel, dim3(static_cast<unsigned>((strips + kWarps - 1) / kWarps)), dim3(kMaxThreads), 0,
                queue, p, factors);
}

}  // namespace qops::cuda
