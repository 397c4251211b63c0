// One row of floats to int8: a pass for the largest magnitude, a pass that quantises. The row comes from L1 the second
// time. The rules are written out in quantize_int8's docstring; divisions are IEEE, and every operation on elements is
// a lane operation, so the bits are the same at every ISA level.
#pragma once

#include <limits>

#include "cpu/row_ahead.h"
#include "cpu/simd_pair.h"

namespace qops::cpu::QOPS_ISA_NS {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Distance from 1 to the next larger value of an element type.
template <class T>
inline constexpr float kEpsilon = 0x1p-23f;
template <>
inline constexpr float kEpsilon<Half> = 0x1p-10f;
template <>
inline constexpr float kEpsilon<BFloat16> = 0x1p-7f;

template <class T>
inline float round_to(float x) {
  float lanes[kLanes];
  store(lanes, round_to<T>(set1(x)));
  return lanes[0];
}

// max |x|, NaN if any element is: as integers, the magnitudes of floats have the order of their values, NaN above all.
template <class T, class Ahead = NothingAhead>
inline float largest_magnitude(const T* x, int64_t k, const Ahead& ahead = {}) {
  constexpr int64_t kPairs = 8;
  const I32x16 magnitude = set1(0x7fffffff);
  I32x16 most = set1(0);
  int64_t i = 0;
  for (; i + kPairs * kPair <= k; i += kPairs * kPair) {
    fetch_half(ahead, i / 2, kPairs * kPair);
    if constexpr (kAlternates<T>) {
      most = max(most, largest_magnitudes(x + i, kPairs));
    } else {
      for (int64_t j = i; j < i + kPairs * kPair; j += kLanes) most = max(most, as_int(load(x + j)) & magnitude);
    }
  }
  for (; i < k; i += kLanes) most = max(most, as_int(load_n(x + i, k - i)) & magnitude);
  return bit_cast<float>(max_lanes(most));
}

inline I32x16 as_codes(const F32x16& v) { return to_int(v); }
inline I32x16 as_codes(const I32x16& v) { return v; }

// q = rne(f(x)), or f(x) where that is an integer, clamped to -128 .. 127. f(x) must fit int16.
template <bool kStream, class T, class F, class Ahead = NothingAhead>
inline void quantise_elements(const T* x, int64_t k, int8_t* q, const F& f, const Ahead& ahead = {}) {
  int64_t i = 0;
  for (; i + kPair <= k; i += kPair) {
    fetch_half(ahead, k / 2 + i / 2, kPair);
    const F32x32 v = load_pair(x + i);
    store_saturated_pair<kStream, T>(q + i, as_codes(f(v.a)), as_codes(f(v.b)));
  }
  for (; i < k; i += kLanes) store_saturated_n(q + i, as_codes(f(load_n(x + i, k - i))), k - i);
}

// x to the codes of quantize_int8_static, before they are rounded and clamped.
struct StaticCodes {
  F32x16 factor, zero_point;

  StaticCodes(const float* scale, const int32_t* zero_point)
      : factor(set1(1.0f / *scale)), zero_point(set1(zero_point == nullptr ? 0.0f : static_cast<float>(*zero_point))) {}

  F32x16 operator()(F32x16 x) const {
    // Whatever lies beyond saturates with any zero point.
    const F32x16 scaled = min(set1(256.0f), max(set1(-256.0f), nan_to_zero(x * factor)));
    return round_to_integer(scaled) + zero_point;
  }
};

// The same by the rule of compressed-tensors. quantize_int8_asym's rows, which are finite, end with it, too.
template <class T>
struct DividedCodes {
  F32x16 scale, zero_point;

  DividedCodes(float scale, int32_t zero_point)
      : scale(set1(scale)), zero_point(set1(static_cast<float>(zero_point))) {}

