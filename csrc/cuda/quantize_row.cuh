// A row in registers to int8: the rules of quantize_int8, whose docstring writes them out.
#pragma once

#include <cfloat>

#include "cuda/ptx.cuh"
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
QOPS_DEVICE bool is_finite(float magnitude) { return magnitude < __uint_as_float(0x7f800000u); }

// Magnitudes as integers of the largest and of the most negative element, NaN counting as the largest.
struct Extremes {
  uint32_t high, negated_low;

  QOPS_DEVICE uint32_t magnitude() const { return high > negated_low ? high : negated_low; }
};

// Of 0 and of elements, which come as words; without signs those of float32 all count as positive.
template <class T, bool kSigned>
class ExtremesOfWords {
 public:
  QOPS_DEVICE void add(const Words<T>& words) {
#pragma unroll
    for (const uint32_t word : words) {
      if constexpr (sizeof(T) == 4) {
        const uint32_t m = word & 0x7fffffffu;
        const bool is_low = kSigned && word != m && m <= 0x7f800000u;
        if (!is_low) high_ = m > high_ ? m : high_;
        if (is_low) low_ = m > low_ ? m : low_;
      } else {
        high_ = pair_bits(__hmax2_nan(pair_of<T>(high_), pair_of<T>(word)));
        low_ = pair_bits(__hmin2(pair_of<T>(low_), pair_of<T>(word)));
      }
    }
  }

  // Of this thread.
  QOPS_DEVICE Extremes get() const {
    if constexpr (sizeof(T) == 4) {
      return {high_, low_};
    } else {
      return {larger_half(high_), larger_half(low_)};
    }
  }

 private:
  static QOPS_DEVICE uint32_t larger_half(uint32_t pair) {
    const uint32_t a = pair & 0x7fff, b = pair >> 16 & 0x7fff;
    return a > b ? a : b;
  }

  uint32_t high_ = 0, low_ = 0;  // of 16 bits: two elements; of 32: magnitudes
};

// A magnitude of Extremes.
template <class T>
QOPS_DEVICE float from_magnitude(uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(bits);
  } else {
    return widen(from_bits<T>(bits));
  }
}

// Eight floats, rounded to integers and clamped to [-128, 127]; NaN gives 0.
QOPS_DEVICE void round_to_codes(const Vector& v, Codes& codes) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* four = v + 4 * i;
    // From sm_90 on one instruction each.
    const uint32_t high = ptx::cvt_pack_sat_s8(__float2int_rn(four[3]), __float2int_rn(four[2]), 0);
    codes[i] = ptx::cvt_pack_sat_s8(__float2int_rn(four[1]), __float2int_rn(four[0]), high);
  }
}

// 1.5 * 2^23: sums with it are integers, rounded to nearest, ties to even, if what is added lies below 2^22.
inline constexpr float kToInteger = 12582912.0f;

// 127 / a and a / 127 of a magnitude of 16 bits, rounded like divisions; what is no finite number may be another one,
// or NaN. The quarters keep the reciprocal above 2^-126. tests/cuda/test_cuda_ops.py tries all magnitudes, with
// reciprocals that are off by 2 ulp.
template <class Reciprocal>
QOPS_DEVICE float factor_127(float a, const Reciprocal& reciprocal) {
  const float d = 0.25f * a, r = reciprocal(d), q = 31.75f * r;
  return fmaf(-fmaf(d, q, -31.75f), r, q);
}
QOPS_DEVICE float scale_127(float a) {
  constexpr float kInverse = 1.0f / 127.0f;
  const float q = a * kInverse;
  return fmaf(fmaf(-127.0f, q, a), kInverse, q);
}

// How a row is quantised, from its largest magnitude a.
template <class T>
struct RowQuantizer {
  float scale;
  float factor;  // of k127 and kTorchao
  bool is_zero;  // every code is 0

  QOPS_DEVICE RowQuantizer(QuantizeRule rule, float a) : factor(0.0f), is_zero(false) {
    if (rule == QuantizeRule::k127) {
      if constexpr (sizeof(T) == 4) {
        factor = 127.0f / a;
        scale = a / 127.0f;
      } else {
        factor = factor_127(a, [](float d) { return ptx::rcp_approx(d); });
        scale = scale_127(a);
      }
      is_zero = !(factor <= FLT_MAX);
      scale = !is_finite(a) ? __uint_as_float(0x7fc00000u) : is_zero ? 0.0f : scale;
      return;
    }
    const float rounded = round_to<T>(a / 127.5f);
    is_zero = !is_finite(rounded);
    if (rule == QuantizeRule::kCompressedTensors) {
      scale = rounded == 0.0f ? kEpsilon<T> : rounded;
    } else {
      scale = rounded < kEpsilon<float> ? kEpsilon<float> : rounded;
      factor = 1.0f / scale;
    }
  }

  // Of a row that is not zero: no element is infinite or NaN.
  template <bool kIsDivided>
  QOPS_DEVICE void codes_of(const Words<T>& words, Codes& codes) const {
    Vector v;
    widen_words<T>(words, v);
#pragma unroll
    for (float& x : v) x = kIsDivided ? round_to<T>(x / scale) : x * factor;
    round_to_codes(v, codes);
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

// Quantises the row whose vectors of a thread read(chunk, at, n, words) gives, once where they are held, else twice.
// Behind the row's end a vector may hold anything: a norm leaves NaN there where it multiplies zeros by an infinite
// factor.
template <class T, class Shape, class Read>
QOPS_DEVICE void quantise_row(int64_t row, int64_t columns, const Int8Output& out, uint32_t* shared, const Read& read) {
  Words<T> held[Shape::kHeld ? Shape::kChunks : 1];
  const auto get = [&](int chunk, int64_t at, int64_t n, Words<T>& words) {
    read(chunk, at, n, words);
    if constexpr (!Shape::kAligned) clear_behind<T>(n, words);
  };
  if constexpr (Shape::kHeld) {
    for_chunks<Shape>(columns, [&](int chunk, int64_t at, int64_t n) { get(chunk, at, n, held[chunk]); });
  }
  ExtremesOfWords<T, false> extremes;
  for_chunks<Shape>(columns, [&](int chunk, int64_t at, int64_t n) {
    if constexpr (!Shape::kHeld) get(chunk, at, n, held[chunk]);
    extremes.add(held[chunk]);
  });
  const uint32_t most = max_of_row<Shape>(extremes.get().magnitude(), shared);
  const RowQuantizer<T> quantizer(out.rule, from_magnitude<T>(most));
  if (thread_of_row<Shape>() == 0) out.scale[row] = quantizer.scale;
  int8_t* q = out.q + row * columns;
  const auto store = [&](const auto& codes_of) {
    for_chunks<Shape>(columns, [&](int chunk, int64_t at, int64_t n) {
      Codes codes = {};
      if constexpr (!Shape::kHeld) get(chunk, at, n, held[chunk]);
      codes_of(held[chunk], codes);
      store_codes<Shape::kAligned>(q + at, n, codes);
    });
  };
  // The rule is asked once a row.
  if (quantizer.is_zero) {
    store([](const Words<T>&, Codes&) {});
  } else if (out.rule != QuantizeRule::kCompressedTensors) {
    store([&](const Words<T>& words, Codes& codes) { quantizer.template codes_of<false>(words, codes); });
  } else {
    store([&](const Words<T>& words, Codes& codes) { quantizer.template codes_of<true>(words, codes); });
  }
}

}  // namespace qops::cuda
