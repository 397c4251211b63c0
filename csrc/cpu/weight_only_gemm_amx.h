// The method of weight_only_gemm.h on AMX tiles, for calls of many rows. Both digits of x are bytes, so a tile's sums
// are the same exact integers, and the float32 chain that follows is the same: so are the bits.
//
// Idea. The digits of 16 rows lie in tiles (RowTiles), zeros where rows or columns end. The codes of a few blocks of
// two strips are unpacked to signed bytes in L1, centred (q - 8 or q - z), so that sums start at zero; all rows pass
// over them. For one strip, 16 rows and a block of 128 columns four products give a tile of sums of each digit; they
// are stored, and the float32 chain of the block before runs on vectors between the products of this one. Its 16 rows
// of totals stay in registers over the blocks of a pass.
//
// Operations, measured on a 2-core Xeon at 3.4 GHz: the four products take 64 cycles, during which vectors have one
// port of two, and the chain is 5 x 16 vector operations. Alone in L1, with digits and codes that are not zero (TMUL is
// slower then), a block takes 36 ns, 33 of them the products. At 4096 x 4096 and M = 256 a block takes 80: 50 here,
// where 14 are not understood, x from L2 10 (4 KiB for two strips), unpacking 8, y 7, the digits 5. Blocks of 32
// columns half fill their tiles, and take 50 each.
//
// What was tried and lost: two strips at a time, which loads fewer tiles but has no registers for their totals (9 % in
// L1, 12 % of a call); a first sum of 1.5 x 2^23 in each accumulator, which saves a vector operation and costs loads of
// tiles (20 %); prefetching x into L1; more rows at a time than L2 holds (16 %); four strips of half as many blocks
// (nothing).
#pragma once

#include <algorithm>
#include <atomic>

#include "cpu/weight_only_gemm.h"

namespace qops::cpu::QOPS_ISA_NS {

// Fewer rows are faster without tiles, which take as long for one row as for 16.
inline constexpr int64_t kMinTileRows = 12;
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
  uint8_t* bytes;
  float* scale;  // [16 rows][block][row]; of rows that are not there 0
  float* sum;

  explicit RowTiles(const Blocks& of)
      : blocks(of.count), steps(ceil_div(std::min<int64_t>(of.group_size, kMaxBlock), kTileRowBytes)) {}
  int64_t tile_bytes() const { return blocks * steps * 2 * kTileBytes; }
  uint8_t* block(int64_t tile, int64_t index) const { return bytes + (tile * blocks + index) * steps * 2 * kTileBytes; }
  int64_t scale_at(int64_t tile, int64_t block) const { return (tile * blocks + block) * kTileRows; }
};

// One row of them, where write_digits() puts it.
struct RowOfTiles {
  const RowTiles& tiles;
  int64_t tile, r;

  RowOfTiles(const RowTiles& tiles, int64_t row) : tiles(tiles), tile(row / kTileRows), r(row % kTileRows) {}

