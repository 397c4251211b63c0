#include <initializer_list>
#include <tuple>
#include <utility>

#include "binding/rotary.h"

namespace qops::binding {

template <class Visitor>
void describe_call(RotaryParams& p, Visitor& v) {
  v.rows("tokens", p.q.x_tokens);
  v.size("q_heads", p.q.heads);
  v.size("k_heads", p.k.heads);
  v.size("d", p.d);
  v.size("pairs", p.pairs);
  v.dtype("dtype", p.dtype);
  v.flag("interleaved", p.interleaved);
  v.when_asked([&](const Checker& check) {
    check.require(2 * p.pairs <= p.d, "pairs", "be at most D / 2 = " + std::to_string(p.d / 2),
                  std::to_string(p.pairs));
    for (RotaryHeads* heads : {&p.q, &p.k}) {
      heads->x_tokens = p.q.x_tokens;
      heads->x_tokens.stride[0] = heads->heads * p.d;
      heads->x_head_stride = p.d;
      heads->x_stride = 1;
      heads->y_tokens = heads->x_tokens;
      heads->y_head_stride = p.d;
      heads->y_stride = 1;
    }
    p.t = p.table_rows = p.q.x_tokens.count;
    p.cos_row_stride = p.sin_row_stride = p.pairs;
    p.cos_stride = p.sin_stride = 1;
    p.table_dtype = p.dtype;
  });
}

template <class Visitor>
void describe_call(QkNormRotaryParams& p, Visitor& v) {
  describe_call(p.rotary, v);
}

namespace {

void check_shapes(const Checker& check, const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  const auto q_sizes = q.sizes(), k_sizes = k.sizes(), cos_sizes = cos.sizes();
  const size_t dims = q_sizes.size();
  if (dims < 3) check.refuse("q", "have at least 3 dimensions [T, H, D]", std::to_string(dims));
  bool fits = k_sizes.size() == dims;
  for (size_t d = 0; fits && d < dims; ++d) fits = d == dims - 2 || k_sizes[d] == q_sizes[d];
  if (!fits) {
    check.refuse("k", "have the shape of q = " + to_string(q_sizes) + " but for the number of heads",
                 to_string(k_sizes));
  }
  if (cos_sizes.size() != 2) {
    check.refuse("cos", "have 2 dimensions [positions, R / 2]", std::to_string(cos_sizes.size()));
  }
  const int64_t half = q_sizes[dims - 1] / 2;
  if (cos_sizes[1] > half) {
    check.refuse("cos", "have at most D / 2 = " + std::to_string(half) + " columns", std::to_string(cos_sizes[1]));
  }
  check.same_shape(sin, "sin", cos, "cos");
}

RotaryHeads input(const Checker& check, const Tensor& x, const char* arg) {
  RotaryHeads heads{};
  heads.x = x.const_data_ptr();
  heads.x_tokens = check.rows(x, arg, 2);
  heads.x_head_stride = x.stride(x.dim() - 2);
  heads.x_stride = x.stride(x.dim() - 1);
  heads.heads = x.size(x.dim() - 2);
  return heads;
}

void set_output(const Checker& check, RotaryHeads& heads, const Tensor& y, const char* arg) {
  heads.y = y.mutable_data_ptr();
  heads.y_tokens = check.rows(y, arg, 2);
  heads.y_head_stride = y.stride(y.dim() - 2);
  heads.y_stride = y.stride(y.dim() - 1);
}

// Everything but the outputs; called before anything is allocated.
RotaryParams checked(const Checker& check, const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                     const std::optional<Tensor>& positions, bool interleaved) {
  RotaryParams p{};
  check.device(q, "q", q);
  check.device(k, "k", q);
  check.device(cos, "cos", q);
  check.device(sin, "sin", q);
  p.dtype = check.float_dtype(q, "q");
  check.same_dtype(k, "k", q, "q");
  p.table_dtype = check.float32_or_same_dtype(cos, "cos", q, "q");
  check.same_dtype(sin, "sin", cos, "cos");
  check_shapes(check, q, k, cos, sin);

  p.q = input(check, q, "q");
  p.k = input(check, k, "k");
  set_tables(cos, sin, p);
  p.d = q.size(q.dim() - 1);
  p.pairs = cos.size(1);
  p.interleaved = interleaved;
  take_positions(check, positions, Sizes(q.sizes().data(), static_cast<size_t>(q.dim() - 2)), q, p);
  return p;
}

// As checked(), with a norm.
QkNormRotaryParams checked(const Checker& check, const Tensor& q, const Tensor& k, const Tensor& q_weight,
                           const Tensor& k_weight, const Tensor& cos, const Tensor& sin, double eps,
                           const std::optional<Tensor>& positions, bool interleaved, double weight_offset,
                           std::string_view rounding) {
  QkNormRotaryParams p{};
  p.rotary = checked(check, q, k, cos, sin, positions, interleaved);
  check.device(q_weight, "q_weight", q);
  check.device(k_weight, "k_weight", q);
  p.q_weight_dtype = check.float_dtype(q_weight, "q_weight");
  p.k_weight_dtype = check.float_dtype(k_weight, "k_weight");
  check.shape(q_weight, "q_weight", "[D]", {p.rotary.d});
  check.shape(k_weight, "k_weight", "[D]", {p.rotary.d});
  check.dense_last_dim(q_weight, "q_weight");
  check.dense_last_dim(k_weight, "k_weight");
  p.style = check.rms_norm_style(eps, weight_offset, rounding);
  p.q_weight = q_weight.const_data_ptr();
  p.k_weight = k_weight.const_data_ptr();
  return p;
}

// q and k, which an op writes in place, against each other and against what it reads besides.
void check_in_place(const Checker& check, const Tensor& q, const Tensor& k,
                    std::initializer_list<std::pair<const Tensor*, const char*>> inputs,
                    const std::optional<Tensor>& positions) {
  check.no_overlap_within(q, "q");
  check.no_overlap_within(k, "k");
  check.no_overlap(k, "k", q, "q");
  for (const auto& [written, name] : {std::pair{&q, "q"}, std::pair{&k, "k"}}) {
    for (const auto& [input, input_name] : inputs) check.no_overlap(*input, input_name, *written, name);
    if (positions) check.no_overlap(*positions, "positions", *written, name);
  }
}

void set_outputs(const Checker& check, RotaryParams& p, const Tensor& q, const Tensor& k) {
  set_output(check, p.q, q, "q");
  set_output(check, p.k, k, "k");
}

// kernel: rotary or qk_norm_rotary, whose parameters hold p.
template <class Params>
void run(const Checker& check, RotaryParams& p, device::Kernel<Params> kernel, const Params& params, const Tensor& q) {
  int64_t bad_position = 0;
  p.bad_position = &bad_position;
  const Status status = device::run(check, kernel, params, q);
  if (status == Status::kIndexOutOfRange) refuse_bad_position(check, p);
  check.ok(status);
}

void run(const Checker& check, RotaryParams& p, const Tensor& q) { run(check, p, &device::kernels::rotary, p, q); }
void run(const Checker& check, QkNormRotaryParams& p, const Tensor& q) {
  run(check, p.rotary, &device::kernels::qk_norm_rotary, p, q);
}

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                  const std::optional<Tensor>& positions, bool interleaved) {
  constexpr Checker check("rotary");
  RotaryParams p = checked(check, q, k, cos, sin, positions, interleaved);
  Tensor q_out = check.contiguous_like(q);
  Tensor k_out = check.contiguous_like(k);
  set_outputs(check, p, q_out, k_out);
  run(check, p, q);
  return {q_out, k_out};
}

void rotary_(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
             const std::optional<Tensor>& positions, bool interleaved) {
  constexpr Checker check("rotary_");
  RotaryParams p = checked(check, q, k, cos, sin, positions, interleaved);
  check_in_place(check, q, k, {{&cos, "cos"}, {&sin, "sin"}}, positions);
  set_outputs(check, p, q, k);
  run(check, p, q);
}

std::tuple<Tensor, Tensor> qk_norm_rotary(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                          const Tensor& k_weight, const Tensor& cos, const Tensor& sin, double eps,
                                          const std::optional<Tensor>& positions, bool interleaved,
                                          double weight_offset, std::string_view rounding) {
  constexpr Checker check("qk_norm_rotary");
  QkNormRotaryParams p =
      checked(check, q, k, q_weight, k_weight, cos, sin, eps, positions, interleaved, weight_offset, rounding);
  Tensor q_out = check.contiguous_like(q);
  Tensor k_out = check.contiguous_like(k);
  set_outputs(check, p.rotary, q_out, k_out);
  run(check, p, q);
  return {q_out, k_out};
}

void qk_norm_rotary_(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
                     const Tensor& cos, const Tensor& sin, double eps, const std::optional<Tensor>& positions,
                     bool interleaved, double weight_offset, std::string_view rounding) {
  constexpr Checker check("qk_norm_rotary_");
  QkNormRotaryParams p =
      checked(check, q, k, q_weight, k_weight, cos, sin, eps, positions, interleaved, weight_offset, rounding);
  check_in_place(check, q, k, {{&q_weight, "q_weight"}, {&k_weight, "k_weight"}, {&cos, "cos"}, {&sin, "sin"}},
                 positions);
  set_outputs(check, p.rotary, q, k);
  run(check, p, q);
}

}  // namespace

QOPS_REGISTER(m) {
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rotary_", TORCH_BOX(&rotary_));
  m.impl("qk_norm_rotary", TORCH_BOX(&qk_norm_rotary));
  m.impl("qk_norm_rotary_", TORCH_BOX(&qk_norm_rotary_));
}

QOPS_EXPLAIN(rotary, RotaryParams, rotary)
QOPS_EXPLAIN(rotary_, RotaryParams, rotary)
QOPS_EXPLAIN(qk_norm_rotary, QkNormRotaryParams, qk_norm_rotary)
QOPS_EXPLAIN(qk_norm_rotary_, QkNormRotaryParams, qk_norm_rotary)

}  // namespace qops::binding
