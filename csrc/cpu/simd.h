// The vector types that CPU kernels are written in: 16 float32 or int32 lanes at every ISA level.
//
// A kernel is one source, compiled once per level (CMake sets QOPS_ISA_NS and QOPS_ISA_<LEVEL>). The logical width is
// fixed at 16, so the order of every sum is part of the source and not of the level: one __m512 (AVX-512), two __m256
// (AVX2) or a float[16] (scalar) hold the same lanes. The level amx has AVX-512's and tiles (simd_amx.h). Everything
// lives in the level's own namespace, because an inline function that two levels shared would be emitted once, with the
// instructions of whichever level the linker kept.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

// Loops over small constant counts must unroll, or the register arrays inside them become memory.
#define QOPS_UNROLL _Pragma("GCC unroll 8")

// The level's name as a text.
#define QOPS_TEXT_OF(name) #name
#define QOPS_TEXT(name) QOPS_TEXT_OF(name)
#define QOPS_ISA_NAME QOPS_TEXT(QOPS_ISA_NS)

namespace qops::cpu::QOPS_ISA_NS {

// Storage of 16-bit floating-point elements; arithmetic happens in float32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Calls f with a null pointer of the floating-point type that dtype names.
template <class F>
inline Status with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<float*>(nullptr));
    case DType::kFloat16: return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16: return f(static_cast<BFloat16*>(nullptr));
    case DType::kInt32: break;
  }
  return Status::kUnsupported;
}

}  // namespace qops::cpu::QOPS_ISA_NS

#if defined(QOPS_ISA_AMX)
#include "cpu/simd_avx512.h"
// After the vectors, on which it stands.
#include "cpu/simd_amx.h"
#elif defined(QOPS_ISA_AVX512)
#include "cpu/simd_avx512.h"
#elif defined(QOPS_ISA_AVX2)
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_scalar.h"
#endif

namespace qops::cpu::QOPS_ISA_NS {

inline constexpr int kLanes = 16;

// Always inlined: GCC 12 takes a function that does nothing else for one without effects, and drops calls of it.
QOPS_ALWAYS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// set1 for templates over a vector type: the second argument names the type.
inline F32x16 broadcast(float x, const F32x16&) { return set1(x); }

// R(): round to nearest even in the element type T, back in float32.
template <class T>
inline F32x16 round_to(F32x16 v);
template <>
inline F32x16 round_to<float>(F32x16 v) {
  return v;
}
template <>
inline F32x16 round_to<Half>(F32x16 v) {
  return widen_half(narrow_half(v));
}
template <>
inline F32x16 round_to<BFloat16>(F32x16 v) {
  return round_bfloat16(v);
}

// Loads n <= 16 elements and zeros the rest; reads nothing behind the n-th.
template <class T>
inline F32x16 load_n(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}

// V is F32x16, rounded to T, or I32x16 for T = int32_t.
template <class T, class V>
inline void store_n(T* p, V v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

// Whether rows of results are worth stream(), and aligned for it. A copy of 16 MiB past a cache of 2 MiB took 0.77x of
// the time on Sapphire Rapids (2 threads); what fits into the cache is read from there by whoever comes next.
inline constexpr int64_t kStreamedBytes = 8 << 20;
template <class T>
inline bool worth_streaming(const T* y, int64_t rows, int64_t columns) {
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(T));
  if (row_bytes == 0 || row_bytes % 64 != 0 || reinterpret_cast<uintptr_t>(y) % 64 != 0) return false;
  return rows >= kStreamedBytes / row_bytes;
}

template <bool kStream, class T>
inline void store_or_stream(T* p, F32x16 v) {
  if constexpr (kStream) {
    stream(p, v);
  } else {
    store(p, v);
  }
}

inline void store_saturated_n(int8_t* p, I32x16 v, int64_t n) {
  if (n >= kLanes) return store_saturated(p, v);
  int8_t buffer[kLanes];
  store_saturated(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(n));
}

// n <= 16 elements from the index-th on of an array whose type is known at run time.
inline F32x16 load_as_float(const void* p, DType dtype, int64_t index, int64_t n) {
  switch (dtype) {
    case DType::kFloat16: return load_n(static_cast<const Half*>(p) + index, n);
    case DType::kBFloat16: return load_n(static_cast<const BFloat16*>(p) + index, n);
    default: return load_n(static_cast<const float*>(p) + index, n);
  }
}

}  // namespace qops::cpu::QOPS_ISA_NS
