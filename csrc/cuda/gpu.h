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

// Of w: what a block of a tiled kernel takes.
inline constexpr int kTileStrips = 8;
inline constexpr int kTileRows = kTileStrips * kStripRows;

struct TilePosition {
  int64_t token_tile, row_tile;
};

// Eight tiles of tokens pass over the rows of w together, so that tiles which run at one time share both.
QOPS_ALWAYS_INLINE constexpr TilePosition tile_position(int64_t tile, int64_t token_tiles, int64_t row_tiles) {
  constexpr int64_t kGroup = 8;
  const int64_t group = tile / (kGroup * row_tiles), within = tile % (kGroup * row_tiles);
  const int64_t left = token_tiles - group * kGroup, size = left < kGroup ? left : kGroup;
  return {group * kGroup + within % size, within / size};
}

namespace model {

// Of a multiprocessor: bytes that reach it in a cycle, from memory and from L2; cycles of an mma of 16 rows and 8
// tokens, m16n8k16 of 16-bit numbers or m16n8k32 of 8-bit ones; what starting a kernel and filling its ring costs.
inline constexpr int64_t kBytesPerCycle = 16;
inline constexpr int64_t kL2BytesPerCycle = 40;
inline constexpr int64_t kCyclesPerMma = 2;
inline constexpr int64_t kStart = 2000;
inline constexpr int64_t kNextKernel = 2000;
// Of the shared memory of each block, by CUDA.
inline constexpr int64_t kReserved = 1024;

// A kernel that adds what another one has left.
constexpr int64_t second_kernel(int64_t scratch_bytes, Gpu gpu) {
  return kNextKernel + 2 * scratch_bytes / (kL2BytesPerCycle * gpu.multiprocessors);
}

}  // namespace model
}  // namespace qops::cuda
