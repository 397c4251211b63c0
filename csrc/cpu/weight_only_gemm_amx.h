// The method of weight_only_gemm.h on AMX tiles, for calls of many rows. Both digits of x are bytes, so a tile's sums
// are the same exact integers, and the float32 chain that follows is the same: so are the bits.
//
// Idea. The digits of 16 rows lie in tiles (RowTiles), zeros where rows or columns end. The codes of a few blocks of
// two strips are unpacked to signed bytes in L1, centred (q - 8 or q - z), so that sums start at zero; all rows pass
// over them. For one strip, 16 rows and a block of 128 columns four products give a tile of sums of each digit. They
// are stored while the products of the next block run, which have tiles of their own, and the float32 chain runs on
// vectors between the products of the one after that. Its 16 rows of totals stay in registers over the blocks of a
// pass.
//
// Operations, measured on a 2-core Xeon, whose two cores do not share the unit: the four products take 64 cycles, 25 to
// 29 ns (2.2 to 2.6 GHz while tiles are busy), as many as dense bfloat16 needs. Beside them floating-point vectors have
// one port of two, integers both: 64 of the former cost nothing, 80 take 82 cycles. The digits' sums are therefore put
// together as integers. All of it, 4 products, 6 loads and 2 stores of tiles and 80 vector operations, issues in 83
// cycles; in L1 a block takes 95 (43 ns; 48 where tiles are stored at once). At 4096 x 4096 and M = 256 it takes 84: x
// from L2 12, y 8, storing it 5, unpacking 4, the digits 5. Blocks of 32 columns half fill their tiles and take 55
// each, 34 of them in L1: four times as many operations for the chain bound them. 80 vector operations are 40 cycles,
// where dense bfloat16 multiplies 32 columns in 16 and 64 in 32: 0.4 and 0.8 of its speed are the limit for such
// groups.
//
// What was tried and lost: two strips at a time, which loads fewer tiles but has no registers for their totals (9 % in
// L1, 12 % of a call; with totals in memory and stores of tiles a block later nothing); a first sum of 1.5 x 2^23 in
// each accumulator, which saves a vector operation and costs loads of tiles (20 %); prefetching x into L1 (16 %); more
// rows at a time than L2 holds (16 %); four strips of half as many blocks (nothing).
#pragma once

#include <algorithm>
#include <atomic>

#include "cpu/weight_only_gemm.h"

namespace qops::cpu::QOPS_ISA_NS {

// Fewer rows are faster without tiles, which take as long for one row as for 16; 4-bit codes have a method of their own
// for them (weight_only_gemm_few_amx.h). With 8 bits tiles win from 10 rows on, with half-filled ones from 12.
template <class Codes>
inline int64_t min_tile_rows(const WeightOnlyGemmParams& p) {
  return p.group_size <= kTileRowBytes ? 12 : std::is_same_v<Codes, Int4Codes> ? 9 : 10;
}
// Strips and blocks that are unpacked at a time: with the x that passes over them they fill L1.
inline constexpr int kChunkStrips = 2;
inline constexpr int kPassTiles = 8;  // of 64 columns
// Digits of x are written and multiplied at most so many bytes at a time: half of L2, but 64 rows at least.
inline constexpr int64_t kDigitBytes = 1 << 20;
inline constexpr int64_t kMinRowTiles = 4;
// How far ahead of the strips' codes that are unpacked others are fetched into L2.
inline constexpr int64_t kTileFetchBytes = 8 << 10;

inline constexpr int kTileValues = kTileRows * kStripRows;
#define QOPS_UNROLL_ROWS _Pragma("GCC unroll 16")

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The two digits of rows of x: [16 rows][block][64 columns][digit] tiles of [row][column].
struct RowTiles {
  int64_t blocks;
  int64_t steps;  // of 64 columns in each block
  int64_t rows;   // of a tile
  uint8_t* bytes;
  float* scale;  // [16 rows][block][row]; of rows that are not there 0
  float* sum;

  explicit RowTiles(const Blocks& of, int64_t rows = kTileRows)
      : blocks(of.count), steps(ceil_div(std::min<int64_t>(of.group_size, kMaxBlock), kTileRowBytes)), rows(rows) {}
  int64_t digit_bytes() const { return rows * kTileRowBytes; }
  int64_t block_bytes() const { return steps * 2 * digit_bytes(); }
  int64_t tile_bytes() const { return blocks * block_bytes(); }
  uint8_t* block(int64_t tile, int64_t index) const { return bytes + (tile * blocks + index) * block_bytes(); }
  int64_t scale_at(int64_t tile, int64_t block) const { return (tile * blocks + block) * kTileRows; }
};

// One row of them, where write_digits() puts it.
struct RowOfTiles {
  const RowTiles& tiles;
  int64_t tile, r;

