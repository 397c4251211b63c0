// The weights of an int4 GEMM as float16, whatever their scales: for a product by cuBLAS.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/launch.h"

namespace qops::cuda {

// Powers of two, one for each row of whole strips: times it, the largest weight that the row's scales and zeros allow
// lies in [2^14, 2^15), but for rows so small that it would be more than 2^126. Exact times a weight, and so is
// inverse_factor() times a sum, where neither leaves float32.
Status int4_row_factors(const Int4DequantizeParams& p, float* factors, const Queue& queue);

QOPS_DEVICE float inverse_factor(float factor) { return __uint_as_float(0x7f000000u - __float_as_uint(factor)); }

// int4_dequantize of float16, each row times its factor before it is rounded.
Status int4_dequantize_by_rows(const Int4DequantizeParams& p, const float* factors, const Queue& queue);

}  // namespace qops::cuda
