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

#include "cpu/int4_int8_gemm.h"
#include "cpu/scratch.h"
#include "cpu/team_product.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

using Params = Int4Int8GemmParams;

// Rows and strips of a tile: its sums stay in registers.
constexpr int kTileRows = kVectorRegisters >= 32 ? 8 : 4;
constexpr int strips_of_tile(int rows) { return kVectorRegisters >= 32 ? (rows <= 6 ? 4 : 3) : (rows <= 2 ? 2 : 1); }
// How far ahead of the codes memory is asked for. Without that, 4 strips of 32 KiB at once reach 75 % of what can be
// read, and one strip 57 %.
constexpr int64_t kFetchBytes = 3072;
// Where a tile's strips are no longer than this together, what the next ones hold is fetched in their place.
constexpr int64_t kShortStrips = 64 << 10;
// Strips of weights that stay in L2 while every tile of x passes over them.
constexpr int64_t kChunk = 12;

// Consecutive rows of x side by side, as tiles of weights meet them.
struct Tile {
  int64_t first;
  int rows;
  uint8_t* words;  // [K / 4][rows] of 4 bytes
  int32_t* sums;   // [groups][rows]: sum of x
};

// All rows of x, in tiles of even heights.
struct Tiles {
  int64_t m, k, groups, count;
  uint8_t* words;
  int32_t* sums;

  Tiles(const Params& p, const Slices& slices, Pieces memory)
      : m(p.x_rows.count),
        k(p.k),
        groups(slices.groups),
        count((m + kTileRows - 1) / kTileRows),
        words(memory.take<uint8_t>(m * k)),
        sums(memory.take<int32_t>(m * groups)) {}

  static size_t bytes(const Params& p, const Slices& slices) {
    return Pieces::bytes<uint8_t>(p.x_rows.count * p.k) + Pieces::bytes<int32_t>(p.x_rows.count * slices.groups);
  }
  Tile at(int64_t t) const {
    const int64_t first = m * t / count;
    return {first, static_cast<int>(m * (t + 1) / count - first), words + first * k, sums + first * groups};
  }
};

void pack_row(const Params& p, const Slices& slices, const Tile& tile, int r) {
  const int8_t* x = static_cast<const int8_t*>(p.x) + p.x_rows.offset(tile.first + r);
  uint8_t* to = tile.words + 4 * r;
  for (int64_t group = 0; group < slices.groups; ++group) {
    I32x16 sum = set1(int32_t{0});
    for (int64_t at = 0; at < p.group_size; at += 64) {
      const int64_t n = std::min<int64_t>(64, p.group_size - at);
      alignas(64) uint8_t block[64];
      sum = sum + copy_columns(p, x, group * p.group_size + at, n, block);
      for (int64_t i = 0; i < n; i += 4, to += 4 * tile.rows) std::memcpy(to, block + i, 4);
    }
    tile.sums[group * tile.rows + r] = sum_lanes(sum);
  }
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
  const auto [scales, zeros] = numbers_of(p, slices.groups);
  const uint8_t* x = tile.words;
  const int64_t ahead = Strips * strip_bytes <= kShortStrips ? Strips * strip_bytes : kFetchBytes;
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
      I32x16 sum[Strips][Rows];
      // Products of vectors of int32 take two operations on one port: as long as 4 dot products.
      QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
        const I32x16 of_eights = set1(-8 * x_sums[r]);
        QOPS_UNROLL for (int s = 0; s < Strips; ++s) sum[s][r] = of_eights;
      }
      if (p.kind == WeightKind::kZeroPoint) {
        QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
          const I32x16 zero = load(reinterpret_cast<const uint8_t*>(zeros.address<false>(group, strip + s)));
          QOPS_UNROLL for (int r = 0; r < Rows; ++r) sum[s][r] = zero * set1(-x_sums[r]);
        }
      }
      for (int64_t left = p.group_size / 8; left > 0;) {
        const int64_t now = std::min<int64_t>(left, kShortDots / 2);
        left -= now;
        ShortSums part[Strips][Rows];
        QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
          QOPS_UNROLL for (int r = 0; r < Rows; ++r) part[s][r] = begin_short(sum[s][r]);
        }
        for (int64_t n = now; n > 0; --n, w += 64) {
          B8x64 codes[Strips];
          QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
            prefetch(w + s * strip_bytes + ahead);
            codes[s] = load_bytes(w + s * strip_bytes);
          }
          QOPS_UNROLL for (int half = 0; half < 2; ++half, x += 4 * Rows) {
            B8x64 q[Strips];
            QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
              q[s] = half == 0 ? low_nibbles(codes[s]) : high_nibbles(codes[s]);
            }
            QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
              const B8x64 values = broadcast_4_bytes(x + 4 * r);
              QOPS_UNROLL for (int s = 0; s < Strips; ++s) part[s][r] = dot_nibbles(part[s][r], q[s], values);
            }
          }
        }
        QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
          QOPS_UNROLL for (int r = 0; r < Rows; ++r) sum[s][r] = end_short(sum[s][r], part[s][r]);
        }
      }
      QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
        const F32x16 scale = scales.load(group, strip + s);
        if constexpr (Strips >= 4) {
          prefetch(scales.address(group, strip + s + Strips));
          if (p.zeros != nullptr) prefetch(zeros.address(group, strip + s + Strips));
        }
        QOPS_UNROLL for (int r = 0; r < Rows; ++r) total[s][r] = fma(scale, to_float(sum[s][r]), total[s][r]);
        if (!has_float_zeros(p.kind)) continue;
        const F32x16 offset = offset_of(p, scale, zeros.load(group, strip + s));
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
    QOPS_UNROLL for (int s = 0; s < Strips; ++s) { y[s][r] = scaled(p, x_scale, y[s][r], strip + s); }
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

