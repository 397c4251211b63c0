// quantize_int8, quantize_int8_asym and quantize_int8_static.
//
// Idea: a row is read once and waits in registers as it was, two elements of 16 bits in a word, for its scale; its
// codes are written once. The extremes of words are found two elements at a time, the rule is asked once a row, and
// from sm_90 on one instruction rounds, clamps and packs two codes.
//
// Bytes and operations: 3 bytes an element in bf16. Rows of 4096 on an H100: 47.5 instructions for 256 elements of a
// warp (5.9 an element: 1 to widen, 1 to multiply, 0.5 to round and pack, 0.5 for the extremes, the rest once a row or
// access), 12 cycles of a multiprocessor, where memory takes 59.
#include "cuda/quantize_row.cuh"

namespace qops::cuda {
namespace {

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kBlock, 1) quantize_kernel(const __grid_constant__ QuantizeInt8Params p) {
  QOPS_SHARED(uint32_t, maxima, Shape::kWarps);
  const int64_t row = row_of_thread<Shape>();
  if (is_beyond<Shape>(row, p.x_rows.count)) return;
  const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
  quantise_row<T, Shape>(row, p.k, p.out, maxima, [&](int, int64_t at, int64_t n, Words<T>& words) {
    load_words<Shape::kAligned>(x + at, n, words);
  });
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

  // Of a row that is not zero. What is not divided lies within 2^9, so that sums with kToInteger are integers.
  template <bool kDivides>
  QOPS_DEVICE void codes_of(const Words<T>& words, Codes& codes) const {
    Vector v;
    widen_words<T>(words, v);
    const float back = kToInteger - static_cast<float>(zero_point);
#pragma unroll
    for (float& x : v) {
      x = kDivides ? static_cast<float>(divided_code<T>(x, by, zero_point)) : (x * by + kToInteger) - back;
    }
    round_to_codes(v, codes);
  }
};

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kBlock, 1) asym_kernel(const __grid_constant__ QuantizeInt8AsymParams p) {
  QOPS_SHARED(uint32_t, maxima, 2 * Shape::kWarps);
  const int64_t row = row_of_thread<Shape>();
  if (is_beyond<Shape>(row, p.x_rows.count)) return;
  const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
  Words<T> held[Shape::kHeld ? Shape::kChunks : 1];
  const auto read = [&](int chunk, int64_t at, int64_t n) { load_words<Shape::kAligned>(x + at, n, held[chunk]); };
  if constexpr (Shape::kHeld) for_chunks<Shape>(p.k, read);

  ExtremesOfWords<T, true> of_thread;
  for_chunks<Shape>(p.k, [&](int chunk, int64_t at, int64_t n) {
    if constexpr (!Shape::kHeld) read(chunk, at, n);
    of_thread.add(held[chunk]);
  });
  const Extremes extremes = of_thread.get();
  const uint32_t high = max_of_row<Shape>(extremes.high, maxima);
  const uint32_t negated_low = max_of_row<Shape>(extremes.negated_low, maxima + Shape::kWarps);
  const float a = from_magnitude<T>(Extremes{high, negated_low}.magnitude());
  const AsymQuantizer<T> quantizer(p.divides, a, -from_magnitude<T>(negated_low), from_magnitude<T>(high));
  if (thread_of_row<Shape>() == 0) {
    p.scale[row] = quantizer.scale;
    p.zero_point[row] = quantizer.zero_point;
  }
  int8_t* q = p.q + row * p.k;
  const auto store = [&](const auto& codes_of) {
    for_chunks<Shape>(p.k, [&](int chunk, int64_t at, int64_t n) {
      Codes codes = {};
      if constexpr (!Shape::kHeld) read(chunk, at, n);
      codes_of(held[chunk], codes);
      store_codes<Shape::kAligned>(q + at, n, codes);
    });
  };
  if (quantizer.is_zero) {
    store([](const Words<T>&, Codes&) {});
  } else if (!p.divides) {
    store([&](const Words<T>& of_x, Codes& codes) { quantizer.template codes_of<false>(of_x, codes); });
  } else {
    store([&](const Words<T>& of_x, Codes& codes) { quantizer.template codes_of<true>(of_x, codes); });
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kBlock, 1) static_kernel(const __grid_constant__ QuantizeInt8StaticParams p) {
  const int64_t row = row_of_thread<Shape>();
  if (is_beyond<Shape>(row, p.x_rows.count)) return;
  const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
  const StaticQuantizer quantizer(p.scale, p.zero_point);
  int8_t* q = p.q + row * p.k;
  const auto store = [&](const auto& code_of) {
    for_chunks<Shape>(p.k, [&](int, int64_t at, int64_t n) {
      Vector v;
      Codes codes;
      load<Shape::kAligned>(x + at, n, v);
#pragma unroll
      for (float& value : v) value = code_of(value);
      round_to_codes(v, codes);
      store_codes<Shape::kAligned>(q + at, n, codes);
    });
  };
  if (p.divides) {
    store([&](float v) { return static_cast<float>(divided_code<T>(v, *p.scale, quantizer.zero_point)); });
  } else if (quantizer.zero_point == 0) {
    store([&](float v) { return v * quantizer.factor; });
  } else {
    // What is beyond 2^22 is not exact, and clamped.
    const float back = kToInteger - static_cast<float>(quantizer.zero_point);
    store([&](float v) {
      const float scaled = v * quantizer.factor;
      return ((scaled == scaled ? scaled : 0.0f) + kToInteger) - back;
    });
  }
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
