// AVX2 with FMA and F16C: included by simd.h.
#pragma once

#include <immintrin.h>

namespace qops::cpu::QOPS_ISA_NS {

inline constexpr int kVectorRegisters = 16;

struct F32x16 {
  __m256 lo, hi;
};
struct I32x16 {
  __m256i lo, hi;
};
struct U16x16 {
  __m256i v;
};
struct B8x64 {  // 64 bytes, signed or unsigned by use
  __m256i lo, hi;
};

inline F32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline I32x16 set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F32x16 sqrt(F32x16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// b where either is NaN.
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F32x16 nan_to_zero(F32x16 a) {
  return {_mm256_and_ps(a.lo, _mm256_cmp_ps(a.lo, a.lo, _CMP_ORD_Q)),
          _mm256_and_ps(a.hi, _mm256_cmp_ps(a.hi, a.hi, _CMP_ORD_Q))};
}
// 0 where x < bound, elsewhere a.
inline F32x16 zero_below(F32x16 a, F32x16 x, F32x16 bound) {
  return {_mm256_and_ps(a.lo, _mm256_cmp_ps(x.lo, bound.lo, _CMP_NLT_UQ)),
          _mm256_and_ps(a.hi, _mm256_cmp_ps(x.hi, bound.hi, _CMP_NLT_UQ))};
}
// To nearest even, as a float.
inline F32x16 round_to_integer(F32x16 a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}
// a * 2^n, rounded once. n is an integer of at most 250 in magnitude, or NaN where a is NaN; |a| is 0.5 to 2 or NaN.
inline F32x16 scale_by_power_of_two(F32x16 a, F32x16 n) {
  // 2^n itself may lie outside the range of a float. Of its two halves the first scales without rounding.
  const auto scale = [](__m256 x, __m256 exponent) {
    const auto power = [](__m256i e) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
    };
    const __m256i whole = _mm256_cvtps_epi32(exponent);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(whole, half)));
  };
  return {scale(a.lo, n.lo), scale(a.hi, n.hi)};
}
// Lanes 1 0 3 2 5 4 ...
inline F32x16 swap_neighbours(F32x16 a) { return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)}; }
inline F32x16 low_halves(F32x16 a, F32x16 b) { return {a.lo, b.lo}; }
inline F32x16 high_halves(F32x16 a, F32x16 b) { return {a.hi, b.hi}; }

template <int kOrder>
inline __m256 every_second_lane(__m256 a, __m256 b) {
  // shuffle works within 128-bit halves: [a b a b] is put right by the permutation.
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, kOrder)), 0xd8));
}
// Lanes 0, 2, 4, ... of a, then of b.
inline F32x16 even_lanes(F32x16 a, F32x16 b) {
  return {every_second_lane<0x88>(a.lo, a.hi), every_second_lane<0x88>(b.lo, b.hi)};
}
// Lanes 1, 3, 5, ... of a, then of b.
inline F32x16 odd_lanes(F32x16 a, F32x16 b) {
  return {every_second_lane<0xdd>(a.lo, a.hi), every_second_lane<0xdd>(b.lo, b.hi)};
}

inline I32x16 operator+(I32x16 a, I32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline I32x16 operator-(I32x16 a, I32x16 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
inline I32x16 operator*(I32x16 a, I32x16 b) { return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)}; }
inline I32x16 operator&(I32x16 a, I32x16 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
inline I32x16 max(I32x16 a, I32x16 b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
template <int kBits>
inline I32x16 shift_left(I32x16 a) {
  return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
}

template <int kBits>
inline I32x16 shift_right(I32x16 a) {  // arithmetic
  return {_mm256_srai_epi32(a.lo, kBits), _mm256_srai_epi32(a.hi, kBits)};
}

// The 8 codes of word a, then of b, as int4 weights are packed (weight_pack.cpp); above its 4 bits a lane holds others.
inline I32x16 spread_codes(uint32_t a, uint32_t b) {
  const __m256i shifts = _mm256_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28);
  const auto spread = [&](uint32_t word) {
    return _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int32_t>(word)), shifts);
  };
  return {spread(a), spread(b)};
}
// Lane i is the lane of `table` that the low 4 bits of code i name.
inline F32x16 look_up(F32x16 table, I32x16 codes) {
  const auto half = [&](__m256i code) {  // bit 3 chooses between the halves, as the sign of a lane
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.lo, code), _mm256_permutevar8x32_ps(table.hi, code),
                            _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
  };
  return {half(codes.lo), half(codes.hi)};
}

