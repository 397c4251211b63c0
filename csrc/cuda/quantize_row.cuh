// A row in registers to int8: the rules of quantize_int8, whose docstring writes them out.
#pragma once

#include "cuda/row.cuh"

namespace qops::cuda {

// Distance from 1 to the next larger value of an element type.
template <class T>
inline constexpr float kEpsilon = 0x1p-23f;
template <>
inline constexpr float kEpsilon<__half> = 0x1p-10f;
template <>
inline constexpr float kEpsilon<__nv_bfloat16> = 0x1p-7f;

// Magnitudes of floats have, as integers, the order of their values, with NaN above all.
QOPS_DEVICE uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

QOPS_DEVICE bool is_finite(float magnitude) { return magnitude < __uint_as_float(0x7f800000u); }

// How a row is quantised, from its largest magnitude a.
template <class T>
struct RowQuantizer {
  float scale;
  float factor;     // of k127 and kTorchao
  bool is_zero;     // every code is 0
  bool is_divided;  // kCompressedTensors

  QOPS_DEVICE RowQuantizer(QuantizeRule rule, float a) : factor(0.0f), is_zero(false), is_divided(false) {
    if (rule == QuantizeRule::k127) {
      factor = 127.0f / a;
      is_zero = !is_finite(a) || !is_finite(factor);
      scale = !is_finite(a) ? __uint_as_float(0x7fc00000u) : is_zero ? 0.0f : a / 127.0f;
      return;
    }
    const float rounded = round_to<T>(a / 127.5f);
    is_zero = !is_finite(rounded);
    if (rule == QuantizeRule::kCompressedTensors) {
      is_divided = true;
      scale = rounded == 0.0f ? kEpsilon<T> : rounded;
    } else {
      scale = rounded < kEpsilon<float> ? kEpsilon<float> : rounded;
      factor = 1.0f / scale;
    }
  }

  QOPS_DEVICE int code(float x) const {
    if (is_zero) return 0;
    const int q = __float2int_rn(is_divided ? round_to<T>(x / scale) : x * factor);
    return q < -128 ? -128 : q > 127 ? 127 : q;
  }
};

// One scale for all rows.
struct StaticQuantizer {
  float factor;
  int zero_point;

  QOPS_DEVICE StaticQuantizer(const float* scale, const int32_t* zero_point)
      : factor(1.0f / *scale), zero_point(zero_point == nullptr ? 0 : *zero_point) {}

  QOPS_DEVICE int code(float x) const {
    const float scaled = x * factor;
    // Whatever lies beyond saturates with any zero point; NaN has the code of zero.
    const float bounded = scaled < -256.0f ? -256.0f : scaled > 256.0f ? 256.0f : scaled == scaled ? scaled : 0.0f;
    const int q = __float2int_rn(bounded) + zero_point;
    return q < -128 ? -128 : q > 127 ? 127 : q;
  }
};

// The same by the rule of compressed-tensors. quantize_int8_asym's rows, which are finite, end with it, too.
template <class T>
QOPS_DEVICE int divided_code(float x, float scale, int zero_point) {
  const float quotient = x == x ? x / scale : 0.0f;
  const float shifted = round_to<T>(round_to<T>(quotient) + static_cast<float>(zero_point));
  return __float2int_rn(shifted < -128.0f ? -128.0f : shifted > 127.0f ? 127.0f : shifted);
}

// Quantises the row whose vectors of a thread get(chunk, at, n, v) gives, twice the same. Behind the row's end a vector
// may hold anything: a norm leaves NaN there where it multiplies zeros by an infinite factor.
template <class T, class Shape, class Get>
QOPS_DEVICE void quantise_row(int64_t row, int64_t columns, const Int8Output& out, uint32_t* shared, const Get& get) {
  uint32_t most = 0;
  for_chunks<Shape>(columns, [&](int chunk, int64_t at, int64_t n) {
    Vector v;
    get(chunk, at, n, v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const uint32_t m = Shape::kAligned || i < n ? magnitude(v[i]) : 0;
      most = m > most ? m : most;
    }
  });
  const RowQuantizer<T> quantizer(out.rule, __uint_as_float(max_of_row<Shape>(most, shared)));
  if (thread_of_row<Shape>() == 0) out.scale[row] = quantizer.scale;
  for_chunks<Shape>(columns, [&](int chunk, int64_t at, int64_t n) {
    Vector v;
    get(chunk, at, n, v);
    int q[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) q[i] = quantizer.code(v[i]);
    store_int8<Shape::kAligned>(out.q + row * columns + at, n, q);
  });
}

}  // namespace qops::cuda
