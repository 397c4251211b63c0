#include "binding/decoder_block.h"

#if !defined(QOPS_CUDA)

namespace qops::binding {

namespace {

constexpr Checker check_mlp("mlp_block");

Tensor mlp_block(const Tensor& x, const Tensor& norm, const std::optional<Tensor>& post_norm, double eps,
                 double weight_offset, std::string_view rounding, const Tensor& gate_up, const Tensor& gate_up_scales,
                 const std::optional<Tensor>& gate_up_zeros, const std::optional<Tensor>& gate_up_perm,
                 const std::optional<Tensor>& gate_up_bias, int64_t gate_up_kind, int64_t gate_up_input,
                 bool mixed_gate_up, const Tensor& down, const Tensor& down_scales,
                 const std::optional<Tensor>& down_zeros, const std::optional<Tensor>& down_perm,
                 const std::optional<Tensor>& down_bias, int64_t down_kind, int64_t down_input) {
  const Checker& check = check_mlp;
  MlpBlockParams p{};
  int64_t bad[2] = {kNoIndex, kNoIndex};
  const LinearTensors first{gate_up,      gate_up_scales, gate_up_zeros, gate_up_perm,
                            gate_up_bias, gate_up_kind,   gate_up_input};
  const LinearTensors last{down, down_scales, down_zeros, down_perm, down_bias, down_kind, down_input};
  take_mlp(check, x, {eps, weight_offset, rounding}, {{norm, post_norm}, first, last, mixed_gate_up}, bad, p);
  Tensor y = check.contiguous_like(x);
  p.y = y.mutable_data_ptr();
  const Status status = device::run(check, &device::kernels::mlp_block, p, y);
  if (status == Status::kIndexOutOfRange) refuse_bad_indices(check, p);
  check.ok(status);
  return y;
}

constexpr Checker check_attention("attention_block");

Tensor attention_block(const Tensor& x, const Tensor& norm, const std::optional<Tensor>& post_norm, double eps,
                       double weight_offset, std::string_view rounding, const Tensor& qkv, const Tensor& qkv_scales,
                       const std::optional<Tensor>& qkv_zeros, const std::optional<Tensor>& qkv_perm,
                       const std::optional<Tensor>& qkv_bias, int64_t qkv_kind, int64_t qkv_input,
                       const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                       const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                       const std::optional<Tensor>& positions, const Tensor& keys, const Tensor& values,
                       const Tensor& o, const Tensor& o_scales, const std::optional<Tensor>& o_zeros,
                       const std::optional<Tensor>& o_perm, const std::optional<Tensor>& o_bias, int64_t o_kind,
                       int64_t o_input, double scale, const std::optional<Tensor>& mask, int64_t window, double softcap,
                       int64_t first_position) {
  const Checker& check = check_attention;
  AttentionBlockParams p{};
  int64_t bad[2] = {kNoIndex, kNoIndex}, bad_position = 0;
  const LinearTensors first{qkv, qkv_scales, qkv_zeros, qkv_perm, qkv_bias, qkv_kind, qkv_input};
  const LinearTensors last{o, o_scales, o_zeros, o_perm, o_bias, o_kind, o_input};
  const AttentionTensors tensors{{norm, post_norm}, first, last, q_norm, k_norm, cos,     sin,
                                 positions,         mask,  keys, values, scale,  softcap, window,
                                 first_position};
  take_attention_block(check, x, {eps, weight_offset, rounding}, tensors, bad, &bad_position, p);
  Tensor y = check.contiguous_like(x);
  p.y = y.mutable_data_ptr();
  const Status status = device::run(check, &device::kernels::attention_block, p, y);
  if (status == Status::kIndexOutOfRange) {
    refuse_bad_indices(check, p);
    refuse_bad_position(check, p.rotary);
  }
  check.ok(status);
  return y;
}

}  // namespace

QOPS_REGISTER(m) {
  m.impl("attention_block", TORCH_BOX(&attention_block));
  m.impl("mlp_block", TORCH_BOX(&mlp_block));
}

QOPS_EXPLAIN(attention_block, AttentionBlockParams, attention_block)
QOPS_EXPLAIN(mlp_block, MlpBlockParams, mlp_block)

}  // namespace qops::binding

#endif
