// rms_norm and add_rms_norm: y = z * rstd * w over rows [H], z = x or R(x + residual).
//
// Bound by memory: a row is read once from DRAM and a second time from L1. The order of the sum: cpu/norm_row.h.
// Lost: the sum of squares taken while x + residual is stored, in place 0.78x (2,048 rows of 4,096 bfloat16, 2 threads,
// Sapphire Rapids). There a row from L2 takes 1.1 us of a thread, and one from further away 1.9.
#include "cpu/norm_row.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

template <class T, class W>
void run(const RmsNormParams& p, const ThreadPool& pool) {
  if (p.h == 0) return;  // however many rows
  // 16 K elements are about 4 us of work, some four times what waking a thread costs.
  const int64_t grain = 1 + (16 << 10) / (p.h + 1);
  parallel_for(pool, p.x_rows.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* y = static_cast<T*>(p.y) + row * p.h;
      normalise_row(norm_input_row<T>(p, row), static_cast<const W*>(p.weight), p.h, p.style, y);
    }
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
