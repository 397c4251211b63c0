// int8_gemm on AMX tiles. The sums are exact, so their bits are those of int8_gemm.cpp, which keeps the calls of one
// row; the float32 chain is shared.
//
// Idea. A strip of the packed weight is a row of tiles as tdpbssd reads them: 64 of K are 16 rows of 64 bytes. x is
// copied into tiles, 32 rows side by side and padded with zeros: rows that lie 4 KiB apart would share one set of L1,
// and neither the rows nor the columns left over need code of their own. Where K ends inside a tile, the tile of w runs
// on into the next strip, which meets the zeros of x; the last strip's is copied. Two tiles of x and two of w give four
// of sums: four loads for four products. Up to 16 rows are one tile of just so many, which meets four strips. sum_k w,
// which zero points need, is added up by vectors between the products of the first rows that meet a strip.
//
// Bytes and operations, measured on a 2-core Xeon with 2 MiB of L2: a product takes 17 cycles (16384 multiply-adds), 20
// with its load from L1, 30 to 45 where both x and w stream from L2 (K > 1024): L2 then bounds the call. DRAM gives a
// core 14 to 18 GB/s, 1 KiB of w in 200 to 285 cycles, so weights bound it up to M of 100 or so: 90 to 96 % of what can
// be read at M = 2 to 8, 85 to 92 % at 16 (4096 x 4096 and 14336, one and two threads).
//
// What was tried and lost: tiles of x from rows 4 KiB apart (31 cycles a product; 26 from rows 4160 bytes apart);
// prefetching tiles into L1, where L2 is what lacks; y written 64 bytes of a row at a time (10 % at N = 49152). Of
// fetching w ahead: into L2 instead of L1 (8 %), 4 KiB of each strip (5 %), two strips at once (9 %).
#include <algorithm>
#include <utility>

#include "cpu/int8_gemm_epilogue.h"
#include "cpu/kernel_table.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

// One row is read as fast without tiles, or faster.
constexpr int64_t kMinRows = 2;
// Rows and strips of the four tiles of sums.
constexpr int kBlockRows = 2 * kTileRows;
constexpr int kBlockStrips = 2;
// Few rows have sums for more, each a stream from memory.
constexpr int kMaxBlockStrips = 4;
// Tiles of sums come first, then those of x, then those of w.
constexpr int kSumTiles = 4;
constexpr int kFewRowTiles = 5;  // that have as many rows as x where it has 16 or fewer
// Rows of x are packed and multiplied at most so many bytes at a time: half of L2.
constexpr int64_t kPackedBytes = 1 << 20;
// Strips that all rows pass over before the next ones: a row of y is written 128 to 256 bytes at a time.
constexpr int kMaxChunk = 4;
constexpr int64_t kChunkBytes = 256 << 10;
// Where at least so many blocks of rows pass over a chunk, there is time to fetch the next one into L2 meanwhile. With
// fewer, memory bounds the call, and fetching ahead only disturbs the hardware's streams (15 % at M = 64).
constexpr int64_t kFetchingBlocks = 4;
// How far ahead of the tiles of a strip the first rows that meet it fetch it.
constexpr int64_t kFetchBytes = kTileBytes;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// x in tiles: [block of 32 rows][64 columns][16 rows of the block][row][column]. Of 16 rows and fewer in all, tiles
// hold no others.
struct PackedRows {
  uint8_t* bytes = nullptr;
  int64_t steps;  // of 64 columns
  int64_t step_bytes;

  explicit PackedRows(const Int8GemmParams& p)
      : steps(ceil_div(p.k, kTileRowBytes)), step_bytes(std::min<int64_t>(p.q_rows.count, kTileRows) * kTileRowBytes) {
    if (p.q_rows.count > kTileRows) step_bytes = 2 * kTileBytes;
  }
  int64_t block_bytes() const { return steps * step_bytes; }
  uint8_t* tile(int64_t row) const {
    return bytes + row / kBlockRows * block_bytes() + row % kBlockRows / kTileRows * kTileBytes;
  }
};

