// The method of weight_only_gemm.h on AMX tiles, for calls of many rows. Both digits of x are bytes, so a tile's sums
// are the same exact integers, and the float32 chain that follows is the same: so are the bits.
//
// Idea. The digits of 16 rows lie in tiles (RowTiles), zeros where rows or columns end. All rows pass over two strips,
// a few blocks of them at a time, which stay in L1. Codes of 8 bits lie in memory as tiles do and are read from there;
// those of 4 bits are unpacked to signed bytes in L1, centred (q - 8 or q - z), so that sums start at zero. 16 rows and
// a block of 128 columns of both strips take eight products, which give two tiles of sums of each digit. They are
// stored while the products of the next block run, and the float32 chain runs on vectors between the products of the
// one after that. The 16 rows of totals of one strip stay in registers over the blocks of a pass, those of the other in
// L1, where multiply-adds read them.
//
// Operations, measured on a 2-core Xeon, whose two cores do not share the unit, of one strip: the four products take 64
// cycles, 24 ns (2.6 GHz while tiles are busy), as many as dense bfloat16 needs. Their 4 loads and 2 stores of tiles
// take 14 ns, 2 loads fewer than one strip at a time. Beside tiles floating-point vectors have one port of two, and so
// have shifts; the other integer operations have both. The digits' sums are therefore put together as integers, and
// shifted by shuffling bytes: the chain takes 18 ns (25 with shifts). All of it takes 32 ns in L1, blocks of 32 columns
// 26: dense bfloat16 multiplies those in 6, so the chain alone allows a third of its speed. A pass takes 44 with what
// begins and ends it, 54 with x and y in L2, which gives 64 bytes in 2 to 3 cycles.
//
// What was tried and lost: passes of 256 and 384 columns (12 %) and of 1024 (10 %); a first sum of 1.5 x 2^23 in each
// accumulator, which saves a vector operation and costs loads of tiles (20 %); prefetching x into L1 (16 %); more rows
// at a time than L2 holds (16 %).
#pragma once

#include <algorithm>
#include <atomic>

#include "cpu/weight_only_gemm.h"

namespace qops::cpu::QOPS_ISA_NS {

// Fewer rows are faster without tiles, which take as long for one row as for 16; 4-bit codes have a method of their own
// for them (weight_only_gemm_few_amx.h). Short groups need more rows: their tiles are not full.
template <class Codes>
inline int64_t min_tile_rows(const WeightOnlyGemmParams& p) {
  const bool is_short = p.group_size <= kTileRowBytes;
  return std::is_same_v<Codes, Int4Codes> ? (is_short ? 12 : 9) : (is_short ? 9 : 7);
}
// Strips and columns that are multiplied at a time: with the x that passes over them they fill L1.
inline constexpr int kChunkStrips = 2;
inline constexpr int64_t kPassColumns = 512, kLongPassColumns = 4096;
inline constexpr int64_t kPassCodes = kPassColumns * kStripRows;  // bytes of a strip
inline constexpr int kMostPassBlocks = 64;
// Digits of x are written and multiplied at most so many bytes at a time: half of L2, but 64 rows at least.
inline constexpr int64_t kDigitBytes = 1 << 20;
inline constexpr int64_t kMinRowTiles = 4;
// How far ahead of the strips' codes that are unpacked others are fetched into L2.
inline constexpr int64_t kTileFetchBytes = 8 << 10;

inline constexpr int kTileValues = kTileRows * kStripRows;
#define QOPS_UNROLL_ROWS _Pragma("GCC unroll 16")

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The two digits of rows of x: [16 rows][block][64 columns][digit] tiles of [row][column]. Short groups have one tile a
// block and digit, whose rows are no longer than they.
struct RowTiles {
  int64_t blocks;
  int64_t steps;      // of row_bytes columns in each block
  int64_t rows;       // of a tile
  int64_t row_bytes;  // of a tile
  uint8_t* bytes;
  float* scale;  // [16 rows][block][row]; of rows that are not there 0
  float* sum;

