// rms_norm_int8 and add_rms_norm_int8: quantize_int8(rms_norm(z)), z = x or R(x + residual).
//
// Bound by memory: a row is read once from DRAM; its normalised values go no further than L1, where they are read
// twice.
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
  return for_rows_with_buffer<T>(pool, norm.x_rows.count, grain, norm.h, [&](int64_t row, T* y) {
    normalise_row(norm_input_row<T>(norm, row), static_cast<const W*>(norm.weight), norm.h, norm.style, y);
    quantise_row(y, norm.h, p.out, row);
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
