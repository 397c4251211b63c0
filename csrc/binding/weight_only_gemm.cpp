#include "binding/device.h"
#include "binding/ops.h"

namespace qops::binding {
namespace {

// The arguments that int4_gemm and int8_weight_only_gemm share. strip_elements_per_column: elements of `packed` that
// one column of a strip takes (8 bytes for int4, 16 for int8).
WeightOnlyGemmParams checked(const Checker& check, const Tensor& x, const Tensor& packed, ScalarType packed_dtype,
                             int64_t strip_elements_per_column, const Tensor& scales, const std::optional<Tensor>& bias,
                             int64_t out_features, int64_t group_size) {
  WeightOnlyGemmParams p{};
  check.device(packed, "packed", x);
  check.device(scales, "scales", x);
  p.dtype = check.float_dtype(x, "x");
  check.dtype(packed, "packed", packed_dtype);
  p.scale_dtype = check.float_dtype(scales, "scales");
  check.at_least_1d(x, "x");
  p.n = out_features;
  check.require(p.n >= 0 && p.n % 8 == 0, "out_features", "be a multiple of 8", std::to_string(p.n));
  check.require(packed.dim() == 2, "packed", "have 2 dimensions", std::to_string(packed.dim()));
  p.k = packed.size(1) / strip_elements_per_column;
  check.require(packed.size(1) % (8 * strip_elements_per_column) == 0, "packed",
                "hold a multiple of 8 columns of " + std::to_string(strip_elements_per_column) + " elements a strip",
                std::to_string(packed.size(1)));
  const int64_t strips = p.n / kStripRows + (p.n % kStripRows != 0);
  check.shape(packed, "packed", "[S, K-strip]", {strips, p.k * strip_elements_per_column});
  check.require(x.size(x.dim() - 1) == p.k, "x", "have last dimension K = " + std::to_string(p.k),
                std::to_string(x.size(x.dim() - 1)));
  p.group_size = group_size;
  const bool per_channel = group_size == p.k;
  check.require(per_channel || (group_size > 0 && group_size % 16 == 0 && p.k % group_size == 0), "group_size",
                "be K = " + std::to_string(p.k) + " or a multiple of 16 that divides it", std::to_string(group_size));
  const int64_t groups = group_size == 0 ? 0 : p.k / group_size;
  check.shape(scales, "scales", "[S, K / group_size, 16]", {strips, groups, kStripRows});
  check.contiguous(packed, "packed");
  check.contiguous(scales, "scales");
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
  p.packed = packed.const_data_ptr();
  p.scales = scales.const_data_ptr();
  return p;
}

constexpr Checker check_int4("int4_gemm");
constexpr Checker check_int8("int8_weight_only_gemm");

WeightOnlyGemmParams checked_int4(const Tensor& x, const Tensor& packed, const Tensor& scales,
                                  const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                                  const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size,
                                  int64_t kind) {
  const Checker& check = check_int4;
  check.require(kind >= 0 && kind <= 3, "kind", "be 0 (symmetric), 1 (zero_point), 2 (float_zero) or 3 (offset)",
                std::to_string(kind));
  WeightOnlyGemmParams p = checked(check, x, packed, ScalarType::Byte, 8, scales, bias, out_features, group_size);
  p.kind = static_cast<WeightKind>(kind);
  check.require(zeros.has_value() == (kind != 0), "zeros", kind == 0 ? "be None for kind 0" : "be given for this kind",
                zeros ? "a tensor" : "None");
  if (zeros) {
    check.device(*zeros, "zeros", x);
    check.dtype(*zeros, "zeros", kind == 1 ? ScalarType::Byte : ScalarType::Float);
    check.same_shape(*zeros, "zeros", scales, "scales");
    check.contiguous(*zeros, "zeros");
    p.zeros = zeros->const_data_ptr();
  }
  if (perm) {
    check.device(*perm, "perm", x);
    check.dtype(*perm, "perm", ScalarType::Int);
    check.shape(*perm, "perm", "[K]", {p.k});
    check.contiguous(*perm, "perm");
    p.perm = perm->const_data_ptr<int32_t>();
  }
  return p;
}

WeightOnlyGemmParams checked_int8(const Tensor& x, const Tensor& packed, const Tensor& scales,
                                  const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size) {
  return checked(check_int8, x, packed, ScalarType::Char, 16, scales, bias, out_features, group_size);
}

Tensor new_output(const Checker& check, const Tensor& x, int64_t out_features) {
  return check.new_tensor(x, with_last_size(x, out_features), x.scalar_type());
}

void check_output(const Checker& check, const Tensor& out, const Tensor& x, const Tensor& packed, const Tensor& scales,
                  const std::optional<Tensor>& bias, int64_t out_features) {
  check.output(out, "out", x, x.scalar_type(), "[..., N]", with_last_size(x, out_features));
  check.no_overlap(out, "out", x, "x");
  check.no_overlap(out, "out", packed, "packed");
  check.no_overlap(out, "out", scales, "scales");
  if (bias) check.no_overlap(out, "out", *bias, "bias");
}

void run_int4(WeightOnlyGemmParams& p, const Tensor& y) {
  p.y = y.mutable_data_ptr();
  int64_t bad_index = 0;
  p.bad_index = &bad_index;
  const Status status = device::run(&device::kernels::int4_gemm, p, y);
  if (status == Status::kIndexOutOfRange) {
    check_int4.refuse("perm", "hold indices in 0 .. " + std::to_string(p.k - 1), std::to_string(bad_index));
  }
  check_int4.ok(status);
}

void run_int8(WeightOnlyGemmParams& p, const Tensor& y) {
  p.y = y.mutable_data_ptr();
  check_int8.ok(device::run(&device::kernels::int8_weight_only_gemm, p, y));
}

}  // namespace

// batch_invariant asks for nothing more here: on the CPU a row's bits never depend on M or on its position.
Tensor int4_gemm(const Tensor& x, const Tensor& packed, const Tensor& scales, std::optional<Tensor> zeros,
                 std::optional<Tensor> perm, std::optional<Tensor> bias, int64_t out_features, int64_t group_size,
                 int64_t kind, bool /*batch_invariant*/) {
  WeightOnlyGemmParams p = checked_int4(x, packed, scales, zeros, perm, bias, out_features, group_size, kind);
  Tensor y = new_output(check_int4, x, out_features);
  run_int4(p, y);
  return y;
}

void int4_gemm_out(const Tensor& x, const Tensor& packed, const Tensor& scales, std::optional<Tensor> zeros,
                   std::optional<Tensor> perm, std::optional<Tensor> bias, int64_t out_features, int64_t group_size,
                   int64_t kind, bool /*batch_invariant*/, const Tensor& out) {
  WeightOnlyGemmParams p = checked_int4(x, packed, scales, zeros, perm, bias, out_features, group_size, kind);
  check_output(check_int4, out, x, packed, scales, bias, out_features);
  if (zeros) check_int4.no_overlap(out, "out", *zeros, "zeros");
  if (perm) check_int4.no_overlap(out, "out", *perm, "perm");
  run_int4(p, out);
}

Tensor int8_weight_only_gemm(const Tensor& x, const Tensor& packed, const Tensor& scales, std::optional<Tensor> bias,
                             int64_t out_features, int64_t group_size) {
  WeightOnlyGemmParams p = checked_int8(x, packed, scales, bias, out_features, group_size);
  Tensor y = new_output(check_int8, x, out_features);
  run_int8(p, y);
  return y;
}

void int8_weight_only_gemm_out(const Tensor& x, const Tensor& packed, const Tensor& scales, std::optional<Tensor> bias,
                               int64_t out_features, int64_t group_size, const Tensor& out) {
  WeightOnlyGemmParams p = checked_int8(x, packed, scales, bias, out_features, group_size);
  check_output(check_int8, out, x, packed, scales, bias, out_features);
  run_int8(p, out);
}

}  // namespace qops::binding
