// silu_mul and silu_mul_int8.
//
// Bound by memory: gate and up are read once and the product is written once; 6 bytes an output element in bf16, 5 as
// int8. exp and silu are those of the CPU (exp_poly.h), operation by operation, so the bits are the same.
#include "cuda/quantize_row.cuh"
#include "exp_poly.h"

namespace qops::cuda {
namespace {

// One lane of the vectors that exp_poly.h computes on.
struct Lane {
  float v;
};

QOPS_DEVICE Lane broadcast(float value, Lane) { return {value}; }
QOPS_DEVICE Lane operator+(Lane a, Lane b) { return {a.v + b.v}; }
QOPS_DEVICE Lane operator-(Lane a, Lane b) { return {a.v - b.v}; }
QOPS_DEVICE Lane operator*(Lane a, Lane b) { return {a.v * b.v}; }
QOPS_DEVICE Lane operator/(Lane a, Lane b) { return {a.v / b.v}; }
QOPS_DEVICE Lane fma(Lane a, Lane b, Lane c) { return {fmaf(a.v, b.v, c.v)}; }
QOPS_DEVICE Lane min(Lane a, Lane b) { return {a.v < b.v ? a.v : b.v}; }
QOPS_DEVICE Lane max(Lane a, Lane b) { return {a.v > b.v ? a.v : b.v}; }
QOPS_DEVICE Lane round_to_integer(Lane a) { return {rintf(a.v)}; }

// In two steps: the first is exact, because its result is normal, so the product is rounded once.
QOPS_DEVICE Lane scale_by_power_of_two(Lane a, Lane n) {
  if (!(n.v == n.v)) return a;
  const int power = static_cast<int>(n.v), half = power >> 1;
  return {a.v * __int_as_float((half + 127) << 23) * __int_as_float((power - half + 127) << 23)};
}

// R(R(silu(gate)) * up) or R(silu(gate) * up).
template <class T, bool kAligned>
QOPS_DEVICE void gated(const T* gate, const T* up, int64_t n, bool round_before_up, Vector& y) {
  Vector u;
  load<kAligned>(gate, n, y);
  load<kAligned>(up, n, u);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float activation = silu(Lane{y[i]}).v;
    y[i] = round_to<T>((round_before_up ? round_to<T>(activation) : activation) * u[i]);
  }
}

template <class T, class Shape, bool kInt8>
__global__ void __launch_bounds__(Shape::kBlock, 1)
    silu_mul_kernel(const __grid_constant__ SiluMulParams p, const __grid_constant__ Int8Rows out) {
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
Status run(const SiluMulParams& p, const Int8Rows& out, cudaStream_t stream) {
  if (p.columns == 0 && !kInt8) return Status::kOk;  // however many rows
  const void* y = kInt8 ? static_cast<const void*>(out.q) : p.y;
  const bool is_aligned = aligned(p.gate, p.gate_rows, p.columns, p.dtype) &&
                          aligned(p.up, p.up_rows, p.columns, p.dtype) && multiple_of_16(y);
  return with_element(p.dtype, [&](auto element) {
    return with_row_shape(p.columns, is_aligned, [&](auto shape) {
      using Shape = decltype(shape);
      return launch_rows<Shape>(&silu_mul_kernel<decltype(element), Shape, kInt8>, p.gate_rows.count, 0, stream, p,
                                out);
    });
  });
}

}  // namespace

Status silu_mul(const SiluMulParams& p, cudaStream_t stream) { return run<false>(p, {}, stream); }
Status silu_mul_int8(const SiluMulInt8Params& p, cudaStream_t stream) { return run<true>(p.gated, p.out, stream); }

}  // namespace qops::cuda