// The rows from `row` on that share a tile.
void pack_tile(const Int8GemmParams& p, int64_t row, uint8_t* tile, int64_t step_bytes) {
  const int64_t rows = std::min<int64_t>(kTileRows, p.q_rows.count - row);
  const int8_t* values[kTileRows];
  for (int64_t r = 0; r < rows; ++r) values[r] = static_cast<const int8_t*>(p.q) + p.q_rows.offset(row + r);
  for (int64_t column = 0; column < p.k; column += kTileRowBytes, tile += step_bytes) {
    const int64_t left = p.k - column;
    if (rows < kTileRows || left < kTileRowBytes) std::memset(tile, 0, std::min<size_t>(kTileBytes, step_bytes));
    for (int64_t r = 0; r < rows; ++r) {
      if (left >= kTileRowBytes) {
        std::memcpy(tile + r * kTileRowBytes, values[r] + column, kTileRowBytes);
      } else {
        std::memcpy(tile + r * kTileRowBytes, values[r] + column, static_cast<size_t>(left));
      }
    }
  }
}

// Bytes that are fetched into L2 while others are multiplied.
struct Ahead {
  const char* at;
  const char* end;
  int64_t bytes_per_step;

  void fetch() {
    for (const char* stop = std::min(at + bytes_per_step, end); at < stop; at += 64) prefetch_to_l2(at);
  }
};

// Some strips of w: the first byte of each, and its tile of the last step.
struct Strips {
  const char* first[kMaxBlockStrips];
  const char* last[kMaxBlockStrips];
  int64_t bytes;
};

constexpr int kSumsPerRow = kMaxChunk * kStripRows;
using Sums = int32_t[kBlockRows][kSumsPerRow];

// The first rows that meet a strip fetch it, and add its columns up where zero points need that.
enum class Meeting { kLater, kFirst, kFirstWithSums };

// f(std::integral_constant<int, 0>()) ... f(std::integral_constant<int, kCount - 1>()).
template <int kCount, class F>
QOPS_ALWAYS_INLINE void each(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, kCount>());
}

// Sums of one or two tiles of rows with some strips, to the columns of `sums` from `column` on; w_sum: sum_k w.
template <int kRowTiles, int kStrips, Meeting kMeeting>
void multiply_block(const uint8_t* x, const PackedRows& packed, const Strips& w, Ahead& ahead, Sums& sums,
                    int64_t column, int32_t* w_sum) {
  constexpr int kX = kSumTiles, kW = kX + kRowTiles, kWTiles = 8 - kW;
  each<kRowTiles * kStrips>([&](auto tile) { zero_tile<tile>(); });
  Ahead now = ahead;  // in registers
  const B8x64 ones = bit_cast<B8x64>(set1(int32_t{0x01010101}));
  I32x16 columns[kStrips][2];
  QOPS_UNROLL for (int s = 0; s < kStrips; ++s) columns[s][0] = columns[s][1] = set1(int32_t{0});
  const auto step = [&](const char* const* strips, int64_t at, int64_t fetch,
                        int lines) __attribute__((always_inline)) {
    each<kRowTiles>([&](auto r) { load_tile<kX + r>(x + r * kTileBytes, kTileRowBytes); });
    each<kStrips>([&](auto s) __attribute__((always_inline)) {
      const char* tile = strips[s] + at;
      load_tile<kW + s % kWTiles>(tile, kTileRowBytes);
      each<kRowTiles>([&](auto r) { dot_tiles<r * kStrips + s, kX + r, kW + s % kWTiles>(); });
      if constexpr (kMeeting != Meeting::kLater) {
        QOPS_UNROLL for (int line = s; line < kTileRows; line += kStrips) {
          QOPS_UNROLL for (int t = 0; t < kStrips; ++t) prefetch(strips[t] + at + fetch + line * kTileRowBytes);
        }
      }
      if constexpr (kMeeting == Meeting::kFirstWithSums) {
        for (int line = 0; line < lines; line += 2) {  // K is a multiple of 8
          columns[s][0] = dot(columns[s][0], ones, load_bytes(tile + line * kTileRowBytes));
          columns[s][1] = dot(columns[s][1], ones, load_bytes(tile + (line + 1) * kTileRowBytes));
        }
      }
    });
    x += packed.step_bytes;
    now.fetch();
  };
  const int64_t last = (packed.steps - 1) * kTileBytes;
  int64_t at = 0;
  for (; at < last - kFetchBytes; at += kTileBytes) step(w.first, at, kFetchBytes, kTileRows);
  // Beyond the strips are the next ones.
  const int64_t next = kFetchBytes + (kStrips - 1) * w.bytes;
  for (; at < last; at += kTileBytes) step(w.first, at, next, kTileRows);
  step(w.last, 0, next, static_cast<int>((w.bytes - last) / kTileRowBytes));
  ahead = now;
  each<kRowTiles * kStrips>([&](auto tile) {
    store_tile<tile>(sums[tile / kStrips * kTileRows] + column + tile % kStrips * kStripRows, sizeof(sums[0]));
  });
  if constexpr (kMeeting == Meeting::kFirstWithSums) {
    QOPS_UNROLL for (int s = 0; s < kStrips; ++s) store(w_sum + s * kStripRows, columns[s][0] + columns[s][1]);
  }
}

