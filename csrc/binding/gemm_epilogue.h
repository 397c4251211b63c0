// The arguments of a matrix product that tell what becomes of y = x @ w.T + bias: at most one of residual, silu_mul and
// out_scale. Params: those of a product, whose n and dtype are known.
#pragma once

#include "binding/int8_rows.h"

namespace qops::binding {

template <class Visitor>
void describe_product(Rows& rows, int64_t& n, int64_t& k, Visitor& v) {
  v.rows("m", rows);
  v.size("n", n, 8);
  v.size("k", k, 8);
  v.when_asked([&](const Checker& check) {
    rows.stride[0] = k;
    constexpr int64_t kMost = int64_t{1} << 62;  // of what plans count
    check.require(k == 0 || rows.count * n <= kMost / k, "m", "be so small that M N K <= 2^62",
                  std::to_string(rows.count));
  });
}

inline ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return ScalarType::Float;
    case DType::kFloat16: return ScalarType::Half;
    case DType::kBFloat16: return ScalarType::BFloat16;
    case DType::kInt32: return ScalarType::Int;
  }
  return ScalarType::Undefined;
}

inline void check_gate_and_up(const Checker& check, const char* arg, int64_t n) {
  if (n % 16 != 0) check.refuse(arg, "be a multiple of 16, for gate and up, with silu_mul", std::to_string(n));
}

template <class Params, class Visitor>
void describe_epilogue(Params& p, Visitor& v) {
  v.choice("epilogue", p.epilogue, {"none", "silu_mul", "int8"});
  v.when_asked([&](const Checker& check) {
    if (p.epilogue == Epilogue::kSiluMul) check_gate_and_up(check, "n", p.n);
  });
}

template <class Params>
void take_epilogue(const Checker& check, const Tensor& x, const std::optional<Tensor>& residual, bool silu_mul,
                   const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point, Params& p) {
  if (residual) {
    if (silu_mul || out_scale) check.refuse("residual", "be None with silu_mul or out_scale", "a tensor");
    check.device(*residual, "residual", x);
    check.dtype(*residual, "residual", scalar_type(p.dtype));
    check.shape(*residual, "residual", "[..., N]", with_last_size(x, p.n));
    check.dense_last_dim(*residual, "residual");
    p.residual_rows = check.rows(*residual, "residual");
    p.residual = residual->const_data_ptr();
  }
  if (silu_mul) {
    check_gate_and_up(check, "out_features", p.n);
    if (out_scale) check.refuse("out_scale", "be None with silu_mul", "a tensor");
    p.epilogue = Epilogue::kSiluMul;
  }
  if (out_zero_point && !out_scale) check.refuse("out_zero_point", "be None without out_scale", "a tensor");
  if (out_scale) {
    const StaticScale one = static_scale(check, *out_scale, "out_scale", out_zero_point, "out_zero_point", x);
    p.out_scale = one.scale;
    p.out_zero_point = one.zero_point;
    p.epilogue = Epilogue::kInt8;
  }
}

template <class Params>
std::vector<int64_t> output_sizes(const Params& p, const Tensor& x) {
  return with_last_size(x, p.epilogue == Epilogue::kSiluMul ? p.n / 2 : p.n);
}

template <class Params>
ScalarType output_dtype(const Params& p) {
  return p.epilogue == Epilogue::kInt8 ? ScalarType::Char : scalar_type(p.dtype);
}

template <class Params>
Tensor new_output(const Checker& check, const Tensor& x, const Params& p) {
  return check.new_tensor(x, output_sizes(p, x), output_dtype(p));
}

// That an output of the caller's fits.
template <class Params>
void check_output(const Checker& check, const Tensor& out, const Tensor& x, const Params& p) {
  const char* letters = p.epilogue == Epilogue::kSiluMul ? "[..., N / 2]" : "[..., N]";
  check.output(out, "out", x, output_dtype(p), letters, output_sizes(p, x));
}

}  // namespace qops::binding
