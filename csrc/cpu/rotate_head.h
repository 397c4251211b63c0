// Rotation of the heads of one token, for rotary and qk_norm_rotary.
//
//   y1 = x1 * cos - x2 * sin,   y2 = x2 * cos + x1 * sin
//
// The pairs are (i, i + R/2), two streams of vectors, or (2i, 2i + 1), neighbours in one vector. Products and sums are
// rounded one by one in float32. A token's cos and sin are converted once, laid out as the elements that they multiply,
// and serve all its heads of q and k.
#pragma once

#include "cpu/simd.h"

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
