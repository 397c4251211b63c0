// int4_dequantize: the weights as numbers [N, K], columns in stored order.
//
// Bound by writing them: half a byte is read for each weight, 2 or 4 are written.
#include "cpu/simd.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

// The first n of 16 columns of one row of a strip; layout: weight_pack.cpp. n is 8 or at least 16.
inline F32x16 codes(const char* words, int64_t n) {
  uint32_t word[2] = {};
  std::memcpy(&word[0], words, 4);
  if (n > 8) std::memcpy(&word[1], words + 4 * kStripRows, 4);
  constexpr int kShift[8] = {0, 8, 16, 24, 4, 12, 20, 28};
  int32_t code[kLanes];
  for (int i = 0; i < kLanes; ++i) code[i] = static_cast<int32_t>(word[i / 8] >> kShift[i % 8] & 15);
  return to_float(load(code));
}

inline float scalar_as_float(const void* p, DType dtype, int64_t index) {
  float lanes[kLanes];
  store(lanes, load_as_float(p, dtype, index, 1));
  return lanes[0];
}

template <class T>
void dequantize_row(const Int4DequantizeParams& p, int64_t row, T* w) {
  const int64_t groups = p.k / p.group_size, strip = row / kStripRows, r = row % kStripRows;
  const char* words = static_cast<const char*>(p.packed) + (strip * p.k * 8 + r * 4);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t at = (strip * groups + group) * kStripRows + r;
    const F32x16 s = set1(scalar_as_float(p.scales, p.scale_dtype, at));
    F32x16 z = set1(8.0f);
    if (p.kind == WeightKind::kZeroPoint) {
      z = set1(static_cast<float>(static_cast<const uint8_t*>(p.zeros)[at]));
    } else if (p.kind != WeightKind::kSymmetric) {
      z = set1(static_cast<const float*>(p.zeros)[at]);
    }
    for (int64_t k = 0; k < p.group_size; k += kLanes, words += 2 * 4 * kStripRows) {
      const int64_t n = p.group_size - k;
      const F32x16 q = codes(words, n);
      store_n(w + group * p.group_size + k, p.kind == WeightKind::kOffset ? fma(s, q, z) : s * (q - z), n);
    }
  }
}

}  // namespace

Status int4_dequantize(const Int4DequantizeParams& p, const ThreadPool& pool) {
  if (p.k == 0) return Status::kOk;
  return with_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    parallel_for(pool, p.n, 1 + (16 << 10) / p.k, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t target = p.is_mixed ? unmixed_row(row, p.n) : row;
        dequantize_row(p, row, static_cast<T*>(p.w) + target * p.k);
      }
    });
    return Status::kOk;
  });
}

}  // namespace qops::cpu::QOPS_ISA_NS