  explicit RowTiles(const Blocks& of, int64_t rows = kTileRows)
      : blocks(of.count),
        steps(ceil_div(std::min<int64_t>(of.group_size, kMaxBlock), kTileRowBytes)),
        rows(rows),
        row_bytes(std::min<int64_t>(ceil_div(of.group_size, kLanes) * kLanes, kTileRowBytes)) {}
  int64_t columns() const { return steps * row_bytes; }  // of a block, with those that are zeros
  int64_t digit_bytes() const { return rows * row_bytes; }
  int64_t block_bytes() const { return steps * 2 * digit_bytes(); }
  int64_t tile_bytes() const { return blocks * block_bytes(); }
  uint8_t* block(int64_t tile, int64_t index) const { return bytes + (tile * blocks + index) * block_bytes(); }
  int64_t scale_at(int64_t tile, int64_t block) const { return (tile * blocks + block) * kTileRows; }
};

// One row of them, where write_digits() puts it.
struct RowOfTiles {
  const RowTiles& tiles;
  int64_t tile, r;
  uint8_t* bytes;
  int64_t digit_bytes, block_bytes;

  RowOfTiles(const RowTiles& tiles, int64_t row)
      : tiles(tiles),
        tile(row / kTileRows),
        r(row % kTileRows),
        bytes(tiles.block(tile, 0) + r * tiles.row_bytes),
        digit_bytes(tiles.digit_bytes()),
        block_bytes(tiles.block_bytes()) {}

