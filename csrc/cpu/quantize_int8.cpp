// quantize_int8, quantize_int8_asym and quantize_int8_static: rows of floats to int8.
//
// Bound by memory: a row is read once from DRAM and a second time from L1.
// Lost: rows copied from L1 past the caches, 0.96x (2,048 rows of 4,096 bfloat16, 2 threads, Sapphire Rapids).
#include "cpu/quantize_row.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

template <class Params, class F>
Status for_rows(const Params& p, const ThreadPool& pool, const F& quantise) {
  return with_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    // 16 K elements are about 4 us of work, some four times what waking a thread costs.
    const int64_t grain = 1 + (16 << 10) / (p.k + 1);
    parallel_for(pool, p.x_rows.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) quantise(static_cast<const T*>(p.x) + p.x_rows.offset(row), row);
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
  int64_t i = 0;
  for (; i < k; i += kLanes) {
    const F32x16 v = load_n(x + i, k - i);
    low = min(v, low);  // the second argument where v is NaN
    high = max(v, high);
  }
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

template <class T>
void quantise_row_asym(const T* x, int64_t row, const QuantizeInt8AsymParams& p) {
  int8_t* q = p.q + row * p.k;
  const float a = largest_magnitude(x, p.k);
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
  quantise_elements(x, p.k, q, [&](F32x16 v) { return round_to_integer(v * f) + offset; });
}

template <class T>
void quantise_row_asym_compressed_tensors(const T* x, int64_t row, const QuantizeInt8AsymParams& p) {
  int8_t* q = p.q + row * p.k;
  const float a = largest_magnitude(x, p.k);
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
  quantise_elements(x, p.k, q, DividedCodes<T>(p.scale[row], p.zero_point[row]));
}

}  // namespace

Status quantize_int8(const QuantizeInt8Params& p, const ThreadPool& pool) {
  return for_rows(p, pool, [&](const auto* x, int64_t row) { quantise_row(x, p.k, p.out, row); });
}

Status quantize_int8_asym(const QuantizeInt8AsymParams& p, const ThreadPool& pool) {
  return for_rows(p, pool, [&](const auto* x, int64_t row) {
    if (p.divides) return quantise_row_asym_compressed_tensors(x, row, p);
    quantise_row_asym(x, row, p);
  });
}

Status quantize_int8_static(const QuantizeInt8StaticParams& p, const ThreadPool& pool) {
  if (p.k == 0) return Status::kOk;  // however many rows
  const StaticCodes codes(p.scale, p.zero_point);
  return for_rows(p, pool, [&](const auto* x, int64_t row) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(x)>>;
    int8_t* q = p.q + row * p.k;
    if (!p.divides) return quantise_elements(x, p.k, q, codes);
    quantise_elements(x, p.k, q, DividedCodes<T>(*p.scale, p.zero_point == nullptr ? 0 : *p.zero_point));
  });
}

}  // namespace qops::cpu::QOPS_ISA_NS
