// What int8_gemm makes of its exact sums: one float32 chain per output, or the integers themselves.
#pragma once

#include <algorithm>

#include "cpu/gemm_epilogue.h"
#include "cpu/simd.h"

namespace qops::cpu::QOPS_ISA_NS {

// What belongs to the columns of up to kMaxStrips strips, read once for all rows that pass over them.
template <int kMaxStrips>
struct Columns {
  Range strips;
  alignas(64) float w_scale[kMaxStrips * kStripRows];
  alignas(64) float bias[kMaxStrips * kStripRows];
  alignas(64) int32_t w_sum[kMaxStrips * kStripRows];  // sum_k w, by the caller, where finish_row() is to use it

  Columns(const Int8GemmParams& p, Range of) : strips(of) {
    if (p.dtype == DType::kInt32) return;
    for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
      const int64_t column = strip * kStripRows;
      // K = 0 has no scales.
      const F32x16 scales = p.k == 0 ? set1(0.0f) : load_as_float(p.w_scale, p.w_scale_dtype, column, kLanes);
      store(w_scale + offset(strip), scales);
      if (p.bias == nullptr) continue;
      store(bias + offset(strip), bias_of_strip(p, strip));
    }
  }
  int64_t offset(int64_t strip) const { return (strip - strips.begin) * kStripRows; }
};

// y of some rows and of some of the strips of `columns`. Row by row, `stride` apart, `sums` holds those of (x + offset)
// w; with_w_sum is false where the offset is 0 and no row has a zero point.
template <class T, int kMaxStrips>
void finish_rows(const Int8GemmParams& p, Range rows, Range strips, const int32_t* sums, int64_t stride, int32_t offset,
                 bool with_w_sum, const Columns<kMaxStrips>& columns) {
  const int64_t column = strips.begin * kStripRows, at = columns.offset(strips.begin);
  const int64_t end = std::min(strips.end * kStripRows, p.n) - column;
  const auto finish_all = [&](auto with_sum, auto with_bias, auto plain, auto epilogue) {
    for (int64_t row = rows.begin; row < rows.end; ++row, sums += stride) {
      const int32_t zero = p.zero_point == nullptr ? 0 : p.zero_point[p.zero_point_rows.offset(row)];
      const I32x16 excess = set1(static_cast<int32_t>(static_cast<uint32_t>(offset) + static_cast<uint32_t>(zero)));
      const F32x16 scale = set1(p.scale[p.scale_rows.offset(row)]);
      const auto integers = [&](int64_t i) {
        I32x16 sum = load(sums + i);
        if constexpr (with_sum) sum = sum - excess * load(columns.w_sum + at + i);
        return sum;
      };
      const auto value = [&](int64_t i) {
        const F32x16 t = to_float(integers(i)) * load(columns.w_scale + at + i);
        return with_bias ? fma(scale, t, load(columns.bias + at + i)) : scale * t;
      };
      if constexpr (plain) {
        T* y = static_cast<T*>(p.y) + row * p.n + column;
        for (int64_t i = 0; i < end; i += kLanes) {
          if constexpr (std::is_same_v<T, int32_t>) {
            store_n(y + i, integers(i), end - i);
          } else {
            store_n(y + i, value(i), end - i);
          }
        }
      } else {
        const auto place = [&](int64_t i) { return Place{row, strips.begin + i / kStripRows}; };
        int64_t i = 0;
        for (; i + kLanes < end; i += 2 * kLanes) {
          finish<epilogue, T>(p, place(i), value(i), place(i + kLanes), value(i + kLanes));
        }
        if (i < end) finish<epilogue, T>(p, place(i), value(i));
      }
    }
  };
  // Branches inside of the loop cost 10 % of a call on AMX at M = 256, K = 576.
  constexpr std::true_type kYes;
  constexpr std::false_type kNo;
  const auto with_bias = [&](auto with_sum, auto... how) {
    p.bias == nullptr ? finish_all(with_sum, kNo, how...) : finish_all(with_sum, kYes, how...);
  };
  const auto run = [&](auto... how) { with_w_sum ? with_bias(kYes, how...) : with_bias(kNo, how...); };
  if constexpr (!std::is_same_v<T, int32_t>) {
    if (!p.is_plain()) return with_epilogue(p, [&](auto epilogue) { run(kNo, epilogue); });
  }
  run(kYes, std::integral_constant<Epilogue, Epilogue::kNone>());
}

}  // namespace qops::cpu::QOPS_ISA_NS