inline F32x16 to_float(I32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
// Round to nearest even; the value must fit int32.
inline I32x16 to_int(F32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline I32x16 as_int(F32x16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
inline F32x16 as_float(I32x16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }

inline __m128i half_of(U16x16 h, int which) {
  return which == 0 ? _mm256_castsi256_si128(h.v) : _mm256_extracti128_si256(h.v, 1);
}
inline F32x16 widen_half(U16x16 h) { return {_mm256_cvtph_ps(half_of(h, 0)), _mm256_cvtph_ps(half_of(h, 1))}; }
inline U16x16 narrow_half(F32x16 a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_set_m128i(_mm256_cvtps_ph(a.hi, kNearest), _mm256_cvtps_ph(a.lo, kNearest))};
}
inline F32x16 widen_bfloat16(U16x16 b) {
  const auto widen = [](__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); };
  return {widen(half_of(b, 0)), widen(half_of(b, 1))};
}
// R() of bfloat16, left in float32. By integers, for no instruction of this level knows the type.
inline F32x16 round_bfloat16(F32x16 a) {
  const auto round = [](__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 rounded = _mm256_castsi256_ps(_mm256_and_si256(sum, _mm256_set1_epi32(-0x10000)));
    const __m256 quiet_nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fff0000));
    return _mm256_blendv_ps(rounded, quiet_nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  };
  return {round(a.lo), round(a.hi)};
}
inline U16x16 narrow_bfloat16(F32x16 a) {
  const F32x16 rounded = round_bfloat16(a);
  const __m256i lo = _mm256_srli_epi32(_mm256_castps_si256(rounded.lo), 16);
  const __m256i hi = _mm256_srli_epi32(_mm256_castps_si256(rounded.hi), 16);
  // packus works within 128-bit halves: [lo0 hi0 lo1 hi1] is put right by the permutation.
  return {_mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8)};
}

inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline U16x16 load_u16(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline F32x16 load(const Half* p) { return widen_half(load_u16(p)); }
inline F32x16 load(const BFloat16* p) { return widen_bfloat16(load_u16(p)); }
inline I32x16 load(const int32_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline I32x16 load(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
inline I32x16 load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}

inline void store(float* p, F32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_u16(void* p, U16x16 a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }
inline void store(Half* p, F32x16 a) { store_u16(p, narrow_half(a)); }
inline void store(BFloat16* p, F32x16 a) { store_u16(p, narrow_bfloat16(a)); }
inline void store(int32_t* p, I32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}

// store() past the caches; p is aligned to the bytes of a vector. What lies in a line need not be written at once.
inline void stream(float* p, F32x16 a) {
  _mm256_stream_ps(p, a.lo);
  _mm256_stream_ps(p + 8, a.hi);
}
inline void stream_u16(void* p, U16x16 a) { _mm256_stream_si256(static_cast<__m256i*>(p), a.v); }
inline void stream(Half* p, F32x16 a) { stream_u16(p, narrow_half(a)); }
inline void stream(BFloat16* p, F32x16 a) { stream_u16(p, narrow_bfloat16(a)); }
// After the last stream() of a thread, before others may read what it wrote.
inline void end_stream() { _mm_sfence(); }

// The low byte of each lane.
inline void store_bytes(uint8_t* p, I32x16 a) {
  const __m256i low = _mm256_set1_epi32(0xff);
  const __m256i words = _mm256_packus_epi32(_mm256_and_si256(a.lo, low), _mm256_and_si256(a.hi, low));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

// Each lane clamped to -128 .. 127.
inline void store_saturated(int8_t* p, I32x16 a) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline B8x64 load_bytes(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline B8x64 broadcast_4_bytes(const void* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return {_mm256_set1_epi32(word), _mm256_set1_epi32(word)};
}
inline B8x64 low_nibbles(B8x64 b) {
  const __m256i mask = _mm256_set1_epi8(0x0f);
  return {_mm256_and_si256(b.lo, mask), _mm256_and_si256(b.hi, mask)};
}
inline B8x64 high_nibbles(B8x64 b) {
  const __m256i mask = _mm256_set1_epi8(0x0f);
  return {_mm256_and_si256(_mm256_srli_epi32(b.lo, 4), mask), _mm256_and_si256(_mm256_srli_epi32(b.hi, 4), mask)};
}
inline B8x64 flip_sign_bits(B8x64 b) {
  const __m256i sign = _mm256_set1_epi8(int8_t{-128});
  return {_mm256_xor_si256(b.lo, sign), _mm256_xor_si256(b.hi, sign)};
}

// sum + u0 s0 + u1 s1 + u2 s2 + u3 s3 in each lane, u unsigned and s signed bytes; exact: bytes are widened to 16 bits,
// because vpmaddubsw saturates.
inline I32x16 dot(I32x16 sum, B8x64 u, B8x64 s) {
  const auto half = [](__m256i acc, __m256i a, __m256i b) {
    const __m256i even =
        _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  };
  return {half(sum.lo, u.lo, s.lo), half(sum.hi, u.hi, s.hi)};
}
// As dot(), for callers whose u0 s0 + u1 s1 fits int16 (4-bit codes).
inline I32x16 dot_short(I32x16 sum, B8x64 u, B8x64 s) {
  const __m256i ones = _mm256_set1_epi16(1);
  const auto half = [&](__m256i acc, __m256i a, __m256i b) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
  };
  return {half(sum.lo, u.lo, s.lo), half(sum.hi, u.hi, s.hi)};
}

// Of some dot products that are added to a sum, their own sum while it fits 16 bits: of codes of 0 .. 15, 8 times
// 2 * 15 * 128. One instruction less for each than in 32 bits.
inline constexpr int kShortDots = 8;
struct ShortSums {
  __m256i lo, hi;
};
inline ShortSums begin_short(I32x16 /*sum*/) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline ShortSums dot_nibbles(ShortSums sum, B8x64 u, B8x64 s) {
  return {_mm256_add_epi16(sum.lo, _mm256_maddubs_epi16(u.lo, s.lo)),
          _mm256_add_epi16(sum.hi, _mm256_maddubs_epi16(u.hi, s.hi))};
}
inline I32x16 end_short(I32x16 sum, ShortSums part) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(part.lo, ones)),
          _mm256_add_epi32(sum.hi, _mm256_madd_epi16(part.hi, ones))};
}

// Dot products of a row of x with a strip of w, 4 columns in each lane, both signed; exact modulo 2^32. The row lies in
// kDotPlanes planes, as write_dot_row() makes them of 64 values at a time: columns 0 2 4 ... and 1 3 5 ... as int16, so
// that x is widened once a call and w once a tile, not both at every product.
inline constexpr int kDotPlanes = 2;
inline constexpr int32_t kDotOffset = 0;
struct DotRow {
  __m256i even, odd;
};
struct DotStrip {
  __m256i lo_even, lo_odd, hi_even, hi_odd;
};
inline __m256i even_bytes(__m256i b) { return _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8); }
inline __m256i odd_bytes(__m256i b) { return _mm256_srai_epi16(b, 8); }
inline void write_dot_row(uint8_t* planes, int64_t plane_bytes, B8x64 x) {
  const auto store = [](uint8_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); };
  store(planes, even_bytes(x.lo));
  store(planes + 32, even_bytes(x.hi));
  store(planes + plane_bytes, odd_bytes(x.lo));
  store(planes + plane_bytes + 32, odd_bytes(x.hi));
}
inline DotRow load_dot_row(const uint8_t* planes, int64_t plane_bytes) {
  const auto broadcast = [](const uint8_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return _mm256_set1_epi32(pair);
  };
  return {broadcast(planes), broadcast(planes + plane_bytes)};
}
inline DotStrip load_dot_strip(const void* p) {
  const B8x64 b = load_bytes(p);
  return {even_bytes(b.lo), odd_bytes(b.lo), even_bytes(b.hi), odd_bytes(b.hi)};
}
inline I32x16 dot(I32x16 sum, const DotRow& x, const DotStrip& w) {
  const auto half = [&](__m256i acc, __m256i even, __m256i odd) {
    return _mm256_add_epi32(_mm256_add_epi32(acc, _mm256_madd_epi16(x.even, even)), _mm256_madd_epi16(x.odd, odd));
  };
  return {half(sum.lo, w.lo_even, w.lo_odd), half(sum.hi, w.hi_even, w.hi_odd)};
}

