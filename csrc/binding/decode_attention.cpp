// Of the CPU alone: there is no CUDA kernel.
#include <cmath>
#include <limits>
#include <sstream>

#include "binding/device.h"

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
    const bool fits = p.kv_heads == 0 ? p.q_heads == 0 : p.q_heads % p.kv_heads == 0;
    check.require(fits, "q_heads", "be a multiple of kv_heads = " + std::to_string(p.kv_heads),
                  std::to_string(p.q_heads));
    constexpr int64_t kMost = int64_t{1} << 48;  // of what plans count
    check.require(p.q_heads == 0 || p.d <= kMost / p.q_heads, "d", "be so small that Hq D <= 2^48",
                  std::to_string(p.d));
  });
}

namespace {

constexpr Checker check("decode_attention");

void four_dims(const Tensor& t, const char* arg, const char* letters) {
  if (t.dim() != 4) check.refuse(arg, std::string("have 4 dimensions ") + letters, std::to_string(t.dim()));
}

void set_strides(const Tensor& t, int64_t (&strides)[3]) {
  const auto all = t.strides();
  for (size_t d = 0; d < 3; ++d) strides[d] = all[d];
}

void check_shapes(const Tensor& k, const Tensor& v, const DecodeAttentionParams& p) {
  if (p.t > kMaxDecodeTokens) check.refuse("q", "have at most 8 tokens T", std::to_string(p.t));
  const auto k_sizes = k.sizes();
  if (k_sizes[0] != p.batch || k_sizes[3] != p.d) {
    check.refuse("k", "have shape [B, Hkv, S, D] with B = " + std::to_string(p.batch) + ", D = " + std::to_string(p.d),
                 to_string(k_sizes));
  }
  if (p.kv_heads == 0 ? p.q_heads != 0 : p.q_heads % p.kv_heads != 0) {
    check.refuse("q", "have a multiple of Hkv = " + std::to_string(p.kv_heads) + " heads", std::to_string(p.q_heads));
  }
  if (p.s < p.t) check.refuse("k", "have at least T = " + std::to_string(p.t) + " rows", std::to_string(p.s));
  check.same_shape(v, "v", k, "k");
}

// A dimension of size 1 serves all.
void take_mask(const Tensor& mask, const Tensor& q, DecodeAttentionParams& p) {
  check.device(mask, "mask", q);
  check.dtype(mask, "mask", ScalarType::Bool);
  four_dims(mask, "mask", "[B or 1, 1, T or 1, S]");
  const auto sizes = mask.sizes();
  if ((sizes[0] != p.batch && sizes[0] != 1) || sizes[1] != 1 || (sizes[2] != p.t && sizes[2] != 1) ||
      sizes[3] != p.s) {
    check.refuse("mask",
                 "have shape [B or 1, 1, T or 1, S] = [" + std::to_string(p.batch) + " or 1, 1, " +
                     std::to_string(p.t) + " or 1, " + std::to_string(p.s) + "]",
                 to_string(sizes));
  }
  p.mask = static_cast<const bool*>(mask.const_data_ptr());
  p.mask_strides[0] = sizes[0] == 1 ? 0 : mask.stride(0);
  p.mask_strides[1] = sizes[2] == 1 ? 0 : mask.stride(2);
  p.mask_strides[2] = mask.stride(3);
}

// float32, which kernels compute in.
float finite(double value, const char* arg, bool may_be_negative) {
  if (std::abs(value) <= std::numeric_limits<float>::max() && (may_be_negative || value >= 0.0)) {
    return static_cast<float>(value);
  }
  std::ostringstream text;
  text << value;
  check.refuse(arg, may_be_negative ? "be a finite float32" : "be a float32 that is finite and not negative",
               text.str());
}

void not_negative(int64_t value, const char* arg) {
  if (value < 0 || value > int64_t{1} << 62) check.refuse(arg, "lie in 0 .. 2^62", std::to_string(value));
}

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
  four_dims(q, "q", "[B, T, Hq, D]");
  four_dims(k, "k", "[B, Hkv, S, D]");
  const auto q_sizes = q.sizes(), k_sizes = k.sizes();
  p.batch = q_sizes[0];
  p.t = q_sizes[1];
  p.q_heads = q_sizes[2];
  p.d = q_sizes[3];
  p.kv_heads = k_sizes[1];
  p.s = k_sizes[2];
  check_shapes(k, v, p);
  check.dense_last_dim(q, "q");
  check.dense_last_dim(k, "k");
  check.dense_last_dim(v, "v");
  if (mask) take_mask(*mask, q, p);
  p.scale = finite(scale, "scale", true);
  not_negative(window, "window");
  p.window = window;
  p.softcap = finite(softcap, "softcap", false);
  not_negative(first_position, "first_position");
  p.first_position = first_position;
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  set_strides(q, p.q_strides);
  set_strides(k, p.k_strides);
  set_strides(v, p.v_strides);
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
