// silu_mul: y = silu(gate) * up, elementwise over rows [I].
//
// silu costs an IEEE division and one exp per element (exp_poly.h); every operation is a lane operation, so the bits
// are the same at every ISA level.
#include "cpu/simd.h"
#include "exp_poly.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

template <class T, bool kRoundBeforeUp>
QOPS_ALWAYS_INLINE F32x16 gated(F32x16 gate, F32x16 up) {
  const F32x16 activation = silu(gate);
  return (kRoundBeforeUp ? round_to<T>(activation) : activation) * up;
}

template <class T, bool kRoundBeforeUp>
void gated_row(const T* gate, const T* up, T* y, int64_t columns) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    store(y + i, gated<T, kRoundBeforeUp>(load(gate + i), load(up + i)));
  }
  if (const int64_t n = columns - i; n > 0) {
    store_n(y + i, gated<T, kRoundBeforeUp>(load_n(gate + i, n), load_n(up + i, n)), n);
  }
}

template <class T, bool kRoundBeforeUp>
void run(const SiluMulParams& p, const ThreadPool& pool) {
  // 8 K elements are about 4 us of work, some four times what waking a thread costs.
  const int64_t grain = 1 + (8 << 10) / (p.columns + 1);
  parallel_for(pool, p.gate_rows.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = static_cast<const T*>(p.gate) + p.gate_rows.offset(row);
      const T* up = static_cast<const T*>(p.up) + p.up_rows.offset(row);
      gated_row<T, kRoundBeforeUp>(gate, up, static_cast<T*>(p.y) + row * p.columns, p.columns);
    }
  });
}

}  // namespace

Status silu_mul(const SiluMulParams& p, const ThreadPool& pool) {
  return with_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    p.round_before_up ? run<T, true>(p, pool) : run<T, false>(p, pool);
    return Status::kOk;
  });
}

}  // namespace qops::cpu::QOPS_ISA_NS
