// Attention of the newest tokens of a sequence over its cache of keys and values, without a thread pool: for
// decode_attention, and for operators that have a team of threads already.
//
// An item is a chunk of 128 positions of one key/value head in one sequence, and reads its rows of k and v once for all
// query rows of that head: m, l and o of each go to scratch. Then each row of the result combines its chunks. Items may
// run in any order, by any thread; the rows of the result after all items of their head.
//
// Bytes: k and v, 4 D a position and key/value head in 16 bits. Vector operations a position, for 3 query rows and
// D = 64: 24 fma, 16 to widen k and v, 3 to 4 a row for sums of lanes and exp: 50, 17 a row. AVX-512 starts two a
// cycle, so where k and v come from a cache arithmetic bounds it, at 8 cycles a row and position, a third of it
// widening. Seen on a Xeon, 9 / 3 heads, 512 positions: 3.8 ns (about 11 cycles), half scores, a third values.
//
// Order of sums (chunks by absolute position, so that neither what a sliding cache has dropped nor how many tokens come
// together changes a bit):
//   1. a score adds products by fma in 16 lanes, element i in lane i mod 16; then lanes at strides 4, 2, 1 in each
//      half, then the halves;
//   2. l of a chunk adds exp(s - m) in 16 lanes, position i in lane i mod 16, then lanes at strides 8, 4, 2, 1;
//   3. o of a chunk adds by fma, positions ascending;
//   4. chunks are added by fma, ascending.
// A masked position's score is -infinity, whose weight is 0: exact in the sum of l. Its row of v is left out.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/simd.h"
#include "exp_poly.h"

namespace qops::cpu::QOPS_ISA_NS {

inline constexpr int kChunk = 128;
// Query rows that are computed together, 4 positions each, and their sums in registers: 24 of 32, or of 16 registers of
// half a vector 12, a position at a time.
inline constexpr int kBlockRows = 6;
inline constexpr int kBlockPositions = kVectorRegisters == 32 ? 4 : 1;
// Vectors of o in registers.
inline constexpr int kBlockVectors = kVectorRegisters == 32 ? 4 : 1;

// How a call is cut.
struct AttentionPlan {
  int64_t group;        // query heads of a key/value head
  int64_t rows;         // of a key/value head: head g of token t is row t * group + g
  int64_t width;        // D in whole vectors
  int64_t first_chunk;  // of those in which a token attends to a position, but for the mask
  int64_t chunks;
  int64_t items;
  int64_t item_floats;  // o [rows, width], m [rows], l [rows]

