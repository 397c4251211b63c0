// int4_gemm for up to 24 rows of x, or 16 where groups are fine, and int8_weight_only_gemm for up to 16: bound by
// reading the weights.
//
// One block per multiprocessor takes a range of strips. Its 8 warps are the 8 slices of K: each reads the codes of its
// slice of 4 strips at a time, or of 2, a pass, multiplies them with the fragments of x that they share, and keeps all
// sums in registers; so a warp is a stream of its own, with rings of cp.async stages that nobody else touches, and the
// main loop has no barrier but __syncwarp. Where x of a slice fits into shared memory beside the ring of codes it is
// copied once for all passes.
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
// Budget of a stage of a warp, s strips and M tokens (64 columns, groups of 128):
//   from DRAM          512 s bytes of codes, each once, in full 512-byte lines; scales once per group
//   from L2            128 M of x: no more than the codes for M <= 4 s (16 at s = 4; 8 at s = 2, as N = 4096 has on 132
//                      multiprocessors, where M = 16 reads twice the bytes of the codes from L2), at M = 24 and s = 4
//                      half as many more: 216 cycles at 24 bytes a cycle where the bytes from DRAM take 162
//   shared memory      1024 s (codes in and out) + 128 M (x in) + 1024 for each 8 of M (x out): at s = 4 between 2.6
//                      (M = 1) and 5 times (M = 24) the bytes of the codes. At 14 bytes of codes a cycle, 3 TB/s over
//                      132 x 1.7 GHz, that is 36 to 70 of the 128 bytes that a cycle can move
//   issue slots        bfloat16 on sm_90a (bench/results/SLOTS.md): 296 for s = 4 and 185 for s = 2 (M <= 8), 331 and
//                      208 (M <= 16), 367 and 225 (M <= 24). Of the 185, 88 make fragments of the codes and 8
//                      multiply; at 4 a cycle they are 46 cycles where the bytes from DRAM take 81, and 74 at 62 %
//   in flight          (stages - 1) x 8 x 512 s bytes of codes: 112 KB at 8 stages of 4 strips (sm_90, M <= 8), 48 KB
//                      at 4 (sm_80; sm_90, M > 16), 32 KB at 3 (99 KB of shared memory)
// What keeps the loop short: strips and stages of a ring are few numbers that are compiled in; pointers run; branches
// that all lanes of a warp take alike are known to be such (uniform()), so that nothing is set up for their meeting
// again; what the compiler would work out anew in each step stands behind a shuffle (held()); strips that a last pass
// lacks are copied twice instead of branched around.
// M in 25 .. 32 would read 2 bytes of x from L2 for each byte of codes here: the tiled kernel shares x among its warps.
#pragma once

#include "cuda/weight_only_gemm.cuh"

namespace qops::cuda::decoding {
inline constexpr int kFree = kGemmWarps;  // the barrier at which warp 0 learns that the sums have been read

// What a warp multiplies, in passes of kStrips strips. The last pass may have fewer: those that are missing are the
// last one once more, whose sums nobody reads, so that the loop has no branch around them.
template <int kStrips>
struct Share : DecodeShare {
  uint32_t passes;

  QOPS_DEVICE Share(const DecodeWork& work, uint32_t warp)
      : DecodeShare(decode_share(work, blockIdx.x, warp)), passes((strips + kStrips - 1) / kStrips) {
    blocks = uniform(blocks);
  }

  QOPS_DEVICE uint32_t first_of(uint32_t pass) const { return first_strip + pass * kStrips; }
  QOPS_DEVICE int count_of(uint32_t pass) const {
    return static_cast<int>(min(strips - pass * kStrips, uint32_t{kStrips}));
  }
  QOPS_DEVICE uint32_t strip(uint32_t pass, uint32_t i) const {
    return first_strip + min(pass * kStrips + i, strips - 1);
  }
};

// The rings of a warp, in shared memory: of codes and scales of each strip, and of 64 columns of x.
template <class Codes, int kTokens, int kStrips, bool kFine>
struct Rings {
  static constexpr int kScaleBytes = scale_bytes_of_strip(kFine);
  static constexpr int kSlotsAt = kStrips * Codes::kBlockBytes;
  static constexpr int kStageBytes = kSlotsAt + kStrips * kScaleBytes;

  uint8_t* codes;
  uint32_t address, x;  // of both

  QOPS_DEVICE Rings(const DecodeWork& work, uint32_t warp, uint8_t* rings)
      : codes(rings + uniform(warp * work.ring_bytes)),
        address(ptx::shared_address(codes)),
        x(address + work.stages * kStageBytes) {}
};

// Where a warp is in its rings: block by block of its slice, pass after pass.
struct Position {
  uint32_t stage = 0, block = 0;

