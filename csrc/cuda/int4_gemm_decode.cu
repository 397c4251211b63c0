// int4_gemm for up to 16 rows of x: bound by reading the weights.
//
// One block per multiprocessor takes a range of strips. Its 8 warps are the 8 slices of K: each reads the codes of its
// slice of up to 4 strips at a time, multiplies them with the fragments of x that they share, and keeps all sums in
// registers; so a warp is a stream of its own, with a ring of cp.async stages that nobody else touches, and the main
// loop has no barrier but __syncwarp. Where a strip is done the warps pass its sums on, in the order of the slices, by
// named barriers: warp 0 stores, each next one adds, warp 7 rounds. Those waits overlap with the copies in flight.
// Where strips are too few for the GPU, 2, 4 or 8 blocks share the slices of a range (and a warp takes a share of its
// strips); sums go to scratch then, and a second kernel adds them in the same order.
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

template <class T, int kTiles, bool kFine, bool kOffset>
__global__ void __launch_bounds__(kGemmThreads, 1)
    decode_kernel(const __grid_constant__ WeightOnlyGemmParams p, const __grid_constant__ GemmPlan plan,
                  const __grid_constant__ ScaleSource source, const Alignment aligned, float* slices) {
  QOPS_DYNAMIC_SHARED(shared);
  constexpr int kTokens = 8 * kTiles, kStride = sum_stride(kMaxStripsOfWarp);
  constexpr int kCopies = kTokens / 4;  // of x by each lane and stage
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int slices_of_block = kSlices / plan.k_parts;
  const int slice = static_cast<int>(blockIdx.x) % plan.k_parts * slices_of_block + warp % slices_of_block;
  const Range of_block = part_of({0, int4::strips(p.n)}, blockIdx.x / plan.k_parts, plan.ranges);
  const Range mine = part_of(of_block, warp / slices_of_block, plan.k_parts);
  const int strips_at_once = static_cast<int>(plan.strips);
  const int passes = static_cast<int>(ceil_div(mine.size(), strips_at_once));
  const Range blocks = blocks_of_slice(int4::blocks(p.k), slice);
  const int64_t strip_bytes = int4::strip_bytes(p.k);
  const int rows = static_cast<int>(p.x_rows.count);

  // The ring. A stage: codes of each strip, scales of each strip, 64 columns of x.
  const int slots_at = strips_at_once * int4::kBlockBytes;
  const int x_at = slots_at + strips_at_once * scale_bytes_of_strip(kFine);
  const int stage_bytes = x_at + kTokens * kTokenStageBytes;
  float* sums = reinterpret_cast<float*>(shared);
  uint8_t* ring = shared + kTokens * kStride * sizeof(float) + warp * plan.stages * stage_bytes;
  const uint32_t ring_address = ptx::shared_address(ring);

  const uint64_t policy = ptx::policy_evict_first();
  const T* x[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int token = lane / 8 + 4 * i;
    x[i] = static_cast<const T*>(p.x) + (token < rows ? p.x_rows.offset(token) : 0);
  }

  // What is copied next.
  int copy_pass = blocks.size() == 0 ? passes : 0, copy_stage = 0;
  int64_t copy_block = blocks.begin;
  Range copy_strips{};
  GroupWalk<kFine> copy_walk;
  const auto copy_next = [&] {
    if (copy_pass < passes) {
      const bool is_first = copy_block == blocks.begin;
      if (is_first) {
        copy_strips = part_of(mine, copy_pass, passes);
        copy_walk.seek(source, static_cast<int>(copy_block));
      }
      const int count = static_cast<int>(copy_strips.size());
      const uint32_t stage = ring_address + copy_stage * stage_bytes;
      const uint8_t* codes = static_cast<const uint8_t*>(p.packed) + copy_strips.begin * strip_bytes +
                             copy_block * int4::kBlockBytes + lane * int4::kLaneBytes;
#pragma unroll
      for (int s = 0; s < kMaxStripsOfWarp; ++s) {
        if (s < count) {
          copy_codes(stage + s * int4::kBlockBytes + lane * int4::kLaneBytes, codes + s * strip_bytes, policy);
        }
      }
      const int64_t column = copy_block * int4::kBlockColumns + lane % 8 * 8;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int token = lane / 8 + 4 * i;
        const bool inside = column < p.k;  // K ends at a multiple of 8
        if (token < rows) {
          ptx::cp_async_cg_zfill(stage + x_at + x_place(token, lane % 8), x[i] + (inside ? column : 0),
                                 inside ? 16 : 0);
        }
      }
      const bool begins = copy_walk.begins(source);
      const int group = copy_walk.group, touched = copy_walk.next_block(source);
      if (kFine || is_first || begins) {
        constexpr int kPieces = ScaleSource::kPieces<kFine>;
#pragma unroll
        for (int s = 0; s < kMaxStripsOfWarp; s += 32 / kPieces) {
          const int strip = s + lane / kPieces;
          if (strip < count) {
            source.copy<kFine>(stage + slots_at + strip * scale_bytes_of_strip(kFine), copy_strips.begin + strip, group,
                               min(touched, source.groups - group), lane % kPieces);
          }
        }
      }
      if (++copy_block == blocks.end) {
        copy_block = blocks.begin;
        ++copy_pass;
      }
      if (++copy_stage == plan.stages) copy_stage = 0;
    }
    ptx::cp_async_commit();
  };

  for (int i = 1; i < plan.stages; ++i) copy_next();
  WarpSums<T, kMaxStripsOfWarp, kTiles, kFine, kOffset> warp_sums;
  GroupWalk<kFine> walk;
  int stage = 0;
  for (int pass = 0; pass < passes; ++pass) {
    const Range strips = part_of(mine, pass, passes);
    const int count = static_cast<int>(strips.size());
    warp_sums.begin_slice();
    if (blocks.size() > 0) walk.seek(source, static_cast<int>(blocks.begin));
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      wait_for_copies(plan.stages - 2);
      __syncwarp();  // what all lanes have copied is there; and all have read the stage that is filled next
      copy_next();
      const int at = stage * stage_bytes;
      warp_sums.add_block(ring + at, ring + at + slots_at, ring_address + at + x_at + x_address(0, 0, lane), lane,
                          count, source, walk, block == blocks.begin, block + 1 == blocks.end);
      if (++stage == plan.stages) stage = 0;
    }

    const auto for_sums = [&](const auto& f) {
#pragma unroll
      for (int s = 0; s < kMaxStripsOfWarp; ++s) {
        if (s >= count) continue;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            f(8 * t + sum_token(lane, i), s * kStripRows + sum_row(lane, i), warp_sums.total[s][t][i]);
          }
        }
      }
    };
    if (plan.k_parts > 1) {
      const int64_t columns = int4::strips(p.n) * kStripRows;
      for_sums([&](int token, int row, float total) {
        if (token < rows)
          slices[(static_cast<int64_t>(slice) * rows + token) * columns + strips.begin * kStripRows + row] = total;
      });
      continue;
    }
    if (warp > 0) {
      ptx::bar_sync(warp, 64);  // warp - 1 has passed the sums on
    } else if (pass > 0) {
      ptx::bar_sync(kFree, 64);
    }
    for_sums([&](int token, int row, float total) {
      float& sum = sums[token * kStride + row];
      sum = warp == 0 ? total : sum + total;
    });
    if (warp < kGemmWarps - 1) {
      ptx::bar_arrive(warp + 1, 64);
      continue;
    }
    __syncwarp();
    const int chunks = count * (kStripRows / kVector);
    for (int i = lane; i < rows * chunks; i += 32) {
      const int token = i / chunks, row = i % chunks * kVector;
      const int64_t n = strips.begin * kStripRows + row;
      if (n < p.n) {
        finish_sums<T>(p, aligned, token, n, [&](int64_t column, Vector& v) {
          load<true>(sums + token * kStride + (column - strips.begin * kStripRows), kVector, v);
        });
      }
    }
    if (pass + 1 < passes) ptx::bar_arrive(kFree, 64);
  }
}

}  // namespace

Status int4_gemm_decode(const Int4Job& job, cudaStream_t stream) {
  return with_int4_kernel(job.p, [&](auto element, auto fine, auto offset) {
    using T = decltype(element);
    const auto kernel = job.plan.tokens == 8 ? &decode_kernel<T, 1, fine.value, offset.value>
                                             : &decode_kernel<T, 2, fine.value, offset.value>;
    return launch(kernel, dim3(static_cast<unsigned>(job.plan.blocks)), dim3(kGemmThreads),
                  static_cast<size_t>(job.plan.shared_bytes), stream, job.p, job.plan, ScaleSource(job.p), job.aligned,
                  job.sums);
  });
}

}  // namespace qops::cuda
