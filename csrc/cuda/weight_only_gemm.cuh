// What int4_gemm.cu and int8_weight_only_gemm.cu hand to the kernels of weight_only_decode.cuh and
// weight_only_tiled.cuh, and what comes before and after these: the first one has it, for both.
#pragma once

#include "cuda/gemm_epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/weight_only_fragment.cuh"

namespace qops::cuda {

// Rows of float32 are three of bfloat16, whose sum they are: with that dtype x has those, and y takes float32 sums,
// [rows, n], of which nothing else becomes.
struct WeightOnlyJob {
  WeightOnlyGemmParams p;  // x in the packed order of columns, rows at multiples of 16 bytes
  GemmPlan plan;
  Alignment aligned;
  float* sums;  // between two kernels: see GemmPlan::scratch_bytes
};

// R(sums + bias) of eight columns; `n`: of the first one in bias.
template <class T>
QOPS_DEVICE void add_bias(const WeightOnlyGemmParams& p, bool is_aligned, int64_t n, Vector& sums) {
  if (p.bias != nullptr) {
    Vector bias;
    if (is_aligned) {
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

// The part of row m of y that belongs to columns n .. n + 7 of the product, n a multiple of 8. read(n, v) gives the
// sums of eight columns from n on; of a mixed weight those of up are the next eight.
template <class T, class Read>
QOPS_DEVICE void finish_sums(const WeightOnlyGemmParams& p, Alignment aligned, int64_t m, int64_t n, const Read& read) {
  Vector t;
  if constexpr (sizeof(T) == 2) {
    if (p.dtype == DType::kFloat32) {
      read(n, t);
      return store<true>(static_cast<float*>(p.y) + m * p.n + n, kVector, t);
    }
  }
  const bool is_mixed = p.epilogue == Epilogue::kSiluMul;
  if (is_mixed && n % kStripRows != 0) return;
  const int64_t column = is_mixed ? n / 2 : n;
  read(n, t);
  add_bias<T>(p, aligned.bias, column, t);
  finish(p, EightOf<T>{aligned}, p.y, p.n, m, column, true, t, [&](Vector& up) {
    read(n + kVector, up);
    add_bias<T>(p, aligned.bias && p.n / 2 % kVector == 0, p.n / 2 + column, up);
  });
}

// The kernels for codes of so many bits.
struct WeightOnlyKernels {
  int bits;
  Status (*decode)(const WeightOnlyJob& job, const Queue& queue);
  Status (*tiled)(const WeightOnlyJob& job, const Queue& queue);
};

Status int4_gemm_decode(const WeightOnlyJob& job, const Queue& queue);
Status int4_gemm_tiled(const WeightOnlyJob& job, const Queue& queue);
Status int8_weight_only_gemm_decode(const WeightOnlyJob& job, const Queue& queue);
Status int8_weight_only_gemm_tiled(const WeightOnlyJob& job, const Queue& queue);

// The plan, x in packed order, the product, and the sums of several blocks; defined in int4_gemm.cu.
Status weight_only_gemm(const WeightOnlyGemmParams& p, const WeightOnlyKernels& kernels, const Queue& queue);
int64_t weight_only_gemm_scratch_bytes(const WeightOnlyGemmParams& p, int bits);

// Calls run(T{}, fine, offset) with what both kernels are compiled for: element type, group size, kind.
template <int kBits, class F>
Status with_kernel(const WeightOnlyGemmParams& p, const F& run) {
  const auto with_type = [&](auto element) {
    const bool offset = has_float_zeros(p.kind);
    if (has_fine_kernel(kBits, p.k, p.group_size, p.kind)) {
      return offset ? run(element, std::true_type{}, std::true_type{})
                    : run(element, std::true_type{}, std::false_type{});
    }
    if constexpr (kBits == 4) {
      if (offset) return run(element, std::false_type{}, std::true_type{});
    }
    return run(element, std::false_type{}, std::false_type{});
  };
  return p.dtype == DType::kFloat16 ? with_type(__half{}) : with_type(__nv_bfloat16{});
}

}  // namespace qops::cuda
