// Whole decoder layers, one after another.
#include <algorithm>
#include <cstring>

#include "binding/decoder_block.h"

#if !defined(QOPS_CUDA)

namespace qops::binding {

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

// What layers are made of. Python gives it once: to take it from its lists anew takes as long in each step as a few
// layers do. A tensor stands for it, of the bytes of `mark`, and lets go of it with its memory.
struct Plan {
  struct Mark {
    uint64_t magic;
    const void* itself;  // so that no copy passes
  } mark{kMagic, this};
  Tensors weights;
  std::vector<int64_t> settings;
  std::string rounding;
  NormStyle style;
  double scale;

  Plan(const Tensors& weights, const std::vector<int64_t>& settings, double eps, double weight_offset,
       std::string_view rounding, double scale)
      : weights(weights),
        settings(settings),
        rounding(rounding),
        style{eps, weight_offset, this->rounding},
        scale(scale) {}
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  size_t layers() const { return settings.size() / kSettings; }

  static constexpr uint64_t kMagic = 0x71f3a96b08d25ce4;
};

// What is shared by the layers of a step.
struct Step {
  const Tensor& x;
  const std::optional<Tensor>&cos, &sin, &positions;
  const std::vector<Tensor>&keys, &values;
  const std::optional<Tensor>& mask;
  const int64_t* first_positions;  // null: those of the settings
};

std::vector<Tensor> run(const Plan& plan, const Step& step) {
  const Checker& check = check_layers;
  const auto& [x, cos, sin, positions, keys, values, mask, first_positions] = step;
  const size_t layers = keys.size();
  const std::optional<Tensor> none;
  struct Bad {
    int64_t attention[2] = {kNoIndex, kNoIndex}, mlp[2] = {kNoIndex, kNoIndex}, position = 0;
  };
  std::vector<AttentionBlockParams> attention(layers);
  std::vector<MlpBlockParams> mlp(layers);
  std::vector<Bad> bad(layers);
  for (size_t i = 0; i < layers; ++i) {
    const Layer layer{plan.weights.data() + i * kPartCount, plan.settings.data() + i * kSettings};
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
                                   plan.scale,
                                   0.0,
                                   first_positions != nullptr && mask ? 0 : layer.settings[kWindow],
                                   first_positions != nullptr ? first_positions[i] : layer.settings[kFirstPosition]};
    take_attention_block(layer.check, x, plan.style, attends, bad[i].attention, &bad[i].position, attention[i]);
    const MlpTensors mixes{{layer.needed(kMlpNorm), part[kMlpNorm + 1], kParts[kMlpNorm], kParts[kMlpNorm + 1]},
                           layer.linear(kGateUpPart, kGateUpKind),
                           layer.linear(kDownPart, kDownKind),
                           layer.settings[kMixed] != 0};
    take_mlp(layer.check, x, plan.style, mixes, bad[i].mlp, mlp[i]);
  }
  std::vector<Tensor> outputs;
  outputs.reserve(layers);
  if (layers == 0) return outputs;
  const Tensor attended = check.contiguous_like(x);
  for (size_t i = 0; i < layers; ++i) {
    outputs.push_back(check.contiguous_like(x));
    if (i > 0) {
      follow(mlp[i - 1].y, attention[i].norm);
      attention[i].rotary.q.x_tokens = attention[i].norm.x_rows;
    }
    attention[i].y = attended.mutable_data_ptr();
    follow(attention[i].y, mlp[i].norm);
    mlp[i].y = outputs[i].mutable_data_ptr();
  }
  const DecoderLayersParams p{static_cast<int64_t>(layers), attention.data(), mlp.data()};
  const Status status = device::run(check, &device::kernels::decoder_layers, p, attended);
  if (status == Status::kIndexOutOfRange) {
    for (size_t i = 0; i < layers; ++i) {
      const Checker of_layer(check.op(), plan.settings[i * kSettings + kNumber]);
      refuse_bad_indices(of_layer, attention[i]);
      refuse_bad_indices(of_layer, mlp[i]);
    }
    const auto rotates = [](const AttentionBlockParams& of) { return of.rotary.pairs > 0; };
    refuse_bad_position(check, std::find_if(attention.begin(), attention.end(), rotates)->rotary);
  }
  check.ok(status);
  return outputs;
}

