// From the float32 sums of int4_gemm to y: bias, rounding, and what follows in the same kernel, each rounded exactly
// where the operator that it replaces rounds.
#pragma once

#include "cuda/gate.cuh"
#include "cuda/int4_config.h"
#include "cuda/quantize_row.cuh"

namespace qops::cuda {

// Which addresses allow accesses of 16 bytes, decided on the host.
struct Alignment {
  bool y, bias, residual;
};

// R(sums + bias) of eight columns; `n`: of the first one in bias.
template <class T>
QOPS_DEVICE void add_bias(const WeightOnlyGemmParams& p, Alignment aligned, int64_t n, Vector& sums) {
  if (p.bias != nullptr) {
    Vector bias;
    if (aligned.bias) {
      load<true>(p.bias, p.bias_dtype, n, kVector, bias);
    } else {
      load<false>(p.bias, p.bias_dtype, n, kVector, bias);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[i] = sums[i] + bias[i];
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[i] = round_to<T>(sums[i]);
}

template <class T>
QOPS_DEVICE void store_row(T* y, bool is_aligned, const Vector& v) {
  if (is_aligned) {
    store<true>(y, kVector, v);
  } else {
    store<false>(y, kVector, v);
  }
}

// The part of row m of y that belongs to columns n .. n + 7 of the product, n a multiple of 8. read(n, v) gives the
// sums of eight columns from n on, and of the next eight where gate (rows 0 .. 7 of a strip) and up are mixed.
template <class T, class Read>
QOPS_DEVICE void finish(const WeightOnlyGemmParams& p, Alignment aligned, int64_t m, int64_t n, const Read& read) {
  Vector v;
  if (p.epilogue == Epilogue::kSiluMul) {
    if (n % kStripRows != 0) return;
    const int64_t column = n / 2;
    Vector up;
    read(n, v);
    add_bias<T>(p, aligned, column, v);
    read(n + kVector, up);
    add_bias<T>(p, {aligned.y, aligned.bias && p.n / 2 % kVector == 0, false}, p.n / 2 + column, up);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = gated_value<T>(v[i], up[i], true);
    return store_row(static_cast<T*>(p.y) + m * (p.n / 2) + column, aligned.y, v);
  }
  read(n, v);
  add_bias<T>(p, aligned, n, v);
  if (p.epilogue == Epilogue::kInt8) {
    const StaticQuantizer quantizer(p.out_scale, p.out_zero_point);
    int q[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) q[i] = quantizer.code(v[i]);
    int8_t* y = static_cast<int8_t*>(p.y) + m * p.n + n;
    if (aligned.y) {
      store_int8<true>(y, kVector, q);
    } else {
      store_int8<false>(y, kVector, q);
    }
    return;
  }
  if (p.residual != nullptr) {
    Vector residual;
    const T* row = static_cast<const T*>(p.residual) + p.residual_rows.offset(m) + n;
    if (aligned.residual) {
      load<true>(row, kVector, residual);
    } else {
      load<false>(row, kVector, residual);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = v[i] + residual[i];  // store_row rounds
  }
  store_row(static_cast<T*>(p.y) + m * p.n + n, aligned.y, v);
}

}  // namespace qops::cuda
