// int4_gemm and int8_weight_only_gemm for more rows of x than weight_only_decode.cuh takes: tiles of up to 32, 64 or
// 128 tokens x 128 rows of w.
//
// 8 warps, each with one strip and all tokens: a code becomes a fragment once in a block, for 4 or 8 tiles of 8 tokens.
// With 128 tokens, whose sums one warp does not hold, there are 4 warps along the rows (2 strips each) x 2 along the
// tokens. A stage of the ring, 64 columns, is 4 KB of codes and 128 bytes of x a token, for all warps.
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
// Budget of a stage, 32 / 64 / 128 tokens (bfloat16 on sm_90a, groups of 128; bench/results/SLOTS.md):
//   issue slots        1308 / 1692 / 2708 of 8 warps: 327 / 423 / 677 cycles at 4 a cycle
//   tensor cores       206 / 413 / 826 cycles at the 62 % of their rate that mma.sync reaches
//   shared memory      408 / 696 / 792 cycles: with one strip a warp, each of 8 warps reads all tokens
//   from DRAM          4 KB of codes, 325 cycles of a multiprocessor's share
//   in flight          of 32 tokens, two blocks on a multiprocessor: 72 KB of codes on sm_90, 40 KB on sm_80, 16 KB
//                      with 99 KB of shared memory
#pragma once

#include "cuda/weight_only_gemm.cuh"

namespace qops::cuda::tiling {
static_assert(kTileStrips == kGemmWarps);  // each warp copies one

// How the warps of a block share a tile: codes become fragments once for each warp of tokens, x is read from shared
// memory once for each warp of rows. With 128 tokens one warp could not hold all sums of a strip.
template <int kTokens>
struct Grid {
  static constexpr int kOfTokens = kTokens <= 64 ? 1 : 2, kOfRows = kGemmWarps / kOfTokens;
  static constexpr int kStrips = kTileStrips / kOfRows, kTiles = kTokens / 8 / kOfTokens;
};

// A stage of the ring.
template <class Codes, int kTokens, bool kFine>
struct Stage {
  static constexpr int kScaleBytes = scale_bytes_of_strip(kFine);
  static constexpr int kSlotsAt = kTileStrips * Codes::kBlockBytes;
  static constexpr int kXAt = kSlotsAt + kTileStrips * kScaleBytes;
  static constexpr int kBytes = kXAt + kTokens * kTokenStageBytes;
};

// What this thread copies of the items of its block, one stage after the other: a chunk of a block of codes, some
// chunks of scales, some of x.
template <class Codes, int kTokens, bool kFine>
class TileSource {
 public:
  using T = typename Codes::Element;

  QOPS_DEVICE TileSource(const GemmPlan& plan, uint32_t ring)
      : policy_(ptx::policy_evict_first()),
        codes_to_(held(ring + threadIdx.x * int4::kLaneBytes + threadIdx.x / 32 * (kBytes - kCopyBytes), lane())),
        x_to_(held(ring + StageOf::kXAt + x_place(Codes::kBits, static_cast<int>(threadIdx.x) / 8, threadIdx.x % 8),
                   lane())),
        warp_(static_cast<int>(uniform(threadIdx.x / 32))),
        item_(static_cast<int>(blockIdx.x)),
        items_(static_cast<int>(plan.items())) {}

  // Begins to copy the next block of 64 columns, if there is one. Commits in any case, as those who wait count commits.
  QOPS_DEVICE void copy_next(const WeightOnlyGemmParams& p, const GemmPlan& plan, const ScaleSource& scales) {
    if (left_ == 0) enter_next_item(p, plan, scales);
    if (left_ > 0) {
      --left_;
      const uint32_t at = static_cast<uint32_t>(stage_) * StageOf::kBytes;
      if (has_strip_) {
        // Weights that other tiles of tokens read as well are to stay in L2.
        if (plan.token_tiles == 1) {
#pragma unroll
          for (int i = 0; i < kBytes; i += kCopyBytes) copy_codes(codes_to_ + at + i, codes_ + i, policy_);
        } else {
#pragma unroll
          for (int i = 0; i < kBytes; i += kCopyBytes) ptx::cp_async_cg(codes_to_ + at + i, codes_ + i);
        }
      }
      copy_tokens(at);
      copy_scales(scales, at);
      if (++stage_ == plan.stages) stage_ = 0;
      codes_ += kBytes;
      chunk_ += kChunks;
    }
    ptx::cp_async_commit();
  }

 private:
  using StageOf = Stage<Codes, kTokens, kFine>;
  static constexpr int kBytes = Codes::kBlockBytes;
  static constexpr int kRowsAtOnce = kGemmThreads / 8;  // of x, in chunks of 16 bytes
  static_assert(kRowsAtOnce % 8 == 0);                  // so each has the same permutation of chunks
  static constexpr int kCopies = kTokens / kRowsAtOnce, kChunks = int4::kBlockColumns / 8;

  static QOPS_DEVICE int lane() { return threadIdx.x % 32; }