  uint8_t* at(int64_t block, int64_t k, int d) const {
    // Rows shorter than 64 bytes hold the whole block.
    return bytes + block * block_bytes + (k / kTileRowBytes * 2 + d) * digit_bytes + k % kTileRowBytes;
  }
  void digits(const Block& b, int64_t k, int d, I32x16 values, int64_t) const {
    store_bytes(at(b.index, k, d), values);
  }
  void end_block(const Block& b, const int32_t* sums, float scale) const {
    end_block(b.index, b.size, scale, sum_of_values(sums, 2, scale));
  }
  // After `columns` columns come zeros.
  void end_block(int64_t block, int64_t columns, float scale, float sum) const {
    for (int64_t k = ceil_div(columns, kLanes) * kLanes; k < tiles.columns(); k += kLanes) {
      for (int d = 0; d < 2; ++d) std::memset(at(block, k, d), 0, kLanes);
    }
    tiles.scale[tiles.scale_at(tile, block) + r] = scale;
    tiles.sum[tiles.scale_at(tile, block) + r] = sum;
  }
};

// Memory of one task.
struct Workspace {
  int32_t* sums[2];  // [strip][digit] tiles
  uint8_t* codes;    // [strip][block] tiles
  float* scale;      // [block][strip][column]
  float* offset;
  float* second;  // totals of the second strip
  float* total;   // [16 rows][strip] tiles
  float* y;
};

// Sums of a block of two strips and what makes floats of them.
struct Finish {
  const int32_t* sums;
  const float* x_scale;
  const float* x_sum;
  const float* scale;
  const float* offset;
  int64_t at;     // where totals and y of its rows begin
  int64_t block;  // of the pass
};

inline I32x16 sum_of_digits(const int32_t* tiles, int r) {
  return shift_left_a_byte(load(tiles + r * kStripRows)) + load(tiles + kTileValues + r * kStripRows);
}

template <bool kOffset, int kFirst, int kCount>
QOPS_ALWAYS_INLINE void finish_rows(const Finish& f, F32x16 (&total)[kTileRows], float* second) {
  const F32x16 scale = load(f.scale), second_scale = load(f.scale + kStripRows);
  QOPS_UNROLL_ROWS for (int r = kFirst; r < kFirst + kCount; ++r) {
    const F32x16 x_scale = set1(f.x_scale[r]);
    total[r] = fma(scale, to_float(sum_of_digits(f.sums, r)) * x_scale, total[r]);
    F32x16 sum = fma(second_scale, to_float(sum_of_digits(f.sums + 2 * kTileValues, r)) * x_scale,
                     load(second + r * kStripRows));
    if constexpr (kOffset) {
      const F32x16 x_sum = set1(f.x_sum[r]);
      total[r] = fma(load(f.offset), x_sum, total[r]);
      sum = fma(load(f.offset + kStripRows), x_sum, sum);
    }
    store(second + r * kStripRows, sum);
  }
}

// One of the four products of a step: before the first of a block the sums of the block before go to memory.
template <int kSum, bool kFirst>
QOPS_ALWAYS_INLINE void multiply_tiles(int32_t* sums_before) {
  if constexpr (kFirst) {
    store_tile<kSum>(sums_before + kSum * kTileValues, kTileRowBytes);
    zero_tile<kSum>();
  }
  constexpr int kW = 6 + kSum / 2;
  if constexpr (kSum % 2 == 0) {
    dot_tiles<kSum, 4, kW>();
  } else {
    dot_tiles_unsigned_x<kSum, 5, kW>();
  }
}

// The products of one block; beside them runs the chain of the block before the one before.
template <int kSteps, bool kOffset, bool kFinish>
QOPS_ALWAYS_INLINE void multiply_block(const uint8_t* x, int64_t row_bytes, const uint8_t* w, const uint8_t* second_w,
                                       int32_t* sums_before, const Finish& f, F32x16 (&total)[kTileRows],
                                       float* second) {
  constexpr int kRows = kTileRows / (4 * kSteps);
  const auto step = [&](auto index) __attribute__((always_inline)) {
    constexpr int kStep = decltype(index)::value, kRow = 4 * kRows * kStep;
    const uint8_t* of = x + 2 * kStep * kTileBytes;  // of two steps both are of whole tiles
    load_tile<4>(of, row_bytes);
    load_tile<6>(w + kStep * kTileBytes, kTileRowBytes);
    multiply_tiles<0, kStep == 0>(sums_before);
    if constexpr (kFinish) finish_rows<kOffset, kRow, kRows>(f, total, second);
    load_tile<5>(of + kTileRows * row_bytes, row_bytes);
    multiply_tiles<1, kStep == 0>(sums_before);
    if constexpr (kFinish) finish_rows<kOffset, kRow + kRows, kRows>(f, total, second);
    load_tile<7>(second_w + kStep * kTileBytes, kTileRowBytes);
    multiply_tiles<2, kStep == 0>(sums_before);
    if constexpr (kFinish) finish_rows<kOffset, kRow + 2 * kRows, kRows>(f, total, second);
    multiply_tiles<3, kStep == 0>(sums_before);
    if constexpr (kFinish) finish_rows<kOffset, kRow + 3 * kRows, kRows>(f, total, second);
  };
  step(std::integral_constant<int, 0>());
  if constexpr (kSteps == 2) step(std::integral_constant<int, 1>());
}

// Bytes that are fetched into L2 while others are multiplied: those of each strip of a chunk from `offset` on. Where
// its strip ends, the strip of the next chunk follows.
struct Ahead {
  const char* strip;
  const char* end;
  int64_t strip_bytes, offset, bytes, strips;
  int64_t lines_per_block;
  int64_t done = 0;

  void fetch() {
    for (int64_t i = 0; i < lines_per_block && done < bytes; ++i, done += 64) {
      const int64_t at = offset + done;
      const char* line = strip + at + (at < strip_bytes ? 0 : (kChunkStrips - 1) * strip_bytes);
      for (int64_t s = 0; s < strips; ++s, line += strip_bytes) {
        if (line < end) prefetch_to_l2(line);
      }
    }
  }
};

// The blocks that are multiplied at a time, and what passes over them.
struct Pass {
  Block first;
  int64_t blocks = 0;
  bool starts_slice = true, ends_slice = true;
  const uint8_t* codes[kChunkStrips];
  bool ends[kMostPassBlocks];   // [block] whether a slice ends with it
  int32_t at[kMostPassBlocks];  // [block] where its codes begin

