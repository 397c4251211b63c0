// int4_gemm for up to 16 rows of x: bound by reading the weights.
//
// One block per multiprocessor takes a range of strips. Its 8 warps are the 8 slices of K: each reads the codes of its
// slice of up to 4 strips at a time, a pass, multiplies them with the fragments of x that they share, and keeps all
// sums in registers; so a warp is a stream of its own, with a ring of cp.async stages that nobody else touches, and the
// main loop has no barrier but __syncwarp.
//
//               K, in blocks of 64 columns ->
//               slice 0      slice 1            slice 7
//   w    strip +------------+------------+-----+------------+
//   N     0..3 | warp 0 --> | warp 1 --> | ... | warp 7 --> | pass 0 -.
//   |          +------------+------------+-----+------------+          >  range 0: block 0
//   v     4..6 | warp 0 --> | warp 1 --> | ... | warp 7 --> | pass 1 -'
//              +============+============+=====+============+
//         7..  | ...                                        |            range 1: block 1
//
// Where a pass is done the warps hand its sums on from left to right, in the order of the slices, by named barriers:
// warp 0 stores, each next one adds, warp 7 rounds. Those waits overlap with the copies in flight.
// Where strips are too few for the GPU, 2, 4 or 8 blocks (k_parts) share the slices of a range, and a warp takes a
// share of its strips; sums go to scratch then, and a second kernel adds them in the same order. With k_parts = 2:
//
//               slice 0 .. 3: block 0      slice 4 .. 7: block 1
//              +------+------+---+------++------+------+---+------+
//       strips | wp 0 | wp 1 | 2 | wp 3 || wp 0 | wp 1 | 2 | wp 3 | first half of range 0
//              +------+------+---+------++------+------+---+------+
//              | wp 4 | wp 5 | 6 | wp 7 || wp 4 | wp 5 | 6 | wp 7 | second half
//              +======+======+===+======++======+======+===+======+
//
// Budget of a stage of a warp, s strips and M tokens (64 columns; s = 4):
//   from DRAM          512 s bytes of codes, each once, in full 512-byte lines; scales once per group
//   from L2            128 M of x: no more than the codes for M <= 4 s (16 at s = 4; 8 at s = 2, as N = 4096 has on 132
//                      multiprocessors, where M = 16 reads twice the bytes of the codes from L2)
//   shared memory      1024 s (codes in and out) + 128 M (x in) + 1024 (M <= 8) or 2048 (x out): at s = 4 between 2.6
//                      (M = 1) and 4 times (M = 16) the bytes of the codes. At 14 bytes of codes a cycle, 3 TB/s over
//                      132 x 1.7 GHz, that is 36 to 56 of the 128 bytes that a cycle can move
//   issue slots        per k16 step and strip, 256 weights, in the machine code of sm_80, 90a and 120: 4 lop3, 1 (fp16)
//                      or 3 shifts, 4 subtractions, 3 of the branch around strips that are not there, 1 or 2 mma, 14
//                      to 19 in all; at 27 weights a cycle 1.5 to 2 of 4 slots
//   in flight          (stages - 1) x 8 x 512 s bytes of codes: 112 KB at 8 stages (sm_90, M <= 8), 64 KB at 5 (sm_80),
//                      32 KB at 3 (99 KB of shared memory)
// M in 17 .. 32 would read 2 bytes of x from L2 for each byte of codes here: the tiled kernel shares x among its warps.
#include "cuda/int4_gemm.cuh"

namespace qops::cuda {
namespace {

constexpr int kFree = kGemmWarps;  // the barrier at which warp 0 learns that the sums have been read
constexpr int kSumStride = sum_stride(kMaxStripsOfWarp);

// What a warp multiplies: `strips` of w over the blocks of one slice of K, in passes of as many strips as it has sums
// for.
struct Share {
  int slice, passes;
  Range strips, blocks;

  QOPS_DEVICE Share(const WeightOnlyGemmParams& p, const GemmPlan& plan, int warp) {
    const int slices_of_block = kSlices / plan.k_parts;
    const Range of_block = part_of({0, int4::strips(p.n)}, blockIdx.x / plan.k_parts, plan.ranges);
    slice = static_cast<int>(blockIdx.x) % plan.k_parts * slices_of_block + warp % slices_of_block;
    strips = part_of(of_block, warp / slices_of_block, plan.k_parts);
    passes = static_cast<int>(ceil_div(strips.size(), static_cast<int>(plan.strips)));
    blocks = blocks_of_slice(int4::blocks(p.k), slice);
  }

  QOPS_DEVICE Range strips_of(int pass) const { return part_of(strips, pass, passes); }
};

// The ring of a warp. A stage: codes of each strip, scales of each strip, 64 columns of x.
template <int kTokens, bool kFine>
struct Ring {
  int slots_at, x_at, stage_bytes;
  uint8_t* at;
  uint32_t address;

