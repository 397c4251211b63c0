// CUDA C++'s own vocabulary for g++: what nvcc knows without an include, and what NVIDIA's headers define for nvcc
// alone. Barriers, shuffles and atomics are the emulator's; the arithmetic intrinsics are one-line equivalents that
// round the same way.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/emu.h"
#include "emulator/runtime.h"

// In NVIDIA's headers for g++ these are attributes that g++ does not know.
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#undef __noinline__
#undef __restrict__
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __launch_bounds__(...)
#define __grid_constant__
#if defined(EMULATOR_TRACER)
#define __forceinline__ inline __attribute__((always_inline))  // for the lines of the kernels that call
#else
#define __forceinline__ inline
#endif
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict

#define threadIdx (::emu::indices().thread)
#define blockIdx (::emu::indices().block)
#define blockDim (::emu::indices().block_dim)
#define gridDim (::emu::indices().grid_dim)
#define warpSize 32

// --- barriers --------------------------------------------------------------------------------------------------------

inline void __syncthreads(emu::Site at = emu::Site::current()) { emu::barrier_sync("__syncthreads", 0, 0, at); }
inline int __syncthreads_count(int predicate, emu::Site at = emu::Site::current()) {
  return emu::barrier_reduce("__syncthreads_count", 0, 0, predicate != 0, at).count;
}
inline int __syncthreads_and(int predicate, emu::Site at = emu::Site::current()) {
  return emu::barrier_reduce("__syncthreads_and", 0, 0, predicate != 0, at).all;
}
inline int __syncthreads_or(int predicate, emu::Site at = emu::Site::current()) {
  return emu::barrier_reduce("__syncthreads_or", 0, 0, predicate != 0, at).any;
}
inline void __syncwarp(unsigned mask = 0xffffffff, emu::Site at = emu::Site::current()) { emu::sync_warp(mask, at); }

// Memory is sequentially consistent, but for what stmatrix has stored: most missing fences do not show.
inline void __threadfence() { emu::fence(); }
inline void __threadfence_block() { emu::fence(); }
inline void __nanosleep(unsigned) { emu::yield(); }
inline long long clock64() { return static_cast<long long>(emu::clock()); }
[[noreturn]] inline void __trap(emu::Site at = emu::Site::current()) { emu::fault(at, "__trap"); }

// --- shuffles, votes, reductions of a warp ---------------------------------------------------------------------------

namespace emu {

template <class T>
concept ShuffleValue = (std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8)) || std::same_as<T, __half> ||
                       std::same_as<T, __half2> || std::same_as<T, __nv_bfloat16> || std::same_as<T, __nv_bfloat162>;

template <class T>
uint64_t to_bits(const T& value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <ShuffleValue T>
T shuffle_value(Shuffle kind, unsigned mask, T value, int operand, int width, const Site& at) {
  return from_bits<T>(shuffle(kind, mask, to_bits(value), operand, width, sizeof(T), at));
}

}  // namespace emu

template <emu::ShuffleValue T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, emu::Site at = emu::Site::current()) {
  return emu::shuffle_value(emu::Shuffle::kIndex, mask, value, lane, width, at);
}
template <emu::ShuffleValue T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, emu::Site at = emu::Site::current()) {
  return emu::shuffle_value(emu::Shuffle::kUp, mask, value, static_cast<int>(delta), width, at);
}
template <emu::ShuffleValue T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, emu::Site at = emu::Site::current()) {
  return emu::shuffle_value(emu::Shuffle::kDown, mask, value, static_cast<int>(delta), width, at);
}
template <emu::ShuffleValue T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, emu::Site at = emu::Site::current()) {
  return emu::shuffle_value(emu::Shuffle::kXor, mask, value, lanes, width, at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emu::Site at = emu::Site::current()) {
  return emu::vote("__ballot_sync", mask, predicate != 0, at).ballot;
}
inline int __any_sync(unsigned mask, int predicate, emu::Site at = emu::Site::current()) {
  return emu::vote("__any_sync", mask, predicate != 0, at).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate, emu::Site at = emu::Site::current()) {
  const emu::Vote vote = emu::vote("__all_sync", mask, predicate != 0, at);
  return vote.ballot == vote.lanes;
}
template <emu::ShuffleValue T>
unsigned __match_any_sync(unsigned mask, T value, emu::Site at = emu::Site::current()) {
  return emu::vote("__match_any_sync", mask, emu::to_bits(value), at).matches;
}
template <emu::ShuffleValue T>
unsigned __match_all_sync(unsigned mask, T value, int* all, emu::Site at = emu::Site::current()) {
  const emu::Vote vote = emu::vote("__match_all_sync", mask, emu::to_bits(value), at);
  *all = vote.matches == vote.lanes;
  return *all ? vote.lanes : 0;
}
// The hardware promises this lane and nothing more.
inline unsigned __activemask() { return 1u << emu::indices().lane; }

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, emu::Site at = emu::Site::current()) {
  return emu::reduce("__reduce_add_sync", emu::Reduce::kAdd, mask, value, at);
}
inline int __reduce_add_sync(unsigned mask, int value, emu::Site at = emu::Site::current()) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value), at));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, emu::Site at = emu::Site::current()) {
  return emu::reduce("__reduce_min_sync", emu::Reduce::kMin, mask, value, at);
}
inline int __reduce_min_sync(unsigned mask, int value, emu::Site at = emu::Site::current()) {
  return static_cast<int>(
      emu::reduce("__reduce_min_sync", emu::Reduce::kMinSigned, mask, static_cast<unsigned>(value), at));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, emu::Site at = emu::Site::current()) {
  return emu::reduce("__reduce_max_sync", emu::Reduce::kMax, mask, value, at);
}
inline int __reduce_max_sync(unsigned mask, int value, emu::Site at = emu::Site::current()) {
  return static_cast<int>(
      emu::reduce("__reduce_max_sync", emu::Reduce::kMaxSigned, mask, static_cast<unsigned>(value), at));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, emu::Site at = emu::Site::current()) {
  return emu::reduce("__reduce_and_sync", emu::Reduce::kAnd, mask, value, at);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, emu::Site at = emu::Site::current()) {
  return emu::reduce("__reduce_or_sync", emu::Reduce::kOr, mask, value, at);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, emu::Site at = emu::Site::current()) {
  return emu::reduce("__reduce_xor_sync", emu::Reduce::kXor, mask, value, at);
}