  explicit Pass(Block first) : first(first) {}
};

// Up to the last slice that ends within `most` blocks.
inline Pass next_pass(const Blocks& blocks, Block b, int64_t most, int64_t& slice, bool starts_slice) {
  Pass pass(b);
  pass.starts_slice = starts_slice;
  most = std::min(most, blocks.count - b.index);
  int64_t ended = 0;
  for (int64_t i = 0; i < most; ++i) {
    // Several short slices may end with one block.
    const auto is_end = [&] { return slice <= kSlices && (b.index + i + 1) * kSlices >= slice * blocks.count; };
    pass.ends[i] = is_end();
    while (is_end()) ++slice;
    if (pass.ends[i]) ended = i + 1;
  }
  pass.blocks = ended == 0 ? most : ended;
  pass.ends_slice = ended != 0;
  return pass;
}

inline B8x64 centred(Int4Codes, B8x64 q, B8x64 z) { return subtract_bytes(q, z); }
inline B8x64 centred(Int8Codes, B8x64 q, B8x64) { return q; }

// Scales of a pass, and its codes: as they lie where kDirect, else unpacked. A chunk of one strip has it twice.
template <class Codes, bool kDirect>
inline void prepare(const WeightOnlyGemmParams& p, const Blocks& blocks, int64_t columns, Range strips,
                    const Workspace& work, Pass& pass) {
  const int64_t strip_bytes = p.k / Codes::kColumns * 64;
  const bool with_offset = has_float_zeros(p.kind);
  const auto [scales, zeros] = numbers_of(p, blocks.groups);
  const I32x16 all_bytes = set1(int32_t{0x01010101});
  for (int64_t s = 0; s < kChunkStrips; ++s) {
    const int64_t strip = std::min(strips.begin + s, strips.end - 1);
    const char* packed = static_cast<const char*>(p.packed) + strip * strip_bytes;
    uint8_t* unpacked = work.codes + s * kPassCodes;
    pass.codes[s] = kDirect ? reinterpret_cast<const uint8_t*>(packed) : unpacked;
    Block b = pass.first;
    for (int64_t i = 0; i < pass.blocks; ++i, b.next(blocks)) {
      const int64_t at = (i * kChunkStrips + s) * kStripRows;
      const F32x16 scale = scales.load(b.group, strip);
      store(work.scale + at, scale);
      if (with_offset) {
        const F32x16 z = zeros.load(b.group, strip);
        store(work.offset + at, p.kind == WeightKind::kOffset ? Codes::offset(scale, z) : scale * (set1(8.0f) - z));
      }
      pass.at[i] = static_cast<int32_t>(kDirect ? b.begin * kStripRows : i * columns * kStripRows);
      if constexpr (!kDirect) {
        const I32x16 z = p.kind == WeightKind::kZeroPoint
                             ? load(reinterpret_cast<const uint8_t*>(zeros.address<false>(b.group, strip)))
                             : set1(int32_t{8});
        const B8x64 centre = bit_cast<B8x64>(z * all_bytes);
        const char* from = packed + b.begin / Codes::kColumns * 64;
        uint8_t* to = unpacked + pass.at[i];
        for (int64_t n = b.size / Codes::kColumns; n > 0; --n, from += 64) {
          const B8x64 codes = load_bytes(from);
          for (int step = 0; step < Codes::kSteps; ++step, to += 64) {
            store(to, centred(Codes(), Codes::step(codes, step), centre));
          }
        }
      }
    }
  }
}

QOPS_ALWAYS_INLINE void begin_totals(const Pass& pass, const Workspace& work, const Finish& f,
                                     F32x16 (&total)[kTileRows]) {
  if (f.block != 0) return;
  if (pass.starts_slice) {
    QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) {
      total[r] = set1(0.0f);
      store(work.second + r * kStripRows, total[r]);
    }
  } else {
    const float* from = work.total + f.at;
    QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) {
      total[r] = load(from + r * kStripRows);
      store(work.second + r * kStripRows, load(from + kTileValues + r * kStripRows));
    }
  }
}

