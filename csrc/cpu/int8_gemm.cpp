// int8_gemm: y = R(fmaf(s_x[m], float(sum_k (q[m, k] - zero_point[m]) w[n, k]) * s_w[n], bias[n])).
//
// Idea. The sum is an exact int32 (modulo 2^32), so its bits depend neither on the order, the tile, the ISA level nor
// on M; what follows is one float32 chain per output. vpdpbusd multiplies unsigned with signed bytes. x becomes the
// unsigned operand, as x + 128: flipping it costs one pass over x, flipping w would cost one instruction for each 64
// bytes and tile of rows. Then
//     sum_k (q - zero_point) w  =  sum_k (q + 128) w  -  (128 + zero_point) * sum_k w,
// and sum_k w is one more row of the product, x = 1: it runs in the first tile over the weights that are there already.
// Storing it with the weight would save 1 / M of the dot products and cost a second copy of what the weight already
// says, 4 / K of its size; at the M where 1 / M counts, memory bounds the call. AVX2 has no such instruction: there
// both operands are widened to 16 bits (vpmaddubsw would saturate), and the row of ones only runs with zero points.
//
// Bytes and operations: 64 bytes of w take one load and M + 1 dot products, two a cycle. DRAM gives them in about 15
// cycles a core, so weights bound the call up to M of some 24, the dot products beyond. AMX: int8_gemm_amx.cpp.
#include <algorithm>
#include <utility>

#include "cpu/int8_gemm_epilogue.h"
#include "cpu/scratch.h"
#include "cpu/team_product.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

// Rows x strips of sums that stay in registers: 6 x 4 of AVX-512's 32, where 4 more hold w and one x.
constexpr int kTileRows = kVectorRegisters >= 32 ? 6 : 4;
constexpr int kTileStrips = kVectorRegisters >= 32 ? 4 : 1;
// Two rows have registers left, and need 10 sums to hide the latency of a dot product (5 cycles, two a cycle).
constexpr int kWideRows = 2;
constexpr int kWideStrips = 2 * kTileStrips;

// How far ahead of its tile's strips weights are fetched, all together: the hardware alone reads 83 % of what memory
// gives at M = 1 and 75 % at M = 4, with this 91 and 87 (4096 x 4096, a 2-core Xeon, one thread).
constexpr int64_t kFetchBytes = 4 << 10;

// Rows of x are packed and multiplied at most so many at a time, which bounds the scratch.
constexpr int64_t kMaxRows = 1024;
// Strips that one thread takes at a time stay in its L2 while every tile of x passes over them.
constexpr int64_t kChunkBytes = 512 << 10;
constexpr int kMaxChunk = 64;

// Rows of x as the dot products read them. Row 0 holds ones where sum_k w is needed; x begins at row `first`.
struct PackedRows {
  uint8_t* bytes = nullptr;
  int64_t plane_bytes;
  int first;

  // 64 bytes more, or the rows of a tile would lie 4 KiB apart and share one set of L1.
  explicit PackedRows(const Int8GemmParams& p)
      : plane_bytes((p.k + 63) / 64 * 64 + 64), first(kDotOffset != 0 || p.zero_point != nullptr ? 1 : 0) {}

  int64_t bytes_of(int64_t rows) const { return (first + rows) * kDotPlanes * plane_bytes; }
  uint8_t* row(int64_t index) const { return bytes + index * kDotPlanes * plane_bytes; }
};

// Row `row` of those from first_row on.
void pack_row(const PackedRows& x, const Int8GemmParams& p, int64_t first_row, int64_t row) {
  const int8_t* values = static_cast<const int8_t*>(p.q) + p.q_rows.offset(first_row + row);
  for (int64_t begin = 0; begin < p.k; begin += 64) {
    uint8_t block[64] = {};
    std::memcpy(block, values + begin, static_cast<size_t>(std::min<int64_t>(64, p.k - begin)));
    write_dot_row(x.row(x.first + row) + begin, x.plane_bytes, load_bytes(block));
  }
}

void pack_ones(const PackedRows& x, int64_t k) {
  uint8_t block[64];
  std::memset(block, 1 - kDotOffset, sizeof(block));
  for (int64_t begin = 0; begin < k; begin += 64) write_dot_row(x.row(0) + begin, x.plane_bytes, load_bytes(block));
}

// Sums of one tile: [row][strip * 16 + lane].
struct Sums {
  alignas(64) int32_t of[kTileRows][kWideStrips * kStripRows];
};

