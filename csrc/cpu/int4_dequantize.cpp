// int4_dequantize: the weights as numbers [N, K], columns in stored order.
//
// Bound by writing them: half a byte is read for each weight, 2 or 4 are written. A row of a group has 16 different
// weights at most, which are computed once: then each of its weights is a lookup. A strip's group lies in L1 (1 KiB for
// 128 columns) and is read once for each of its 16 rows.
#include <algorithm>

#include "cpu/group_numbers.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

// The 16 weights that a row of a group can have.
struct Tables {
  float scales[kStripRows], zeros[kStripRows];
  bool is_offset;

  Tables(const Int4DequantizeParams& p, const Numbers& numbers, int64_t group, int64_t strip)
      : is_offset(p.kind == WeightKind::kOffset) {
    store(scales, numbers.scales.load(group, strip));
    F32x16 zero = set1(8.0f);
    if (p.kind == WeightKind::kZeroPoint) {
      zero = to_float(load(reinterpret_cast<const uint8_t*>(numbers.zeros.address<false>(group, strip))));
    } else if (p.kind != WeightKind::kSymmetric) {
      zero = numbers.zeros.load(group, strip);
    }
    store(zeros, zero);
  }

  F32x16 of_row(int r) const {
    constexpr int32_t kCodes[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const F32x16 q = to_float(load(kCodes)), s = set1(scales[r]), z = set1(zeros[r]);
    return is_offset ? fma(s, q, z) : s * (q - z);
  }
};

inline uint32_t word_at(const char* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

template <bool kStream, class T>
void dequantize_strip(const Int4DequantizeParams& p, int64_t strip) {
  constexpr int64_t kBlockBytes = 4 * kStripRows;  // 8 columns
  const int64_t groups = p.k / p.group_size, first = strip * kStripRows;
  const int rows = static_cast<int>(std::min<int64_t>(kStripRows, p.n - first));
  const Numbers numbers = numbers_of(p, groups);
  const char* words = static_cast<const char*>(p.packed) + strip * p.k * 8;
  for (int64_t group = 0; group < groups; ++group, words += p.group_size * 8) {
    const Tables tables(p, numbers, group, strip);
    for (int r = 0; r < rows; ++r) {
      const F32x16 table = tables.of_row(r);
      const int64_t row = p.is_mixed ? unmixed_row(first + r, p.n) : first + r;
      T* w = static_cast<T*>(p.w) + row * p.k + group * p.group_size;
      const char* from = words + 4 * r;
      int64_t k = 0;
      for (; k + kLanes <= p.group_size; k += kLanes, from += 2 * kBlockBytes) {
        store_or_stream<kStream>(w + k, look_up(table, spread_codes(word_at(from), word_at(from + kBlockBytes))));
      }
      if (k < p.group_size) store_n(w + k, look_up(table, spread_codes(word_at(from), 0)), p.group_size - k);
    }
  }
}

}  // namespace

Status int4_dequantize(const Int4DequantizeParams& p, const ThreadPool& pool) {
  if (p.k == 0) return Status::kOk;
  return with_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    // Vectors of a group whose size is no multiple of theirs have no alignment.
    const bool streams = worth_streaming(static_cast<const T*>(p.w), p.n, p.k) && p.group_size % kLanes == 0;
    const int64_t strips = (p.n + kStripRows - 1) / kStripRows;
    parallel_for(pool, strips, 1 + (16 << 10) / (p.k * kStripRows), [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip) {
        streams ? dequantize_strip<true, T>(p, strip) : dequantize_strip<false, T>(p, strip);
      }
      if (streams) end_stream();
    });
    return Status::kOk;
  });
}

}  // namespace qops::cpu::QOPS_ISA_NS
