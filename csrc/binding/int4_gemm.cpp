#include "binding/device.h"
#include "binding/weight_only_gemm.h"

namespace qops::binding {
namespace {

constexpr Checker check("int4_gemm");

WeightOnlyGemmParams checked(const Tensor& x, const Tensor& packed, const Tensor& scales,
                             const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                             const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size,
                             int64_t kind) {
  WeightOnlyGemmParams p =
      weight_only_gemm_params(check, x, packed, ScalarType::Byte, 8, scales, bias, out_features, group_size);
  take_zeros(check, kind, zeros, scales, p);
  take_perm(check, perm, x, p);
  return p;
}

void run(WeightOnlyGemmParams& p, const Tensor& y, bool batch_invariant) {
  p.y = y.mutable_data_ptr();
  p.batch_invariant = batch_invariant;
#if defined(QOPS_CUDA)
  torch::stable::Device device = y.device();
  p.product = {&device::dense_product, &device};
  const std::optional<Tensor> scratch = device::take_scratch(check, &cuda::int4_gemm_scratch_bytes, p, y);
#endif
  run_product(check, &device::kernels::int4_gemm, p, y);
}

// On the CPU a row's bits never depend on M or on its position.
Tensor int4_gemm(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                 const std::optional<Tensor>& perm, const std::optional<Tensor>& bias, int64_t out_features,
                 int64_t group_size, int64_t kind, bool batch_invariant) {
  WeightOnlyGemmParams p = checked(x, packed, scales, zeros, perm, bias, out_features, group_size, kind);
  Tensor y = new_output(check, x, p);
  run(p, y, batch_invariant);
  return y;
}

void int4_gemm_out(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                   const std::optional<Tensor>& perm, const std::optional<Tensor>& bias, int64_t out_features,
                   int64_t group_size, int64_t kind, bool batch_invariant, const Tensor& out) {
  WeightOnlyGemmParams p = checked(x, packed, scales, zeros, perm, bias, out_features, group_size, kind);
  check_output(check, out, x, packed, scales, zeros, perm, bias, p);
  run(p, out, batch_invariant);
}

Tensor int4_gemm_fused(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                       const std::optional<Tensor>& perm, const std::optional<Tensor>& bias, int64_t out_features,
                       int64_t group_size, int64_t kind, bool batch_invariant, const std::optional<Tensor>& residual,
                       bool silu_mul, const std::optional<Tensor>& out_scale,
                       const std::optional<Tensor>& out_zero_point) {
  WeightOnlyGemmParams p = checked(x, packed, scales, zeros, perm, bias, out_features, group_size, kind);
  take_epilogue(check, x, residual, silu_mul, out_scale, out_zero_point, p);
  Tensor y = new_output(check, x, p);
  run(p, y, batch_invariant);
  return y;
}

void int4_gemm_fused_out(const Tensor& x, const Tensor& packed, const Tensor& scales,
                         const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                         const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size, int64_t kind,
                         bool batch_invariant, const std::optional<Tensor>& residual, bool silu_mul,
                         const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point,
                         const Tensor& out) {
  WeightOnlyGemmParams p = checked(x, packed, scales, zeros, perm, bias, out_features, group_size, kind);
  take_epilogue(check, x, residual, silu_mul, out_scale, out_zero_point, p);
  check_output(check, out, x, packed, scales, zeros, perm, bias, p);
  if (out_scale) check.no_overlap(out, "out", *out_scale, "out_scale");
  if (out_zero_point) check.no_overlap(out, "out", *out_zero_point, "out_zero_point");
  if (residual) check.no_overlap_unless_same(out, "out", *residual, "residual");
  run(p, out, batch_invariant);
}

}  // namespace

QOPS_REGISTER(m) {
  m.impl("int4_gemm", TORCH_BOX(&int4_gemm));
  m.impl("int4_gemm.out", TORCH_BOX(&int4_gemm_out));
  m.impl("int4_gemm.fused", TORCH_BOX(&int4_gemm_fused));
  m.impl("int4_gemm.fused_out", TORCH_BOX(&int4_gemm_fused_out));
}

QOPS_EXPLAIN(int4_gemm, WeightOnlyGemmParams, int4_gemm)

}  // namespace qops::binding
