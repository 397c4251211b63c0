// Rotation of the heads of one token, for rotary and qk_norm_rotary.
//
//   y1 = x1 * cos - x2 * sin,   y2 = x2 * cos + x1 * sin
//
// The pairs are (i, i + R/2), two streams of vectors, or (2i, 2i + 1), neighbours in one vector. Products and sums are
// rounded one by one in float32. A token's cos and sin are converted once, laid out as the elements that they multiply,
// and serve all its heads of q and k.
#pragma once

#include "cpu/row_ahead.h"
#include "cpu/simd_pair.h"

namespace qops::cpu::QOPS_ISA_NS {

// The pairs whose angles one call of load_angles() may convert.
inline constexpr int64_t kBlockPairs = 128;

// cos and sin of some pairs of one token. Interleaved pairs hold each value twice, sin as -sin, sin. Written and read
// in whole vectors.
struct Angles {
  float* cos;
  float* sin;
};

// n < 16 elements, or elements that do not lie side by side; the rest of the vector is zero.
template <class T>
inline F32x16 gather(const T* p, int64_t stride, int64_t n) {
  T buffer[kLanes] = {};
  for (int i = 0; i < kLanes && i < n; ++i) buffer[i] = p[i * stride];
  return load(buffer);
}

template <class T>
inline void scatter(T* p, const F32x16& v, int64_t stride, int64_t n) {
  T buffer[kLanes];
  store(buffer, v);
  for (int i = 0; i < kLanes && i < n; ++i) p[i * stride] = buffer[i];
}

// Up to 16 of n elements that lie `stride` apart. Inlined, for what is not dense is rare and the call costs more.
template <class T>
QOPS_ALWAYS_INLINE F32x16 load_strided(const T* p, int64_t stride, int64_t n) {
  return stride == 1 && n >= kLanes ? load(p) : gather(p, stride, n);
}

template <class T>
QOPS_ALWAYS_INLINE void store_strided(T* p, const F32x16& v, int64_t stride, int64_t n) {
  stride == 1 && n >= kLanes ? store(p, v) : scatter(p, v, stride, n);
}

inline int64_t position_of(const RotaryParams& p, int64_t token) {
  if (p.positions == nullptr) return token % p.t;
  const int64_t i = p.position_rows.offset(token);
  return p.positions_are_int64 ? static_cast<const int64_t*>(p.positions)[i]
                               : static_cast<const int32_t*>(p.positions)[i];
}

// kOk, or the first position that is no row of the tables.
inline Status check_positions(const RotaryParams& p, const ThreadPool& pool) {
  if (pool.listener != nullptr) [[unlikely]]
    return Status::kOk;  // as the plan does not depend on them
  for (int64_t token = 0; token < p.q.x_tokens.count; ++token) {
    const int64_t position = position_of(p, token);
    if (position >= 0 && position < p.table_rows) continue;
    *p.bad_position = position;
    return Status::kIndexOutOfRange;
  }
  return Status::kOk;
}

template <class W>
inline void widen(const W* row, int64_t stride, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, load_strided(row + i * stride, stride, n - i));
}

// The angles of pairs first .. first + pairs - 1 at a position.
template <class W>
inline void load_angles(const RotaryParams& p, int64_t position, int64_t first, int64_t pairs, const Angles& angles) {
  const W* cos = static_cast<const W*>(p.cos) + position * p.cos_row_stride + first * p.cos_stride;
  const W* sin = static_cast<const W*>(p.sin) + position * p.sin_row_stride + first * p.sin_stride;
  if (!p.interleaved) {
    widen(cos, p.cos_stride, pairs, angles.cos);
    widen(sin, p.sin_stride, pairs, angles.sin);
    return;
  }
  float c[kBlockPairs], s[kBlockPairs];
  widen(cos, p.cos_stride, pairs, c);
  widen(sin, p.sin_stride, pairs, s);
  for (int64_t i = 0; i < pairs; ++i) {
    angles.cos[2 * i] = angles.cos[2 * i + 1] = c[i];
    angles.sin[2 * i] = -s[i];
    angles.sin[2 * i + 1] = s[i];
  }
}

// Pairs (i, i + half). y may be x.
template <class T>
inline void rotate_halves(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t half, int64_t pairs,
                          const Angles& angles) {
  for (int64_t i = 0; i < pairs; i += kLanes) {
    const F32x16 x1 = load_strided(x + i * x_stride, x_stride, pairs - i);
    const F32x16 x2 = load_strided(x + (half + i) * x_stride, x_stride, pairs - i);
    const F32x16 cos = load(angles.cos + i), sin = load(angles.sin + i);
    store_strided(y + i * y_stride, x1 * cos - x2 * sin, y_stride, pairs - i);
    store_strided(y + (half + i) * y_stride, x2 * cos + x1 * sin, y_stride, pairs - i);
  }
}

// Whether rotate_whole_halves() does the heads: what lies side by side, in whole pairs of vectors.
inline bool rotates_whole_halves(const RotaryParams& p) {
  const auto is_dense = [](const RotaryHeads& heads) {
    return heads.heads == 0 || (heads.x_stride == 1 && heads.y_stride == 1);
  };
  return !p.interleaved && p.pairs <= kBlockPairs && p.pairs % kPair == 0 && is_dense(p.q) && is_dense(p.k);
}

// Numbers side by side to the order in which pairs of T are loaded.
template <class T>
inline void order_as_pairs(float* values, int64_t n) {
  for (int64_t i = 0; i < n; i += kPair) {
    const F32x32 v = load_pair_as<T>(values + i);
    store(values + i, v.a);
    store(values + i + kLanes, v.b);
  }
}

// As rotate_halves() of read(x, i), with cos and sin in the order of pairs. y may be x.
template <bool kStream, class T, class Read>
inline void rotate_whole_halves(const T* x, T* y, int64_t half, const Angles& angles, const Read& read) {
  for (int64_t i = 0; i < half; i += kPair) {
    const F32x32 x1 = read(x, i), x2 = read(x, half + i);
    const F32x16 c0 = load(angles.cos + i), c1 = load(angles.cos + i + kLanes);
    const F32x16 s0 = load(angles.sin + i), s1 = load(angles.sin + i + kLanes);
    store_pair<kStream>(y + i, {x1.a * c0 - x2.a * s0, x1.b * c1 - x2.b * s1});
    store_pair<kStream>(y + half + i, {x2.a * c0 + x1.a * s0, x2.b * c1 + x1.b * s1});
  }
}

// Whether the rotated heads, which are then dense, are worth streaming. In place they are in the cache.
template <class T>
inline bool streams_heads(const RotaryParams& p, const RotaryHeads& heads) {
  return heads.y != heads.x && 2 * p.pairs == p.d &&
         worth_streaming(static_cast<const T*>(heads.y), heads.y_tokens.count, heads.heads * p.d);
}

// Pairs (2i, 2i + 1), y may be x. x1 * cos + x2 * -sin is x1 * cos - x2 * sin, bit for bit.
template <class T>
inline void rotate_neighbours(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t pairs,
                              const Angles& angles) {
  for (int64_t i = 0; i < 2 * pairs; i += kLanes) {
    const F32x16 v = load_strided(x + i * x_stride, x_stride, 2 * pairs - i);
    const F32x16 turned = v * load(angles.cos + i) + swap_neighbours(v) * load(angles.sin + i);
    store_strided(y + i * y_stride, turned, y_stride, 2 * pairs - i);
  }
}

}  // namespace qops::cpu::QOPS_ISA_NS
