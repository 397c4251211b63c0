// rms_norm_int8 and add_rms_norm_int8: quantize_int8(rms_norm(z)), z = x or R(x + residual).
//
// Bound by arithmetic where rows are read fast: that of rms_norm, and that of quantize_int8 on values in L1, which go
// no further. A row of 4,096 bfloat16 takes 1.5 us of a thread of Sapphire Rapids, a copy of as many bytes past the
// caches 0.66, rms_norm in place 1.0. No difference: where the buffer lies in its page.
#include <algorithm>

#include "cpu/norm_row.h"
#include "cpu/quantize_row.h"
#include "cpu/row_buffers.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

template <class T, class W>
Status run(const RmsNormInt8Params& p, const ThreadPool& pool) {
  const RmsNormParams& norm = p.norm;
  // 16 K elements are about 4 us of work, some four times what waking a thread costs.
  const int64_t grain = 1 + (16 << 10) / (norm.h + 1);
  const int64_t ahead_by = rows_ahead(norm.h * static_cast<int64_t>(sizeof(T)));
  const bool streams = kAlternates<T> && worth_streaming(p.out.q, norm.x_rows.count, norm.h);
  return for_rows_with_buffer<T>(pool, norm.x_rows.count, grain, norm.h, streams, [&](int64_t row, T* y) {
    const NormRowAhead<T> ahead(norm, std::min(row + ahead_by, norm.x_rows.count - 1));
    normalise_row(norm_input_row<T>(norm, row), static_cast<const W*>(norm.weight), norm.h, norm.style, y, ahead);
    streams ? quantise_row<true>(y, norm.h, p.out, row) : quantise_row(y, norm.h, p.out, row);
  });
}

}  // namespace

Status rms_norm_int8(const RmsNormInt8Params& p, const ThreadPool& pool) {
  return with_dtype(p.norm.dtype, [&](auto* element) {
    return with_dtype(p.norm.weight_dtype, [&](auto* weight) {
      return run<std::remove_pointer_t<decltype(element)>, std::remove_pointer_t<decltype(weight)>>(p, pool);
    });
  });
}

}  // namespace qops::cpu::QOPS_ISA_NS
