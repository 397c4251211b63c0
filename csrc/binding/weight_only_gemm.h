// The arguments that int4_gemm and int8_weight_only_gemm share, and int4_int8_gemm where they are not x.
#pragma once

#include "binding/gemm_epilogue.h"
#include "binding/weight_strips.h"

namespace qops::binding {

template <class Visitor>
void describe_call(WeightOnlyGemmParams& p, Visitor& v) {
  describe_product(p.x_rows, p.n, p.k, v);
  describe_groups(p, v);
  v.dtype("dtype", p.dtype);
  if (v.op() != "int4_gemm") {
    v.given("zeros", p.zeros);
    v.when_asked([&](const Checker&) { p.kind = p.zeros == nullptr ? WeightKind::kSymmetric : WeightKind::kOffset; });
    v.given("perm", p.perm);
    return;
  }
  describe_kind(p, v);
  v.given("perm", p.perm);
  v.flag("batch_invariant", p.batch_invariant);
  describe_epilogue(p, v);
}

// Without the output; called before anything is allocated.
inline WeightOnlyGemmParams weight_only_gemm_params(const Checker& check, const Tensor& x, const Tensor& packed,
                                                    ScalarType packed_dtype, int64_t strip_elements_per_column,
                                                    const Tensor& scales, const std::optional<Tensor>& bias,
                                                    int64_t out_features, int64_t group_size) {
  WeightOnlyGemmParams p{};
  check.device(x, "x", x);
  check.device(packed, "packed", x);
  check.device(scales, "scales", x);
  p.dtype = check.float_dtype(x, "x");
  check.at_least_1d(x, "x");
  take_weight(check, packed, packed_dtype, strip_elements_per_column, scales, out_features, group_size, p);
  if (x.size(x.dim() - 1) != p.k) {
    check.refuse("x", "have last dimension K = " + std::to_string(p.k), std::to_string(x.size(x.dim() - 1)));
  }
  check.dense_last_dim(x, "x");
  if (bias) {
    check.device(*bias, "bias", x);
    p.bias_dtype = check.float_dtype(*bias, "bias");
    check.shape(*bias, "bias", "[N]", {p.n});
    check.dense_last_dim(*bias, "bias");
    p.bias = bias->const_data_ptr();
  }
  p.x_rows = check.rows(x, "x");
  p.x = x.const_data_ptr();
  return p;
}

// The order in which columns are stored.
inline void take_perm(const Checker& check, const std::optional<Tensor>& perm, const Tensor& x,
                      WeightOnlyGemmParams& p) {
  if (!perm) return;
  check.device(*perm, "perm", x);
  check.dtype(*perm, "perm", ScalarType::Int);
  check.shape(*perm, "perm", "[K]", {p.k});
  check.contiguous(*perm, "perm");
  p.perm = perm->const_data_ptr<int32_t>();
}

inline void check_output(const Checker& check, const Tensor& out, const Tensor& x, const Tensor& packed,
                         const Tensor& scales, const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                         const std::optional<Tensor>& bias, const WeightOnlyGemmParams& p) {
  check_output(check, out, x, p);
  check.no_overlap(out, "out", x, "x");
  check.no_overlap(out, "out", packed, "packed");
  check.no_overlap(out, "out", scales, "scales");
  if (bias) check.no_overlap(out, "out", *bias, "bias");
  if (zeros) check.no_overlap(out, "out", *zeros, "zeros");
  if (perm) check.no_overlap(out, "out", *perm, "perm");
}

template <class Params>
void run_product(const Checker& check, device::Kernel<Params> kernel, Params& p, const Tensor& y) {
  int64_t bad_index = 0;
  p.bad_index = &bad_index;
  const Status status = device::run(check, kernel, p, y);
  if (status == Status::kIndexOutOfRange) {
    check.refuse("perm", "hold indices in 0 .. " + std::to_string(p.k - 1), std::to_string(bad_index));
  }
  check.ok(status);
}

}  // namespace qops::binding
