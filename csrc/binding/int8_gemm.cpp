#include "binding/device.h"
#include "binding/gemm_epilogue.h"
#include "binding/weight_strips.h"

namespace qops::binding {

inline void check_columns(const Checker& check, const char* arg, int64_t k, bool has_zero_point) {
  const int64_t most = has_zero_point ? kMaxInt8ColumnsWithZeroPoint : kMaxInt8Columns;
  if (k <= most) return;
  const char* when = has_zero_point ? " columns with a zero_point" : " columns";
  check.refuse(arg, "have at most " + std::to_string(most) + when, std::to_string(k));
}

template <class Visitor>
void describe_call(Int8GemmParams& p, Visitor& v) {
  describe_product(p.q_rows, p.n, p.k, v);
  v.dtype("out_dtype", p.dtype);
  v.given("zero_point", p.zero_point);
  describe_epilogue(p, v);
  v.when_asked([&](const Checker& check) {
    check_columns(check, "q", p.k, p.zero_point != nullptr);
    const bool is_plain = p.dtype != DType::kInt32 || p.epilogue == Epilogue::kNone;
    check.require(is_plain, "epilogue", "be none where out_dtype is int32", "another one");
  });
}

namespace {

constexpr Checker check("int8_gemm");

// subject: "out must have dtype" or this.
constexpr const char* kOutDtype = "out_dtype must be";
DType y_dtype(ScalarType dtype, const char* subject) {
  switch (dtype) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Int: return DType::kInt32;
    default: check.unsupported(std::string(subject) + " float32, float16, bfloat16 or int32, got " + dtype_name(dtype));
  }
}

// Everything but the output; called before anything is allocated.
Int8GemmParams checked(const Tensor& q, const Tensor& scale, const std::optional<Tensor>& zero_point,
                       const Tensor& packed, const Tensor& w_scale, const std::optional<Tensor>& bias,
                       int64_t out_features, ScalarType out_dtype, const char* out_subject) {
  Int8GemmParams p{};
  check.device(q, "q", q);
  check.device(scale, "scale", q);
  if (zero_point) check.device(*zero_point, "zero_point", q);
  check.device(packed, "packed", q);
  check.device(w_scale, "w_scale", q);
  if (bias) check.device(*bias, "bias", q);
  check.dtype(q, "q", ScalarType::Char);
  check.dtype(scale, "scale", ScalarType::Float);
  if (zero_point) check.dtype(*zero_point, "zero_point", ScalarType::Int);
  check.dtype(packed, "packed", ScalarType::Char);
  p.w_scale_dtype = check.float_dtype(w_scale, "w_scale");
  p.dtype = y_dtype(out_dtype, out_subject);
  if (bias) p.bias_dtype = check.float_dtype(*bias, "bias");

  check.at_least_1d(q, "q");
  p.n = out_features;
  if (p.n < 0 || p.n % 8 != 0) check.refuse("out_features", "be a multiple of 8", std::to_string(p.n));
  if (packed.dim() != 2) check.refuse("packed", "have 2 dimensions", std::to_string(packed.dim()));
  if (const int64_t step = stored_columns(8); packed.size(1) % (step * kStripRows) != 0) {
    check.refuse("packed", "hold a multiple of " + std::to_string(step) + " columns of 16 elements a strip",
                 std::to_string(packed.size(1)));
  }
  const int64_t stored = packed.size(1) / kStripRows, strips = strips_of(p.n);
  check.shape(packed, "packed", "[S, 16 K]", {strips, stored * kStripRows});
  p.k = q.size(q.dim() - 1);
  if (p.k % 8 != 0 || stored_columns(p.k) != stored) {
    check.refuse("q", "have last dimension K = " + std::to_string(stored), std::to_string(p.k));
  }
  check_columns(check, "q", p.k, zero_point.has_value());
  check.shape(w_scale, "w_scale", "[S, 1, 16]", {strips, p.k == 0 ? 0 : 1, kStripRows});
  check.contiguous(packed, "packed");
  check.contiguous(w_scale, "w_scale");
  check_alignment(check, packed, "packed");
  check.dense_last_dim(q, "q");
  p.q_rows = check.rows(q, "q");
  p.scale_rows = per_row(check, scale, "scale", q, p.q_rows.count);
  p.scale = scale.const_data_ptr<float>();
  if (zero_point) {
    p.zero_point_rows = per_row(check, *zero_point, "zero_point", q, p.q_rows.count);
    p.zero_point = zero_point->const_data_ptr<int32_t>();
  }
  if (bias) {
    if (p.dtype == DType::kInt32) check.refuse("bias", "be None where the output is int32", "a tensor");
    check.shape(*bias, "bias", "[N]", {p.n});
    check.dense_last_dim(*bias, "bias");
    p.bias = bias->const_data_ptr();
  }
  p.q = q.const_data_ptr();
  p.packed = packed.const_data_ptr();
  p.w_scale = w_scale.const_data_ptr();
  return p;
}

// Integers have no epilogue.
void take_int8_epilogue(const Tensor& q, const std::optional<Tensor>& residual, bool silu_mul,
                        const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point,
                        Int8GemmParams& p) {
  if (p.dtype == DType::kInt32) {
    if (residual) check.refuse("residual", "be None where out_dtype is int32", "a tensor");
    if (silu_mul) check.refuse("silu_mul", "be False where out_dtype is int32", "True");
    if (out_scale) check.refuse("out_scale", "be None where out_dtype is int32", "a tensor");
  }
  take_epilogue(check, q, residual, silu_mul, out_scale, out_zero_point, p);
}

void check_int8_output(const Tensor& out, const Tensor& q, const Tensor& scale, const std::optional<Tensor>& zero_point,
                       const Tensor& packed, const Tensor& w_scale, const std::optional<Tensor>& bias,
                       const Int8GemmParams& p) {
  check_output(check, out, q, p);
  check.no_overlap(out, "out", q, "q");
  check.no_overlap(out, "out", scale, "scale");
  if (zero_point) check.no_overlap(out, "out", *zero_point, "zero_point");
  check.no_overlap(out, "out", packed, "packed");
  check.no_overlap(out, "out", w_scale, "w_scale");
  if (bias) check.no_overlap(out, "out", *bias, "bias");
}

void run(Int8GemmParams& p, const Tensor& y) {
  p.y = y.mutable_data_ptr();
#if defined(QOPS_CUDA)
  const std::optional<Tensor> scratch = device::take_scratch(check, &cuda::int8_gemm_scratch_bytes, p, y);
#endif
  check.ok(device::run(check, &device::kernels::int8_gemm, p, y));
}

Tensor int8_gemm(const Tensor& q, const Tensor& scale, const std::optional<Tensor>& zero_point, const Tensor& packed,
                 const Tensor& w_scale, const std::optional<Tensor>& bias, int64_t out_features, ScalarType out_dtype) {
  Int8GemmParams p = checked(q, scale, zero_point, packed, w_scale, bias, out_features, out_dtype, kOutDtype);
  Tensor y = new_output(check, q, p);
  run(p, y);
  return y;
}

void int8_gemm_out(const Tensor& q, const Tensor& scale, const std::optional<Tensor>& zero_point, const Tensor& packed,
                   const Tensor& w_scale, const std::optional<Tensor>& bias, int64_t out_features, const Tensor& out) {
  check.device(q, "q", q);
  check.device(out, "out", q);
  Int8GemmParams p = checked(q, scale, zero_point, packed, w_scale, bias, out_features, check.dtype_of(out, "out"),
                             "out must have dtype");
  check_int8_output(out, q, scale, zero_point, packed, w_scale, bias, p);
  run(p, out);
}

Tensor int8_gemm_fused(const Tensor& q, const Tensor& scale, const std::optional<Tensor>& zero_point,
                       const Tensor& packed, const Tensor& w_scale, const std::optional<Tensor>& bias,
                       int64_t out_features, ScalarType out_dtype, const std::optional<Tensor>& residual, bool silu_mul,
                       const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point) {
  Int8GemmParams p = checked(q, scale, zero_point, packed, w_scale, bias, out_features, out_dtype, kOutDtype);
  take_int8_epilogue(q, residual, silu_mul, out_scale, out_zero_point, p);
  Tensor y = new_output(check, q, p);
  run(p, y);
  return y;
}

void int8_gemm_fused_out(const Tensor& q, const Tensor& scale, const std::optional<Tensor>& zero_point,
                         const Tensor& packed, const Tensor& w_scale, const std::optional<Tensor>& bias,
                         int64_t out_features, ScalarType out_dtype, const std::optional<Tensor>& residual,
                         bool silu_mul, const std::optional<Tensor>& out_scale,
                         const std::optional<Tensor>& out_zero_point, const Tensor& out) {
  Int8GemmParams p = checked(q, scale, zero_point, packed, w_scale, bias, out_features, out_dtype, kOutDtype);
  take_int8_epilogue(q, residual, silu_mul, out_scale, out_zero_point, p);
  check_int8_output(out, q, scale, zero_point, packed, w_scale, bias, p);
  if (residual) check.no_overlap_unless_same(out, "out", *residual, "residual");
  if (out_scale) check.no_overlap(out, "out", *out_scale, "out_scale");
  if (out_zero_point) check.no_overlap(out, "out", *out_zero_point, "out_zero_point");
  run(p, out);
}

}  // namespace

QOPS_REGISTER(m) {
  m.impl("int8_gemm", TORCH_BOX(&int8_gemm));
  m.impl("int8_gemm.out", TORCH_BOX(&int8_gemm_out));
  m.impl("int8_gemm.fused", TORCH_BOX(&int8_gemm_fused));
  m.impl("int8_gemm.fused_out", TORCH_BOX(&int8_gemm_fused_out));
}

QOPS_EXPLAIN(int8_gemm, Int8GemmParams, int8_gemm)

}  // namespace qops::binding
