// What becomes of the outputs of a matrix product over strips of weights: Epilogue of kernels.h, each step rounded
// where the operator that it replaces rounds.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/gated_row.h"
#include "cpu/quantize_row.h"
#include "cpu/simd.h"

namespace qops::cpu::QOPS_ISA_NS {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

template <class Params>
[[gnu::noinline]] F32x16 bias_of_strip(const Params& p, int64_t strip) {
  if (p.epilogue == Epilogue::kSiluMul) {
    return low_halves(load_as_float(p.bias, p.bias_dtype, 8 * strip, 8),
                      load_as_float(p.bias, p.bias_dtype, p.n / 2 + 8 * strip, 8));
  }
  const int64_t column = strip * kStripRows;
  return load_as_float(p.bias, p.bias_dtype, column, p.n - column);
}

// A row of a strip.
struct Place {
  int64_t row, strip;
};

// sum: the 16 columns, bias included, not rounded yet. Here kNone adds a residual.
template <Epilogue kEpilogue, class T, class Params>
inline void finish(const Params& p, Place at, F32x16 sum) {
  const int64_t column = at.strip * kStripRows;
  const int64_t n = std::min<int64_t>(kLanes, p.n - column);
  sum = round_to<T>(sum);
  if constexpr (kEpilogue == Epilogue::kSiluMul) {
    store_n(static_cast<T*>(p.y) + at.row * (p.n / 2) + column / 2, gated<T, true>(sum, high_halves(sum, sum)), 8);
  } else if constexpr (kEpilogue == Epilogue::kInt8) {
    const StaticCodes codes(p.out_scale, p.out_zero_point);
    store_saturated_n(static_cast<int8_t*>(p.y) + at.row * p.n + column, to_int(codes(sum)), n);
  } else {
    const T* residual = static_cast<const T*>(p.residual) + p.residual_rows.offset(at.row) + column;
    store_n(static_cast<T*>(p.y) + at.row * p.n + column, sum + load_n(residual, n), n);
  }
}

// Two of them: with kSiluMul gate of both fills one vector, and up another.
template <Epilogue kEpilogue, class T, class Params>
inline void finish(const Params& p, Place at, F32x16 sum, Place next_at, F32x16 next_sum) {
  if constexpr (kEpilogue == Epilogue::kSiluMul) {
    sum = round_to<T>(sum);
    next_sum = round_to<T>(next_sum);
    T lanes[kLanes];
    store(lanes, gated<T, true>(low_halves(sum, next_sum), high_halves(sum, next_sum)));
    T* y = static_cast<T*>(p.y);
    std::memcpy(y + at.row * (p.n / 2) + 8 * at.strip, lanes, 8 * sizeof(T));
    std::memcpy(y + next_at.row * (p.n / 2) + 8 * next_at.strip, lanes + 8, 8 * sizeof(T));
  } else {
    finish<kEpilogue, T>(p, at, sum);
    finish<kEpilogue, T>(p, next_at, next_sum);
  }
}

// f(std::integral_constant of the epilogue of p).
template <class Params, class F>
inline void with_epilogue(const Params& p, F&& f) {
  switch (p.epilogue) {
    case Epilogue::kNone: return f(std::integral_constant<Epilogue, Epilogue::kNone>());
    case Epilogue::kSiluMul: return f(std::integral_constant<Epilogue, Epilogue::kSiluMul>());
    case Epilogue::kInt8: return f(std::integral_constant<Epilogue, Epilogue::kInt8>());
  }
}

}  // namespace qops::cpu::QOPS_ISA_NS
