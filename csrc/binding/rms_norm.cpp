#include "binding/int8_rows.h"
#include "binding/ops.h"

namespace qops::binding {
namespace {

// Everything but the residual; called before anything is allocated.
RmsNormParams checked(const Checker& check, const Tensor& x, const Tensor& weight, double eps, double weight_offset,
                      std::string_view rounding) {
  RmsNormParams p{};
  check.cpu(weight, "weight");
  p.dtype = check.float_dtype(x, "x");
  p.weight_dtype = check.float_dtype(weight, "weight");
  check.at_least_1d(x, "x");
  p.h = x.size(x.dim() - 1);
  check.shape(weight, "weight", "[H]", {p.h});
  check.dense_last_dim(x, "x");
  check.dense_last_dim(weight, "weight");
  check.norm_style(eps, weight_offset);
  p.style.round_before_weight = check.rounding_is_hf(rounding);
  if (weight_offset != 0.0) {
    check.require(!p.style.round_before_weight, "rounding", "be \"fp32\" with a non-zero weight_offset", "\"hf\"");
  }
  p.x_rows = check.rows(x, "x");
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.style.eps = static_cast<float>(eps);
  p.style.weight_offset = static_cast<float>(weight_offset);
  return p;
}

// As checked(), with a residual.
RmsNormParams checked(const Checker& check, const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                      double weight_offset, std::string_view rounding) {
  RmsNormParams p = checked(check, x, weight, eps, weight_offset, rounding);
  check.cpu(residual, "residual");
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
  if (residual_out.const_data_ptr() == residual.const_data_ptr() && residual.is_contiguous()) return;
  check.no_overlap(residual_out, "residual_out", residual, "residual");
}

void run(const Checker& check, const RmsNormParams& norm, const Tensor& q, const Tensor& scale, QuantizeRule rule) {
  check.ok(cpu::rms_norm_int8({norm, int8_rows(q, scale, rule)}, thread_pool()));
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset, std::string_view rounding) {
  constexpr Checker check("rms_norm");
  RmsNormParams p = checked(check, x, weight, eps, weight_offset, rounding);
  Tensor y = check.contiguous_like(x);
  p.y = y.mutable_data_ptr();
  check.ok(cpu::rms_norm(p, thread_pool()));
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                                        double weight_offset, std::string_view rounding) {
  constexpr Checker check("add_rms_norm");
  RmsNormParams p = checked(check, x, residual, weight, eps, weight_offset, rounding);
  Tensor y = check.contiguous_like(x);
  Tensor sum = check.contiguous_like(x);
  p.y = y.mutable_data_ptr();
  p.residual_out = sum.mutable_data_ptr();
  check.ok(cpu::rms_norm(p, thread_pool()));
  return {y, sum};
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
  check.output(residual_out, "residual_out", x.scalar_type(), "[..., H]", x.sizes());
  check_int8_rows(check, q, scale, x, p.h,
                  {{&x, "x"}, {&residual, "residual"}, {&weight, "weight"}, {&residual_out, "residual_out"}});
  check_overlap(check, residual_out, x, residual, weight);
  p.residual_out = residual_out.mutable_data_ptr();
  run(check, p, q, scale, quantize_rule);
}

}  // namespace qops::binding
