// silu of exp_poly.h, for one value of a thread.
#pragma once

#include "cuda/elements.cuh"
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

// R(R(silu(gate)) * up) or R(silu(gate) * up).
template <class T>
QOPS_DEVICE float gated_value(float gate, float up, bool round_before_up) {
  const float activation = silu(lanes::Lane{gate}).v;
  return round_to<T>((round_before_up ? round_to<T>(activation) : activation) * up);
}

}  // namespace qops::cuda
