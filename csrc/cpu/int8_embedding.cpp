// int8_embedding: rows of an 8-bit weight as numbers.
//
// Bound by reading them: a row lies in its strip of 16 (weight_pack.cpp), 4 columns in each 64 bytes, so that one of K
// columns reads 16 K bytes. Each number is s q, or s q + o of one fused multiply-add: the exact weight rounded once.
#include "cpu/group_numbers.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

inline int64_t id_of(const Int8EmbeddingParams& p, int64_t token) {
  return p.ids_are_int64 ? static_cast<const int64_t*>(p.ids)[token] : static_cast<const int32_t*>(p.ids)[token];
}

inline bool ids_are_rows(const Int8EmbeddingParams& p) {
  for (int64_t token = 0; token < p.tokens; ++token) {
    const int64_t id = id_of(p, token);
    if (id >= 0 && id < p.n) continue;
    *p.bad_id = id;
    return false;
  }
  return true;
}

// The number that one row of a strip has of a group.
inline F32x16 number_of(const GroupNumbers& numbers, int64_t group, int64_t strip, int64_t lane) {
  float rows[kStripRows];
  store(rows, numbers.load(group, strip));
  return set1(rows[lane]);
}

template <bool kOffset, class T>
void write_row(const Int8EmbeddingParams& p, const Numbers& numbers, int64_t row, T* y) {
  constexpr int64_t kColumns = 4;  // of each 64 bytes
  const int64_t strip = row / kStripRows, lane = row % kStripRows;
  const char* words = static_cast<const char*>(p.packed) + strip * p.k * kStripRows + lane * kColumns;
  for (int64_t group = 0, k = 0; k < p.k; ++group) {
    const F32x16 scale = number_of(numbers.scales, group, strip, lane);
    const F32x16 offset = kOffset ? number_of(numbers.zeros, group, strip, lane) : set1(0.0f);
    for (const int64_t end = k + p.group_size; k < end; k += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, end - k);
      int8_t codes[kLanes] = {};
      for (int64_t i = 0; i < n; i += kColumns) std::memcpy(codes + i, words + (k + i) * kStripRows, kColumns);
      const F32x16 q = to_float(load(codes));
      store_n(y + k, kOffset ? fma(scale, q, offset) : scale * q, n);
    }
  }
}

}  // namespace

Status int8_embedding(const Int8EmbeddingParams& p, const ThreadPool& pool) {
  if (pool.listener == nullptr && !ids_are_rows(p)) return Status::kIndexOutOfRange;
  if (p.k == 0) return Status::kOk;
  return with_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const Numbers numbers = numbers_of(p, p.k / p.group_size);
    parallel_for(pool, p.tokens, 1 + (4 << 10) / p.k, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const int64_t id = id_of(p, token), row = p.is_mixed ? mixed_row(id, p.n) : id;
        T* y = static_cast<T*>(p.y) + token * p.k;
        p.kind == WeightKind::kOffset ? write_row<true>(p, numbers, row, y) : write_row<false>(p, numbers, row, y);
      }
    });
    return Status::kOk;
  });
}

}  // namespace qops::cpu::QOPS_ISA_NS
