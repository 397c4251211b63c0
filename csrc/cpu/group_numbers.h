// Scales of groups and their float zeros, as the vectors of 16 rows that kernels multiply with.
#pragma once

#include <algorithm>

#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace qops::cpu::QOPS_ISA_NS {

// Those of strips from one on: one number for each row and group, or two levels (kSuperColumns in kernels.h), whose
// product float32 holds exactly: a kernel's bits are those of the numbers written out. Groups, and strips from the
// first on, are counted.
struct GroupNumbers {
  const void* numbers;
  int64_t first_strip;
  DType dtype;  // of one level; zero points are no such numbers, but lie alike
  int64_t number_bytes;
  int32_t super_shift;
  int64_t strip_size;  // numbers; of two levels bytes

  GroupNumbers(const void* numbers, DType dtype, int64_t number_bytes, int32_t super_shift, int64_t groups,
               int64_t first_strip)
      : numbers(numbers),
        first_strip(first_strip),
        dtype(dtype),
        number_bytes(number_bytes),
        super_shift(super_shift),
        strip_size(super_shift == 0 ? groups * kStripRows : (groups >> super_shift) * super_bytes()) {}

  template <bool kLevels>
  F32x16 load(int64_t group, int64_t strip) const {
    if constexpr (!kLevels) return load_as_float(numbers, dtype, strip * strip_size + group * kStripRows, kLanes);
    const char* super = super_of(group, strip);
    return QOPS_ISA_NS::load(reinterpret_cast<const Half*>(super)) *
           to_float(QOPS_ISA_NS::load(reinterpret_cast<const int8_t*>(super + codes_at(group))));
  }
  F32x16 load(int64_t group, int64_t strip) const {
    return super_shift == 0 ? load<false>(group, strip) : load<true>(group, strip);
  }

  // Where a group's lie, of two levels its codes: whoever fetches each group's has fetched all.
  template <bool kLevels>
  const char* address(int64_t group, int64_t strip) const {
    if constexpr (kLevels) return super_of(group, strip) + codes_at(group);
    return static_cast<const char*>(numbers) + (strip * strip_size + group * kStripRows) * number_bytes;
  }
  const char* address(int64_t group, int64_t strip) const {
    return super_shift == 0 ? address<false>(group, strip) : address<true>(group, strip);
  }

 private:
  int64_t super_bytes() const { return kStripRows * (2 + (int64_t{1} << super_shift)); }
  const char* super_of(int64_t group, int64_t strip) const {
    return static_cast<const char*>(numbers) + strip * strip_size + (group >> super_shift) * super_bytes();
  }
  int64_t codes_at(int64_t group) const { return kStripRows * (2 + (group & ((int64_t{1} << super_shift) - 1))); }
};

struct Numbers {
  GroupNumbers scales, zeros;
};

template <class Params>
inline Numbers numbers_of(const Params& p, int64_t groups) {
  const auto bytes_of = [](DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; };
  const int64_t zero_bytes = has_float_zeros(p.kind) ? bytes_of(p.zero_dtype) : 1;
  return {{p.scales, p.scale_dtype, bytes_of(p.scale_dtype), p.super_shift, groups, 0},
          {p.zeros, p.zero_dtype, zero_bytes, p.super_shift, groups, 0}};
}

// f(numbers, begin, end) of a few strips at a time. For many passes over them two levels are written out before: with
// 16 passes (M = 64) a product takes as long as with float32 scales and offsets, and 1.08 times as long where each pass
// multiplies (4096 x 4096, groups of 32, AVX-512).
template <class Params, class F>
inline void for_each_chunk(const Params& p, int64_t groups, int64_t passes, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kStrips = 4, kManyPasses = 3;
  const Numbers numbers = numbers_of(p, groups);
  if (p.super_shift == 0 || passes < kManyPasses) {
    for (int64_t strip = begin; strip < end; strip += kStrips) f(numbers, strip, std::min(strip + kStrips, end));
    return;
  }
  const int64_t count = kStrips * groups * kStripRows;
  Scratch scratch(2 * Scratch::bytes<float>(count));
  if (!scratch.ok()) return for_each_chunk(p, groups, 1, begin, end, f);
  float* const wide[] = {scratch.take<float>(count), scratch.take<float>(count)};
  for (int64_t strip = begin; strip < end; strip += kStrips) {
    const int64_t stop = std::min(strip + kStrips, end);
    const auto write_out = [&](const GroupNumbers& of, float* to) -> GroupNumbers {
      for (int64_t i = 0; of.numbers != nullptr && i < (stop - strip) * groups; ++i) {
        store(to + i * kStripRows, of.load<true>(i % groups, strip + i / groups));
      }
      return {to, DType::kFloat32, sizeof(float), 0, groups, strip};
    };
    f(Numbers{write_out(numbers.scales, wide[0]), write_out(numbers.zeros, wide[1])}, strip, stop);
  }
}

}  // namespace qops::cpu::QOPS_ISA_NS