  QOPS_DEVICE uint32_t x_offset(const DecodeWork& work) const {
    return stage * work.x_of_stage + block * work.x_of_block;
  }
  // To the next block; whether the pass ends.
  QOPS_DEVICE bool next(const DecodeWork& work, uint32_t blocks) {
    if (++stage == static_cast<uint32_t>(work.stages)) stage = 0;
    return ++block == blocks;
  }
};

// What a warp copies into its rings.
template <class Codes, int kTokens, int kStrips, bool kFine>
class Source {
 public:
  using T = typename Codes::Element;
  using WarpShare = Share<kStrips>;
  using WarpRings = Rings<Codes, kTokens, kStrips, kFine>;

  // Begins to copy the first block.
  QOPS_DEVICE Source(const WeightOnlyGemmParams& p, const DecodeWork& work, const ScaleSource& scales,
                     const WarpShare& share, const WarpRings& rings, int lane) {
    const bool is_idle = share.blocks == 0 || share.strips == 0;
    if (!is_idle) copy_first_codes(p, work, share, rings, lane);
    policy_ = ptx::policy_evict_first();
    lane = static_cast<int>(held(static_cast<uint32_t>(lane), lane));  // nothing of what follows comes before
    const int rows = static_cast<int>(p.x_rows.count);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int token = lane / 8 + 4 * i;
      x_[i] = held(static_cast<const T*>(p.x) + (token < rows ? p.x_rows.offset(token) : 0), lane);
    }
    tokens_ = static_cast<int>(held(static_cast<uint32_t>(rows - lane / 8), lane));
    x_to_ = held(rings.x + x_place(Codes::kBits, lane / 8, lane % 8), lane);
    chunk_ = share.first_block * kChunks + lane % 8;
    if (is_idle) {
      pass_ = share.passes;
    } else {
      first_.seek(scales, static_cast<int>(share.first_block));
      find_scales(scales, share, lane);
      copy_tokens(work);
      copy_scales(scales, share, rings, lane);
      advance(p, work, scales, share, lane);
    }
    ptx::cp_async_commit();
  }

  // Begins to copy the next block, if there is one. Commits in any case, as those who wait count commits.
  QOPS_DEVICE void copy_next(const WeightOnlyGemmParams& p, const DecodeWork& work, const ScaleSource& scales,
                             const WarpShare& share, const WarpRings& rings, int lane) {
    if (pass_ < share.passes) {
      copy_strips();
      copy_tokens(work);
      copy_scales(scales, share, rings, lane);
      advance(p, work, scales, share, lane);
    }
    ptx::cp_async_commit();
  }

  // Where groups stand at the first block of the slice.
  QOPS_DEVICE const GroupWalk<kFine>& first() const { return first_; }

 private:
  static constexpr int kCopies = kTokens / 4;  // of x by each lane and stage
  static constexpr int kChunks = int4::kBlockColumns / 8;
  static constexpr int kBytes = Codes::kBlockBytes;

