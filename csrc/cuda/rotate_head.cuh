// Rotation of the heads of one token, for rotary and qk_norm_rotary: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin.
//
// The pairs are (i, i + R/2), two vectors of a head, or (2i, 2i + 1), neighbours in one. Products and sums are rounded
// one by one in float32. The unit of work is what one thread rotates: 8 pairs of halves, 4 of neighbours.
#pragma once

#include "cuda/row.cuh"

namespace qops::cuda {

QOPS_DEVICE int64_t position_of(const RotaryParams& p, int64_t token) {
  if (p.positions == nullptr) return token % p.t;
  const int64_t i = p.position_rows.offset(token);
  return p.positions_are_int64 ? static_cast<const int64_t*>(p.positions)[i]
                               : static_cast<const int32_t*>(p.positions)[i];
}

QOPS_DEVICE int pairs_of_unit(const RotaryParams& p) { return p.interleaved ? kVector / 2 : kVector; }

// Units of a head: those that rotate, and those that copy the elements behind them.
QOPS_DEVICE int rotating_units(const RotaryParams& p) {
  const int pairs = pairs_of_unit(p);
  return static_cast<int>((p.pairs + pairs - 1) / pairs);
}
QOPS_DEVICE int copying_units(const RotaryParams& p) {
  return static_cast<int>((p.d - 2 * p.pairs + kVector - 1) / kVector);
}

// cos and sin of pairs first .. first + 7 at a position. A position that is no row of the tables gives NaN: it must not
// be read, and a launch cannot report it.
template <bool kAligned>
QOPS_DEVICE void load_angles(const RotaryParams& p, int64_t position, int64_t first, Vector& cos, Vector& sin) {
  const int64_t n = p.pairs - first;
  if (position < 0 || position >= p.table_rows) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) cos[i] = sin[i] = __uint_as_float(0x7fc00000u);
    return;
  }
  const int64_t cos_at = position * p.cos_row_stride + first * p.cos_stride;
  const int64_t sin_at = position * p.sin_row_stride + first * p.sin_stride;
  if constexpr (kAligned) {
    load<true>(p.cos, p.table_dtype, cos_at, n, cos);
    load<true>(p.sin, p.table_dtype, sin_at, n, sin);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      Vector one;
      load<false>(p.cos, p.table_dtype, cos_at + i * p.cos_stride, i < n ? 1 : 0, one);
      cos[i] = one[0];
      load<false>(p.sin, p.table_dtype, sin_at + i * p.sin_stride, i < n ? 1 : 0, one);
      sin[i] = one[0];
    }
  }
}

// n elements that lie `stride` apart, n <= 8 or kAligned.
template <bool kAligned, class T>
QOPS_DEVICE void load_strided(const T* p, int64_t stride, int64_t n, Vector& v) {
  if constexpr (kAligned) {
    load<true>(p, n, v);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = i < n ? widen(p[i * stride]) : 0.0f;
  }
}

template <bool kAligned, class T>
QOPS_DEVICE void store_strided(T* p, int64_t stride, int64_t n, const Vector& v) {
  if constexpr (kAligned) {
    store<true>(p, n, v);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < n) p[i * stride] = narrow<T>(v[i]);
    }
  }
}

// One unit of a head, from x to y, which may be x. kAligned: whole vectors of 16 bytes everywhere.
template <bool kAligned, class T>
QOPS_DEVICE void rotate_unit(const RotaryParams& p, int64_t position, int unit, const T* x, int64_t x_stride, T* y,
                             int64_t y_stride) {
  const int64_t first = static_cast<int64_t>(unit) * pairs_of_unit(p);
  Vector cos, sin;
  if (!p.interleaved) {
    load_angles<kAligned>(p, position, first, cos, sin);
    const int64_t n = p.pairs - first;
    Vector x1, x2, y1, y2;
    load_strided<kAligned>(x + first * x_stride, x_stride, n, x1);
    load_strided<kAligned>(x + (p.pairs + first) * x_stride, x_stride, n, x2);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      y1[i] = x1[i] * cos[i] - x2[i] * sin[i];
      y2[i] = x2[i] * cos[i] + x1[i] * sin[i];
    }
    store_strided<kAligned>(y + first * y_stride, y_stride, n, y1);
    store_strided<kAligned>(y + (p.pairs + first) * y_stride, y_stride, n, y2);
    return;
  }
  load_angles<false>(p, position, first, cos, sin);
  const int64_t n = 2 * (p.pairs - first);
  Vector v, turned;
  load_strided<kAligned>(x + 2 * first * x_stride, x_stride, n, v);
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    turned[2 * i] = v[2 * i] * cos[i] - v[2 * i + 1] * sin[i];
    turned[2 * i + 1] = v[2 * i + 1] * cos[i] + v[2 * i] * sin[i];
  }
  store_strided<kAligned>(y + 2 * first * y_stride, y_stride, n, turned);
}

// Elements R .. D - 1 of a head, one vector. kAligned: as above, but for the last one.
template <bool kAligned, class T>
QOPS_DEVICE void copy_unit(const RotaryParams& p, int unit, const T* x, int64_t x_stride, T* y, int64_t y_stride) {
  const int64_t first = 2 * p.pairs + static_cast<int64_t>(unit) * kVector;
  if (kAligned && first + kVector <= p.d) {
    constexpr int kPieces = kVector * sizeof(T) / sizeof(uint4);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const uint4 bits = reinterpret_cast<const uint4*>(x + first)[piece];
      reinterpret_cast<uint4*>(y + first)[piece] = bits;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (first + i < p.d) y[(first + i) * y_stride] = x[(first + i) * x_stride];
  }
}

inline bool aligned(const RotaryHeads& heads, DType dtype) {
  const int64_t size = static_cast<int64_t>(size_of(dtype));
  return heads.x_stride == 1 && heads.y_stride == 1 && heads.x_head_stride * size % 16 == 0 &&
         heads.y_head_stride * size % 16 == 0 && aligned(heads.x, heads.x_tokens, 0, dtype) &&
         aligned(heads.y, heads.y_tokens, 0, dtype);
}

// Whole units of 16 bytes in every head, and for halves in the tables. Neighbours read their 4 angles one by one.
inline bool aligned(const RotaryParams& p) {
  if (!aligned(p.q, p.dtype) || !aligned(p.k, p.dtype)) return false;
  if (p.interleaved) return p.pairs % 4 == 0;
  const int64_t size = static_cast<int64_t>(size_of(p.table_dtype));
  return p.pairs % kVector == 0 && p.cos_stride == 1 && p.sin_stride == 1 && p.cos_row_stride * size % 16 == 0 &&
         p.sin_row_stride * size % 16 == 0 && multiple_of_16(p.cos) && multiple_of_16(p.sin);
}

// Whether every four angles from a multiple of four on may be read at once.
inline bool four_at_a_time(const RotaryParams& p) {
  const auto fits = [&](const void* table, int64_t row_stride, int64_t stride) {
    const uintptr_t bytes = 4 * size_of(p.table_dtype);
    return reinterpret_cast<uintptr_t>(table) % bytes == 0 && row_stride % 4 == 0 && stride == 1;
  };
  return p.pairs % 4 == 0 && fits(p.cos, p.cos_row_stride, p.cos_stride) && fits(p.sin, p.sin_row_stride, p.sin_stride);
}

}  // namespace qops::cuda
