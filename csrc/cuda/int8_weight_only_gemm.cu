// int8_weight_only_gemm: as int4_gemm, without a route through cuBLAS, so that a row's bits never depend on M.
#include "cuda/weight_only_gemm.cuh"

namespace qops::cuda {

int64_t int8_weight_only_gemm_scratch_bytes(const WeightOnlyGemmParams& p) {
  return weight_only_gemm_scratch_bytes(p, 8);
}

Status int8_weight_only_gemm(const WeightOnlyGemmParams& p, const Queue& queue) {
  return weight_only_gemm(p, {8, &int8_weight_only_gemm_decode, &int8_weight_only_gemm_tiled}, queue);
}

}  // namespace qops::cuda
