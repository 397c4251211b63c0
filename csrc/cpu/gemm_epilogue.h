// What becomes of the outputs of a matrix product over strips of weights: Epilogue of kernels.h, each step rounded
// where the operator that it replaces rounds.
#pragma once

#include <algorithm>

#include "cpu/gated_row.h"
#include "cpu/quantize_row.h"
#include "cpu/simd.h"

namespace qops::cpu::QOPS_ISA_NS {

// Lanes 0 .. 7 of both.
inline F32x16 concatenate_halves(F32x16 low, F32x16 high) {
  float lanes[kLanes + 8];
  store(lanes, low);
  store(lanes + 8, high);
  return load(lanes);
}

template <class Params>
[[gnu::noinline]] F32x16 bias_of_strip(const Params& p, int64_t strip) {
  if (p.epilogue == Epilogue::kSiluMul) {
    return concatenate_halves(load_as_float(p.bias, p.bias_dtype, 8 * strip, 8),
                              load_as_float(p.bias, p.bias_dtype, p.n / 2 + 8 * strip, 8));
  }
  const int64_t column = strip * kStripRows;
  return load_as_float(p.bias, p.bias_dtype, column, p.n - column);
}

// sum: one row of the strip's 16 columns, bias included, not rounded yet. Apart from the code of the tiles, which would
// lose 2 % at 4096 x 4096 and 18 % at 1536 x 576 (int4_gemm, M = 1).
template <class T, class Params>
[[gnu::noinline]] void finish_strip(const Params& p, int64_t row, int64_t strip, F32x16 sum) {
  const int64_t column = strip * kStripRows;
  const int64_t n = std::min<int64_t>(kLanes, p.n - column);
  sum = round_to<T>(sum);
  if (p.epilogue == Epilogue::kSiluMul) {
    float lanes[kLanes];
    store(lanes, sum);
    const F32x16 y = gated<T, true>(load_n(lanes, 8), load_n(lanes + 8, 8));
    store_n(static_cast<T*>(p.y) + row * (p.n / 2) + 8 * strip, y, 8);
  } else if (p.epilogue == Epilogue::kInt8) {
    const StaticCodes codes(p.out_scale, p.out_zero_point);
    store_saturated_n(static_cast<int8_t*>(p.y) + row * p.n + column, to_int(codes(sum)), n);
  } else {
    const T* residual = static_cast<const T*>(p.residual) + p.residual_rows.offset(row) + column;
    store_n(static_cast<T*>(p.y) + row * p.n + column, sum + load_n(residual, n), n);
  }
}

}  // namespace qops::cpu::QOPS_ISA_NS
