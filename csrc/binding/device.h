// The device whose kernels a binding calls. Bindings are compiled once per module: for _C with the CPU's kernels, for
// _C_cuda (QOPS_CUDA) with CUDA's, and for the tests (QOPS_CUDA and QOPS_EMULATED) with CUDA's in the emulator, which
// take tensors in the CPU's memory.
#pragma once

#include <string>
#include <string_view>

#include "binding/checks.h"

#if defined(QOPS_CUDA) && !defined(QOPS_EMULATED)
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace qops::binding::device {

// How weights are packed there, by kind of device and version; exported models name it. A change of
// cpu/weight_pack.cpp, or of int4_layout.h or int8_layout.h, raises the number, here and in python/qops/ops/_checks.py.
#if defined(QOPS_CUDA)
inline constexpr std::string_view kLayout = "cuda 1";
namespace kernels = qops::cuda;
// What a tensor holds is not known when the kernel is launched.
inline constexpr bool kValuesAreReadable = false;
template <class Params>
using Kernel = Status (*)(const Params&, cuda::Stream);
#else
inline constexpr std::string_view kLayout = "cpu 1";
namespace kernels = qops::cpu;
inline constexpr bool kValuesAreReadable = true;
template <class Params>
using Kernel = Status (*)(const Params&, const ThreadPool&);
#endif

#if defined(QOPS_CUDA) && !defined(QOPS_EMULATED)
inline constexpr bool kIsCuda = true;

// On the current stream of the device of `on`.
template <class Params>
Status run(Kernel<Params> kernel, const std::type_identity_t<Params>& params, const Tensor& on) {
  const int32_t index = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return kernel(params, static_cast<cuda::Stream>(stream));
}

// What a kernel needs of the memory of the device of `on` while it runs.
template <class Params>
int64_t scratch_bytes(int64_t (*needed)(const Params&), const std::type_identity_t<Params>& params, const Tensor& on) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  return needed(params);
}

inline std::string last_error() { return cudaGetErrorString(cudaGetLastError()); }
#else
inline constexpr bool kIsCuda = false;

inline std::string last_error() { return ""; }

#if defined(QOPS_CUDA)
template <class Params>
int64_t scratch_bytes(int64_t (*needed)(const Params&), const std::type_identity_t<Params>& params, const Tensor&) {
  return needed(params);
}

template <class Params>
Status run(Kernel<Params> kernel, const std::type_identity_t<Params>& params, const Tensor&) {
  return kernel(params, nullptr);
}
#else
// torch's intra-op threads.
inline ThreadPool thread_pool() {
  return {[](int64_t n, int64_t grain, ThreadPool::Body body, void* arg) {
            torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(arg, begin, end); });
          },
          static_cast<int>(torch::stable::get_num_threads())};
}

template <class Params>
Status run(Kernel<Params> kernel, const std::type_identity_t<Params>& params, const Tensor&) {
  return kernel(params, thread_pool());
}
#endif
#endif

}  // namespace qops::binding::device
