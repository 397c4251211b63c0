#include "binding/device.h"
#include "binding/weight_strips.h"

namespace qops::binding {

template <class Visitor>
void describe_call(WeightPackParams& p, Visitor& v) {
  v.size("n", p.n, 8);
  v.size("k", p.k, 8);
}

namespace {

constexpr int64_t kMaxColumns = int64_t{1} << 58;

using Pack = device::Kernel<WeightPackParams>;

// codes_per_element: 2 for int4 (two codes in a byte), 1 for int8.
Tensor pack(const Checker& check, const Tensor& qweight, ScalarType dtype, int64_t codes_per_element, Pack kernel) {
  check.dtype(qweight, "qweight", dtype);
  check.require(qweight.dim() == 2, "qweight", "have 2 dimensions", std::to_string(qweight.dim()));
  const int64_t n = qweight.size(0);
  check.require(n % 8 == 0, "qweight", "have a multiple of 8 rows", std::to_string(n));
  // A row of a packed weight is 16 rows of this one.
  check.require(qweight.size(1) < kMaxColumns, "qweight", "have fewer than 2^58 elements in a row",
                std::to_string(qweight.size(1)));
  const int64_t k = qweight.size(1) * codes_per_element;
  check.require(k % 8 == 0, "qweight", "have a multiple of 8 columns", std::to_string(k));
  check.contiguous(qweight, "qweight");
  Tensor packed = check.new_tensor(qweight, {strips_of(n), stored_columns(k) / codes_per_element * kStripRows}, dtype);
  check.ok(device::run(check, kernel, {qweight.const_data_ptr(), packed.mutable_data_ptr(), n, k}, packed));
  return packed;
}

Tensor unpack(const Checker& check, const Tensor& packed, int64_t out_features, ScalarType dtype,
              int64_t codes_per_element, Pack kernel) {
  check.dtype(packed, "packed", dtype);
  check.require(packed.dim() == 2, "packed", "have 2 dimensions", std::to_string(packed.dim()));
  check.require(out_features >= 0 && out_features % 8 == 0, "out_features", "be a multiple of 8",
                std::to_string(out_features));
  check.require(packed.size(0) == strips_of(out_features), "packed",
                "have ceil(out_features / 16) = " + std::to_string(strips_of(out_features)) + " strips",
                std::to_string(packed.size(0)));
  const int64_t row_bytes = 8 / codes_per_element * kStripRows;  // 8 columns of a strip
  const int64_t least = stored_columns(8) / 8 * row_bytes;
  check.require(packed.size(1) % least == 0, "packed", "have strips of a multiple of " + std::to_string(least),
                std::to_string(packed.size(1)));
  check.contiguous(packed, "packed");
  check_alignment(check, packed, "packed");
  const int64_t elements = packed.size(1) / kStripRows;
  Tensor qweight = check.new_tensor(packed, {out_features, elements}, dtype);
  check.ok(device::run(
      check, kernel, {packed.const_data_ptr(), qweight.mutable_data_ptr(), out_features, elements * codes_per_element},
      qweight));
  return qweight;
}

void check_layout(const Tensor&, std::string_view layout) {
  constexpr Checker check("check_layout");
#if !defined(QOPS_CUDA)
  // Exported models call this. Where Python has loaded the module, it has refused these already.
  for (const char* error : {cpu::isa_error(), log_error()}) {
    if (error != nullptr) throw std::invalid_argument(std::string("qops: ") + error);
  }
#endif
  if (layout != device::kLayout) {
    check.refuse("layout",
                 "be '" + std::string(device::kLayout) + "', as weights are packed on this device by this build",
                 "'" + std::string(layout) + "': export the model again");
  }
}

Tensor int4_pack(const Tensor& qweight) {
  return pack(Checker("int4_pack"), qweight, ScalarType::Byte, 2, &device::kernels::int4_pack);
}

Tensor int4_unpack(const Tensor& packed, int64_t out_features) {
  return unpack(Checker("int4_unpack"), packed, out_features, ScalarType::Byte, 2, &device::kernels::int4_unpack);
}

Tensor int8_pack(const Tensor& qweight) {
  return pack(Checker("int8_pack"), qweight, ScalarType::Char, 1, &device::kernels::int8_pack);
}

Tensor int8_unpack(const Tensor& packed, int64_t out_features) {
  return unpack(Checker("int8_unpack"), packed, out_features, ScalarType::Char, 1, &device::kernels::int8_unpack);
}

}  // namespace

QOPS_REGISTER(m) {
  m.impl("check_layout", TORCH_BOX(&check_layout));
  m.impl("int4_pack", TORCH_BOX(&int4_pack));
  m.impl("int4_unpack", TORCH_BOX(&int4_unpack));
  m.impl("int8_pack", TORCH_BOX(&int8_pack));
  m.impl("int8_unpack", TORCH_BOX(&int8_unpack));
}

}  // namespace qops::binding
