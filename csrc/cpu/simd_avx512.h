// AVX-512 (F, BW, VL, DQ, VNNI, BF16): included by simd.h.
#pragma once

#include <immintrin.h>

namespace qops::cpu::QOPS_ISA_NS {

inline constexpr int kVectorRegisters = 32;

struct F32x16 {
  __m512 v;
};
struct I32x16 {
  __m512i v;
};
struct U16x16 {
  __m256i v;
};
struct B8x64 {  // 64 bytes, signed or unsigned by use
  __m512i v;
};

inline F32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline I32x16 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }

inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 sqrt(F32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// b where either is NaN.
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 nan_to_zero(F32x16 a) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), a.v)}; }
// 0 where x < bound, elsewhere a.
inline F32x16 zero_below(F32x16 a, F32x16 x, F32x16 bound) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_NLT_UQ), a.v)};
}
// To nearest even, as a float.
inline F32x16 round_to_integer(F32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n, rounded once. n is an integer of at most 250 in magnitude, or NaN where a is NaN; |a| is 0.5 to 2 or NaN.
inline F32x16 scale_by_power_of_two(F32x16 a, F32x16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// Lanes 1 0 3 2 5 4 ...
inline F32x16 swap_neighbours(F32x16 a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
// Lanes 0 .. 7 of both.
inline F32x16 low_halves(F32x16 a, F32x16 b) { return {_mm512_shuffle_f32x4(a.v, b.v, 0x44)}; }
// Lanes 8 .. 15 of both.
inline F32x16 high_halves(F32x16 a, F32x16 b) { return {_mm512_shuffle_f32x4(a.v, b.v, 0xee)}; }

// Lanes 0, 2, 4, ... of a, then of b.
inline F32x16 even_lanes(F32x16 a, F32x16 b) {
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(a.v, order, b.v)};
}
// Lanes 1, 3, 5, ... of a, then of b.
inline F32x16 odd_lanes(F32x16 a, F32x16 b) {
  const __m512i order = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_permutex2var_ps(a.v, order, b.v)};
}

inline I32x16 operator+(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32x16 operator-(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I32x16 operator*(I32x16 a, I32x16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I32x16 operator&(I32x16 a, I32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I32x16 max(I32x16 a, I32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int kBits>
inline I32x16 shift_left(I32x16 a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}

template <int kBits>
inline I32x16 shift_right(I32x16 a) {  // arithmetic
  return {_mm512_srai_epi32(a.v, kBits)};
}

// The 8 codes of word a, then of b, as int4 weights are packed (weight_pack.cpp); above its 4 bits a lane holds others.
inline I32x16 spread_codes(uint32_t a, uint32_t b) {
  const __m512i words =
      _mm512_mask_set1_epi32(_mm512_set1_epi32(static_cast<int32_t>(a)), 0xff00, static_cast<int32_t>(b));
  return {_mm512_srlv_epi32(words, _mm512_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28, 0, 8, 16, 24, 4, 12, 20, 28))};
}
// Lane i is the lane of `table` that the low 4 bits of code i name.
inline F32x16 look_up(F32x16 table, I32x16 codes) { return {_mm512_permutexvar_ps(codes.v, table.v)}; }

inline F32x16 to_float(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
// Round to nearest even; the value must fit int32.
inline I32x16 to_int(F32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline I32x16 as_int(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
inline F32x16 as_float(I32x16 a) { return {_mm512_castsi512_ps(a.v)}; }

inline F32x16 widen_half(U16x16 h) { return {_mm512_cvtph_ps(h.v)}; }
inline U16x16 narrow_half(F32x16 a) { return {_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32x16 widen_bfloat16(U16x16 b) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b.v), 16))};
}
// R() of bfloat16, left in float32. By integers: a conversion and back costs more.
inline F32x16 round_bfloat16(F32x16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __m512i sum = _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_and_si512(sum, _mm512_set1_epi32(-0x10000));
  return {_mm512_castsi512_ps(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fff0000)))};
}
// vcvtneps2bf16 takes subnormals for zero, which the contracts forbid, so vectors with one are rounded by integers.
inline U16x16 narrow_bfloat16(F32x16 a) {
  constexpr int kSubnormal = 0x20;
  if (_mm512_fpclass_ps_mask(a.v, kSubnormal) != 0) [[unlikely]] {
    const __m512i rounded = _mm512_castps_si512(round_bfloat16(a).v);
    return {_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16))};
  }
  return bit_cast<U16x16>(_mm512_cvtneps_pbh(a.v));
}

inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline U16x16 load_u16(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline F32x16 load(const Half* p) { return widen_half(load_u16(p)); }
inline F32x16 load(const BFloat16* p) { return widen_bfloat16(load_u16(p)); }
inline I32x16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline I32x16 load(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline I32x16 load(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline void store_u16(void* p, U16x16 a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }
inline void store(Half* p, F32x16 a) { store_u16(p, narrow_half(a)); }
inline void store(BFloat16* p, F32x16 a) { store_u16(p, narrow_bfloat16(a)); }
inline void store(int32_t* p, I32x16 a) { _mm512_storeu_si512(p, a.v); }

// store() past the caches; p is aligned to the bytes of a vector. What lies in a line need not be written at once.
inline void stream(float* p, F32x16 a) { _mm512_stream_ps(p, a.v); }
inline void stream_u16(void* p, U16x16 a) { _mm256_stream_si256(static_cast<__m256i*>(p), a.v); }
inline void stream(Half* p, F32x16 a) { stream_u16(p, narrow_half(a)); }
inline void stream(BFloat16* p, F32x16 a) { stream_u16(p, narrow_bfloat16(a)); }
// After the last stream() of a thread, before others may read what it wrote.
inline void end_stream() { _mm_sfence(); }

// The low byte of each lane.
inline void store_bytes(uint8_t* p, I32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

// Each lane clamped to -128 .. 127.
inline void store_saturated(int8_t* p, I32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}

inline B8x64 load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
inline B8x64 broadcast_4_bytes(const void* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return {_mm512_set1_epi32(word)};
}
inline void store_bytes(uint8_t* p, B8x64 b) { _mm512_storeu_si512(p, b.v); }
inline B8x64 operator-(B8x64 a, B8x64 b) { return {_mm512_sub_epi8(a.v, b.v)}; }
inline B8x64 low_nibbles(B8x64 b) { return {_mm512_and_si512(b.v, _mm512_set1_epi8(0x0f))}; }
inline B8x64 high_nibbles(B8x64 b) { return {_mm512_and_si512(_mm512_srli_epi32(b.v, 4), _mm512_set1_epi8(0x0f))}; }
inline B8x64 flip_sign_bits(B8x64 b) { return {_mm512_xor_si512(b.v, _mm512_set1_epi8(int8_t{-128}))}; }

// sum + u0 s0 + u1 s1 + u2 s2 + u3 s3 in each lane, u unsigned and s signed bytes; exact.
// In assembly because GCC 12 copies the accumulator around _mm512_dpbusd_epi32 and spills a full register tile.
inline I32x16 dot(I32x16 sum, B8x64 u, B8x64 s) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(u.v), "v"(s.v));
  return sum;
}
// As dot(), for callers whose u0 s0 + u1 s1 fits int16 (4-bit codes): the AVX2 level has a shorter way for it.
inline I32x16 dot_short(I32x16 sum, B8x64 u, B8x64 s) { return dot(sum, u, s); }

// Of some dot products that are added to a sum, that sum; on the AVX2 level their own, in 16 bits.
inline constexpr int kShortDots = 1 << 20;
using ShortSums = I32x16;
inline ShortSums begin_short(I32x16 sum) { return sum; }
inline ShortSums dot_nibbles(ShortSums sum, B8x64 u, B8x64 s) { return dot(sum, u, s); }
inline I32x16 end_short(I32x16 /*sum*/, ShortSums part) { return part; }

// Dot products of a row of x with a strip of w, 4 columns in each lane, both signed; exact modulo 2^32. The row lies in
// kDotPlanes planes, as write_dot_row() makes them of 64 values at a time. vpdpbusd wants one unsigned operand, so the
// products are those of x + kDotOffset.
inline constexpr int kDotPlanes = 1;
inline constexpr int32_t kDotOffset = 128;
using DotRow = B8x64;
using DotStrip = B8x64;
inline void write_dot_row(uint8_t* planes, int64_t /*plane_bytes*/, B8x64 x) {
  _mm512_storeu_si512(planes, flip_sign_bits(x).v);
}
inline DotRow load_dot_row(const uint8_t* planes, int64_t /*plane_bytes*/) { return broadcast_4_bytes(planes); }
inline DotStrip load_dot_strip(const void* p) { return load_bytes(p); }

inline int32_t sum_lanes(I32x16 a) { return _mm512_reduce_add_epi32(a.v); }

inline int32_t max_lanes(I32x16 a) { return _mm512_reduce_max_epi32(a.v); }

// Any of them where one is NaN.
inline float max_lanes(F32x16 a) { return _mm512_reduce_max_ps(a.v); }

// ((l0 + l8) + (l4 + l12)) + ...: halves added until one lane is left (strides 8, 4, 2, 1).
inline float sum_lanes(F32x16 a) {
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}

// Lane g of the result is the sum of the g-th group of 8 consecutive lanes of v[0..8), added at strides 4, 2, 1.
inline F32x16 sum_groups_of_8(const F32x16 v[8]) {
  __m512 s4[4];  // s4[i]: groups 4i .. 4i+3, four lanes each
  QOPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512 a = v[2 * i].v, b = v[2 * i + 1].v;
    s4[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  __m512 s2[2];
  QOPS_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m512 a = s4[2 * i], b = s4[2 * i + 1];
    s2[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  const __m512 s1 = _mm512_add_ps(_mm512_shuffle_ps(s2[0], s2[1], 0x88), _mm512_shuffle_ps(s2[0], s2[1], 0xdd));
  // Lane 4l + j of s1 holds group 4j + l.
  return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), s1)};
}

// 32 bfloat16: the even ones and the odd ones.
inline void load_alternate(const BFloat16* p, F32x16& even, F32x16& odd) {
  const __m512i words = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  odd.v = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-0x10000)));
}
// NaN becomes the default one.
inline F32x16 quiet(F32x16 a) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return {_mm512_mask_mov_ps(a.v, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)))};
}
// The high half of each lane rounded to bfloat16, whatever the low half then holds.
inline __m512i round_high_half(F32x16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
}
// R() of bfloat16. NaN is taken for a number, and stays NaN where its low half is 0, as in all that bfloat16 elements,
// quiet() ones and invalid operations make.
inline F32x16 round_of_words(F32x16 a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(round_high_half(a), _mm512_set1_epi32(-0x10000)))};
}
// Of NaN as round_of_words().
template <bool kStream>
inline void store_alternate(BFloat16* p, F32x16 even, F32x16 odd) {
  const __m512i low = _mm512_srli_epi32(round_high_half(even), 16);
  const __m512i words = _mm512_mask_blend_epi16(0xaaaaaaaa, low, round_high_half(odd));
  if constexpr (kStream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), words);
  } else {
    _mm512_storeu_si512(p, words);
  }
}
// Their largest is the largest magnitude of 32 * pairs bfloat16.
inline I32x16 largest_magnitudes(const BFloat16* p, int64_t pairs) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < pairs; ++i) {
    most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(p + 32 * i), _mm512_set1_epi16(0x7fff)));
  }
  const __m512i odd = _mm512_and_si512(most, _mm512_set1_epi32(-0x10000));
  return {_mm512_max_epi32(_mm512_slli_epi32(most, 16), odd)};
}
// Of 32 * pairs bfloat16: the largest of `above` is the magnitude of the largest one, or 0 where that is below 0; the
// largest of `below` that of the least one, or 0 where that is above 0.
inline void largest_on_both_sides(const BFloat16* p, int64_t pairs, I32x16& above, I32x16& below) {
  __m512i most = _mm512_setzero_si512(), least = most;
  for (int64_t i = 0; i < pairs; ++i) {
    const __m512i words = _mm512_loadu_si512(p + 32 * i);
    most = _mm512_max_epi16(most, words);
    least = _mm512_max_epu16(least, words);
  }
  least = _mm512_subs_epu16(least, _mm512_set1_epi16(-0x8000));
  const auto larger_half = [](__m512i words) {
    return _mm512_max_epi32(_mm512_slli_epi32(words, 16), _mm512_and_si512(words, _mm512_set1_epi32(-0x10000)));
  };
  above = {larger_half(most)};
  below = {larger_half(least)};
}
// Each lane clamped to -128 .. 127, even and odd ones in turn. The lanes must fit int16.
template <bool kStream>
inline void store_saturated_alternate(int8_t* p, I32x16 even, I32x16 odd) {
  const __m256i bytes =
      _mm512_cvtsepi16_epi8(_mm512_mask_blend_epi16(0xaaaaaaaa, even.v, _mm512_slli_epi32(odd.v, 16)));
  if constexpr (kStream) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bytes);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
  }
}
// As sum_groups_of_8() of 128 elements, of which even[i] and odd[i] hold 32.
inline F32x16 sum_alternate_groups_of_8(const F32x16 even[4], const F32x16 odd[4]) {
  const auto add = [](const F32x16* v) {  // the 4 lanes of each group
    __m512 s2[2];
    QOPS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const __m512 a = v[2 * i].v, b = v[2 * i + 1].v;
      s2[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    return _mm512_add_ps(_mm512_shuffle_ps(s2[0], s2[1], 0x88), _mm512_shuffle_ps(s2[0], s2[1], 0xdd));
  };
  const __m512 s1 = _mm512_add_ps(add(even), add(odd));
  // Lane 4l + j of s1 holds group 4j + l.
  return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), s1)};
}

}  // namespace qops::cpu::QOPS_ISA_NS
