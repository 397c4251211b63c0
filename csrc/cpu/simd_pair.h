// 32 elements of a row in two vectors, for kernels whose lanes need no order.
//
// Of bfloat16 one vector holds the even elements and the other the odd ones: a shift and a mask make floats of a word
// of two, where elements side by side take a shift and a shuffle each; and two roundings by integers leave both halves
// of the words where they belong, where vcvtneps2bf16 takes two cycles of a port a vector and flushes subnormals.
#pragma once

#include "cpu/simd.h"

namespace qops::cpu::QOPS_ISA_NS {

inline constexpr int kPair = 2 * kLanes;

template <class T>
inline constexpr bool kAlternates = std::is_same_v<T, BFloat16>;

// Even and odd elements where kAlternates<T>, else the first 16 and the others.
struct F32x32 {
  F32x16 a, b;
};

template <class T>
inline F32x32 load_pair(const T* p) {
  if constexpr (kAlternates<T>) {
    F32x32 v;
    load_alternate(p, v.a, v.b);
    return v;
  } else {
    return {load(p), load(p + kLanes)};
  }
}

// Loads n <= 32 elements and zeros the rest; reads nothing behind the n-th. No element where n is negative.
template <class T>
inline F32x32 load_pair_n(const T* p, int64_t n) {
  if (n >= kPair) return load_pair(p);
  T buffer[kPair] = {};
  if (n > 0) std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load_pair(buffer);
}

// Elements of type W in the order of a pair of T.
template <class T, class W>
inline F32x32 load_pair_as(const W* p) {
  if constexpr (kAlternates<T> && !kAlternates<W>) {
    // What round_of_words() says about NaN.
    const F32x16 first = quiet(load(p)), second = quiet(load(p + kLanes));
    return {even_lanes(first, second), odd_lanes(first, second)};
  } else if constexpr (kAlternates<T>) {
    return load_pair(p);
  } else {
    return {load(p), load(p + kLanes)};
  }
}

template <class T, class W>
inline F32x32 load_pair_as_n(const W* p, int64_t n) {
  if (n >= kPair) return load_pair_as<T>(p);
  W buffer[kPair] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(W));
  return load_pair_as<T>(buffer);
}

// R() of what is computed from elements of T and quiet() numbers.
template <class T>
inline F32x16 round_in_pair(F32x16 v) {
  if constexpr (kAlternates<T>) {
    return round_of_words(v);
  } else {
    return round_to<T>(v);
  }
}

template <bool kStream, class T>
inline void store_pair(T* p, const F32x32& v) {
  if constexpr (kAlternates<T>) {
    store_alternate<kStream>(p, v.a, v.b);
  } else {
    store_or_stream<kStream>(p, v.a);
    store_or_stream<kStream>(p + kLanes, v.b);
  }
}

template <class T>
inline void store_pair_n(T* p, const F32x32& v, int64_t n) {
  T buffer[kPair];
  store_pair<false>(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

// Elements of a pair of T, each clamped to -128 .. 127. They must fit int16.
template <bool kStream, class T>
inline void store_saturated_pair(int8_t* q, I32x16 a, I32x16 b) {
  if constexpr (kAlternates<T>) {
    store_saturated_alternate<kStream>(q, a, b);
  } else {
    store_saturated(q, a);
    store_saturated(q + kLanes, b);
  }
}

// Lane g of the result is the sum of the g-th group of 8 consecutive elements of 4 pairs, added at strides 4, 2, 1.
template <class T>
inline F32x16 sum_groups_of_8_in_pairs(const F32x32 v[4]) {
  if constexpr (kAlternates<T>) {
    const F32x16 even[4] = {v[0].a, v[1].a, v[2].a, v[3].a}, odd[4] = {v[0].b, v[1].b, v[2].b, v[3].b};
    return sum_alternate_groups_of_8(even, odd);
  } else {
    const F32x16 all[8] = {v[0].a, v[0].b, v[1].a, v[1].b, v[2].a, v[2].b, v[3].a, v[3].b};
    return sum_groups_of_8(all);
  }
}

}  // namespace qops::cpu::QOPS_ISA_NS
