#include "emulator/runtime.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

#include "emulator/state.h"

namespace emu {
namespace {

std::mutex g_mutex;  // of what follows

struct Gpu {
  int arch, multiprocessors;
};
std::vector<Gpu> g_gpus;

struct Kernel {
  std::size_t static_bytes = 0;       // as far as its blocks have declared some
  bool asked_for = false;             // by cudaFuncGetAttributes
  std::map<int, std::size_t> limits;  // of dynamic shared memory, by GPU, where one has been set
};
std::map<const void*, Kernel> g_kernels;

thread_local cudaError_t t_last_error = cudaSuccess;
thread_local std::vector<std::string> t_calls;

std::string hex(const void* pointer) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", pointer);
  return text;
}

cudaError_t fail(cudaError_t error) { return t_last_error = error; }

// Whether options() want this function to fail.
bool is_refused(const char* function) { return options().refused == function; }

int number_of(Gpu wanted) {
  for (std::size_t i = 0; i < g_gpus.size(); ++i) {
    if (g_gpus[i].arch == wanted.arch && g_gpus[i].multiprocessors == wanted.multiprocessors)
      return static_cast<int>(i);
  }
  g_gpus.push_back(wanted);
  return static_cast<int>(g_gpus.size()) - 1;
}

std::size_t limit_of(const Kernel& kernel, int gpu) {
  const auto found = kernel.limits.find(gpu);
  return found != kernel.limits.end() ? found->second : kUnaskedSharedBytes - kernel.static_bytes;
}

// What a graph that is being captured cannot hold: memory from the driver and waiting for what has not run.
void require_no_capture(const char* function) {
  if (options().captures) fault(Site(), "%s: a stream is being captured", function);
}

}  // namespace

int current_gpu() {
  const std::lock_guard lock(g_mutex);
  return number_of({options().arch, options().multiprocessors});
}

void set_current_gpu(int gpu) {
  const std::lock_guard lock(g_mutex);
  if (gpu < 0 || gpu >= static_cast<int>(g_gpus.size())) fault(Site(), "there is no GPU %d", gpu);
  options().arch = g_gpus[static_cast<std::size_t>(gpu)].arch;
  options().multiprocessors = g_gpus[static_cast<std::size_t>(gpu)].multiprocessors;
}

cudaStream_t stream_of(int gpu) {
  const std::uintptr_t handle = options().stream == 0 ? 0 : 0x57000000 + (std::uintptr_t(gpu) << 12) + options().stream;
  return reinterpret_cast<cudaStream_t>(handle);
}

void record(const std::string& call) {
  if (options().records) t_calls.push_back(call);
}

std::vector<std::string> take_calls() { return std::exchange(t_calls, {}); }

void require_shared_bytes(const void* kernel, std::size_t static_bytes, std::size_t dynamic_bytes, const Site& at) {
  const int gpu = current_gpu();
  std::size_t limit = 0, allowed = 0, most = 0;
  {
    const std::lock_guard lock(g_mutex);  // not where fault() leaves the thread
    Kernel& known = g_kernels[kernel];
    known.static_bytes = std::max(known.static_bytes, static_bytes);
    static_bytes = known.static_bytes;
    most = max_shared_bytes(options().arch) - static_bytes;
    if (const auto set = known.limits.find(gpu); set != known.limits.end()) {
      // Before a kernel's first launch cudaFuncGetAttributes knows nothing of its arrays, as nvcc would.
      if (known.asked_for) set->second = std::min(set->second, most);
      allowed = set->second;
    }
    limit = limit_of(known, gpu);
  }
  if (allowed > most) {
    fault(at, "%zu bytes of dynamic shared memory were allowed: beside %zu static ones a block may have %zu", allowed,
          static_bytes, most);
  }
  if (dynamic_bytes > limit) {
    fault(at, "%zu bytes of dynamic shared memory: %zu are allowed (cudaFuncSetAttribute)", dynamic_bytes, limit);
  }
}

bool is_dependent(const cudaLaunchConfig_t& config) {
  bool found = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id != cudaLaunchAttributeProgrammaticStreamSerialization) {
      fault(Site(), "cudaLaunchKernelEx: no attribute %d here", static_cast<int>(attribute.id));
    }
    found = found || attribute.val.programmaticStreamSerializationAllowed != 0;
  }
  if (found && options().arch < 90) fault(Site(), "a dependent launch needs sm_90, this is sm_%d", options().arch);
  return found;
}