  RowOfTiles(const RowTiles& tiles, int64_t row) : tiles(tiles), tile(row / kTileRows), r(row % kTileRows) {}

  uint8_t* at(int64_t block, int64_t k, int d) const {
    return tiles.block(tile, block) + (k / kTileRowBytes * 2 + d) * tiles.digit_bytes() + r * kTileRowBytes +
           k % kTileRowBytes;
  }
  void digits(const Block& b, int64_t k, int d, I32x16 values, int64_t) const {
    store_bytes(at(b.index, k, d), values);
  }
  void end_block(const Block& b, const int32_t* sums, float scale) const {
    end_block(b.index, b.size, scale, sum_of_values(sums, 2, scale));
  }
  // After `columns` columns come zeros.
  void end_block(int64_t block, int64_t columns, float scale, float sum) const {
    for (int64_t k = ceil_div(columns, kLanes) * kLanes; k < tiles.steps * kTileRowBytes; k += kLanes) {
      for (int d = 0; d < 2; ++d) std::memset(at(block, k, d), 0, kLanes);
    }
    tiles.scale[tiles.scale_at(tile, block) + r] = scale;
    tiles.sum[tiles.scale_at(tile, block) + r] = sum;
  }
};

// Sums of a block and what makes floats of them.
struct Finish {
  const int32_t* sums;  // [digit] tiles
  const float* x_scale;
  const float* x_sum;
  const float* scale;
  const float* offset;
  int64_t at;     // where totals and y of its rows and strip begin
  int64_t block;  // of the pass
};

template <bool kOffset, int kFirst, int kCount>
QOPS_ALWAYS_INLINE void finish_rows(const Finish& f, F32x16 (&total)[kTileRows]) {
  const F32x16 scale = load(f.scale);
  QOPS_UNROLL_ROWS for (int r = kFirst; r < kFirst + kCount; ++r) {
    const I32x16 sum = shift_left<8>(load(f.sums + r * kStripRows)) + load(f.sums + kTileValues + r * kStripRows);
    total[r] = fma(scale, to_float(sum) * set1(f.x_scale[r]), total[r]);
  }
  if constexpr (kOffset) {
    const F32x16 offset = load(f.offset);
    QOPS_UNROLL_ROWS for (int r = kFirst; r < kFirst + kCount; ++r) {
      total[r] = fma(offset, set1(f.x_sum[r]), total[r]);
    }
  }
}

// The products of one block in the tiles of kParity; beside them the sums of the block before go to memory, and the
// chain of the one before that runs.
template <int kSteps, bool kOffset, int kParity, bool kFinish>
QOPS_ALWAYS_INLINE void multiply_block(const uint8_t* x, const uint8_t* w, int32_t* sums_before, const Finish& f,
                                       F32x16 (&total)[kTileRows]) {
  constexpr int kHigh = 2 * kParity, kLow = kHigh + 1, kHighBefore = 2 - kHigh, kLowBefore = kHighBefore + 1;
  constexpr int kRows = kTileRows / (2 * kSteps);
  zero_tile<kHigh>();
  load_tile<4>(x, kTileRowBytes);
  load_tile<6>(w, kTileRowBytes);
  dot_tiles<kHigh, 4, 6>();
  store_tile<kHighBefore>(sums_before, kTileRowBytes);
  if constexpr (kFinish) finish_rows<kOffset, 0, kRows>(f, total);
  zero_tile<kLow>();
  load_tile<5>(x + kTileBytes, kTileRowBytes);
  dot_tiles_unsigned_x<kLow, 5, 6>();
  if constexpr (kFinish && kSteps == 2) finish_rows<kOffset, kRows, kRows>(f, total);
  store_tile<kLowBefore>(sums_before + kTileValues, kTileRowBytes);
  if constexpr (kSteps == 2) {
    load_tile<4>(x + 2 * kTileBytes, kTileRowBytes);
    load_tile<7>(w + kTileBytes, kTileRowBytes);
    dot_tiles<kHigh, 4, 7>();
    if constexpr (kFinish) finish_rows<kOffset, 2 * kRows, kRows>(f, total);
    load_tile<5>(x + 3 * kTileBytes, kTileRowBytes);
    dot_tiles_unsigned_x<kLow, 5, 7>();
  }
  if constexpr (kFinish) finish_rows<kOffset, kTileRows - kRows, kRows>(f, total);
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
    for (int64_t i = 0; i < lines_per_block && strips > 0; ++i) {
      const int64_t at = offset + done;
      const char* line = strip + at + (at < strip_bytes ? 0 : (kChunkStrips - 1) * strip_bytes);
      if (line < end) prefetch_to_l2(line);
      done += 64;
      if (done >= bytes) {
        done = 0;
        strip += strip_bytes;
        --strips;
      }
    }
  }
};

