// Halves of a decoder layer as arguments of operators. Of the CPU alone: there are no CUDA kernels.
#pragma once

#include "binding/attention.h"
#include "binding/block_linear.h"
#include "binding/device.h"
#include "binding/rotary.h"

#if !defined(QOPS_CUDA)

namespace qops::binding {

#define QOPS_LINEAR_NAMES(name) \
  {#name, #name "_scales", #name "_zeros", #name "_perm", #name "_bias", #name "_kind", #name "_input"}
inline constexpr LinearNames kGateUp = QOPS_LINEAR_NAMES(gate_up), kDown = QOPS_LINEAR_NAMES(down);
inline constexpr LinearNames kQkv = QOPS_LINEAR_NAMES(qkv), kO = QOPS_LINEAR_NAMES(o);
#undef QOPS_LINEAR_NAMES

template <class Visitor>
void describe_linear(BlockLinear& linear, const LinearNames& names, const char* has_8_bits, Visitor& v) {
  v.flag(has_8_bits, linear.has_8_bits);
  v.choice(names.input, linear.input,
           {"float", "127", "compressed-tensors", "torchao", "255", "compressed-tensors-asymmetric"});
  v.when_asked([&](const Checker& check) {
    const bool has_operator = linear.has_8_bits || !has_zero_points(linear.input);
    check.require(has_operator, names.input, "have no zero points for a weight of 4 bits", "one with them");
    check_columns_of_int8(check, names, linear);
  });
}

// The sizes of the first linear of a half, of rows that a norm gives, and of the last, whose rows are added to x.
inline void follow_from(const Checker& check, const RmsNormParams& norm, BlockLinear& first, int64_t n,
                        BlockLinear& last, int64_t k) {
  check.require(norm.h > 0, "h", "be positive", "0");
  if (norm.dtype == DType::kInt32) check.unsupported("dtype must be float32, float16 or bfloat16, got int32");
  first.product.n = n;
  last.product.k = k;
  first.product.k = last.product.n = norm.h;
}

template <class Visitor>
void describe_linears(MlpBlockParams& p, Visitor& v) {
  v.when_asked([&](const Checker& check) {
    follow_from(check, p.norm, p.gate_up, 2 * p.down.product.k, p.down, p.down.product.k);
  });
  describe_linear(p.gate_up, kGateUp, "gate_up_has_8_bits", v);
  describe_linear(p.down, kDown, "down_has_8_bits", v);
}

template <class Visitor>
void describe_call(MlpBlockParams& p, Visitor& v) {
  v.rows("rows", p.norm.x_rows);
  v.size("h", p.norm.h, 8);
  v.size("columns", p.down.product.k, 8);
  v.dtype("dtype", p.norm.dtype);
  describe_linears(p, v);
}

template <class Visitor>
void describe_call(AttentionBlockParams& p, Visitor& v) {
  DecodeAttentionParams& heads = p.attention;
  v.rows("rows", p.norm.x_rows);
  v.size("h", p.norm.h, 8);
  v.size("q_heads", heads.q_heads);
  v.size("kv_heads", heads.kv_heads);
  v.size("d", heads.d);
  v.dtype("dtype", p.norm.dtype);
  v.when_asked([&](const Checker& check) {
    check_heads(check, heads);
    check.require(heads.q_heads > 0, "q_heads", "be positive", "0");  // and so are those that divide them
    const int64_t columns = heads.q_heads * heads.d;
    check.require(columns > 0 && columns % 8 == 0, "d", "make Hq D a positive multiple of 8", std::to_string(heads.d));
    follow_from(check, p.norm, p.qkv, (heads.q_heads + 2 * heads.kv_heads) * heads.d, p.o, columns);
  });
  describe_linear(p.qkv, kQkv, "qkv_has_8_bits", v);
  describe_linear(p.o, kO, "o_has_8_bits", v);
}

inline void take_weight_of_norm(const Checker& check, const Tensor& weight, const char* arg, const Tensor& x,
                                RmsNormParams& p) {
  check.device(weight, arg, x);
  p.weight_dtype = check.float_dtype(weight, arg);
  check.shape(weight, arg, "[H]", {p.h});
  check.dense_last_dim(weight, arg);
  p.weight = weight.const_data_ptr();
}

// The norms of a block and what they share, by the names of their arguments.
struct NormStyle {
  double eps, weight_offset;
  std::string_view rounding;
};
struct NormTensors {
  const Tensor& norm;
  const std::optional<Tensor>& post_norm;
  const char *arg = "norm", *post_arg = "post_norm";
};

// On rows of x.
inline void take_norms(const Checker& check, const Tensor& x, const NormStyle& style, const NormTensors& t,
                       RmsNormParams& first, RmsNormParams& last) {
  check.device(x, "x", x);
  first.dtype = check.float_dtype(x, "x");
  check.at_least_1d(x, "x");
  first.h = x.size(x.dim() - 1);
  if (first.h == 0 || first.h % 8 != 0) {
    check.refuse("x", "have a last dimension H that is a positive multiple of 8", std::to_string(first.h));
  }
  check.dense_last_dim(x, "x");
  first.x_rows = check.rows(x, "x");
  first.x = x.const_data_ptr();
  first.style = check.rms_norm_style(style.eps, style.weight_offset, style.rounding);
  last = first;
  take_weight_of_norm(check, t.norm, t.arg, x, first);
  if (t.post_norm) take_weight_of_norm(check, *t.post_norm, t.post_arg, x, last);
}

struct MlpTensors {
  NormTensors norms;
  LinearTensors gate_up, down;
  bool mixed_gate_up;
};

// All but y.
inline void take_mlp(const Checker& check, const Tensor& x, const NormStyle& style, const MlpTensors& t,
                     int64_t (&bad)[2], MlpBlockParams& p) {
  take_norms(check, x, style, t.norms, p.norm, p.post_norm);
  check.device(t.down.packed, "down", x);
  const int64_t h = p.norm.h, columns = columns_of(check, t.down.packed, "down");
  p.gate_up = take_linear(check, kGateUp, t.gate_up, x, p.norm.dtype, 2 * columns, h, &bad[0]);
  if (t.mixed_gate_up) p.gate_up.product.epilogue = Epilogue::kSiluMul;
  p.down = take_linear(check, kDown, t.down, x, p.norm.dtype, h, columns, &bad[1]);
}

inline void refuse_bad_indices(const Checker& check, const MlpBlockParams& p) {
  refuse_bad_index(check, kGateUp, p.gate_up);
  refuse_bad_index(check, kDown, p.down);
}

inline void take_head_norm(const Checker& check, const std::optional<Tensor>& weight, const char* arg, const Tensor& x,
                           int64_t d, const void*& data, DType& dtype) {
  if (!weight) return;
  check.device(*weight, arg, x);
  dtype = check.float_dtype(*weight, arg);
  check.shape(*weight, arg, "[D]", {d});
  check.dense_last_dim(*weight, arg);
  data = weight->const_data_ptr();
}

// keys and values, which are written: [B, Hkv, S, D] with the T new tokens last.
inline void check_cache(const Checker& check, const Tensor& cache, const char* arg, const Tensor& x) {
  check.device(cache, arg, x);
  check.same_dtype(cache, arg, x, "x");
  if (cache.dim() != 4) check.refuse(arg, "have 4 dimensions [B, Hkv, S, D]", std::to_string(cache.dim()));
  check.dense_last_dim(cache, arg);
  check.no_overlap_within(cache, arg);
}

// keys and values, which are written, share no memory with what is read.
struct Written {
  const Checker& check;
  const Tensor &keys, &values;

  void apart_from(const Tensor& t, const char* arg) const {
    check.no_overlap(keys, "keys", t, arg);
    check.no_overlap(values, "values", t, arg);
  }
  void apart_from(const std::optional<Tensor>& t, const char* arg) const {
    if (t) apart_from(*t, arg);
  }
  void apart_from(const LinearTensors& t, const LinearNames& names) const {
    apart_from(t.packed, names.packed);
    apart_from(t.scales, names.scales);
    apart_from(t.zeros, names.zeros);
    apart_from(t.perm, names.perm);
    apart_from(t.bias, names.bias);
  }
};

inline void take_rotary(const Checker& check, const Tensor& x, const std::optional<Tensor>& cos,
                        const std::optional<Tensor>& sin, const std::optional<Tensor>& positions, int64_t d,
                        AttentionBlockParams& p) {
  if (cos.has_value() != sin.has_value()) {
    check.refuse("sin", cos ? "be given with cos" : "be None without cos", sin ? "a tensor" : "None");
  }
  p.rotary.q.x_tokens = p.norm.x_rows;
  p.rotary.t = p.attention.t;
  if (!cos) {
    if (positions) check.refuse("positions", "be None without cos", "a tensor");
    return;
  }
  check.device(*cos, "cos", x);
  check.device(*sin, "sin", x);
  p.rotary.table_dtype = check.float32_or_same_dtype(*cos, "cos", x, "x");
  check.same_dtype(*sin, "sin", *cos, "cos");
  if (cos->dim() != 2 || cos->size(1) > d / 2) {
    check.refuse("cos", "have shape [positions, R / 2] with R <= D = " + std::to_string(d), to_string(cos->sizes()));
  }
  check.same_shape(*sin, "sin", *cos, "cos");
  p.rotary.d = d;
  p.rotary.pairs = cos->size(1);
  set_tables(*cos, *sin, p.rotary);
  take_positions(check, positions, Sizes(x.sizes().data(), 2), x, p.rotary);
}

struct AttentionTensors {
  NormTensors norms;
  LinearTensors qkv, o;
  const std::optional<Tensor>&q_norm, &k_norm, &cos, &sin, &positions, &mask;
  const Tensor &keys, &values;
  double scale, softcap;
  int64_t window, first_position;
};

// All but y.
inline void take_attention_block(const Checker& check, const Tensor& x, const NormStyle& style,
                                 const AttentionTensors& t, int64_t (&bad)[2], int64_t* bad_position,
                                 AttentionBlockParams& p) {
  take_norms(check, x, style, t.norms, p.norm, p.post_norm);
  if (x.dim() != 3) check.refuse("x", "have 3 dimensions [B, T, H]", std::to_string(x.dim()));
  check_cache(check, t.keys, "keys", x);
  check_cache(check, t.values, "values", x);
  check.device(t.o.packed, "o", x);
  const int64_t d = t.keys.size(3), kv_heads = t.keys.size(1), o_columns = columns_of(check, t.o.packed, "o");
  if (d == 0 || kv_heads == 0 || o_columns % d != 0 || o_columns == 0) {
    check.refuse("keys",
                 "have shape [B, Hkv, S, D] with a D that divides the columns of o = " + std::to_string(o_columns),
                 to_string(t.keys.sizes()));
  }
  const int64_t q_heads = o_columns / d;
  p.attention.batch = x.size(0);
  p.attention.t = x.size(1);
  p.attention.q_heads = q_heads;
  p.attention.d = d;
  p.attention.dtype = p.norm.dtype;
  take_attention(check, x, {t.keys, t.values, "keys", "values"}, "x", "o", t.scale, t.mask, t.window, t.softcap,
                 t.first_position, p.attention);
  p.keys = t.keys.mutable_data_ptr();
  p.values = t.values.mutable_data_ptr();
  take_head_norm(check, t.q_norm, "q_norm", x, d, p.q_norm, p.q_norm_dtype);
  take_head_norm(check, t.k_norm, "k_norm", x, d, p.k_norm, p.k_norm_dtype);
  take_rotary(check, x, t.cos, t.sin, t.positions, d, p);
  const int64_t h = p.norm.h;
  p.qkv = take_linear(check, kQkv, t.qkv, x, p.norm.dtype, (q_heads + 2 * kv_heads) * d, h, &bad[0]);
  p.o = take_linear(check, kO, t.o, x, p.norm.dtype, h, o_columns, &bad[1]);
  check.no_overlap(t.values, "values", t.keys, "keys");
  const Written written{check, t.keys, t.values};
  written.apart_from(t.qkv, kQkv);
  written.apart_from(t.o, kO);
  written.apart_from(x, "x");
  written.apart_from(t.norms.norm, t.norms.arg);
  written.apart_from(t.norms.post_norm, t.norms.post_arg);
  written.apart_from(t.q_norm, "q_norm");
  written.apart_from(t.k_norm, "k_norm");
  written.apart_from(t.cos, "cos");
  written.apart_from(t.sin, "sin");
  written.apart_from(t.positions, "positions");
  written.apart_from(t.mask, "mask");
  p.rotary.bad_position = bad_position;
}

inline void refuse_bad_indices(const Checker& check, const AttentionBlockParams& p) {
  refuse_bad_index(check, kQkv, p.qkv);
  refuse_bad_index(check, kO, p.o);
}

}  // namespace qops::binding

#endif
