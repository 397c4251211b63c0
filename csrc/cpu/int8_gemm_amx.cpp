// int8_gemm on AMX tiles. The sums are exact, so their bits are those of int8_gemm.cpp, which keeps the calls of few
// rows; the float32 chain is shared.
//
// Idea. A strip of the packed weight is a row of tiles as tdpbssd reads them: 64 of K are 16 rows of 64 bytes. x is
// copied into tiles, 32 rows side by side and padded with zeros: rows that lie 4 KiB apart would share one set of L1,
// and neither the rows nor the columns left over need code of their own. Where K ends inside a tile, the tile of w runs
// on into the next strip, which meets the zeros of x; the last strip's is copied. Two tiles of x and two of w give four
// of sums: four loads for four products, and all eight tiles are in use.
//
// Bytes and operations, measured on a 2-core Xeon with 2 MiB of L2: a product takes 17 cycles (16384 multiply-adds), 20
// with its load from L1, 30 to 45 where both x and w stream from L2 (K > 1024): L2 then bounds the call. DRAM gives a
// core 14 GB/s, 1 KiB of w in 285 cycles, so weights bound it up to M of 100 or so.
//
// What was tried and lost: tiles of x from rows 4 KiB apart (31 cycles a product; 26 from rows 4160 bytes apart);
// prefetching tiles into L1, as the bandwidth of L2 is what lacks; y written 64 bytes of a row at a time (10 % at
// N = 49152).
#include <algorithm>

#include "cpu/int8_gemm_epilogue.h"
#include "cpu/kernel_table.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

// Fewer rows are faster without tiles, which take no less time for 6 rows than for 16. With zero points the tiles read
// w twice, the second time for sum_k w.
constexpr int64_t kMinRows = 6;
constexpr int64_t kMinRowsWithZeroPoints = 12;
// Rows and strips of the four tiles of sums.
constexpr int kBlockRows = 2 * kTileRows;
constexpr int kBlockStrips = 2;
// Rows of x are packed and multiplied at most so many bytes at a time: half of L2.
constexpr int64_t kPackedBytes = 1 << 20;
// Strips that all rows pass over before the next ones: a row of y is written 128 to 256 bytes at a time.
constexpr int kMaxChunk = 4;
constexpr int64_t kChunkBytes = 256 << 10;
// Where at least so many blocks of rows pass over a chunk, there is time to fetch the next one into L2 meanwhile. With
// fewer, memory bounds the call, and fetching ahead only disturbs the hardware's streams (15 % at M = 64).
constexpr int64_t kFetchingBlocks = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// x in tiles: [block of 32 rows][64 columns][16 rows of the block][row][column].
struct PackedRows {
  uint8_t* bytes;
  int64_t steps;  // of 64 columns

  int64_t block_bytes() const { return steps * 2 * kTileBytes; }
  uint8_t* tile(int64_t row) const {
    return bytes + row / kBlockRows * block_bytes() + row % kBlockRows / kTileRows * kTileBytes;
  }
};