// The blocks that are unpacked, and what passes over them.
struct Pass {
  Block first;
  int64_t blocks = 0;
  bool starts_slice = true, ends_slice = true;
  bool ends[kPassTiles];  // [block] whether a slice ends with it

  explicit Pass(Block first) : first(first) {}
};

// Up to the last slice that ends within kPassTiles tiles.
inline Pass next_pass(const Blocks& blocks, Block b, int64_t steps, int64_t& slice, bool starts_slice) {
  Pass pass(b);
  pass.starts_slice = starts_slice;
  const int64_t most = std::min(kPassTiles / steps, blocks.count - b.index);
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

// Memory of one task.
struct Workspace {
  int32_t* sums[2];  // [digit] tiles
  uint8_t* codes;    // [strip][block][64 columns] tiles
  float* scale;      // [strip][block][column]
  float* offset;
  float* total;  // [16 rows][strip] tiles
  float* y;
};

inline B8x64 centred(Int4Codes, B8x64 q, B8x64 z) { return subtract_bytes(q, z); }
inline B8x64 centred(Int8Codes, B8x64 q, B8x64) { return q; }

template <class Codes>
inline void unpack(const WeightOnlyGemmParams& p, const Blocks& blocks, const Pass& pass, int64_t steps, Range strips,
                   const Workspace& work) {
  const int64_t strip_bytes = p.k / Codes::kColumns * 64;
  const bool with_offset = has_float_zeros(p.kind);
  const auto [scales, zeros] = numbers_of(p, blocks.groups);
  const I32x16 all_bytes = set1(int32_t{0x01010101});
  for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
    Block b = pass.first;
    for (int64_t i = 0; i < pass.blocks; ++i, b.next(blocks)) {
      const int64_t at = (strip - strips.begin) * kPassTiles + i;
      const F32x16 scale = scales.load(b.group, strip);
      store(work.scale + at * kStripRows, scale);
      if (with_offset) {
        const F32x16 z = zeros.load(b.group, strip);
        store(work.offset + at * kStripRows,
              p.kind == WeightKind::kOffset ? Codes::offset(scale, z) : scale * (set1(8.0f) - z));
      }
      const I32x16 z = p.kind == WeightKind::kZeroPoint
                           ? load(reinterpret_cast<const uint8_t*>(zeros.address<false>(b.group, strip)))
                           : set1(int32_t{8});
      const B8x64 centre = bit_cast<B8x64>(z * all_bytes);
      const char* from = static_cast<const char*>(p.packed) + strip * strip_bytes + b.begin / Codes::kColumns * 64;
      uint8_t* to = work.codes + ((strip - strips.begin) * kPassTiles + i * steps) * kTileBytes;
      for (int64_t n = b.size / Codes::kColumns; n > 0; --n, from += 64) {
        const B8x64 codes = load_bytes(from);
        for (int step = 0; step < Codes::kSteps; ++step, to += 64) {
          store(to, centred(Codes(), Codes::step(codes, step), centre));
        }
      }
    }
  }
}

QOPS_ALWAYS_INLINE void begin_totals(const Pass& pass, const Workspace& work, const Finish& f,
                                     F32x16 (&total)[kTileRows]) {
  if (f.block != 0) return;
  if (pass.starts_slice) {
    QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) total[r] = set1(0.0f);
  } else {
    const float* from = work.total + f.at;
    QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) total[r] = load(from + r * kStripRows);
  }
}

QOPS_ALWAYS_INLINE void end_totals(const Pass& pass, const Workspace& work, const Finish& f,
                                   F32x16 (&total)[kTileRows]) {
  if (pass.ends[f.block]) {
    float* y = work.y + f.at;
    QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) {
      store(y + r * kStripRows, load(y + r * kStripRows) + total[r]);
      total[r] = set1(0.0f);
    }
  } else if (f.block + 1 == pass.blocks) {
    float* to = work.total + f.at;
    QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) store(to + r * kStripRows, total[r]);
  }
}

