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