template <int Rows, int Strips>
void tile(const uint8_t* const* x, int64_t plane_bytes, const char* w, int64_t strip_bytes, Sums& sums) {
  I32x16 sum[Rows][Strips];
  const uint8_t* row[Rows];
  QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
    row[r] = x[r];
    QOPS_UNROLL for (int s = 0; s < Strips; ++s) sum[r][s] = set1(int32_t{0});
  }
  for (int64_t at = 0; 16 * at < strip_bytes; at += 4, w += 64) {
    DotStrip columns[Strips];
    QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
      columns[s] = load_dot_strip(w + s * strip_bytes);
      prefetch(w + s * strip_bytes + kFetchBytes / Strips);
    }
    QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
      const DotRow values = load_dot_row(row[r] + at, plane_bytes);
      QOPS_UNROLL for (int s = 0; s < Strips; ++s) sum[r][s] = dot(sum[r][s], values, columns[s]);
    }
  }
  QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
    QOPS_UNROLL for (int s = 0; s < Strips; ++s) store(sums.of[r] + s * kStripRows, sum[r][s]);
  }
}

// The widest tile of at most `strips` strips; returns how many those are.
template <int Rows, int Strips = Rows <= kWideRows ? kWideStrips : kTileStrips>
int widest_tile(const uint8_t* const* x, int64_t plane_bytes, const char* w, int64_t strip_bytes, int64_t strips,
                Sums& sums) {
  if constexpr (Strips > 1) {
    if (strips < Strips) return widest_tile<Rows, Strips / 2>(x, plane_bytes, w, strip_bytes, strips, sums);
  }
  tile<Rows, Strips>(x, plane_bytes, w, strip_bytes, sums);
  return Strips;
}

struct Tiles {
  int (*of_rows[kTileRows])(const uint8_t* const*, int64_t, const char*, int64_t, int64_t, Sums&);  // [rows - 1]
};
template <int... I>
constexpr Tiles tiles(std::integer_sequence<int, I...>) {
  return {{&widest_tile<I + 1>...}};
}
constexpr Tiles kTiles = tiles(std::make_integer_sequence<int, kTileRows>());

// y of some rows and strips. `packed` holds the rows from first_row on.
template <class T>
void multiply(const Int8GemmParams& p, const PackedRows& packed, int64_t first_row, Range rows, Range strips) {
  const int64_t strip_bytes = p.k * kStripRows;
  const int64_t fitting = kChunkBytes / (strip_bytes + 1) / kTileStrips * kTileStrips;
  const int64_t chunk = std::clamp<int64_t>(fitting, kTileStrips, kMaxChunk);
  // The row of ones comes first, then the rows of x, in tiles of even heights.
  const int64_t total = packed.first + rows.size();
  const int64_t tiles = (total + kTileRows - 1) / kTileRows;
  Sums sums;
  for (int64_t begin = strips.begin; begin < strips.end; begin += chunk) {
    const int64_t end = std::min(begin + chunk, strips.end);
    Columns<kMaxChunk> columns(p, {begin, end});
    for (int64_t t = 0; t < tiles; ++t) {
      const Range of{total * t / tiles, total * (t + 1) / tiles};
      const int ones = t == 0 ? packed.first : 0;
      const uint8_t* x[kTileRows];
      for (int64_t i = of.begin; i < of.end; ++i) {
        x[i - of.begin] = packed.row(i < packed.first ? 0 : rows.begin - first_row + i);
      }
      for (int64_t strip = begin; strip < end;) {
        const char* w = static_cast<const char*>(p.packed) + strip * strip_bytes;
        const int done = kTiles.of_rows[of.size() - 1](x, packed.plane_bytes, w, strip_bytes, end - strip, sums);
        if (ones != 0) {
          int32_t* w_sum = columns.w_sum + columns.offset(strip);
          std::memcpy(w_sum, sums.of[0], static_cast<size_t>(done) * kStripRows * sizeof(int32_t));
        }
        const Range finished{of.begin + ones + rows.begin - packed.first, of.end + rows.begin - packed.first};
        finish_rows<T>(p, finished, {strip, strip + done}, sums.of[ones], kWideStrips * kStripRows, kDotOffset,
                       packed.first != 0, columns);
        strip += done;
      }
    }
  }
}

// How the product of some rows is cut into tasks: each a strip of one of the blocks of rows.
struct Cut {
  int64_t blocks, tasks, grain;

