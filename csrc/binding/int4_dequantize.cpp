#include "binding/weight_strips.h"

namespace qops::binding {

template <class Visitor>
void describe_call(Int4DequantizeParams& p, Visitor& v) {
  v.size("n", p.n, 8);
  v.size("k", p.k, 8);
  describe_groups(p, v);
  describe_kind(p, v);
  v.dtype("dtype", p.dtype);
}

namespace {

Tensor int4_dequantize(const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                       int64_t out_features, int64_t group_size, int64_t kind, ScalarType dtype, bool mixed_gate_up) {
  constexpr Checker check("int4_dequantize");
  Int4DequantizeParams p{};
  check.device(packed, "packed", packed);
  check.device(scales, "scales", packed);
  p.dtype = check.as_float_dtype(dtype, "dtype");
  take_weight(check, packed, ScalarType::Byte, 8, scales, out_features, group_size, p);
  take_zeros(check, kind, zeros, scales, p);
  check_mixed(check, mixed_gate_up, p.n);
  p.is_mixed = mixed_gate_up;
  Tensor w = check.new_tensor(packed, {p.n, p.k}, dtype);
  p.w = w.mutable_data_ptr();
  check.ok(device::run(check, &device::kernels::int4_dequantize, p, w));
  return w;
}

}  // namespace

QOPS_REGISTER(m) { m.impl("int4_dequantize", TORCH_BOX(&int4_dequantize)); }

QOPS_EXPLAIN(int4_dequantize, Int4DequantizeParams, int4_dequantize)

}  // namespace qops::binding
