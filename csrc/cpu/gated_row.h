// One row of silu(gate) * up. silu costs an IEEE division and one exp per element (exp_poly.h).
//
// Bound by arithmetic: some 66 operations of two ports for 32 bfloat16. A row of 4,096 from L2 takes 1.77 us of a
// thread of Sapphire Rapids, a copy of as many bytes past the caches 1.26. Lost: two or four pairs of vectors at once,
// 0.96x to 1.1x; a reciprocal and two corrections for the division, 1.15x.
#pragma once

#include "cpu/row_ahead.h"
#include "cpu/simd_pair.h"
#include "exp_poly.h"

namespace qops::cpu::QOPS_ISA_NS {

// gate and up may hold any NaN.
template <class T, bool kRoundBeforeUp>
QOPS_ALWAYS_INLINE F32x16 gated(F32x16 gate, F32x16 up) {
  const F32x16 activation = silu(gate);
  return (kRoundBeforeUp ? round_to<T>(activation) : activation) * up;
}

template <bool kRoundBeforeUp, bool kStream, class T>
inline void gated_row(const T* gate, const T* up, T* y, int64_t columns, const T* next_gate, const T* next_up) {
  const auto gated_elements = [](F32x16 g, F32x16 u) {
    const F32x16 activation = silu(g);
    return (kRoundBeforeUp ? round_in_pair<T>(activation) : activation) * u;
  };
  const auto gated_pair = [&](const F32x32& g, const F32x32& u) {
    return F32x32{gated_elements(g.a, u.a), gated_elements(g.b, u.b)};
  };
  int64_t i = 0;
  for (; i + kPair <= columns; i += kPair) {
    fetch(next_gate + i, kPair);
    fetch(next_up + i, kPair);
    store_pair<kStream>(y + i, gated_pair(load_pair(gate + i), load_pair(up + i)));
  }
  if (const int64_t n = columns - i; n > 0) {
    store_pair_n(y + i, gated_pair(load_pair_n(gate + i, n), load_pair_n(up + i, n)), n);
  }
}

// A row, while the next one, which may be the same, is fetched.
template <bool kStream = false, class T>
inline void gated_row(const SiluMulParams& p, int64_t row, int64_t next, T* y) {
  const T *gates = static_cast<const T*>(p.gate), *ups = static_cast<const T*>(p.up);
  const T *gate = gates + p.gate_rows.offset(row), *next_gate = gates + p.gate_rows.offset(next);
  const T *up = ups + p.up_rows.offset(row), *next_up = ups + p.up_rows.offset(next);
  p.round_before_up ? gated_row<true, kStream>(gate, up, y, p.columns, next_gate, next_up)
                    : gated_row<false, kStream>(gate, up, y, p.columns, next_gate, next_up);
}

}  // namespace qops::cpu::QOPS_ISA_NS
