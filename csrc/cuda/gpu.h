// A GPU as the plans of the GEMMs see it: what the driver says of it, a model of its time, and how a product is cut
// into tiles. The model ranks plans; its numbers have not been fitted to measurements.
#pragma once

#include "kernels.h"

namespace qops::cuda {

// Of the current GPU: a block may have `shared_bytes` of dynamic shared memory; `arch` as 90 for sm_90.
struct Gpu {
  int64_t multiprocessors;
  int64_t shared_bytes;
  int arch;

  bool operator==(const Gpu&) const = default;
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

// n / divisor for n below 2^31, by what the host has worked out: a division takes a thread some twenty instructions,
// one of 64 bits a hundred.
struct Division {
  uint32_t multiplier = 0x80000001u;
  int shift = 31;

  constexpr Division() = default;
  // With 2^(shift - 31) the first power of two that is not below the divisor, multiplier * divisor is above 2^shift by
  // at most the divisor, so that n * multiplier / 2^shift is above n / divisor by less than 1 / divisor.
  explicit constexpr Division(uint32_t divisor) {
    while (uint32_t{1} << (shift - 31) < divisor) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << shift) / divisor + 1);
  }

  QOPS_ALWAYS_INLINE constexpr uint32_t operator()(uint32_t n) const {
    return static_cast<uint32_t>(uint64_t{n} * multiplier >> shift);
  }
};

// Of w: what a block of a tiled kernel takes.
inline constexpr int kTileStrips = 8;
inline constexpr int kTileRows = kTileStrips * kStripRows;

struct TilePosition {
  int64_t token_tile, row_tile;
};

// Eight tiles of tokens pass over the rows of w together, so that tiles which run at one time share both. Of less than
// 2^31 tiles, as a division of 64 bits takes a thread a hundred instructions.
QOPS_ALWAYS_INLINE constexpr TilePosition tile_position(int64_t tile, int64_t token_tiles, int64_t row_tiles) {
  constexpr uint32_t kGroup = 8;
  if (token_tiles == 1) return {0, tile};
  const uint32_t number = static_cast<uint32_t>(tile), of_group = kGroup * static_cast<uint32_t>(row_tiles);
  const uint32_t group = number / of_group, within = number - group * of_group;
  const uint32_t left = static_cast<uint32_t>(token_tiles) - group * kGroup, size = left < kGroup ? left : kGroup;
  return {group * kGroup + within % size, within / size};
}

namespace model {

// Of a multiprocessor: instructions that it issues in a cycle, and of 100 slots how many are taken to be filled; bytes
// that reach it in a cycle from L2; cycles of an mma of 16 rows and 8 tokens, m16n8k16 of 16-bit numbers or m16n8k32 of
// 8-bit ones; what starting a kernel and filling its ring costs, and what it costs that another one follows. That a
// second kernel may begin before the first one has ended (launch.h) is not in it: no figure is known of that.
inline constexpr int64_t kSlotsPerCycle = 4;
inline constexpr int64_t kSlotsFilled = 62;
inline constexpr int64_t kCyclesOfWarpSlot = 2;  // of a warp that nobody competes with
inline constexpr int64_t kCyclesPerMma = 2;
inline constexpr int64_t kStart = 2000;
inline constexpr int64_t kNextKernel = 2000;
// Of the shared memory of each block, by CUDA.
inline constexpr int64_t kReserved = 1024;

// Bytes that reach a multiprocessor in a cycle from memory: those of the largest GPU of an architecture by its data
// sheet, A100 80GB SXM 2039 GB/s, 108 at 1.41 GHz; RTX 3090 936, 82 at 1.70; RTX 4090 1008, 128 at 2.52; H100 SXM 3352,
// 132 at 1.755; B200 8000, 148 at 1.85; Thor 273, 20 at 1.575; RTX 5090 1792, 170 at 2.41.
constexpr int64_t bytes_per_cycle(Gpu gpu) {
  switch (gpu.arch) {
    case 80: return 13;
    case 86: return 7;
    case 89: return 3;
    case 90: return 14;
    case 110: return 9;
    case 120:
    case 121: return 4;
    default: return gpu.arch >= 100 ? 29 : 13;
  }
}

// And from L2: 5120 of all multiprocessors of an A100 by its white paper; on an H100 5.5 TB/s have been reached. Of
// others nothing is known that would be more than a guess between these.
constexpr int64_t l2_bytes_per_cycle(Gpu gpu) { return gpu.arch == 80 ? 47 : gpu.arch == 90 ? 24 : 40; }

constexpr int64_t cycles_of_slots(int64_t instructions) { return instructions * 100 / (kSlotsPerCycle * kSlotsFilled); }

// A kernel that adds what another one has left.
constexpr int64_t second_kernel(int64_t scratch_bytes, Gpu gpu) {
  return kNextKernel + 2 * scratch_bytes / (l2_bytes_per_cycle(gpu) * gpu.multiprocessors);
}

}  // namespace model
}  // namespace qops::cuda