inline int32_t sum_lanes(I32x16 a) {
  const __m256i s8 = _mm256_add_epi32(a.lo, a.hi);
  const __m128i s4 = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
  const __m128i s2 = _mm_add_epi32(s4, _mm_shuffle_epi32(s4, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s2, _mm_shuffle_epi32(s2, 0xb1)));
}

inline int32_t max_lanes(I32x16 a) {
  const __m256i m8 = _mm256_max_epi32(a.lo, a.hi);
  const __m128i m4 = _mm_max_epi32(_mm256_castsi256_si128(m8), _mm256_extracti128_si256(m8, 1));
  const __m128i m2 = _mm_max_epi32(m4, _mm_shuffle_epi32(m4, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(m2, _mm_shuffle_epi32(m2, 0xb1)));
}

// Any of them where one is NaN.
inline float max_lanes(F32x16 a) {
  const __m256 m8 = _mm256_max_ps(a.lo, a.hi);
  const __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
  const __m128 m2 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
  return _mm_cvtss_f32(_mm_max_ss(m2, _mm_movehdup_ps(m2)));
}

// ((l0 + l8) + (l4 + l12)) + ...: halves added until one lane is left (strides 8, 4, 2, 1).
inline float sum_lanes(F32x16 a) {
  const __m256 s8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}

// Lane g of the result is the sum of the g-th group of 8 consecutive lanes of v[0..8), added at strides 4, 2, 1.
inline F32x16 sum_groups_of_8(const F32x16 v[8]) {
  const auto eight = [](const F32x16* w) {  // 4 vectors = 8 groups -> 8 sums
    __m256 s4[4];                           // s4[i]: groups 2i, 2i+1, four lanes each
    QOPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      s4[i] =
          _mm256_add_ps(_mm256_permute2f128_ps(w[i].lo, w[i].hi, 0x20), _mm256_permute2f128_ps(w[i].lo, w[i].hi, 0x31));
    }
    __m256 s2[2];
    QOPS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const __m256 a = s4[2 * i], b = s4[2 * i + 1];
      s2[i] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    }
    const __m256 s1 = _mm256_add_ps(_mm256_shuffle_ps(s2[0], s2[1], 0x88), _mm256_shuffle_ps(s2[0], s2[1], 0xdd));
    // Lane 4l + j of s1 holds group 2j + l.
    return _mm256_permutevar8x32_ps(s1, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  };
  return {eight(v), eight(v + 4)};
}

