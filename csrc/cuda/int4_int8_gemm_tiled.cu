// int4_int8_gemm: y = R(fmaf(s_x[m], total, bias[n])), total the sum over 8 slices of K of fmaf(s, float(sum), total)
// over the groups of a slice, sum an exact integer; and what becomes of it (Epilogue of kernels.h) before it is stored.
//
// Idea. Tiles of up to 16, 32, 64 or 128 tokens x 128 rows of w, as in int4_gemm_tiled.cu: w is the A operand, 8 warps
// share a ring of stages of 64 columns that runs on from item to item, sums of a slice stay in registers and those of
// the slices before in shared memory, and tiles that do not fill the GPU are shared by 2, 4 or 8 blocks, whose slices a
// second kernel adds. What is new is int8: mma.m16n8k32 makes twice the products of a bfloat16 one, eight codes become
// a fragment by 3 instructions instead of 11, and a token takes half of the bytes. The packed weight is that of
// int4_gemm; x has to have its bytes in another order (int4_int8_fragment.cuh). It gets it in the ring: a thread
// reorders the 16 bytes that it has copied itself, one stage ahead, while codes come from shared memory; no barrier and
// no launch more. On the way it sums them, for weights with offsets. (A kernel of its own would read and write x once
// more and cost a launch.)
// One kernel serves every kind of weight: what differs is a branch that all threads take alike.
//
// Bytes and operations of a stage, 16 / 32 / 64 / 128 tokens, groups of 128, on sm_90a (bench/results/SLOTS.md; bounds
// from the machine code, not measurements):
//   from DRAM          4 KB of codes: 325 cycles of a multiprocessor's share
//   issue slots        249 / 301 / 363 / 500 cycles at 4 a cycle
//   tensor cores       52 / 103 / 206 / 413 cycles at the 62 % of their rate that mma.sync reaches: half of int4_gemm's
//   shared memory      272 / 336 / 368 / 592 cycles: copies in, codes and x out, x read and written to be reordered
//   in flight          of up to 64 tokens, two blocks on a multiprocessor: 72 or 56 KB of codes on sm_90
// So up to 32 tokens weights bound the product, beyond that issue slots, of which a sum of a group takes two (taken
// down from the number where it began, and scaled), about as many as its products. For few rows int4_gemm's decode
// kernel issues half as many for as many codes: a kernel of that shape is what this operator lacks.
#include "cuda/int4_int8_gemm.cuh"

namespace qops::cuda::int4_int8 {
namespace {

static_assert(kTileStrips == kGemmWarps);  // each warp copies one
#if defined(__CUDA_ARCH__)
constexpr int kArch = __CUDA_ARCH__ / 10;
#else
constexpr int kArch = 90;  // nobody reads the host's
#endif

// How the warps of a block share a tile.
template <int kTokens>
struct Grid {
  static constexpr int kOfTokens = warps_of_tokens(kTokens), kOfRows = kGemmWarps / kOfTokens;
  static constexpr int kStrips = kTileStrips / kOfRows, kTiles = kTokens / 8 / kOfTokens;
  // Whether a warp leaves out tiles of eight tokens without tokens: where weights do not bound the product.
  static constexpr bool kSkips = kTokens > 64;
};

// A stage of the ring.
template <int kTokens, bool kFine>
struct Stage {
  static constexpr int kScaleBytes = scale_bytes_of_strip(kFine);
  static constexpr int kSlotsAt = kTileStrips * int4::kBlockBytes;
  static constexpr int kXAt = kSlotsAt + kTileStrips * kScaleBytes;
  static constexpr int kSumsAt = kXAt + kTokens * int8::kTokenBytes;
  static constexpr int kBytes = stage_bytes(kTokens, kFine);
};

// 16 bytes of x a thread and 64 tokens, of the stages that a thread copies and reorders.
constexpr int kChunksOfToken = int8::kTokenBytes / 16, kRowsAtOnce = kGemmThreads / kChunksOfToken;
template <int kTokens>
inline constexpr int kCopies = (kTokens + kRowsAtOnce - 1) / kRowsAtOnce;
QOPS_DEVICE int first_token() { return static_cast<int>(threadIdx.x) / kChunksOfToken; }
QOPS_DEVICE int chunk_of_thread() { return static_cast<int>(threadIdx.x) % kChunksOfToken; }
// Whether there is a token for this thread.
template <int kTokens>
QOPS_DEVICE bool has_chunks() {
  return kTokens >= kRowsAtOnce || first_token() < kTokens;
}
static_assert(kRowsAtOnce % 8 == 0);  // so each has the same permutation of chunks

// What this thread copies of the items of its block, one stage after the other: a chunk of a block of codes, some
// chunks of scales, some of x.
template <int kTokens, bool kFine>
class Source {
 public:
  QOPS_DEVICE Source(uint32_t ring, int stages)
      : policy_(ptx::policy_evict_first()),
        codes_to_(held(ring + threadIdx.x * int4::kLaneBytes, lane())),
        x_to_(held(ring + StageOf::kXAt + int8::token_place(first_token(), chunk_of_thread()), lane())),
        ring_bytes_(static_cast<uint32_t>(stages * StageOf::kBytes)),
        warp_(static_cast<int>(uniform(threadIdx.x / 32))),
        item_(static_cast<int>(blockIdx.x)) {}

