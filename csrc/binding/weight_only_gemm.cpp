#include "binding/device.h"
#include "binding/gemm_epilogue.h"
#include "binding/ops.h"
#include "binding/weight_strips.h"

namespace qops::binding {
namespace {

// The arguments that int4_gemm and int8_weight_only_gemm share.
WeightOnlyGemmParams checked(const Checker& check, const Tensor& x, const Tensor& packed, ScalarType packed_dtype,
                             int64_t strip_elements_per_column, const Tensor& scales, const std::optional<Tensor>& bias,
                             int64_t out_features, int64_t group_size) {
  WeightOnlyGemmParams p{};
  check.device(x, "x", x);
  check.device(packed, "packed", x);
  check.device(scales, "scales", x);
  p.dtype = check.float_dtype(x, "x");
  check.at_least_1d(x, "x");
  take_weight(check, packed, packed_dtype, strip_elements_per_column, scales, out_features, group_size, p);
  if (x.size(x.dim() - 1) != p.k) {
    check.refuse("x", "have last dimension K = " + std::to_string(p.k), std::to_string(x.size(x.dim() - 1)));
  }
  check.dense_last_dim(x, "x");
  if (bias) {
    check.device(*bias, "bias", x);
    p.bias_dtype = check.float_dtype(*bias, "bias");
    check.shape(*bias, "bias", "[N]", {p.n});
    check.dense_last_dim(*bias, "bias");
    p.bias = bias->const_data_ptr();
  }
  p.x_rows = check.rows(x, "x");
  p.x = x.const_data_ptr();
  return p;
}

constexpr Checker check_int4("int4_gemm");

WeightOnlyGemmParams checked_int4(const Tensor& x, const Tensor& packed, const Tensor& scales,
                                  const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                                  const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size,
                                  int64_t kind) {
  const Checker& check = check_int4;
  WeightOnlyGemmParams p = checked(check, x, packed, ScalarType::Byte, 8, scales, bias, out_features, group_size);
  if (kGpuLayout && p.dtype == DType::kFloat32) {
    check.unsupported("x must have dtype float16 or bfloat16 on a GPU, got float32");
  }
  take_zeros(check, kind, zeros, scales, p);
  if (perm) {
    check.device(*perm, "perm", x);
    check.dtype(*perm, "perm", ScalarType::Int);
    check.shape(*perm, "perm", "[K]", {p.k});
    check.contiguous(*perm, "perm");
    p.perm = perm->const_data_ptr<int32_t>();
  }
  return p;
}

void check_output(const Checker& check, const Tensor& out, const Tensor& x, const Tensor& packed, const Tensor& scales,
                  const std::optional<Tensor>& bias, const WeightOnlyGemmParams& p) {
  check_output(check, out, x, p);
  check.no_overlap(out, "out", x, "x");
  check.no_overlap(out, "out", packed, "packed");
  check.no_overlap(out, "out", scales, "scales");
  if (bias) check.no_overlap(out, "out", *bias, "bias");
}

void check_int4_output(const Tensor& out, const Tensor& x, const Tensor& packed, const Tensor& scales,
                       const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                       const std::optional<Tensor>& bias, const WeightOnlyGemmParams& p) {
  check_output(check_int4, out, x, packed, scales, bias, p);
  if (zeros) check_int4.no_overlap(out, "out", *zeros, "zeros");
  if (perm) check_int4.no_overlap(out, "out", *perm, "perm");
}

void run_int4(WeightOnlyGemmParams& p, const Tensor& y, bool batch_invariant) {
  p.y = y.mutable_data_ptr();
  p.batch_invariant = batch_invariant;
  int64_t bad_index = 0;
  p.bad_index = &bad_index;
#if defined(QOPS_CUDA)
  torch::stable::Device device = y.device();
  p.product = {&device::dense_product, &device};
  // From the allocator of torch, for this call: it keeps the memory from others until this stream is done with it.
  const int64_t bytes = device::scratch_bytes(&cuda::int4_gemm_scratch_bytes, p, y);
  std::optional<Tensor> scratch;
  if (bytes > 0) {
    scratch = check_int4.new_tensor(y, {bytes}, ScalarType::Byte);
    p.scratch = scratch->mutable_data_ptr();
  }
#endif
  const Status status = device::run(&device::kernels::int4_gemm, p, y);
  if (status == Status::kIndexOutOfRange) {
    check_int4.refuse("perm", "hold indices in 0 .. " + std::to_string(p.k - 1), std::to_string(bad_index));
  }
  check_int4.ok(status);
}

}  // namespace

// On the CPU a row's bits never depend on M or on its position.
Tensor int4_gemm(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                 const std::optional<Tensor>& perm, const std::optional<Tensor>& bias, int64_t out_features,
                 int64_t group_size, int64_t kind, bool batch_invariant) {
  WeightOnlyGemmParams p = checked_int4(x, packed, scales, zeros, perm, bias, out_features, group_size, kind);
  Tensor y = new_output(check_int4, x, p);
  run_int4(p, y, batch_invariant);
  return y;
}

void int4_gemm_out(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                   const std::optional<Tensor>& perm, const std::optional<Tensor>& bias, int64_t out_features,
                   int64_t group_size, int64_t kind, bool batch_invariant, const Tensor& out) {
  WeightOnlyGemmParams p = checked_int4(x, packed, scales, zeros, perm, bias, out_features, group_size, kind);
  check_int4_output(out, x, packed, scales, zeros, perm, bias, p);
  run_int4(p, out, batch_invariant);
}

Tensor int4_gemm_fused(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                       const std::optional<Tensor>& perm, const std::optional<Tensor>& bias, int64_t out_features,
                       int64_t group_size, int64_t kind, bool batch_invariant, const std::optional<Tensor>& residual,
                       bool silu_mul, const std::optional<Tensor>& out_scale,
                       const std::optional<Tensor>& out_zero_point) {
  WeightOnlyGemmParams p = checked_int4(x, packed, scales, zeros, perm, bias, out_features, group_size, kind);
  take_epilogue(check_int4, x, residual, silu_mul, out_scale, out_zero_point, p);
  Tensor y = new_output(check_int4, x, p);
  run_int4(p, y, batch_invariant);
  return y;
}

void int4_gemm_fused_out(const Tensor& x, const Tensor& packed, const Tensor& scales,
                         const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                         const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size, int64_t kind,
                         bool batch_invariant, const std::optional<Tensor>& residual, bool silu_mul,
                         const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point,
                         const Tensor& out) {
  WeightOnlyGemmParams p = checked_int4(x, packed, scales, zeros, perm, bias, out_features, group_size, kind);
  take_epilogue(check_int4, x, residual, silu_mul, out_scale, out_zero_point, p);
  check_int4_output(out, x, packed, scales, zeros, perm, bias, p);
  if (out_scale) check_int4.no_overlap(out, "out", *out_scale, "out_scale");
  if (out_zero_point) check_int4.no_overlap(out, "out", *out_zero_point, "out_zero_point");
  if (residual) check_int4.no_overlap_unless_same(out, "out", *residual, "residual");
  run_int4(p, out, batch_invariant);
}

#if !defined(QOPS_CUDA)

namespace {

constexpr Checker check_int8("int8_weight_only_gemm");

WeightOnlyGemmParams checked_int8(const Tensor& x, const Tensor& packed, const Tensor& scales,
                                  const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size) {
  return checked(check_int8, x, packed, ScalarType::Char, 16, scales, bias, out_features, group_size);
}

void run_int8(WeightOnlyGemmParams& p, const Tensor& y) {
  p.y = y.mutable_data_ptr();
  check_int8.ok(device::run(&device::kernels::int8_weight_only_gemm, p, y));
}

}  // namespace

Tensor int8_weight_only_gemm(const Tensor& x, const Tensor& packed, const Tensor& scales, std::optional<Tensor> bias,
                             int64_t out_features, int64_t group_size) {
  WeightOnlyGemmParams p = checked_int8(x, packed, scales, bias, out_features, group_size);
  Tensor y = new_output(check_int8, x, p);
  run_int8(p, y);
  return y;
}

void int8_weight_only_gemm_out(const Tensor& x, const Tensor& packed, const Tensor& scales, std::optional<Tensor> bias,
                               int64_t out_features, int64_t group_size, const Tensor& out) {
  WeightOnlyGemmParams p = checked_int8(x, packed, scales, bias, out_features, group_size);
  check_output(check_int8, out, x, packed, scales, bias, p);
  run_int8(p, out);
}

#endif

}  // namespace qops::binding
