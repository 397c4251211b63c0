// What int4_int8_gemm.cu hands to the kernel of int4_int8_gemm_tiled.cu, and the way from sums to y.
#pragma once

#include "cuda/gemm_epilogue.cuh"
#include "cuda/int4_int8_fragment.cuh"
#include "cuda/launch.h"

namespace qops::cuda {

struct Int4Int8Job {
  Int4Int8GemmParams p;  // x in the packed order of columns, rows at multiples of 16 bytes
  GemmPlan plan;
  int4_int8::Slices slices;
  int4_int8::SumFormat format;
  float* sums;           // between two kernels: see GemmPlan::scratch_bytes; int32 where one group is all of K
  bool y_aligned;        // four columns of it at a time
  int32_t is_read_once;  // w: by one tile of tokens
};

namespace int4_int8 {

// y of four columns from n on of row m, and of a mixed weight of the four of up that belong to them. read(n, t) gives
// the sums of four columns.
template <class Read>
QOPS_DEVICE void finish_sums(const Int4Int8Job& job, int64_t m, int64_t n, const Read& read) {
  const bool is_mixed = job.p.epilogue == Epilogue::kSiluMul;
  if (is_mixed && n % kStripRows >= 8) return;
  const int64_t column = is_mixed ? unmixed_row(n, job.p.n) : n;
  const Four four{job.p.dtype, job.y_aligned};
  const float scale = job.p.x_scale[job.p.x_scale_rows.offset(m)];
  const auto value = [&](int64_t at, int64_t of_bias, float (&t)[4]) {
    read(at, t);
    float bias[4];
    Four::load(job.p.bias, job.p.bias_dtype, of_bias, job.p.bias != nullptr, bias);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      t[i] = job.p.bias == nullptr ? scale * t[i] : fmaf(scale, t[i], bias[i]);
      if (!job.p.is_plain()) t[i] = four.rounded(t[i]);
    }
  };
  float t[4];
  value(n, column, t);
  finish(job.p, four, job.p.y, job.p.n, m, column, true, t,
         [&](float (&up)[4]) { value(n + 8, job.p.n / 2 + column, up); });
}

}  // namespace int4_int8

Status int4_int8_gemm_tiled(const Int4Int8Job& job, const Queue& queue);

}  // namespace qops::cuda