void finish(const cudaLaunchConfig_t& config, const void* kernel, const Stats& stats) {
  const dim3 grid = config.gridDim;
  if (stats.blocks_told == uint64_t{grid.x} * grid.y * grid.z) record("told " + hex(kernel));
}

cudaError_t admit(const cudaLaunchConfig_t& config, const void* kernel) {
  const int gpu = current_gpu();
  const dim3 grid = config.gridDim, block = config.blockDim;
  record("launch " + hex(kernel) + " gpu " + std::to_string(gpu) + " stream " + hex(config.stream) + " grid " +
         std::to_string(uint64_t{grid.x} * grid.y * grid.z) + " threads " +
         std::to_string(block.x * block.y * block.z) + " shared " + std::to_string(config.dynamicSmemBytes) +
         (is_dependent(config) ? " dependent" : ""));
  if (config.stream != stream_of(gpu)) {
    fault(Site(), "a launch on stream %p: the caller's on this GPU is %p", static_cast<void*>(config.stream),
          static_cast<void*>(stream_of(gpu)));
  }
  if (options().captures && config.stream == nullptr) {
    fault(Site(), "a launch on the default stream: another one is being captured");
  }
  return is_refused("cudaLaunchKernelEx") ? fail(cudaErrorLaunchOutOfResources) : cudaSuccess;
}

}  // namespace emu

using emu::fail;
using emu::is_refused;

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  if (is_refused("cudaGetDevice")) return fail(cudaErrorInvalidDevice);
  *device = emu::current_gpu();
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (is_refused("cudaDeviceGetAttribute")) return fail(cudaErrorInvalidDevice);
  const std::lock_guard lock(emu::g_mutex);
  if (device < 0 || device >= static_cast<int>(emu::g_gpus.size())) return fail(cudaErrorInvalidDevice);
  const emu::Gpu& gpu = emu::g_gpus[static_cast<std::size_t>(device)];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = gpu.multiprocessors; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(emu::max_shared_bytes(gpu.arch));
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = gpu.arch / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = gpu.arch % 10; return cudaSuccess;
    default: emu::fault(emu::Site(), "cudaDeviceGetAttribute: no attribute %d here", static_cast<int>(attribute));
  }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  if (is_refused("cudaFuncGetAttributes")) return fail(cudaErrorInvalidDeviceFunction);
  const int gpu = emu::current_gpu();
  const std::lock_guard lock(emu::g_mutex);
  emu::Kernel& known = emu::g_kernels[kernel];
  known.asked_for = true;
  *attributes = {};
  attributes->sharedSizeBytes = known.static_bytes;
  attributes->ptxVersion = emu::code_arch();
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(emu::limit_of(known, gpu));
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (is_refused("cudaFuncSetAttribute")) return fail(cudaErrorInvalidValue);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    emu::fault(emu::Site(), "cudaFuncSetAttribute: no attribute %d here", static_cast<int>(attribute));
  }
  const int gpu = emu::current_gpu();
  const std::lock_guard lock(emu::g_mutex);
  emu::Kernel& known = emu::g_kernels[kernel];
  const std::size_t bytes = static_cast<std::size_t>(value);
  const std::size_t most = emu::max_shared_bytes(emu::options().arch) - known.static_bytes;
  emu::record("limit " + emu::hex(kernel) + " " + std::to_string(value));
  if (value < 0 || bytes > most) {
    emu::fault(emu::Site(),
               "cudaFuncSetAttribute: %d bytes of dynamic shared memory: beside %zu static ones sm_%d has %zu", value,
               known.static_bytes, emu::options().arch, most);
  }
  if (const auto set = known.limits.find(gpu); set != known.limits.end() && set->second > bytes) {
    emu::fault(emu::Site(),
               "cudaFuncSetAttribute: lowers a limit from %zu to %d bytes, between another thread's setting "
               "and launch perhaps",
               set->second, value);
  }
  known.limits[gpu] = bytes;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(emu::t_last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    default: return "unrecognized error code";
  }
}

cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  emu::require_no_capture("cudaMalloc");
  *pointer = std::malloc(bytes);
  return *pointer == nullptr ? fail(cudaErrorMemoryAllocation) : cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  emu::require_no_capture("cudaFree");
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  emu::require_no_capture("cudaStreamSynchronize");
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  emu::require_no_capture("cudaDeviceSynchronize");
  return cudaSuccess;
}

}  // extern "C"