void multiply_block(int64_t rows, int64_t strips, Meeting meeting, const uint8_t* x, const PackedRows& packed,
                    const Strips& w, Ahead& ahead, Sums& sums, int64_t column, int32_t* w_sum) {
  const auto run = [&](auto row_tiles, auto count) {
    const auto with = [&](auto how) {
      multiply_block<row_tiles, count, how>(x, packed, w, ahead, sums, column, w_sum);
    };
    switch (meeting) {
      case Meeting::kLater: return with(std::integral_constant<Meeting, Meeting::kLater>());
      case Meeting::kFirst: return with(std::integral_constant<Meeting, Meeting::kFirst>());
      case Meeting::kFirstWithSums: return with(std::integral_constant<Meeting, Meeting::kFirstWithSums>());
    }
  };
  const auto run_few = [&](auto count) {
    rows > kTileRows ? run(std::integral_constant<int, 2>(), count) : run(std::integral_constant<int, 1>(), count);
  };
  if (strips == 4) return run(std::integral_constant<int, 1>(), std::integral_constant<int, 4>());
  strips == 2 ? run_few(std::integral_constant<int, 2>()) : run_few(std::integral_constant<int, 1>());
}

// How many of `left` strips a block of rows takes at once.
int64_t strips_at_once(int64_t rows, int64_t left) {
  if (rows <= kTileRows && left >= kMaxBlockStrips) return kMaxBlockStrips;
  return std::min<int64_t>(kBlockStrips, left);
}

// y of some rows and strips. `packed` holds the rows from first_row on; rows.begin starts a block of them.
template <class T>
void multiply(const Int8GemmParams& p, const PackedRows& packed, int64_t first_row, Range rows, Range strips) {
  const int64_t strip_bytes = p.k * kStripRows;
  const int64_t last_step = (packed.steps - 1) * kTileBytes;
  const char* weights = static_cast<const char*>(p.packed);
  // The last step of the last strip where K ends in it.
  alignas(64) char end_of_w[kTileBytes] = {};
  const int64_t end_strip = ceil_div(p.n, kStripRows) - 1;
  const bool has_end = strips.end > end_strip && strip_bytes % kTileBytes != 0;
  if (has_end) {
    std::memcpy(end_of_w, weights + end_strip * strip_bytes + last_step, static_cast<size_t>(strip_bytes - last_step));
  }

  alignas(64) Sums sums;
  const int64_t blocks = ceil_div(rows.size(), kBlockRows);
  const int64_t fitting = kChunkBytes / strip_bytes / kBlockStrips * kBlockStrips;
  // One block passes over them once, wherever they lie.
  const int64_t chunk = blocks == 1 ? kMaxChunk : std::clamp<int64_t>(fitting, kBlockStrips, kMaxChunk);
  for (int64_t begin = strips.begin; begin < strips.end; begin += chunk) {
    const Range of{begin, std::min(begin + chunk, strips.end)};
    Columns<kMaxChunk> columns(p, of);
    const int64_t next = blocks < kFetchingBlocks ? of.end : std::min(of.end + chunk, strips.end);
    const int64_t steps = blocks * ceil_div(of.size(), kBlockStrips) * packed.steps;
    Ahead ahead{weights + of.end * strip_bytes, weights + next * strip_bytes,
                ceil_div((next - of.end) * strip_bytes, steps * 64) * 64};
    for (int64_t row = rows.begin; row < rows.end; row += kBlockRows) {
      const int64_t row_end = std::min(row + kBlockRows, rows.end);
      const Meeting meeting = row != rows.begin         ? Meeting::kLater
                              : p.zero_point == nullptr ? Meeting::kFirst
                                                        : Meeting::kFirstWithSums;
      for (int64_t strip = of.begin, count = 0; strip < of.end; strip += count) {
        count = strips_at_once(row_end - row, of.end - strip);
        Strips w{{}, {}, strip_bytes};
        for (int64_t s = 0; s < count; ++s) {
          w.first[s] = weights + (strip + s) * strip_bytes;
          w.last[s] = has_end && strip + s == end_strip ? end_of_w : w.first[s] + last_step;
        }
        const int64_t column = columns.offset(strip);
        multiply_block(row_end - row, count, meeting, packed.tile(row - first_row), packed, w, ahead, sums, column,
                       columns.w_sum + column);
      }
      finish_rows<T>(p, {row, row_end}, of, sums[0], kSumsPerRow, 0, p.zero_point != nullptr, columns);
    }
  }
}