// The rows from `row` on that share a tile.
void pack_tile(const Int8GemmParams& p, int64_t row, uint8_t* tile) {
  const int64_t rows = std::min<int64_t>(kTileRows, p.q_rows.count - row);
  const int8_t* values[kTileRows];
  for (int64_t r = 0; r < rows; ++r) values[r] = static_cast<const int8_t*>(p.q) + p.q_rows.offset(row + r);
  for (int64_t column = 0; column < p.k; column += kTileRowBytes, tile += 2 * kTileBytes) {
    const int64_t left = p.k - column;
    if (rows < kTileRows || left < kTileRowBytes) std::memset(tile, 0, kTileBytes);
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

// One or two strips of w: the first byte of each, and its tile of the last step.
struct Strips {
  const char* first[kBlockStrips];
  const char* last[kBlockStrips];
};

constexpr int kSumsPerRow = kMaxChunk * kStripRows;
using Sums = int32_t[kBlockRows][kSumsPerRow];

// Sums of one or two tiles of rows with one or two strips, to the columns of `sums` from `column` on.
template <int kRowTiles, int kStrips>
void multiply_block(const uint8_t* x, const Strips& w, int64_t steps, Ahead& ahead, Sums& sums, int64_t column) {
  zero_tile<0>();
  if constexpr (kStrips == 2) zero_tile<1>();
  if constexpr (kRowTiles == 2) zero_tile<2>();
  if constexpr (kRowTiles == 2 && kStrips == 2) zero_tile<3>();
  Ahead now = ahead;  // in registers
  const auto step = [&](const char* w0, const char* w1) {
    load_tile<4>(x, kTileRowBytes);
    load_tile<6>(w0, kTileRowBytes);
    dot_tiles<0, 4, 6>();
    if constexpr (kStrips == 2) {
      load_tile<7>(w1, kTileRowBytes);
      dot_tiles<1, 4, 7>();
    }
    if constexpr (kRowTiles == 2) {
      load_tile<5>(x + kTileBytes, kTileRowBytes);
      dot_tiles<2, 5, 6>();
      if constexpr (kStrips == 2) dot_tiles<3, 5, 7>();
    }
    x += 2 * kTileBytes;
    now.fetch();
  };
  for (int64_t at = 0; at < (steps - 1) * kTileBytes; at += kTileBytes) step(w.first[0] + at, w.first[1] + at);
  step(w.last[0], w.last[1]);
  ahead = now;
  constexpr int64_t kRowBytes = sizeof(sums[0]);
  store_tile<0>(sums[0] + column, kRowBytes);
  if constexpr (kStrips == 2) store_tile<1>(sums[0] + column + kStripRows, kRowBytes);
  if constexpr (kRowTiles == 2) store_tile<2>(sums[kTileRows] + column, kRowBytes);
  if constexpr (kRowTiles == 2 && kStrips == 2) store_tile<3>(sums[kTileRows] + column + kStripRows, kRowBytes);
}

void multiply_block(int64_t rows, int64_t strips, const uint8_t* x, const Strips& w, int64_t steps, Ahead& ahead,
                    Sums& sums, int64_t column) {
  const bool two = strips == 2;
  if (rows > kTileRows) {
    two ? multiply_block<2, 2>(x, w, steps, ahead, sums, column)
        : multiply_block<2, 1>(x, w, steps, ahead, sums, column);
  } else {
    two ? multiply_block<1, 2>(x, w, steps, ahead, sums, column)
        : multiply_block<1, 1>(x, w, steps, ahead, sums, column);
  }
}

// sum_k w of the 16 columns of a strip.
void sum_strip(const char* w, int64_t strip_bytes, int32_t* sums) {
  const B8x64 ones = bit_cast<B8x64>(set1(int32_t{0x01010101}));
  I32x16 even = set1(int32_t{0}), odd = set1(int32_t{0});
  for (int64_t at = 0; at < strip_bytes; at += 128) {  // K is a multiple of 8
    even = dot(even, ones, load_bytes(w + at));
    odd = dot(odd, ones, load_bytes(w + at + 64));
  }
  store(sums, even + odd);
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
  const int64_t chunk = std::clamp<int64_t>(fitting, kBlockStrips, kMaxChunk);
  for (int64_t begin = strips.begin; begin < strips.end; begin += chunk) {
    const Range of{begin, std::min(begin + chunk, strips.end)};
    Columns<kMaxChunk> columns(p, of);
    if (p.zero_point != nullptr) {
      for (int64_t strip = of.begin; strip < of.end; ++strip) {
        sum_strip(weights + strip * strip_bytes, strip_bytes, columns.w_sum + columns.offset(strip));
      }
    }
    const int64_t next = blocks < kFetchingBlocks ? of.end : std::min(of.end + chunk, strips.end);
    const int64_t steps = blocks * ceil_div(of.size(), kBlockStrips) * packed.steps;
    Ahead ahead{weights + of.end * strip_bytes, weights + next * strip_bytes,
                ceil_div((next - of.end) * strip_bytes, steps * 64) * 64};
    for (int64_t row = rows.begin; row < rows.end; row += kBlockRows) {
      const int64_t row_end = std::min(row + kBlockRows, rows.end);
      for (int64_t strip = of.begin; strip < of.end; strip += kBlockStrips) {
        const int64_t count = std::min<int64_t>(kBlockStrips, of.end - strip);
        Strips w;
        for (int64_t s = 0; s < kBlockStrips; ++s) {
          const int64_t read = strip + std::min(s, count - 1);
          w.first[s] = weights + read * strip_bytes;
          w.last[s] = has_end && read == end_strip ? end_of_w : w.first[s] + last_step;
        }
        multiply_block(row_end - row, count, packed.tile(row - first_row), w, packed.steps, ahead, sums,
                       columns.offset(strip));
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
  const int64_t most = max_blocks_of({nullptr, ceil_div(p.k, kTileRowBytes)}) * kBlockRows;
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
  PackedRows packed{nullptr, ceil_div(p.k, kTileRowBytes)};
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
        pack_tile(p, first_row + row, packed.tile(row));
      }
    });
    const Cut cut(p, rows, pool.threads);
    parallel_for(pool, cut.pairs * cut.parts, cut.grain, [&](int64_t begin, int64_t end) {
      const TileScope tiles;
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
  const int64_t min_rows = p.zero_point == nullptr ? kMinRows : kMinRowsWithZeroPoints;
  if (p.q_rows.count < min_rows || p.n == 0 || p.k == 0) return avx512::int8_gemm(p, pool);
  if (pool.listener != nullptr) [[unlikely]] {
    tell_plan(p, pool);
    return Status::kOk;
  }
  if (p.dtype == DType::kInt32) return run<int32_t>(p, pool);
  return with_dtype(p.dtype, [&](auto* element) { return run<std::remove_pointer_t<decltype(element)>>(p, pool); });
}

}  // namespace qops::cpu::QOPS_ISA_NS
