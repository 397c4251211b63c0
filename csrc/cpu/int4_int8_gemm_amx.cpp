// int4_int8_gemm on AMX tiles. The sums of groups are exact, so their bits are those of int4_int8_gemm.cpp, which keeps
// the calls of few rows; the float32 chain is written a second time.
//
// Idea. Four strips of weights are unpacked to signed bytes (q - 8, q - z) some groups at a time, which is as tdpbssd
// reads them: 64 columns of a strip are 16 rows of 64 bytes. They stay in L1 while all rows of x pass over them. A
// group that begins or ends inside of 64 columns has zeros in the rest of its tile. The int32 sums of a few groups are
// stored before the float32 chain takes them, so that totals are read and written once for all of these.
//
// Bytes and operations: a product of tiles takes 16 cycles (16 x 16 x 64), and the chain of a group 16 conversions, 16
// fma and as many loads and stores of 64 bytes for each 16 x 16. With groups of 128 both take about as long, with
// groups of 32 the chain bounds the call. Unpacking 512 bytes takes some 20 cycles, DRAM 90 to read them.
#include <algorithm>

#include "cpu/int4_int8_gemm.h"
#include "cpu/kernel_table.h"
#include "cpu/scratch.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

using Params = Int4Int8GemmParams;

// Fewer rows are faster without tiles. A tile's sums of a group take as long however short it is: with groups of 32
// tiles need 1.3 to 2 times as long for 16 rows, 1.05 to 1.4 for 32, and 0.95 to 1.1 for 64.
constexpr int64_t kLeastRows = 9, kLeastRowsOfShortGroups = 49;
int64_t least_rows(const Params& p) { return p.group_size < kTileRowBytes ? kLeastRowsOfShortGroups : kLeastRows; }
constexpr int kBlockRows = 2 * kTileRows;
// Strips that are unpacked together, and their columns of y.
constexpr int kStrips = 4;
constexpr int kWidth = kStrips * kStripRows;
// Rows of x that are packed and multiplied at a time: at most so many bytes of x, half of L2, and so many rows, for
// whose totals there is room.
constexpr int64_t kPackedBytes = 1 << 20;
constexpr int64_t kMaxRows = 256;
// Columns of w that are unpacked at a time, as whole groups or as a part of one.
constexpr int64_t kPartColumns = 128;
constexpr int kMaxGroups = 4;
constexpr int kMaxTiles = 4;  // of a strip: 4 groups, or 2 that lie across the border of a tile
constexpr int64_t kFetchBytes = 2048;
// Multiplications that a thread of its own pays for: some 5 us.
constexpr int64_t kLeastWork = 8 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// x in tiles: [block of 32 rows][64 columns][16 rows of the block][row][column].
struct PackedRows {
  uint8_t* bytes;
  float* sums;          // [row][groups]: of x
  const float* scales;  // of rows that the call has quantised, else null
  int64_t steps;        // of 64 columns

  int64_t block_bytes() const { return steps * 2 * kTileBytes; }
  const uint8_t* block(int64_t row) const { return bytes + row / kBlockRows * block_bytes(); }
};

// x, row `row` of the packed ones, to its place.
void pack_row(const Params& p, const Slices& slices, const PackedRows& packed, const int8_t* x, int64_t row) {
  const int64_t r = row % kBlockRows;
  uint8_t* to = packed.bytes + row / kBlockRows * packed.block_bytes() + r / kTileRows * kTileBytes;
  to += r % kTileRows * kTileRowBytes;
  for (int64_t column = 0; column < p.k; column += kTileRowBytes, to += 2 * kTileBytes) {
    copy_columns(p, x, column, std::min<int64_t>(kTileRowBytes, p.k - column), to);
  }
  if (!has_float_zeros(p.kind)) return;
  for (int64_t group = 0; group < slices.groups; ++group) {
    I32x16 sum = set1(int32_t{0});
    alignas(64) uint8_t block[64];
    for (int64_t i = 0; i < p.group_size; i += 64) {
      sum = sum + copy_columns(p, x, group * p.group_size + i, std::min<int64_t>(64, p.group_size - i), block);
    }
    packed.sums[row * slices.groups + group] = static_cast<float>(sum_lanes(sum));
  }
}

// Columns [begin, end) of w, unpacked: whole groups, or a part of one.
struct Part {
  int64_t begin, end;
  int64_t group;  // the first
  int groups;
  bool begins, ends;  // the group
  bool first_of_slice, last_of_slice;
};

struct Panel {
  alignas(64) uint8_t bytes[kMaxTiles][kStrips][kTileBytes];
  alignas(64) float scale[kMaxGroups][kWidth];
  alignas(64) float offset[kMaxGroups][kWidth];
  int64_t step[kMaxTiles];  // of x, that the tile is multiplied with
  int end_tile[kMaxGroups];
};

