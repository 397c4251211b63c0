// What becomes of t = R(x @ w.T + bias) before a GEMM stores it (Epilogue of kernels.h), each step rounded exactly
// where the operator that it replaces rounds.
//
// A thread has some neighbouring columns of a row of t. How it reads and writes as many elements is a class: EightOf<T>
// where kernels are compiled for each element type, Four where one kernel serves all.
#pragma once

#include "cuda/gate.cuh"
#include "cuda/quantize_row.cuh"

namespace qops::cuda {

// By a kernel whose blocks share sums, as early as its first copies allow: the kernel that adds them may come and work
// out where they will be. It comes when all blocks of this one have started, so that it keeps none of them out.
QOPS_DEVICE void let_second_kernel_start() { ptx::griddepcontrol_launch_dependents(); }

// Which addresses allow accesses of 16 bytes, decided on the host.
struct Alignment {
  bool y, bias, residual;
};

template <class T>
struct EightOf {
  static constexpr int kCount = kVector;
  Alignment aligned;

  QOPS_DEVICE float rounded(float x) const { return round_to<T>(x); }
  QOPS_DEVICE float rounded_silu(float t) const { return cuda::rounded_silu<T>(t); }

  QOPS_DEVICE void load_residual(const void* residual, int64_t at, Vector& v) const {
    const T* row = static_cast<const T*>(residual) + at;
    if (aligned.residual) {
      load<true>(row, kVector, v);
    } else {
      load<false>(row, kVector, v);
    }
  }

  // Rounds them.
  QOPS_DEVICE void store(void* y, int64_t at, const Vector& v) const {
    T* row = static_cast<T*>(y) + at;
    if (aligned.y) {
      cuda::store<true>(row, kVector, v);
    } else {
      cuda::store<false>(row, kVector, v);
    }
  }

  QOPS_DEVICE void store_codes(void* y, int64_t at, const int (&q)[kVector]) const {
    int8_t* row = static_cast<int8_t*>(y) + at;
    if (aligned.y) {
      store_int8<true>(row, kVector, q);
    } else {
      store_int8<false>(row, kVector, q);
    }
  }
};

// Of a dtype that is the same for all threads. is_aligned: y, for all four at once.
struct Four {
  static constexpr int kCount = 4;
  DType dtype;
  bool is_aligned;

  QOPS_DEVICE float rounded(float x) const {
    return dtype == DType::kFloat32 ? x : dtype == DType::kFloat16 ? round_to<__half>(x) : round_to<__nv_bfloat16>(x);
  }
  QOPS_DEVICE float rounded_silu(float t) const { return rounded(silu(lanes::Lane{t}).v); }

  static QOPS_DEVICE void load(const void* values, DType dtype, int64_t at, bool any, float (&four)[4]) {
    Vector v;
    cuda::load<false>(values, dtype, at, any ? 4 : 0, v);
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = v[i];
  }
  QOPS_DEVICE void load_residual(const void* residual, int64_t at, float (&four)[4]) const {
    load(residual, dtype, at, true, four);
  }

  // Rounds them.
  QOPS_DEVICE void store(void* y, int64_t at, const float (&v)[4]) const {
    if (dtype == DType::kFloat32) {
      const uint32_t words[4] = {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                                 __float_as_uint(v[3])};
      store_words(y, at, words);
    } else if (dtype == DType::kFloat16) {
      store_halves(static_cast<__half*>(y) + at, v);
    } else {
      store_halves(static_cast<__nv_bfloat16*>(y) + at, v);
    }
  }
  QOPS_DEVICE void store_words(void* y, int64_t at, const uint32_t (&words)[4]) const {
    uint32_t* row = static_cast<uint32_t*>(y) + at;
    if (is_aligned) {
      *reinterpret_cast<uint4*>(row) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) row[i] = words[i];
    }
  }
  QOPS_DEVICE void store_codes(void* y, int64_t at, const int (&q)[4]) const {
    int8_t* row = static_cast<int8_t*>(y) + at;
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) codes |= (static_cast<uint32_t>(q[i]) & 0xff) << 8 * i;
    if (is_aligned) {
      *reinterpret_cast<uint32_t*>(row) = codes;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) row[i] = static_cast<int8_t>(codes >> 8 * i);
    }
  }

 private:
  template <class E>
  QOPS_DEVICE void store_halves(E* row, const float (&v)[4]) const {
    if (is_aligned) {
      uint32_t words[2];
      narrow_words<E>(v, words);
      *reinterpret_cast<uint2*>(row) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) row[i] = narrow<E>(v[i]);
    }
  }
};

// From t to y [rows, N], or [rows, N / 2] of a mixed weight: the columns from `column` on of row m, where `stores`.
// t is rounded (where nothing is to be done with it, store() does that); up(u) gives t of the same columns of up.
template <class Columns, class Up>
QOPS_DEVICE void finish(const EpilogueParams& p, const Columns& columns, void* y, int64_t n, int64_t m, int64_t column,
                        bool stores, float (&t)[Columns::kCount], const Up& up) {
  if (p.epilogue == Epilogue::kSiluMul) {
    float u[Columns::kCount];
    up(u);
#pragma unroll
    for (int i = 0; i < Columns::kCount; ++i) t[i] = columns.rounded_silu(t[i]) * u[i];
    if (stores) columns.store(y, m * (n / 2) + column, t);
  } else if (p.epilogue == Epilogue::kInt8) {
    const StaticQuantizer quantizer(p.out_scale, p.out_zero_point);
    int q[Columns::kCount];
#pragma unroll
    for (int i = 0; i < Columns::kCount; ++i) q[i] = quantizer.code(t[i]);
    if (stores) columns.store_codes(y, m * n + column, q);
  } else if (stores) {
    if (p.residual != nullptr) {
      float residual[Columns::kCount];
      columns.load_residual(p.residual, p.residual_rows.offset(m) + column, residual);
#pragma unroll
      for (int i = 0; i < Columns::kCount; ++i) t[i] += residual[i];
    }
    columns.store(y, m * n + column, t);
  }
}

}  // namespace qops::cuda
