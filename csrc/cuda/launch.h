// The one way to start a kernel: on the caller's stream under nvcc, in the emulator under g++.
#pragma once

#include <concepts>
#include <cstddef>
#include <type_traits>

#include "cuda/gemm_config.h"
#include "cuda/port.cuh"
#include "kernels.h"

namespace qops::cuda {

// A GPU's properties never change: asked for once a thread, not in every call.
inline Gpu current_gpu() {
#if defined(__CUDACC__)
  thread_local int known = -1;
  thread_local Gpu gpu{};
  int device = 0;
  cudaGetDevice(&device);
  if (device != known) {
    int multiprocessors = 0, shared_bytes = 0, major = 0, minor = 0;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    gpu = {multiprocessors, shared_bytes, 10 * major + minor};
    known = device;
  }
  return gpu;
#else
  const emu::Options& options = ::emu::options();
  return {options.multiprocessors, static_cast<int64_t>(::emu::max_shared_bytes(options.arch)), options.arch};
#endif
}

// Runs kernel(args...) on `grid` blocks of `block` threads with `shared_bytes` of dynamic shared memory. Arguments
// convert to the kernel's parameter types here, on the host. The stream is a stream and never a literal, so that no
// caller falls back on the default stream by writing 0. In the emulator the launch has ended when this returns, and a
// fault of the kernel is an exception.
template <class... Params, std::same_as<cudaStream_t> Stream>
Status launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes, Stream stream,
              const std::type_identity_t<Params>&... args) {
#if defined(__CUDACC__)
  // Above 48 KiB a kernel has to ask, once per device; asking is cheap next to a launch.
  constexpr std::size_t kUnasked = 48 * 1024;
  if (shared_bytes > kUnasked && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                      static_cast<int>(shared_bytes)) != cudaSuccess) {
    return Status::kLaunchFailed;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...) == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
#else
  static_cast<void>(stream);
  ::emu::launch_kernel(kernel, grid, block, shared_bytes, args...);
  return Status::kOk;
#endif
}

}  // namespace qops::cuda