void pack_tiles(const Params& p, const Slices& slices, const Tiles& tiles, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = tiles.at(t);
    for (int r = 0; r < tile.rows; ++r) pack_row(p, slices, tile, r);
  }
}

template <class T>
void multiply_tiles(const Params& p, const Slices& slices, const Tiles& tiles, int64_t begin, int64_t end) {
  for (int64_t strip = begin; strip < end; strip += kChunk) {
    for (int64_t t = 0; t < tiles.count; ++t) {
      multiply<T>(p, slices, tiles.at(t), strip, std::min(strip + kChunk, end));
    }
  }
}

template <class T>
Status run(const Params& p, const ThreadPool& pool) {
  const int64_t m = p.x_rows.count, strips = (p.n + kStripRows - 1) / kStripRows;
  const int64_t grain = 1 + (8 << 10) / (p.k * m + 1);
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
  Scratch scratch(QuantisedRows::bytes(p, m) + Tiles::bytes(p, slices));
  if (!scratch.ok()) return Status::kOutOfMemory;
  const QuantisedRows quantised(p, m, scratch);
  const Tiles tiles(p, slices, Pieces(scratch.take<char>(0)));
  Params of_int8 = p;
  if (p.x_scale == nullptr) {
    of_int8.x = quantised.q;
    of_int8.x_rows = dense_rows(m, p.k);
    of_int8.x_scale = quantised.scale;
    of_int8.x_scale_rows = dense_rows(m, 1);
  }
  parallel_for(pool, tiles.count, 1 + (16 << 10) / (p.k * kTileRows + 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end && p.x_scale == nullptr; ++t) {
      const Tile tile = tiles.at(t);
      for (int64_t row = tile.first; row < tile.first + tile.rows; ++row) quantised.quantise<T>(p, row, row);
    }
    pack_tiles(of_int8, slices, tiles, begin, end);
  });
  parallel_for(pool, strips, grain,
               [&](int64_t begin, int64_t end) { multiply_tiles<T>(of_int8, slices, tiles, begin, end); });
  return Status::kOk;
}

// The same product for a team of threads (cpu/team_product.h).
size_t team_bytes(const Params& p) { return Tiles::bytes(p, Slices(p)); }

void team_prepare(const Params& p, void* memory) {
  const Slices slices(p);
  const Tiles tiles(p, slices, Pieces(memory));
  pack_tiles(p, slices, tiles, 0, tiles.count);
}

template <class T>
void team_multiply(const Params& p, void* memory, int64_t begin_strip, int64_t end_strip) {
  const Slices slices(p);
  multiply_tiles<T>(p, slices, Tiles(p, slices, Pieces(memory)), begin_strip, end_strip);
}

template <class T>
constexpr TeamProduct<Params> kTeamProduct{&team_bytes, &team_prepare, &team_multiply<T>};

}  // namespace

const TeamProduct<Params>& int4_int8_team_product(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return kTeamProduct<Half>;
    case DType::kBFloat16: return kTeamProduct<BFloat16>;
    default: return kTeamProduct<float>;
  }
}

Status int4_int8_gemm(const Params& p, const ThreadPool& pool) {
  return with_dtype(p.dtype, [&](auto* element) { return run<std::remove_pointer_t<decltype(element)>>(p, pool); });
}

}  // namespace qops::cpu::QOPS_ISA_NS
