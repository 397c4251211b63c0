// What kernels include instead of CUDA's headers, so that one source builds with nvcc and, against tests/emulator, with
// g++. Kernels declare shared memory through the two macros alone: in C++ it would need a keyword that g++ lacks.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A block's array of `count` elements, aligned to at least 16 bytes, which vector accesses and ldmatrix need.
#define QOPS_SHARED(T, name, count) __shared__ alignas(alignof(T) > 16 ? alignof(T) : 16) T name[count]

// The bytes that the launch asks for. 1024 is the alignment of the widest swizzle.
#define QOPS_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

#else

// The same vocabulary, including threadIdx, __syncthreads(), shuffles, atomics and the intrinsics that NVIDIA's headers
// define for nvcc alone.
#include "emulator/cuda_emu.h"

#define QOPS_SHARED(T, name, count) \
  T(&name)[count] = EMU_STATIC_SHARED(T, count, alignof(T) > 16 ? alignof(T) : std::size_t{16})

#define QOPS_DYNAMIC_SHARED(name) uint8_t* const name = ::emu::dynamic_shared()

#endif
