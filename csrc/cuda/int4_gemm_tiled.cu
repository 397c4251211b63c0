// int4_gemm for more than 16 rows of x: tiles of 32, 64 or 128 tokens x 128 rows of w.
//
// 8 warps: 4 along the rows (2 strips each) x 2 along the tokens. A stage of the ring, 64 columns, is 4 KB of codes and
// 128 bytes of x a token, for all warps: a warp turns each code into a fragment once for 2, 4 or 8 tiles of 8 tokens.
// The sums of a slice stay in registers, those of the slices before in shared memory, which is touched 8 times in all.
// Where tiles are too few for the GPU, 2, 4 or 8 blocks share the slices and a second kernel adds them.
//
// Budget of a stage with 128 tokens: 512 mma, 1024 cycles at their peak; shared memory 20 KB in, 8 (codes) + 64 KB (x)
// out, 720 cycles; 11 slots a strip and step for the codes, twice over the two warps that share it: 704 + 512 mma + 128
// ldmatrix of 4096 slots. Scales cost 2 fmaf of each of 64 sums a group and lane. In flight: 3 or more stages.
#include "cuda/int4_gemm.cuh"

namespace qops::cuda {
namespace {

constexpr int kWarpsOfRows = 4, kWarpsOfTokens = kGemmWarps / kWarpsOfRows;
constexpr int kStripsOfWarp = kTileStrips / kWarpsOfRows;
static_assert(kTileStrips == kGemmWarps);  // each warp copies one

template <class T, int kTokens, bool kFine, bool kOffset>
__global__ void __launch_bounds__(kGemmThreads, 1)
    tiled_kernel(const __grid_constant__ WeightOnlyGemmParams p, const __grid_constant__ GemmPlan plan,
                 const Alignment aligned, float* slices) {
  QOPS_DYNAMIC_SHARED(shared);
  constexpr int kTiles = kTokens / 8 / kWarpsOfTokens, kStride = sum_stride(kTileStrips);
  constexpr int kCopies = kTokens * 8 / kGemmThreads;  // of x by each thread and stage
  constexpr int kSlotsAt = kTileStrips * int4::kBlockBytes;
  constexpr int kXAt = kSlotsAt + kTileStrips * scale_bytes_of_strip(kFine);
  constexpr int kStageBytes = kXAt + kTokens * kTokenStageBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t rows = p.x_rows.count, strips = int4::strips(p.n);
  // Blocks that share weights are neighbours.
  const int64_t tile = blockIdx.x / plan.k_parts, tiles_of_tokens = ceil_div(rows, kTokens);
  const int64_t token0 = tile % tiles_of_tokens * kTokens, strip0 = tile / tiles_of_tokens * kTileStrips;
  const int slices_of_block = kSlices / plan.k_parts;
  const int slice0 = static_cast<int>(blockIdx.x) % plan.k_parts * slices_of_block;
  const int64_t blocks = int4::blocks(p.k);
  const int64_t last_block = blocks_of_slice(blocks, slice0 + slices_of_block - 1).end;

  float* sums = reinterpret_cast<float*>(shared);
  uint8_t* ring = shared + kTokens * kStride * sizeof(float);
  const uint32_t ring_address = ptx::shared_address(ring);
  const ScaleSource source(p);
  const uint64_t policy = ptx::policy_evict_first();
  const bool has_strip = strip0 + warp < strips;
  const uint8_t* codes =
      static_cast<const uint8_t*>(p.packed) + (has_strip ? (strip0 + warp) * int4::strip_bytes(p.k) : 0);
  const T* x[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int64_t token = token0 + threadIdx.x / 8 + kGemmThreads / 8 * i;
    x[i] = static_cast<const T*>(p.x) + (token < rows ? p.x_rows.offset(token) : 0);
  }

  // What is copied next.
  int copy_stage = 0, copy_slice = slice0;
  Range copy_blocks = blocks_of_slice(blocks, slice0);
  int64_t copy_block = copy_blocks.begin;
  GroupWalk<kFine> copy_walk(p.k, p.group_size);
  if (copy_block < last_block) copy_walk.seek(copy_block);
  const auto copy_next = [&] {
    if (copy_block < last_block) {
      while (copy_block == copy_blocks.end) copy_blocks = blocks_of_slice(blocks, ++copy_slice);
      const uint32_t stage = ring_address + copy_stage * kStageBytes;
      const int64_t column = copy_block * int4::kBlockColumns + threadIdx.x % 8 * 8;
      const bool inside = column < p.k;  // K ends at a multiple of 8
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int token = static_cast<int>(threadIdx.x) / 8 + kGemmThreads / 8 * i;
        if (token0 + token < rows) {
          ptx::cp_async_cg_zfill(stage + kXAt + x_place(token, threadIdx.x % 8), x[i] + (inside ? column : 0),
                                 inside ? 16 : 0);
        }
      }
      const bool begins = copy_walk.begins() || copy_block == copy_blocks.begin;
      const int group = copy_walk.group, touched = copy_walk.next_block();
      if (has_strip) {
        const int at = lane * int4::kLaneBytes;
        copy_codes(stage + warp * int4::kBlockBytes + at, codes + copy_block * int4::kBlockBytes + at, policy);
        if ((kFine || begins) && lane < ScaleSource::kPieces<kFine>) {
          source.copy<kFine>(stage + kSlotsAt + warp * scale_bytes_of_strip(kFine), strip0 + warp, group,
                             min(touched, source.groups - group), lane);
        }
      }
      ++copy_block;
      if (++copy_stage == plan.stages) copy_stage = 0;
    }
    ptx::cp_async_commit();
  };

