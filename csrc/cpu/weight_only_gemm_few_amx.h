// Few rows of weight_only_gemm_amx.h: tiles of x and of sums have just as many rows as x, and everything is done at
// once while the weights stream past.
//
// Idea. A pass goes over pairs of strips and, in them, over blocks. Each step of it unpacks the codes of one block into
// L1, multiplies those of the block before, and runs the float32 chain over the sums of the one before that, which are
// of two strips and 8 rows: their totals are 16 registers. None of the three waits for another.
//
// Bytes and operations. 1 KiB of codes (a strip, 128 columns) takes 61 ns to read at 17 GB/s, what one thread gets, or
// 210 cycles. Unpacking it are 32 vector operations, 16 loads and 32 stores, the chain 40 operations and 16 loads, the
// four products 52 cycles, their tiles 64 loads: 100 cycles in all, so that memory should bound it. Measured (4096 x
// 4096, M = 8, one thread, 2-core Xeon): reading 0.50 ms, reading and unpacking 0.56, products and chain without
// unpacking 0.34, all of it 0.74, 70 % of what reading allows. Half of the latter part does not overlap with reading,
// wherever codes are fetched to (L1 or L2), how far ahead (2 or 4 KiB of each strip), with one block or two between
// unpacking and multiplying, and with unpacking cut into pieces between the products. For the same reason M = 2 to 4
// take as long as M = 5, no less than vectors do: M = 2 0.32 ms against 0.27, 4 0.33 against 0.34 (two threads).
#pragma once

#include "cpu/weight_only_gemm_amx.h"

namespace qops::cpu::QOPS_ISA_NS {

// With 4 rows, and with half-filled tiles, vectors are as fast or faster.
inline constexpr int kLeastFewRows = 5;
inline constexpr int kMostFewRows = 8;
inline constexpr int64_t kFewFetchBytes = 2 << 10;

// q - 8 of the low or the high nibbles, an affine function of bits: three are those of q, the others the fourth's
// inverse.
template <bool kHigh>
inline B8x64 nibbles_less_8(B8x64 packed) {
  constexpr long long kBits = kHigh ? 0x1020408080808080 : 0x0102040808080808;
  return {_mm512_gf2p8affine_epi64_epi8(packed.v, _mm512_set1_epi64(kBits), 0xf8)};
}

// Where one of the three stands.
template <int kStrips>
struct Walk {
  Block block;
  int64_t strip;

  void next(const Blocks& blocks) {
    block.next(blocks);
    if (block.index < blocks.count) return;
    block = Block(blocks);
    strip += kStrips;
  }
};

struct FewRows {
  static constexpr int64_t kCodes = 2 * kChunkStrips * kMaxBlock / kTileRowBytes * kTileBytes;
  static constexpr int64_t kSumsOfStrip = 2 * kMostFewRows * kStripRows;
  static constexpr int64_t kSums = 2 * kChunkStrips * kSumsOfStrip;
  static constexpr int64_t kOutputs = kChunkStrips * kTileValues;

