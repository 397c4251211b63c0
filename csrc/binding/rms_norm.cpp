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
  p.round_before_weight = check.rounding_is_hf(rounding);
  if (weight_offset != 0.0) {
    check.require(!p.round_before_weight, "rounding", "be \"fp32\" with a non-zero weight_offset", "\"hf\"");
  }
  p.x_rows = check.rows(x, "x");
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.eps = static_cast<float>(eps);
  p.weight_offset = static_cast<float>(weight_offset);
  return p;
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset, std::string_view rounding) {
  constexpr Checker check("rms_norm");
  RmsNormParams p = checked(check, x, weight, eps, weight_offset, rounding);
  Tensor y = contiguous_like(x);
  p.y = y.mutable_data_ptr();
  check.ok(cpu::rms_norm(p, thread_pool()));
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                                        double weight_offset, std::string_view rounding) {
  constexpr Checker check("add_rms_norm");
  RmsNormParams p = checked(check, x, weight, eps, weight_offset, rounding);
  check.cpu(residual, "residual");
  check.same_dtype(residual, "residual", x, "x");
  check.same_shape(residual, "residual", x, "x");
  check.dense_last_dim(residual, "residual");
  p.residual_rows = check.rows(residual, "residual");
  p.residual = residual.const_data_ptr();
  Tensor y = contiguous_like(x);
  Tensor sum = contiguous_like(x);
  p.y = y.mutable_data_ptr();
  p.residual_out = sum.mutable_data_ptr();
  check.ok(cpu::rms_norm(p, thread_pool()));
  return {y, sum};
}

}  // namespace qops::binding
