// int4_gemm for more than 16 rows of x: tiles of up to 32, 64 or 128 tokens x 128 rows of w.
//
// 8 warps: 4 along the rows (2 strips each) x 2 along the tokens. A stage of the ring, 64 columns, is 4 KB of codes and
// 128 bytes of x a token, for all warps: a warp turns each code into a fragment once for 2, 4 or 8 tiles of 8 tokens.
// The sums of a slice stay in registers, those of the slices before in shared memory, which is touched 8 times in all.
// A block takes items in turns, tiles or some slices of one, and its ring runs on from item to item: the copies of the
// next tile are under way while the sums of this one are finished. Tiles that do not fill the GPU are shared by 2, 4 or
// 8 blocks (k_parts), whose slices a second kernel adds. With k_parts = 2:
//
//            K: slice 0 .. 3   slice 4 .. 7
//            +---------------+---------------+
//     tile 0 | item 0                        |  the first `whole` tiles: y is made of them at once
//          1 | item 1                        |
//            +---------------+---------------+
//          2 | item 2        | item 3        |  the others: sums to scratch
//          3 | item 4        | item 5        |
//            +---------------+---------------+
//
// Budget of a stage with 128 tokens: 512 mma, 1024 cycles at their peak; shared memory 20 KB in, 8 (codes) + 64 KB (x)
// out, 720 cycles; 11 slots a strip and step for the codes, twice over the two warps that share it: 704 + 512 mma + 128
// ldmatrix of 4096 slots. Scales cost 2 fmaf of each of 64 sums a group and lane.
// With 32 tokens: as many bytes of x from L2 as of codes from memory, 4 KB each. In flight, of two blocks on a
// multiprocessor: 80 KB of codes on sm_90, 40 KB on sm_80, 16 KB with 99 KB of shared memory.
#include "cuda/int4_gemm.cuh"

