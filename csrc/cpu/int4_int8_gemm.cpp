// int4_int8_gemm: group-quantised 4-bit weights times rows of int8.
//
// Idea. The sum of a group, of (q - 8) x or (q - z) x, is an exact int32, so its bits depend neither on the order, the
// tile, the ISA level nor on M. Codes are the unsigned operand of the dot product and x the signed one; the sum starts
// at -8 or -z times the group's sum of x, which is computed once a row. What follows is float32 in one fixed order:
//     total = fma(s, float(sum), total), with offsets total = fma(o', float(sum of x), total)
// over the groups of a slice in ascending k; slices, cut where both a CPU's and a GPU's blocks end (Slices), are added
// left to right; then y = fma(s_x, y, bias) and one rounding.
//
// Bytes and operations at M = 1: 64 bytes of codes (128 products) take 3 instructions to split nibbles and 2 dot
// products, some 3 cycles, against 13 to 18 to read them from DRAM at 10 to 14 GB/s a core.
#include <algorithm>

#include "cpu/gemm_epilogue.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

using Params = Int4Int8GemmParams;

// Rows and strips of a tile: its sums, totals and y stay in registers, 4 strips of one row or 2 of several.
constexpr int kTileRows = kVectorRegisters >= 32 ? 4 : 2;
constexpr int strips_of_tile(int rows) { return (kVectorRegisters >= 32 ? 2 : 1) * (rows == 1 ? 2 : 1); }
// Strips of weights that stay in L2 while every tile of x passes over them.
constexpr int64_t kChunk = 4;

// The slices of K as groups: 8 of whole units of lcm(64, group_size) columns, some of them empty where there are few.
struct Slices {
  static constexpr int kCount = 8;
  int64_t groups, unit, units;

  explicit Slices(const Params& p)
      : groups(p.group_size == 0 ? 0 : p.k / p.group_size),
        unit(groups == 0 ? 1 : 64 / std::min<int64_t>(64, p.group_size & -p.group_size)),
        units((groups + unit - 1) / unit) {}
  int64_t begin(int slice) const { return std::min(groups, units * slice / kCount * unit); }
};

// Consecutive rows of x side by side, as tiles of weights meet them.
struct Tile {
  int64_t first;
  int rows;
  uint8_t* words;  // [K / 4][rows] of 4 bytes
  int32_t* sums;   // [groups][rows]: sum of x
};

void pack_row(const Params& p, const Slices& slices, const Tile& tile, int r) {
  const int8_t* x = static_cast<const int8_t*>(p.x) + p.x_rows.offset(tile.first + r);
  const B8x64 ones = bit_cast<B8x64>(set1(int32_t{0x01010101}));
  uint8_t* to = tile.words + 4 * r;
  int64_t column = 0;
  for (int64_t group = 0; group < slices.groups; ++group) {
    I32x16 sum = set1(int32_t{0});
    for (int64_t left = p.group_size; left > 0;) {
      const int64_t n = std::min<int64_t>(64, left);
      uint8_t block[64] = {};
      if (p.perm == nullptr) {
        std::memcpy(block, x + column, static_cast<size_t>(n));
      } else {
        for (int64_t i = 0; i < n; ++i) block[i] = static_cast<uint8_t>(x[p.perm[column + i]]);
      }
      sum = dot_short(sum, ones, load_bytes(block));
      for (int64_t i = 0; i < n; i += 4, to += 4 * tile.rows) std::memcpy(to, block + i, 4);
      column += n;
      left -= n;
    }
    tile.sums[group * tile.rows + r] = sum_lanes(sum);
  }
}

bool perm_is_valid(const Params& p) {
  for (int64_t j = 0; j < p.k; ++j) {
    if (p.perm[j] >= 0 && p.perm[j] < p.k) continue;
    *p.bad_index = p.perm[j];
    return false;
  }
  return true;
}

// Apart from the code of the tiles, whose registers it would take.
template <class T, class... Sums>
[[gnu::noinline]] void finish_apart(const Params& p, Sums... sums) {
  with_epilogue(p, [&](auto epilogue) { finish<decltype(epilogue)::value, T>(p, sums...); });
}

