// Eight elements of a row at a time, as float32: one access of 16 bytes for fp16 and bf16, two for fp32.
#pragma once

#include <type_traits>

#include "cuda/port.cuh"
#include "row_tree.h"

#define QOPS_DEVICE __device__ __forceinline__

namespace qops::cuda {

using Vector = float[kVector];

QOPS_DEVICE float widen(float x) { return x; }
QOPS_DEVICE float widen(__half x) { return __half2float(x); }
QOPS_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
QOPS_DEVICE T narrow(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

template <class T>
QOPS_DEVICE float round_to(float x) {
  return widen(narrow<T>(x));
}

template <class T>
QOPS_DEVICE T from_bits(uint32_t bits) {
  if constexpr (std::is_same_v<T, __half>) {
    return __ushort_as_half(static_cast<unsigned short>(bits));
  } else {
    return __ushort_as_bfloat16(static_cast<unsigned short>(bits));
  }
}

QOPS_DEVICE uint32_t to_bits(__half x) { return __half_as_ushort(x); }
QOPS_DEVICE uint32_t to_bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }

// Two elements of 16 bits in a word, the first one in its lower half.
template <class T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <class P>
QOPS_DEVICE uint32_t pair_bits(const P& pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <class T>
QOPS_DEVICE Pair<T> pair_of(const uint32_t& bits) {
  return *reinterpret_cast<const Pair<T>*>(&bits);
}

template <class T>
inline constexpr DType kDTypeOf = std::is_same_v<T, float>    ? DType::kFloat32
                                  : std::is_same_v<T, __half> ? DType::kFloat16
                                                              : DType::kBFloat16;

// Eight elements as they lie in memory.
template <class T>
inline constexpr int kWords = kVector * static_cast<int>(sizeof(T)) / 4;
template <class T>
using Words = uint32_t[kWords<T>];

// Eight int8.
using Codes = uint32_t[2];

// Words of elements to float32 and back, two elements of 16 bits by each conversion.
template <class T, int kCount>
QOPS_DEVICE void widen_words(const uint32_t* words, float (&v)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount * static_cast<int>(sizeof(T)) / 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      v[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __half>) {
      v[2 * i] = widen(from_bits<T>(words[i] & 0xffff));
      v[2 * i + 1] = widen(from_bits<T>(words[i] >> 16));
    } else {  // one instruction each
      v[2 * i] = __uint_as_float(words[i] << 16);
      v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}

template <class T, int kCount>
QOPS_DEVICE void narrow_words(const float (&v)[kCount], uint32_t* words) {
#pragma unroll
  for (int i = 0; i < kCount * static_cast<int>(sizeof(T)) / 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(v[i]);
    } else if constexpr (std::is_same_v<T, __half>) {
      words[i] = pair_bits(__floats2half2_rn(v[2 * i], v[2 * i + 1]));
    } else {
      words[i] = pair_bits(__floats2bfloat162_rn(v[2 * i], v[2 * i + 1]));
    }
  }
}

// R(x * y) of elements of 16 bits in y's place. A product of two of them has at most 22 bits, so float32 would hold it
// before R(), which then rounds the same. (Where float32 lacks bits, below 2^-149, a product of bfloat16's 16 bits is
// less than 2^-134 and rounds to 0 either way.)
template <class T>
QOPS_DEVICE void multiply_words(const Words<T>& x, Words<T>& y) {
#pragma unroll
  for (int i = 0; i < kWords<T>; ++i) y[i] = pair_bits(__hmul2(pair_of<T>(x[i]), pair_of<T>(y[i])));
}

// Whole vectors at multiples of 16 bytes.
template <class T>
QOPS_DEVICE void load_words(const T* p, Words<T>& words) {
#pragma unroll
  for (int piece = 0; piece < kWords<T> / 4; ++piece) {
    const uint4 bits = reinterpret_cast<const uint4*>(p)[piece];
    words[4 * piece] = bits.x, words[4 * piece + 1] = bits.y;
    words[4 * piece + 2] = bits.z, words[4 * piece + 3] = bits.w;
  }
}

template <class T>
QOPS_DEVICE void store_words(T* p, const Words<T>& words) {
#pragma unroll
  for (int piece = 0; piece < kWords<T> / 4; ++piece) {
    reinterpret_cast<uint4*>(p)[piece] =
        make_uint4(words[4 * piece], words[4 * piece + 1], words[4 * piece + 2], words[4 * piece + 3]);
  }
}

// Either of them, of the first n elements; zeros behind them.
template <bool kAligned, class T>
QOPS_DEVICE void load_words(const T* p, int64_t n, Words<T>& words) {
  if constexpr (kAligned) {
    load_words(p, words);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) words[i] = i < n ? __float_as_uint(p[i]) : 0;
  } else {
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      words[i] = (2 * i < n ? to_bits(p[2 * i]) : 0) | (2 * i + 1 < n ? to_bits(p[2 * i + 1]) : 0) << 16;
    }
  }
}

