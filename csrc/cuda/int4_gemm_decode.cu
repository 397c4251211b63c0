// int4_gemm of few rows: the kernels of weight_only_decode.cuh for codes of 4 bits, a warp taking 4 strips at a time
// or 2.
#include "cuda/int4_codes.cuh"
#include "cuda/weight_only_decode.cuh"

namespace qops::cuda {
namespace {

template <class T, int kTiles, int kStrips, bool kFine, bool kOffset>
__global__ void __launch_bounds__(kGemmThreads, 1)
    decode_kernel(const __grid_constant__ WeightOnlyGemmParams p, const __grid_constant__ DecodeWork work,
                  const __grid_constant__ ScaleSource scales, const Alignment aligned, float* slices) {
  decoding::decode<Int4Codes<T>, kTiles, kStrips, kFine, kOffset>(p, work, scales, aligned, slices);
}

}  // namespace

Status int4_gemm_decode(const WeightOnlyJob& job, const Queue& queue) {
  return with_kernel<4>(job.p, [&](auto element, auto fine, auto offset) {
    using T = decltype(element);
    const bool few_strips = job.plan.strips == 2;
    auto kernel = few_strips ? &decode_kernel<T, 1, 2, fine.value, offset.value>
                             : &decode_kernel<T, 1, 4, fine.value, offset.value>;
    if (job.plan.tokens == 16) {
      kernel = few_strips ? &decode_kernel<T, 2, 2, fine.value, offset.value>
                          : &decode_kernel<T, 2, 4, fine.value, offset.value>;
    }
    if constexpr (!fine.value) {
      if (job.plan.tokens == 24) {
        kernel =
            few_strips ? &decode_kernel<T, 3, 2, false, offset.value> : &decode_kernel<T, 3, 4, false, offset.value>;
      }
    }
    return decoding::launch(kernel, fine.value, job, queue);
  });
}

}  // namespace qops::cuda
