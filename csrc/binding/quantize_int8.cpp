#include <tuple>

#include "binding/device.h"
#include "binding/int8_rows.h"

namespace qops::binding {

template <class Visitor>
void describe_call(QuantizeInt8AsymParams& p, Visitor& v) {
  describe_rows(p, v);
}
template <class Visitor>
void describe_call(QuantizeInt8StaticParams& p, Visitor& v) {
  static constexpr float kAny = 1.0f;  // a CPU reads it before the rows
  describe_rows(p, v);
  v.when_asked([&](const Checker&) { p.scale = &kAny; });
}

namespace {

// x, for each of the three ops and their params; called before anything is allocated.
template <class Params>
Params checked(const Checker& check, const Tensor& x) {
  Params p{};
  check.device(x, "x", x);
  p.dtype = check.float_dtype(x, "x");
  check.at_least_1d(x, "x");
  check.dense_last_dim(x, "x");
  p.x = x.const_data_ptr();
  p.x_rows = check.rows(x, "x");
  p.k = x.size(x.dim() - 1);
  return p;
}

constexpr Checker check_dynamic("quantize_int8");
constexpr Checker check_asym("quantize_int8_asym");
constexpr Checker check_static("quantize_int8_static");

QuantizeInt8Params checked_dynamic(const Tensor& x, std::string_view rule) {
  QuantizeInt8Params p = checked<QuantizeInt8Params>(check_dynamic, x);
  p.out.rule = check_dynamic.quantize_rule(rule);
  return p;
}

void run(QuantizeInt8Params& p, const Tensor& q, const Tensor& scale) {
  p.out = int8_output(q, scale, p.out.rule);
  check_dynamic.ok(device::run(check_dynamic, &device::kernels::quantize_int8, p, q));
}

void run(QuantizeInt8AsymParams& p, const Tensor& q, const Tensor& scale, const Tensor& zero_point) {
  p.q = q.mutable_data_ptr<int8_t>();
  p.scale = scale.mutable_data_ptr<float>();
  p.zero_point = zero_point.mutable_data_ptr<int32_t>();
  check_asym.ok(device::run(check_asym, &device::kernels::quantize_int8_asym, p, q));
}

QuantizeInt8AsymParams checked_asym(const Tensor& x, std::string_view rule) {
  QuantizeInt8AsymParams p = checked<QuantizeInt8AsymParams>(check_asym, x);
  p.divides = check_asym.rule_divides(rule, "255");
  return p;
}

QuantizeInt8StaticParams checked_static(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                                        std::string_view rule) {
  QuantizeInt8StaticParams p = checked<QuantizeInt8StaticParams>(check_static, x);
  p.divides = check_static.rule_divides(rule, "torchao");
  const StaticScale one = static_scale(check_static, scale, "scale", zero_point, "zero_point", x);
  p.scale = one.scale;
  p.zero_point = one.zero_point;
  return p;
}

void run(QuantizeInt8StaticParams& p, const Tensor& q) {
  p.q = q.mutable_data_ptr<int8_t>();
  check_static.ok(device::run(check_static, &device::kernels::quantize_int8_static, p, q));
}

std::tuple<Tensor, Tensor> quantize_int8(const Tensor& x, std::string_view rule) {
  QuantizeInt8Params p = checked_dynamic(x, rule);
  auto [q, scale] = new_int8_rows(check_dynamic, x, p.k);
  run(p, q, scale);
  return {q, scale};
}

void quantize_int8_out(const Tensor& x, std::string_view rule, const Tensor& q, const Tensor& scale) {
  QuantizeInt8Params p = checked_dynamic(x, rule);
  check_int8_rows(check_dynamic, q, scale, x, p.k, {{&x, "x"}});
  run(p, q, scale);
}

std::tuple<Tensor, Tensor, Tensor> quantize_int8_asym(const Tensor& x, std::string_view rule) {
  QuantizeInt8AsymParams p = checked_asym(x, rule);
  auto [q, scale] = new_int8_rows(check_asym, x, p.k);
  Tensor zero_point = check_asym.new_tensor(x, leading_sizes(x), ScalarType::Int);
  run(p, q, scale, zero_point);
  return {q, scale, zero_point};
}

void quantize_int8_asym_out(const Tensor& x, std::string_view rule, const Tensor& q, const Tensor& scale,
                            const Tensor& zero_point) {
  QuantizeInt8AsymParams p = checked_asym(x, rule);
  check_asym.output(zero_point, "zero_point", x, ScalarType::Int, "[...]", leading_sizes(x));
  check_int8_rows(check_asym, q, scale, x, p.k, {{&x, "x"}});
  for (const auto& [other, name] : {std::pair{&x, "x"}, std::pair{&q, "q"}, std::pair{&scale, "scale"}}) {
    check_asym.no_overlap(zero_point, "zero_point", *other, name);
  }
  run(p, q, scale, zero_point);
}

Tensor quantize_int8_static(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                            std::string_view rule) {
  QuantizeInt8StaticParams p = checked_static(x, scale, zero_point, rule);
  Tensor q = check_static.new_tensor(x, with_last_size(x, p.k), ScalarType::Char);
  run(p, q);
  return q;
}

void quantize_int8_static_out(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                              std::string_view rule, const Tensor& q) {
  QuantizeInt8StaticParams p = checked_static(x, scale, zero_point, rule);
  check_static.output(q, "q", x, ScalarType::Char, "[..., K]", x.sizes());
  check_static.no_overlap(q, "q", x, "x");
  check_static.no_overlap(q, "q", scale, "scale");
  if (zero_point) check_static.no_overlap(q, "q", *zero_point, "zero_point");
  run(p, q);
}

}  // namespace

QOPS_REGISTER(m) {
  m.impl("quantize_int8", TORCH_BOX(&quantize_int8));
  m.impl("quantize_int8.out", TORCH_BOX(&quantize_int8_out));
  m.impl("quantize_int8_asym", TORCH_BOX(&quantize_int8_asym));
  m.impl("quantize_int8_asym.out", TORCH_BOX(&quantize_int8_asym_out));
  m.impl("quantize_int8_static", TORCH_BOX(&quantize_int8_static));
  m.impl("quantize_int8_static.out", TORCH_BOX(&quantize_int8_static_out));
}

QOPS_EXPLAIN(quantize_int8, QuantizeInt8Params, quantize_int8)
QOPS_EXPLAIN(quantize_int8_asym, QuantizeInt8AsymParams, quantize_int8_asym)
QOPS_EXPLAIN(quantize_int8_static, QuantizeInt8StaticParams, quantize_int8_static)

}  // namespace qops::binding