QOPS_ALWAYS_INLINE void end_totals(const Pass& pass, const Workspace& work, const Finish& f,
                                   F32x16 (&total)[kTileRows]) {
  if (pass.ends[f.block]) {
    float* y = work.y + f.at;
    QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) {
      float *first = y + r * kStripRows, *other = first + kTileValues, *second = work.second + r * kStripRows;
      store(first, load(first) + total[r]);
      store(other, load(other) + load(second));
      total[r] = set1(0.0f);
      store(second, total[r]);
    }
  } else if (f.block + 1 == pass.blocks) {
    float* to = work.total + f.at;
    QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) {
      store(to + r * kStripRows, total[r]);
      store(to + kTileValues + r * kStripRows, load(work.second + r * kStripRows));
    }
  }
}

// All rows over the blocks of a pass.
template <int kSteps, bool kOffset>
[[gnu::noinline]] void multiply_pass(const RowTiles& tiles, Range row_tiles, const Pass& pass, const Workspace& work,
                                     Ahead ahead) {
  const int64_t row_bytes = tiles.row_bytes, block_bytes = tiles.block_bytes();
  F32x16 total[kTileRows];
  QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) total[r] = set1(0.0f);
  Finish before{}, second{};  // of the block before, whose sums are in tiles, and of the one before that
  int64_t done = 0;
  for (int64_t t = row_tiles.begin; t < row_tiles.end; ++t) {
    const uint8_t* x = tiles.block(t, pass.first.index);
    const int64_t scales = tiles.scale_at(t, pass.first.index);
    Finish now{nullptr,    tiles.scale + scales, tiles.sum + scales,
               work.scale, work.offset,          (t - row_tiles.begin) * kChunkStrips * kTileValues,
               0};
    for (; now.block < pass.blocks; ++now.block, ++done) {
      now.sums = work.sums[done % 2];
      int32_t* sums_before = work.sums[1 - done % 2];
      const uint8_t *w = pass.codes[0] + pass.at[now.block], *second_w = pass.codes[1] + pass.at[now.block];
      if (done < 2) {
        multiply_block<kSteps, kOffset, false>(x, row_bytes, w, second_w, sums_before, second, total, work.second);
      } else {
        begin_totals(pass, work, second, total);
        multiply_block<kSteps, kOffset, true>(x, row_bytes, w, second_w, sums_before, second, total, work.second);
        end_totals(pass, work, second, total);
      }
      ahead.fetch();
      second = before;
      before = now;
      x += block_bytes;
      now.x_scale += kTileRows;
      now.x_sum += kTileRows;
      now.scale += kChunkStrips * kStripRows;
      now.offset += kChunkStrips * kStripRows;
    }
  }
  int32_t* sums = work.sums[(done - 1) % 2];
  store_tile<0>(sums, kTileRowBytes);
  store_tile<1>(sums + kTileValues, kTileRowBytes);
  store_tile<2>(sums + 2 * kTileValues, kTileRowBytes);
  store_tile<3>(sums + 3 * kTileValues, kTileRowBytes);
  for (const bool is_last : {false, true}) {
    if (!is_last && done == 1) continue;
    const Finish& f = is_last ? before : second;
    begin_totals(pass, work, f, total);
    finish_rows<kOffset, 0, kTileRows>(f, total, work.second);
    end_totals(pass, work, f, total);
  }
}