  const WeightOnlyGemmParams& p;
  const Blocks& blocks;
  const RowTiles& tiles;
  const uint8_t* digits_of_row;
  uint8_t* codes;  // [block of two][strip][64 columns] tiles
  int32_t* sums;   // [block of two][strip][digit][row] of strips; of rows that are not there any
  float* y;        // as finish_chunk() reads it
  void (*finish)(const WeightOnlyGemmParams& p, Range rows, const uint8_t* digits_of_row, Range strips,
                 const float* sums);
};

template <int kStrips, bool kZeroPoints>
QOPS_ALWAYS_INLINE void unpack_block(const FewRows& f, const Walk<kStrips>& at, int64_t steps, uint8_t* to) {
  const int64_t strip_bytes = f.p.k / Int4Codes::kColumns * 64, strip_zeros = f.blocks.groups * kStripRows;
  const int64_t begin = at.block.begin / Int4Codes::kColumns * 64;
  const char* from = static_cast<const char*>(f.p.packed) + at.strip * strip_bytes + begin;
  // Behind the end of a strip comes that of the next pair.
  const int64_t ahead = kFewFetchBytes + (begin + kFewFetchBytes < strip_bytes ? 0 : (kStrips - 1) * strip_bytes);
  B8x64 zero[kStrips];
  if constexpr (kZeroPoints) {
    const uint8_t* zeros =
        static_cast<const uint8_t*>(f.p.zeros) + at.strip * strip_zeros + at.block.group * kStripRows;
    QOPS_UNROLL for (int s = 0; s < kStrips; ++s) {
      zero[s] = bit_cast<B8x64>(load(zeros + s * strip_zeros) * set1(int32_t{0x01010101}));
    }
  }
  for (int64_t n = at.block.size / Int4Codes::kColumns; n > 0; --n, from += 64, to += 2 * kTileRowBytes) {
    QOPS_UNROLL for (int s = 0; s < kStrips; ++s) {
      const B8x64 packed = load_bytes(from + s * strip_bytes);
      prefetch_to_l2(from + s * strip_bytes + ahead);
      uint8_t* rows = to + s * steps * kTileBytes;
      if constexpr (kZeroPoints) {
        store(rows, subtract_bytes(low_nibbles(packed), zero[s]));
        store(rows + kTileRowBytes, subtract_bytes(high_nibbles(packed), zero[s]));
      } else {
        store(rows, nibbles_less_8<false>(packed));
        store(rows + kTileRowBytes, nibbles_less_8<true>(packed));
      }
    }
  }
}

template <int kSteps, int kStrips>
QOPS_ALWAYS_INLINE void multiply_few(const RowTiles& tiles, int64_t block, const uint8_t* w, int32_t* sums) {
  const int64_t digit_bytes = tiles.digit_bytes();
  const uint8_t* x = tiles.block(0, block);
  constexpr int64_t kDigit = FewRows::kSumsOfStrip / 2;
  zero_tile<0>();
  zero_tile<1>();
  if constexpr (kStrips == 2) {
    zero_tile<2>();
    zero_tile<3>();
  }
  for (int step = 0; step < kSteps; ++step, x += 2 * digit_bytes, w += kTileBytes) {
    load_tile<4>(x, kTileRowBytes);
    load_tile<6>(w, kTileRowBytes);
    dot_tiles<0, 4, 6>();
    load_tile<5>(x + digit_bytes, kTileRowBytes);
    dot_tiles_unsigned_x<1, 5, 6>();
    if constexpr (kStrips == 2) {
      load_tile<7>(w + kSteps * kTileBytes, kTileRowBytes);
      dot_tiles<2, 4, 7>();
      dot_tiles_unsigned_x<3, 5, 7>();
    }
  }
  store_tile<0>(sums, kTileRowBytes);
  store_tile<1>(sums + kDigit, kTileRowBytes);
  if constexpr (kStrips == 2) {
    store_tile<2>(sums + 2 * kDigit, kTileRowBytes);
    store_tile<3>(sums + 3 * kDigit, kTileRowBytes);
  }
}

template <int kStrips, bool kOffset>
QOPS_ALWAYS_INLINE void add_block(const FewRows& f, const Walk<kStrips>& at, const int32_t* sums,
                                  F32x16 (&total)[kStrips][kMostFewRows]) {
  const float* x_scale = f.tiles.scale + f.tiles.scale_at(0, at.block.index);
  const float* x_sum = f.tiles.sum + f.tiles.scale_at(0, at.block.index);
  QOPS_UNROLL for (int s = 0; s < kStrips; ++s) {
    const int64_t group = ((at.strip + s) * f.blocks.groups + at.block.group) * kStripRows;
    const F32x16 scale = load_as_float(f.p.scales, f.p.scale_dtype, group, kLanes);
    const int32_t* top = sums + s * FewRows::kSumsOfStrip;
    const int32_t* low = top + FewRows::kSumsOfStrip / 2;
    QOPS_UNROLL for (int r = 0; r < kMostFewRows; ++r) {
      const I32x16 sum = shift_left<8>(load(top + r * kStripRows)) + load(low + r * kStripRows);
      total[s][r] = fma(scale, to_float(sum) * set1(x_scale[r]), total[s][r]);
    }
    if constexpr (kOffset) {
      const F32x16 z = load_as_float(f.p.zeros, f.p.zero_dtype, group, kLanes);
      const F32x16 offset = f.p.kind == WeightKind::kOffset ? Int4Codes::offset(scale, z) : scale * (set1(8.0f) - z);
      QOPS_UNROLL for (int r = 0; r < kMostFewRows; ++r) total[s][r] = fma(offset, set1(x_sum[r]), total[s][r]);
    }
  }
}

// Strips whose number is a multiple of kStrips.
template <int kSteps, int kStrips, bool kZeroPoints, bool kOffset>
[[gnu::noinline]] void pass_few(const FewRows& f, Range strips) {
  constexpr int64_t kCodes = kStrips * kSteps * kTileBytes, kSums = kStrips * FewRows::kSumsOfStrip;
  const Blocks& blocks = f.blocks;
  const int64_t count = strips.size() / kStrips * blocks.count;
  Walk<kStrips> unpacked{Block(blocks), strips.begin}, multiplied = unpacked, added = unpacked;
  F32x16 total[kStrips][kMostFewRows];
  QOPS_UNROLL for (int s = 0; s < kStrips; ++s) {
    QOPS_UNROLL for (int r = 0; r < kMostFewRows; ++r) total[s][r] = set1(0.0f);
  }
  int64_t slice = 1;
  for (int64_t i = 0; i < count + 2; ++i) {
    if (i < count) {
      unpack_block<kStrips, kZeroPoints>(f, unpacked, kSteps, f.codes + i % 2 * kCodes);
      unpacked.next(blocks);
    }
    if (i >= 1 && i <= count) {
      multiply_few<kSteps, kStrips>(f.tiles, multiplied.block.index, f.codes + (i - 1) % 2 * kCodes,
                                    f.sums + i % 2 * kSums);
      multiplied.next(blocks);
    }
    if (i < 2) continue;
    add_block<kStrips, kOffset>(f, added, f.sums + (i - 1) % 2 * kSums, total);
    const int64_t done = (added.block.index + 1) * kSlices;
    if (done >= slice * blocks.count) {  // a slice ends, or several short ones
      while (done >= slice * blocks.count && slice <= kSlices) ++slice;
      QOPS_UNROLL for (int s = 0; s < kStrips; ++s) {
        float* y = f.y + s * kTileValues;
        QOPS_UNROLL for (int r = 0; r < kMostFewRows; ++r) {
          store(y + r * kStripRows, load(y + r * kStripRows) + total[s][r]);
          total[s][r] = set1(0.0f);
        }
      }
      if (slice > kSlices) {
        f.finish(f.p, {0, f.p.x_rows.count}, f.digits_of_row, {added.strip, added.strip + kStrips}, f.y);
        std::memset(f.y, 0, FewRows::kOutputs * sizeof(float));
        slice = 1;
      }
    }
    added.next(blocks);
  }
}

inline void multiply_few_rows(const FewRows& f, Range strips) {
  const auto run = [&](auto steps, auto zero_points, auto offset) {
    const int64_t odd = strips.end - strips.size() % kChunkStrips;
    if (strips.begin < odd) pass_few<steps, kChunkStrips, zero_points, offset>(f, {strips.begin, odd});
    if (odd < strips.end) pass_few<steps, 1, zero_points, offset>(f, {odd, strips.end});
  };
  const auto with_steps = [&](auto zero_points, auto offset) {
    f.tiles.steps == 1 ? run(std::integral_constant<int, 1>(), zero_points, offset)
                       : run(std::integral_constant<int, 2>(), zero_points, offset);
  };
  if (f.p.kind == WeightKind::kZeroPoint) return with_steps(std::true_type(), std::false_type());
  has_float_zeros(f.p.kind) ? with_steps(std::false_type(), std::true_type())
                            : with_steps(std::false_type(), std::false_type());
}

inline int64_t few_rows_grain(const WeightOnlyGemmParams& p) { return 1 + strip_grain(p) / kChunkStrips; }

inline void tell_few_rows_plan(const WeightOnlyGemmParams& p, const ThreadPool& pool) {
  pool.listener->tell("kernel", QOPS_ISA_NAME);
  pool.listener->tell("tile_rows", p.x_rows.count);
  pool.listener->tell("tile_strips", kChunkStrips);
  tell_tasks(pool, ceil_div(strips_of(p), kChunkStrips), few_rows_grain(p));
}

template <class T>
inline Status few_rows_int4_gemm(const WeightOnlyGemmParams& p, const ThreadPool& pool) {
  if (pool.listener != nullptr) [[unlikely]] {
    tell_few_rows_plan(p, pool);
    return Status::kOk;
  }
  if (p.perm != nullptr && !valid_permutation_range(p)) return Status::kIndexOutOfRange;
  const int64_t m = p.x_rows.count;
  const Blocks blocks(p.k, p.group_size);
  RowTiles tiles(blocks, m);
  const int64_t scales = blocks.count * kTileRows;
  Scratch scratch(Scratch::bytes<uint8_t>(tiles.tile_bytes()) + 2 * Scratch::bytes<float>(scales) +
                  Scratch::bytes<uint8_t>(m));
  if (!scratch.ok()) return Status::kOutOfMemory;
  tiles.bytes = scratch.take<uint8_t>(tiles.tile_bytes());
  tiles.scale = scratch.take<float>(scales);
  tiles.sum = scratch.take<float>(scales);
  uint8_t* digits_of_row = scratch.take<uint8_t>(m);
  std::memset(tiles.scale, 0, static_cast<size_t>(scales) * sizeof(float));
  std::memset(tiles.sum, 0, static_cast<size_t>(scales) * sizeof(float));
  parallel_for(pool, m, 1 + (16 << 10) / p.k, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
      digits_of_row[row] = write_digits<2>(x, p.perm, blocks, RowOfTiles(tiles, row)) ? 4 : 2;
    }
  });

  std::atomic<bool> out_of_memory = false;
  parallel_for(pool, ceil_div(strips_of(p), kChunkStrips), few_rows_grain(p), [&](int64_t begin, int64_t end) {
    Scratch memory(Scratch::bytes<uint8_t>(FewRows::kCodes) + Scratch::bytes<int32_t>(FewRows::kSums) +
                   Scratch::bytes<float>(FewRows::kOutputs));
    if (!memory.ok()) {
      out_of_memory = true;
      return;
    }
    const FewRows few{p,
                      blocks,
                      tiles,
                      digits_of_row,
                      memory.take<uint8_t>(FewRows::kCodes),
                      memory.take<int32_t>(FewRows::kSums),
                      memory.take<float>(FewRows::kOutputs),
                      &finish_chunk<T>};
    // What blocks do not fill meets zeros of x, and sums of rows that are not there a scale of 0.
    std::memset(few.sums, 0, FewRows::kSums * sizeof(int32_t));
    std::memset(few.y, 0, FewRows::kOutputs * sizeof(float));
    const TileScope scope(6, static_cast<int>(m));
    multiply_few_rows(few, {begin * kChunkStrips, std::min(end * kChunkStrips, strips_of(p))});
  });
  if (out_of_memory) return Status::kOutOfMemory;
  return multiply_rows_of_four_digits<Int4Codes, T>(p, pool, blocks, digits_of_row);
}

inline bool takes_few_rows(const WeightOnlyGemmParams& p) {
  const bool half = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  const int64_t m = p.x_rows.count;
  return half && m >= kLeastFewRows && m <= kMostFewRows && p.group_size >= kTileRowBytes && p.n > 0 &&
         p.super_shift == 0;
}

}  // namespace qops::cpu::QOPS_ISA_NS
