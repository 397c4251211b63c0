// int8_gemm: y = R(fmaf(s_x[m], float(sum_k (q[m, k] - zero_point[m]) w[n, k]) * s_w[n], bias[n])), and what becomes of
// it (Epilogue of kernels.h) before it is stored.
//
// Idea. w is the A operand of mma.m16n8k32 for every M and tokens are the n8 side, so few tokens are padded to eight
// and not to 64. Sums are exact integers modulo 2^32 in any order: int8_config.h cuts the product as it suits the GPU,
// and where blocks share a tile a second kernel adds what they have. Both operands pass through a ring of stages in
// shared memory that runs on from tile to tile; w lies there as it does in memory, in fragments. With zero points,
//     sum_k (q - zero_point) w  =  sum_k q w  -  zero_point * sum_k w,
// and sum_k w comes from dp4a with ones, on fragments that are in registers anyway: two registers for each strip and no
// work for the tensor cores, which a product with ones would keep busy for 1 / 8 of the time at 128 tokens. A pass of
// its own would read the weights twice.
//
// Bound by the bytes of w up to M of some 64, by the tensor cores beyond. wgmma, which is to take the place of this
// kernel there on sm_90a, can read the same layout.
#include "cuda/int8_gemm_fragment.cuh"

namespace qops::cuda {
namespace {

template <int kTokens, bool kZeroPoint>
__global__ void __launch_bounds__(int8::Tile<kTokens>::kThreads, 2)
    int8_gemm_kernel(const __grid_constant__ Int8Job job) {
  using T = int8::Tile<kTokens>;
  constexpr int8::TileShape kShape = T::kShape;
  constexpr int kStageBytes = kShape.stage_bytes();
  QOPS_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first_strip = warp % kShape.strip_warps() * T::kStrips, token_warp = warp / kShape.strip_warps();
  const int first_token = token_warp * job.plan.token_tiles_of_warp(kShape.token_warps) * 8;
  const uint32_t ring = ptx::shared_address(shared);
  const int stages = T::kShape.can_be_deep() ? job.plan.stages : T::kStages;
  uint32_t* const staging = reinterpret_cast<uint32_t*>(shared + stages * kStageBytes) + warp * 8 * kShape.sum_stride();

  const int8::Part part = job.plan.part(blockIdx.x);
  int8::Source<T> source(job, part);
  for (int stage = 0; stage < stages - 1; ++stage) {
    source.copy(job, part, ring + stage * kStageBytes);
    ptx::cp_async_commit();
  }
  if (job.plan.has_second_kernel()) let_second_kernel_start();
  int8::Sums<T, kZeroPoint> sums;
  int stage = 0;
  for (int tile = part.first_tile; tile < part.end_tile; ++tile) {
    const int begin = tile == part.first_tile ? part.first_k : 0;
    const int end = tile + 1 == part.end_tile ? part.end_k : job.plan.k_blocks;
    sums.clear();
    const auto multiply = [&](auto skips, int live) {
#pragma unroll 1
      for (int k = begin; k < end; ++k) {
        if (kShape.can_be_deep() && stages == int8::kDeepStages) {
          ptx::cp_async_wait<int8::kDeepStages - 2>();
        } else {
          ptx::cp_async_wait<T::kStages - 2>();
        }
        // Also: all have read the stage before this one, which is filled now.
        __syncthreads();
        source.copy(job, part, ring + (stage == 0 ? stages - 1 : stage - 1) * kStageBytes);
        ptx::cp_async_commit();
        const uint8_t* const weights =
            shared + stage * kStageBytes + first_strip * int8::kBlockBytes + lane * int8::kLaneBytes;
        const uint32_t tokens = ring + stage * kStageBytes + int8::kWeightBytes + first_token * int8::kTokenBytes +
                                int8::token_address(lane);
        sums.template add<decltype(skips)::value>(weights, tokens, live);
        stage = stage + 1 == stages ? 0 : stage + 1;
      }
    };
    const int64_t token_tile = job.plan.position(tile).token_tile;
    const bool full = job.plan.tokens_of(token_tile) == kTokens;  // the same for the whole block
    if constexpr (!kShape.skips()) {
      multiply(std::false_type{}, 0);
    } else if (full && !kZeroPoint) {  // with zero points there are no registers for two loops
      multiply(std::false_type{}, 0);
    } else {
      multiply(std::true_type{}, job.plan.live_tiles(token_tile, token_warp, kShape.token_warps));
    }
    int32_t* slot = nullptr;
    if (begin != 0 || end != job.plan.k_blocks) {
      slot = job.partials + job.plan.slot(blockIdx.x, tile) * job.plan.slot_sums();
    }
    sums.write(job, tile, slot, token_warp, first_strip, staging);
  }
}

template <int kTokens>
Status run(const Int8Job& job, const Queue& queue) {
  using T = int8::Tile<kTokens>;
  const auto kernel =
      job.p.zero_point == nullptr ? &int8_gemm_kernel<kTokens, false> : &int8_gemm_kernel<kTokens, true>;
  return launch_blocks(kernel, job.plan.blocks, T::kThreads, T::kShape.shared_bytes(job.plan.stages), queue, job);
}

}  // namespace

Status int8_gemm_tiled(const Int8Job& job, const Queue& queue) {
  switch (job.plan.tokens) {
    case 8: return run<8>(job, queue);
    case 16: return run<16>(job, queue);
    case 32: return run<32>(job, queue);
    case 64: return run<64>(job, queue);
    default: return run<128>(job, queue);
  }
}

}  // namespace qops::cuda
