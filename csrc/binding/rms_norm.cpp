#include <tuple>

#include "binding/device.h"
#include "binding/int8_rows.h"

namespace qops::binding {

template <class Visitor>
void describe_call(RmsNormParams& p, Visitor& v) {
  v.rows("rows", p.x_rows);
  v.size("h", p.h);
  v.dtype("dtype", p.dtype);
  v.when_asked([&](const Checker&) { p.x_rows.stride[0] = p.h; });
}

template <class Visitor>
void describe_call(RmsNormInt8Params& p, Visitor& v) {
  describe_call(p.norm, v);
}

namespace {

// Everything but the residual; called before anything is allocated.
RmsNormParams checked(const Checker& check, const Tensor& x, const Tensor& weight, double eps, double weight_offset,
                      std::string_view rounding) {
  RmsNormParams p{};
  check.device(x, "x", x);
  check.device(weight, "weight", x);
  p.dtype = check.float_dtype(x, "x");
  p.weight_dtype = check.float_dtype(weight, "weight");
  check.at_least_1d(x, "x");
  p.h = x.size(x.dim() - 1);
  check.shape(weight, "weight", "[H]", {p.h});
  check.dense_last_dim(x, "x");
  check.dense_last_dim(weight, "weight");
  p.style = check.rms_norm_style(eps, weight_offset, rounding);
  p.x_rows = check.rows(x, "x");
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  return p;
}

// As checked(), with a residual.
RmsNormParams checked(const Checker& check, const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                      double weight_offset, std::string_view rounding) {
  RmsNormParams p = checked(check, x, weight, eps, weight_offset, rounding);
  check.device(residual, "residual", x);
  check.same_dtype(residual, "residual", x, "x");
  check.same_shape(residual, "residual", x, "x");
  check.dense_last_dim(residual, "residual");
  p.residual_rows = check.rows(residual, "residual");
  p.residual = residual.const_data_ptr();
  return p;
}

// The sum may replace the residual, element for element.
void check_overlap(const Checker& check, const Tensor& residual_out, const Tensor& x, const Tensor& residual,
                   const Tensor& weight) {
  check.no_overlap(residual_out, "residual_out", x, "x");
  check.no_overlap(residual_out, "residual_out", weight, "weight");
  check.no_overlap_unless_same(residual_out, "residual_out", residual, "residual");
}

void run(const Checker& check, RmsNormParams& p, const Tensor& y) {
  p.y = y.mutable_data_ptr();
  check.ok(device::run(check, &device::kernels::rms_norm, p, y));
}

void run(const Checker& check, RmsNormParams& p, const Tensor& y, const Tensor& residual_out) {
  p.residual_out = residual_out.mutable_data_ptr();
  run(check, p, y);
}

void run(const Checker& check, const RmsNormParams& norm, const Tensor& q, const Tensor& scale, QuantizeRule rule) {
  check.ok(device::run(check, &device::kernels::rms_norm_int8, {norm, int8_output(q, scale, rule)}, q));
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset, std::string_view rounding) {
  constexpr Checker check("rms_norm");
  RmsNormParams p = checked(check, x, weight, eps, weight_offset, rounding);
  Tensor y = check.contiguous_like(x);
  run(check, p, y);
  return y;
}

void rms_norm_out(const Tensor& x, const Tensor& weight, double eps, double weight_offset, std::string_view rounding,
                  const Tensor& out) {
  constexpr Checker check("rms_norm");
  RmsNormParams p = checked(check, x, weight, eps, weight_offset, rounding);
  check.output(out, "out", x, x.scalar_type(), "[..., H]", x.sizes());
  check.no_overlap_unless_same(out, "out", x, "x");
  check.no_overlap(out, "out", weight, "weight");
  run(check, p, out);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                                        double weight_offset, std::string_view rounding) {
  constexpr Checker check("add_rms_norm");
  RmsNormParams p = checked(check, x, residual, weight, eps, weight_offset, rounding);
  Tensor y = check.contiguous_like(x);
  Tensor sum = check.contiguous_like(x);
  run(check, p, y, sum);
  return {y, sum};
}

void add_rms_norm_out(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, double weight_offset,
                      std::string_view rounding, const Tensor& y, const Tensor& residual_out) {
  constexpr Checker check("add_rms_norm");
  RmsNormParams p = checked(check, x, residual, weight, eps, weight_offset, rounding);
  check.output(y, "y", x, x.scalar_type(), "[..., H]", x.sizes());
  check.output(residual_out, "residual_out", x, x.scalar_type(), "[..., H]", x.sizes());
  check.no_overlap(residual_out, "residual_out", y, "y");
  // A row of x is read in full before its y is written.
  check.no_overlap_unless_same(y, "y", x, "x");
  check.no_overlap(y, "y", residual, "residual");
  check.no_overlap(y, "y", weight, "weight");
  check_overlap(check, residual_out, x, residual, weight);
  run(check, p, y, residual_out);
}

std::tuple<Tensor, Tensor> rms_norm_int8(const Tensor& x, const Tensor& weight, double eps, double weight_offset,
                                         std::string_view rounding, std::string_view rule) {
  constexpr Checker check("rms_norm_int8");
  const RmsNormParams p = checked(check, x, weight, eps, weight_offset, rounding);
  const QuantizeRule quantize_rule = check.quantize_rule(rule);
  auto [q, scale] = new_int8_rows(check, x, p.h);
  run(check, p, q, scale, quantize_rule);
  return {q, scale};
}

void rms_norm_int8_out(const Tensor& x, const Tensor& weight, double eps, double weight_offset,
                       std::string_view rounding, std::string_view rule, const Tensor& q, const Tensor& scale) {
  constexpr Checker check("rms_norm_int8");
  const RmsNormParams p = checked(check, x, weight, eps, weight_offset, rounding);
  const QuantizeRule quantize_rule = check.quantize_rule(rule);
  check_int8_rows(check, q, scale, x, p.h, {{&x, "x"}, {&weight, "weight"}});
  run(check, p, q, scale, quantize_rule);
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_int8(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                     double eps, double weight_offset, std::string_view rounding,
                                                     std::string_view rule) {
  constexpr Checker check("add_rms_norm_int8");
  RmsNormParams p = checked(check, x, residual, weight, eps, weight_offset, rounding);
  const QuantizeRule quantize_rule = check.quantize_rule(rule);
  auto [q, scale] = new_int8_rows(check, x, p.h);
  Tensor sum = check.contiguous_like(x);
  p.residual_out = sum.mutable_data_ptr();
  run(check, p, q, scale, quantize_rule);
  return {q, scale, sum};
}

void add_rms_norm_int8_out(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                           double weight_offset, std::string_view rounding, std::string_view rule, const Tensor& q,
                           const Tensor& scale, const Tensor& residual_out) {
  constexpr Checker check("add_rms_norm_int8");
  RmsNormParams p = checked(check, x, residual, weight, eps, weight_offset, rounding);
  const QuantizeRule quantize_rule = check.quantize_rule(rule);
  check.output(residual_out, "residual_out", x, x.scalar_type(), "[..., H]", x.sizes());
  check_int8_rows(check, q, scale, x, p.h,
                  {{&x, "x"}, {&residual, "residual"}, {&weight, "weight"}, {&residual_out, "residual_out"}});
  check_overlap(check, residual_out, x, residual, weight);
  p.residual_out = residual_out.mutable_data_ptr();
  run(check, p, q, scale, quantize_rule);
}

}  // namespace

QOPS_REGISTER(m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm.out", TORCH_BOX(&rms_norm_out));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm.out", TORCH_BOX(&add_rms_norm_out));
  m.impl("rms_norm_int8", TORCH_BOX(&rms_norm_int8));
  m.impl("rms_norm_int8.out", TORCH_BOX(&rms_norm_int8_out));
  m.impl("add_rms_norm_int8", TORCH_BOX(&add_rms_norm_int8));
  m.impl("add_rms_norm_int8.out", TORCH_BOX(&add_rms_norm_int8_out));
}

QOPS_EXPLAIN(rms_norm, RmsNormParams, rms_norm)
QOPS_EXPLAIN(add_rms_norm, RmsNormParams, rms_norm)
QOPS_EXPLAIN(rms_norm_int8, RmsNormInt8Params, rms_norm_int8)
QOPS_EXPLAIN(add_rms_norm_int8, RmsNormInt8Params, rms_norm_int8)

}  // namespace qops::binding
