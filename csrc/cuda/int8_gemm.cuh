// What int8_gemm.cu shares with the kernels of int8_gemm_tiled.cu: the job, and the way from sums to y.
#pragma once

#include "cuda/gemm_epilogue.cuh"
#include "cuda/int8_config.h"

namespace qops::cuda {

struct Int8Job {
  Int8GemmParams p;
  int8::Plan plan;
  int32_t* partials;  // of tiles that blocks share
  bool y_aligned;     // four columns of it at a time
};

namespace int8 {

// Four columns of the product, and what belongs to them.
class Columns {
 public:
  QOPS_DEVICE Columns(const Int8Job& job, int64_t n) : n_(n), inside_(n < job.p.n) {
    Four::load(job.p.w_scale, job.p.w_scale_dtype, n, inside_ && job.p.k > 0, scale_);
    const int64_t row = job.p.epilogue == Epilogue::kSiluMul ? unmixed_row(n, job.p.n) : n;
    Four::load(job.p.bias, job.p.bias_dtype, row, inside_ && job.p.bias != nullptr, bias_);
  }

  // By all threads of a warp, with four columns of a row each; of rows past M nothing is stored.
  QOPS_DEVICE void store(const Int8Job& job, int64_t m, const uint4& sums) const {
    const bool valid = inside_ && m < job.p.q_rows.count;
    const uint32_t acc[4] = {sums.x, sums.y, sums.z, sums.w};
    const Four four{job.p.dtype, job.y_aligned};
    if (job.p.dtype == DType::kInt32) {
      if (valid) four.store_words(job.p.y, m * job.p.n + n_, acc);
      return;
    }
    const float scale = valid ? job.p.scale[job.p.scale_rows.offset(m)] : 0.0f;
    float t[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float product = static_cast<float>(static_cast<int32_t>(acc[i])) * scale_[i];
      t[i] = job.p.bias == nullptr ? scale * product : fmaf(scale, product, bias_[i]);
      if (!job.p.is_plain()) t[i] = four.rounded(t[i]);
    }
    const bool is_mixed = job.p.epilogue == Epilogue::kSiluMul;
    const bool is_up = is_mixed && n_ % kStripRows >= 8;
    finish(job.p, four, job.p.y, job.p.n, m, is_mixed ? unmixed_row(n_, job.p.n) : n_, valid && !is_up, t,
           [&](float (&up)[4]) {
#pragma unroll
             for (int i = 0; i < 4; ++i)
               up[i] = __shfl_xor_sync(kAllLanes, t[i], 2);  // 8 columns, so two lanes, further
           });
  }

 private:
  int64_t n_;
  bool inside_;
  float scale_[4], bias_[4];
};

}  // namespace int8

Status int8_gemm_tiled(const Int8Job& job, const Queue& queue);

}  // namespace qops::cuda
