// Which kernel int4_gemm runs on a GPU, and which part of the product each block computes: pure functions of the shape
// and of the GPU, that know nothing of epilogues. Nothing here changes a bit of the result: the order of the sums is
// that of the 8 slices of K, whatever the plan.
//
// The times are a model, in cycles of a multiprocessor, that ranks plans and is monotone in M. It has not been fitted
// to measurements.
#pragma once

#include "int4_layout.h"

namespace qops::cuda {

// Of the current GPU: a block may have `shared_bytes` of dynamic shared memory.
struct Gpu {
  int64_t multiprocessors;
  int64_t shared_bytes;
};

struct Range {
  int64_t begin, end;

  QOPS_ALWAYS_INLINE constexpr int64_t size() const { return end - begin; }
};

// Part i of n nearly equal parts of `whole`.
QOPS_ALWAYS_INLINE constexpr Range part_of(Range whole, int64_t i, int64_t n) {
  return {whole.begin + whole.size() * i / n, whole.begin + whole.size() * (i + 1) / n};
}

QOPS_ALWAYS_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// The canonical order: K in 8 contiguous slices of whole blocks of 64 columns, summed one by one and added left to
// right. Some are empty where there are fewer blocks.
inline constexpr int kSlices = 8;
QOPS_ALWAYS_INLINE constexpr Range blocks_of_slice(int64_t blocks, int64_t slice) {
  return part_of({0, blocks}, slice, kSlices);
}

inline constexpr int kGemmThreads = 256;
inline constexpr int kGemmWarps = kGemmThreads / 32;
inline constexpr int kMaxStages = 8;

// --- shared memory of one stage of a ring: one block of 64 columns ---------------------------------------------------

// Scales and zeros of a strip: of one group, or of the four that 64 columns can touch where groups are not multiples
// of 64. Each row takes up to 4 bytes for its scale and 4 for its zero.
inline constexpr int kGroupRowBytes = 4 * kStripRows;
QOPS_ALWAYS_INLINE constexpr int groups_of_stage(bool fine) { return fine ? 4 : 1; }
QOPS_ALWAYS_INLINE constexpr int scale_bytes_of_strip(bool fine) { return 2 * kGroupRowBytes * groups_of_stage(fine); }
QOPS_ALWAYS_INLINE constexpr int strip_stage_bytes(bool fine) { return int4::kBlockBytes + scale_bytes_of_strip(fine); }
// 64 columns of a row of x.
inline constexpr int kTokenStageBytes = 2 * int4::kBlockColumns;

// Where 16 bytes of x lie in a stage: rows of 8 chunks, permuted so that eight rows of one column of chunks, which
// ldmatrix reads at a time, are in different banks.
QOPS_ALWAYS_INLINE constexpr int x_place(int token, int chunk) {
  return token * kTokenStageBytes + ((chunk ^ token) & 7) * 16;
}

// What lane `lane` gives to ldmatrix for k16 steps 2 half and 2 half + 1 of eight tokens from `tile` on.
QOPS_ALWAYS_INLINE constexpr int x_address(int tile, int half, int lane) {
  return x_place(8 * tile + lane % 8, 4 * half + lane / 8);
}

// Of a fragment of sums of 16 rows x 8 tokens: element i of a lane.
QOPS_ALWAYS_INLINE constexpr int sum_token(int lane, int i) { return lane % 4 * 2 + i % 2; }
QOPS_ALWAYS_INLINE constexpr int sum_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
// Floats between the tokens of a tile of sums in shared memory: 4 modulo 16, so that the lanes of a
// fragment, 2 tokens apart for each of 4, are in different banks.
QOPS_ALWAYS_INLINE constexpr int sum_stride(int strips) { return strips * kStripRows + 4; }

// Group sizes that are multiples of 64 (or K itself) need one scale per row and stage.
constexpr bool is_fine(int64_t k, int64_t group_size) {
  return group_size != k && group_size % int4::kBlockColumns != 0;
}

// Whether w = s (q - 8) + o with an o of its own.
constexpr bool has_offset(WeightKind kind) { return kind == WeightKind::kFloatZero || kind == WeightKind::kOffset; }

// --- the plan --------------------------------------------------------------------------------------------------------

inline constexpr int kDecodeTokens = 16;    // rows of x up to which there is a decode kernel
inline constexpr int kMaxStripsOfWarp = 4;  // of the decode kernel: that share a fragment of x
inline constexpr int kTileStrips = 8;       // of a tile of the tiled kernel
inline constexpr int kTileTokens[] = {32, 64, 128};
// The sums of x that offsets need do not fit beside those of a tile of 128 tokens (255 registers and 200 bytes
// spilled).
constexpr int max_tile_tokens(bool offset) { return offset ? 64 : 128; }

// Between the kernels of a split K: what an L2 may hold.
inline constexpr int64_t kMostScratch = int64_t{32} << 20;

struct GemmPlan {
  bool decode;
  int tokens;      // of a tile: multiples of 8
  int k_parts;     // 1, 2, 4 or 8 blocks share the slices; above 1, a second kernel adds them
  int64_t ranges;  // decode: into which the strips are cut, one for each block of a part
  int strips;      // decode: most strips that a warp takes at a time
  int stages;
  int64_t shared_bytes;
  int64_t blocks;
  int64_t time;  // by the model