  // Few strips and many threads: the rows are cut too.
  Cut(const Int8GemmParams& p, int64_t rows, int threads) {
    const int64_t strips = (p.n + kStripRows - 1) / kStripRows, wanted = (8 * threads + strips - 1) / strips;
    blocks = std::clamp<int64_t>(wanted, 1, (rows + 2 * kTileRows - 1) / (2 * kTileRows));
    tasks = strips * blocks;
    grain = 1 + (64 << 10) / (p.k * (8 + rows / blocks) + 1);
  }
};

void tell_plan(const Int8GemmParams& p, const ThreadPool& pool) {
  const int64_t rows = std::min(kMaxRows, p.q_rows.count);
  const Cut cut(p, rows, pool.threads);
  pool.listener->tell("kernel", QOPS_ISA_NAME);
  pool.listener->tell("tile_rows", kTileRows);
  pool.listener->tell("tile_strips", kTileStrips);
  pool.listener->tell("rows_at_once", rows);
  pool.listener->tell("row_blocks", cut.blocks);
  tell_tasks(pool, cut.tasks, cut.grain);
}

template <class T>
Status run(const Int8GemmParams& p, const ThreadPool& pool) {
  const int64_t m = p.q_rows.count;
  PackedRows packed(p);
  const int64_t scratch_bytes = packed.bytes_of(std::min(m, kMaxRows));
  Scratch scratch(Scratch::bytes<uint8_t>(scratch_bytes));
  if (!scratch.ok()) return Status::kOutOfMemory;
  packed.bytes = scratch.take<uint8_t>(scratch_bytes);
  if (packed.first != 0) pack_ones(packed, p.k);

  const int64_t strips = (p.n + kStripRows - 1) / kStripRows;
  for (int64_t first_row = 0; first_row < m; first_row += kMaxRows) {
    const int64_t rows = std::min(kMaxRows, m - first_row);
    parallel_for(pool, rows, 1 + (256 << 10) / (p.k + 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) pack_row(packed, p, first_row, row);
    });
    const Cut cut(p, rows, pool.threads);
    parallel_for(pool, cut.tasks, cut.grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t block = begin / strips, strip = begin % strips;
        const int64_t size = std::min(strips - strip, end - begin);
        const Range of{first_row + rows * block / cut.blocks, first_row + rows * (block + 1) / cut.blocks};
        multiply<T>(p, packed, first_row, of, {strip, strip + size});
        begin += size;
      }
    });
  }
  return Status::kOk;
}

// The same product for a team of threads (cpu/team_product.h).
size_t team_bytes(const Int8GemmParams& p) { return Pieces::bytes<uint8_t>(PackedRows(p).bytes_of(p.q_rows.count)); }

PackedRows packed_in(const Int8GemmParams& p, void* memory) {
  PackedRows packed(p);
  packed.bytes = static_cast<uint8_t*>(memory);
  return packed;
}

void team_prepare(const Int8GemmParams& p, void* memory) {
  const PackedRows packed = packed_in(p, memory);
  if (packed.first != 0) pack_ones(packed, p.k);
  for (int64_t row = 0; row < p.q_rows.count; ++row) pack_row(packed, p, 0, row);
}

template <class T>
void team_multiply(const Int8GemmParams& p, void* memory, int64_t begin_strip, int64_t end_strip) {
  multiply<T>(p, packed_in(p, memory), 0, {0, p.q_rows.count}, {begin_strip, end_strip});
}

template <class T>
constexpr TeamProduct<Int8GemmParams> kTeamProduct{&team_bytes, &team_prepare, &team_multiply<T>};

}  // namespace

const TeamProduct<Int8GemmParams>& int8_team_product(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return kTeamProduct<Half>;
    case DType::kBFloat16: return kTeamProduct<BFloat16>;
    default: return kTeamProduct<float>;
  }
}

Status int8_gemm(const Int8GemmParams& p, const ThreadPool& pool) {
  if (p.q_rows.count == 0 || p.n == 0) return Status::kOk;
  if (pool.listener != nullptr) [[unlikely]] {
    tell_plan(p, pool);
    return Status::kOk;
  }
  if (p.dtype == DType::kInt32) return run<int32_t>(p, pool);
  return with_dtype(p.dtype, [&](auto* element) { return run<std::remove_pointer_t<decltype(element)>>(p, pool); });
}

}  // namespace qops::cpu::QOPS_ISA_NS