// Blocks of rows that are packed and multiplied at a time.
int64_t max_blocks_of(const PackedRows& packed) { return std::max<int64_t>(1, kPackedBytes / packed.block_bytes()); }

// How the product of some rows is cut into tasks: each a pair of strips of one of the parts.
struct Cut {
  int64_t blocks, pairs, parts, grain;

  // Few strips and many threads: the rows are cut too.
  Cut(const Int8GemmParams& p, int64_t rows, int threads)
      : blocks(ceil_div(rows, kBlockRows)), pairs(ceil_div(ceil_div(p.n, kStripRows), kBlockStrips)) {
    parts = std::clamp<int64_t>(ceil_div(8 * threads, pairs), 1, blocks);
    // A byte of w costs as much time as 256 multiply-adds.
    grain = 1 + (16 << 20) / (2 * kStripRows * p.k * (rows / parts + 256));
  }
};

void tell_plan(const Int8GemmParams& p, const ThreadPool& pool) {
  const int64_t most = max_blocks_of(PackedRows(p)) * kBlockRows;
  const int64_t rows = std::min(most, p.q_rows.count);
  const Cut cut(p, rows, pool.threads);
  pool.listener->tell("kernel", QOPS_ISA_NAME);
  pool.listener->tell("tile_rows", kBlockRows);
  pool.listener->tell("tile_strips", kBlockStrips);
  pool.listener->tell("rows_at_once", rows);
  pool.listener->tell("row_blocks", cut.parts);
  tell_tasks(pool, cut.pairs * cut.parts, cut.grain);
}

template <class T>
Status run(const Int8GemmParams& p, const ThreadPool& pool) {
  PackedRows packed(p);
  const int64_t m = p.q_rows.count;
  const int64_t max_blocks = max_blocks_of(packed);
  const int64_t scratch_bytes = std::min(max_blocks, ceil_div(m, kBlockRows)) * packed.block_bytes();
  Scratch scratch(Scratch::bytes<uint8_t>(scratch_bytes));
  if (!scratch.ok()) return Status::kOutOfMemory;
  packed.bytes = scratch.take<uint8_t>(scratch_bytes);

  const int64_t strips = ceil_div(p.n, kStripRows);
  for (int64_t first_row = 0; first_row < m; first_row += max_blocks * kBlockRows) {
    const int64_t rows = std::min(max_blocks * kBlockRows, m - first_row);
    parallel_for(pool, ceil_div(rows, kTileRows), 1 + (16 << 10) / p.k, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * kTileRows; row < end * kTileRows; row += kTileRows) {
        pack_tile(p, first_row + row, packed.tile(row), packed.step_bytes);
      }
    });
    const Cut cut(p, rows, pool.threads);
    parallel_for(pool, cut.pairs * cut.parts, cut.grain, [&](int64_t begin, int64_t end) {
      const TileScope tiles(kFewRowTiles, static_cast<int>(std::min<int64_t>(m, kTileRows)));
      while (begin < end) {
        const int64_t part = begin / cut.pairs, pair = begin % cut.pairs;
        const int64_t size = std::min(cut.pairs - pair, end - begin);
        const auto row = [&](int64_t i) { return first_row + std::min(rows, cut.blocks * i / cut.parts * kBlockRows); };
        multiply<T>(p, packed, first_row, {row(part), row(part + 1)},
                    {pair * kBlockStrips, std::min((pair + size) * kBlockStrips, strips)});
        begin += size;
      }
    });
  }
  return Status::kOk;
}

}  // namespace

Status int8_gemm(const Int8GemmParams& p, const ThreadPool& pool) {
  if (p.q_rows.count < kMinRows || p.n == 0 || p.k == 0) return avx512::int8_gemm(p, pool);
  if (pool.listener != nullptr) [[unlikely]] {
    tell_plan(p, pool);
    return Status::kOk;
  }
  if (p.dtype == DType::kInt32) return run<int32_t>(p, pool);
  return with_dtype(p.dtype, [&](auto* element) { return run<std::remove_pointer_t<decltype(element)>>(p, pool); });
}

}  // namespace qops::cpu::QOPS_ISA_NS
