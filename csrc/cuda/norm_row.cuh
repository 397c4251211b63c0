// Root-mean-square normalisation of a row in vectors, for rms_norm and qk_norm_rotary. The order of the sum:
// row_tree.h.
#pragma once

#include "cuda/row.cuh"

namespace qops::cuda {

QOPS_DEVICE void add_squares(const Vector& z, Vector& partials) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) partials[i] += z[i] * z[i];
}

template <class Shape>
QOPS_DEVICE float rstd_of_row(const Vector& partials, int64_t h, const RmsNormStyle& style, float* shared) {
  return 1.0f / sqrtf(sum_of_row<Shape>(partials, shared) / static_cast<float>(h) + style.eps);
}

// R(R(z * rstd) * w) with weights of T, which has 16 bits, both as words.
template <class T>
QOPS_DEVICE void normalise_words(const Vector& z, const Words<T>& weight, float rstd, Words<T>& y) {
  Vector normed;
#pragma unroll
  for (int i = 0; i < kVector; ++i) normed[i] = z[i] * rstd;
  narrow_words<T>(normed, y);
  multiply_words<T>(weight, y);
}

// y, rounded to T, of z and the weights from `at` on.
template <bool kAligned, class T>
QOPS_DEVICE void normalise(const Vector& z, const void* weight, DType dtype, int64_t at, int64_t n, float rstd,
                           const RmsNormStyle& style, Words<T>& y) {
  if constexpr (sizeof(T) == 2) {
    if (dtype == kDTypeOf<T> && style.round_before_weight) {
      Words<T> w;
      load_words<kAligned>(static_cast<const T*>(weight) + at, n, w);
      return normalise_words<T>(z, w, rstd, y);
    }
  }
  Vector normed, w;
  load<kAligned>(weight, dtype, at, n, w);
#pragma unroll
  for (int i = 0; i < kVector; ++i) normed[i] = z[i] * rstd;
  if (style.round_before_weight) {
    narrow_words<T>(normed, y);
    widen_words<T>(y, normed);
#pragma unroll
    for (int i = 0; i < kVector; ++i) normed[i] *= w[i];
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) normed[i] *= w[i] + style.weight_offset;
  }
  narrow_words<T>(normed, y);
}

}  // namespace qops::cuda
