// Of the CPU alone: there are no CUDA kernels.
#include <algorithm>

#include "binding/attention.h"
#include "binding/block_linear.h"
#include "binding/device.h"
#include "binding/rotary.h"

#if !defined(QOPS_CUDA)

namespace qops::binding {

namespace {

#define QOPS_LINEAR_NAMES(name) \
  {#name, #name "_scales", #name "_zeros", #name "_perm", #name "_bias", #name "_kind", #name "_input"}
constexpr LinearNames kGateUp = QOPS_LINEAR_NAMES(gate_up), kDown = QOPS_LINEAR_NAMES(down);
constexpr LinearNames kQkv = QOPS_LINEAR_NAMES(qkv), kO = QOPS_LINEAR_NAMES(o);
#undef QOPS_LINEAR_NAMES

}  // namespace

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

// Of layers that are all like the first.
template <class Visitor>
void describe_call(DecoderLayersParams& p, Visitor& v) {
  static thread_local AttentionBlockParams attention;
  static thread_local MlpBlockParams mlp;
  v.size("layers", p.layers);
  attention = p.attention == nullptr ? AttentionBlockParams{} : p.attention[0];
  mlp = p.mlp == nullptr ? MlpBlockParams{} : p.mlp[0];
  p.attention = &attention;
  p.mlp = &mlp;
  describe_call(attention, v);
  v.size("columns", mlp.down.product.k, 8);
  mlp.norm = attention.norm;
  describe_linears(mlp, v);
}

namespace {

void take_weight_of_norm(const Checker& check, const Tensor& weight, const char* arg, const Tensor& x,
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
void take_norms(const Checker& check, const Tensor& x, const NormStyle& style, const NormTensors& t,
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
void take_mlp(const Checker& check, const Tensor& x, const NormStyle& style, const MlpTensors& t, int64_t (&bad)[2],
              MlpBlockParams& p) {
  take_norms(check, x, style, t.norms, p.norm, p.post_norm);
  check.device(t.down.packed, "down", x);
  const int64_t h = p.norm.h, columns = columns_of(check, t.down.packed, "down");
  p.gate_up = take_linear(check, kGateUp, t.gate_up, x, p.norm.dtype, 2 * columns, h, &bad[0]);
  if (t.mixed_gate_up) p.gate_up.product.epilogue = Epilogue::kSiluMul;
  p.down = take_linear(check, kDown, t.down, x, p.norm.dtype, h, columns, &bad[1]);
}

void refuse_bad_indices(const Checker& check, const MlpBlockParams& p) {
  refuse_bad_index(check, kGateUp, p.gate_up);
  refuse_bad_index(check, kDown, p.down);
}

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

void take_head_norm(const Checker& check, const std::optional<Tensor>& weight, const char* arg, const Tensor& x,
                    int64_t d, const void*& data, DType& dtype) {
  if (!weight) return;
  check.device(*weight, arg, x);
  dtype = check.float_dtype(*weight, arg);
  check.shape(*weight, arg, "[D]", {d});
  check.dense_last_dim(*weight, arg);
  data = weight->const_data_ptr();
}

// keys and values, which are written: [B, Hkv, S, D] with the T new tokens last.
void check_cache(const Checker& check, const Tensor& cache, const char* arg, const Tensor& x) {
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

void take_rotary(const Checker& check, const Tensor& x, const std::optional<Tensor>& cos,
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
void take_attention_block(const Checker& check, const Tensor& x, const NormStyle& style, const AttentionTensors& t,
                          int64_t (&bad)[2], int64_t* bad_position, AttentionBlockParams& p) {
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

void refuse_bad_indices(const Checker& check, const AttentionBlockParams& p) {
  refuse_bad_index(check, kQkv, p.qkv);
  refuse_bad_index(check, kO, p.o);
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

constexpr Checker check_layers("decoder_layers");

// What a layer is made of, in the order of `weights`.
constexpr const char* kParts[] = {
    "norm",     "post_norm",     "qkv",        "qkv_scales",     "qkv_zeros",     "qkv_perm",     "qkv_bias",
    "q_norm",   "k_norm",        "o",          "o_scales",       "o_zeros",       "o_perm",       "o_bias",
    "mlp_norm", "mlp_post_norm", "gate_up",    "gate_up_scales", "gate_up_zeros", "gate_up_perm", "gate_up_bias",
    "down",     "down_scales",   "down_zeros", "down_perm",      "down_bias"};
constexpr size_t kPartCount = std::size(kParts);
constexpr size_t kNorm = 0, kQkvPart = 2, kQNorm = 7, kOPart = 9, kMlpNorm = 14, kGateUpPart = 16, kDownPart = 21;

// Numbers of a layer, in the order of `settings`.
enum Setting {
  kQkvKind,
  kQkvInput,
  kOKind,
  kOInput,
  kGateUpKind,
  kGateUpInput,
  kDownKind,
  kDownInput,
  kMixed,
  kRotates,
  kWindow,
  kFirstPosition,
  kNumber,
  kSettings
};

using Tensors = std::vector<std::optional<Tensor>>;

// One layer's share of the lists.
struct Layer {
  const std::optional<Tensor>* parts;
  const int64_t* settings;
  Checker check{check_layers.op(), settings[kNumber]};

  const Tensor& needed(size_t part) const {
    if (!parts[part]) check.unsupported(std::string(kParts[part]) + " must be a tensor, got None");
    return *parts[part];
  }
  LinearTensors linear(size_t part, Setting kind) const {
    return {needed(part),    needed(part + 1), parts[part + 2],   parts[part + 3],
            parts[part + 4], settings[kind],   settings[kind + 1]};
  }
};

void check_count(const Checker& check, size_t count, const char* arg, size_t layers, size_t of_each) {
  if (count == layers * of_each) return;
  check.refuse(arg, "hold " + std::to_string(of_each) + " for each of " + std::to_string(layers) + " layers",
               std::to_string(count));
}

// x of a half: contiguous rows that another half has given.
void follow(const void* x, RmsNormParams& norm) {
  norm.x = x;
  norm.x_rows = Rows{norm.x_rows.count, 1, {norm.x_rows.count}, {norm.h}};
}

Tensor decoder_layers(const Tensor& x, const Tensors& weights, const std::vector<int64_t>& settings, double eps,
                      double weight_offset, std::string_view rounding, double scale, const std::optional<Tensor>& cos,
                      const std::optional<Tensor>& sin, const std::optional<Tensor>& positions,
                      const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                      const std::optional<Tensor>& mask) {
  const Checker& check = check_layers;
  const size_t layers = keys.size();
  check_count(check, values.size(), "values", layers, 1);
  check_count(check, weights.size(), "weights", layers, kPartCount);
  check_count(check, settings.size(), "settings", layers, kSettings);
  const NormStyle style{eps, weight_offset, rounding};
  const std::optional<Tensor> none;
  struct Bad {
    int64_t attention[2] = {kNoIndex, kNoIndex}, mlp[2] = {kNoIndex, kNoIndex}, position = 0;
  };
  std::vector<AttentionBlockParams> attention(layers);
  std::vector<MlpBlockParams> mlp(layers);
  std::vector<Bad> bad(layers);
  for (size_t i = 0; i < layers; ++i) {
    const Layer layer{weights.data() + i * kPartCount, settings.data() + i * kSettings};
    const auto& part = layer.parts;
    const bool rotates = layer.settings[kRotates] != 0;
    const AttentionTensors attends{{layer.needed(kNorm), part[kNorm + 1]},
                                   layer.linear(kQkvPart, kQkvKind),
                                   layer.linear(kOPart, kOKind),
                                   part[kQNorm],
                                   part[kQNorm + 1],
                                   rotates ? cos : none,
                                   rotates ? sin : none,
                                   rotates ? positions : none,
                                   mask,
                                   keys[i],
                                   values[i],
                                   scale,
                                   0.0,
                                   layer.settings[kWindow],
                                   layer.settings[kFirstPosition]};
    take_attention_block(layer.check, x, style, attends, bad[i].attention, &bad[i].position, attention[i]);
    const MlpTensors mixes{{layer.needed(kMlpNorm), part[kMlpNorm + 1], kParts[kMlpNorm], kParts[kMlpNorm + 1]},
                           layer.linear(kGateUpPart, kGateUpKind),
                           layer.linear(kDownPart, kDownKind),
                           layer.settings[kMixed] != 0};
    take_mlp(layer.check, x, style, mixes, bad[i].mlp, mlp[i]);
  }
  std::vector<int64_t> sizes{static_cast<int64_t>(layers)};
  sizes.insert(sizes.end(), x.sizes().begin(), x.sizes().end());
  Tensor y = check.new_tensor(x, sizes, x.scalar_type());
  if (layers == 0) return y;
  const Tensor attended = check.contiguous_like(x);
  const int64_t bytes = attended.numel() * static_cast<int64_t>(attended.element_size());
  char* next = static_cast<char*>(y.mutable_data_ptr());
  for (size_t i = 0; i < layers; ++i, next += bytes) {
    if (i > 0) {
      follow(mlp[i - 1].y, attention[i].norm);
      attention[i].rotary.q.x_tokens = attention[i].norm.x_rows;
    }
    attention[i].y = attended.mutable_data_ptr();
    follow(attention[i].y, mlp[i].norm);
    mlp[i].y = next;
  }
  const DecoderLayersParams p{static_cast<int64_t>(layers), attention.data(), mlp.data()};
  const Status status = device::run(check, &device::kernels::decoder_layers, p, y);
  if (status == Status::kIndexOutOfRange) {
    for (size_t i = 0; i < layers; ++i) {
      const Checker of_layer(check.op(), settings[i * kSettings + kNumber]);
      refuse_bad_indices(of_layer, attention[i]);
      refuse_bad_indices(of_layer, mlp[i]);
    }
    const auto rotates = [](const AttentionBlockParams& of) { return of.rotary.pairs > 0; };
    refuse_bad_position(check, std::find_if(attention.begin(), attention.end(), rotates)->rotary);
  }
  check.ok(status);
  return y;
}

}  // namespace

QOPS_REGISTER(m) {
  m.impl("attention_block", TORCH_BOX(&attention_block));
  m.impl("decoder_layers", TORCH_BOX(&decoder_layers));
  m.impl("mlp_block", TORCH_BOX(&mlp_block));
}

QOPS_EXPLAIN(attention_block, AttentionBlockParams, attention_block)
QOPS_EXPLAIN(decoder_layers, DecoderLayersParams, decoder_layers)
QOPS_EXPLAIN(mlp_block, MlpBlockParams, mlp_block)

}  // namespace qops::binding

#endif
