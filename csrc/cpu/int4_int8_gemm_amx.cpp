// int4_int8_gemm on AMX tiles. The sums of groups are exact, so their bits are those of int4_int8_gemm.cpp, which keeps
// the calls of few rows; the float32 chain is written a second time.
//
// Idea. Four strips of weights are unpacked to signed bytes (q - 8, q - z) a few tiles at a time, which is as tdpbssd
// reads them: 64 columns of a strip are 16 rows of 64 bytes. They stay in L1 while all rows of x pass over them, 16 at
// a time. A tile belongs to one group: groups of fewer than 64 columns have tiles of so many, and of longer ones the
// last tile is filled up with zeros. Up to four groups of 16 x 16 sums are in tiles at once; while they are multiplied,
// the vectors take the sums before them through the float32 chain. Everything that both touch is contiguous and in L1:
// totals of 32 rows by 64 columns beside 32 KiB of sums were 3 to 4 times as slow.
//
// Bytes and operations: a product of tiles takes 16 cycles (16 x 16 x 64), to store its sums takes 16 as well, and the
// chain of a group 16 conversions, 16 fma and 20 to 32 loads of 64 bytes for each 16 x 16. By themselves, out of L1 and
// L2, all that takes 46, 49 and 70 cycles a group of 32, 64 and 128 columns (Sapphire Rapids at 2.8 GHz); a whole call
// of 256 rows of 576 x 1536 takes 76 a group of 32 and 138 one of 128. Unpacking 512 bytes takes some 20 cycles, DRAM
// 90 to read them.
#include <algorithm>

#include "cpu/int4_int8_gemm.h"
#include "cpu/kernel_table.h"
#include "cpu/scratch.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

using Params = Int4Int8GemmParams;

// Fewer rows are faster without tiles: 9 of 4096 x 4096 in 0.8 of the time, of 576 x 1536 in 1.1.
constexpr int64_t kLeastRows = 11;
// Strips that are unpacked together, and their columns of y.
constexpr int kStrips = 4;
constexpr int kWidth = kStrips * kStripRows;
// Rows of x that are packed and multiplied at a time: at most so many bytes of x, half of L2, and so many rows, for
// whose totals there is room.
constexpr int64_t kPackedBytes = 1 << 20;
constexpr int64_t kMaxRows = 256;
// Tiles of a strip that are unpacked at a time, of as many groups at most.
constexpr int kMaxTiles = 4;
constexpr int64_t kFetchBytes = 2048;
// Multiplications that a thread of its own pays for: some 5 us.
constexpr int64_t kLeastWork = 8 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Groups as tiles.
struct Tiles {
  int64_t columns;   // of a tile
  int64_t of_group;  // tiles
  int64_t of_row;    // tiles

  Tiles(const Params& p, const Slices& slices)
      : columns(std::min<int64_t>(p.group_size, kTileRowBytes)),
        of_group(ceil_div(p.group_size, columns)),
        of_row(slices.groups * of_group) {}
  int64_t bytes() const { return columns * kTileRows; }
};

// x in tiles: [block of 16 rows][tile][row][column].
struct PackedRows {
  uint8_t* bytes;
  float* sums;          // [row][groups]: of x
  const float* scales;  // of rows that the call has quantised, else null
};

// f of so many columns of a tile, the usual numbers of them as constants.
template <class F>
void with_columns(int64_t columns, const F& f) {
  if (columns == 64) return f(std::integral_constant<int64_t, 64>());
  if (columns == 32) return f(std::integral_constant<int64_t, 32>());
  f(columns);
}

// x, row `row` of the packed ones, to its place.
void pack_row(const Params& p, const Slices& slices, const Tiles& tiles, const PackedRows& packed, const int8_t* x,
              int64_t row) {
  uint8_t* to = packed.bytes + row / kTileRows * tiles.of_row * tiles.bytes() + row % kTileRows * tiles.columns;
  const bool sums = has_float_zeros(p.kind);
  for (int64_t group = 0; group < slices.groups; ++group) {
    I32x16 sum = set1(int32_t{0});
    for (int64_t at = 0; at < p.group_size; at += tiles.columns, to += tiles.bytes()) {
      const int64_t column = group * p.group_size + at, n = std::min(tiles.columns, p.group_size - at);
      alignas(64) uint8_t block[kTileRowBytes];
      const void* from = block;
      if (sums || p.perm != nullptr || n < tiles.columns) {
        sum = sum + copy_columns(p, x, column, n, block);
      } else {
        from = x + column;
      }
      with_columns(tiles.columns, [&](auto columns) { std::memcpy(to, from, static_cast<size_t>(columns)); });
    }
    if (sums) packed.sums[row * slices.groups + group] = static_cast<float>(sum_lanes(sum));
  }
}