  QOPS_DEVICE Ring(const GemmPlan& plan, int warp, uint8_t* rings) {
    const int strips = static_cast<int>(plan.strips);
    slots_at = strips * int4::kBlockBytes;
    x_at = slots_at + strips * scale_bytes_of_strip(kFine);
    stage_bytes = x_at + kTokens * kTokenStageBytes;
    at = rings + warp * plan.stages * stage_bytes;
    address = ptx::shared_address(at);
  }
};

// What a warp copies into its ring: the blocks of its slice, pass after pass.
template <class T, int kTokens, bool kFine>
class Source {
 public:
  QOPS_DEVICE Source(const WeightOnlyGemmParams& p, const Share& share, int lane)
      : policy_(ptx::policy_evict_first()),
        rows_(static_cast<int>(p.x_rows.count)),
        pass_(share.blocks.size() == 0 ? share.passes : 0),
        block_(share.blocks.begin) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int token = lane / 8 + 4 * i;
      x_[i] = static_cast<const T*>(p.x) + (token < rows_ ? p.x_rows.offset(token) : 0);
    }
  }

  // Begins to copy the next block, if there is one. Commits in any case, as those who wait count commits.
  QOPS_DEVICE void copy_next(const WeightOnlyGemmParams& p, const GemmPlan& plan, const ScaleSource& scales,
                             const Share& share, const Ring<kTokens, kFine>& ring, int lane) {
    if (pass_ < share.passes) {
      const bool is_first = block_ == share.blocks.begin;
      if (is_first) {
        strips_ = share.strips_of(pass_);
        walk_.seek(scales, static_cast<int>(block_));
      }
      const uint32_t stage = ring.address + stage_ * ring.stage_bytes;
      copy_strips(p, stage, lane);
      copy_tokens(p, stage + ring.x_at, lane);
      copy_scales(scales, stage + ring.slots_at, is_first, lane);
      if (++block_ == share.blocks.end) {
        block_ = share.blocks.begin;
        ++pass_;
      }
      if (++stage_ == plan.stages) stage_ = 0;
    }
    ptx::cp_async_commit();
  }

 private:
  static constexpr int kCopies = kTokens / 4;  // of x by each lane and stage

  QOPS_DEVICE void copy_strips(const WeightOnlyGemmParams& p, uint32_t target, int lane) const {
    const int64_t strip_bytes = int4::strip_bytes(p.k);
    const uint8_t* codes = static_cast<const uint8_t*>(p.packed) + strips_.begin * strip_bytes +
                           block_ * int4::kBlockBytes + lane * int4::kLaneBytes;
    const int count = static_cast<int>(strips_.size());
#pragma unroll
    for (int s = 0; s < kMaxStripsOfWarp; ++s) {
      if (s < count) {
        copy_codes(target + s * int4::kBlockBytes + lane * int4::kLaneBytes, codes + s * strip_bytes, policy_);
      }
    }
  }

  QOPS_DEVICE void copy_tokens(const WeightOnlyGemmParams& p, uint32_t target, int lane) const {
    const int64_t column = block_ * int4::kBlockColumns + lane % 8 * 8;
    const bool inside = column < p.k;  // K ends at a multiple of 8
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int token = lane / 8 + 4 * i;
      if (token < rows_) {
        ptx::cp_async_cg_zfill(target + x_place(token, lane % 8), x_[i] + (inside ? column : 0), inside ? 16 : 0);
      }
    }
  }

  // Where groups are whole blocks, in the first block of each group alone.
  QOPS_DEVICE void copy_scales(const ScaleSource& scales, uint32_t target, bool is_first, int lane) {
    const bool begins = walk_.begins(scales);
    const int group = walk_.group, touched = walk_.next_block(scales);
    if (!kFine && !is_first && !begins) return;
    constexpr int kPieces = ScaleSource::kPieces<kFine>;
    const int count = static_cast<int>(strips_.size());
#pragma unroll
    for (int s = 0; s < kMaxStripsOfWarp; s += 32 / kPieces) {
      const int strip = s + lane / kPieces;
      if (strip < count) {
        scales.template copy<kFine>(target + strip * scale_bytes_of_strip(kFine), strips_.begin + strip, group,
                                    min(touched, scales.groups - group), lane % kPieces);
      }
    }
  }

  uint64_t policy_;
  int rows_;
  const T* x_[kCopies];
  int pass_, stage_ = 0;
  int64_t block_;
  Range strips_{};  // of the pass
  GroupWalk<kFine> walk_;
};

// Calls f(token, row, sum) for the sums of a pass that a lane has; row: from the first one of its strips on.
template <class Sums, class F>
QOPS_DEVICE void for_sums(const Sums& sums, int count, int lane, const F& f) {
#pragma unroll
  for (int s = 0; s < Sums::kStripCount; ++s) {
    if (s >= count) continue;
#pragma unroll
    for (int t = 0; t < Sums::kTileCount; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        f(8 * t + sum_token(lane, i), s * kStripRows + sum_row(lane, i), sums.total[s][t][i]);
      }
    }
  }
}

