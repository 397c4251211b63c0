// quantize_int8, quantize_int8_asym and quantize_int8_static: rows of floats to int8.
//
// Bound by memory: a row is read once from DRAM, while one before it is worked on, and a second time from L1. They
// reach 70 to 77 % of a copy of as many bytes past the caches (rows of 576 and 4,096 bfloat16, one thread of Sapphire
// Rapids).
#include <algorithm>

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
    const int64_t ahead_by = rows_ahead(p.k * static_cast<int64_t>(sizeof(T)));
    const bool streams = kAlternates<T> && worth_streaming(q, p.x_rows.count, p.k);
    parallel_for(pool, p.x_rows.count, grain, [&](int64_t begin, int64_t end) {
      const auto row_at = [&](int64_t row) { return static_cast<const T*>(p.x) + p.x_rows.offset(row); };
      for (int64_t row = begin; row < end; ++row) {
        const RowAhead<T> ahead{row_at(std::min(row + ahead_by, end - 1))};
        streams ? quantise(row_at(row), row, ahead, std::true_type{})
                : quantise(row_at(row), row, ahead, std::false_type{});
      }
      if (streams) end_stream();
    });
    return Status::kOk;
  });
}

}  // namespace

Status quantize_int8(const QuantizeInt8Params& p, const ThreadPool& pool) {
  return for_rows(p, p.out.q, pool, [&](const auto* x, int64_t row, const auto& ahead, auto streams) {
    quantise_row<decltype(streams)::value>(x, p.k, p.out, row, ahead);
  });
}

Status quantize_int8_asym(const QuantizeInt8AsymParams& p, const ThreadPool& pool) {
  return for_rows(p, p.q, pool, [&](const auto* x, int64_t row, const auto& ahead, auto streams) {
    quantise_row_asym<decltype(streams)::value>(x, row, p, ahead);
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