// Columns of w that are unpacked together: whole groups, or a part of one.
struct Part {
  int64_t group;  // the first
  int groups;
  int64_t first_tile;  // of the first group
  int tiles;           // of each group
  bool begins, ends;   // the group
  bool first_of_slice, last_of_slice;
};

// 16 x 16 numbers of as many rows and columns of y, one behind another.
template <class Number>
using Square = Number[kTileRows * kStripRows];

struct Panel {
  alignas(64) uint8_t bytes[kMaxTiles * kStrips * kTileBytes];  // [tile][strip]
  alignas(64) float scale[kMaxTiles][kWidth];
  alignas(64) float offset[kMaxTiles][kWidth];
};

void unpack(const Params& p, const Slices& slices, const Tiles& tiles, const Part& part, Range strips, Panel& panel) {
  const auto [scales, zeros] = numbers_of(p, slices.groups);
  uint8_t* tile_to = panel.bytes;
  for (int g = 0; g < part.groups; ++g) {
    const int64_t group = part.group + g;
    for (int t = 0; t < part.tiles; ++t, tile_to += kStrips * tiles.bytes()) {
      const int64_t at = (part.first_tile + t) * tiles.columns;
      const int64_t n = std::min(tiles.columns, p.group_size - at);
      for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
        uint8_t* to = tile_to + (strip - strips.begin) * tiles.bytes();
        if (n < tiles.columns) std::memset(to, 0, static_cast<size_t>(tiles.bytes()));
        const I32x16 zero = p.kind == WeightKind::kZeroPoint
                                ? load(reinterpret_cast<const uint8_t*>(zeros.address<false>(group, strip)))
                                : set1(int32_t{8});
        const B8x64 centre = bit_cast<B8x64>(zero * set1(int32_t{0x01010101}));
        const char* w =
            static_cast<const char*>(p.packed) + (strip * p.k + group * p.group_size + at) * (kStripRows / 2);
        for (int64_t i = 0; i < n; i += 8, w += 64, to += 2 * kTileRowBytes) {
          prefetch(w + kFetchBytes);
          const B8x64 codes = load_bytes(w);
          store_bytes(to, low_nibbles(codes) - centre);
          store_bytes(to + kTileRowBytes, high_nibbles(codes) - centre);
        }
      }
    }
    for (int64_t strip = strips.begin; part.ends && strip < strips.end; ++strip) {
      const int64_t to = (strip - strips.begin) * kStripRows;
      const F32x16 scale = scales.load(group, strip);
      store(panel.scale[g] + to, scale);
      if (has_float_zeros(p.kind)) store(panel.offset[g] + to, offset_of(p, scale, zeros.load(group, strip)));
    }
  }
}

// What a thread needs to multiply.
struct Workspace {
  Panel panel;
  alignas(64) Square<int32_t> sums[2][kMaxTiles];  // by turns
  alignas(64) Square<int32_t> carry[kMaxRows / kTileRows][kStrips];
  alignas(64) Square<float> totals[kMaxRows / kTileRows][kStrips];
  alignas(64) Square<float> y[kMaxRows / kTileRows][kStrips];
};

// The sums of a strip's groups, tile by tile. `carry` has the first group's so far, where it has begun before.
template <int Groups, int kGroup = 0>
QOPS_ALWAYS_INLINE void multiply_tiles(int tiles, int64_t columns, const uint8_t* x, const uint8_t* w,
                                       const int32_t* carry) {
  if constexpr (kGroup < Groups) {
    constexpr int kX = 4 + kGroup % 2, kW = 6 + kGroup % 2;
    if (carry != nullptr) {
      load_tile<kGroup>(carry, kTileRowBytes);
    } else {
      zero_tile<kGroup>();
    }
    for (int t = tiles; t > 0; --t, x += columns * kTileRows, w += columns * kTileRows * kStrips) {
      load_tile<kX>(x, columns);
      load_tile<kW>(w, kTileRowBytes);
      dot_tiles<kGroup, kX, kW>();
    }
    multiply_tiles<Groups, kGroup + 1>(tiles, columns, x, w, nullptr);
  }
}