  // Begins to copy the next block of 64 columns, if there is one. Commits in any case, as those who wait count commits.
  QOPS_DEVICE void copy_next(const Int4Int8Job& job, const ScaleSource& scales) {
    if (left_ == 0) enter_next_item(job, scales);
    if (left_ > 0) {
      --left_;
      // Weights that other tiles of tokens read as well are to stay in L2.
      if (job.is_read_once != 0) {
        copy_codes(codes_to_ + at_, codes_, policy_);
      } else {
        ptx::cp_async_cg(codes_to_ + at_, codes_);
      }
      copy_tokens(job.p);
      copy_scales(scales);
      at_ = at_ + StageOf::kBytes == ring_bytes_ ? 0 : at_ + StageOf::kBytes;
      codes_ += int4::kBlockBytes;
    }
    ptx::cp_async_commit();
  }

  // Of this thread's first chunk of x in the first stage.
  QOPS_DEVICE uint32_t chunk() const { return x_to_; }

 private:
  using StageOf = Stage<kTokens, kFine>;

  static QOPS_DEVICE int lane() { return threadIdx.x % 32; }

  QOPS_DEVICE void copy_tokens(const Int4Int8GemmParams& p) {
#pragma unroll
    for (int i = 0; i < kCopies<kTokens>; ++i) {
      if (i >= copies_) break;
      const uint32_t target = x_to_ + at_ + i * kRowsAtOnce * int8::kTokenBytes;
      if (columns_left_ >= int4::kBlockColumns) {
        ptx::cp_async_cg(target, x_[i]);
      } else {  // K ends at a multiple of 8
        const int left = static_cast<int>(held(static_cast<uint32_t>(columns_left_), lane())) - 16 * chunk_of_thread();
        ptx::cp_async_cg_zfill(target, left > 0 ? x_[i] : p.x, static_cast<uint32_t>(min(max(left, 0), 16)));
      }
      x_[i] += int4::kBlockColumns;
    }
    columns_left_ -= int4::kBlockColumns;
  }

  QOPS_DEVICE void copy_scales(const ScaleSource& scales) {
    const uint32_t target =
        codes_to_ + at_ + StageOf::kSlotsAt + static_cast<uint32_t>(warp_ * (StageOf::kScaleBytes - int4::kBlockBytes));
    if constexpr (kFine) {
      const int group = walk_.group, touched = walk_.next_block(scales);
      scales.template copy<true>(target - lane() * int4::kLaneBytes, strip_, group, min(touched, scales.groups - group),
                                 lane());
    } else {
      // In the first block of each group alone.
      if (until_scales_ == 0) {
        if (scale_bytes_ > 0) ptx::cp_async_cg(target, scales_);
        scales_ += scale_bytes_;
        until_scales_ = scales.units_of_group;
      }
      --until_scales_;
    }
  }

