#include "binding/device.h"
#include "binding/weight_only_gemm.h"

namespace qops::binding {

template <class Visitor>
void describe_call(Int4Int8GemmParams& p, Visitor& v) {
  describe_product(p.x_rows, p.n, p.k, v);
  describe_groups(p, v);
  v.dtype("out_dtype", p.dtype);
  v.when_asked([&](const Checker& check) { check_limits_of_int8(check, "k", p.k, p.group_size); });
  describe_kind(p, v);
  v.given("perm", p.perm);
  describe_epilogue(p, v);
}

namespace {

constexpr Checker check("int4_int8_gemm");
#if defined(QOPS_CUDA)
constexpr Checker check_quantize("quantize_int8");
#endif

// subject: "out must have dtype" or this.
constexpr const char* kOutDtype = "out_dtype must be";
DType y_dtype(ScalarType dtype, const char* subject) {
  switch (dtype) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: check.unsupported(std::string(subject) + " float32, float16 or bfloat16, got " + dtype_name(dtype));
  }
}

// Everything but the output; called before anything is allocated.
Int4Int8GemmParams checked(const Tensor& q, const Tensor& scale, const Tensor& packed, const Tensor& scales,
                           const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                           const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size, int64_t kind,
                           ScalarType out_dtype, const char* out_subject) {
  Int4Int8GemmParams p{};
  check.device(q, "q", q);
  check.device(scale, "scale", q);
  check.device(packed, "packed", q);
  check.device(scales, "scales", q);
  if (bias) check.device(*bias, "bias", q);
  check.dtype(q, "q", ScalarType::Char);
  check.dtype(scale, "scale", ScalarType::Float);
  p.dtype = y_dtype(out_dtype, out_subject);
  check.at_least_1d(q, "q");
  take_weight(check, packed, ScalarType::Byte, 8, scales, out_features, group_size, p);
  const int64_t columns = q.size(q.dim() - 1);
  if (columns != p.k) check.refuse("q", "have last dimension K = " + std::to_string(p.k), std::to_string(columns));
  check_limits_of_int8(check, "q", p.k, group_size);
  check.dense_last_dim(q, "q");
  p.x_rows = check.rows(q, "q");
  p.x_scale_rows = per_row(check, scale, "scale", q, p.x_rows.count);
  if (bias) {
    p.bias_dtype = check.float_dtype(*bias, "bias");
    check.shape(*bias, "bias", "[N]", {p.n});
    check.dense_last_dim(*bias, "bias");
    p.bias = bias->const_data_ptr();
  }
  p.x = q.const_data_ptr();
  p.x_scale = scale.const_data_ptr<float>();
  take_zeros(check, kind, zeros, scales, p);
  take_perm(check, perm, q, p);
  return p;
}

void check_out(const Tensor& out, const Tensor& q, const Tensor& scale, const Tensor& packed, const Tensor& scales,
               const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm, const std::optional<Tensor>& bias,
               const Int4Int8GemmParams& p) {
  check_output(check, out, q, p);
  check.no_overlap(out, "out", q, "q");
  check.no_overlap(out, "out", scale, "scale");
  check.no_overlap(out, "out", packed, "packed");
  check.no_overlap(out, "out", scales, "scales");
  if (zeros) check.no_overlap(out, "out", *zeros, "zeros");
  if (perm) check.no_overlap(out, "out", *perm, "perm");
  if (bias) check.no_overlap(out, "out", *bias, "bias");
}

void run(Int4Int8GemmParams& p, const Tensor& y) {
  p.y = y.mutable_data_ptr();
#if defined(QOPS_CUDA)
  const std::optional<Tensor> scratch = device::take_scratch(check, &cuda::int4_int8_gemm_scratch_bytes, p, y);
#endif
  run_product(check, &device::kernels::int4_int8_gemm, p, y);
}

Tensor int4_int8_gemm(const Tensor& q, const Tensor& scale, const Tensor& packed, const Tensor& scales,
                      const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                      const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size, int64_t kind,
                      ScalarType out_dtype) {
  Int4Int8GemmParams p =
      checked(q, scale, packed, scales, zeros, perm, bias, out_features, group_size, kind, out_dtype, kOutDtype);
  Tensor y = new_output(check, q, p);
  run(p, y);
  return y;
}

void int4_int8_gemm_out(const Tensor& q, const Tensor& scale, const Tensor& packed, const Tensor& scales,
                        const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                        const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size, int64_t kind,
                        const Tensor& out) {
  check.device(q, "q", q);
  check.device(out, "out", q);
  Int4Int8GemmParams p = checked(q, scale, packed, scales, zeros, perm, bias, out_features, group_size, kind,
                                 check.dtype_of(out, "out"), "out must have dtype");
  check_out(out, q, scale, packed, scales, zeros, perm, bias, p);
  run(p, out);
}

Tensor int4_int8_gemm_fused(const Tensor& q, const Tensor& scale, const Tensor& packed, const Tensor& scales,
                            const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                            const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size, int64_t kind,
                            ScalarType out_dtype, const std::optional<Tensor>& residual, bool silu_mul,
                            const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point) {
  Int4Int8GemmParams p =
      checked(q, scale, packed, scales, zeros, perm, bias, out_features, group_size, kind, out_dtype, kOutDtype);
  take_epilogue(check, q, residual, silu_mul, out_scale, out_zero_point, p);
  Tensor y = new_output(check, q, p);
  run(p, y);
  return y;
}

void int4_int8_gemm_fused_out(const Tensor& q, const Tensor& scale, const Tensor& packed, const Tensor& scales,
                              const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                              const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size, int64_t kind,
                              ScalarType out_dtype, const std::optional<Tensor>& residual, bool silu_mul,
                              const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point,
                              const Tensor& out) {
  Int4Int8GemmParams p =
      checked(q, scale, packed, scales, zeros, perm, bias, out_features, group_size, kind, out_dtype, kOutDtype);
  take_epilogue(check, q, residual, silu_mul, out_scale, out_zero_point, p);
  check_out(out, q, scale, packed, scales, zeros, perm, bias, p);
  if (out_scale) check.no_overlap(out, "out", *out_scale, "out_scale");
  if (out_zero_point) check.no_overlap(out, "out", *out_zero_point, "out_zero_point");
  if (residual) check.no_overlap_unless_same(out, "out", *residual, "residual");
  run(p, out);
}

// y of x, which becomes int8 first: on a CPU inside of the kernel, on a GPU by a kernel before it.
void run_of_floats(Int4Int8GemmParams& p, [[maybe_unused]] const Tensor& x, const Tensor& y) {
#if defined(QOPS_CUDA)
  const auto [q, scale] = new_int8_rows(check, x, p.k);
  QuantizeInt8Params quantised{p.x, p.x_rows, p.dtype, p.k, int8_output(q, scale, p.rule)};
  check_quantize.ok(device::run(check_quantize, &device::kernels::quantize_int8, quantised, q));
  p.x = q.const_data_ptr();
  p.x_rows = dense_rows(p.x_rows.count, p.k);
  p.x_scale = scale.const_data_ptr<float>();
  p.x_scale_rows = dense_rows(p.x_rows.count, 1);
#endif
  run(p, y);
}

// quantize_int8 and the product in one operator, bit for bit: of few rows a second one would cost as much as a fifth of
// the call.
Int4Int8GemmParams checked_floats(const Tensor& x, std::string_view rule, const Tensor& packed, const Tensor& scales,
                                  const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                                  const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size,
                                  int64_t kind, const std::optional<Tensor>& residual, bool silu_mul,
                                  const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point) {
  Int4Int8GemmParams p{};
  static_cast<WeightOnlyGemmParams&>(p) =
      weight_only_gemm_params(check, x, packed, ScalarType::Byte, 8, scales, bias, out_features, group_size);
  check_limits_of_int8(check, "x", p.k, group_size);
  p.rule = check.quantize_rule(rule);
  take_zeros(check, kind, zeros, scales, p);
  take_perm(check, perm, x, p);
  take_epilogue(check, x, residual, silu_mul, out_scale, out_zero_point, p);
  return p;
}

Tensor int4_int8_gemm_of_floats(const Tensor& x, std::string_view rule, const Tensor& packed, const Tensor& scales,
                                const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                                const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size,
                                int64_t kind, const std::optional<Tensor>& residual, bool silu_mul,
                                const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point) {
  Int4Int8GemmParams p = checked_floats(x, rule, packed, scales, zeros, perm, bias, out_features, group_size, kind,
                                        residual, silu_mul, out_scale, out_zero_point);
  Tensor y = new_output(check, x, p);
  run_of_floats(p, x, y);
  return y;
}

void int4_int8_gemm_of_floats_out(const Tensor& x, std::string_view rule, const Tensor& packed, const Tensor& scales,
                                  const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                                  const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size,
                                  int64_t kind, const std::optional<Tensor>& residual, bool silu_mul,
                                  const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point,
                                  const Tensor& out) {
  Int4Int8GemmParams p = checked_floats(x, rule, packed, scales, zeros, perm, bias, out_features, group_size, kind,
                                        residual, silu_mul, out_scale, out_zero_point);
  check_output(check, out, x, packed, scales, zeros, perm, bias, p);
  if (out_scale) check.no_overlap(out, "out", *out_scale, "out_scale");
  if (out_zero_point) check.no_overlap(out, "out", *out_zero_point, "out_zero_point");
  if (residual) check.no_overlap_unless_same(out, "out", *residual, "residual");
  run_of_floats(p, x, out);
}

}  // namespace

QOPS_REGISTER(m) {
  m.impl("int4_int8_gemm", TORCH_BOX(&int4_int8_gemm));
  m.impl("int4_int8_gemm.out", TORCH_BOX(&int4_int8_gemm_out));
  m.impl("int4_int8_gemm.fused", TORCH_BOX(&int4_int8_gemm_fused));
  m.impl("int4_int8_gemm.fused_out", TORCH_BOX(&int4_int8_gemm_fused_out));
  m.impl("int4_int8_gemm.of_floats", TORCH_BOX(&int4_int8_gemm_of_floats));
  m.impl("int4_int8_gemm.of_floats_out", TORCH_BOX(&int4_int8_gemm_of_floats_out));
}

QOPS_EXPLAIN(int4_int8_gemm, Int4Int8GemmParams, int4_int8_gemm)

}  // namespace qops::binding
