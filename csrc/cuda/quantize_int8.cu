// quantize_int8, quantize_int8_asym and quantize_int8_static.
//
// Bound by memory: a row is read once and its codes are written once; 3 bytes an element in bf16.
#include "cuda/quantize_row.cuh"

namespace qops::cuda {
namespace {

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kBlock, 1) quantize_kernel(const __grid_constant__ QuantizeInt8Params p) {
  QOPS_SHARED(uint32_t, maxima, Shape::kWarps);
  const int64_t row = row_of_thread<Shape>();
  if (row >= p.x_rows.count) return;  // a whole warp; rows of several warps have a block each
  const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
  const auto read = [&](int64_t at, int64_t n, Vector& v) { load<Shape::kAligned>(x + at, n, v); };
  Held<Shape> held;
  if constexpr (Shape::kHeld) {
    for_chunks<Shape>(p.k, [&](int chunk, int64_t at, int64_t n) { read(at, n, held.vectors[chunk]); });
  }
  quantise_row<T, Shape>(row, p.k, p.out, maxima,
                         [&](int chunk, int64_t at, int64_t n, Vector& v) { held.get(chunk, at, n, v, read); });
}

// How a row is quantised, from its largest magnitude a and its range.
template <class T>
struct AsymQuantizer {
  float scale;
  float by;  // x is divided by it, or multiplied with it
  int zero_point;
  bool is_zero;

  QOPS_DEVICE AsymQuantizer(bool divides, float a, float low, float top) {
    const float nan = __uint_as_float(0x7fc00000u);
    const float width = top - low;
    if (divides) {
      scale = round_to<T>(round_to<T>(width) / 255.0f);
      is_zero = !is_finite(a) || !is_finite(scale);
      // A scale of 0 makes it 127 or, where low is 0, NaN, which counts as 0.
      const float shift = round_to<T>(-128.0f - round_to<T>(low / scale));
      const float bounded = shift < 127.0f ? shift : shift == shift ? 127.0f : 0.0f;
      zero_point = is_zero ? 0 : __float2int_rn(bounded);
      by = scale = a != a ? nan : scale == 0.0f ? kEpsilon<T> : scale;
      return;
    }
    scale = width / 255.0f;
    by = 1.0f / scale;
    const bool finite = is_finite(a) && is_finite(width);
    is_zero = !finite || !is_finite(by);
    // low / scale lies in -255 .. 0 once rounded, so the zero point needs no clamp.
    zero_point = is_zero ? 0 : -128 - __float2int_rn(low / scale);
    scale = !finite ? nan : is_zero ? 0.0f : scale;
  }

  QOPS_DEVICE int code(bool divides, float x) const {
    if (is_zero) return 0;
    if (divides) return divided_code<T>(x, by, zero_point);
    const int q = __float2int_rn(x * by) + zero_point;
    return q < -128 ? -128 : q > 127 ? 127 : q;
  }
};

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kBlock, 1) asym_kernel(const __grid_constant__ QuantizeInt8AsymParams p) {
  QOPS_SHARED(uint32_t, maxima, 3 * Shape::kWarps);
  const int64_t row = row_of_thread<Shape>();
  if (row >= p.x_rows.count) return;
  const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
  const auto read = [&](int64_t at, int64_t n, Vector& v) { load<Shape::kAligned>(x + at, n, v); };
  Held<Shape> held;
  if constexpr (Shape::kHeld) {
    for_chunks<Shape>(p.k, [&](int chunk, int64_t at, int64_t n) { read(at, n, held.vectors[chunk]); });
  }

  // The range takes in 0; NaN counts as 0 there, and shows in the magnitude.
  uint32_t most = 0, high = 0, negated_low = 0;  // floats that are not negative have the order of their bits
  for_chunks<Shape>(p.k, [&](int chunk, int64_t at, int64_t n) {
    Vector v;
    held.get(chunk, at, n, v, read);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const uint32_t m = magnitude(v[i]);
      most = m > most ? m : most;
      if (v[i] > 0.0f) high = m > high ? m : high;
      if (v[i] < 0.0f) negated_low = m > negated_low ? m : negated_low;
    }
  });
  const float a = __uint_as_float(max_of_row<Shape>(most, maxima));
  const float top = __uint_as_float(max_of_row<Shape>(high, maxima + Shape::kWarps));
  const float low = -__uint_as_float(max_of_row<Shape>(negated_low, maxima + 2 * Shape::kWarps));
  const AsymQuantizer<T> quantizer(p.divides, a, low, top);
  if (thread_of_row<Shape>() == 0) {
    p.scale[row] = quantizer.scale;
    p.zero_point[row] = quantizer.zero_point;
  }
  for_chunks<Shape>(p.k, [&](int chunk, int64_t at, int64_t n) {
    Vector v;
    held.get(chunk, at, n, v, read);
    int q[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) q[i] = quantizer.code(p.divides, v[i]);
    store_int8<Shape::kAligned>(p.q + row * p.k + at, n, q);
  });
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kBlock, 1) static_kernel(const __grid_constant__ QuantizeInt8StaticParams p) {
  const int64_t row = row_of_thread<Shape>();
  if (row >= p.x_rows.count) return;
  const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
  const StaticQuantizer quantizer(p.scale, p.zero_point);
  for_chunks<Shape>(p.k, [&](int, int64_t at, int64_t n) {
    Vector v;
    load<Shape::kAligned>(x + at, n, v);
    int q[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      q[i] = p.divides ? divided_code<T>(v[i], *p.scale, quantizer.zero_point) : quantizer.code(v[i]);
    }
    store_int8<Shape::kAligned>(p.q + row * p.k + at, n, q);
  });
}

template <class Params, class F>
Status for_shapes(const Params& p, const void* q, const F& run) {
  const bool is_aligned = aligned(p.x, p.x_rows, p.k, p.dtype) && multiple_of_16(q);
  return with_element(p.dtype, [&](auto element) {
    return with_row_shape(p.k, is_aligned, [&](auto shape) { return run(element, shape); });
  });
}

}  // namespace

Status quantize_int8(const QuantizeInt8Params& p, const Queue& queue) {
  return for_shapes(p, p.out.q, [&](auto element, auto shape) {
    using Shape = decltype(shape);
    return launch_rows<Shape>(&quantize_kernel<decltype(element), Shape>, p.x_rows.count, 0, queue, p);
  });
}

Status quantize_int8_asym(const QuantizeInt8AsymParams& p, const Queue& queue) {
  return for_shapes(p, p.q, [&](auto element, auto shape) {
    using Shape = decltype(shape);
    return launch_rows<Shape>(&asym_kernel<decltype(element), Shape>, p.x_rows.count, 0, queue, p);
  });
}

Status quantize_int8_static(const QuantizeInt8StaticParams& p, const Queue& queue) {
  if (p.k == 0) return Status::kOk;  // however many rows
  return for_shapes(p, p.q, [&](auto element, auto shape) {
    using Shape = decltype(shape);
    return launch_rows<Shape>(&static_kernel<decltype(element), Shape>, p.x_rows.count, 0, queue, p);
  });
}

}  // namespace qops::cuda
