// rms_norm_int8 and add_rms_norm_int8: quantize_int8(rms_norm(z)), z = x or R(x + residual).
//
// Bound by arithmetic where rows are read fast: that of rms_norm, and that of quantize_int8 on values in L1, which go
// no further.
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
  const bool streams = kAlternates<T> && worth_streaming(p.out.q, norm.x_rows.count, norm.h);
  return for_rows_with_buffer<T>(pool, norm.x_rows.count, grain, norm.h, [&](int64_t row, T* y) {
    const NormRowAhead<T> ahead(norm, row + 1 < norm.x_rows.count ? row + 1 : row);
    normalise_row(norm_input_row<T>(norm, row), static_cast<const W*>(norm.weight), norm.h, norm.style, y, ahead);
    if (!streams) return quantise_row(y, norm.h, p.out, row);
    quantise_row<true>(y, norm.h, p.out, row);
    end_stream();
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
