// Packed weights as arguments, in the layout of the device of these bindings.
#pragma once

#include "binding/device.h"
#include "int4_layout.h"
#include "int8_layout.h"

namespace qops::binding {

#if defined(QOPS_CUDA)
inline constexpr bool kGpuLayout = true;
#else
inline constexpr bool kGpuLayout = false;
#endif

static_assert(int4::kBlockColumns == int8::kBlockColumns && int4::kLaneBytes == int8::kLaneBytes);

inline int64_t strips_of(int64_t n) { return int4::strips(n); }

// Columns that a strip holds for K of them.
constexpr int64_t stored_columns(int64_t k) { return kGpuLayout ? int4::blocks(k) * int4::kBlockColumns : k; }

// GPU kernels read 16 bytes at a time; whole strips of a packed weight always begin so.
inline void check_alignment(const Checker& check, const Tensor& packed, const char* arg) {
  if (!kGpuLayout) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(packed.const_data_ptr());
  if (address % int4::kLaneBytes != 0) {
    check.refuse(arg, "begin at a multiple of 16 bytes", "an address " + std::to_string(address % 16) + " past one");
  }
}

// Of rows of int8. Sums of products stay in int32: 128 * 128 * K, and with zero points in -128 .. 127 255 * 128 * K;
// those of 4-bit weights 16 * 128 * K, and the sum of a group's x is exact in float32.
inline constexpr int64_t kMaxInt8Columns = 131071, kMaxInt8ColumnsWithZeroPoint = 65793;
inline constexpr int64_t kMaxInt4Int8Columns = 1048575, kMaxInt4Int8Group = 131071;

// Of a weight of 4 bits that multiplies rows of int8; arg: what has its columns.
inline void check_limits_of_int8(const Checker& check, const char* arg, int64_t k, int64_t group_size) {
  if (k > kMaxInt4Int8Columns) {
    check.refuse(arg, "have at most " + std::to_string(kMaxInt4Int8Columns) + " columns", std::to_string(k));
  }
  if (group_size > kMaxInt4Int8Group) {
    check.refuse("group_size", "be at most " + std::to_string(kMaxInt4Int8Group), std::to_string(group_size));
  }
}

inline void check_group_size(const Checker& check, int64_t k, int64_t group_size) {
  if (group_size != k && (group_size <= 0 || group_size % 16 != 0 || k % group_size != 0)) {
    check.refuse("group_size", "be K = " + std::to_string(k) + " or a multiple of 16 that divides it",
                 std::to_string(group_size));
  }
}

template <class Params, class Visitor>
void describe_groups(Params& p, Visitor& v) {
  v.size("group_size", p.group_size);
  v.when_asked([&](const Checker& check) { check_group_size(check, p.k, p.group_size); });
}

template <class Params, class Visitor>
void describe_kind(Params& p, Visitor& v) {
  v.choice("kind", p.kind, {"symmetric", "zero_point", "float_zero", "offset"});
}

// Scales of one level are floats, those of two are int8 (kSuperColumns in kernels.h), which GPU kernels do not read:
// Python widens what it packs for them. Whether there are two.
template <class Params>
bool take_scale_dtype(const Checker& check, const Tensor& scales, const char* arg, Params& p) {
  if (!kGpuLayout && check.dtype_of(scales, arg) == ScalarType::Char) {
    p.scale_dtype = DType::kFloat16;
    return true;
  }
  p.scale_dtype = check.float_dtype(scales, arg, kGpuLayout ? "" : ", or int8 of two levels");
  return false;
}

// Of scales of two levels; 0 where no kernel reads groups of that size.
inline int32_t super_shift_of(int64_t group_size) {
  switch (group_size) {
    case 128: return 1;
    case 64: return 2;
    case 32: return 3;
    case 16: return 4;
    default: return 0;
  }
}

// Kernel parameters of a packed weight with scales [S, K / group_size, 16]. strip_elements_per_column: elements of
// `packed` that one column of a strip takes (8 bytes for int4, 16 for int8).
template <class Params>
void take_weight(const Checker& check, const Tensor& packed, ScalarType packed_dtype, int64_t strip_elements_per_column,
                 const Tensor& scales, int64_t out_features, int64_t group_size, Params& p) {
  check.dtype(packed, "packed", packed_dtype);
  const bool two_levels = take_scale_dtype(check, scales, "scales", p);
  p.n = out_features;
  if (p.n < 0 || p.n % 8 != 0) check.refuse("out_features", "be a multiple of 8", std::to_string(p.n));
  if (packed.dim() != 2) check.refuse("packed", "have 2 dimensions", std::to_string(packed.dim()));
  const int64_t least = stored_columns(8);
  if (packed.size(1) % (least * strip_elements_per_column) != 0) {
    check.refuse("packed",
                 "hold a multiple of " + std::to_string(least) + " columns of " +
                     std::to_string(strip_elements_per_column) + " elements a strip",
                 std::to_string(packed.size(1)));
  }
  p.k = packed.size(1) / strip_elements_per_column;
  if (kGpuLayout && scales.dim() == 3 && scales.size(1) > 0 && group_size > 0 && group_size <= p.k / scales.size(1)) {
    // Without the columns of padding. No K is other than a multiple of 8: kernels copy 8 of its columns at a time.
    if (const int64_t k = group_size * scales.size(1); k % 8 == 0) p.k = k;
  }
  const int64_t strips = strips_of(p.n);
  check.shape(packed, "packed", "[S, K-strip]", {strips, stored_columns(p.k) * strip_elements_per_column});
  p.group_size = group_size;
  check_group_size(check, p.k, group_size);
  const int64_t groups = group_size == 0 ? 0 : p.k / group_size;
  if (two_levels) {
    p.super_shift = super_shift_of(group_size);
    if (p.super_shift == 0 || p.k % kSuperColumns != 0) {
      check.refuse("scales", "be floats but for groups of 16, 32, 64 or 128 and K a multiple of 256",
                   "int8 for groups of " + std::to_string(group_size) + " and K = " + std::to_string(p.k));
    }
    check.shape(scales, "scales", "[S, K / 256, 2 + 256 / group_size, 16]",
                {strips, p.k / kSuperColumns, 2 + kSuperColumns / group_size, kStripRows});
  } else {
    check.shape(scales, "scales", "[S, K / group_size, 16]", {strips, groups, kStripRows});
  }
  check.contiguous(packed, "packed");
  check.contiguous(scales, "scales");
  check_alignment(check, packed, "packed");
  p.packed = packed.const_data_ptr();
  p.scales = scales.const_data_ptr();
}

// With scales of two levels there are no other zeros than offsets of two.
inline void check_kind_of_levels(const Checker& check, const char* arg, int64_t kind, int32_t super_shift) {
  if (super_shift == 0 || kind == 0 || kind == 3) return;
  check.refuse(arg, "be 0 (symmetric) or 3 (offset) with int8 scales", std::to_string(kind));
}

// GPU kernels read float32 alone: Python widens what it packs for them.
inline DType zero_dtype(const Checker& check, const Tensor& zeros, const char* arg, WeightKind kind,
                        int32_t super_shift) {
  if (super_shift != 0) {
    check.dtype(zeros, arg, ScalarType::Char);
    return DType::kFloat16;
  }
  if (has_float_zeros(kind) && !kGpuLayout) return check.float_dtype(zeros, arg);
  check.dtype(zeros, arg, kind == WeightKind::kZeroPoint ? ScalarType::Byte : ScalarType::Float);
  return DType::kFloat32;
}

// kind, and the zeros that belong to it.
template <class Params>
void take_zeros(const Checker& check, int64_t kind, const std::optional<Tensor>& zeros, const Tensor& scales,
                Params& p) {
  if (kind < 0 || kind > 3) {
    check.refuse("kind", "be 0 (symmetric), 1 (zero_point), 2 (float_zero) or 3 (offset)", std::to_string(kind));
  }
  check_kind_of_levels(check, "kind", kind, p.super_shift);
  p.kind = static_cast<WeightKind>(kind);
  if (zeros.has_value() != (kind != 0)) {
    check.refuse("zeros", kind == 0 ? "be None for kind 0" : "be given for this kind", zeros ? "a tensor" : "None");
  }
  if (!zeros) return;
  check.device(*zeros, "zeros", scales);
  p.zero_dtype = zero_dtype(check, *zeros, "zeros", p.kind, p.super_shift);
  check.same_shape(*zeros, "zeros", scales, "scales");
  check.contiguous(*zeros, "zeros");
  p.zeros = zeros->const_data_ptr();
}

inline void check_mixed(const Checker& check, bool mixed_gate_up, int64_t n) {
  if (!mixed_gate_up || n % 16 == 0) return;
  check.refuse("out_features", "be a multiple of 16, for gate and up, with mixed_gate_up", std::to_string(n));
}

}  // namespace qops::binding