template <int Groups, int kGroup = 0>
QOPS_ALWAYS_INLINE void store_tiles(int32_t* sums) {
  if constexpr (kGroup < Groups) {
    store_tile<kGroup>(sums, kTileRowBytes);
    store_tiles<Groups, kGroup + 1>(sums + kTileRows * kStripRows);
  }
}

// Where the rows of a call lie that meet a part.
struct PartRows {
  const uint8_t* x;  // the part's first tile
  int64_t x_stride;  // bytes from a block of 16 rows to the next
  const float* x_sums;
  int64_t x_sums_stride;
  int64_t blocks;
  int strips;
};

// A part of w times blocks of x. A square's sums go through the float32 chain while the tiles of the next one are
// multiplied, which are stored last, when they are there. Everything is known in the loop: with a few more instructions
// fewer squares are under way at once.
template <int Groups, bool kOffsets, bool kFirst, bool kLast>
void multiply_part(const PartRows& rows, const Part& part, int64_t columns, Workspace& work) {
  const Panel& panel = work.panel;
  const auto add_groups = [&](const int32_t* sums, int strip, const float* x_sums, float* totals, float* y) {
    F32x16 scale[Groups], offset[Groups];
    QOPS_UNROLL for (int g = 0; g < Groups; ++g) {
      scale[g] = load(panel.scale[g] + strip * kStripRows);
      if constexpr (kOffsets) offset[g] = load(panel.offset[g] + strip * kStripRows);
    }
    QOPS_UNROLL for (int r = 0; r < kTileRows; ++r) {
      const int i = r * kStripRows;
      F32x16 total = kFirst ? set1(0.0f) : load(totals + i);
      QOPS_UNROLL for (int g = 0; g < Groups; ++g) {
        total = fma(scale[g], to_float(load(sums + g * kTileRows * kStripRows + i)), total);
        if constexpr (kOffsets) total = fma(offset[g], set1(x_sums[r * rows.x_sums_stride + g]), total);
      }
      if constexpr (kLast) {
        store(y + i, load(y + i) + total);
      } else {
        store(totals + i, total);
      }
    }
  };
  const int tiles = part.tiles;
  const bool begins = part.begins, ends = part.ends;
  const uint8_t* x = rows.x;
  const float* x_sums = rows.x_sums;
  int32_t *sums = work.sums[0][0], *next_sums = work.sums[1][0];
  int last_strip = -1;
  const float* last_x_sums = nullptr;
  float *last_totals = nullptr, *last_y = nullptr;
  for (int64_t block = 0; block < rows.blocks; ++block, x += rows.x_stride) {
    for (int strip = 0; strip < rows.strips; ++strip) {
      int32_t* const carry = work.carry[block][strip];
      multiply_tiles<Groups>(tiles, columns, x, panel.bytes + strip * columns * kTileRows, begins ? nullptr : carry);
      if (!ends) {
        store_tiles<1>(carry);
        continue;
      }
      if (last_strip >= 0) add_groups(sums, last_strip, last_x_sums, last_totals, last_y);
      store_tiles<Groups>(next_sums);
      std::swap(sums, next_sums);
      last_strip = strip;
      last_x_sums = x_sums;
      last_totals = work.totals[block][strip];
      last_y = work.y[block][strip];
    }
    x_sums += kTileRows * rows.x_sums_stride;
  }
  if (last_strip >= 0) add_groups(sums, last_strip, last_x_sums, last_totals, last_y);
}

template <int Groups = kMaxTiles>
void multiply_part_of(const PartRows& rows, const Part& part, int64_t columns, bool offsets, Workspace& work) {
  if constexpr (Groups > 1) {
    if (part.groups < Groups) return multiply_part_of<Groups - 1>(rows, part, columns, offsets, work);
  }
  const auto multiply = [&](auto has_offsets, auto first) {
    part.last_of_slice ? multiply_part<Groups, has_offsets, first, true>(rows, part, columns, work)
                       : multiply_part<Groups, has_offsets, first, false>(rows, part, columns, work);
  };
  const auto multiply_with = [&](auto has_offsets) {
    part.first_of_slice ? multiply(has_offsets, std::true_type()) : multiply(has_offsets, std::false_type());
  };
  offsets ? multiply_with(std::true_type()) : multiply_with(std::false_type());
}