// Rows x (16 * Strips) outputs from strip `strip` on.
template <class T, int Rows, int Strips>
void multiply_tile(const Params& p, const Slices& slices, const Tile& tile, int64_t strip) {
  const int64_t strip_bytes = p.k * kStripRows / 2;
  const char* w = static_cast<const char*>(p.packed) + strip * strip_bytes;
  const uint8_t* x = tile.words;
  F32x16 y[Strips][Rows];
  QOPS_UNROLL for (int s = 0; s < Strips; ++s) { QOPS_UNROLL for (int r = 0; r < Rows; ++r) y[s][r] = set1(0.0f); }
  int64_t group = 0;
  for (int slice = 1; slice <= Slices::kCount; ++slice) {
    F32x16 total[Strips][Rows];
    QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
      QOPS_UNROLL for (int r = 0; r < Rows; ++r) total[s][r] = set1(0.0f);
    }
    for (const int64_t end = slices.begin(slice); group < end; ++group) {
      const int32_t* x_sums = tile.sums + group * Rows;
      const auto scales_at = [&](int s) { return ((strip + s) * slices.groups + group) * kStripRows; };
      I32x16 sum[Strips][Rows];
      QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
        const I32x16 zero = p.kind == WeightKind::kZeroPoint ? load(static_cast<const uint8_t*>(p.zeros) + scales_at(s))
                                                             : set1(int32_t{8});
        QOPS_UNROLL for (int r = 0; r < Rows; ++r) sum[s][r] = zero * set1(-x_sums[r]);
      }
      for (int64_t n = p.group_size / 8; n > 0; --n, w += 64) {
        B8x64 codes[Strips];
        QOPS_UNROLL for (int s = 0; s < Strips; ++s) codes[s] = load_bytes(w + s * strip_bytes);
        QOPS_UNROLL for (int half = 0; half < 2; ++half, x += 4 * Rows) {
          B8x64 q[Strips];
          QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
            q[s] = half == 0 ? low_nibbles(codes[s]) : high_nibbles(codes[s]);
          }
          QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
            const B8x64 values = broadcast_4_bytes(x + 4 * r);
            QOPS_UNROLL for (int s = 0; s < Strips; ++s) sum[s][r] = dot_short(sum[s][r], q[s], values);
          }
        }
      }
      QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
        const F32x16 scale = load_as_float(p.scales, p.scale_dtype, scales_at(s), kLanes);
        QOPS_UNROLL for (int r = 0; r < Rows; ++r) total[s][r] = fma(scale, to_float(sum[s][r]), total[s][r]);
        if (p.kind != WeightKind::kFloatZero && p.kind != WeightKind::kOffset) continue;
        const F32x16 z = load(static_cast<const float*>(p.zeros) + scales_at(s)), eight = set1(8.0f);
        const F32x16 offset = p.kind == WeightKind::kOffset ? fma(scale, eight, z) : scale * (eight - z);
        QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
          total[s][r] = fma(offset, to_float(set1(x_sums[r])), total[s][r]);
        }
      }
    }
    QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
      QOPS_UNROLL for (int r = 0; r < Rows; ++r) y[s][r] = y[s][r] + total[s][r];
    }
  }
  QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
    const F32x16 x_scale = set1(p.x_scale[p.x_scale_rows.offset(tile.first + r)]);
    QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
      y[s][r] = p.bias == nullptr ? x_scale * y[s][r] : fma(x_scale, y[s][r], bias_of_strip(p, strip + s));
    }
  }
  if (p.is_plain()) {
    QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
      const int64_t column = (strip + s) * kStripRows;
      QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
        store_n(static_cast<T*>(p.y) + (tile.first + r) * p.n + column, y[s][r], p.n - column);
      }
    }
    return;
  }
  const auto place = [&](int i) { return Place{tile.first + i / Strips, strip + i % Strips}; };
  const auto value = [&](int i) { return y[i % Strips][i / Strips]; };
  constexpr int kCount = Rows * Strips;
  QOPS_UNROLL for (int i = 0; i + 1 < kCount; i += 2) {
    finish_apart<T>(p, place(i), value(i), place(i + 1), value(i + 1));
  }
  if constexpr (kCount % 2 != 0) finish_apart<T>(p, place(kCount - 1), value(kCount - 1));
}

template <class T, int Rows = kTileRows>
void multiply(const Params& p, const Slices& slices, const Tile& tile, int64_t strip, int64_t end) {
  if constexpr (Rows > 1) {
    if (tile.rows < Rows) return multiply<T, Rows - 1>(p, slices, tile, strip, end);
  }
  constexpr int kWide = strips_of_tile(Rows);
  for (; strip + kWide <= end; strip += kWide) multiply_tile<T, Rows, kWide>(p, slices, tile, strip);
  for (; strip < end; ++strip) multiply_tile<T, Rows, 1>(p, slices, tile, strip);
}

template <class T>
Status run(const Params& p, const ThreadPool& pool) {
  const int64_t m = p.x_rows.count, strips = (p.n + kStripRows - 1) / kStripRows;
  const int64_t grain = 1 + (8 << 10) / (p.k * m + 1);
  const int64_t tiles = (m + kTileRows - 1) / kTileRows;
  if (pool.listener != nullptr) [[unlikely]] {
    if (m == 0 || p.n == 0) return Status::kOk;
    const int rows = static_cast<int>(std::min<int64_t>(m, kTileRows));
    pool.listener->tell("kernel", QOPS_ISA_NAME);
    pool.listener->tell("tile_rows", rows);
    pool.listener->tell("tile_strips", strips_of_tile(rows));
    tell_tasks(pool, strips, grain);
    return Status::kOk;
  }
  if (p.perm != nullptr && !perm_is_valid(p)) return Status::kIndexOutOfRange;
  if (m == 0 || p.n == 0) return Status::kOk;
  const Slices slices(p);
  Scratch scratch(Scratch::bytes<uint8_t>(m * p.k) + Scratch::bytes<int32_t>(m * slices.groups));
  if (!scratch.ok()) return Status::kOutOfMemory;
  uint8_t* words = scratch.take<uint8_t>(m * p.k);
  int32_t* sums = scratch.take<int32_t>(m * slices.groups);
  // Of even heights.
  const auto tile_at = [&](int64_t t) {
    const int64_t first = m * t / tiles;
    return Tile{first, static_cast<int>(m * (t + 1) / tiles - first), words + first * p.k,
                sums + first * slices.groups};
  };
  parallel_for(pool, tiles, 1 + (16 << 10) / (p.k * kTileRows + 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = tile_at(t);
      for (int r = 0; r < tile.rows; ++r) pack_row(p, slices, tile, r);
    }
  });
  parallel_for(pool, strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; strip += kChunk) {
      for (int64_t t = 0; t < tiles; ++t) multiply<T>(p, slices, tile_at(t), strip, std::min(strip + kChunk, end));
    }
  });
  return Status::kOk;
}

}  // namespace

Status int4_int8_gemm(const Params& p, const ThreadPool& pool) {
  return with_dtype(p.dtype, [&](auto* element) { return run<std::remove_pointer_t<decltype(element)>>(p, pool); });
}

}  // namespace qops::cpu::QOPS_ISA_NS
