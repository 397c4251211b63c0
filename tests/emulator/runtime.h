// What launches need of CUDA's runtime: GPUs and their attributes, kernels and theirs, streams, errors. NVIDIA's
// headers declare the functions, runtime.cpp defines them: a program that asks for others does not link.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <type_traits>
#include <vector>

#include "emulator/emu.h"

namespace emu {

// The number of the GPU that options() describe, which is the current one. Those with another architecture or with more
// multiprocessors have numbers of their own, so that whatever a caller remembers of a GPU has to be remembered by
// number.
int current_gpu();
void set_current_gpu(int gpu);

// Where the caller wants work on this GPU: null where options().stream is 0.
cudaStream_t stream_of(int gpu);

// What the runtime has been asked by this OS thread, in order, while options().records: "gpu 1", "limit KERNEL 101376",
// "launch KERNEL gpu 1 stream 0x... grid 3 threads 256 shared 99328", with "dependent" behind it where the launch is,
// "told KERNEL" where all blocks of that launch have let dependents start. Others may add what belongs between them.
void record(const std::string& call);
std::vector<std::string> take_calls();

// Asks everything of a launch that the runtime does; a misuse is a Fault.
cudaError_t admit(const cudaLaunchConfig_t& config, const void* kernel);
bool is_dependent(const cudaLaunchConfig_t& config);
void finish(const cudaLaunchConfig_t& config, const void* kernel, const Stats& stats);

template <class... Params>
cudaError_t launch_kernel_ex(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                             const std::type_identity_t<Params>&... args) {
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t error = admit(*config, address); error != cudaSuccess) return error;
  const Stats stats = launch(address, config->gridDim, config->blockDim, config->dynamicSmemBytes,
                             is_dependent(*config), [&]() __attribute__((no_sanitize_thread)) { kernel(args...); });
  finish(*config, address, stats);
  return cudaSuccess;
}

}  // namespace emu

// NVIDIA's template hands on pointers to arguments, whose types are lost.
#define cudaLaunchKernelEx ::emu::launch_kernel_ex
