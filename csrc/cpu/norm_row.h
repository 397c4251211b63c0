// Root-mean-square normalisation of one row: y = z * rstd * w, rstd = 1 / sqrt(sum(z^2) / H + eps).
//
// The sum of squares follows the tree of row_tree.h.
#pragma once

#include "cpu/simd.h"
#include "row_tree.h"

namespace qops::cpu::QOPS_ISA_NS {

template <class T>
inline float sum_of_squares(const T* z, int64_t h) {
  const int threads = row_threads(h);
  const int64_t stride = int64_t{kVector} * threads;
  float warps[kMaxRowThreads / kWarp];
  for (int warp = 0; warp < threads / kWarp; ++warp) {
    // A warp's 256 partials are 16 vectors; 8 of them reduce to the sums of 16 threads.
    F32x16 halves[2];
    for (int half = 0; half < 2; ++half) {
      F32x16 partials[8];
      for (int i = 0; i < 8; ++i) {
        F32x16 sum = set1(0.0f);
        for (int64_t k = warp * 256 + half * 128 + i * kLanes; k < h; k += stride) {
          const F32x16 v = load_n(z + k, h - k);
          sum = sum + v * v;
        }
        partials[i] = sum;
      }
      halves[half] = sum_groups_of_8(partials);
    }
    warps[warp] = sum_lanes(halves[0] + halves[1]);
  }
  for (int s = threads / kWarp / 2; s > 0; s /= 2) {
    for (int i = 0; i < s; ++i) warps[i] += warps[i + s];
  }
  return warps[0];
}

// y may be z.
template <class T, class W>
inline void normalise_row(const T* z, const W* weight, int64_t h, const RmsNormStyle& style, T* y) {
  const float mean = sum_of_squares(z, h) / static_cast<float>(h);
  const F32x16 rstd = set1(1.0f / std::sqrt(mean + style.eps));
  const F32x16 weight_offset = set1(style.weight_offset);
  const auto finish = [&](F32x16 v, F32x16 w) {
    const F32x16 normed = v * rstd;
    return style.round_before_weight ? round_to<T>(normed) * w : normed * (w + weight_offset);
  };
  int64_t k = 0;
  for (; k + kLanes <= h; k += kLanes) store(y + k, finish(load(z + k), load(weight + k)));
  if (k < h) store_n(y + k, finish(load_n(z + k, h - k), load_n(weight + k, h - k)), h - k);
}

// sum may be x or residual.
template <class T>
inline void add_row(const T* x, const T* residual, T* sum, int64_t h) {
  int64_t k = 0;
  for (; k + kLanes <= h; k += kLanes) store(sum + k, load(x + k) + load(residual + k));
  if (k < h) store_n(sum + k, load_n(x + k, h - k) + load_n(residual + k, h - k), h - k);
}

// The row that rms_norm normalises: of x, or of R(x + residual), which is stored.
template <class T>
inline const T* norm_input_row(const RmsNormParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
  if (p.residual == nullptr) return x;
  T* sum = static_cast<T*>(p.residual_out) + row * p.h;
  add_row(x, static_cast<const T*>(p.residual) + p.residual_rows.offset(row), sum, p.h);
  return sum;
}

}  // namespace qops::cpu::QOPS_ISA_NS