// What becomes of the sums of some rows and strips: [16 rows][strip] tiles.
template <class T>
inline void finish_chunk(const WeightOnlyGemmParams& p, Range rows, const uint8_t* digits_of_row, Range strips,
                         const float* sums) {
  F32x16 bias[kChunkStrips];
  for (int64_t s = 0; s < strips.size(); ++s) {
    bias[s] = p.bias == nullptr ? set1(0.0f) : bias_of_strip(p, strips.begin + s);
  }
  const auto run = [&](auto plain, auto epilogue) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      if (digits_of_row[row] != 2) continue;
      const int64_t r = row - rows.begin;
      const float* of_row = sums + r / kTileRows * kChunkStrips * kTileValues + r % kTileRows * kStripRows;
      const auto sum = [&](int64_t s) {
        const F32x16 y = load(of_row + s * kTileValues);
        return p.bias == nullptr ? y : y + bias[s];
      };
      const auto place = [&](int64_t s) { return Place{row, strips.begin + s}; };
      int64_t s = 0;
      if constexpr (plain) {
        T* y = static_cast<T*>(p.y) + row * p.n;
        for (; s < strips.size(); ++s) {
          const int64_t column = (strips.begin + s) * kStripRows;
          store_n(y + column, sum(s), p.n - column);
        }
      } else {
        for (; s + 1 < strips.size(); s += 2) finish<epilogue, T>(p, place(s), sum(s), place(s + 1), sum(s + 1));
        if (s < strips.size()) finish<epilogue, T>(p, place(s), sum(s));
      }
    }
  };
  if (p.is_plain()) return run(std::true_type(), std::integral_constant<Epilogue, Epilogue::kNone>());
  with_epilogue(p, [&](auto epilogue) { run(std::false_type(), epilogue); });
}

// Lines of y, which lie far apart, into L2 while what they receive is computed.
template <class T>
inline void fetch_outputs(const WeightOnlyGemmParams& p, Range rows, Range strips) {
  if (!p.is_plain()) return;
  const T* y = static_cast<const T*>(p.y) + strips.begin * kStripRows;
  for (int64_t row = rows.begin; row < rows.end; ++row) prefetch_to_write(y + row * p.n);
}