  // More than there can be where the sum is no int64.
  size_t scratch_bytes() const {
    int64_t bytes = 0;
    const bool fits = !__builtin_mul_overflow(items, item_floats * int64_t{sizeof(float)}, &bytes);
    return fits ? static_cast<size_t>(bytes) : std::numeric_limits<size_t>::max() / 2;
  }
};

// There are heads, tokens and elements.
inline AttentionPlan plan_attention(const DecodeAttentionParams& p) {
  AttentionPlan plan;
  plan.group = p.q_heads / p.kv_heads;
  plan.rows = p.t * plan.group;
  plan.width = (p.d + kLanes - 1) / kLanes * kLanes;
  const int64_t first_row = p.window > 0 ? std::max(p.s - p.t + 1 - p.window, int64_t{0}) : 0;
  plan.first_chunk = (p.first_position + first_row) / kChunk;
  plan.chunks = (p.first_position + p.s - 1) / kChunk - plan.first_chunk + 1;
  if (__builtin_mul_overflow(p.batch * p.kv_heads, plan.chunks, &plan.items)) {
    plan.items = std::numeric_limits<int64_t>::max();
  }
  plan.item_floats = plan.rows * plan.width + (2 * plan.rows + kLanes - 1) / kLanes * kLanes;
  return plan;
}

// softcap * tanh(s / softcap), with tanh(x) = (1 - e) / (1 + e), e = exp(-2 x), x at most 20 in magnitude, where it is
// 1 already. Within 6 * 2^-24 of tanh; a NaN passes.
inline F32x16 soft_cap(F32x16 s, float softcap) {
  const F32x16 cap = set1(softcap), one = set1(1.0f);
  const F32x16 x = min(set1(20.0f), max(set1(-20.0f), s / cap));
  const F32x16 e = exp_poly(set1(-2.0f) * x);
  return cap * ((one - e) / (one + e));
}

// exp(x), and 0 for x below -87, among which are all masked positions: subnormal results, of no weight beside others,
// take a CPU 150 cycles each (a last vector of positions, 9 rows: 2.2 us on a Xeon, of 4.5).
inline F32x16 weight_of(F32x16 x) {
  const F32x16 least = set1(-87.0f);
  return zero_below(exp_poly(max(least, x)), x, least);
}

// The positions of one chunk, and who attends to them.
struct Chunk {
  int begin = kChunk, end = 0;              // attended by anyone
  uint8_t anywhere = 0, everywhere = 0xff;  // bit t: token t attends to one of these, to each
  uint8_t tokens[kChunk] = {};              // bit t: token t attends
};

// row: of k and v, of the chunk's position 0; negative where the cache begins later.
inline Chunk positions_of(const DecodeAttentionParams& p, int64_t batch, int64_t row) {
  Chunk chunk;
  for (int64_t t = 0; t < p.t; ++t) {
    // A mask alone says who attends to what: a tree of drafted tokens is not causal in the order of its rows.
    const int64_t last = p.mask == nullptr ? p.s - p.t + t : p.s - 1;
    const int64_t first = p.window > 0 ? std::max(last + 1 - p.window, int64_t{0}) : 0;
    const int begin = static_cast<int>(std::clamp(first - row, int64_t{0}, int64_t{kChunk}));
    const int end = static_cast<int>(std::clamp(last + 1 - row, int64_t{0}, int64_t{kChunk}));
    if (begin >= end) continue;
    const uint8_t bit = static_cast<uint8_t>(1u << t);
    if (p.mask == nullptr && t == 0) {
      std::memset(chunk.tokens + begin, bit, static_cast<size_t>(end - begin));
    } else if (p.mask == nullptr) {
      for (int i = begin; i < end; ++i) chunk.tokens[i] |= bit;
    } else {
      const bool* mask = p.mask + batch * p.mask_strides[0] + t * p.mask_strides[1];
      for (int i = begin; i < end; ++i) chunk.tokens[i] |= mask[(row + i) * p.mask_strides[2]] ? bit : 0;
    }
    chunk.begin = std::min(chunk.begin, begin);
    chunk.end = std::max(chunk.end, end);
  }
  while (chunk.begin < chunk.end && chunk.tokens[chunk.begin] == 0) ++chunk.begin;
  while (chunk.begin < chunk.end && chunk.tokens[chunk.end - 1] == 0) --chunk.end;
  if (p.mask == nullptr && p.t == 1) {
    chunk.anywhere = 1;
    return chunk;
  }
  for (int i = chunk.begin; i < chunk.end; ++i) {
    chunk.anywhere |= chunk.tokens[i];
    chunk.everywhere &= chunk.tokens[i];
  }
  return chunk;
}

// scores[r][0 .. 15] of 16 positions, whose rows of k are keys + i * stride, i clamped to first .. last. q: [R, width].
template <class T, int R>
inline void score_16(const DecodeAttentionParams& p, const float* q, int64_t width, const T* keys, int64_t stride,
                     int first, int last, float (*scores)[kChunk]) {
  alignas(64) float lanes[R][kLanes][kLanes];
  const bool is_whole = first == 0 && last == kLanes - 1;
  for (int i = 0; i < kLanes; i += kBlockPositions) {
    const T* key[kBlockPositions];
    F32x16 sums[kBlockPositions][R];
    QOPS_UNROLL
    for (int j = 0; j < kBlockPositions; ++j) {
      key[j] = keys + (is_whole ? i + j : std::clamp(i + j, first, last)) * stride;
      QOPS_UNROLL
      for (int r = 0; r < R; ++r) sums[j][r] = set1(0.0f);
    }
    const auto multiply = [&](int64_t d, const auto& load_key) {
      QOPS_UNROLL
      for (int j = 0; j < kBlockPositions; ++j) {
        const F32x16 k = load_key(key[j] + d);
        QOPS_UNROLL
        for (int r = 0; r < R; ++r) sums[j][r] = fma(load(q + r * width + d), k, sums[j][r]);
      }
    };
    int64_t d = 0;
    for (; d + kLanes <= p.d; d += kLanes) multiply(d, [](const T* k) { return load(k); });
    if (d < p.d) multiply(d, [&](const T* k) { return load_n(k, p.d - d); });
    QOPS_UNROLL
    for (int j = 0; j < kBlockPositions; ++j) {
      QOPS_UNROLL
      for (int r = 0; r < R; ++r) store(lanes[r][i + j], sums[j][r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    F32x16 halves[2];
    QOPS_UNROLL
    for (int half = 0; half < 2; ++half) {
      F32x16 v[8];
      QOPS_UNROLL
      for (int i = 0; i < 8; ++i) v[i] = load(lanes[r][8 * half + i]);
      halves[half] = sum_groups_of_8(v);
    }
    const F32x16 sum = even_lanes(halves[0], halves[1]) + odd_lanes(halves[0], halves[1]);
    const F32x16 s = set1(p.scale) * sum;
    store(scores[r], p.softcap > 0.0f ? soft_cap(s, p.softcap) : s);
  }
}

// Scores of one row become exp(s - m); a position that token t does not attend to gets 0.
inline void exponentiate(const Chunk& chunk, int64_t t, float* scores, float* m, float* l) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int begin = chunk.begin / kLanes * kLanes, end = (chunk.end + kLanes - 1) / kLanes * kLanes;
  const uint8_t bit = static_cast<uint8_t>(1u << t);
  std::fill(scores + begin, scores + chunk.begin, -kInfinity);
  std::fill(scores + chunk.end, scores + end, -kInfinity);
  if ((chunk.everywhere & bit) == 0) {
    for (int i = chunk.begin; i < chunk.end; ++i) scores[i] = chunk.tokens[i] & bit ? scores[i] : -kInfinity;
  }
  F32x16 most = set1(-kInfinity);
  for (int i = begin; i < end; i += kLanes) most = max(most, load(scores + i));
  // Finite, so that a chunk whose scores are all -infinity has weights of 0; -infinity marks one without positions. A
  // NaN in a lane may have hidden others, but then all of the row is NaN.
  *m = max_lanes(most);
  if (!(*m >= -std::numeric_limits<float>::max())) *m = -std::numeric_limits<float>::max();
  F32x16 sum = set1(0.0f);
  for (int i = begin; i < end; i += kLanes) {
    const F32x16 weight = weight_of(load(scores + i) - set1(*m));
    store(scores + i, weight);
    sum = sum + weight;
  }
  *l = sum_lanes(sum);
  if ((chunk.anywhere & bit) == 0) *m = -kInfinity;
}

// o [R, width] += weights of the positions begin .. end - 1 times their rows of v.
template <class T, int R>
inline void add_values(const DecodeAttentionParams& p, const float (*weights)[kChunk], const T* values, int64_t stride,
                       int begin, int end, float* o, int64_t width) {
  const auto add = [&](int64_t d, auto vectors, const auto& load_value) {
    constexpr int kVectors = decltype(vectors)::value;
    F32x16 sums[R][kVectors];
    QOPS_UNROLL
    for (int r = 0; r < R; ++r) {
      QOPS_UNROLL
      for (int c = 0; c < kVectors; ++c) sums[r][c] = load(o + r * width + d + c * kLanes);
    }
    for (int i = begin; i < end; ++i) {
      F32x16 v[kVectors];
      QOPS_UNROLL
      for (int c = 0; c < kVectors; ++c) v[c] = load_value(values + i * stride + d + c * kLanes);
      QOPS_UNROLL
      for (int r = 0; r < R; ++r) {
        const F32x16 weight = set1(weights[r][i]);
        QOPS_UNROLL
        for (int c = 0; c < kVectors; ++c) sums[r][c] = fma(weight, v[c], sums[r][c]);
      }
    }
    QOPS_UNROLL
    for (int r = 0; r < R; ++r) {
      QOPS_UNROLL
      for (int c = 0; c < kVectors; ++c) store(o + r * width + d + c * kLanes, sums[r][c]);
    }
  };
  const auto whole = [](const T* v) { return load(v); };
  int64_t d = 0;
  for (; d + kBlockVectors * kLanes <= p.d; d += kBlockVectors * kLanes) {
    add(d, std::integral_constant<int, kBlockVectors>{}, whole);
  }
  for (; d + kLanes <= p.d; d += kLanes) add(d, std::integral_constant<int, 1>{}, whole);
  if (d < p.d) add(d, std::integral_constant<int, 1>{}, [&](const T* v) { return load_n(v, p.d - d); });
}

// Rows row .. row + R - 1 of an item. keys, values: rows of the chunk's position 0.
template <class T, int R>
inline void attend_rows(const DecodeAttentionParams& p, const AttentionPlan& plan, const Chunk& chunk, int64_t batch,
                        int64_t head, const T* keys, const T* values, int64_t row, float* item) {
  float* o = item + row * plan.width;
  float* m = item + plan.rows * plan.width + row;
  float* l = m + plan.rows;
  // q in float32 lies where o will.
  for (int r = 0; r < R; ++r) {
    const int64_t t = (row + r) / plan.group, g = (row + r) % plan.group;
    const T* q = static_cast<const T*>(p.q) + batch * p.q_strides[0] + t * p.q_strides[1] +
                 (head * plan.group + g) * p.q_strides[2];
    for (int64_t d = 0; d < p.d; d += kLanes) store(o + r * plan.width + d, load_n(q + d, p.d - d));
  }
  alignas(64) float weights[R][kChunk];
  for (int i = chunk.begin / kLanes * kLanes; i < chunk.end; i += kLanes) {
    const auto at = [&](int position) { return std::clamp(position - i, 0, kLanes - 1); };
    score_16<T, R>(p, o, plan.width, keys + i * p.k_strides[2], p.k_strides[2], at(chunk.begin), at(chunk.end - 1),
                   reinterpret_cast<float (*)[kChunk]>(weights[0] + i));
  }
  uint8_t together = 0;
  for (int r = 0; r < R; ++r) {
    const int64_t t = (row + r) / plan.group;
    together |= static_cast<uint8_t>(1u << t);
    exponentiate(chunk, t, weights[r], m + r, l + r);
  }
  std::fill_n(o, R * plan.width, 0.0f);
  // Positions of the same tokens at a time: one by one at the end of a causal chunk, all in one elsewhere.
  for (int begin = chunk.begin, end; begin < chunk.end; begin = end) {
    const uint8_t tokens = chunk.tokens[begin] & together;
    for (end = begin + 1; end < chunk.end && (chunk.tokens[end] & together) == tokens;) ++end;
    if (tokens == together) {
      add_values<T, R>(p, weights, values, p.v_strides[2], begin, end, o, plan.width);
      continue;
    }
    for (int r = 0; r < R; ++r) {
      if ((tokens >> (row + r) / plan.group & 1) == 0) continue;
      add_values<T, 1>(p, weights + r, values, p.v_strides[2], begin, end, o + r * plan.width, plan.width);
    }
  }
}

// scratch: of the whole call.
template <class T>
inline void attend_chunk(const DecodeAttentionParams& p, const AttentionPlan& plan, int64_t index, float* scratch) {
  const int64_t head = index / plan.chunks % p.kv_heads, batch = index / plan.chunks / p.kv_heads;
  const int64_t first = (plan.first_chunk + index % plan.chunks) * kChunk - p.first_position;
  const Chunk chunk = positions_of(p, batch, first);
  float* item = scratch + index * plan.item_floats;
  if (chunk.begin >= chunk.end) {
    std::fill_n(item + plan.rows * plan.width, plan.rows, -std::numeric_limits<float>::infinity());
    return;
  }
  const T* keys = static_cast<const T*>(p.k) + batch * p.k_strides[0] + head * p.k_strides[1] + first * p.k_strides[2];
  const T* values =
      static_cast<const T*>(p.v) + batch * p.v_strides[0] + head * p.v_strides[1] + first * p.v_strides[2];
  const int64_t blocks = (plan.rows + kBlockRows - 1) / kBlockRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = plan.rows * block / blocks;
    const auto attend = [&](auto rows) {
      attend_rows<T, decltype(rows)::value>(p, plan, chunk, batch, head, keys, values, row, item);
    };
    switch (plan.rows * (block + 1) / blocks - row) {
      case 1: attend(std::integral_constant<int, 1>{}); break;
      case 2: attend(std::integral_constant<int, 2>{}); break;
      case 3: attend(std::integral_constant<int, 3>{}); break;
      case 4: attend(std::integral_constant<int, 4>{}); break;
      case 5: attend(std::integral_constant<int, 5>{}); break;
      case 6: attend(std::integral_constant<int, 6>{}); break;
    }
  }
}

// Row (batch * T + t) * Hq + head of y, once all items of its key/value head are done.
template <class T>
inline void combine_row(const DecodeAttentionParams& p, const AttentionPlan& plan, int64_t index,
                        const float* scratch) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int64_t head = index % p.q_heads, t = index / p.q_heads % p.t, batch = index / p.q_heads / p.t;
  const int64_t row = t * plan.group + head % plan.group;
  const float* item = scratch + (batch * p.kv_heads + head / plan.group) * plan.chunks * plan.item_floats;
  const float* o = item + row * plan.width;
  const float* m = item + plan.rows * plan.width + row;
  const float* l = m + plan.rows;
  float most = -kInfinity;
  for (int64_t c = 0; c < plan.chunks; ++c) most = std::max(most, m[c * plan.item_floats]);
  T* y = static_cast<T*>(p.y) + index * p.d;
  const auto combine = [&](int64_t d, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    F32x16 sums[kVectors], total = set1(0.0f);
    QOPS_UNROLL
    for (int i = 0; i < kVectors; ++i) sums[i] = total;
    for (int64_t c = 0; c < plan.chunks; ++c) {
      const int64_t at = c * plan.item_floats;
      if (m[at] == -kInfinity) continue;
      const F32x16 weight = weight_of(set1(m[at] - most));
      total = fma(weight, set1(l[at]), total);
      QOPS_UNROLL
      for (int i = 0; i < kVectors; ++i) sums[i] = fma(weight, load(o + at + d + i * kLanes), sums[i]);
    }
    QOPS_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      store_n(y + d + i * kLanes, most == -kInfinity ? sums[i] : sums[i] / total, p.d - d - i * kLanes);
    }
  };
  int64_t d = 0;
  for (; d + 4 * kLanes <= p.d; d += 4 * kLanes) combine(d, std::integral_constant<int, 4>{});
  for (; d < p.d; d += kLanes) combine(d, std::integral_constant<int, 1>{});
}

}  // namespace qops::cpu::QOPS_ISA_NS