std::vector<Tensor> decoder_layers(const Tensor& x, const Tensors& weights, const std::vector<int64_t>& settings,
                                   double eps, double weight_offset, std::string_view rounding, double scale,
                                   const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                                   const std::optional<Tensor>& positions, const std::vector<Tensor>& keys,
                                   const std::vector<Tensor>& values, const std::optional<Tensor>& mask) {
  const Checker& check = check_layers;
  const size_t layers = keys.size();
  check_count(check, values.size(), "values", layers, 1);
  check_count(check, weights.size(), "weights", layers, kPartCount);
  check_count(check, settings.size(), "settings", layers, kSettings);
  const Plan plan(weights, settings, eps, weight_offset, rounding, scale);
  return run(plan, {x, cos, sin, positions, keys, values, mask, nullptr});
}

Tensor decoder_plan(const Tensors& weights, const std::vector<int64_t>& settings, double eps, double weight_offset,
                    std::string_view rounding, double scale) {
  constexpr Checker check("decoder_plan");
  const size_t layers = settings.size() / kSettings;
  if (layers == 0) check.refuse("settings", "hold those of a layer", std::to_string(settings.size()));
  check_count(check, settings.size(), "settings", layers, kSettings);
  check_count(check, weights.size(), "weights", layers, kPartCount);
  if (!weights[kNorm]) check.unsupported("norm must be a tensor, got None");
  Plan* const plan = new Plan(weights, settings, eps, weight_offset, rounding, scale);
  return torch::stable::from_blob(&plan->mark, {sizeof(Plan::Mark)}, {1}, weights[kNorm]->device(), ScalarType::Byte,
                                  [plan](void*) { delete plan; });
}

const Plan* plan_of(const Checker& check, const Tensor& t, const Tensor& x) {
  check.device(t, "plan", x);
  Plan::Mark mark{};
  if (check.dtype_of(t, "plan") == ScalarType::Byte && t.numel() == sizeof(mark) && t.is_contiguous()) {
    std::memcpy(&mark, t.const_data_ptr(), sizeof(mark));
  }
  const auto* plan = static_cast<const Plan*>(mark.itself);
  if (mark.magic != Plan::kMagic || &plan->mark != t.const_data_ptr()) {
    check.fail("plan must be what decoder_plan has given, got another tensor");
  }
  return plan;
}

std::vector<Tensor> planned_layers(const Tensor& x, const Tensor& plan, const std::optional<Tensor>& cos,
                                   const std::optional<Tensor>& sin, const std::optional<Tensor>& positions,
                                   const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                                   const std::vector<int64_t>& first_positions, const std::optional<Tensor>& mask) {
  const Checker& check = check_layers;
  const Plan* const found = plan_of(check, plan, x);
  const size_t layers = keys.size();
  if (layers > found->layers()) {
    check.refuse("keys", "hold one for each layer of the plan = " + std::to_string(found->layers()) + " at most",
                 std::to_string(layers));
  }
  check_count(check, values.size(), "values", layers, 1);
  check_count(check, first_positions.size(), "first_positions", layers, 1);
  return run(*found, {x, cos, sin, positions, keys, values, mask, first_positions.data()});
}

}  // namespace

QOPS_REGISTER(m) {
  m.impl("decoder_layers", TORCH_BOX(&decoder_layers));
  m.impl("decoder_layers.planned", TORCH_BOX(&planned_layers));
  m.impl("decoder_plan", TORCH_BOX(&decoder_plan));
}

QOPS_EXPLAIN(decoder_layers, DecoderLayersParams, decoder_layers)

}  // namespace qops::binding

#endif
