// Portable C++: the meaning of every operation in simd.h, lane by lane. Included by simd.h.
#pragma once

namespace qops::cpu::QOPS_ISA_NS {

inline constexpr int kVectorRegisters = 16;

struct F32x16 {
  float v[16];
};
struct I32x16 {
  int32_t v[16];
};
struct U16x16 {
  uint16_t v[16];
};
struct B8x64 {  // 64 bytes, signed or unsigned by use
  uint8_t v[64];
};

template <class R, class F>
inline R lanes(const F& f) {
  R r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}

inline F32x16 set1(float x) {
  return lanes<F32x16>([&](int) { return x; });
}
inline I32x16 set1(int32_t x) {
  return lanes<I32x16>([&](int) { return x; });
}

inline F32x16 operator+(const F32x16& a, const F32x16& b) {
  return lanes<F32x16>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32x16 operator-(const F32x16& a, const F32x16& b) {
  return lanes<F32x16>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32x16 operator*(const F32x16& a, const F32x16& b) {
  return lanes<F32x16>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x16 operator/(const F32x16& a, const F32x16& b) {
  return lanes<F32x16>([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32x16 sqrt(const F32x16& a) {
  return lanes<F32x16>([&](int i) { return std::sqrt(a.v[i]); });
}
inline F32x16 fma(const F32x16& a, const F32x16& b, const F32x16& c) {
  return lanes<F32x16>([&](int i) { return std::fmaf(a.v[i], b.v[i], c.v[i]); });
}
// b where either is NaN.
inline F32x16 min(const F32x16& a, const F32x16& b) {
  return lanes<F32x16>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 max(const F32x16& a, const F32x16& b) {
  return lanes<F32x16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 nan_to_zero(const F32x16& a) {
  return lanes<F32x16>([&](int i) { return std::isnan(a.v[i]) ? 0.0f : a.v[i]; });
}
// 0 where x < bound, elsewhere a.
inline F32x16 zero_below(const F32x16& a, const F32x16& x, const F32x16& bound) {
  return lanes<F32x16>([&](int i) { return x.v[i] < bound.v[i] ? 0.0f : a.v[i]; });
}
// To nearest even, as a float.
inline F32x16 round_to_integer(const F32x16& a) {
  return lanes<F32x16>([&](int i) { return std::nearbyintf(a.v[i]); });
}
// a * 2^n, rounded once. n is an integer of at most 250 in magnitude, or NaN where a is NaN; |a| is 0.5 to 2 or NaN.
inline F32x16 scale_by_power_of_two(const F32x16& a, const F32x16& n) {
  return lanes<F32x16>(
      [&](int i) { return std::isnan(n.v[i]) ? a.v[i] : std::ldexp(a.v[i], static_cast<int>(n.v[i])); });
}
// Lanes 1 0 3 2 5 4 ...
inline F32x16 swap_neighbours(const F32x16& a) {
  return lanes<F32x16>([&](int i) { return a.v[i ^ 1]; });
}
inline F32x16 low_halves(F32x16 a, F32x16 b) {
  for (int i = 0; i < 8; ++i) a.v[8 + i] = b.v[i];
  return a;
}
inline F32x16 high_halves(F32x16 a, F32x16 b) {
  for (int i = 0; i < 8; ++i) b.v[i] = a.v[8 + i];
  return b;
}

// Lanes 0, 2, 4, ... of a, then of b.
inline F32x16 even_lanes(const F32x16& a, const F32x16& b) {
  return lanes<F32x16>([&](int i) { return i < 8 ? a.v[2 * i] : b.v[2 * i - 16]; });
}
// Lanes 1, 3, 5, ... of a, then of b.
inline F32x16 odd_lanes(const F32x16& a, const F32x16& b) {
  return lanes<F32x16>([&](int i) { return i < 8 ? a.v[2 * i + 1] : b.v[2 * i - 15]; });
}

// Integer lanes wrap, as vector instructions do; the detour through uint32 keeps that defined.
inline I32x16 operator+(const I32x16& a, const I32x16& b) {
  return lanes<I32x16>([&](int i) { return static_cast<int32_t>(uint32_t(a.v[i]) + uint32_t(b.v[i])); });
}
inline I32x16 operator-(const I32x16& a, const I32x16& b) {
  return lanes<I32x16>([&](int i) { return static_cast<int32_t>(uint32_t(a.v[i]) - uint32_t(b.v[i])); });
}
inline I32x16 operator*(const I32x16& a, const I32x16& b) {
  return lanes<I32x16>([&](int i) { return static_cast<int32_t>(uint32_t(a.v[i]) * uint32_t(b.v[i])); });
}
inline I32x16 operator&(const I32x16& a, const I32x16& b) {
  return lanes<I32x16>([&](int i) { return a.v[i] & b.v[i]; });
}
inline I32x16 max(const I32x16& a, const I32x16& b) {
  return lanes<I32x16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
template <int kBits>
inline I32x16 shift_left(const I32x16& a) {
  return lanes<I32x16>([&](int i) { return static_cast<int32_t>(uint32_t(a.v[i]) << kBits); });
}

template <int kBits>
inline I32x16 shift_right(const I32x16& a) {  // arithmetic
  return lanes<I32x16>([&](int i) { return a.v[i] >> kBits; });
}

// The 8 codes of word a, then of b, as int4 weights are packed (weight_pack.cpp); above its 4 bits a lane holds others.
inline I32x16 spread_codes(uint32_t a, uint32_t b) {
  constexpr int kShift[8] = {0, 8, 16, 24, 4, 12, 20, 28};
  return lanes<I32x16>([&](int i) { return static_cast<int32_t>((i < 8 ? a : b) >> kShift[i % 8]); });
}
// Lane i is the lane of `table` that the low 4 bits of code i name.
inline F32x16 look_up(const F32x16& table, const I32x16& codes) {
  return lanes<F32x16>([&](int i) { return table.v[codes.v[i] & 15]; });
}

inline F32x16 to_float(const I32x16& a) {
  return lanes<F32x16>([&](int i) { return static_cast<float>(a.v[i]); });
}
// Round to nearest even; the value must fit int32.
inline I32x16 to_int(const F32x16& a) {
  return lanes<I32x16>([&](int i) { return static_cast<int32_t>(std::nearbyintf(a.v[i])); });
}
inline I32x16 as_int(const F32x16& a) { return bit_cast<I32x16>(a); }
inline F32x16 as_float(const I32x16& a) { return bit_cast<F32x16>(a); }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24 is exact
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign);
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return bit_cast<float>(sign | (wide << 23) | (mantissa << 13));
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                        // below 2^-14: a multiple of 2^-24; the sum rounds to even
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline F32x16 widen_half(const U16x16& h) {
  return lanes<F32x16>([&](int i) { return half_to_float(h.v[i]); });
}
inline U16x16 narrow_half(const F32x16& a) {
  return lanes<U16x16>([&](int i) { return float_to_half(a.v[i]); });
}
inline F32x16 widen_bfloat16(const U16x16& b) {
  return lanes<F32x16>([&](int i) { return bit_cast<float>(uint32_t(b.v[i]) << 16); });
}
inline U16x16 narrow_bfloat16(const F32x16& a) {
  return lanes<U16x16>([&](int i) { return float_to_bfloat16(a.v[i]); });
}
// R() of bfloat16, left in float32.
inline F32x16 round_bfloat16(const F32x16& a) { return widen_bfloat16(narrow_bfloat16(a)); }

template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline F32x16 load(const float* p) { return load_as<F32x16>(p); }
inline F32x16 load(const Half* p) { return widen_half(load_as<U16x16>(p)); }
inline F32x16 load(const BFloat16* p) { return widen_bfloat16(load_as<U16x16>(p)); }
inline I32x16 load(const int32_t* p) { return load_as<I32x16>(p); }
inline I32x16 load(const uint8_t* p) {
  return lanes<I32x16>([&](int i) { return int32_t{p[i]}; });
}
inline I32x16 load(const int8_t* p) {
  return lanes<I32x16>([&](int i) { return int32_t{p[i]}; });
}

inline void store(float* p, const F32x16& a) { std::memcpy(p, &a, sizeof(a)); }
inline void store(Half* p, const F32x16& a) {
  const U16x16 h = narrow_half(a);
  std::memcpy(p, &h, sizeof(h));
}
inline void store(BFloat16* p, const F32x16& a) {
  const U16x16 b = narrow_bfloat16(a);
  std::memcpy(p, &b, sizeof(b));
}
inline void store(int32_t* p, const I32x16& a) { std::memcpy(p, &a, sizeof(a)); }

// At the other levels past the caches.
template <class T>
inline void stream(T* p, const F32x16& a) {
  store(p, a);
}
inline void end_stream() {}

// The low byte of each lane.
inline void store_bytes(uint8_t* p, const I32x16& a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(a.v[i]);
}

// Each lane clamped to -128 .. 127.
inline void store_saturated(int8_t* p, const I32x16& a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i] < -128 ? -128 : a.v[i] > 127 ? 127 : a.v[i]);
}

inline B8x64 load_bytes(const void* p) { return load_as<B8x64>(p); }
inline B8x64 broadcast_4_bytes(const void* p) {
  B8x64 b;
  for (int i = 0; i < 16; ++i) std::memcpy(b.v + 4 * i, p, 4);
  return b;
}
template <class F>
inline B8x64 bytes(const F& f) {
  B8x64 b;
  for (int i = 0; i < 64; ++i) b.v[i] = static_cast<uint8_t>(f(i));
  return b;
}
inline B8x64 low_nibbles(const B8x64& b) {
  return bytes([&](int i) { return b.v[i] & 0x0f; });
}
inline B8x64 high_nibbles(const B8x64& b) {
  return bytes([&](int i) { return b.v[i] >> 4; });
}
inline B8x64 flip_sign_bits(const B8x64& b) {
  return bytes([&](int i) { return b.v[i] ^ 0x80; });
}

// sum + u0 s0 + u1 s1 + u2 s2 + u3 s3 in each lane, u unsigned and s signed bytes; exact.
inline I32x16 dot(const I32x16& sum, const B8x64& u, const B8x64& s) {
  return lanes<I32x16>([&](int i) {
    uint32_t lane = static_cast<uint32_t>(sum.v[i]);
    for (int j = 4 * i; j < 4 * i + 4; ++j) lane += static_cast<uint32_t>(u.v[j] * static_cast<int8_t>(s.v[j]));
    return static_cast<int32_t>(lane);
  });
}
// As dot(), for callers whose u0 s0 + u1 s1 fits int16 (4-bit codes): the AVX2 level has a shorter way for it.
inline I32x16 dot_short(const I32x16& sum, const B8x64& u, const B8x64& s) { return dot(sum, u, s); }

// Of some dot products that are added to a sum, that sum; on the AVX2 level their own, in 16 bits.
inline constexpr int kShortDots = 1 << 20;
using ShortSums = I32x16;
inline ShortSums begin_short(const I32x16& sum) { return sum; }
inline ShortSums dot_nibbles(const ShortSums& sum, const B8x64& u, const B8x64& s) { return dot(sum, u, s); }
inline I32x16 end_short(const I32x16& /*sum*/, const ShortSums& part) { return part; }

// Dot products of a row of x with a strip of w, 4 columns in each lane, both signed; exact modulo 2^32. The row lies in
// kDotPlanes planes, as write_dot_row() makes them of 64 values at a time; the products are those of x + kDotOffset.
inline constexpr int kDotPlanes = 1;
inline constexpr int32_t kDotOffset = 128;
using DotRow = B8x64;
using DotStrip = B8x64;
inline void write_dot_row(uint8_t* planes, int64_t /*plane_bytes*/, const B8x64& x) {
  const B8x64 offset = flip_sign_bits(x);
  std::memcpy(planes, &offset, sizeof(offset));
}
inline DotRow load_dot_row(const uint8_t* planes, int64_t /*plane_bytes*/) { return broadcast_4_bytes(planes); }
inline DotStrip load_dot_strip(const void* p) { return load_bytes(p); }

inline int32_t sum_lanes(const I32x16& a) {
  int32_t sum = 0;
  for (int32_t lane : a.v) sum += lane;
  return sum;
}

inline int32_t max_lanes(const I32x16& a) {
  int32_t most = a.v[0];
  for (int32_t lane : a.v) most = lane > most ? lane : most;
  return most;
}

// Any of them where one is NaN.
inline float max_lanes(const F32x16& a) {
  float most = a.v[0];
  for (float lane : a.v) most = lane > most ? lane : most;
  return most;
}

// ((l0 + l8) + (l4 + l12)) + ...: halves added until one lane is left (strides 8, 4, 2, 1).
inline float sum_lanes(F32x16 a) {
  for (int stride = 8; stride > 0; stride /= 2) {
    for (int i = 0; i < stride; ++i) a.v[i] += a.v[i + stride];
  }
  return a.v[0];
}

// Lane g of the result is the sum of the g-th group of 8 consecutive lanes of v[0..8), added at strides 4, 2, 1.
inline F32x16 sum_groups_of_8(const F32x16 v[8]) {
  return lanes<F32x16>([&](int g) {
    const float* p = v[g / 2].v + 8 * (g % 2);
    return ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]));
  });
}

// 32 bfloat16: the even ones and the odd ones.
inline void load_alternate(const BFloat16* p, F32x16& even, F32x16& odd) {
  const F32x16 first = load(p), second = load(p + 16);
  even = even_lanes(first, second);
  odd = odd_lanes(first, second);
}
// At the other levels NaN becomes the default one, and round_of_words() and store_alternate() take NaN for a number.
inline F32x16 quiet(const F32x16& a) { return a; }
inline F32x16 round_of_words(const F32x16& a) { return round_bfloat16(a); }
template <bool kStream>
inline void store_alternate(BFloat16* p, const F32x16& even, const F32x16& odd) {
  const U16x16 e = narrow_bfloat16(even), o = narrow_bfloat16(odd);
  for (int i = 0; i < 32; ++i) p[i].bits = i % 2 == 0 ? e.v[i / 2] : o.v[i / 2];
}
// Their largest is the largest magnitude of 32 * pairs bfloat16.
inline I32x16 largest_magnitudes(const BFloat16* p, int64_t pairs) {
  uint32_t most = 0;
  for (int64_t i = 0; i < 32 * pairs; ++i) {
    const uint32_t magnitude = p[i].bits & 0x7fffu;
    most = magnitude > most ? magnitude : most;
  }
  return set1(static_cast<int32_t>(most << 16));
}
// Of 32 * pairs bfloat16: the largest of `above` is the magnitude of the largest one, or 0 where that is below 0; the
// largest of `below` that of the least one, or 0 where that is above 0.
inline void largest_on_both_sides(const BFloat16* p, int64_t pairs, I32x16& above, I32x16& below) {
  uint32_t most[2] = {0, 0};  // by sign
  for (int64_t i = 0; i < 32 * pairs; ++i) {
    const uint32_t magnitude = p[i].bits & 0x7fffu;
    uint32_t& side = most[p[i].bits >> 15];
    side = magnitude > side ? magnitude : side;
  }
  above = set1(static_cast<int32_t>(most[0] << 16));
  below = set1(static_cast<int32_t>(most[1] << 16));
}
// Each lane clamped to -128 .. 127, even and odd ones in turn. The lanes must fit int16.
template <bool kStream>
inline void store_saturated_alternate(int8_t* p, const I32x16& even, const I32x16& odd) {
  int8_t e[16], o[16];
  store_saturated(e, even);
  store_saturated(o, odd);
  for (int i = 0; i < 32; ++i) p[i] = i % 2 == 0 ? e[i / 2] : o[i / 2];
}
// As sum_groups_of_8() of 128 elements, of which even[i] and odd[i] hold 32.
inline F32x16 sum_alternate_groups_of_8(const F32x16 even[4], const F32x16 odd[4]) {
  return lanes<F32x16>([&](int g) {
    const float *e = even[g / 4].v + 4 * (g % 4), *o = odd[g / 4].v + 4 * (g % 4);
    return ((e[0] + e[2]) + (e[1] + e[3])) + ((o[0] + o[2]) + (o[1] + o[3]));
  });
}

}  // namespace qops::cpu::QOPS_ISA_NS
