// The sound kernels, for nvcc: what runs in the emulator is CUDA.
#include "cuda/launch.h"
#include "emulator/cases/kernels/dependent.cuh"
#include "emulator/cases/kernels/dequantize.cuh"
#include "emulator/cases/kernels/flip.cuh"
#include "emulator/cases/kernels/gemm.cuh"
#include "emulator/cases/kernels/handoff.cuh"
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // for stmatrix
#include "emulator/cases/kernels/instructions.cuh"
#endif
#include "emulator/cases/kernels/pipeline.cuh"
#include "emulator/cases/kernels/row_sums.cuh"
#include "emulator/cases/kernels/scan.cuh"
#include "emulator/cases/kernels/small.cuh"
#include "emulator/cases/kernels/split_sum.cuh"
#include "emulator/cases/kernels/transpose.cuh"

template __global__ void dependent::sum_parts<dependent::Bug::kNone>(const float*, float*, int, int);
template __global__ void dependent::add_parts<dependent::Bug::kNone>(const float*, float*, int, int);
template __global__ void dequantize::dequantize<dequantize::Bug::kNone>(const uint32_t*, uint32_t*, int);
template __global__ void gemm::gemm<__half, gemm::Bug::kNone>(const __half*, const __half*, float*, int, int, int);
template __global__ void gemm::gemm<__nv_bfloat16, gemm::Bug::kNone>(const __nv_bfloat16*, const __nv_bfloat16*, float*,
                                                                     int, int, int);
template __global__ void gemm::gemm<int8_t, gemm::Bug::kNone>(const int8_t*, const int8_t*, int32_t*, int, int, int);
template __global__ void handoff::handoff<handoff::Bug::kNone>(const float*, float*, int);
template __global__ void pipeline::pipeline<pipeline::Bug::kNone>(float*, float*, int);
template __global__ void row_sums::row_sums<row_sums::Bug::kNone>(const float*, float*, int, int, int64_t);
template __global__ void scan::scan<scan::Bug::kNone>(const int*, int*);
template __global__ void split_sum::split_sum<split_sum::Bug::kNone>(const float*, float*, uint32_t*, float*, int);
template __global__ void transpose::transpose<transpose::Bug::kNone>(const float*, float*, int, int);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template __global__ void flip::flip<flip::Bug::kNone>(const uint16_t*, uint16_t*);
#endif

qops::Status launch_pipeline(float* x, float* y, int n, cudaStream_t stream) {
  return qops::cuda::launch(pipeline::pipeline<pipeline::Bug::kNone>, 1, pipeline::kThreads, 64 * 1024, stream, x, y,
                            n);
}
