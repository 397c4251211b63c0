// exp and silu in one sequence of IEEE operations that CPU and GPU kernels share, so that their bits agree.
//
//   exp(x) = 2^n * exp(r),   n = round(x / ln 2),   r = x - n * ln 2,   |r| <= ln 2 / 2 (and a little),
//
// exp(r) = 1 + r + r^2 * (degree 4): the minimax polynomial of the relative error (3.1e-9), by the Remez algorithm.
// ln 2 is a sum of two floats; the first subtraction is exact, because fmaf does not round the product.
//
// Error bound: 0.91 ulp, subnormal results included (over all floats the largest is 0.9091, at 0x1.4cc98p+2). exp(x) is
// infinite above 88.7228 and 0 below -103.9721; exp(0) = 1, exp(inf) = inf, exp(-inf) = 0, exp(NaN) = NaN.
//
// V is a vector of float lanes. These functions come from its namespace, by argument-dependent lookup: operators
// + - * /, fma, min, max, broadcast, round_to_integer and scale_by_power_of_two (their meaning: cpu/simd_scalar.h).
#pragma once

#include "kernels.h"

namespace qops {

inline constexpr float kInverseLn2 = 0x1.715476p+0f;

// exp(r) of x and n.
template <class V>
QOPS_ALWAYS_INLINE V exp_of_rest(V x, V n) {
  const auto c = [&](float value) { return broadcast(value, x); };
  V r = fma(n, c(-0x1.62e430p-1f), x);
  r = fma(n, c(0x1.05c610p-29f), r);
  V p = c(0x1.6a244cp-10f);
  p = fma(p, r, c(0x1.1239d4p-7f));
  p = fma(p, r, c(0x1.5558f2p-5f));
  p = fma(p, r, c(0x1.555492p-3f));
  p = fma(p, r, c(0x1.fffffcp-2f));
  p = fma(p, r, c(1.0f));
  return fma(p, r, c(1.0f));
}

template <class V>
QOPS_ALWAYS_INLINE V exp_poly(V x) {
  const auto c = [&](float value) { return broadcast(value, x); };
  // Beyond these bounds the result is 0 or infinite, and n stays within scale_by_power_of_two's range. With the bound
  // as first argument a NaN passes.
  x = min(c(89.0f), max(c(-104.0f), x));
  const V n = round_to_integer(x * c(kInverseLn2));
  return scale_by_power_of_two(exp_of_rest(x, n), n);
}

// g / (1 + exp(-g)) as written: -0 below -88.7228, where exp overflows, and NaN (inf / inf) for -inf. Above -88.7228
// within 2.4 ulp (over all floats the largest is 2.394, at -0x1.0af4e2p+4).
template <class V>
QOPS_ALWAYS_INLINE V silu(V g) {
  return g / (broadcast(1.0f, g) + exp_poly(broadcast(0.0f, g) - g));
}

}  // namespace qops
