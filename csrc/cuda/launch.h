// The one way to start a kernel: on the caller's stream. Under g++ the functions of CUDA's runtime are the emulator's,
// so that what stands here runs in tests as it is.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <set>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/gpu.h"
#include "cuda/port.cuh"
#include "kernels.h"

namespace qops::cuda {

// A GPU's properties never change: asked for once a thread, not in every call. Without multiprocessors where CUDA does
// not answer.
inline Gpu current_gpu() {
  thread_local int known = -1;
  thread_local Gpu gpu{};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return {};
  if (device != known) {
    int multiprocessors = 0, shared_bytes = 0, major = 0, minor = 0;
    const auto ask = [&](cudaDeviceAttr attribute, int& value) {
      return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
    };
    if (!ask(cudaDevAttrMultiProcessorCount, multiprocessors) ||
        !ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, shared_bytes) || !ask(cudaDevAttrComputeCapabilityMajor, major) ||
        !ask(cudaDevAttrComputeCapabilityMinor, minor)) {
      return {};
    }
    gpu = {multiprocessors, shared_bytes, 10 * major + minor};
    known = device;
  }
  return gpu;
}

// Kernels on GPUs that have been allowed all the shared memory there is for them.
struct AllowedKernels {
  using Place = std::pair<const void*, int>;
  std::mutex mutex;
  std::set<Place> places;
};
inline AllowedKernels allowed_kernels;

// Allows a kernel all the dynamic shared memory that a block may have on the current GPU beside the kernel's own
// arrays: once for each kernel and GPU, and never less, for what one thread lowered between another one's setting and
// launch would refuse that launch. The mutex is for the first time that a thread comes with a kernel.
inline bool allow_shared_memory(const void* kernel) {
  thread_local std::vector<AllowedKernels::Place> known;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const AllowedKernels::Place place{kernel, device};
  if (std::find(known.begin(), known.end(), place) != known.end()) return true;
  const std::lock_guard lock(allowed_kernels.mutex);
  if (!allowed_kernels.places.contains(place)) {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return false;
    const int bytes = static_cast<int>(current_gpu().shared_bytes) - static_cast<int>(attributes.sharedSizeBytes);
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess) return false;
    allowed_kernels.places.insert(place);
  }
  known.push_back(place);
  return true;
}

// Whether the code of a kernel that the current GPU runs has an instruction that waits for the kernel before: a newer
// GPU may run code that was compiled for an older one. Asked for once a thread; nothing where CUDA does not answer.
inline std::optional<bool> can_wait(const void* kernel) {
  thread_local std::vector<std::pair<AllowedKernels::Place, bool>> known;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return std::nullopt;
  const AllowedKernels::Place place{kernel, device};
  const auto found = std::find_if(known.begin(), known.end(), [&](const auto& of) { return of.first == place; });
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return std::nullopt;
  return known.emplace_back(place, attributes.ptxVersion >= 90).second;
}

template <class... Params>
Status start(const cudaLaunchConfig_t& config, void (*kernel)(Params...), const std::type_identity_t<Params>&... args) {
  if (config.dynamicSmemBytes > 0 && !allow_shared_memory(reinterpret_cast<const void*>(kernel))) {
    return Status::kLaunchFailed;
  }
  return cudaLaunchKernelEx(&config, kernel, args...) == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

// Runs kernel(args...) on `grid` blocks of `block` threads with `shared_bytes` of dynamic shared memory. Arguments
// convert to the kernel's parameter types here, on the host. The stream is a stream and never a literal, so that no
// caller falls back on the default stream by writing 0. In the emulator the launch has ended when this returns, and a
// fault of the kernel is an exception.
template <class... Params, std::same_as<cudaStream_t> Stream>
Status launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes, Stream stream,
              const std::type_identity_t<Params>&... args) {
  return start({grid, block, shared_bytes, stream, nullptr, 0}, kernel, args...);  // no attributes
}

// A stream, for a kernel that depends on the one launched just before on it.
struct Dependent {
  cudaStream_t stream;
};

// Likewise. The kernel may begin while the one before runs: when all blocks of that one have called
// ptx::griddepcontrol_launch_dependents() or ended. So each of its threads has to call ptx::griddepcontrol_wait(), and
// before it touches global memory: of what the other kernel writes nothing is there until then, and all of it is after.
// The order of everything else stays, in a captured graph too: the one before has been launched as any other, after all
// before it; this one cannot end before that one and lets nobody begin sooner, so that what follows comes after both.
// Where GPU or code are older than sm_90 it begins when the one before has ended.
template <class... Params>
Status launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes, const Dependent& where,
              const std::type_identity_t<Params>&... args) {
  const std::optional<bool> waits = can_wait(reinterpret_cast<const void*>(kernel));
  if (!waits.has_value()) return Status::kLaunchFailed;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return start({grid, block, shared_bytes, where.stream, &attribute, *waits ? 1u : 0u}, kernel, args...);
}

inline void tell_gpu(PlanListener& listener, const Gpu& gpu) {
  listener.tell("sm", gpu.arch);
  listener.tell("multiprocessors", gpu.multiprocessors);
}

// On a queue; to its listener, where it has one.
template <class... Params>
Status launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes, const Queue& queue,
              const std::type_identity_t<Params>&... args) {
  if (queue.listener == nullptr) return launch(kernel, grid, block, shared_bytes, queue.stream, args...);
  tell_gpu(*queue.listener, current_gpu());
  queue.listener->tell("blocks", static_cast<std::int64_t>(grid.x) * grid.y * grid.z);
  queue.listener->tell("threads", static_cast<std::int64_t>(block.x));
  queue.listener->tell("shared_bytes", static_cast<std::int64_t>(shared_bytes));
  return Status::kOk;
}

// Likewise, of any number of blocks in one dimension. Where: a queue, a stream or a Dependent.
template <class... Parameters, class Where, class... Arguments>
Status launch_blocks(void (*kernel)(Parameters...), std::int64_t blocks, int threads, std::size_t shared_bytes,
                     const Where& where, const Arguments&... arguments) {
  if (blocks == 0) return Status::kOk;
  if (blocks > 0x7fffffff) return Status::kUnsupported;  // the largest grid
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), shared_bytes, where,
                arguments...);
}

}  // namespace qops::cuda
