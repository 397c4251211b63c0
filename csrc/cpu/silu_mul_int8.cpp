// silu_mul_int8: quantize_int8(silu_mul(gate, up)) over rows [I]. The product goes no further than L1.
//
// Bound by the arithmetic of both: a row of 4,096 bfloat16 takes 2.6 us of a thread of Sapphire Rapids, silu_mul 2.2, a
// copy of as many bytes past the caches 1.1.
#include <algorithm>

#include "cpu/gated_row.h"
#include "cpu/quantize_row.h"
#include "cpu/row_buffers.h"

namespace qops::cpu::QOPS_ISA_NS {

Status silu_mul_int8(const SiluMulInt8Params& p, const ThreadPool& pool) {
  return with_dtype(p.gated.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const int64_t columns = p.gated.columns;
    // 8 K elements are about 4 us of work, some four times what waking a thread costs.
    const int64_t grain = 1 + (8 << 10) / (columns + 1);
    const int64_t rows = p.gated.gate_rows.count;
    const int64_t ahead_by = rows_ahead(2 * columns * static_cast<int64_t>(sizeof(T)));
    const bool streams = kAlternates<T> && worth_streaming(p.out.q, rows, columns);
    return for_rows_with_buffer<T>(pool, rows, grain, columns, streams, [&](int64_t row, T* y) {
      gated_row(p.gated, row, std::min(row + ahead_by, rows - 1), y);
      streams ? quantise_row<true>(y, columns, p.out, row) : quantise_row(y, columns, p.out, row);
    });
  });
}

}  // namespace qops::cpu::QOPS_ISA_NS
