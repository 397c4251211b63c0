// int4_gemm: group-quantised 4-bit weights; the method stands in weight_only_gemm.h.
#include "cpu/weight_only_gemm.h"

namespace qops::cpu::QOPS_ISA_NS {

Status int4_gemm(const WeightOnlyGemmParams& p, const ThreadPool& pool) {
  return with_dtype(p.dtype, [&](auto* element) {
    return weight_only_gemm<Int4Codes, std::remove_pointer_t<decltype(element)>>(p, pool);
  });
}

const TeamProduct<WeightOnlyGemmParams>& int4_team_product(DType dtype) {
  return weight_only_team_product<Int4Codes>(dtype);
}

}  // namespace qops::cpu::QOPS_ISA_NS
