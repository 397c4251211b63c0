// int4_gemm on AMX tiles; the method stands in weight_only_gemm_amx.h, that of few rows in weight_only_gemm_few_amx.h.
// Calls of fewer stay with AVX-512.
#include "cpu/kernel_table.h"
#include "cpu/weight_only_gemm_few_amx.h"

namespace qops::cpu::QOPS_ISA_NS {

Status int4_gemm(const WeightOnlyGemmParams& p, const ThreadPool& pool) {
  if (takes_few_rows(p)) {
    return p.dtype == DType::kBFloat16 ? few_rows_int4_gemm<BFloat16>(p, pool) : few_rows_int4_gemm<Half>(p, pool);
  }
  if (!takes_tiles<Int4Codes>(p)) return avx512::int4_gemm(p, pool);
  return p.dtype == DType::kBFloat16 ? tiled_weight_only_gemm<Int4Codes, BFloat16>(p, pool)
                                     : tiled_weight_only_gemm<Int4Codes, Half>(p, pool);
}

}  // namespace qops::cpu::QOPS_ISA_NS
