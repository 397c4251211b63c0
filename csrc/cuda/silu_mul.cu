// silu_mul and silu_mul_int8.
//
// Bound by memory: gate and up are read once and the product is written once; 6 bytes an output element in bf16, 5 as
// int8. exp and silu are those of the CPU (exp_poly.h), operation by operation, so the bits are the same.
#include "cuda/gate.cuh"
#include "cuda/quantize_row.cuh"

namespace qops::cuda {
namespace {

template <class T, bool kAligned>
QOPS_DEVICE void gated(const T* gate, const T* up, int64_t n, bool round_before_up, Vector& y) {
  Vector u;
  load<kAligned>(gate, n, y);
  load<kAligned>(up, n, u);
#pragma unroll
  for (int i = 0; i < kVector; ++i) y[i] = gated_value<T>(y[i], u[i], round_before_up);
}

template <class T, class Shape, bool kInt8>
__global__ void __launch_bounds__(Shape::kBlock, 1)
    silu_mul_kernel(const __grid_constant__ SiluMulParams p, const __grid_constant__ Int8Output out) {
  QOPS_SHARED(uint32_t, maxima, Shape::kWarps);
  const int64_t row = row_of_thread<Shape>();
  if (row >= p.gate_rows.count) return;  // a whole warp; rows of several warps have a block each
  const T* gate = static_cast<const T*>(p.gate) + p.gate_rows.offset(row);
  const T* up = static_cast<const T*>(p.up) + p.up_rows.offset(row);
  if constexpr (!kInt8) {
    for_chunks<Shape>(p.columns, [&](int, int64_t at, int64_t n) {
      Vector y;
      gated<T, Shape::kAligned>(gate + at, up + at, n, p.round_before_up, y);
      store<Shape::kAligned>(static_cast<T*>(p.y) + row * p.columns + at, n, y);
    });
  } else {
    const auto read = [&](int64_t at, int64_t n, Vector& y) {
      gated<T, Shape::kAligned>(gate + at, up + at, n, p.round_before_up, y);
    };
    Held<Shape> held;
    if constexpr (Shape::kHeld) {
      for_chunks<Shape>(p.columns, [&](int chunk, int64_t at, int64_t n) { read(at, n, held.vectors[chunk]); });
    }
    quantise_row<T, Shape>(row, p.columns, out, maxima,
                           [&](int chunk, int64_t at, int64_t n, Vector& y) { held.get(chunk, at, n, y, read); });
  }
}

template <bool kInt8>
Status run(const SiluMulParams& p, const Int8Output& out, const Queue& queue) {
  if (p.columns == 0 && !kInt8) return Status::kOk;  // however many rows
  const void* y = kInt8 ? static_cast<const void*>(out.q) : p.y;
  const bool is_aligned = aligned(p.gate, p.gate_rows, p.columns, p.dtype) &&
                          aligned(p.up, p.up_rows, p.columns, p.dtype) && multiple_of_16(y);
  return with_element(p.dtype, [&](auto element) {
    return with_row_shape(p.columns, is_aligned, [&](auto shape) {
      using Shape = decltype(shape);
      return launch_rows<Shape>(&silu_mul_kernel<decltype(element), Shape, kInt8>, p.gate_rows.count, 0, queue, p, out);
    });
  });
}

}  // namespace

Status silu_mul(const SiluMulParams& p, const Queue& queue) { return run<false>(p, {}, queue); }
Status silu_mul_int8(const SiluMulInt8Params& p, const Queue& queue) { return run<true>(p.gated, p.out, queue); }

}  // namespace qops::cuda