// 32 bfloat16: the even ones and the odd ones.
inline void load_alternate(const BFloat16* p, F32x16& even, F32x16& odd) {
  const __m256i* words = reinterpret_cast<const __m256i*>(p);
  const __m256i lo = _mm256_loadu_si256(words), hi = _mm256_loadu_si256(words + 1), high = _mm256_set1_epi32(-0x10000);
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(lo, high)), _mm256_castsi256_ps(_mm256_and_si256(hi, high))};
}
// NaN becomes the default one.
inline F32x16 quiet(F32x16 a) {
  const auto of = [](__m256 x) {
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  };
  return {of(a.lo), of(a.hi)};
}
// The high half of each lane rounded to bfloat16, whatever the low half then holds.
inline __m256i round_high_half(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
// R() of bfloat16. NaN is taken for a number, and stays NaN where its low half is 0, as in all that bfloat16 elements,
// quiet() ones and invalid operations make.
inline F32x16 round_of_words(F32x16 a) {
  const __m256i high = _mm256_set1_epi32(-0x10000);
  return {_mm256_castsi256_ps(_mm256_and_si256(round_high_half(a.lo), high)),
          _mm256_castsi256_ps(_mm256_and_si256(round_high_half(a.hi), high))};
}
// Of NaN as round_of_words().
template <bool kStream>
inline void store_alternate(BFloat16* p, F32x16 even, F32x16 odd) {
  const auto of = [](__m256i* to, __m256 e, __m256 o) {
    const __m256i words = _mm256_blend_epi16(_mm256_srli_epi32(round_high_half(e), 16), round_high_half(o), 0xaa);
    kStream ? _mm256_stream_si256(to, words) : _mm256_storeu_si256(to, words);
  };
  of(reinterpret_cast<__m256i*>(p), even.lo, odd.lo);
  of(reinterpret_cast<__m256i*>(p) + 1, even.hi, odd.hi);
}
// Their largest is the largest magnitude of 32 * pairs bfloat16.
inline I32x16 largest_magnitudes(const BFloat16* p, int64_t pairs) {
  __m256i most = _mm256_setzero_si256();
  const __m256i* words = reinterpret_cast<const __m256i*>(p);
  for (int64_t i = 0; i < 2 * pairs; ++i) {
    most = _mm256_max_epu16(most, _mm256_and_si256(_mm256_loadu_si256(words + i), _mm256_set1_epi16(0x7fff)));
  }
  const __m256i odd = _mm256_and_si256(most, _mm256_set1_epi32(-0x10000));
  return {_mm256_slli_epi32(most, 16), odd};
}
// Of 32 * pairs bfloat16: the largest of `above` is the magnitude of the largest one, or 0 where that is below 0; the
// largest of `below` that of the least one, or 0 where that is above 0.
inline void largest_on_both_sides(const BFloat16* p, int64_t pairs, I32x16& above, I32x16& below) {
  __m256i most = _mm256_setzero_si256(), least = most;
  const __m256i* words = reinterpret_cast<const __m256i*>(p);
  for (int64_t i = 0; i < 2 * pairs; ++i) {
    const __m256i some = _mm256_loadu_si256(words + i);
    most = _mm256_max_epi16(most, some);
    least = _mm256_max_epu16(least, some);
  }
  least = _mm256_subs_epu16(least, _mm256_set1_epi16(-0x8000));
  const __m256i odd = _mm256_set1_epi32(-0x10000);
  above = {_mm256_slli_epi32(most, 16), _mm256_and_si256(most, odd)};
  below = {_mm256_slli_epi32(least, 16), _mm256_and_si256(least, odd)};
}
// Each lane clamped to -128 .. 127, even and odd ones in turn. The lanes must fit int16.
template <bool kStream>
inline void store_saturated_alternate(int8_t* p, I32x16 even, I32x16 odd) {
  const __m256i lo = _mm256_blend_epi16(even.lo, _mm256_slli_epi32(odd.lo, 16), 0xaa);
  const __m256i hi = _mm256_blend_epi16(even.hi, _mm256_slli_epi32(odd.hi, 16), 0xaa);
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(lo, hi), 0xd8);
  __m256i* to = reinterpret_cast<__m256i*>(p);
  kStream ? _mm256_stream_si256(to, bytes) : _mm256_storeu_si256(to, bytes);
}
// As sum_groups_of_8() of 128 elements, of which even[i] and odd[i] hold 32.
inline F32x16 sum_alternate_groups_of_8(const F32x16 even[4], const F32x16 odd[4]) {
  const auto add = [](__m256 a, __m256 b, __m256 c, __m256 d) {  // the 4 lanes of each group
    const __m256 ab = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    const __m256 cd = _mm256_add_ps(_mm256_shuffle_ps(c, d, 0x44), _mm256_shuffle_ps(c, d, 0xee));
    return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x88), _mm256_shuffle_ps(ab, cd, 0xdd));
  };
  const __m256 lo = _mm256_add_ps(add(even[0].lo, even[1].lo, even[2].lo, even[3].lo),
                                  add(odd[0].lo, odd[1].lo, odd[2].lo, odd[3].lo));
  const __m256 hi = _mm256_add_ps(add(even[0].hi, even[1].hi, even[2].hi, even[3].hi),
                                  add(odd[0].hi, odd[1].hi, odd[2].hi, odd[3].hi));
  // Lane 4l + j of lo holds group 4j + l, of hi group 4j + 2 + l.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256d a = _mm256_castps_pd(_mm256_permutevar8x32_ps(lo, order));  // groups 0 1 4 5 8 9 12 13
  const __m256d b = _mm256_castps_pd(_mm256_permutevar8x32_ps(hi, order));  // groups 2 3 6 7 10 11 14 15
  const __m256 ends = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), middles = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
  return {_mm256_permute2f128_ps(ends, middles, 0x20), _mm256_permute2f128_ps(ends, middles, 0x31)};
}

}  // namespace qops::cpu::QOPS_ISA_NS
