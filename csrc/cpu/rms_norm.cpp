// rms_norm and add_rms_norm: y = z * rstd * w over rows [H], z = x or R(x + residual).
//
// Bound by memory: a row is read once from DRAM, while the one before it is worked on (cpu/row_ahead.h), and a second
// time from L1. The order of the sum: cpu/norm_row.h. 2,048 rows of 4,096 bfloat16 on Sapphire Rapids: a row from L2
// takes 0.67 us of a thread, 12 of some 15 cycles for 32 elements being the roundings of rounding="hf"; a copy past the
// caches of a row from further away takes 0.72.
// Lost: the sum of squares taken while x + residual is stored, in place 0.78x.
#include <algorithm>

#include "cpu/norm_row.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

template <bool kStream, class T, class W>
void norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  const int64_t ahead_by = rows_ahead(p.h * static_cast<int64_t>(sizeof(T)));
  for (int64_t row = begin; row < end; ++row) {
    const NormRowAhead<T> ahead(p, std::min(row + ahead_by, end - 1));
    T* y = static_cast<T*>(p.y) + row * p.h;
    normalise_row<kStream>(norm_input_row<T>(p, row), static_cast<const W*>(p.weight), p.h, p.style, y, ahead);
  }
  if constexpr (kStream) end_stream();
}

template <class T, class W>
void run(const RmsNormParams& p, const ThreadPool& pool) {
  if (p.h == 0) return;  // however many rows
  // 16 K elements are about 4 us of work, some four times what waking a thread costs.
  const int64_t grain = 1 + (16 << 10) / (p.h + 1);
  const bool streams = p.y != p.x && worth_streaming(static_cast<const T*>(p.y), p.x_rows.count, p.h);
  parallel_for(pool, p.x_rows.count, grain, [&](int64_t begin, int64_t end) {
    streams ? norm_rows<true, T, W>(p, begin, end) : norm_rows<false, T, W>(p, begin, end);
  });
}

}  // namespace

Status rms_norm(const RmsNormParams& p, const ThreadPool& pool) {
  return with_dtype(p.dtype, [&](auto* element) {
    return with_dtype(p.weight_dtype, [&](auto* weight) {
      run<std::remove_pointer_t<decltype(element)>, std::remove_pointer_t<decltype(weight)>>(p, pool);
      return Status::kOk;
    });
  });
}

}  // namespace qops::cpu::QOPS_ISA_NS