void unpack(const Params& p, const Slices& slices, const Part& part, Range strips, Panel& panel) {
  const auto [scales, zeros] = numbers_of(p, slices.groups);
  int tile = 0;
  for (int g = 0; g < part.groups; ++g) {
    const int64_t group = part.group + g;
    const int64_t begin = std::max(part.begin, group * p.group_size);
    const int64_t end = std::min(part.end, (group + 1) * p.group_size);
    for (int64_t column = begin; column < end; ++tile) {
      const int64_t step = column / kTileRowBytes, row = column % kTileRowBytes / 4;
      const int64_t stop = std::min(end, (step + 1) * kTileRowBytes);
      panel.step[tile] = step;
      for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
        uint8_t* to = panel.bytes[tile][strip - strips.begin];
        if (stop - column < kTileRowBytes) std::memset(to, 0, kTileBytes);
        to += row * kTileRowBytes;
        const I32x16 zero = p.kind == WeightKind::kZeroPoint
                                ? load(reinterpret_cast<const uint8_t*>(zeros.address<false>(group, strip)))
                                : set1(int32_t{8});
        const B8x64 centre = bit_cast<B8x64>(zero * set1(int32_t{0x01010101}));
        const char* w = static_cast<const char*>(p.packed) + (strip * p.k + column) * (kStripRows / 2);
        for (int64_t n = (stop - column) / 8; n > 0; --n, w += 64, to += 2 * kTileRowBytes) {
          prefetch(w + kFetchBytes);
          const B8x64 codes = load_bytes(w);
          store_bytes(to, low_nibbles(codes) - centre);
          store_bytes(to + kTileRowBytes, high_nibbles(codes) - centre);
        }
      }
      column = stop;
    }
    panel.end_tile[g] = tile;
    for (int64_t strip = strips.begin; part.ends && strip < strips.end; ++strip) {
      const int64_t to = (strip - strips.begin) * kStripRows;
      const F32x16 scale = scales.load(group, strip);
      store(panel.scale[g] + to, scale);
      if (has_float_zeros(p.kind)) {
        store(panel.offset[g] + to, offset_of(p, scale, zeros.load(group, strip)));
      }
    }
  }
}

// Of the rows of a block: sums of the groups of a part, and of a group that has not ended.
using Sums = int32_t[kMaxGroups][kBlockRows][kWidth];
using Carry = int32_t[kBlockRows][kWidth];

// RowTiles x Strips tiles of sums, from the panel's strip `strip` on.
template <int RowTiles, int Strips>
void multiply_tiles(const uint8_t* x, const Panel& panel, int begin, int end, int strip, const Carry* carry,
                    Carry& sums) {
  constexpr int64_t kRowBytes = sizeof(sums[0]);
  const int column = strip * kStripRows;
  const auto each = [&](const auto& f) {
    f(std::integral_constant<int, 0>(), 0, 0);
    f(std::integral_constant<int, 1>(), 0, 1);
    f(std::integral_constant<int, 2>(), RowTiles == 2 ? 1 : 0, RowTiles == 2 ? 0 : 2);
    f(std::integral_constant<int, 3>(), RowTiles == 2 ? 1 : 0, RowTiles == 2 ? 1 : 3);
  };
  if (carry == nullptr) {
    each([](auto tile, int, int) { zero_tile<tile>(); });
  } else {
    each([&](auto tile, int rows, int s) {
      load_tile<tile>((*carry)[rows * kTileRows] + column + s * kStripRows, kRowBytes);
    });
  }
  for (int t = begin; t < end; ++t) {
    const uint8_t* x_tile = x + panel.step[t] * 2 * kTileBytes;
    const auto& w = panel.bytes[t];
    load_tile<4>(x_tile, kTileRowBytes);
    if constexpr (RowTiles == 2) {
      load_tile<6>(w[strip], kTileRowBytes);
      dot_tiles<0, 4, 6>();
      load_tile<7>(w[strip + 1], kTileRowBytes);
      dot_tiles<1, 4, 7>();
      load_tile<5>(x_tile + kTileBytes, kTileRowBytes);
      dot_tiles<2, 5, 6>();
      dot_tiles<3, 5, 7>();
    } else {
      load_tile<5>(w[0], kTileRowBytes);
      dot_tiles<0, 4, 5>();
      load_tile<6>(w[1], kTileRowBytes);
      dot_tiles<1, 4, 6>();
      load_tile<7>(w[2], kTileRowBytes);
      dot_tiles<2, 4, 7>();
      load_tile<5>(w[3], kTileRowBytes);
      dot_tiles<3, 4, 5>();
    }
  }
  each([&](auto tile, int rows, int s) {
    store_tile<tile>(sums[rows * kTileRows] + column + s * kStripRows, kRowBytes);
  });
}