// All rows over what is unpacked.
template <int kSteps, bool kOffset>
[[gnu::noinline]] void multiply_pass(const RowTiles& tiles, Range row_tiles, int64_t strips, const Pass& pass,
                                     const Workspace& work, Ahead ahead) {
  F32x16 total[kTileRows];
  QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) total[r] = set1(0.0f);
  Finish before{}, second{};  // of the block before, whose sums are in tiles, and of the one before that
  int64_t done = 0;
  for (int64_t t = row_tiles.begin; t < row_tiles.end; ++t) {
    const uint8_t* first_x = tiles.block(t, pass.first.index);
    const int64_t scales_at = tiles.scale_at(t, pass.first.index);
    for (int64_t s = 0; s < strips; ++s) {
      const uint8_t* x = first_x;
      const uint8_t* w = work.codes + s * kPassTiles * kTileBytes;
      const int64_t scales = s * kPassTiles * kStripRows;
      Finish now{nullptr,
                 tiles.scale + scales_at,
                 tiles.sum + scales_at,
                 work.scale + scales,
                 work.offset + scales,
                 ((t - row_tiles.begin) * kChunkStrips + s) * kTileValues,
                 0};
      for (; now.block < pass.blocks; ++now.block, ++done) {
        now.sums = work.sums[done % 2];
        int32_t* sums_before = work.sums[1 - done % 2];
        if (done < 2) {
          done == 0 ? multiply_block<kSteps, kOffset, 0, false>(x, w, sums_before, second, total)
                    : multiply_block<kSteps, kOffset, 1, false>(x, w, sums_before, second, total);
        } else {
          begin_totals(pass, work, second, total);
          if (done % 2 == 0) {
            multiply_block<kSteps, kOffset, 0, true>(x, w, sums_before, second, total);
          } else {
            multiply_block<kSteps, kOffset, 1, true>(x, w, sums_before, second, total);
          }
          end_totals(pass, work, second, total);
        }
        ahead.fetch();
        second = before;
        before = now;
        x += kSteps * 2 * kTileBytes;
        w += kSteps * kTileBytes;
        now.x_scale += kTileRows;
        now.x_sum += kTileRows;
        now.scale += kStripRows;
        now.offset += kStripRows;
      }
    }
  }
  if (done % 2 == 1) {
    store_tile<0>(work.sums[0], kTileRowBytes);
    store_tile<1>(work.sums[0] + kTileValues, kTileRowBytes);
  } else {
    store_tile<2>(work.sums[1], kTileRowBytes);
    store_tile<3>(work.sums[1] + kTileValues, kTileRowBytes);
  }
  for (const bool is_last : {false, true}) {
    if (!is_last && done == 1) continue;
    const Finish& f = is_last ? before : second;
    begin_totals(pass, work, f, total);
    finish_rows<kOffset, 0, kTileRows>(f, total);
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

// y of some of the rows from first_row on, whose digits are in `tiles`, and strips. False: out of memory.
template <class Codes, class T, int kSteps, bool kOffset>
inline bool multiply(const WeightOnlyGemmParams& p, const Blocks& blocks, const RowTiles& tiles,
                     const uint8_t* digits_of_row, int64_t first_row, Range rows, Range strips) {
  const Range row_tiles{(rows.begin - first_row) / kTileRows, ceil_div(rows.end - first_row, kTileRows)};
  constexpr int64_t kCodes = kChunkStrips * kPassTiles * kTileBytes, kScales = kChunkStrips * kPassTiles * kStripRows;
  const int64_t outputs = row_tiles.size() * kChunkStrips * kTileValues;
  Scratch scratch(Scratch::bytes<int32_t>(4 * kTileValues) + Scratch::bytes<uint8_t>(kCodes) +
                  2 * Scratch::bytes<float>(kScales) + 2 * Scratch::bytes<float>(outputs));
  if (!scratch.ok()) return false;
  Workspace work;
  for (int32_t*& sums : work.sums) sums = scratch.take<int32_t>(2 * kTileValues);
  work.codes = scratch.take<uint8_t>(kCodes);
  work.scale = scratch.take<float>(kScales);
  work.offset = scratch.take<float>(kScales);
  work.total = scratch.take<float>(outputs);
  work.y = scratch.take<float>(outputs);
  std::memset(work.codes, 0, kCodes);  // what blocks do not fill meets zeros of x

  const char* packed = static_cast<const char*>(p.packed);
  const int64_t strip_bytes = p.k / Codes::kColumns * 64;
  const TileScope scope;
  for (int64_t begin = strips.begin; begin < strips.end; begin += kChunkStrips) {
    const Range of{begin, std::min(begin + kChunkStrips, strips.end)};
    std::memset(work.y, 0, static_cast<size_t>(outputs) * sizeof(float));
    Block b(blocks);
    int64_t slice = 1;
    bool starts_slice = true;
    while (b.index < blocks.count) {
      const Pass pass = next_pass(blocks, b, kSteps, slice, starts_slice);
      unpack<Codes>(p, blocks, pass, kSteps, of, work);
      for (int64_t i = 0; i < pass.blocks; ++i) b.next(blocks);
      const int64_t from = pass.first.begin / Codes::kColumns * 64;
      const int64_t bytes = b.begin / Codes::kColumns * 64 - from;
      const int64_t lines = ceil_div(of.size() * bytes, 64 * row_tiles.size() * of.size() * pass.blocks);
      multiply_pass<kSteps, kOffset>(tiles, row_tiles, of.size(), pass, work,
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
  pool.listener->tell("tile_strips", 1);
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
