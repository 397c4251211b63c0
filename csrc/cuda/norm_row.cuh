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

// R(R(z * rstd) * w) with weights of 16 bits of the same type, both as words. A product of two such elements has at
// most 22 bits, so float32 holds it before R(), which then rounds the same. (Where float32 lacks bits, below 2^-149, a
// product of bfloat16's 16 bits is less than 2^-134 and rounds to 0 either way.)
template <class T>
QOPS_DEVICE void normalise_words(const Vector& z, const uint32_t (&weight)[kWords<T>], float rstd,
                                 uint32_t (&words)[kWords<T>]) {
  Vector normed;
#pragma unroll
  for (int i = 0; i < kVector; ++i) normed[i] = z[i] * rstd;
  narrow_words<T>(normed, words);
#pragma unroll
  for (int i = 0; i < kWords<T>; ++i) words[i] = pair_bits(__hmul2(pair_of<T>(words[i]), pair_of<T>(weight[i])));
}

// z becomes y, rounded to T.
template <class T>
QOPS_DEVICE void normalise(Vector& z, const Vector& weight, float rstd, const RmsNormStyle& style) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float normed = z[i] * rstd;
    z[i] = round_to<T>(style.round_before_weight ? round_to<T>(normed) * weight[i]
                                                 : normed * (weight[i] + style.weight_offset));
  }
}

}  // namespace qops::cuda