// The float32 chain of some groups for a block of rows. x_sums: of the block's first row and the first of the groups.
template <int Groups, bool kOffsets>
void add_groups(const Panel& panel, const Sums& sums, int64_t rows, const float* x_sums, int64_t x_sums_stride,
                bool first, bool last, float* totals, float* y) {
  for (int column = 0; column < kWidth; column += kLanes) {
    F32x16 scale[Groups], offset[Groups];
    QOPS_UNROLL for (int g = 0; g < Groups; ++g) {
      scale[g] = load(panel.scale[g] + column);
      if constexpr (kOffsets) offset[g] = load(panel.offset[g] + column);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* total = totals + r * kWidth + column;
      F32x16 t = first ? set1(0.0f) : load(total);
      QOPS_UNROLL for (int g = 0; g < Groups; ++g) {
        t = fma(scale[g], to_float(load(sums[g][r] + column)), t);
        if constexpr (kOffsets) t = fma(offset[g], set1(x_sums[r * x_sums_stride + g]), t);
      }
      if (last) {
        store(y + r * kWidth + column, load(y + r * kWidth + column) + t);
      } else {
        store(total, t);
      }
    }
  }
}

template <int Groups = kMaxGroups, class... Args>
void add_groups_of(int groups, bool offsets, const Args&... args) {
  if constexpr (Groups > 1) {
    if (groups < Groups) return add_groups_of<Groups - 1>(groups, offsets, args...);
  }
  offsets ? add_groups<Groups, true>(args...) : add_groups<Groups, false>(args...);
}

// What a thread needs to multiply.
struct Workspace {
  Panel panel;
  alignas(64) Sums sums;
  alignas(64) int32_t carry[kMaxRows][kWidth];
  alignas(64) float totals[kMaxRows * kWidth];
  alignas(64) float y[kMaxRows * kWidth];
};