// To scratch, for the kernel that adds slices.
template <class Sums>
QOPS_DEVICE void store_slice(const WeightOnlyGemmParams& p, const Sums& sums, int slice, Range strips, int lane,
                             float* slices) {
  const int rows = static_cast<int>(p.x_rows.count);
  const int64_t columns = int4::strips(p.n) * kStripRows;
  for_sums(sums, static_cast<int>(strips.size()), lane, [&](int token, int row, float total) {
    if (token < rows) {
      slices[(static_cast<int64_t>(slice) * rows + token) * columns + strips.begin * kStripRows + row] = total;
    }
  });
}

// Adds the sums of this slice to those of the ones before, which lie in shared memory. The last warp holds all then,
// and returns true.
template <class Sums>
QOPS_DEVICE bool hand_on(const Sums& sums, int count, int warp, int lane, bool is_first_pass, float* shared_sums) {
  if (warp > 0) {
    ptx::bar_sync(warp, 64);  // warp - 1 has passed the sums on
  } else if (!is_first_pass) {
    ptx::bar_sync(kFree, 64);
  }
  for_sums(sums, count, lane, [&](int token, int row, float total) {
    float& sum = shared_sums[token * kSumStride + row];
    sum = warp == 0 ? total : sum + total;
  });
  if (warp < kGemmWarps - 1) {
    ptx::bar_arrive(warp + 1, 64);
    return false;
  }
  __syncwarp();
  return true;
}

// By one warp: y of the strips whose sums are complete.
template <class T>
QOPS_DEVICE void finish_strips(const WeightOnlyGemmParams& p, Alignment aligned, Range strips, int lane,
                               const float* shared_sums) {
  const int rows = static_cast<int>(p.x_rows.count);
  const int chunks = static_cast<int>(strips.size()) * (kStripRows / kVector);
  for (int i = lane; i < rows * chunks; i += 32) {
    const int token = i / chunks, row = i % chunks * kVector;
    const int64_t n = strips.begin * kStripRows + row;
    if (n < p.n) {
      finish_sums<T>(p, aligned, token, n, [&](int64_t column, Vector& v) {
        load<true>(shared_sums + token * kSumStride + (column - strips.begin * kStripRows), kVector, v);
      });
    }
  }
}

template <class T, int kTiles, bool kFine, bool kOffset>
__global__ void __launch_bounds__(kGemmThreads, 1)
    decode_kernel(const __grid_constant__ WeightOnlyGemmParams p, const __grid_constant__ GemmPlan plan,
                  const __grid_constant__ ScaleSource scales, const Alignment aligned, float* slices) {
  QOPS_DYNAMIC_SHARED(shared);
  constexpr int kTokens = 8 * kTiles;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* shared_sums = reinterpret_cast<float*>(shared);
  const Share share(p, plan, warp);
  const Ring<kTokens, kFine> ring(plan, warp, shared + kTokens * kSumStride * sizeof(float));
  Source<T, kTokens, kFine> source(p, share, lane);
  for (int i = 1; i < plan.stages; ++i) source.copy_next(p, plan, scales, share, ring, lane);

  WarpSums<T, kMaxStripsOfWarp, kTiles, kFine, kOffset> sums;
  GroupWalk<kFine> walk;
  int stage = 0;
  for (int pass = 0; pass < share.passes; ++pass) {
    const Range strips = share.strips_of(pass), blocks = share.blocks;
    const int count = static_cast<int>(strips.size());
    sums.begin_slice();
    if (blocks.size() > 0) walk.seek(scales, static_cast<int>(blocks.begin));
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      wait_for_copies(plan.stages - 2);
      __syncwarp();  // what all lanes have copied is there; and all have read the stage that is filled next
      source.copy_next(p, plan, scales, share, ring, lane);
      const int at = stage * ring.stage_bytes;
      sums.add_block(ring.at + at, ring.at + at + ring.slots_at, ring.address + at + ring.x_at + x_address(0, 0, lane),
                     lane, count, scales, walk, block == blocks.begin, block + 1 == blocks.end);
      if (++stage == plan.stages) stage = 0;
    }
    if (plan.k_parts > 1) {
      store_slice(p, sums, share.slice, strips, lane, slices);
    } else if (hand_on(sums, count, warp, lane, pass == 0, shared_sums)) {
      finish_strips<T>(p, aligned, strips, lane, shared_sums);
      if (pass + 1 < share.passes) ptx::bar_arrive(kFree, 64);
    }
  }
}

}  // namespace

Status int4_gemm_decode(const Int4Job& job, const Queue& queue) {
  return with_int4_kernel(job.p, [&](auto element, auto fine, auto offset) {
    using T = decltype(element);
    const auto kernel = job.plan.tokens == 8 ? &decode_kernel<T, 1, fine.value, offset.value>
                                             : &decode_kernel<T, 2, fine.value, offset.value>;
    return launch(kernel, dim3(static_cast<unsigned>(job.plan.blocks)), dim3(kGemmThreads),
                  static_cast<size_t>(job.plan.shared_bytes), queue, job.p, job.plan, ScaleSource(job.p), job.aligned,
                  job.sums);
  });
}

}  // namespace qops::cuda