  QOPS_DEVICE void copy_tokens(uint32_t at) const {
    const bool inside = chunk_ < chunks_;  // K ends at a multiple of 8
    const uint64_t column = uint64_t{min(chunk_, chunks_ - 1)} * 8;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (i * kRowsAtOnce < rows_) {
        ptx::cp_async_cg_zfill(x_to_ + at + i * kRowsAtOnce * kTokenStageBytes, x_ + i * x_step_ + column,
                               inside ? 16 : 0);
      }
    }
  }

  QOPS_DEVICE void copy_scales(const ScaleSource& scales, uint32_t at) {
    const uint32_t target =
        codes_to_ + at + StageOf::kSlotsAt + static_cast<uint32_t>(warp_ * (StageOf::kScaleBytes - kBytes));
    if constexpr (kFine) {
      const int group = walk_.group, touched = walk_.next_block(scales);
      if (has_strip_) {
        scales.template copy<true>(target - lane() * int4::kLaneBytes, strip_, group,
                                   min(touched, scales.groups - group), lane());
      }
    } else {
      // In the first block of each group alone.
      if (until_scales_ == 0) {
        if (has_scales_) ptx::cp_async_cg(target, scales_);
        scales_ += scale_bytes_;
        until_scales_ = walk_.left;
        walk_.left = scales.units_of_group;
      }
      --until_scales_;
    }
  }

  QOPS_DEVICE void enter_next_item(const WeightOnlyGemmParams& p, const GemmPlan& plan, const ScaleSource& scales) {
    const int64_t blocks = int4::blocks(p.k);
    if (blocks == 0) return;
    Item item{};
    int begin = 0;
    for (; left_ == 0 && item_ < items_; item_ += static_cast<int>(gridDim.x)) {
      item = plan.item(item_);
      begin = static_cast<int>(blocks_of_slice(blocks, item.slice0).begin);
      left_ = static_cast<int>(blocks_of_slice(blocks, item.slice0 + item.slices - 1).end) - begin;
    }
    if (left_ == 0) return;
    const TilePosition at = plan.position(item.tile);
    strip_ = static_cast<int>(at.row_tile) * kTileStrips + warp_;
    has_strip_ = strip_ < static_cast<int>(int4::strips(p.n));
    codes_ = static_cast<const uint8_t*>(p.packed) + strip_ * strip_bytes(Codes::kBits, p.k) + int64_t{begin} * kBytes +
             lane() * int4::kLaneBytes;
    chunk_ = static_cast<uint32_t>(begin) * kChunks + threadIdx.x % 8;
    chunks_ = static_cast<uint32_t>(p.k / 8);
    const int first = threadIdx.x / 8;
    const int64_t m = at.token_tile * plan.live + first, left = p.x_rows.count - m;
    rows_ = left < plan.live - first ? static_cast<int>(left) : plan.live - first;
    x_ = held(static_cast<const T*>(p.x) + (rows_ > 0 ? m * p.x_rows.stride[0] : 0), lane());
    x_step_ = kRowsAtOnce * p.x_rows.stride[0];
    walk_.seek(scales, begin);
    if constexpr (!kFine) {
      constexpr int kPieces = ScaleSource::kPieces<kFine>;
      const int at_piece = 16 * (lane() % (kPieces / 2));
      const bool of_zeros = lane() >= kPieces / 2;
      scale_bytes_ = of_zeros ? scales.zero_bytes : scales.scale_bytes;
      has_scales_ = has_strip_ && lane() < kPieces && at_piece < static_cast<int>(scale_bytes_);
      scales_ = (of_zeros ? scales.zeros : scales.scales) +
                (int64_t{strip_} * scales.groups + walk_.group) * scale_bytes_ + at_piece;
      until_scales_ = 0;
    }
  }

  uint64_t policy_;
  uint32_t codes_to_, x_to_;  // of this thread in the first stage
  int warp_;
  int item_, items_;  // the next one, and all
  int left_ = 0;      // blocks of the item
  int stage_ = 0;
  int strip_;  // of this warp
  bool has_strip_;
  const uint8_t* codes_;
  uint32_t chunk_, chunks_;  // of this thread, and all, of a row of x
  int rows_;                 // of x that there are in the tile from this thread's first one on
  const T* x_;               // that row
  int64_t x_step_;           // to the next one of this thread
  const uint8_t* scales_;    // of the lane in the next group
  uint32_t scale_bytes_;     // of a group
  bool has_scales_;
  int until_scales_;  // blocks
  GroupWalk<kFine> walk_;
};