  QOPS_DEVICE void enter_next_item(const Int4Int8Job& job, const ScaleSource& scales) {
    Item item{};
    int begin = 0;
    const int items = static_cast<int>(job.plan.items());
    for (; left_ == 0 && item_ < items; item_ += static_cast<int>(gridDim.x)) {
      item = job.plan.item(item_);
      begin = static_cast<int>(job.slices.begin(item.slice0));
      left_ = static_cast<int>(job.slices.begin(item.slice0 + item.slices)) - begin;
    }
    left_ = static_cast<int>(uniform(static_cast<uint32_t>(left_)));
    if (left_ == 0) return;
    const Int4Int8GemmParams& p = job.p;
    const TilePosition at = job.plan.position(item.tile);
    // Those that the last tile lacks are the last one once more, whose sums nobody reads.
    strip_ = min(static_cast<int>(at.row_tile) * kTileStrips + warp_, static_cast<int>(int4::strips(p.n)) - 1);
    codes_ = static_cast<const uint8_t*>(p.packed) + strip_ * int4::strip_bytes(p.k) +
             int64_t{begin} * int4::kBlockBytes + lane() * int4::kLaneBytes;
    columns_left_ = static_cast<int>(p.k) - begin * int4::kBlockColumns;
    // A warp has eight tokens at a time; those past M are the last one.
    const int64_t token0 = at.token_tile * job.plan.live, live = min(p.x_rows.count - token0, int64_t{job.plan.live});
    copies_ = 0;
#pragma unroll
    for (int i = 0; i < kCopies<kTokens>; ++i) {
      const int first = 8 * warp_ + i * kRowsAtOnce;
      if (first >= live) break;
      copies_ = i + 1;
      const int64_t m = token0 + min(int64_t{first_token() + i * kRowsAtOnce}, live - 1);
      x_[i] =
          static_cast<const uint8_t*>(p.x) + p.x_rows.offset(m) + begin * int4::kBlockColumns + 16 * chunk_of_thread();
    }
    if constexpr (kFine) {
      walk_.seek(scales, begin);
    } else {
      constexpr int kPieces = ScaleSource::kPieces<kFine>;
      const int at_piece = 16 * (lane() % (kPieces / 2));
      const bool of_zeros = lane() >= kPieces / 2;
      scale_bytes_ = of_zeros ? scales.zero_bytes : scales.scale_bytes;
      if (lane() >= kPieces || at_piece >= static_cast<int>(scale_bytes_)) scale_bytes_ = 0;
      scales_ = (of_zeros ? scales.zeros : scales.scales) +
                (int64_t{strip_} * scales.groups + begin / scales.units_of_group) * scale_bytes_ + at_piece;
      until_scales_ = 0;
    }
  }

  uint64_t policy_;
  uint32_t codes_to_, x_to_;  // of this thread in the first stage
  uint32_t at_ = 0, ring_bytes_;
  int warp_;
  int item_;      // the next one
  int left_ = 0;  // blocks of the item
  int strip_;     // of this warp
  const uint8_t* codes_;
  int copies_;                          // of x, of this warp
  int columns_left_;                    // of a row of x, from the block on
  const uint8_t* x_[kCopies<kTokens>];  // chunks of this thread
  const uint8_t* scales_;               // of the lane in the next group
  uint32_t scale_bytes_;                // of a group; 0: the lane copies none
  int until_scales_;                    // blocks
  GroupWalk<true> walk_;                // where groups may end in a block
};

// Sums of x, of weights with offsets: of the tokens of a thread's chunks in the group so far.
template <int kTokens>
struct GroupSums {
  int32_t of[kCopies<kTokens>] = {};
};

// The chunks of x of this thread in a stage, which it has copied itself: from memory's order to that of the fragments.
template <int kTokens, bool kFine>
class Chunks {
 public:
  // at: of the first chunk.
  QOPS_DEVICE explicit Chunks(const uint8_t* at) {
    if (!has_chunks<kTokens>()) return;
#pragma unroll
    for (int i = 0; i < kCopies<kTokens>; ++i) x_[i] = *reinterpret_cast<const uint4*>(at + i * kNext);
  }

