// The C++ side of every schema in registration.cpp.
#pragma once

#include <string_view>
#include <tuple>

#include "binding/checks.h"

namespace qops::binding {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset, std::string_view rounding);
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                                        double weight_offset, std::string_view rounding);

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                  const std::optional<Tensor>& positions, bool interleaved);
void rotary_(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
             const std::optional<Tensor>& positions, bool interleaved);

Tensor silu_mul(const Tensor& gate_up, std::string_view rounding);
Tensor silu_mul_gate_up(const Tensor& gate, const Tensor& up, std::string_view rounding);

}  // namespace qops::binding
