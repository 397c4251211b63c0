#include <tuple>

#include "binding/device.h"
#include "binding/int8_rows.h"

namespace qops::binding {

template <class Visitor>
void describe_call(SiluMulParams& p, Visitor& v) {
  v.rows("rows", p.gate_rows);
  v.size("columns", p.columns);
  v.dtype("dtype", p.dtype);
  v.when_asked([&](const Checker&) {
    p.gate_rows.stride[0] = p.columns;
    p.up_rows = p.gate_rows;
  });
}

template <class Visitor>
void describe_call(SiluMulInt8Params& p, Visitor& v) {
  describe_call(p.gated, v);
}

namespace {

// One half, or both side by side.
void check_rows(const Checker& check, const Tensor& t, const char* arg) {
  check.float_dtype(t, arg);
  check.at_least_1d(t, arg);
  check.dense_last_dim(t, arg);
}

// Gate and up side by side; called before anything is allocated.
SiluMulParams checked(const Checker& check, const Tensor& gate_up, std::string_view rounding) {
  check.device(gate_up, "gate_up", gate_up);
  check_rows(check, gate_up, "gate_up");
  const int64_t both = gate_up.size(gate_up.dim() - 1);
  if (both % 2 != 0) check.refuse("gate_up", "have an even last dimension 2 I", std::to_string(both));
  SiluMulParams p{};
  p.round_before_up = check.rounding_is_hf(rounding);
  p.dtype = check.float_dtype(gate_up, "gate_up");
  p.columns = both / 2;
  p.gate = gate_up.const_data_ptr();
  p.up = static_cast<const char*>(p.gate) + p.columns * gate_up.element_size();
  p.gate_rows = p.up_rows = check.rows(gate_up, "gate_up");
  return p;
}

SiluMulParams checked(const Checker& check, const Tensor& gate, const Tensor& up, std::string_view rounding) {
  check.device(gate, "gate", gate);
  check.device(up, "up", gate);
  check_rows(check, gate, "gate");
  check.same_dtype(up, "up", gate, "gate");
  check.same_shape(up, "up", gate, "gate");
  check.dense_last_dim(up, "up");
  SiluMulParams p{};
  p.round_before_up = check.rounding_is_hf(rounding);
  p.dtype = check.float_dtype(gate, "gate");
  p.columns = gate.size(gate.dim() - 1);
  p.gate = gate.const_data_ptr();
  p.gate_rows = check.rows(gate, "gate");
  p.up = up.const_data_ptr();
  p.up_rows = check.rows(up, "up");
  return p;
}

constexpr Checker check_float("silu_mul");
constexpr Checker check_int8("silu_mul_int8");

void run(SiluMulParams& p, const Tensor& y) {
  p.y = y.mutable_data_ptr();
  check_float.ok(device::run(check_float, &device::kernels::silu_mul, p, y));
}

Tensor run_new(SiluMulParams& p, const Tensor& like) {
  Tensor y = check_float.new_tensor(like, with_last_size(like, p.columns), like.scalar_type());
  run(p, y);
  return y;
}

void check_output(const Tensor& out, const Tensor& gate, int64_t columns) {
  check_float.output(out, "out", gate, gate.scalar_type(), "[..., I]", with_last_size(gate, columns));
}

void run(const SiluMulParams& gated, QuantizeRule rule, const Tensor& q, const Tensor& scale) {
  check_int8.ok(device::run(check_int8, &device::kernels::silu_mul_int8, {gated, int8_output(q, scale, rule)}, q));
}

std::tuple<Tensor, Tensor> run(const SiluMulParams& gated, QuantizeRule rule, const Tensor& like) {
  auto [q, scale] = new_int8_rows(check_int8, like, gated.columns);
  run(gated, rule, q, scale);
  return {q, scale};
}

Tensor silu_mul(const Tensor& gate_up, std::string_view rounding) {
  SiluMulParams p = checked(check_float, gate_up, rounding);
  return run_new(p, gate_up);
}

void silu_mul_out(const Tensor& gate_up, std::string_view rounding, const Tensor& out) {
  SiluMulParams p = checked(check_float, gate_up, rounding);
  check_output(out, gate_up, p.columns);
  check_float.no_overlap(out, "out", gate_up, "gate_up");
  run(p, out);
}

Tensor silu_mul_apart(const Tensor& gate, const Tensor& up, std::string_view rounding) {
  SiluMulParams p = checked(check_float, gate, up, rounding);
  return run_new(p, gate);
}

void silu_mul_apart_out(const Tensor& gate, const Tensor& up, std::string_view rounding, const Tensor& out) {
  SiluMulParams p = checked(check_float, gate, up, rounding);
  check_output(out, gate, p.columns);
  check_float.no_overlap_unless_same(out, "out", gate, "gate");
  check_float.no_overlap_unless_same(out, "out", up, "up");
  run(p, out);
}

std::tuple<Tensor, Tensor> silu_mul_int8(const Tensor& gate_up, std::string_view rounding, std::string_view rule) {
  const SiluMulParams p = checked(check_int8, gate_up, rounding);
  return run(p, check_int8.quantize_rule(rule), gate_up);
}

std::tuple<Tensor, Tensor> silu_mul_int8_apart(const Tensor& gate, const Tensor& up, std::string_view rounding,
                                               std::string_view rule) {
  const SiluMulParams p = checked(check_int8, gate, up, rounding);
  return run(p, check_int8.quantize_rule(rule), gate);
}

void silu_mul_int8_out(const Tensor& gate_up, std::string_view rounding, std::string_view rule, const Tensor& q,
                       const Tensor& scale) {
  const SiluMulParams p = checked(check_int8, gate_up, rounding);
  const QuantizeRule quantize_rule = check_int8.quantize_rule(rule);
  check_int8_rows(check_int8, q, scale, gate_up, p.columns, {{&gate_up, "gate_up"}});
  run(p, quantize_rule, q, scale);
}

void silu_mul_int8_apart_out(const Tensor& gate, const Tensor& up, std::string_view rounding, std::string_view rule,
                             const Tensor& q, const Tensor& scale) {
  const SiluMulParams p = checked(check_int8, gate, up, rounding);
  const QuantizeRule quantize_rule = check_int8.quantize_rule(rule);
  check_int8_rows(check_int8, q, scale, gate, p.columns, {{&gate, "gate"}, {&up, "up"}});
  run(p, quantize_rule, q, scale);
}

}  // namespace

QOPS_REGISTER(m) {
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("silu_mul.apart", TORCH_BOX(&silu_mul_apart));
  m.impl("silu_mul.out", TORCH_BOX(&silu_mul_out));
  m.impl("silu_mul.apart_out", TORCH_BOX(&silu_mul_apart_out));
  m.impl("silu_mul_int8", TORCH_BOX(&silu_mul_int8));
  m.impl("silu_mul_int8.apart", TORCH_BOX(&silu_mul_int8_apart));
  m.impl("silu_mul_int8.out", TORCH_BOX(&silu_mul_int8_out));
  m.impl("silu_mul_int8.apart_out", TORCH_BOX(&silu_mul_int8_apart_out));
}

QOPS_EXPLAIN(silu_mul, SiluMulParams, silu_mul)
QOPS_EXPLAIN(silu_mul_int8, SiluMulInt8Params, silu_mul_int8)

}  // namespace qops::binding