namespace qops::cuda {
namespace {

constexpr int kWarpsOfRows = 4, kWarpsOfTokens = kGemmWarps / kWarpsOfRows;
constexpr int kStripsOfWarp = kTileStrips / kWarpsOfRows;
static_assert(kTileStrips == kGemmWarps);  // each warp copies one

// What this thread copies of the items of its block, one stage after the other: a chunk of a block of codes, some
// chunks of scales, some of x. Registers are few beside the sums, so counts have 32 bits and there is one pointer for
// all rows.
template <class T, int kTokens, bool kFine>
class TileSource {
 public:
  QOPS_DEVICE TileSource(const WeightOnlyGemmParams& p, const GemmPlan& plan, const ScaleSource& scales)
      : item_(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {
    enter_next_item(p, plan, scales);
  }

  // Begins to copy the next block of 64 columns, if there is one, into the stage at `stage`.
  QOPS_DEVICE void copy(const WeightOnlyGemmParams& p, const GemmPlan& plan, const ScaleSource& scales,
                        uint32_t stage) {
    constexpr int kSlotsAt = kTileStrips * int4::kBlockBytes;
    constexpr int kXAt = kSlotsAt + kTileStrips * scale_bytes_of_strip(kFine);
    if (item_ >= static_cast<int>(plan.items())) return;
    bool begins = walk_.begins(scales);
    while (block_ == slice_end_) {
      const Range slice = blocks_of_slice(int4::blocks(p.k), ++slice_);
      slice_end_ = static_cast<int>(slice.end);
      begins = true;
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t column = int64_t{block_} * int4::kBlockColumns + threadIdx.x % 8 * 8;
    const bool inside = column < p.k;  // K ends at a multiple of 8
    const T* source = x_ + (inside ? column : 0);
    uint32_t target = stage + kXAt + x_place(static_cast<int>(threadIdx.x) / 8, threadIdx.x % 8);
    // Unrolled, the addresses of all rows would stay in registers.
#pragma unroll 1
    for (int row = 0; row < rows_; row += kRowsAtOnce) {
      ptx::cp_async_cg_zfill(target, source, inside ? 16 : 0);
      source += kRowsAtOnce * p.x_rows.stride[0];
      target += kRowsAtOnce * kTokenStageBytes;
    }
    const int group = walk_.group, touched = walk_.next_block(scales);
    if (strip_ < static_cast<int>(int4::strips(p.n))) {
      const uint32_t place = stage + warp * int4::kBlockBytes + lane * int4::kLaneBytes;
      const uint8_t* codes = static_cast<const uint8_t*>(p.packed) + strip_ * int4::strip_bytes(p.k) +
                             int64_t{block_} * int4::kBlockBytes + lane * int4::kLaneBytes;
      // Weights that other tiles of tokens read as well are to stay in L2.
      if (plan.token_tiles == 1) {
        copy_codes(place, codes, ptx::policy_evict_first());
      } else {
        ptx::cp_async_cg(place, codes);
      }
      if ((kFine || begins) && lane < ScaleSource::kPieces<kFine>) {
        scales.template copy<kFine>(stage + kSlotsAt + warp * scale_bytes_of_strip(kFine), strip_, group,
                                    min(touched, scales.groups - group), lane);
      }
    }
    if (++block_ == end_) enter_next_item(p, plan, scales);
  }

 private:
  static constexpr int kRowsAtOnce = kGemmThreads / 8;  // of x, in chunks of 16 bytes
  static_assert(kRowsAtOnce % 8 == 0);                  // so each has the same permutation of chunks

  QOPS_DEVICE void enter_next_item(const WeightOnlyGemmParams& p, const GemmPlan& plan, const ScaleSource& scales) {
    const int64_t blocks = int4::blocks(p.k);
    Item item{};
    do {
      item_ += gridDim.x;
      if (item_ >= static_cast<int>(plan.items())) return;
      item = plan.item(item_);
      slice_ = item.slice0 - 1;
      block_ = slice_end_ = static_cast<int>(blocks_of_slice(blocks, item.slice0).begin);
      end_ = static_cast<int>(blocks_of_slice(blocks, item.slice0 + item.slices - 1).end);
    } while (block_ == end_);
    walk_.seek(scales, block_);
    const TilePosition at = plan.position(item.tile);
    strip_ = static_cast<int>(at.row_tile) * kTileStrips + threadIdx.x / 32;
    const int first = threadIdx.x / 8;
    const int64_t m = at.token_tile * plan.live + first, left = p.x_rows.count - m;
    rows_ = left < plan.live - first ? static_cast<int>(left) : plan.live - first;
    x_ = static_cast<const T*>(p.x) + (rows_ > 0 ? m * p.x_rows.stride[0] : 0);
  }

  GroupWalk<kFine> walk_;
  int item_;
  int slice_, slice_end_;
  int block_, end_;
  int strip_;   // of this warp
  int rows_;    // of x that there are in the tile from this thread's first one on
  const T* x_;  // that row
};

template <class T, int kTokens, bool kFine, bool kOffset>
__global__ void __launch_bounds__(kGemmThreads, blocks_of_multiprocessor(kTokens, kOffset))
    tiled_kernel(const __grid_constant__ WeightOnlyGemmParams p, const __grid_constant__ GemmPlan plan,
                 const __grid_constant__ ScaleSource scales, const Alignment aligned, float* slices) {
  QOPS_DYNAMIC_SHARED(shared);
#if defined(__CUDA_ARCH__)
  // Its machine code would spill there, and no plan asks for it.
  if constexpr (kTokens > max_tile_tokens(false, __CUDA_ARCH__ / 10)) return;
#endif
  constexpr int kTiles = kTokens / 8 / kWarpsOfTokens, kStride = sum_stride(kTileStrips);
  constexpr int kSlotsAt = kTileStrips * int4::kBlockBytes;
  constexpr int kXAt = kSlotsAt + kTileStrips * scale_bytes_of_strip(kFine);
  constexpr int kStageBytes = kXAt + kTokens * kTokenStageBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t rows = p.x_rows.count, strips = int4::strips(p.n), blocks = int4::blocks(p.k);
  float* sums = reinterpret_cast<float*>(shared);
  uint8_t* ring = shared + kTokens * kStride * sizeof(float);
  const uint32_t ring_address = ptx::shared_address(ring);

  TileSource<T, kTokens, kFine> source(p, plan, scales);
  for (int i = 0; i + 1 < plan.stages; ++i) {
    source.copy(p, plan, scales, ring_address + i * kStageBytes);
    ptx::cp_async_commit();
  }
  WarpSums<T, kStripsOfWarp, kTiles, kFine, kOffset> warp_sums;
  GroupWalk<kFine> walk;
  const int my_strip = warp % kWarpsOfRows * kStripsOfWarp;
  int stage = 0;
  for (int index = blockIdx.x; index < static_cast<int>(plan.items()); index += gridDim.x) {
    const Item item = plan.item(index);
    const TilePosition at = plan.position(item.tile);
    const int64_t token0 = at.token_tile * plan.live, strip0 = at.row_tile * kTileStrips;
    // Eights of tokens are dealt evenly.
    const int live = rows - token0 < plan.live ? static_cast<int>(rows - token0) : plan.live, eights = (live + 7) / 8;
    const int my_first = warp / kWarpsOfRows * ((eights + 1) / 2), my_tiles = min((eights + 1) / 2, eights - my_first);
    for (int slice = item.slice0; slice < item.slice0 + item.slices; ++slice) {
      const Range range = blocks_of_slice(blocks, slice);
      const int begin = static_cast<int>(range.begin), end = static_cast<int>(range.end);
      warp_sums.begin_slice();
      if (begin < end) walk.seek(scales, begin);
      for (int block = begin; block < end; ++block) {
        wait_for_copies(plan.stages - 2);
        __syncthreads();  // what all have copied is there; and all have read the stage that is filled now
        source.copy(p, plan, scales, ring_address + (stage == 0 ? plan.stages - 1 : stage - 1) * kStageBytes);
        ptx::cp_async_commit();
        const uint8_t* codes = ring + stage * kStageBytes + my_strip * int4::kBlockBytes;
        const uint8_t* slots = ring + stage * kStageBytes + kSlotsAt + my_strip * scale_bytes_of_strip(kFine);
        const uint32_t x =
            ring_address + stage * kStageBytes + kXAt + 8 * my_first * kTokenStageBytes + x_address(0, 0, lane);
        const bool is_first = block == begin, is_last = block + 1 == end;
        if (my_tiles == kTiles) {
          warp_sums.add_block(codes, slots, x, lane, kStripsOfWarp, scales, walk, is_first, is_last);
        } else if (my_tiles > 0) {
          warp_sums.template add_block<false>(codes, slots, x, lane, kStripsOfWarp, scales, walk, is_first, is_last,
                                              my_tiles);
        }
        if (++stage == plan.stages) stage = 0;
      }
#pragma unroll
      for (int s = 0; s < kStripsOfWarp; ++s) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int token = 8 * (my_first + t) + sum_token(lane, i);
            const int row = (my_strip + s) * kStripRows + sum_row(lane, i);
            const float total = warp_sums.total[s][t][i];
            if (t >= my_tiles) continue;
            if (index < plan.whole) {
              float& sum = sums[token * kStride + row];
              sum = slice == 0 ? total : sum + total;
            } else if (token < live && strip0 + my_strip + s < strips) {
              const int64_t shared_rows = (plan.tiles() - plan.whole) * plan.live;
              const int64_t of_tile = (item.tile - plan.whole) * plan.live;
              slices[(slice * shared_rows + of_tile + token) * kTileRows + row] = total;
            }
          }
        }
      }
    }
    if (index >= plan.whole) continue;
    __syncthreads();
    constexpr int kChunks = kTileRows / kVector;
    for (int i = threadIdx.x; i < live * kChunks; i += kGemmThreads) {
      const int token = i / kChunks, row = i % kChunks * kVector;
      const int64_t n = strip0 * kStripRows + row;
      if (n < p.n) {
        finish_sums<T>(p, aligned, token0 + token, n, [&](int64_t column, Vector& v) {
          load<true>(sums + token * kStride + (column - strip0 * kStripRows), kVector, v);
        });
      }
    }
    __syncthreads();  // the sums of the next tile take their place
  }
}

}  // namespace

Status int4_gemm_tiled(const Int4Job& job, const Queue& queue) {
  return with_int4_kernel(job.p, [&](auto element, auto fine, auto offset) {
    using T = decltype(element);
    auto kernel = job.plan.tokens == 32 ? &tiled_kernel<T, 32, fine.value, offset.value>
                                        : &tiled_kernel<T, 64, fine.value, offset.value>;
    if constexpr (!offset.value) {
      if (job.plan.tokens == 128) kernel = &tiled_kernel<T, 128, fine.value, offset.value>;
    }
    return launch(kernel, dim3(static_cast<unsigned>(job.plan.blocks)), dim3(kGemmThreads),
                  static_cast<size_t>(job.plan.shared_bytes), queue, job.p, job.plan, ScaleSource(job.p), job.aligned,
                  job.sums);
  });
}

}  // namespace qops::cuda
