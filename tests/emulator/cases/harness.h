// Inputs by seed, and comparison with what is right.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/launch.h"
#include "emulator/cases/cases.h"
#if defined(__CUDACC__)
#include "emulator/cases/hardware.cuh"
#endif

namespace cases {

// Of what kernels read and write.
#if defined(__CUDACC__)
template <class T>
using Vector = std::vector<T, hardware::Allocator<T>>;
using hardware::launch;
using hardware::launch_dependent;
using hardware::launch_first;
#else
template <class T>
using Vector = std::vector<T>;

template <class... Params>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
            const std::type_identity_t<Params>&... args) {
  static_cast<void>(qops::cuda::launch(kernel, grid, block, shared_bytes, cudaStream_t{}, args...));
}

// Nothing comes between it and a launch_dependent().
template <class... Params>
void launch_first(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
                  const std::type_identity_t<Params>&... args) {
  launch(kernel, grid, block, shared_bytes, args...);
}

template <class... Params>
void launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
                      const std::type_identity_t<Params>&... args) {
  static_cast<void>(qops::cuda::launch(kernel, grid, block, shared_bytes, qops::cuda::Dependent{}, args...));
}
#endif

class Random {
 public:
  explicit Random(uint64_t salt) : state_(emu::options().seed * 1000003 + salt) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<uint32_t>(n)); }
  // Small integers: sums and products of a few hundred are exact in float32, in any order.
  float integer() { return static_cast<float>(below(17) - 8); }

 private:
  uint64_t state_;
};

template <class F>
auto generate(std::size_t n, F&& next) {
  Vector<std::remove_cvref_t<decltype(next())>> values;
  values.reserve(n);
  for (std::size_t i = 0; i < n; ++i) values.push_back(next());
  return values;
}

// What a kernel writes starts out as NaN, or as -1.
template <class T>
Vector<T> poisoned(std::size_t n) {
  Vector<T> values(n);
  std::memset(static_cast<void*>(values.data()), 0xff, n * sizeof(T));
  return values;
}

template <class T>
void require_equal(const Vector<T>& got, const Vector<T>& want) {
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (got[i] == want[i]) continue;
    throw WrongResult("element " + std::to_string(i) + " of " + std::to_string(want.size()) + " is " +
                      std::to_string(got[i]) + ", should be " + std::to_string(want[i]));
  }
}

}  // namespace cases
