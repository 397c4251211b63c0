// quantize_int8, quantize_int8_asym and quantize_int8_static: rows of floats to int8.
//
// Bound by memory: a row is read once from DRAM, while the one before it is worked on, and a second time from L1.
#include "cpu/quantize_row.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

// quantise(x, row, ahead, streams) for every row; `streams` is a constant.
template <class Params, class F>
Status for_rows(const Params& p, const int8_t* q, const ThreadPool& pool, const F& quantise) {
  return with_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    // 16 K elements are about 4 us of work, some four times what waking a thread costs.
    const int64_t grain = 1 + (16 << 10) / (p.k + 1);
    const bool streams = kAlternates<T> && worth_streaming(q, p.x_rows.count, p.k);
    parallel_for(pool, p.x_rows.count, grain, [&](int64_t begin, int64_t end) {
      const auto row_at = [&](int64_t row) { return static_cast<const T*>(p.x) + p.x_rows.offset(row); };
      for (int64_t row = begin; row < end; ++row) {
        const RowAhead<T> ahead{row_at(row + 1 < end ? row + 1 : row)};
        streams ? quantise(row_at(row), row, ahead, std::true_type{})
                : quantise(row_at(row), row, ahead, std::false_type{});
      }
      if (streams) end_stream();
    });
    return Status::kOk;
  });
}

// The least and the largest value of a row and 0; NaN counts as 0.
struct Range {
  float low;
  float high;
};

template <class T>
Range range_with_zero(const T* x, int64_t k) {
  F32x16 low = set1(0.0f), high = low;
  const auto take = [&](F32x16 v) {
    low = min(v, low);  // the second argument where v is NaN
    high = max(v, high);
  };
  int64_t i = 0;
  for (; i + kPair <= k; i += kPair) {
    const F32x32 v = load_pair(x + i);
    take(v.a);
    take(v.b);
  }
  for (; i < k; i += kLanes) take(load_n(x + i, k - i));
  float lows[kLanes], highs[kLanes];
  store(lows, low);
  store(highs, high);
  Range range{0.0f, 0.0f};
  for (int lane = 0; lane < kLanes; ++lane) {
    range.low = lows[lane] < range.low ? lows[lane] : range.low;
    range.high = highs[lane] > range.high ? highs[lane] : range.high;
  }
  return range;
}

template <bool kStream, class T>
void quantise_row_asym(const T* x, int64_t row, const QuantizeInt8AsymParams& p, const RowAhead<T>& ahead) {
  int8_t* q = p.q + row * p.k;
  const float a = largest_magnitude(x, p.k, ahead);
  const Range range = range_with_zero(x, p.k);
  const float width = range.high - range.low;
  const float scale = width / 255.0f;
  const float factor = 1.0f / scale;
  const bool finite = a < kInfinity && width < kInfinity;
  if (!finite || factor == kInfinity) {
    p.scale[row] = finite ? 0.0f : kNaN;
    p.zero_point[row] = 0;
    return zero_row(p.k, q);
  }
  // low / scale lies in -255 .. 0 once rounded, so the zero point needs no clamp.
  const int32_t zero_point = -128 - static_cast<int32_t>(std::nearbyint(range.low / scale));
  p.scale[row] = scale;
  p.zero_point[row] = zero_point;
  const F32x16 f = set1(factor), offset = set1(static_cast<float>(zero_point));
  quantise_elements<kStream>(x, p.k, q, [&](F32x16 v) { return round_to_integer(v * f) + offset; }, ahead);
}

template <bool kStream, class T>
void quantise_row_asym_compressed_tensors(const T* x, int64_t row, const QuantizeInt8AsymParams& p,
                                          const RowAhead<T>& ahead) {
  int8_t* q = p.q + row * p.k;
  const float a = largest_magnitude(x, p.k, ahead);
  const Range range = range_with_zero(x, p.k);
  const float scale = round_to<T>(round_to<T>(range.high - range.low) / 255.0f);
  const bool is_nan = a != a;
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

}  // namespace

Status quantize_int8(const QuantizeInt8Params& p, const ThreadPool& pool) {
  return for_rows(p, p.out.q, pool, [&](const auto* x, int64_t row, const auto& ahead, auto streams) {
    quantise_row<decltype(streams)::value>(x, p.k, p.out, row, ahead);
  });
}

Status quantize_int8_asym(const QuantizeInt8AsymParams& p, const ThreadPool& pool) {
  return for_rows(p, p.q, pool, [&](const auto* x, int64_t row, const auto& ahead, auto streams) {
    constexpr bool kStream = decltype(streams)::value;
    if (p.divides) return quantise_row_asym_compressed_tensors<kStream>(x, row, p, ahead);
    quantise_row_asym<kStream>(x, row, p, ahead);
  });
}

Status quantize_int8_static(const QuantizeInt8StaticParams& p, const ThreadPool& pool) {
  if (p.k == 0) return Status::kOk;  // however many rows
  const StaticCodes codes(p.scale, p.zero_point);
  return for_rows(p, p.q, pool, [&](const auto* x, int64_t row, const auto& next, auto streams) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(x)>>;
    constexpr bool kStream = decltype(streams)::value;
    const WholeRowAhead<T> ahead{next, p.k};
    int8_t* q = p.q + row * p.k;
    if (!p.divides) return quantise_elements<kStream>(x, p.k, q, codes, ahead);
    const DividedCodes<T> divided(*p.scale, p.zero_point == nullptr ? 0 : *p.zero_point);
    quantise_elements<kStream>(x, p.k, q, divided, ahead);
  });
}

}  // namespace qops::cpu::QOPS_ISA_NS
