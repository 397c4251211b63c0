#include "binding/ops.h"

namespace qops::binding {
namespace {

constexpr Checker check("silu_mul");

// One half, or both side by side; called before anything is allocated.
void check_rows(const Tensor& t, const char* arg) {
  check.float_dtype(t, arg);
  check.at_least_1d(t, arg);
  check.dense_last_dim(t, arg);
}

Tensor run(SiluMulParams& p, const Tensor& like) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = p.columns;
  Tensor y = new_tensor(like, sizes, like.scalar_type());
  p.y = y.mutable_data_ptr();
  check.ok(cpu::silu_mul(p, thread_pool()));
  return y;
}

}  // namespace

Tensor silu_mul(const Tensor& gate_up, std::string_view rounding) {
  check_rows(gate_up, "gate_up");
  const int64_t both = gate_up.size(gate_up.dim() - 1);
  if (both % 2 != 0) check.refuse("gate_up", "have an even last dimension 2 I", std::to_string(both));
  SiluMulParams p{};
  p.round_before_up = check.rounding_is_hf(rounding);
  p.dtype = check.float_dtype(gate_up, "gate_up");
  p.columns = both / 2;
  p.gate = gate_up.const_data_ptr();
  p.up = static_cast<const char*>(p.gate) + p.columns * gate_up.element_size();
  p.gate_rows = p.up_rows = check.rows(gate_up, "gate_up");
  return run(p, gate_up);
}

Tensor silu_mul_gate_up(const Tensor& gate, const Tensor& up, std::string_view rounding) {
  check.cpu(gate, "gate");
  check.cpu(up, "up");
  check_rows(gate, "gate");
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
  return run(p, gate);
}

}  // namespace qops::binding
