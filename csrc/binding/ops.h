// The C++ side of every schema in registration.cpp.
#pragma once

#include <string_view>
#include <tuple>

#include "binding/checks.h"

namespace qops::binding {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset, std::string_view rounding);
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                                        double weight_offset, std::string_view rounding);

}  // namespace qops::binding