template <bool kAligned, class T>
QOPS_DEVICE void store_words(T* p, int64_t n, const Words<T>& words) {
  if constexpr (kAligned) {
    store_words(p, words);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >= n) continue;
      if constexpr (sizeof(T) == 4) {
        p[i] = __uint_as_float(words[i]);
      } else {
        p[i] = from_bits<T>(words[i / 2] >> (i % 2 * 16) & 0xffff);
      }
    }
  }
}

template <class T>
QOPS_DEVICE void clear_behind(int64_t n, Words<T>& words) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < n) continue;
    if constexpr (sizeof(T) == 4) {
      words[i] = 0;
    } else {
      words[i / 2] &= i % 2 == 0 ? 0xffff0000u : 0xffffu;
    }
  }
}

// Half a vector at a multiple of its size.
template <class T>
QOPS_DEVICE void load_half(const T* p, float (&v)[kVector / 2]) {
  if constexpr (sizeof(T) == 4) {
    const uint4 bits = *reinterpret_cast<const uint4*>(p);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    widen_words<T>(words, v);
  } else {
    const uint2 bits = *reinterpret_cast<const uint2*>(p);
    const uint32_t words[2] = {bits.x, bits.y};
    widen_words<T>(words, v);
  }
}

// The first n elements at p, zeros behind them. kAligned: n is at least 8 and p a multiple of 16 bytes.
template <bool kAligned, class T>
QOPS_DEVICE void load(const T* p, int64_t n, Vector& v) {
  if constexpr (kAligned) {
    Words<T> words;
    load_words(p, words);
    widen_words<T>(words, v);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = i < n ? widen(p[i]) : 0.0f;
  }
}

// Rounds the first n values to T. kAligned as above.
template <bool kAligned, class T>
QOPS_DEVICE void store(T* p, int64_t n, const Vector& v) {
  if constexpr (kAligned) {
    Words<T> words;
    narrow_words<T>(v, words);
    store_words(p, words);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < n) p[i] = narrow<T>(v[i]);
    }
  }
}

// The low bytes of the first n integers. kAligned: n is at least 8 and p a multiple of 8 bytes.
template <bool kAligned>
QOPS_DEVICE void store_int8(int8_t* p, int64_t n, const int (&q)[kVector]) {
  if constexpr (kAligned) {
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words[i] = (q[4 * i] & 0xff) | (q[4 * i + 1] & 0xff) << 8 | (q[4 * i + 2] & 0xff) << 16 |
                 static_cast<uint32_t>(q[4 * i + 3]) << 24;
    }
    *reinterpret_cast<uint2*>(p) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < n) p[i] = static_cast<int8_t>(q[i]);
    }
  }
}

// The same of bytes.
template <bool kAligned>
QOPS_DEVICE void store_codes(int8_t* p, int64_t n, const Codes& codes) {
  if constexpr (kAligned) {
    *reinterpret_cast<uint2*>(p) = make_uint2(codes[0], codes[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < n) p[i] = static_cast<int8_t>(codes[i / 4] >> (i % 4 * 8));
    }
  }
}

// A vector of any of the three dtypes, which is the same for all threads.
template <bool kAligned>
QOPS_DEVICE void load(const void* p, DType dtype, int64_t at, int64_t n, Vector& v) {
  switch (dtype) {
    case DType::kFloat16: return load<kAligned>(static_cast<const __half*>(p) + at, n, v);
    case DType::kBFloat16: return load<kAligned>(static_cast<const __nv_bfloat16*>(p) + at, n, v);
    default: return load<kAligned>(static_cast<const float*>(p) + at, n, v);
  }
}

}  // namespace qops::cuda
