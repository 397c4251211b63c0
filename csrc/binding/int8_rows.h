// What the ops that emit per-token int8 share: q [..., K] and scale [...] as outputs, new or given by the caller.
#pragma once

#include <initializer_list>
#include <utility>

#include "binding/checks.h"

namespace qops::binding {

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

inline Int8Rows int8_rows(const Tensor& q, const Tensor& scale, QuantizeRule rule) {
  return {q.mutable_data_ptr<int8_t>(), scale.mutable_data_ptr<float>(), rule};
}

}  // namespace qops::binding
