// silu_mul and silu_mul_int8.
//
// Idea: gate and up are read once and the product is written once, eight elements of a lane at a time. exp and silu are
// those of the CPU (exp_poly.h), so the bits are the same; where a gate has 16 bits and R(silu(gate)) is all that is
// wanted, the division is a reciprocal with one correction (gate.cuh), and up is multiplied two elements at a time.
//
// Bytes and operations: 6 bytes an output element in bf16, 5 as int8. Rows of 4096 in bf16 on an H100: 201 instructions
// for 256 elements of a warp, 50 cycles of a multiprocessor, where memory takes 118; 235 as int8, 59 of 98. Of the 25
// an element 11 are exp, 6 the quotient, 3 conversions; rounding="fp32" and float32 divide and take more.
#include "cuda/gate.cuh"
#include "cuda/quantize_row.cuh"

namespace qops::cuda {
namespace {

template <class T, class Shape, bool kInt8>
__global__ void __launch_bounds__(Shape::kBlock, 1)
    silu_mul_kernel(const __grid_constant__ SiluMulParams p, const __grid_constant__ Int8Output out) {
  QOPS_SHARED(uint32_t, maxima, Shape::kWarps);
  const int64_t row = row_of_thread<Shape>();
  if (is_beyond<Shape>(row, p.gate_rows.count)) return;
  const T* gate = static_cast<const T*>(p.gate) + p.gate_rows.offset(row);
  const T* up = static_cast<const T*>(p.up) + p.up_rows.offset(row);
  const auto read = [&](int64_t at, int64_t n, Words<T>& y) {
    Words<T> g, u;
    load_words<Shape::kAligned>(gate + at, n, g);
    load_words<Shape::kAligned>(up + at, n, u);
    gated<T>(g, u, p.round_before_up, y);
  };
  if constexpr (!kInt8) {
    for_chunks<Shape>(p.columns, [&](int, int64_t at, int64_t n) {
      Words<T> y;
      read(at, n, y);
      store_words<Shape::kAligned>(static_cast<T*>(p.y) + row * p.columns + at, n, y);
    });
  } else {
    quantise_row<T, Shape>(row, p.columns, out, maxima,
                           [&](int, int64_t at, int64_t n, Words<T>& y) { read(at, n, y); });
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
