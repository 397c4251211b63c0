// Stands in for the emulator where the cases are compiled by nvcc: the same kernels, inputs and right results, on a
// GPU.
//
// Vectors of the cases live in one allocation on the host. A launch copies it to the GPU, gives the kernel the same
// places there, waits, and copies it back.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/launch.h"

namespace emu {

struct Options {
  uint64_t seed = 0;
  int arch = 0, code_arch = 0;  // the GPU has its own
};

inline Options& options() {
  static Options the_options;
  return the_options;
}

}  // namespace emu

namespace hardware {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

struct Arena {
  static constexpr std::size_t kBytes = 16 << 20;
  uint8_t* host = static_cast<uint8_t*>(::operator new(kBytes, std::align_val_t{256}));
  uint8_t* gpu = nullptr;
  std::size_t used = 0;

  Arena() { check(cudaMalloc(&gpu, kBytes), "cudaMalloc"); }

  // Nothing is freed before the next case begins.
  void* take(std::size_t bytes) {
    const std::size_t at = (used + 255) / 256 * 256;
    if (at + bytes > kBytes) throw std::bad_alloc();
    used = at + bytes;
    return host + at;
  }
};

inline Arena& arena() {
  static Arena the_arena;
  return the_arena;
}

template <class T>
struct Allocator {
  using value_type = T;
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(arena().take(n * sizeof(T))); }
  void deallocate(T*, std::size_t) {}
  bool operator==(const Allocator&) const { return true; }
};

// A pointer into the arena's host side becomes one into the GPU's.
template <class T>
T there(const T& argument) {
  if constexpr (std::is_pointer_v<T>) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(argument) - reinterpret_cast<uintptr_t>(arena().host);
    if (at > Arena::kBytes) throw std::runtime_error("a kernel gets a pointer to what is no Vector");
    return reinterpret_cast<T>(reinterpret_cast<uintptr_t>(arena().gpu) + at);
  } else {
    return argument;
  }
}

inline void copy_there() {
  Arena& memory = arena();
  check(cudaMemcpy(memory.gpu, memory.host, memory.used, cudaMemcpyHostToDevice), "copy to the GPU");
}

// When all that was launched has ended.
inline void copy_back() {
  Arena& memory = arena();
  check(cudaStreamSynchronize(cudaStreamPerThread), "kernel");
  check(cudaMemcpy(memory.host, memory.gpu, memory.used, cudaMemcpyDeviceToHost), "copy from the GPU");
}

inline void require_launched(qops::Status status) {
  if (status != qops::Status::kOk) check(cudaGetLastError(), "launch");
}

// Of two kernels, the second of which depends on the first.
template <class... Params>
void launch_first(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
                  const std::type_identity_t<Params>&... args) {
  const cudaStream_t stream = cudaStreamPerThread;
  copy_there();
  require_launched(qops::cuda::launch(kernel, grid, block, shared_bytes, stream, there(args)...));
}

template <class... Params>
void launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
                      const std::type_identity_t<Params>&... args) {
  const qops::cuda::Dependent where{cudaStreamPerThread};
  require_launched(qops::cuda::launch(kernel, grid, block, shared_bytes, where, there(args)...));
  copy_back();
}

template <class... Params>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
            const std::type_identity_t<Params>&... args) {
  launch_first(kernel, grid, block, shared_bytes, args...);
  copy_back();
}

}  // namespace hardware