// y of some of the rows from first_row on, whose digits are in `tiles`, and strips. False: out of memory.
template <class Codes, class T, int kSteps, bool kOffset>
inline bool multiply(const WeightOnlyGemmParams& p, const Blocks& blocks, const RowTiles& tiles,
                     const uint8_t* digits_of_row, int64_t first_row, Range rows, Range strips) {
  const Range row_tiles{(rows.begin - first_row) / kTileRows, ceil_div(rows.end - first_row, kTileRows)};
  constexpr int64_t kScales = kMostPassBlocks * kChunkStrips * kStripRows;
  const int64_t outputs = row_tiles.size() * kChunkStrips * kTileValues;
  Scratch scratch(Scratch::bytes<int32_t>(8 * kTileValues) + Scratch::bytes<uint8_t>(kChunkStrips * kPassCodes) +
                  2 * Scratch::bytes<float>(kScales) + Scratch::bytes<float>(kTileValues) +
                  2 * Scratch::bytes<float>(outputs));
  if (!scratch.ok()) return false;
  Workspace work;
  for (int32_t*& sums : work.sums) sums = scratch.take<int32_t>(4 * kTileValues);
  work.codes = scratch.take<uint8_t>(kChunkStrips * kPassCodes);
  work.scale = scratch.take<float>(kScales);
  work.offset = scratch.take<float>(kScales);
  work.second = scratch.take<float>(kTileValues);
  work.total = scratch.take<float>(outputs);
  work.y = scratch.take<float>(outputs);
  std::memset(work.codes, 0, kChunkStrips * kPassCodes);  // what blocks do not fill meets zeros of x

  // Codes of 8 bits lie as tiles do. Behind a block that does not fill its tiles they hold those of the next, which
  // meet zeros of x; behind the last one of all is nothing that may be read.
  const bool fills = blocks.group_size % tiles.columns() == 0;
  const char* packed = static_cast<const char*>(p.packed);
  const int64_t strip_bytes = p.k / Codes::kColumns * 64;
  const TileScope scope = TileScope::of_columns(static_cast<int>(tiles.row_bytes));
  for (int64_t begin = strips.begin; begin < strips.end; begin += kChunkStrips) {
    const Range of{begin, std::min(begin + kChunkStrips, strips.end)};
    const bool direct = std::is_same_v<Codes, Int8Codes> && (fills || of.end < strips_of(p));
    // What is read once need not stay in L1.
    const int64_t pass_columns = direct && row_tiles.size() == 1 ? kLongPassColumns : kPassColumns;
    const int64_t most = std::min<int64_t>(pass_columns / tiles.columns(), kMostPassBlocks);
    std::memset(work.y, 0, static_cast<size_t>(outputs) * sizeof(float));
    fetch_outputs<T>(p, rows, of);
    Block b(blocks);
    int64_t slice = 1;
    bool starts_slice = true;
    while (b.index < blocks.count) {
      Pass pass = next_pass(blocks, b, most, slice, starts_slice);
      direct ? prepare<Codes, true>(p, blocks, tiles.columns(), of, work, pass)
             : prepare<Codes, false>(p, blocks, tiles.columns(), of, work, pass);
      for (int64_t i = 0; i < pass.blocks; ++i) b.next(blocks);
      const int64_t from = pass.first.begin / Codes::kColumns * 64;
      const int64_t bytes = b.begin / Codes::kColumns * 64 - from;
      const int64_t lines = ceil_div(bytes, 64 * row_tiles.size() * pass.blocks);
      multiply_pass<kSteps, kOffset>(tiles, row_tiles, pass, work,
                                     {packed + begin * strip_bytes, packed + strips.end * strip_bytes, strip_bytes,
                                      from + kTileFetchBytes, bytes, of.size(), lines});
      starts_slice = pass.ends_slice;
    }
    finish_chunk<T>(p, rows, digits_of_row, of, work.y);
  }
  return true;
}

// How many rows at a time, and how their product is cut into tasks: each a chunk of strips of one part of the rows.
struct TiledCut {
  int64_t rows, chunks, parts;

  TiledCut(const WeightOnlyGemmParams& p, const RowTiles& tiles, int threads) {
    const int64_t most = std::max(kDigitBytes / tiles.tile_bytes(), kMinRowTiles);
    const int64_t row_tiles = std::min(most, ceil_div(p.x_rows.count, kTileRows));
    rows = std::min(row_tiles * kTileRows, p.x_rows.count);
    chunks = ceil_div(strips_of(p), kChunkStrips);
    // Few strips and many threads: the rows are cut too.
    parts = std::clamp<int64_t>(ceil_div(4 * threads, chunks), 1, row_tiles);
  }
};

inline void tell_tiled_plan(const WeightOnlyGemmParams& p, const ThreadPool& pool) {
  const TiledCut cut(p, RowTiles(Blocks(p.k, p.group_size)), pool.threads);
  pool.listener->tell("kernel", QOPS_ISA_NAME);
  pool.listener->tell("tile_rows", kTileRows);
  pool.listener->tell("tile_strips", kChunkStrips);
  pool.listener->tell("rows_at_once", cut.rows);
  pool.listener->tell("row_blocks", cut.parts);
  tell_tasks(pool, cut.chunks * cut.parts, 1);
}

// Those of the rows that two digits do not hold. They are few.
template <class Codes, class T>
inline Status multiply_rows_of_four_digits(const WeightOnlyGemmParams& p, const ThreadPool& pool, const Blocks& blocks,
                                           uint8_t* digits_of_row) {
  const int64_t m = p.x_rows.count;
  if (std::memchr(digits_of_row, 4, static_cast<size_t>(m)) == nullptr) return Status::kOk;
  for (int64_t row = 0; row < m; ++row) digits_of_row[row] = digits_of_row[row] == 4 ? 4 : 0;
  return multiply_rows<Codes, T>(p, pool, blocks, digits_of_row);
}

