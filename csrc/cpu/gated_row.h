// One row of silu(gate) * up. silu costs an IEEE division and one exp per element (exp_poly.h).
#pragma once

#include "cpu/simd.h"
#include "exp_poly.h"

namespace qops::cpu::QOPS_ISA_NS {

template <class T, bool kRoundBeforeUp>
QOPS_ALWAYS_INLINE F32x16 gated(F32x16 gate, F32x16 up) {
  const F32x16 activation = silu(gate);
  return (kRoundBeforeUp ? round_to<T>(activation) : activation) * up;
}

template <class T, bool kRoundBeforeUp>
inline void gated_row(const T* gate, const T* up, T* y, int64_t columns) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    store(y + i, gated<T, kRoundBeforeUp>(load(gate + i), load(up + i)));
  }
  if (const int64_t n = columns - i; n > 0) {
    store_n(y + i, gated<T, kRoundBeforeUp>(load_n(gate + i, n), load_n(up + i, n)), n);
  }
}

template <class T>
inline void gated_row(const SiluMulParams& p, int64_t row, T* y) {
  const T* gate = static_cast<const T*>(p.gate) + p.gate_rows.offset(row);
  const T* up = static_cast<const T*>(p.up) + p.up_rows.offset(row);
  p.round_before_up ? gated_row<T, true>(gate, up, y, p.columns) : gated_row<T, false>(gate, up, y, p.columns);
}

}  // namespace qops::cpu::QOPS_ISA_NS
