// How int4_int8_gemm runs on a GPU, and which part of the product each block computes: pure functions of the shape and
// of the GPU, that know nothing of epilogues. No plan changes a bit of the result: sums of a group are exact integers,
// and what follows has the order of the 8 slices of K, whose cuts the contract names.
//
// The times are those of gpu.h's model.
#pragma once

#include "cuda/int8_config.h"
#include "cuda/weight_only_config.h"

namespace qops::cuda::int4_int8 {

// K in 8 slices of whole units of lcm(64, group_size) columns, here counted in blocks of 64; some are empty where there
// are few units. Where one group is all of K its sum may be cut anywhere, as it is an integer: then the 8 cuts are
// those of the work alone.
struct Slices {
  uint32_t blocks, unit, units;
  bool is_one_group;

  constexpr Slices(int64_t k, int64_t group_size, WeightKind kind)
      : blocks(static_cast<uint32_t>(int4::blocks(k))),
        unit(1),
        units(blocks),
        // What an offset is multiplied with is not among the sums that blocks hand on.
        is_one_group(group_size == k && !has_float_zeros(kind)) {
    if (is_one_group || k == 0) return;
    const int64_t common = min_of(int4::kBlockColumns, group_size & -group_size);  // divisor
    unit = static_cast<uint32_t>(group_size / common);
    units = static_cast<uint32_t>(ceil_div(blocks, unit));
  }

  // The first block of a slice; of slice 8 the number of blocks.
  QOPS_ALWAYS_INLINE constexpr uint32_t begin(int slice) const {
    const uint32_t at = units * static_cast<uint32_t>(slice) / kSlices * unit;
    return at < blocks ? at : blocks;
  }
};

// How many tokens a tile may have of those that a kernel is compiled for.
inline constexpr int kTileTokens[] = {16, 32, 64, 128};
constexpr int tokens_of_kernel(int live) {
  for (const int tokens : kTileTokens) {
    if (live <= tokens) return tokens;
  }
  return 0;
}
// The warps of a block are 8 along the rows of w for few tokens, else 4, with half of the tokens each: then codes
// become fragments twice, and shared memory is read for x half as often.
QOPS_ALWAYS_INLINE constexpr int warps_of_tokens(int tokens) { return tokens <= 32 ? 1 : 2; }
// A second block multiplies while the first waits at a barrier. (With 64 tokens two have 128 registers a thread, which
// would spill 40 bytes on sm_80.)
QOPS_ALWAYS_INLINE constexpr int blocks_of_multiprocessor(int tokens, int arch) {
  return tokens <= 32 || (tokens == 64 && arch >= 90) ? 2 : 1;
}

// --- shared memory of one stage of the ring: one block of 64 columns -------------------------------------------------

// Codes and scales of 8 strips as int4_gemm has them, tokens as int8_gemm has them, and for each token the sum of x in
// its group so far: at the end of each 16 columns where groups may end there, else of all 64. Between the sums of two
// steps stand 8 that are unused, so that lanes of a quad, which write one each, are in different banks.
QOPS_ALWAYS_INLINE constexpr int sums_of_step(int tokens) { return tokens + 8; }
QOPS_ALWAYS_INLINE constexpr int steps_of_stage(bool fine) { return fine ? int4::kSteps : 1; }
// A whole number of times all banks, so that what is permuted within 128 bytes is so in every stage.
QOPS_ALWAYS_INLINE constexpr int stage_bytes(int tokens, bool fine) {
  const int bytes = kTileStrips * strip_stage_bytes(4, fine) + tokens * int8::kTokenBytes +
                    4 * steps_of_stage(fine) * sums_of_step(tokens);
  return (bytes + 127) / 128 * 128;
}

// --- the plan --------------------------------------------------------------------------------------------------------

namespace plan {

using namespace model;

// Instructions that all warps of a block issue for 64 columns, of groups of 128: whatever the tokens, and for each 8 of
// them, of kernels of up to 32 and of more.
inline constexpr int64_t kSlots[2] = {812, 984}, kSlotsOfEight[2] = {84, 58};

constexpr GemmPlan tiled(int64_t m, int64_t n, int64_t k, bool fine, const Slices& slices, int live, int k_parts,
                         bool in_waves, Gpu gpu) {
  cuda::plan::TileCosts c{};
  c.tokens = tokens_of_kernel(live);
  c.resident = blocks_of_multiprocessor(c.tokens, gpu.arch);
  c.code_bytes = kTileStrips * int4::kBlockBytes;
  c.token_bytes = int8::kTokenBytes;
  c.stage_bytes = stage_bytes(c.tokens, fine);
  // A kernel of up to 64 tokens multiplies all that it has room for.
  const bool many = c.tokens > 32;
  c.slots = kSlots[many] + kSlotsOfEight[many] * ((c.tokens > 64 ? live : c.tokens) / 8);
  c.mma = int64_t{live} / 8 * kTileStrips * int8::kFragments * kCyclesPerMma;
  int64_t longest = 0;
  for (int part = 0; part < k_parts; ++part) {
    const int each = kSlices / k_parts;
    longest = max_of(longest, slices.begin((part + 1) * each) - slices.begin(part * each));
  }
  return cuda::plan::tiles(m, n, k, c, live, k_parts, longest, in_waves, gpu);
}

}  // namespace plan

// Total: some plan for every shape, with at least 2 stages, on every GPU with 99 KiB of shared memory.
constexpr GemmPlan plan_int4_int8_gemm(const GemmShape& shape) {
  const auto [bits, m, n, k, group_size, kind, may_round, gpu] = shape;
  const bool fine = is_fine(k, group_size);
  const Slices slices(k, group_size, kind);
  GemmPlan best{};
  for (int k_parts = 1; k_parts <= kSlices; k_parts *= 2) {
    for (int live = 8; live <= 128; live += 8) {
      for (int in_waves = 0; in_waves < (k_parts > 1 ? 2 : 1); ++in_waves) {
        const GemmPlan p = plan::tiled(m, n, k, fine, slices, live, k_parts, in_waves == 1, gpu);
        // With two stages a stage is copied while the one before is multiplied, which 99 KiB would leave 128 tokens.
        if (p.stages < (p.tokens > 64 ? 3 : 2) || p.scratch_bytes(m, n, k) > kMostScratch) continue;
        // Of equal plans the one with more blocks: it has more bytes under way.
        if (best.blocks == 0 || p.time < best.time || (p.time == best.time && p.blocks > best.blocks)) best = p;
      }
    }
  }
  return best;
}

}  // namespace qops::cuda::int4_int8
