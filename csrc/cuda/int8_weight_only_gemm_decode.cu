// int8_weight_only_gemm of few rows: the kernels of weight_only_decode.cuh for codes of 8 bits, a warp taking 2 strips
// at a time.
//
// Bytes and operations of a stage of a warp (64 columns, M tokens): 2048 bytes of codes from DRAM, 128 M of x from L2,
// as many as the codes at M = 16; 128 (float16: 80) instructions make fragments of the codes, 8 or 16 multiply. At 14
// bytes a cycle the codes of a block's 8 warps take 1170 cycles, at 4 instructions a cycle their loops 520 (M <= 8) and
// 570.
#include "cuda/int8_codes.cuh"
#include "cuda/weight_only_decode.cuh"

namespace qops::cuda {
namespace {

template <class T, int kTiles, bool kFine, bool kOffset>
__global__ void __launch_bounds__(kGemmThreads, 1)
    int8_decode_kernel(const __grid_constant__ WeightOnlyGemmParams p, const __grid_constant__ DecodeWork work,
                       const __grid_constant__ ScaleSource scales, const Alignment aligned, float* slices) {
  decoding::decode<Int8Codes<T>, kTiles, 2, kFine, kOffset>(p, work, scales, aligned, slices);
}

}  // namespace

Status int8_weight_only_gemm_decode(const WeightOnlyJob& job, const Queue& queue) {
  return with_kernel<8>(job.p, [&](auto element, auto fine, auto offset) {
    using T = decltype(element);
    const auto kernel = job.plan.tokens == 8 ? &int8_decode_kernel<T, 1, fine.value, offset.value>
                                             : &int8_decode_kernel<T, 2, fine.value, offset.value>;
    return decoding::launch(kernel, fine.value, job, queue);
  });
}

}  // namespace qops::cuda