  uint8_t* at(int64_t block, int64_t k, int d) const {
    return tiles.block(tile, block) + (k / kTileRowBytes * 2 + d) * kTileBytes + r * kTileRowBytes + k % kTileRowBytes;
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
};

// The sums of one block, and between its products the chain of another one.
template <int kSteps, bool kOffset, bool kMultiply, bool kFinish>
QOPS_ALWAYS_INLINE void multiply_block(const uint8_t* x, const uint8_t* w, int32_t* sums, const Finish& f,
                                       F32x16 (&total)[kTileRows]) {
  const auto finish = [&](int product) __attribute__((always_inline)) {
    if constexpr (kFinish) {
      constexpr int kRows = kTileRows / (2 * kSteps);
      const F32x16 scale = load(f.scale);
      QOPS_UNROLL for (int r = product * kRows; r < (product + 1) * kRows; ++r) {
        // Exact up to the one rounding, like the sum of integers: both digits' sums are below 2^24.
        const F32x16 value = fma(to_float(load(f.sums + r * kStripRows)), set1(256.0f),
                                 to_float(load(f.sums + kTileValues + r * kStripRows)));
        total[r] = fma(scale, value * set1(f.x_scale[r]), total[r]);
      }
      if constexpr (kOffset) {
        const F32x16 offset = load(f.offset);
        QOPS_UNROLL for (int r = product * kRows; r < (product + 1) * kRows; ++r) {
          total[r] = fma(offset, set1(f.x_sum[r]), total[r]);
        }
      }
    }
  };
  if constexpr (kMultiply) {
    zero_tile<0>();
    load_tile<4>(x, kTileRowBytes);
    load_tile<6>(w, kTileRowBytes);
    dot_tiles<0, 4, 6>();
  }
  finish(0);
  if constexpr (kSteps == 2) {
    if constexpr (kMultiply) {
      load_tile<5>(x + 2 * kTileBytes, kTileRowBytes);
      load_tile<7>(w + kTileBytes, kTileRowBytes);
      dot_tiles<0, 5, 7>();
    }
    finish(1);
  }
  if constexpr (kMultiply) {
    store_tile<0>(sums, kTileRowBytes);
    zero_tile<1>();
    load_tile<4>(x + kTileBytes, kTileRowBytes);
    dot_tiles_unsigned_x<1, 4, 6>();
  }
  finish(kSteps);
  if constexpr (kSteps == 2) {
    if constexpr (kMultiply) {
      load_tile<5>(x + 3 * kTileBytes, kTileRowBytes);
      dot_tiles_unsigned_x<1, 5, 7>();
    }
    finish(3);
  }
  if constexpr (kMultiply) store_tile<1>(sums + kTileValues, kTileRowBytes);
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
  const I32x16 all_bytes = set1(int32_t{0x01010101});
  for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
    Block b = pass.first;
    for (int64_t i = 0; i < pass.blocks; ++i, b.next(blocks)) {
      const int64_t at = (strip - strips.begin) * kPassTiles + i;
      const int64_t scales_at = (strip * blocks.groups + b.group) * kStripRows;
      const F32x16 scale = load_as_float(p.scales, p.scale_dtype, scales_at, kLanes);
      store(work.scale + at * kStripRows, scale);
      if (with_offset) {
        const F32x16 z = load_as_float(p.zeros, p.zero_dtype, scales_at, kLanes);
        store(work.offset + at * kStripRows,
              p.kind == WeightKind::kOffset ? Codes::offset(scale, z) : scale * (set1(8.0f) - z));
      }
      const I32x16 z =
          p.kind == WeightKind::kZeroPoint ? load(static_cast<const uint8_t*>(p.zeros) + scales_at) : set1(int32_t{8});
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

// All rows over what is unpacked.
template <int kSteps, bool kOffset>
[[gnu::noinline]] void multiply_pass(const RowTiles& tiles, Range row_tiles, int64_t strips, const Pass& pass,
                                     const Workspace& work, Ahead ahead) {
  F32x16 total[kTileRows];
  const auto add_to = [&](float* y) __attribute__((always_inline)) {
    QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) {
      store(y + r * kStripRows, load(y + r * kStripRows) + total[r]);
      total[r] = set1(0.0f);
    }
  };
  const auto save = [&](float* totals) __attribute__((always_inline)) {
    QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) store(totals + r * kStripRows, total[r]);
  };
  QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) total[r] = set1(0.0f);
  Finish before{};
  int64_t at_before = 0, sums = 0;
  bool has_before = false;
  for (int64_t t = row_tiles.begin; t < row_tiles.end; ++t) {
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t at = ((t - row_tiles.begin) * kChunkStrips + s) * kTileValues;
      const uint8_t* x = tiles.block(t, pass.first.index);
      const uint8_t* w = work.codes + s * kPassTiles * kTileBytes;
      Finish now{nullptr, tiles.scale + tiles.scale_at(t, pass.first.index),
                 tiles.sum + tiles.scale_at(t, pass.first.index), work.scale + s * kPassTiles * kStripRows,
                 work.offset + s * kPassTiles * kStripRows};
      for (int64_t b = 0; b < pass.blocks; ++b) {
        now.sums = work.sums[sums];
        if (has_before) {
          multiply_block<kSteps, kOffset, true, true>(x, w, work.sums[sums], before, total);
          if (pass.ends[b == 0 ? pass.blocks - 1 : b - 1]) add_to(work.y + at_before);
        } else {
          multiply_block<kSteps, kOffset, true, false>(x, w, work.sums[sums], before, total);
        }
        ahead.fetch();
        if (b == 0) {
          if (has_before && !pass.ends_slice) save(work.total + at_before);
          if (!pass.starts_slice) {
            QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) total[r] = load(work.total + at + r * kStripRows);
          } else if (!pass.ends_slice) {
            QOPS_UNROLL_ROWS for (int r = 0; r < kTileRows; ++r) total[r] = set1(0.0f);
          }
        }
        has_before = true;
        before = now;
        at_before = at;
        sums ^= 1;
        x += kSteps * 2 * kTileBytes;
        w += kSteps * kTileBytes;
        now.x_scale += kTileRows;
        now.x_sum += kTileRows;
        now.scale += kStripRows;
        now.offset += kStripRows;
      }
    }
  }
  multiply_block<kSteps, kOffset, false, true>(nullptr, nullptr, nullptr, before, total);
  pass.ends_slice ? add_to(work.y + at_before) : save(work.total + at_before);
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
        digits_of_row[first + row] = write_digits(x, p.perm, blocks, 2, out) ? 4 : 2;
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

  // Rows that need four digits are few.
  if (std::memchr(digits_of_row, 4, static_cast<size_t>(m)) == nullptr) return Status::kOk;
  for (int64_t row = 0; row < m; ++row) digits_of_row[row] = digits_of_row[row] == 4 ? 4 : 0;
  return multiply_rows<Codes, T>(p, pool, blocks, digits_of_row);
}

// Whether this call is one for tiles. Rows of float32 need four digits.
inline bool takes_tiles(const WeightOnlyGemmParams& p) {
  const bool half = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  return half && p.x_rows.count >= kMinTileRows && p.n > 0 && p.k > 0;
}

}  // namespace qops::cpu::QOPS_ISA_NS
