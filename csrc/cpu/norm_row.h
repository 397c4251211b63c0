// Root-mean-square normalisation of one row: y = z * rstd * w, rstd = 1 / sqrt(sum(z^2) / H + eps).
//
// The sum of squares follows the tree of row_tree.h.
#pragma once

#include "cpu/row_ahead.h"
#include "cpu/simd_pair.h"
#include "row_tree.h"

namespace qops::cpu::QOPS_ISA_NS {

template <class T, class Ahead>
inline float sum_of_squares(const T* z, int64_t h, const Ahead& ahead) {
  int64_t fetched = 0;
  const int threads = row_threads(h);
  const int64_t stride = int64_t{kVector} * threads;
  const F32x32 zero = {set1(0.0f), set1(0.0f)};
  float warps[kMaxRowThreads / kWarp];
  for (int warp = 0; warp < threads / kWarp; ++warp) {
    // A warp's 256 partials are 8 pairs of vectors; 4 of them reduce to the sums of 16 threads.
    F32x16 halves[2];
    for (int half = 0; half < 2; ++half) {
      F32x32 partials[4] = {zero, zero, zero, zero};
      int64_t k = warp * 256 + half * 128;
      if (k >= h) {
        halves[half] = zero.a;
        continue;
      }
      const auto add = [&](const auto& load_at) {
        fetch_half(ahead, fetched, 4 * kPair);
        fetched += 2 * kPair;
        QOPS_UNROLL
        for (int i = 0; i < 4; ++i) {
          const F32x32 v = load_at(k + i * kPair);
          partials[i] = {partials[i].a + v.a * v.a, partials[i].b + v.b * v.b};
        }
      };
      for (; k + 4 * kPair <= h; k += stride) add([&](int64_t at) { return load_pair(z + at); });
      if (k < h) add([&](int64_t at) { return load_pair_n(z + at, h - at); });
      halves[half] = sum_groups_of_8_in_pairs<T>(partials);
    }
    warps[warp] = sum_lanes(halves[0] + halves[1]);
  }
  for (int s = threads / kWarp / 2; s > 0; s /= 2) {
    for (int i = 0; i < s; ++i) warps[i] += warps[i + s];
  }
  return warps[0];
}

template <bool kRoundBeforeWeight, bool kStream, class T, class W, class Ahead>
inline void scale_row(const T* z, const W* weight, int64_t h, F32x16 rstd, F32x16 weight_offset, T* y,
                      const Ahead& ahead) {
  const auto finish = [&](F32x16 v, F32x16 w) {
    const F32x16 normed = v * rstd;
    return kRoundBeforeWeight ? round_in_pair<T>(normed) * w : normed * (w + weight_offset);
  };
  const auto both = [&](const F32x32& v, const F32x32& w) { return F32x32{finish(v.a, w.a), finish(v.b, w.b)}; };
  int64_t k = 0;
  for (; k + kPair <= h; k += kPair) {
    fetch_half(ahead, h / 2 + k / 2, kPair);
    store_pair<kStream>(y + k, both(load_pair(z + k), load_pair_as<T>(weight + k)));
  }
  if (const int64_t n = h - k; n > 0) {
    store_pair_n(y + k, both(load_pair_n(z + k, n), load_pair_as_n<T>(weight + k, n)), n);
  }
}

// y may be z.
template <bool kStream = false, class T, class W, class Ahead = NothingAhead>
inline void normalise_row(const T* z, const W* weight, int64_t h, const RmsNormStyle& style, T* y,
                          const Ahead& ahead = {}) {
  const float mean = sum_of_squares(z, h, ahead) / static_cast<float>(h);
  const F32x16 rstd = set1(1.0f / std::sqrt(mean + style.eps)), offset = set1(style.weight_offset);
  style.round_before_weight ? scale_row<true, kStream>(z, weight, h, rstd, offset, y, ahead)
                            : scale_row<false, kStream>(z, weight, h, rstd, offset, y, ahead);
}

// sum may be x or residual.
template <class T>
inline void add_row(const T* x, const T* residual, T* sum, int64_t h) {
  const auto add = [](const F32x32& v, const F32x32& r) { return F32x32{v.a + r.a, v.b + r.b}; };
  int64_t k = 0;
  for (; k + kPair <= h; k += kPair) store_pair<false>(sum + k, add(load_pair(x + k), load_pair(residual + k)));
  if (const int64_t n = h - k; n > 0) {
    store_pair_n(sum + k, add(load_pair_n(x + k, n), load_pair_n(residual + k, n)), n);
  }
}

// Fetches a row that rms_norm is to normalise.
template <class T>
class NormRowAhead {
 public:
  NormRowAhead(const RmsNormParams& p, int64_t row)
      : x_{static_cast<const T*>(p.x) + p.x_rows.offset(row)},
        residual_{p.residual == nullptr ? x_.row : static_cast<const T*>(p.residual) + p.residual_rows.offset(row)} {}

  QOPS_ALWAYS_INLINE void operator()(int64_t element) const {
    x_(element);
    residual_(element);
  }

 private:
  RowAhead<T> x_, residual_;
};

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