  // float32 sums [slice][M][S * 16] between the two kernels.
  constexpr int64_t scratch_bytes(int64_t m, int64_t n) const {
    return k_parts == 1 ? 0 : kSlices * m * int4::strips(n) * kStripRows * 4;
  }
};

namespace plan {

// What the model knows of a multiprocessor: bytes of weights and of x that reach it in a cycle, mma.m16n8k16 it does in
// a cycle (half of one), and what starting a kernel and filling its ring costs.
inline constexpr int64_t kBytesPerCycle = 16;
inline constexpr int64_t kL2BytesPerCycle = 40;
inline constexpr int64_t kCyclesPerMma = 2;
inline constexpr int64_t kStart = 2000;
inline constexpr int64_t kSecondKernel = 2000;

constexpr int64_t second_kernel(int64_t m, int64_t n, Gpu gpu) {
  return kSecondKernel + 2 * kSlices * m * n * 4 / (kL2BytesPerCycle * gpu.multiprocessors);
}

// Blocks of the decode kernel, one for each multiprocessor: each takes some strips and all slices of its part.
constexpr GemmPlan decode(int64_t m, int64_t n, int64_t k, bool fine, int k_parts, Gpu gpu) {
  const int64_t strips = int4::strips(n), blocks = int4::blocks(k);
  GemmPlan p{};
  p.decode = true;
  p.tokens = m <= 8 ? 8 : 16;
  p.k_parts = k_parts;
  p.ranges = max_of(1, min_of(strips, gpu.multiprocessors / k_parts));
  p.blocks = p.ranges * k_parts;
  const int64_t of_block = ceil_div(strips, p.ranges), of_warp = ceil_div(of_block, k_parts);
  // Passes of as many strips as there is room for with two stages or more, none much smaller than the others.
  const int64_t sums = 4 * p.tokens * sum_stride(kMaxStripsOfWarp);
  int64_t stage = 0;
  for (int64_t most = kMaxStripsOfWarp; most > 0 && p.stages < 2; --most) {
    p.strips = static_cast<int>(max_of(1, ceil_div(of_warp, max_of(1, ceil_div(of_warp, most)))));
    stage = kGemmWarps * (p.strips * strip_stage_bytes(fine) + p.tokens * kTokenStageBytes);
    p.stages = static_cast<int>(min_of(kMaxStages, (gpu.shared_bytes - sums) / stage));
  }
  p.shared_bytes = sums + p.stages * stage;
  const int64_t block_bytes = of_block * int4::strip_bytes(k) / k_parts;
  const int64_t x_bytes = ceil_div(of_block, p.strips) * m * 2 * int4::kBlockColumns * blocks / k_parts;
  p.time = kStart + block_bytes / kBytesPerCycle + x_bytes / kL2BytesPerCycle;
  if (k_parts > 1) p.time += second_kernel(m, n, gpu);
  return p;
}

// Tiles of `tokens` x 128 rows of w, one block each.
constexpr GemmPlan tiled(int64_t m, int64_t n, int64_t k, bool fine, int tokens, int k_parts, Gpu gpu) {
  GemmPlan p{};
  p.tokens = tokens;
  p.k_parts = k_parts;
  p.strips = kTileStrips;
  const int64_t strips = int4::strips(n), tiles = ceil_div(m, tokens) * ceil_div(strips, kTileStrips);
  p.blocks = tiles * k_parts;
  const int64_t sums = 4 * tokens * sum_stride(kTileStrips);
  const int64_t stage = kTileStrips * strip_stage_bytes(fine) + tokens * kTokenStageBytes;
  p.stages = static_cast<int>(min_of(kMaxStages, (gpu.shared_bytes - sums) / stage));
  p.shared_bytes = sums + p.stages * stage;
  const int64_t mma = int64_t{tokens} / 8 * kTileStrips * int4::kSteps * kCyclesPerMma;
  const int64_t bytes = kTileStrips * int4::kBlockBytes / kBytesPerCycle + tokens * kTokenStageBytes / kL2BytesPerCycle;
  const int64_t waves = ceil_div(p.blocks, gpu.multiprocessors);
  p.time = waves * (kStart + ceil_div(int4::blocks(k), k_parts) * max_of(mma, bytes));
  if (k_parts > 1) p.time += second_kernel(m, n, gpu);
  return p;
}

}  // namespace plan

// Total: some plan with at least 2 stages for every shape, on every GPU with 99 KiB of shared memory.
constexpr GemmPlan plan_int4_gemm(int64_t m, int64_t n, int64_t k, int64_t group_size, WeightKind kind, Gpu gpu) {
  const bool fine = is_fine(k, group_size), offset = has_offset(kind);
  GemmPlan best{};
  const auto consider = [&](const GemmPlan& p) {
    if (p.stages < 2 || p.scratch_bytes(m, n) > kMostScratch) return;
    if (best.blocks == 0 || p.time < best.time) best = p;
  };
  for (int k_parts = 1; k_parts <= kSlices; k_parts *= 2) {
    if (m <= kDecodeTokens && k_parts <= gpu.multiprocessors) consider(plan::decode(m, n, k, fine, k_parts, gpu));
    for (const int tokens : kTileTokens) {
      const bool is_wasteful = tokens > kTileTokens[0] && tokens >= 2 * m;
      if (!is_wasteful && tokens <= max_tile_tokens(offset)) consider(plan::tiled(m, n, k, fine, tokens, k_parts, gpu));
    }
  }
  return best;
}

}  // namespace qops::cuda