template <class T>
void finish_rows(const Params& p, Range rows, Range strips, const float* x_scale_of_row, const Workspace& work) {
  const auto finish_all = [&](auto plain, auto epilogue) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t at = row - rows.begin;
      const F32x16 x_scale =
          set1(x_scale_of_row != nullptr ? x_scale_of_row[at] : p.x_scale[p.x_scale_rows.offset(row)]);
      const auto place = [&](int64_t strip) { return Place{row, strip}; };
      const auto value = [&](int64_t strip) {
        const float* y = work.y[at / kTileRows][strip - strips.begin] + at % kTileRows * kStripRows;
        return scaled(p, x_scale, load(y), strip);
      };
      if constexpr (plain) {
        for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
          const int64_t column = strip * kStripRows;
          store_n(static_cast<T*>(p.y) + row * p.n + column, value(strip), p.n - column);
        }
      } else {
        int64_t strip = strips.begin;
        for (; strip + 1 < strips.end; strip += 2) {
          finish<epilogue, T>(p, place(strip), value(strip), place(strip + 1), value(strip + 1));
        }
        if (strip < strips.end) finish<epilogue, T>(p, place(strip), value(strip));
      }
    }
  };
  if (p.is_plain()) return finish_all(std::true_type(), std::integral_constant<Epilogue, Epilogue::kNone>());
  with_epilogue(p, [&](auto epilogue) { finish_all(std::false_type(), epilogue); });
}

// f(part) of all columns, in order.
template <class F>
void for_each_part(const Slices& slices, const Tiles& tiles, const F& f) {
  const int64_t most = std::max<int64_t>(1, kMaxTiles / tiles.of_group);
  for (int slice = 0; slice < Slices::kCount; ++slice) {
    const int64_t begin = slices.begin(slice), end = slices.begin(slice + 1);
    for (int64_t group = begin; group < end; group += most) {
      const int64_t groups = std::min(most, end - group);
      for (int64_t tile = 0; tile < tiles.of_group; tile += kMaxTiles) {
        const int64_t count = std::min<int64_t>(kMaxTiles, tiles.of_group - tile);
        f(Part{group, static_cast<int>(groups), tile, static_cast<int>(count), tile == 0,
               tile + count == tiles.of_group, group == begin, group + groups == end});
      }
    }
  }
}

// y of up to kMaxRows rows and up to kStrips strips. `packed` holds the rows from first_row on.
template <class T>
void multiply(const Params& p, const Slices& slices, const Tiles& tiles, const PackedRows& packed, int64_t first_row,
              Range rows, Range strips, Workspace& work) {
  const int64_t first = rows.begin - first_row, count = rows.size(), blocks = ceil_div(count, kTileRows);
  std::memset(work.y, 0, static_cast<size_t>(blocks) * sizeof(work.y[0]));
  for_each_part(slices, tiles, [&](const Part& part) {
    unpack(p, slices, tiles, part, strips, work.panel);
    const PartRows of{
        packed.bytes +
            (first / kTileRows * tiles.of_row + part.group * tiles.of_group + part.first_tile) * tiles.bytes(),
        tiles.of_row * tiles.bytes(),
        packed.sums + first * slices.groups + part.group,
        slices.groups,
        blocks,
        static_cast<int>(strips.size())};
    multiply_part_of(of, part, tiles.columns, has_float_zeros(p.kind), work);
  });
  finish_rows<T>(p, rows, strips, packed.scales == nullptr ? nullptr : packed.scales + first, work);
}

// The product of some rows as units of 16 rows and four strips, those of the same strips one after another, and these
// as shares, one for each thread that it pays for.
struct Cut {
  int64_t blocks, quads, shares;

  Cut(const Params& p, int64_t rows, int threads)
      : blocks(ceil_div(rows, kTileRows)), quads(ceil_div(ceil_div(p.n, kStripRows), kStrips)) {
    // Unpacking takes as long as multiplying with 16 rows.
    const int64_t work = (units() + quads) * kTileRows * kWidth * p.k;
    shares = std::clamp<int64_t>(work / kLeastWork, 1, std::min<int64_t>(units(), threads));
  }
  int64_t units() const { return blocks * quads; }
  int64_t unit(int64_t share) const { return units() * share / shares; }
};

