// int8_weight_only_gemm of many rows: the kernels of weight_only_tiled.cuh for codes of 8 bits.
#include "cuda/int8_codes.cuh"
#include "cuda/weight_only_tiled.cuh"

namespace qops::cuda {
namespace {

template <class T, int kTokens, bool kFine, bool kOffset>
__global__ void __launch_bounds__(kGemmThreads, blocks_of_multiprocessor(kTokens, kOffset))
    int8_tiled_kernel(const __grid_constant__ WeightOnlyGemmParams p, const __grid_constant__ GemmPlan plan,
                      const __grid_constant__ ScaleSource scales, const Alignment aligned, float* slices) {
  tiling::multiply_tiles<Int8Codes<T>, kTokens, kFine, kOffset>(p, plan, scales, aligned, slices);
}

}  // namespace

Status int8_weight_only_gemm_tiled(const WeightOnlyJob& job, const Queue& queue) {
  return with_kernel<8>(job.p, [&](auto element, auto fine, auto offset) {
    using T = decltype(element);
    auto kernel = job.plan.tokens == 32 ? &int8_tiled_kernel<T, 32, fine.value, offset.value>
                                        : &int8_tiled_kernel<T, 64, fine.value, offset.value>;
    if constexpr (!offset.value) {
      if (job.plan.tokens == 128) kernel = &int8_tiled_kernel<T, 128, fine.value, offset.value>;
    }
    return tiling::launch(kernel, fine.value, job, queue);
  });
}

}  // namespace qops::cuda
