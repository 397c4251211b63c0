// int8_weight_only_gemm: group-quantised 8-bit weights; the method stands in weight_only_gemm.h.
#include "cpu/weight_only_gemm.h"

namespace qops::cpu::QOPS_ISA_NS {

Status int8_weight_only_gemm(const WeightOnlyGemmParams& p, const ThreadPool& pool) {
  return with_dtype(p.dtype, [&](auto* element) {
    return weight_only_gemm<Int8Codes, std::remove_pointer_t<decltype(element)>>(p, pool);
  });
}

const TeamProduct<WeightOnlyGemmParams>& int8_weight_only_team_product(DType dtype) {
  return weight_only_team_product<Int8Codes>(dtype);
}

}  // namespace qops::cpu::QOPS_ISA_NS