int64_t rows_at_once(const Tiles& tiles) {
  const int64_t blocks = std::max<int64_t>(1, kPackedBytes / (tiles.of_row * tiles.bytes()));
  return std::min(kMaxRows, blocks * kTileRows);
}

void tell_plan(const Params& p, const ThreadPool& pool) {
  const int64_t rows = std::min(rows_at_once(Tiles(p, Slices(p))), p.x_rows.count);
  const Cut cut(p, rows, pool.threads);
  pool.listener->tell("kernel", QOPS_ISA_NAME);
  pool.listener->tell("tile_rows", kTileRows);
  pool.listener->tell("tile_strips", kStrips);
  pool.listener->tell("rows_at_once", rows);
  tell_tasks(pool, cut.shares, 1);
}

template <class T>
Status run(const Params& p, const ThreadPool& pool) {
  if (pool.listener != nullptr) [[unlikely]] {
    tell_plan(p, pool);
    return Status::kOk;
  }
  if (p.perm != nullptr && !perm_is_valid(p)) return Status::kIndexOutOfRange;
  const Slices slices(p);
  const Tiles tiles(p, slices);
  const int64_t m = p.x_rows.count, most = std::min(rows_at_once(tiles), m), strips = ceil_div(p.n, kStripRows);
  const int64_t full = ceil_div(most, kTileRows) * kTileRows, x_bytes = full * tiles.of_row * tiles.columns;
  Scratch scratch(Scratch::bytes<uint8_t>(x_bytes) + Scratch::bytes<float>(full * slices.groups) +
                  Scratch::bytes<Workspace>(pool.threads) + QuantisedRows::bytes(p, most));
  if (!scratch.ok()) return Status::kOutOfMemory;
  PackedRows packed{scratch.take<uint8_t>(x_bytes), scratch.take<float>(full * slices.groups), nullptr};
  Workspace* workspaces = scratch.take<Workspace>(pool.threads);
  const QuantisedRows quantised(p, most, scratch);
  packed.scales = quantised.scale;
  for (int64_t first_row = 0; first_row < m; first_row += most) {
    const int64_t rows = std::min(most, m - first_row);
    parallel_for(pool, rows, 1 + (64 << 10) / p.k, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int8_t* x = quantised.q + row * p.k;
        if (p.x_scale == nullptr) {
          quantised.quantise<T>(p, first_row + row, row);
        } else {
          x = static_cast<const int8_t*>(p.x) + p.x_rows.offset(first_row + row);
        }
        pack_row(p, slices, tiles, packed, x, row);
      }
    });
    const Cut cut(p, rows, pool.threads);
    // The last block is multiplied whole. Bytes may be any, numbers of rows that are none could be denormal, and slow.
    std::fill(packed.sums + rows * slices.groups, packed.sums + cut.blocks * kTileRows * slices.groups, 0.0f);
    parallel_for(pool, cut.shares, 1, [&](int64_t begin, int64_t end) {
      const TileScope scope = TileScope::of_columns(static_cast<int>(tiles.columns));
      for (int64_t share = begin; share < end; ++share) {
        const int64_t stop = cut.unit(share + 1);
        for (int64_t unit = cut.unit(share); unit < stop;) {
          const int64_t block = unit % cut.blocks, strip = unit / cut.blocks * kStrips;
          const int64_t blocks = std::min(cut.blocks - block, stop - unit);
          const Range of{first_row + block * kTileRows, first_row + std::min(rows, (block + blocks) * kTileRows)};
          multiply<T>(p, slices, tiles, packed, first_row, of, {strip, std::min<int64_t>(strip + kStrips, strips)},
                      workspaces[share]);
          unit += blocks;
        }
      }
    });
  }
  return Status::kOk;
}

}  // namespace

Status int4_int8_gemm(const Params& p, const ThreadPool& pool) {
  if (p.x_rows.count < kLeastRows || p.n == 0 || p.k == 0) return avx512::int4_int8_gemm(p, pool);
  return with_dtype(p.dtype, [&](auto* element) { return run<std::remove_pointer_t<decltype(element)>>(p, pool); });
}

}  // namespace qops::cpu::QOPS_ISA_NS