  // With little before the first copy, so that it is on its way soon: no policy, and a shuffle behind it.
  QOPS_DEVICE void copy_first_codes(const WeightOnlyGemmParams& p, const DecodeWork& work, const WarpShare& share,
                                    const WarpRings& rings, int lane) {
    const uint32_t target = rings.address + lane * int4::kLaneBytes;
    codes_[0] = static_cast<const uint8_t*>(p.packed) + lane * int4::kLaneBytes +
                uint64_t{share.first_strip * work.blocks + share.first_block} * kBytes;
    ptx::cp_async_cg(target, codes_[0]);
    codes_to_ = held(target, lane);
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      if (s > 0)
        codes_[s] = codes_[0] + uint64_t{min(static_cast<uint32_t>(s), share.strips - 1) * work.blocks} * kBytes;
#pragma unroll
      for (int at = s == 0 ? kCopyBytes : 0; at < kBytes; at += kCopyBytes) {
        ptx::cp_async_cg(codes_to_ + s * kBytes + at, codes_[s] + at);
      }
    }
  }

  QOPS_DEVICE void find_codes(const WeightOnlyGemmParams& p, const DecodeWork& work, const WarpShare& share, int lane) {
    const uint8_t* packed = static_cast<const uint8_t*>(p.packed) + lane * int4::kLaneBytes;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const uint32_t block = share.strip(pass_, s) * work.blocks + share.first_block;
      codes_[s] = packed + uint64_t{block} * kBytes;
    }
  }

  // Of the first group of the slice. Where groups are whole blocks a lane has a piece of 16 bytes of those of one
  // strip.
  QOPS_DEVICE void find_scales(const ScaleSource& scales, const WarpShare& share, int lane) {
    walk_ = first_;
    if constexpr (!kFine) {
      constexpr int kPieces = ScaleSource::kPieces<kFine>;
      const int piece = lane % kPieces, at = 16 * (piece % (kPieces / 2));
      const bool of_zeros = piece >= kPieces / 2;
      scale_bytes_ = of_zeros ? scales.zero_bytes : scales.scale_bytes;
      has_scales_ = at < static_cast<int>(scale_bytes_) && lane / kPieces < kStrips;
      const int64_t group = int64_t{share.strip(pass_, lane / kPieces)} * scales.groups + walk_.group;
      scales_ = (of_zeros ? scales.zeros : scales.scales) + group * scale_bytes_ + at;
      until_scales_ = 0;
    }
  }

  QOPS_DEVICE void copy_strips() const {
    const uint32_t target = codes_to_ + at_.stage * WarpRings::kStageBytes;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int at = 0; at < kBytes; at += kCopyBytes) copy_codes(target + s * kBytes + at, codes_[s] + at, policy_);
    }
  }

  QOPS_DEVICE void copy_tokens(const DecodeWork& work) const {
    const bool inside = chunk_ < work.chunks;  // K ends at a multiple of 8
    const uint64_t column = uint64_t{min(chunk_, work.chunks - 1)} * 8;
    const uint32_t target = x_to_ + at_.x_offset(work);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      // Four tokens on, chunks have another permutation or the same one.
      constexpr uint32_t kFourOn = x_place(Codes::kBits, 4, 0) - 4 * kTokenStageBytes;
      const uint32_t place = (i % 2 == 0 ? target : target ^ kFourOn) + 4 * i * kTokenStageBytes;
      if (4 * i < tokens_) ptx::cp_async_cg_zfill(place, x_[i] + column, inside ? 16 : 0);
    }
  }

  QOPS_DEVICE void copy_scales(const ScaleSource& scales, const WarpShare& share, const WarpRings& rings, int lane) {
    if constexpr (kFine) {
      const uint32_t slots = rings.address + at_.stage * WarpRings::kStageBytes + WarpRings::kSlotsAt;
      const int group = walk_.group, touched = walk_.next_block(scales);
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        scales.template copy<true>(slots + s * WarpRings::kScaleBytes, share.strip(pass_, s), group,
                                   min(touched, scales.groups - group), lane);
      }
    } else {
      // In the first block of each group alone.
      if (until_scales_ == 0) {
        const uint32_t target = codes_to_ + at_.stage * WarpRings::kStageBytes + WarpRings::kSlotsAt;
        if (has_scales_) ptx::cp_async_cg(target, scales_);
        scales_ += scale_bytes_;
        until_scales_ = walk_.left;
        walk_.left = scales.units_of_group;
      }
      --until_scales_;
    }
  }

  QOPS_DEVICE void advance(const WeightOnlyGemmParams& p, const DecodeWork& work, const ScaleSource& scales,
                           const WarpShare& share, int lane) {
    chunk_ += kChunks;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) codes_[s] += kBytes;
    if (at_.next(work, share.blocks)) {
      at_.block = 0;
      ++pass_;
      chunk_ -= share.blocks * kChunks;
      if (work.keeps_x) tokens_ = 0;  // all of them are there
      find_codes(p, work, share, lane);
      find_scales(scales, share, lane);
    }
  }

  uint64_t policy_;
  uint32_t codes_to_, x_to_;       // of the lane in the first stage
  const uint8_t* codes_[kStrips];  // of the lane
  const uint8_t* scales_;          // of the lane in the next group
  uint32_t scale_bytes_;           // of a group
  bool has_scales_;
  int until_scales_;  // blocks
  const T* x_[kCopies];
  int tokens_;  // of x that are to be copied, from the lane's first one on
  uint32_t pass_ = 0;
  Position at_;
  uint32_t chunk_;  // of the lane, of a row of x
  GroupWalk<kFine> first_, walk_;
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
QOPS_DEVICE void store_slice(const WeightOnlyGemmParams& p, const Sums& sums, uint32_t slice, uint32_t first_strip,
                             int count, int lane, float* slices) {
  const int rows = static_cast<int>(p.x_rows.count);
  const int64_t columns = int4::strips(p.n) * kStripRows;
  for_sums(sums, count, lane, [&](int token, int row, float total) {
    if (token < rows) {
      slices[(int64_t{slice} * rows + token) * columns + int64_t{first_strip} * kStripRows + row] = total;
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
    float& sum = shared_sums[token * sum_stride(Sums::kStripCount) + row];
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
template <class T, int kStrips>
QOPS_DEVICE void finish_strips(const WeightOnlyGemmParams& p, Alignment aligned, uint32_t first_strip, int count,
                               int lane, const float* shared_sums) {
  const int rows = static_cast<int>(p.x_rows.count);
  const int chunks = count * (kStripRows / kVector);
  const int64_t column0 = int64_t{first_strip} * kStripRows;
  for (int i = lane; i < rows * chunks; i += 32) {
    const int token = i / chunks, row = i % chunks * kVector;
    if (column0 + row < p.n) {
      finish_sums<T>(p, aligned, token, column0 + row, [&](int64_t column, Vector& v) {
        load<true>(shared_sums + token * sum_stride(kStrips) + (column - column0), kVector, v);
      });
    }
  }
}

// What a kernel does whose threads are kGemmThreads.
template <class Codes, int kTiles, int kStrips, bool kFine, bool kOffset>
QOPS_DEVICE void decode(const WeightOnlyGemmParams& p, const DecodeWork& work, const ScaleSource& scales,
                        const Alignment& aligned, float* slices) {
  QOPS_DYNAMIC_SHARED(shared);
  constexpr int kTokens = 8 * kTiles;
  const int lane = threadIdx.x % 32, warp = static_cast<int>(uniform(threadIdx.x / 32));
  float* shared_sums = reinterpret_cast<float*>(shared);
  const Share<kStrips> share(work, warp);
  const Rings<Codes, kTokens, kStrips, kFine> rings(work, warp, shared + kTokens * sum_stride(kStrips) * sizeof(float));
  Source<Codes, kTokens, kStrips, kFine> source(p, work, scales, share, rings, lane);
  for (int i = 2; i < work.stages; ++i) source.copy_next(p, work, scales, share, rings, lane);
  if (work.parts_log > 0) let_second_kernel_start();

  WarpSums<Codes, kStrips, kTiles, kFine, kOffset> sums;
  sums.begin();
  const uint32_t x_from = held(rings.x + x_address(Codes::kBits, 0, 0, lane), lane);
  Position at;
  for (uint32_t pass = 0; pass < share.passes; ++pass) {
    sums.begin_slice();
    GroupWalk<kFine> walk = source.first();
    at.block = 0;
    while (at.block < share.blocks) {
      // Blocks of a group, or all.
      const uint32_t left = share.blocks - at.block;
      const uint32_t end = at.block + (kFine ? left : min(left, static_cast<uint32_t>(walk.left)));
      walk.left = kFine ? walk.left : scales.units_of_group;
      bool begins = true, ends = false;
      do {
        wait_for_stage(work.stages);
        __syncwarp();  // what all lanes have copied is there; and all have read the stage that is filled next
        source.copy_next(p, work, scales, share, rings, lane);
        const uint8_t* codes = rings.codes + at.stage * rings.kStageBytes;
        const uint32_t x = x_from + at.x_offset(work);
        sums.add_block(codes, codes + rings.kSlotsAt, x, lane, scales, walk, begins, at.block + 1 == end);
        begins = false;
        ends = at.next(work, end);
      } while (!ends);
      if constexpr (!kFine) sums.end_group();
    }
    const uint32_t first_strip = share.first_of(pass);
    const int count = share.count_of(pass);
    if (work.parts_log > 0) {
      store_slice(p, sums, share.slice, first_strip, count, lane, slices);
    } else if (hand_on(sums, count, warp, lane, pass == 0, shared_sums)) {
      finish_strips<typename Codes::Element, kStrips>(p, aligned, first_strip, count, lane, shared_sums);
      if (pass + 1 < share.passes) ptx::bar_arrive(kFree, 64);
    }
  }
}

// An instance; fine: whether it is one for groups that end anywhere.
inline Status launch(void (*kernel)(WeightOnlyGemmParams, DecodeWork, ScaleSource, Alignment, float*), bool fine,
                     const WeightOnlyJob& job, const Queue& queue) {
  return cuda::launch(kernel, dim3(static_cast<unsigned>(job.plan.blocks)), dim3(kGemmThreads),
                      static_cast<size_t>(job.plan.shared_bytes), queue, job.p, decode_work(job.plan, job.p.n, job.p.k),
                      ScaleSource(job.p, fine), job.aligned, job.sums);
}

}  // namespace qops::cuda::decoding
