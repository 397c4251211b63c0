// silu_mul: y = silu(gate) * up, elementwise over rows [I]. Every operation is a lane operation (cpu/gated_row.h), so
// the bits are the same at every ISA level.
#include <algorithm>

#include "cpu/gated_row.h"

namespace qops::cpu::QOPS_ISA_NS {

Status silu_mul(const SiluMulParams& p, const ThreadPool& pool) {
  return with_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    if (p.columns == 0) return Status::kOk;  // however many rows
    // 8 K elements are about 4 us of work, some four times what waking a thread costs.
    const int64_t grain = 1 + (8 << 10) / (p.columns + 1);
    const int64_t ahead_by = rows_ahead(2 * p.columns * static_cast<int64_t>(sizeof(T)));
    const bool streams = worth_streaming(static_cast<const T*>(p.y), p.gate_rows.count, p.columns);
    parallel_for(pool, p.gate_rows.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t next = std::min(row + ahead_by, end - 1);
        T* y = static_cast<T*>(p.y) + row * p.columns;
        streams ? gated_row<true>(p, row, next, y) : gated_row<false>(p, row, next, y);
      }
      if (streams) end_stream();
    });
    return Status::kOk;
  });
}

}  // namespace qops::cpu::QOPS_ISA_NS
