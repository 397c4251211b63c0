// What int4_gemm.cu hands to the kernels of int4_gemm_decode.cu and int4_gemm_tiled.cu.
#pragma once

#include "cuda/int4_finish.cuh"
#include "cuda/int4_fragment.cuh"
#include "cuda/launch.h"

namespace qops::cuda {

struct Int4Job {
  WeightOnlyGemmParams p;  // x in the packed order of columns, rows at multiples of 16 bytes
  GemmPlan plan;
  Alignment aligned;
  float* sums;  // between two kernels: see GemmPlan::scratch_bytes
};

Status int4_gemm_decode(const Int4Job& job, cudaStream_t stream);
Status int4_gemm_tiled(const Int4Job& job, cudaStream_t stream);

// Calls run(T{}, fine, offset) with what both kernels are compiled for: element type, group size, kind.
template <class F>
Status with_int4_kernel(const WeightOnlyGemmParams& p, const F& run) {
  const auto with_type = [&](auto element) {
    const bool offset = has_offset(p.kind);
    if (is_fine(p.k, p.group_size)) {
      return offset ? run(element, std::true_type{}, std::true_type{})
                    : run(element, std::true_type{}, std::false_type{});
    }
    return offset ? run(element, std::false_type{}, std::true_type{})
                  : run(element, std::false_type{}, std::false_type{});
  };
  switch (p.dtype) {
    case DType::kFloat16: return with_type(__half{});
    case DType::kBFloat16: return with_type(__nv_bfloat16{});
    default: return Status::kUnsupported;
  }
}

}  // namespace qops::cuda
