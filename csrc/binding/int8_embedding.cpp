// Of the CPU alone: on a GPU Int8Weight.rows() is a chain of torch's operators.
#include "binding/weight_strips.h"

#if !defined(QOPS_CUDA)

namespace qops::binding {

template <class Visitor>
void describe_call(Int8EmbeddingParams& p, Visitor& v) {
  v.size("tokens", p.tokens);
  v.size("n", p.n, 8);
  v.size("k", p.k, 8);
  describe_groups(p, v);
  describe_kind(p, v);
  v.dtype("dtype", p.dtype);
}

namespace {

Tensor int8_embedding(const Tensor& ids, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                      int64_t out_features, int64_t group_size, ScalarType dtype, bool mixed_gate_up) {
  constexpr Checker check("int8_embedding");
  Int8EmbeddingParams p{};
  check.device(ids, "ids", ids);
  check.device(packed, "packed", ids);
  check.device(scales, "scales", ids);
  check.index_dtype(ids, "ids");
  p.dtype = check.as_float_dtype(dtype, "dtype");
  take_weight(check, packed, ScalarType::Char, 16, scales, out_features, group_size, p);
  take_zeros(check, static_cast<int64_t>(zeros ? WeightKind::kOffset : WeightKind::kSymmetric), zeros, scales, p);
  check_mixed(check, mixed_gate_up, p.n);
  check.contiguous(ids, "ids");
  p.is_mixed = mixed_gate_up;
  p.ids = ids.const_data_ptr();
  p.ids_are_int64 = ids.scalar_type() == ScalarType::Long;
  p.tokens = ids.numel();
  std::vector<int64_t> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(p.k);
  Tensor y = check.new_tensor(ids, sizes, dtype);
  p.y = y.mutable_data_ptr();
  int64_t bad_id = 0;
  p.bad_id = &bad_id;
  const Status status = device::run(check, &device::kernels::int8_embedding, p, y);
  if (status == Status::kIndexOutOfRange) {
    check.refuse_index("ids", "lie in 0 ... N - 1, with N = " + std::to_string(p.n) + " rows", bad_id);
  }
  check.ok(status);
  return y;
}

}  // namespace

QOPS_REGISTER(m) { m.impl("int8_embedding", TORCH_BOX(&int8_embedding)); }

}  // namespace qops::binding

#endif
