// What int4_int8_gemm's kernels share: how K is cut, and what becomes of the sums.
#pragma once

#include <algorithm>

#include "cpu/gemm_epilogue.h"
#include "cpu/group_numbers.h"
#include "cpu/quantize_row.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace qops::cpu::QOPS_ISA_NS {

// The slices of K as groups: 8 of whole units of lcm(64, group_size) columns, some of them empty where there are few.
struct Slices {
  static constexpr int kCount = 8;
  int64_t groups, unit, units;

  explicit Slices(const Int4Int8GemmParams& p)
      : groups(p.group_size == 0 ? 0 : p.k / p.group_size),
        unit(groups == 0 ? 1 : 64 / std::min<int64_t>(64, p.group_size & -p.group_size)),
        units((groups + unit - 1) / unit) {}
  int64_t begin(int slice) const { return std::min(groups, units * slice / kCount * unit); }
};

inline bool perm_is_valid(const Int4Int8GemmParams& p) {
  for (int64_t j = 0; j < p.k; ++j) {
    if (p.perm[j] >= 0 && p.perm[j] < p.k) continue;
    *p.bad_index = p.perm[j];
    return false;
  }
  return true;
}

// Rows [0, rows) of int8 in memory of the call, where x is of floats and quantised first: nothing else.
struct QuantisedRows {
  int8_t* q = nullptr;
  float* scale = nullptr;

  static size_t bytes(const Int4Int8GemmParams& p, int64_t rows) {
    return p.x_scale != nullptr ? 0 : Pieces::bytes<int8_t>(rows * p.k) + Pieces::bytes<float>(rows);
  }
  QuantisedRows(const Int4Int8GemmParams& p, int64_t rows, Pieces& memory) {
    if (p.x_scale != nullptr) return;
    q = memory.take<int8_t>(rows * p.k);
    scale = memory.take<float>(rows);
  }

  // Of row `row` of x, in the place of row `at`.
  template <class T>
  void quantise(const Int4Int8GemmParams& p, int64_t row, int64_t at) const {
    quantise_row(static_cast<const T*>(p.x) + p.x_rows.offset(row), p.k, Int8Output{q, scale, p.rule}, at);
  }
};

// Columns [begin, begin + n) of a row of x in packed order, n <= 64, and zeros behind them; returns their sum in lanes.
inline I32x16 copy_columns(const Int4Int8GemmParams& p, const int8_t* x, int64_t begin, int64_t n, uint8_t* to) {
  if (n < 64) std::memset(to, 0, 64);
  if (p.perm != nullptr) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<uint8_t>(x[p.perm[begin + i]]);
  } else if (n == 64) {
    std::memcpy(to, x + begin, 64);
  } else {
    std::memcpy(to, x + begin, static_cast<size_t>(n));
  }
  return dot_short(set1(int32_t{0}), bit_cast<B8x64>(set1(int32_t{0x01010101})), load_bytes(to));
}

// o' of 16 rows of w, of their scales and zeros.
inline F32x16 offset_of(const Int4Int8GemmParams& p, F32x16 scale, F32x16 z) {
  const F32x16 eight = set1(8.0f);
  return p.kind == WeightKind::kOffset ? fma(scale, eight, z) : scale * (eight - z);
}

// y of one row before it is rounded, of the sum of its slices.
inline F32x16 scaled(const Int4Int8GemmParams& p, F32x16 x_scale, F32x16 sum, int64_t strip) {
  return p.bias == nullptr ? x_scale * sum : fma(x_scale, sum, bias_of_strip(p, strip));
}

}  // namespace qops::cpu::QOPS_ISA_NS
