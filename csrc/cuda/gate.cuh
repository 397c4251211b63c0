// silu of exp_poly.h, for one value of a thread.
#pragma once

#include <cfloat>

#include "cuda/elements.cuh"
#include "cuda/ptx.cuh"
#include "exp_poly.h"

namespace qops::cuda {

// One lane of the vectors that exp_poly.h computes on, in a namespace of its own: min and max are CUDA's elsewhere.
namespace lanes {

struct Lane {
  float v;
};

QOPS_DEVICE Lane broadcast(float value, Lane) { return {value}; }
QOPS_DEVICE Lane operator+(Lane a, Lane b) { return {a.v + b.v}; }
QOPS_DEVICE Lane operator-(Lane a, Lane b) { return {a.v - b.v}; }
QOPS_DEVICE Lane operator*(Lane a, Lane b) { return {a.v * b.v}; }
QOPS_DEVICE Lane operator/(Lane a, Lane b) { return {a.v / b.v}; }
QOPS_DEVICE Lane fma(Lane a, Lane b, Lane c) { return {fmaf(a.v, b.v, c.v)}; }
QOPS_DEVICE Lane min(Lane a, Lane b) { return {a.v < b.v ? a.v : b.v}; }
QOPS_DEVICE Lane max(Lane a, Lane b) { return {a.v > b.v ? a.v : b.v}; }
QOPS_DEVICE Lane round_to_integer(Lane a) { return {rintf(a.v)}; }

// In two steps: the first is exact, because its result is normal, so the product is rounded once.
QOPS_DEVICE Lane scale_by_power_of_two(Lane a, Lane n) {
  if (!(n.v == n.v)) return a;
  const int power = static_cast<int>(n.v), half = power >> 1;
  return {a.v * __int_as_float((half + 127) << 23) * __int_as_float((power - half + 127) << 23)};
}

}  // namespace lanes

// A quarter of 1 + exp(-gate) as silu() has it, where that is finite; else something above 2^126. The quarter is exact.
QOPS_DEVICE float quarter_of_divisor(float gate) {
  // 1.5 * 2^23, whose next sums are integers, less the 2 of the quarter: the low bits of `sum` are n - 2.
  constexpr float kMagic = 12582910.0f;
  // exp(-80) is nothing beside 1, and exp(89) above 2^128. NaN becomes a bound: gate remains to tell.
  const lanes::Lane x{fminf(fmaxf(-gate, -80.0f), 89.0f)};
  const float sum = x.v * kInverseLn2 + kMagic;
  const float p = exp_of_rest(x, lanes::Lane{sum - kMagic}).v;
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(sum) << 23)) + 0.25f;
}

// R(silu(gate)) of a gate of 16 bits, before R(). Above 2^126 the reciprocal is 0, which makes it the -0 that
// exp_poly.h has there. One correction is enough, but not the same one: bfloat16 has gates whose quotient is subnormal,
// so 1 / 2 has to be exact; float16 has one where a quotient next to a tie is wrong without its remainder.
// tests/cuda/test_cuda_ops.py tries all gates, with reciprocals that are off by 2 ulp.
template <class T, class Reciprocal>
QOPS_DEVICE float silu_before_rounding(float gate, const Reciprocal& reciprocal) {
  const float d = quarter_of_divisor(gate), g = 0.25f * gate;
  const float r = reciprocal(d);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return g * fmaf(r, fmaf(-d, r, 1.0f), r);
  } else {
    const float q = g * r;
    // Of an infinite gate the remainder is NaN, which counts as the bound.
    return fmaf(-fminf(fmaf(d, q, -g), FLT_MAX), r, q);
  }
}

// R(silu(gate)) of an element.
template <class T>
QOPS_DEVICE float rounded_silu(float gate) {
  if constexpr (sizeof(T) == 4) {
    return silu(lanes::Lane{gate}).v;
  } else {
    return round_to<T>(silu_before_rounding<T>(gate, [](float d) { return ptx::rcp_approx(d); }));
  }
}

// R(R(silu(gate)) * up) or R(silu(gate) * up), with vectors as words.
template <class T>
QOPS_DEVICE void gated(const Words<T>& gate, const Words<T>& up, bool round_before_up, Words<T>& y) {
  Vector g;
  widen_words<T>(gate, g);
  if constexpr (sizeof(T) == 2) {
    if (round_before_up) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        g[i] = silu_before_rounding<T>(g[i], [](float d) { return ptx::rcp_approx(d); });
      }
      narrow_words<T>(g, y);
      multiply_words<T>(up, y);
      return;
    }
  }
  Vector u;
  widen_words<T>(up, u);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const lanes::Lane activation = silu(lanes::Lane{g[i]});
    g[i] = activation.v * u[i];
  }
  narrow_words<T>(g, y);
}

}  // namespace qops::cuda
