// Per token, q [..., K] and scale [...]: as outputs, new or given by the caller, and as arguments; with one scale for
// all, that scale.
#pragma once

#include <cmath>
#include <initializer_list>
#include <utility>

#include "binding/device.h"

namespace qops::binding {

// Of the three quantisers, whose fields have the same names.
template <class Params, class Visitor>
void describe_rows(Params& p, Visitor& v) {
  v.rows("rows", p.x_rows);
  v.size("k", p.k);
  v.dtype("dtype", p.dtype);
  v.when_asked([&](const Checker&) { p.x_rows.stride[0] = p.k; });
}

template <class Visitor>
void describe_call(QuantizeInt8Params& p, Visitor& v) {
  describe_rows(p, v);
}

inline std::pair<Tensor, Tensor> new_int8_rows(const Checker& check, const Tensor& x, int64_t k) {
  return {check.new_tensor(x, with_last_size(x, k), ScalarType::Char),
          check.new_tensor(x, leading_sizes(x), ScalarType::Float)};
}

// `inputs`: what the op reads; the outputs must not share its memory.
inline void check_int8_rows(const Checker& check, const Tensor& q, const Tensor& scale, const Tensor& x, int64_t k,
                            std::initializer_list<std::pair<const Tensor*, const char*>> inputs) {
  check.output(q, "q", x, ScalarType::Char, "[..., K]", with_last_size(x, k));
  check.output(scale, "scale", x, ScalarType::Float, "[...]", leading_sizes(x));
  check.no_overlap(scale, "scale", q, "q");
  for (const auto& [input, name] : inputs) {
    check.no_overlap(q, "q", *input, name);
    check.no_overlap(scale, "scale", *input, name);
  }
}

inline Int8Output int8_output(const Tensor& q, const Tensor& scale, QuantizeRule rule) {
  return {q.mutable_data_ptr<int8_t>(), scale.mutable_data_ptr<float>(), rule};
}

// As arguments: one value for each row of q, or one for all.
inline Rows per_row(const Checker& check, const Tensor& t, const char* arg, const Tensor& q, int64_t rows) {
  if (t.dim() == 0) {
    Rows same;
    same.count = rows;
    same.dims = 1;
    same.size[0] = rows;
    return same;
  }
  const torch::headeronly::IntHeaderOnlyArrayRef leading(q.sizes().data(), static_cast<size_t>(q.dim() - 1));
  if (!t.sizes().equals(leading)) {
    check.refuse(arg, "have shape [...] = " + to_string(leading) + " or []", to_string(t.sizes()));
  }
  return check.rows(t, arg, 0);
}

struct StaticScale {
  const float* scale;
  const int32_t* zero_point;  // null: 0
};

inline StaticScale static_scale(const Checker& check, const Tensor& scale, const char* scale_arg,
                                const std::optional<Tensor>& zero_point, const char* zero_point_arg, const Tensor& x) {
  const auto one_element = [&](const Tensor& t, const char* arg, ScalarType dtype) {
    check.device(t, arg, x);
    check.dtype(t, arg, dtype);
    if (t.numel() != 1) check.refuse(arg, "have 1 element", std::to_string(t.numel()));
  };
  one_element(scale, scale_arg, ScalarType::Float);
  if (zero_point) one_element(*zero_point, zero_point_arg, ScalarType::Int);
  const StaticScale s{scale.const_data_ptr<float>(), zero_point ? zero_point->const_data_ptr<int32_t>() : nullptr};
  if (!device::kValuesAreReadable) return s;
  if (!(*s.scale > 0.0f && std::isfinite(*s.scale))) {
    check.refuse(scale_arg, "be positive and finite", std::to_string(*s.scale));
  }
  if (s.zero_point != nullptr && (*s.zero_point < -128 || *s.zero_point > 127)) {
    check.refuse(zero_point_arg, "lie in -128 .. 127", std::to_string(*s.zero_point));
  }
  return s;
}

}  // namespace qops::binding