// --- atomics, on global and shared memory ----------------------------------------------------------------------------

namespace emu {

template <class T, class... Allowed>
concept OneOf = (std::same_as<T, Allowed> || ...);

// Others run before it and never in the middle; what it returns is the value before.
template <class T, class F>
__attribute__((no_sanitize_thread)) T atomic(T* address, const char* name, const Site& at, F&& next) {
  begin_atomic(address, sizeof(T), name, at);
  const T before = *address;
  *address = next(before);
  return before;
}

using ulonglong = unsigned long long;

}  // namespace emu

template <emu::OneOf<int, unsigned, emu::ulonglong, float, double> T>
T atomicAdd(T* address, std::type_identity_t<T> value, emu::Site at = emu::Site::current()) {
  return emu::atomic(address, "atomicAdd", at, [&](T before) {
    if constexpr (std::same_as<T, int>) {  // wraps
      return static_cast<int>(static_cast<unsigned>(before) + static_cast<unsigned>(value));
    } else {
      return before + value;
    }
  });
}
template <emu::OneOf<int, unsigned, emu::ulonglong, long long> T>
T atomicMin(T* address, std::type_identity_t<T> value, emu::Site at = emu::Site::current()) {
  return emu::atomic(address, "atomicMin", at, [&](T before) { return std::min(before, value); });
}
template <emu::OneOf<int, unsigned, emu::ulonglong, long long> T>
T atomicMax(T* address, std::type_identity_t<T> value, emu::Site at = emu::Site::current()) {
  return emu::atomic(address, "atomicMax", at, [&](T before) { return std::max(before, value); });
}
template <emu::OneOf<int, unsigned, emu::ulonglong> T>
T atomicOr(T* address, std::type_identity_t<T> value, emu::Site at = emu::Site::current()) {
  return emu::atomic(address, "atomicOr", at, [&](T before) { return before | value; });
}
template <emu::OneOf<int, unsigned, emu::ulonglong> T>
T atomicAnd(T* address, std::type_identity_t<T> value, emu::Site at = emu::Site::current()) {
  return emu::atomic(address, "atomicAnd", at, [&](T before) { return before & value; });
}
template <emu::OneOf<int, unsigned, emu::ulonglong, float> T>
T atomicExch(T* address, std::type_identity_t<T> value, emu::Site at = emu::Site::current()) {
  return emu::atomic(address, "atomicExch", at, [&](T) { return value; });
}
template <emu::OneOf<int, unsigned, emu::ulonglong, unsigned short> T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value,
            emu::Site at = emu::Site::current()) {
  return emu::atomic(address, "atomicCAS", at, [&](T before) { return before == compare ? value : before; });
}
// 0, 1, ..., limit, 0, ...
inline unsigned atomicInc(unsigned* address, unsigned limit, emu::Site at = emu::Site::current()) {
  return emu::atomic(address, "atomicInc", at, [&](unsigned before) { return before >= limit ? 0 : before + 1; });
}

// --- loads, bits, arithmetic -----------------------------------------------------------------------------------------

using std::max;
using std::min;

template <class T>
T __ldg(const T* pointer, emu::Site at = emu::Site::current()) {
  emu::require_global(pointer, alignof(T), "__ldg", at);
  return *pointer;
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __dp4a(int a, int b, int c) {
  auto sum = static_cast<unsigned>(c);  // wraps
  for (int i = 0; i < 32; i += 8)
    sum += static_cast<unsigned>(static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i));
  return static_cast<int>(sum);
}

// Builds of the emulator never contract, so that plain operators round once as these do.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// Undefined outside int's range in C++; CUDA clamps, and NaN gives 0.
inline int __float2int_rn(float a) {
  if (std::isnan(a)) return 0;
  if (a >= 0x1p31f) return 0x7fffffff;
  if (a < -0x1p31f) return -0x7fffffff - 1;
  return static_cast<int>(std::nearbyint(a));
}
inline float __int2float_rn(int a) { return static_cast<float>(a); }
// Approximate on the device: compare with a tolerance.
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline float __expf(float a) { return std::exp(a); }

// Rounded once, but for a bfloat16 product that ties and an addend below 2^-53 of it.
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(static_cast<double>(__half2float(a) * __half2float(b)) + __half2float(c));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(static_cast<double>(__bfloat162float(a) * __bfloat162float(b)) + __bfloat162float(c));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