  for (int i = 1; i < plan.stages; ++i) copy_next();
  WarpSums<T, kStripsOfWarp, kTiles, kFine, kOffset> warp_sums;
  GroupWalk<kFine> walk(p.k, p.group_size);
  const int my_strip = warp % kWarpsOfRows * kStripsOfWarp, my_token = warp / kWarpsOfRows * (kTokens / kWarpsOfTokens);
  int stage = 0;
  for (int slice = slice0; slice < slice0 + slices_of_block; ++slice) {
    const Range range = blocks_of_slice(blocks, slice);
    warp_sums.begin_slice();
    if (range.size() > 0) walk.seek(range.begin);
    for (int64_t block = range.begin; block < range.end; ++block) {
      wait_for_copies(plan.stages - 2);
      __syncthreads();  // what all have copied is there; and all have read the stage that is filled next
      copy_next();
      const int at = stage * kStageBytes;
      warp_sums.add_block(ring + at + my_strip * int4::kBlockBytes,
                          ring + at + kSlotsAt + my_strip * scale_bytes_of_strip(kFine),
                          ring_address + at + kXAt + my_token * kTokenStageBytes + x_address(0, 0, lane), lane,
                          kStripsOfWarp, source, walk, block == range.begin, block + 1 == range.end);
      if (++stage == plan.stages) stage = 0;
    }
    const int64_t columns = strips * kStripRows;
#pragma unroll
    for (int s = 0; s < kStripsOfWarp; ++s) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = my_token + 8 * t + sum_token(lane, i);
          const int row = (my_strip + s) * kStripRows + sum_row(lane, i);
          const float total = warp_sums.total[s][t][i];
          if (plan.k_parts == 1) {
            float& sum = sums[token * kStride + row];
            sum = slice == 0 ? total : sum + total;
          } else if (token0 + token < rows && strip0 + my_strip + s < strips) {
            slices[(slice * rows + token0 + token) * columns + strip0 * kStripRows + row] = total;
          }
        }
      }
    }
  }
  if (plan.k_parts > 1) return;
  __syncthreads();
  constexpr int kChunks = kTileStrips * kStripRows / kVector;
  for (int i = threadIdx.x; i < kTokens * kChunks; i += kGemmThreads) {
    const int token = i / kChunks, row = i % kChunks * kVector;
    const int64_t n = strip0 * kStripRows + row;
    if (token0 + token < rows && n < p.n) {
      finish<T>(p, aligned, token0 + token, n, [&](int64_t column, Vector& v) {
        const float* from = sums + token * kStride + (column - strip0 * kStripRows);
#pragma unroll
        for (int e = 0; e < kVector; ++e) v[e] = from[e];
      });
    }
  }
}

}  // namespace

Status int4_gemm_tiled(const Int4Job& job, cudaStream_t stream) {
  return with_int4_kernel(job.p, [&](auto element, auto fine, auto offset) {
    using T = decltype(element);
    auto kernel = job.plan.tokens == 32 ? &tiled_kernel<T, 32, fine.value, offset.value>
                                        : &tiled_kernel<T, 64, fine.value, offset.value>;
    if constexpr (max_tile_tokens(offset.value) == 128) {
      if (job.plan.tokens == 128) kernel = &tiled_kernel<T, 128, fine.value, offset.value>;
    }
    return launch(kernel, dim3(static_cast<unsigned>(job.plan.blocks)), dim3(kGemmThreads),
                  static_cast<size_t>(job.plan.shared_bytes), stream, job.p, job.plan, job.aligned, job.slices);
  });
}

}  // namespace qops::cuda
