// A linear as arguments of a block of operators.
#pragma once

#include <limits>

#include "binding/weight_strips.h"

namespace qops::binding {

// The arguments of a linear, by their names.
struct LinearNames {
  const char *packed, *scales, *zeros, *perm, *bias, *kind, *input;
};
struct LinearTensors {
  const Tensor &packed, &scales;
  const std::optional<Tensor>&zeros, &perm, &bias;
  int64_t kind, input;
};

// Columns of a packed weight, by its own shape.
inline int64_t columns_of(const Checker& check, const Tensor& packed, const char* arg) {
  const ScalarType dtype = check.dtype_of(packed, arg);
  if (dtype != ScalarType::Byte && dtype != ScalarType::Char) {
    check.unsupported(std::string(arg) + " must have dtype uint8 or int8, got " + dtype_name(dtype));
  }
  if (packed.dim() != 2) check.refuse(arg, "have 2 dimensions", std::to_string(packed.dim()));
  const int64_t elements = dtype == ScalarType::Byte ? 8 : 16;
  if (packed.size(1) % (8 * elements) != 0) {
    check.refuse(arg, "hold a multiple of 8 columns of " + std::to_string(elements) + " elements a strip",
                 std::to_string(packed.size(1)));
  }
  return packed.size(1) / elements;
}

// More columns of int8 than sums can hold are refused.
inline void check_columns_of_int8(const Checker& check, const LinearNames& names, const BlockLinear& linear) {
  if (linear.input == BlockInput::kFloat) return;
  const bool zero_points = has_zero_points(linear.input);
  const int64_t of_8_bits = zero_points ? kMaxInt8ColumnsWithZeroPoint : kMaxInt8Columns;
  const int64_t most = linear.has_8_bits ? of_8_bits : kMaxInt4Int8Columns;
  if (linear.product.k <= most) return;
  check.refuse(names.packed,
               "have at most " + std::to_string(most) + " columns for an input of int8" +
                   (zero_points ? " with zero points" : ""),
               std::to_string(linear.product.k));
}

// What multiplies the weight, whose other arguments have been taken.
inline void take_input(const Checker& check, const LinearNames& names, const LinearTensors& t, BlockLinear& linear) {
  const WeightOnlyGemmParams& p = linear.product;
  const int64_t last =
      static_cast<int64_t>(linear.has_8_bits ? BlockInput::kCompressedTensorsAsym : BlockInput::kTorchao);
  if (t.input < 0 || t.input > last) {
    const char* known = linear.has_8_bits ? "be 0 (float), 1 (127), 2 (compressed-tensors), 3 (torchao), 4 (255) or 5 "
                                            "(compressed-tensors-asymmetric)"
                                          : "be 0 (float), 1 (127), 2 (compressed-tensors) or 3 (torchao) for a weight "
                                            "of 4 bits";
    check.refuse(names.input, known, std::to_string(t.input));
  }
  linear.input = static_cast<BlockInput>(t.input);
  if (linear.input == BlockInput::kFloat) return;
  if (!linear.has_8_bits) {
    check_columns_of_int8(check, names, linear);
    if (p.group_size > kMaxInt4Int8Group) {
      check.refuse(names.scales,
                   "have groups of at most " + std::to_string(kMaxInt4Int8Group) + " columns for an input of int8",
                   std::to_string(p.group_size));
    }
    return;
  }
  if (p.kind != WeightKind::kSymmetric) {
    check.refuse(names.kind, "be 0 (symmetric) for a weight of 8 bits and an input of int8", std::to_string(t.kind));
  }
  if (p.group_size < p.k) {
    check.refuse(names.scales, "have one group for a weight of 8 bits and an input of int8",
                 std::to_string(p.k / p.group_size) + " groups");
  }
  if (t.perm) check.refuse(names.perm, "be None for a weight of 8 bits and an input of int8", "a tensor");
  check_columns_of_int8(check, names, linear);
}

// The size of groups and the dtype of scales, by the shape of these.
inline void take_groups(const Checker& check, const LinearNames& names, const Tensor& scales, WeightOnlyGemmParams& p) {
  const auto in_strips = [&](int64_t dims) {
    return scales.dim() == dims && scales.size(0) == strips_of(p.n) && scales.size(dims - 1) == kStripRows;
  };
  if (take_scale_dtype(check, scales, names.scales, p)) {
    const int64_t codes = in_strips(4) ? scales.size(2) - 2 : 0;
    p.group_size = codes > 0 ? kSuperColumns / codes : 0;
    // Of no other number of codes than 2, 4, 8 and 16 is it the size of a group that has one.
    p.super_shift = super_shift_of(p.group_size);
    if (p.super_shift == 0 || p.k % kSuperColumns != 0 || scales.size(1) != p.k / kSuperColumns) {
      check.refuse(names.scales,
                   "have shape [S, K / 256, 2 + 256 / G, 16] with S = " + std::to_string(strips_of(p.n)) +
                       ", K = " + std::to_string(p.k) + ", G = 16, 32, 64 or 128",
                   to_string(scales.sizes()));
    }
    return;
  }
  if (!in_strips(3)) {
    check.refuse(names.scales, "have shape [S, K / group_size, 16] with S = " + std::to_string(strips_of(p.n)),
                 to_string(scales.sizes()));
  }
  const int64_t groups = scales.size(1);
  p.group_size = groups == 0 ? p.k : p.k / groups;
  const bool fits = groups == 0 ? p.k == 0 : p.k % groups == 0 && (groups == 1 || p.group_size % 16 == 0);
  if (!fits) {
    check.refuse(names.scales,
                 "have one group, or groups of a multiple of 16 columns that divides K = " + std::to_string(p.k),
                 std::to_string(groups) + " groups");
  }
}

// A weight [N, K], where K is what columns_of() says. `bad_index` is where a wrong index of its perm goes.
inline BlockLinear take_linear(const Checker& check, const LinearNames& names, const LinearTensors& t, const Tensor& x,
                               DType dtype, int64_t n, int64_t k, int64_t* bad_index) {
  BlockLinear linear{};
  WeightOnlyGemmParams& p = linear.product;
  check.device(t.packed, names.packed, x);
  check.device(t.scales, names.scales, x);
  const int64_t columns = columns_of(check, t.packed, names.packed);
  linear.has_8_bits = t.packed.scalar_type() == ScalarType::Char;
  p.dtype = dtype;
  p.n = n;
  p.k = k;
  if (t.packed.size(0) != strips_of(n) || columns != k) {
    check.refuse(names.packed, "hold a weight [N, K] = [" + std::to_string(n) + ", " + std::to_string(k) + "]",
                 std::to_string(t.packed.size(0)) + " strips of " + std::to_string(columns) + " columns");
  }
  take_groups(check, names, t.scales, p);
  check.contiguous(t.packed, names.packed);
  check.contiguous(t.scales, names.scales);
  p.packed = t.packed.const_data_ptr();
  p.scales = t.scales.const_data_ptr();
  const bool is_kind = linear.has_8_bits ? t.kind == 0 || t.kind == 3 : t.kind >= 0 && t.kind <= 3;
  if (!is_kind) {
    check.refuse(names.kind,
                 linear.has_8_bits ? "be 0 (symmetric) or 3 (offset) for a weight of 8 bits"
                                   : "be 0 (symmetric), 1 (zero_point), 2 (float_zero) or 3 (offset)",
                 std::to_string(t.kind));
  }
  check_kind_of_levels(check, names.kind, t.kind, p.super_shift);
  p.kind = static_cast<WeightKind>(t.kind);
  if (t.zeros.has_value() != (t.kind != 0)) {
    check.refuse(names.zeros, t.kind == 0 ? "be None for kind 0" : "be given for this kind",
                 t.zeros ? "a tensor" : "None");
  }
  if (t.zeros) {
    check.device(*t.zeros, names.zeros, x);
    p.zero_dtype = zero_dtype(check, *t.zeros, names.zeros, p.kind, p.super_shift);
    check.same_shape(*t.zeros, names.zeros, t.scales, names.scales);
    check.contiguous(*t.zeros, names.zeros);
    p.zeros = t.zeros->const_data_ptr();
  }
  if (t.perm) {
    check.device(*t.perm, names.perm, x);
    check.dtype(*t.perm, names.perm, ScalarType::Int);
    check.shape(*t.perm, names.perm, "[K]", {k});
    check.contiguous(*t.perm, names.perm);
    p.perm = t.perm->const_data_ptr<int32_t>();
  }
  if (t.bias) {
    check.device(*t.bias, names.bias, x);
    p.bias_dtype = check.float_dtype(*t.bias, names.bias);
    check.shape(*t.bias, names.bias, "[N]", {n});
    check.dense_last_dim(*t.bias, names.bias);
    p.bias = t.bias->const_data_ptr();
  }
  p.bad_index = bad_index;
  take_input(check, names, t, linear);
  return linear;
}

// What take_linear() calls bad: an index that an int32 cannot be.
inline constexpr int64_t kNoIndex = std::numeric_limits<int64_t>::min();

inline void refuse_bad_index(const Checker& check, const LinearNames& names, const BlockLinear& linear) {
  const int64_t index = *linear.product.bad_index;
  if (index == kNoIndex) return;
  check.refuse(names.perm, "hold indices in 0 .. " + std::to_string(linear.product.k - 1), std::to_string(index));
}

}  // namespace qops::binding
