#include "binding/device.h"
#include "binding/weight_only_gemm.h"

namespace qops::binding {
namespace {

constexpr Checker check("int8_weight_only_gemm");

WeightOnlyGemmParams checked(const Tensor& x, const Tensor& packed, const Tensor& scales,
                             const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                             const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size) {
  WeightOnlyGemmParams p =
      weight_only_gemm_params(check, x, packed, ScalarType::Char, 16, scales, bias, out_features, group_size);
  take_zeros(check, static_cast<int64_t>(zeros ? WeightKind::kOffset : WeightKind::kSymmetric), zeros, scales, p);
  take_perm(check, perm, x, p);
  return p;
}

void run(WeightOnlyGemmParams& p, const Tensor& y) {
  p.y = y.mutable_data_ptr();
#if defined(QOPS_CUDA)
  const std::optional<Tensor> scratch = device::take_scratch(check, &cuda::int8_weight_only_gemm_scratch_bytes, p, y);
#endif
  run_product(check, &device::kernels::int8_weight_only_gemm, p, y);
}

Tensor int8_weight_only_gemm(const Tensor& x, const Tensor& packed, const Tensor& scales,
                             const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                             const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size) {
  WeightOnlyGemmParams p = checked(x, packed, scales, zeros, perm, bias, out_features, group_size);
  Tensor y = new_output(check, x, p);
  run(p, y);
  return y;
}

void int8_weight_only_gemm_out(const Tensor& x, const Tensor& packed, const Tensor& scales,
                               const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                               const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size,
                               const Tensor& out) {
  WeightOnlyGemmParams p = checked(x, packed, scales, zeros, perm, bias, out_features, group_size);
  check_output(check, out, x, packed, scales, zeros, perm, bias, p);
  run(p, out);
}

}  // namespace

QOPS_REGISTER(m) {
  m.impl("int8_weight_only_gemm", TORCH_BOX(&int8_weight_only_gemm));
  m.impl("int8_weight_only_gemm.out", TORCH_BOX(&int8_weight_only_gemm_out));
}

QOPS_EXPLAIN(int8_weight_only_gemm, WeightOnlyGemmParams, int8_weight_only_gemm)

}  // namespace qops::binding