  F32x16 operator()(F32x16 x) const {
    const F32x16 shifted = round_in_pair<T>(round_in_pair<T>(nan_to_zero(x) / scale) + zero_point);
    return min(set1(256.0f), max(set1(-256.0f), shifted));
  }
};

inline void zero_row(int64_t k, int8_t* q) {
  if (k > 0) std::memset(q, 0, static_cast<size_t>(k));  // an empty row may have no address
}

template <bool kStream, class T, class Ahead>
inline void quantise_row_127(const T* x, int64_t k, int8_t* q, float* scale, const Ahead& ahead) {
  const float a = largest_magnitude(x, k, ahead);
  const float factor = 127.0f / a;
  if (!(a < kInfinity) || factor == kInfinity) {
    *scale = a < kInfinity ? 0.0f : kNaN;
    return zero_row(k, q);
  }
  *scale = a / 127.0f;
  const F32x16 f = set1(factor);
  quantise_elements<kStream>(x, k, q, [&](F32x16 v) { return v * f; }, ahead);
}

template <bool kStream, class T, class Ahead>
inline void quantise_row_compressed_tensors(const T* x, int64_t k, int8_t* q, float* scale, const Ahead& ahead) {
  const float rounded = round_to<T>(largest_magnitude(x, k, ahead) / 127.5f);
  *scale = rounded == 0.0f ? kEpsilon<T> : rounded;
  if (!(rounded < kInfinity)) return zero_row(k, q);
  const F32x16 s = set1(*scale);
  quantise_elements<kStream>(x, k, q, [&](F32x16 v) { return round_in_pair<T>(v / s); }, ahead);
}

template <bool kStream, class T, class Ahead>
inline void quantise_row_torchao(const T* x, int64_t k, int8_t* q, float* scale, const Ahead& ahead) {
  const float rounded = round_to<T>(largest_magnitude(x, k, ahead) / 127.5f);
  *scale = rounded < kEpsilon<float> ? kEpsilon<float> : rounded;
  if (!(rounded < kInfinity)) return zero_row(k, q);
  const F32x16 f = set1(1.0f / *scale);
  quantise_elements<kStream>(x, k, q, [&](F32x16 v) { return v * f; }, ahead);
}

template <bool kStream = false, class T, class Ahead = NothingAhead>
inline void quantise_row(const T* x, int64_t k, const Int8Output& out, int64_t row, const Ahead& ahead = {}) {
  int8_t* q = out.q + row * k;
  float* scale = out.scale + row;
  switch (out.rule) {
    case QuantizeRule::k127: return quantise_row_127<kStream>(x, k, q, scale, ahead);
    case QuantizeRule::kCompressedTensors: return quantise_row_compressed_tensors<kStream>(x, k, q, scale, ahead);
    case QuantizeRule::kTorchao: return quantise_row_torchao<kStream>(x, k, q, scale, ahead);
  }
}

// The least and the largest value of a row and 0; NaN where one on that side of 0 is.
struct Bounds {
  float low;
  float high;
};

// In one pass, as the bits of floats of one sign have the order of their magnitudes, NaN above all.
template <class T, class Ahead>
inline Bounds bounds_with_zero(const T* x, int64_t k, const Ahead& ahead) {
  constexpr int64_t kPairs = 8;
  const I32x16 sign = set1(std::numeric_limits<int32_t>::min());
  I32x16 above = set1(0), below = above;
  const auto take = [&](F32x16 v) {
    const I32x16 bits = as_int(v);
    above = max(above, bits);
    below = max(below, bits + sign);  // its sum wraps; negative where v is not
  };
  int64_t i = 0;
  for (; i + kPairs * kPair <= k; i += kPairs * kPair) {
    fetch_half(ahead, i / 2, kPairs * kPair);
    if constexpr (kAlternates<T>) {
      I32x16 largest, least;
      largest_on_both_sides(x + i, kPairs, largest, least);
      above = max(above, largest);
      below = max(below, least);
    } else {
      for (int64_t j = i; j < i + kPairs * kPair; j += kLanes) take(load(x + j));
    }
  }
  for (; i < k; i += kLanes) take(load_n(x + i, k - i));
  return {0.0f - bit_cast<float>(max_lanes(below)), bit_cast<float>(max_lanes(above))};
}

template <bool kStream, class T, class Ahead>
inline void quantise_row_255(const T* x, int64_t row, const QuantizeInt8AsymParams& p, const Ahead& ahead) {
  int8_t* q = p.q + row * p.k;
  const Bounds range = bounds_with_zero(x, p.k, ahead);
  const float width = range.high - range.low;  // NaN where an element is
  const float scale = width / 255.0f;
  const float factor = 1.0f / scale;
  const bool finite = width < kInfinity;
  if (!finite || factor == kInfinity) {
    p.scale[row] = finite ? 0.0f : kNaN;
    p.zero_point[row] = 0;
    return zero_row(p.k, q);
  }
  // low / scale lies in -255 .. 0 once rounded, so the zero point needs no clamp.
  const int32_t zero_point = -128 - static_cast<int32_t>(std::nearbyint(range.low / scale));
  p.scale[row] = scale;
  p.zero_point[row] = zero_point;
  const F32x16 f = set1(factor);
  const I32x16 offset = set1(zero_point);
  quantise_elements<kStream>(x, p.k, q, [&](F32x16 v) { return to_int(v * f) + offset; }, ahead);
}

template <bool kStream, class T, class Ahead>
inline void quantise_row_asym_compressed_tensors(const T* x, int64_t row, const QuantizeInt8AsymParams& p,
                                                 const Ahead& ahead) {
  int8_t* q = p.q + row * p.k;
  const Bounds range = bounds_with_zero(x, p.k, ahead);
  const float scale = round_to<T>(round_to<T>(range.high - range.low) / 255.0f);
  const bool is_nan = range.low != range.low || range.high != range.high;
  if (is_nan || scale == kInfinity) {
    p.scale[row] = is_nan ? kNaN : kInfinity;
    p.zero_point[row] = 0;
    return zero_row(p.k, q);
  }
  // A scale of 0 makes it 127 or, where low is 0, NaN, which counts as 0.
  const float shift = round_to<T>(-128.0f - round_to<T>(range.low / scale));
  const float bounded = shift < 127.0f ? shift : shift == shift ? 127.0f : 0.0f;
  p.scale[row] = scale == 0.0f ? kEpsilon<T> : scale;
  p.zero_point[row] = static_cast<int32_t>(std::nearbyint(bounded));
  quantise_elements<kStream>(x, p.k, q, DividedCodes<T>(p.scale[row], p.zero_point[row]), ahead);
}

// One of the rows of p, which lies at x.
template <bool kStream = false, class T, class Ahead = NothingAhead>
inline void quantise_row_asym(const T* x, int64_t row, const QuantizeInt8AsymParams& p, const Ahead& ahead = {}) {
  p.divides ? quantise_row_asym_compressed_tensors<kStream>(x, row, p, ahead)
            : quantise_row_255<kStream>(x, row, p, ahead);
}

}  // namespace qops::cpu::QOPS_ISA_NS