  // left: units (of GroupWalk) of the group that are still to come, all of them where the stage begins one.
  QOPS_DEVICE void store(uint8_t* at, uint8_t* stage, const ScaleSource& scales, int left,
                         GroupSums<kTokens>& sums) const {
    if (!has_chunks<kTokens>()) return;
#pragma unroll
    for (int i = 0; i < kCopies<kTokens>; ++i) {
      *reinterpret_cast<uint4*>(at + i * kNext) = interleaved(x_[i]);
    }
    if (!has_float_zeros(scales.kind)) return;
#pragma unroll
    for (int i = 0; i < kCopies<kTokens>; ++i) {
      int32_t* const to = reinterpret_cast<int32_t*>(stage + StageOf::kSumsAt) + first_token() + i * kRowsAtOnce;
      // Whole warps, as there are chunks for.
      int32_t sum = sum_of_bytes(x_[i]);
      if constexpr (kFine) {
        int until = left, mine = 0;
#pragma unroll
        for (int chunk = 0; chunk < kChunksOfToken; ++chunk) {
          if (until == scales.units_of_group) sums.of[i] = 0;
          sums.of[i] += __shfl_sync(0xffffffffu, sum, chunk, kChunksOfToken);
          if (chunk == chunk_of_thread()) mine = sums.of[i];
          if (--until == 0) until = scales.units_of_group;
        }
        to[chunk_of_thread() * sums_of_step(kTokens)] = mine;
      } else {
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        sums.of[i] = left == scales.units_of_group ? sum : sums.of[i] + sum;
        if (chunk_of_thread() == 0) *to = sums.of[i];
      }
    }
  }

 private:
  using StageOf = Stage<kTokens, kFine>;
  static constexpr int kNext = kRowsAtOnce * int8::kTokenBytes;

  uint4 x_[kCopies<kTokens>];
};

// Where an item's tile is.
struct Place {
  int64_t tile, token0, column0;
  int live;  // tokens

  QOPS_DEVICE Place(const Int4Int8Job& job, int index) : tile(job.plan.item(index).tile) {
    const TilePosition at = job.plan.position(tile);
    token0 = at.token_tile * job.plan.live;
    column0 = at.row_tile * kTileRows;
    const int64_t left = job.p.x_rows.count - token0;
    live = left < job.plan.live ? static_cast<int>(left) : job.plan.live;
  }
};

constexpr int kFours = kTileRows / 4, kSumStride = sum_stride(kTileStrips);

// What follows is not to keep registers over the products: it works out anew (uniform()) where its tile is.
// To scratch, for the kernel that adds slices.
QOPS_DEVICE void store_slice(const Int4Int8Job& job, int index, int slice, const float* sums) {
  const GemmPlan& plan = job.plan;
  const Place at(job, static_cast<int>(uniform(static_cast<uint32_t>(index))));
  float* to = job.sums + (slice * (plan.tiles() - plan.whole) + at.tile - plan.whole) * plan.live * kTileRows;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < at.live * kFours; i += kGemmThreads) {
    const float4 four = *reinterpret_cast<const float4*>(sums + i / kFours * kSumStride + i % kFours * 4);
    reinterpret_cast<float4*>(to)[i] = four;
  }
  __syncthreads();  // those of the next slice or tile take their place
}

// y of a tile whose sums are complete.
QOPS_DEVICE void finish_tile(const Int4Int8Job& job, int index, const float* sums) {
  const Place at(job, static_cast<int>(uniform(static_cast<uint32_t>(index))));
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < at.live * kFours; i += kGemmThreads) {
    const int token = i / kFours;
    const int64_t n = at.column0 + i % kFours * 4;
    if (n >= job.p.n) continue;
    finish_sums(job, at.token0 + token, n, [&](int64_t column, float (&t)[4]) {
      const float4 four = *reinterpret_cast<const float4*>(sums + token * kSumStride + (column - at.column0));
      t[0] = four.x, t[1] = four.y, t[2] = four.z, t[3] = four.w;
    });
  }
  __syncthreads();  // the sums of the next tile take their place
}

}  // namespace
}  // namespace qops::cuda::int4_int8