template <class Codes, class T>
inline Status tiled_weight_only_gemm(const WeightOnlyGemmParams& p, const ThreadPool& pool) {
  if (pool.listener != nullptr) [[unlikely]] {
    tell_tiled_plan(p, pool);
    return Status::kOk;
  }
  if (p.perm != nullptr && !valid_permutation_range(p)) return Status::kIndexOutOfRange;
  const int64_t m = p.x_rows.count;
  const Blocks blocks(p.k, p.group_size);
  RowTiles tiles(blocks);
  const TiledCut cut(p, tiles, pool.threads);
  const int64_t most = ceil_div(cut.rows, kTileRows);
  const int64_t scales = most * tiles.blocks * kTileRows;
  Scratch scratch(Scratch::bytes<uint8_t>(most * tiles.tile_bytes()) + 2 * Scratch::bytes<float>(scales) +
                  Scratch::bytes<uint8_t>(m));
  if (!scratch.ok()) return Status::kOutOfMemory;
  tiles.bytes = scratch.take<uint8_t>(most * tiles.tile_bytes());
  tiles.scale = scratch.take<float>(scales);
  tiles.sum = scratch.take<float>(scales);
  uint8_t* digits_of_row = scratch.take<uint8_t>(m);

  const bool with_offset = has_float_zeros(p.kind);
  std::atomic<bool> out_of_memory = false;
  for (int64_t first = 0; first < m; first += cut.rows) {
    const int64_t rows = std::min(cut.rows, m - first), row_tiles = ceil_div(rows, kTileRows);
    parallel_for(pool, row_tiles * kTileRows, 1 + (16 << 10) / p.k, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const RowOfTiles out(tiles, row);
        if (row >= rows) {
          for (int64_t b = 0; b < tiles.blocks; ++b) out.end_block(b, 0, 0.0f, 0.0f);
          continue;
        }
        const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(first + row);
        digits_of_row[first + row] = write_digits<2>(x, p.perm, blocks, out) ? 4 : 2;
      }
    });
    parallel_for(pool, cut.chunks * cut.parts, 1, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t part = begin / cut.chunks, chunk = begin % cut.chunks;
        const int64_t size = std::min(cut.chunks - chunk, end - begin);
        const auto row = [&](int64_t i) { return first + std::min(rows, row_tiles * i / cut.parts * kTileRows); };
        const Range of{row(part), row(part + 1)};
        const Range strips{chunk * kChunkStrips, std::min((chunk + size) * kChunkStrips, strips_of(p))};
        const auto run = [&](auto steps, auto offset) {
          return multiply<Codes, T, steps, offset>(p, blocks, tiles, digits_of_row, first, of, strips);
        };
        const auto with_steps = [&](auto offset) {
          return tiles.steps == 1 ? run(std::integral_constant<int, 1>(), offset)
                                  : run(std::integral_constant<int, 2>(), offset);
        };
        // The last rows may be fewer than the parts.
        const bool done =
            of.size() == 0 || (with_offset ? with_steps(std::true_type()) : with_steps(std::false_type()));
        if (!done) out_of_memory = true;
        begin += size;
      }
    });
  }
  if (out_of_memory) return Status::kOutOfMemory;
  return multiply_rows_of_four_digits<Codes, T>(p, pool, blocks, digits_of_row);
}

// Whether this call is one for tiles. Rows of float32 need four digits.
template <class Codes>
inline bool takes_tiles(const WeightOnlyGemmParams& p) {
  const bool half = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  return half && p.x_rows.count >= min_tile_rows<Codes>(p) && p.n > 0 && p.k > 0;
}

}  // namespace qops::cpu::QOPS_ISA_NS
