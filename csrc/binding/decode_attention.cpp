// Of the CPU alone: there is no CUDA kernel.
#include "binding/attention.h"

#if !defined(QOPS_CUDA)

namespace qops::binding {

template <class Visitor>
void describe_call(DecodeAttentionParams& p, Visitor& v) {
  v.size("batch", p.batch);
  v.size("t", p.t);
  v.size("q_heads", p.q_heads);
  v.size("kv_heads", p.kv_heads);
  v.size("s", p.s);
  v.size("d", p.d);
  v.dtype("dtype", p.dtype);
  v.when_asked([&](const Checker& check) {
    check.require(p.t <= kMaxDecodeTokens, "t", "be at most 8", std::to_string(p.t));
    check.require(p.t <= p.s, "s", "be at least t = " + std::to_string(p.t), std::to_string(p.s));
    check_heads(check, p);
  });
}

namespace {

constexpr Checker check("decode_attention");

// Everything but the output; called before anything is allocated.
DecodeAttentionParams checked(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                              const std::optional<Tensor>& mask, int64_t window, double softcap,
                              int64_t first_position) {
  DecodeAttentionParams p{};
  check.device(q, "q", q);
  check.device(k, "k", q);
  check.device(v, "v", q);
  p.dtype = check.float_dtype(q, "q");
  check.same_dtype(k, "k", q, "q");
  check.same_dtype(v, "v", q, "q");
  four_dims(check, q, "q", "[B, T, Hq, D]");
  four_dims(check, k, "k", "[B, Hkv, S, D]");
  const auto sizes = q.sizes();
  p.batch = sizes[0];
  p.t = sizes[1];
  p.q_heads = sizes[2];
  p.d = sizes[3];
  check.dense_last_dim(q, "q");
  take_attention(check, q, {k, v, "k", "v"}, "q", "q", scale, mask, window, softcap, first_position, p);
  p.q = q.const_data_ptr();
  set_strides(q, p.q_strides);
  return p;
}

void run(DecodeAttentionParams& p, const Tensor& y) {
  p.y = y.mutable_data_ptr();
  check.ok(device::run(check, &device::kernels::decode_attention, p, y));
}

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                        const std::optional<Tensor>& mask, int64_t window, double softcap, int64_t first_position) {
  DecodeAttentionParams p = checked(q, k, v, scale, mask, window, softcap, first_position);
  Tensor y = check.contiguous_like(q);
  run(p, y);
  return y;
}

void decode_attention_out(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                          const std::optional<Tensor>& mask, int64_t window, double softcap, int64_t first_position,
                          const Tensor& out) {
  DecodeAttentionParams p = checked(q, k, v, scale, mask, window, softcap, first_position);
  check.output(out, "out", q, q.scalar_type(), "[B, T, Hq, D]", q.sizes());
  check.no_overlap(out, "out", q, "q");
  check.no_overlap(out, "out", k, "k");
  check.no_overlap(out, "out", v, "v");
  if (mask) check.no_overlap(out, "out", *mask, "mask");
  run(p, out);
}

}  // namespace

QOPS_REGISTER(m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("decode_attention.out", TORCH_BOX(&decode_attention_out));
}

QOPS_EXPLAIN(decode_attention, DecodeAttentionParams, decode_attention)

}  // namespace qops::binding

#endif