namespace qops::cuda {
namespace {

template <int kTokens, bool kFine>
__global__ void __launch_bounds__(kGemmThreads, int4_int8::blocks_of_multiprocessor(kTokens, int4_int8::kArch))
    int4_int8_gemm_kernel(const __grid_constant__ Int4Int8Job job, const __grid_constant__ ScaleSource scales) {
  QOPS_DYNAMIC_SHARED(shared);
  using Warps = int4_int8::Grid<kTokens>;
  using StageOf = int4_int8::Stage<kTokens, kFine>;
  constexpr int kTiles = Warps::kTiles;
  const GemmPlan& plan = job.plan;
  const int lane = threadIdx.x % 32, warp = static_cast<int>(uniform(threadIdx.x / 32));
  float* sums = reinterpret_cast<float*>(shared);
  uint8_t* ring = shared + kTokens * int4_int8::kSumStride * sizeof(float);
  const uint32_t ring_address = ptx::shared_address(ring);

  if (plan.whole < plan.tiles()) let_second_kernel_start();  // behind the first copies registers are short
  int4_int8::Source<kTokens, kFine> source(ring_address, plan.stages);
  for (int i = 0; i + 1 < plan.stages; ++i) source.copy_next(job, scales);
  wait_for_stage(plan.stages);
  int4_int8::GroupSums<kTokens> x_group;
  uint8_t* const my_chunk = ring + (source.chunk() - ring_address);
  int4_int8::Chunks<kTokens, kFine>(my_chunk).store(my_chunk, ring, scales, scales.units_of_group, x_group);
  int4_int8::WarpSums<Warps::kStrips, kTiles, kFine> warp_sums;
  const int my_strip = warp % Warps::kOfRows * Warps::kStrips;
  const uint8_t* my_codes = ring + my_strip * int4::kBlockBytes;
  const uint8_t* my_slots = ring + StageOf::kSlotsAt + my_strip * StageOf::kScaleBytes;
  const int ring_bytes = plan.stages * StageOf::kBytes;
  int stage = 0;  // bytes from the first one
  for (int index = blockIdx.x; index < static_cast<int>(plan.items()); index += gridDim.x) {
    const Item item = plan.item(index);
    // Where some are left out, eights of tokens are dealt evenly.
    const int eights = Warps::kSkips ? (int4_int8::Place(job, index).live + 7) / 8 : kTokens / 8;
    const int most = (eights + Warps::kOfTokens - 1) / Warps::kOfTokens, my_first = warp / Warps::kOfRows * most;
    const int my_tiles = min(most, eights - my_first);
    const uint32_t my_x =
        held(ring_address + StageOf::kXAt + 8 * my_first * int8::kTokenBytes + int8::token_address(lane), lane);
    const uint8_t* my_x_sums = ring + StageOf::kSumsAt + 4 * (8 * my_first + sum_token(lane, 0));
    GroupWalk<true> walk;  // where groups may end in a block
    if constexpr (kFine) walk.seek(scales, static_cast<int>(job.slices.begin(item.slice0)));
    const bool is_whole = index < plan.whole;
    // Of one group there are no slices, and what blocks share are integers.
    const bool hands_on = job.slices.is_one_group && !is_whole;
    const int step = job.slices.is_one_group ? item.slices : 1;
    for (int slice = item.slice0; slice < item.slice0 + item.slices; slice += step) {
      uint32_t left = uniform(job.slices.begin(slice + step) - job.slices.begin(slice));
      warp_sums.begin_slice(job.format);
      while (left > 0) {
        // Blocks of a group, which slices do not divide, or all.
        uint32_t run = kFine ? left : min(left, static_cast<uint32_t>(scales.units_of_group));
        left -= run;
        bool begins = true;
        int last = 0;  // stage
        do {
          // What all have copied and reordered is there; and all have read the stage that is filled now.
          __syncthreads();
          source.copy_next(job, scales);
          wait_for_stage(plan.stages);  // the next one has landed
          const int next = stage + StageOf::kBytes == ring_bytes ? 0 : stage + StageOf::kBytes;
          const int4_int8::Chunks<kTokens, kFine> chunks(my_chunk + next);
          last = stage;
          const auto reorder = [&] {
            // The next block begins a group where the last one of a group or a slice is behind.
            int until = run == 1 ? scales.units_of_group : 0;
            if constexpr (kFine) {
              GroupWalk<true> ahead = walk;
              ahead.next_block(scales);
              if (run > 1) until = ahead.left;
            }
            chunks.store(my_chunk + next, ring + next, scales, until, x_group);
          };
          const auto add = [&]<bool kAll, bool kZeros>(std::bool_constant<kAll>, std::bool_constant<kZeros>) {
            warp_sums.template add_block<kAll, kZeros, kTokens>(
                my_codes + stage, my_slots + stage, my_x + static_cast<uint32_t>(stage), my_x_sums + stage, lane,
                scales, job.format, walk, begins, my_tiles, reorder);
          };
          const auto add_tiles = [&](auto zeros) {
            if (!Warps::kSkips || my_tiles == kTiles) {
              add(std::true_type{}, zeros);
            } else {
              add(std::false_type{}, zeros);
            }
          };
          if (scales.kind == WeightKind::kZeroPoint) {
            add_tiles(std::true_type{});
          } else {
            add_tiles(std::false_type{});
          }
          begins = false;
          stage = next;
        } while (--run > 0);
        if (!kFine && !hands_on) warp_sums.end_group(scales, job.format, my_x_sums + last);
      }
      float* const my_sums =
          sums + (8 * my_first + sum_token(lane, 0)) * int4_int8::kSumStride + my_strip * kStripRows + lane / 4;
      const auto write = [&](const auto& value) {
        warp_sums.for_each(Warps::kSkips ? my_tiles : kTiles, [&](int s, int t, int i) {
          float& sum = my_sums[(8 * t + sum_token(0, i)) * int4_int8::kSumStride + s * kStripRows + sum_row(0, i)];
          sum = value(sum, s, t, i);
        });
      };
      if (hands_on) {
        write([&](float, int s, int t, int i) { return __int_as_float(warp_sums.part[s][t][i]); });
      } else if (is_whole && slice > 0) {
        write([&](float sum, int s, int t, int i) { return sum + warp_sums.total[s][t][i]; });
      } else {
        write([&](float, int s, int t, int i) { return warp_sums.total[s][t][i]; });
      }
      if (!is_whole) int4_int8::store_slice(job, index, slice / step, sums);
    }
    if (is_whole) int4_int8::finish_tile(job, index, sums);
  }
}

template <int kTokens>
Status run(const Int4Int8Job& job, const Queue& queue) {
  const auto kernel = is_fine(job.p.k, job.p.group_size) ? &int4_int8_gemm_kernel<kTokens, true>
                                                         : &int4_int8_gemm_kernel<kTokens, false>;
  return launch(kernel, dim3(static_cast<unsigned>(job.plan.blocks)), dim3(kGemmThreads),
                static_cast<size_t>(job.plan.shared_bytes), queue, job,
                ScaleSource(job.p, is_fine(job.p.k, job.p.group_size)));
}

}  // namespace

Status int4_int8_gemm_tiled(const Int4Int8Job& job, const Queue& queue) {
  switch (job.plan.tokens) {
    case 16: return run<16>(job, queue);
    case 32: return run<32>(job, queue);
    case 64: return run<64>(job, queue);
    default: return run<128>(job, queue);
  }
}

}  // namespace qops::cuda