template <class T>
void finish_rows(const Params& p, Range rows, Range strips, const float* x_scale_of_row, const float* y) {
  const auto finish_all = [&](auto plain, auto epilogue) {
    for (int64_t row = rows.begin; row < rows.end; ++row, y += kWidth) {
      const F32x16 x_scale =
          set1(x_scale_of_row != nullptr ? *x_scale_of_row++ : p.x_scale[p.x_scale_rows.offset(row)]);
      const auto place = [&](int64_t strip) { return Place{row, strip}; };
      const auto value = [&](int64_t strip) {
        return scaled(p, x_scale, load(y + (strip - strips.begin) * kStripRows), strip);
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

// y of up to kMaxRows rows and up to kStrips strips. `packed` holds the rows from first_row on.
template <class T>
void multiply(const Params& p, const Slices& slices, const PackedRows& packed, int64_t first_row, Range rows,
              Range strips, Workspace& work) {
  std::memset(work.y, 0, static_cast<size_t>(rows.size() * kWidth) * sizeof(float));
  const auto multiply_part = [&](const Part& part) {
    unpack(p, slices, part, strips, work.panel);
    for (int64_t row = rows.begin; row < rows.end; row += kBlockRows) {
      const int64_t count = std::min<int64_t>(kBlockRows, rows.end - row), at = row - rows.begin;
      const uint8_t* x = packed.block(row - first_row);
      auto* carry = reinterpret_cast<Carry*>(work.carry + at);
      for (int g = 0, tile = 0; g < part.groups; tile = work.panel.end_tile[g++]) {
        const Carry* from = part.begins ? nullptr : carry;
        Carry& to = part.ends ? work.sums[g] : *carry;
        const int end = work.panel.end_tile[g];
        if (count <= kTileRows) {
          multiply_tiles<1, 4>(x, work.panel, tile, end, 0, from, to);
        } else {
          multiply_tiles<2, 2>(x, work.panel, tile, end, 0, from, to);
          multiply_tiles<2, 2>(x, work.panel, tile, end, 2, from, to);
        }
      }
      if (!part.ends) continue;
      const float* x_sums = packed.sums + (row - first_row) * slices.groups + part.group;
      add_groups_of(part.groups, has_float_zeros(p.kind), work.panel, work.sums, count, x_sums, slices.groups,
                    part.first_of_slice, part.last_of_slice, work.totals + at * kWidth, work.y + at * kWidth);
    }
  };
  const int most = p.group_size <= kPartColumns / 4 ? 4 : p.group_size <= kPartColumns / 2 ? 2 : 1;
  for (int slice = 0; slice < Slices::kCount; ++slice) {
    const int64_t begin = slices.begin(slice), end = slices.begin(slice + 1);
    for (int64_t group = begin; group < end;) {
      const int groups = static_cast<int>(std::min<int64_t>(most, end - group));
      const int64_t columns_end = (group + groups) * p.group_size;
      for (int64_t column = group * p.group_size; column < columns_end;) {
        const int64_t stop = p.group_size <= kPartColumns
                                 ? columns_end
                                 : std::min(columns_end, (column / kPartColumns + 1) * kPartColumns);
        multiply_part({column, stop, group, groups, column == group * p.group_size, stop == columns_end, group == begin,
                       group + groups == end});
        column = stop;
      }
      group += groups;
    }
  }
  const float* x_scales = packed.scales == nullptr ? nullptr : packed.scales + rows.begin - first_row;
  finish_rows<T>(p, rows, strips, x_scales, work.y);
}

// How the product of some rows is cut into tasks, each up to four strips of one of the parts of the rows, and these
// into shares, one for each thread that it pays for.
struct Cut {
  int64_t blocks, quads, parts, tasks, shares;

  // Few strips and many threads: the rows are cut too.
  Cut(const Params& p, int64_t rows, int threads)
      : blocks(ceil_div(rows, kBlockRows)), quads(ceil_div(ceil_div(p.n, kStripRows), kStrips)) {
    parts = std::clamp<int64_t>(ceil_div(4 * threads, quads), 1, blocks);
    tasks = quads * parts;
    // Unpacking takes as long as multiplying with 16 rows.
    const int64_t work = tasks * kWidth * p.k * (16 + rows / parts);
    shares = std::clamp<int64_t>(work / kLeastWork, 1, std::min<int64_t>(tasks, threads));
  }
  int64_t task(int64_t share) const { return tasks * share / shares; }
};

int64_t rows_at_once(const Params& p) {
  const int64_t blocks = std::max<int64_t>(1, kPackedBytes / (ceil_div(p.k, kTileRowBytes) * 2 * kTileBytes));
  return std::min(kMaxRows, blocks * kBlockRows);
}

void tell_plan(const Params& p, const ThreadPool& pool) {
  const int64_t rows = std::min(rows_at_once(p), p.x_rows.count);
  const Cut cut(p, rows, pool.threads);
  pool.listener->tell("kernel", QOPS_ISA_NAME);
  pool.listener->tell("tile_rows", kBlockRows);
  pool.listener->tell("tile_strips", kStrips);
  pool.listener->tell("rows_at_once", rows);
  pool.listener->tell("row_blocks", cut.parts);
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
  PackedRows packed{nullptr, nullptr, nullptr, ceil_div(p.k, kTileRowBytes)};
  const int64_t m = p.x_rows.count, most = std::min(rows_at_once(p), m), strips = ceil_div(p.n, kStripRows);
  const int64_t x_bytes = ceil_div(most, kBlockRows) * packed.block_bytes();
  Scratch scratch(Scratch::bytes<uint8_t>(x_bytes) + Scratch::bytes<float>(most * slices.groups) +
                  Scratch::bytes<Workspace>(pool.threads) + QuantisedRows::bytes(p, most));
  if (!scratch.ok()) return Status::kOutOfMemory;
  packed.bytes = scratch.take<uint8_t>(x_bytes);
  packed.sums = scratch.take<float>(most * slices.groups);
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
        pack_row(p, slices, packed, x, row);
      }
    });
    const Cut cut(p, rows, pool.threads);
    parallel_for(pool, cut.shares, 1, [&](int64_t begin, int64_t end) {
      const TileScope tiles;
      for (int64_t share = begin; share < end; ++share) {
        for (int64_t task = cut.task(share); task < cut.task(share + 1); ++task) {
          const int64_t part = task / cut.quads, strip = task % cut.quads * kStrips;
          const auto row = [&](int64_t i) {
            return first_row + std::min(rows, cut.blocks * i / cut.parts * kBlockRows);
          };
          multiply<T>(p, slices, packed, first_row, {row(part), row(part + 1)},
                      {strip, std::min<int64_t>(strip + kStrips, strips)}, workspaces[share]);
        }
      }
    });
  }
  return Status::kOk;
}

}  // namespace

Status int4_int8_gemm(const Params& p, const ThreadPool& pool) {
  if (p.x_rows.count < least_rows(p) || p.n == 0 || p.k == 0) return avx512::int4_int8_gemm(p, pool);
  return with_dtype(p.dtype, [&](auto* element) { return run<std::remove_pointer_t<decltype(element)>>(p, pool); });
}

}  // namespace qops::cpu::QOPS_ISA_NS