// What a kernel does whose threads are kGemmThreads.
template <class Codes, int kTokens, bool kFine, bool kOffset>
QOPS_DEVICE void multiply_tiles(const WeightOnlyGemmParams& p, const GemmPlan& plan, const ScaleSource& scales,
                                const Alignment& aligned, float* slices) {
  QOPS_DYNAMIC_SHARED(shared);
#if defined(__CUDA_ARCH__)
  // Its machine code would spill there, and no plan asks for it.
  if constexpr (kTokens > max_tile_tokens(false, __CUDA_ARCH__ / 10)) return;
#endif
  using Warps = Grid<kTokens>;
  using StageOf = Stage<Codes, kTokens, kFine>;
  constexpr int kTiles = Warps::kTiles, kStride = sum_stride(kTileStrips);
  const int lane = threadIdx.x % 32, warp = static_cast<int>(uniform(threadIdx.x / 32));
  const int64_t rows = p.x_rows.count, strips = int4::strips(p.n), blocks = int4::blocks(p.k);
  float* sums = reinterpret_cast<float*>(shared);
  uint8_t* ring = shared + kTokens * kStride * sizeof(float);
  const uint32_t ring_address = ptx::shared_address(ring);

  TileSource<Codes, kTokens, kFine> source(plan, ring_address);
  for (int i = 0; i + 1 < plan.stages; ++i) source.copy_next(p, plan, scales);
  if (plan.whole < plan.tiles()) let_second_kernel_start();
  WarpSums<Codes, Warps::kStrips, kTiles, kFine, kOffset> warp_sums;
  warp_sums.begin();
  const int my_strip = warp % Warps::kOfRows * Warps::kStrips;
  const uint8_t* my_codes = ring + my_strip * Codes::kBlockBytes;
  const uint8_t* my_slots = ring + StageOf::kSlotsAt + my_strip * StageOf::kScaleBytes;
  int stage = 0;
  for (int index = blockIdx.x; index < static_cast<int>(plan.items()); index += gridDim.x) {
    const Item item = plan.item(index);
    const TilePosition at = plan.position(item.tile);
    const int64_t token0 = at.token_tile * plan.live, strip0 = at.row_tile * kTileStrips;
    // Eights of tokens are dealt evenly.
    const int live = rows - token0 < plan.live ? static_cast<int>(rows - token0) : plan.live, eights = (live + 7) / 8;
    const int most = (eights + Warps::kOfTokens - 1) / Warps::kOfTokens, my_first = warp / Warps::kOfRows * most;
    const int my_tiles = min(most, eights - my_first);
    const uint32_t my_x = held(
        ring_address + StageOf::kXAt + 8 * my_first * kTokenStageBytes + x_address(Codes::kBits, 0, 0, lane), lane);
    GroupWalk<kFine> walk;
    bool begins = true;  // of the item or of a group
    if (blocks > 0) walk.seek(scales, static_cast<int>(blocks_of_slice(blocks, item.slice0).begin));
    for (int slice = item.slice0; slice < item.slice0 + item.slices; ++slice) {
      const Range range = blocks_of_slice(blocks, slice);
      uint32_t left = uniform(static_cast<uint32_t>(range.size()));
      warp_sums.begin_slice();
      while (left > 0) {
        // Blocks of a group, or all.
        uint32_t run = kFine ? left : min(left, static_cast<uint32_t>(walk.left));
        left -= run;
        if constexpr (!kFine) walk.left -= static_cast<int>(run);
        do {
          wait_for_stage(plan.stages);
          __syncthreads();  // what all have copied is there; and all have read the stage that is filled now
          source.copy_next(p, plan, scales);
          const uint32_t at_stage = static_cast<uint32_t>(stage) * StageOf::kBytes;
          const auto add = [&]<bool kAll>(std::bool_constant<kAll>) {
            warp_sums.template add_block<kAll>(my_codes + at_stage, my_slots + at_stage, my_x + at_stage, lane, scales,
                                               walk, begins, run == 1, my_tiles);
          };
          if (my_tiles == kTiles) {
            add(std::true_type{});
          } else if (my_tiles > 0) {
            add(std::false_type{});
          }
          begins = false;
          if (++stage == plan.stages) stage = 0;
        } while (--run > 0);
        if constexpr (!kFine) {
          warp_sums.end_group();
          if (walk.left == 0) {
            walk.left = scales.units_of_group;
            begins = true;
          }
        }
      }
#pragma unroll
      for (int s = 0; s < Warps::kStrips; ++s) {
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
        finish_sums<typename Codes::Element>(p, aligned, token0 + token, n, [&](int64_t column, Vector& v) {
          load<true>(sums + token * kStride + (column - strip0 * kStripRows), kVector, v);
        });
      }
    }
    __syncthreads();  // the sums of the next tile take their place
  }
}

// An instance; fine: whether it is one for groups that end anywhere.
inline Status launch(void (*kernel)(WeightOnlyGemmParams, GemmPlan, ScaleSource, Alignment, float*), bool fine,
                     const WeightOnlyJob& job, const Queue& queue) {
  return cuda::launch(kernel, dim3(static_cast<unsigned>(job.plan.blocks)), dim3(kGemmThreads),
                      static_cast<size_t>(job.plan.shared_bytes), queue, job.p, job.plan, ScaleSource(job.p, fine),
                      job.aligned, job.sums);
}

}  // namespace qops::cuda::tiling
