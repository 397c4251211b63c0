// The GEMM behind int4_gemm and int8_weight_only_gemm: y = x @ w.T with integer weights and floating-point x.
//
// Idea. A decode step is bound by reading the weights, and turning each code into a float costs more instructions than
// memory leaves time for. So the activations become integers instead: per block of at most 128 columns,
//     x[k] ~ sx v[k],    v = 256 hi + lo  (16-bit fixed point: hi signed, lo unsigned bytes),
// and the products with the codes are exact byte dot products (vpdpbusd: 64 per instruction). One code serves as the
// unsigned operand against hi and as the signed operand against lo. The sum over a block is an exact int32, so
// its bits depend neither on the order, the tile, the ISA level nor on M; what follows is float32 in one fixed order:
//     part = float(sum of v (q - z)) * sx;   total = fma(s, part, total);   at a slice's end y += total, total = 0
// over blocks in ascending k, in 8 contiguous slices of the blocks; then y += bias and one rounding.
// w = s q + o of 4-bit codes is s (q - 8) + (o + 8 s): the second term adds fma(o + 8 s, sum of sx v, total). 8-bit
// codes are signed, so there it is o itself.
//
// Error of two digits: at most half of sx = a / 32767 for each x[k], a = max|x| of the block. float32 x, and rows in
// which that could show in the output (massive activations: see FourDigits), take four digits and a power of two
// for sx: half of sx <= 2^-31 a, and float32 values down to 2^-7 a are exact.
//
// Bytes and operations at M = 1: each 64 bytes of int4 codes (128 products) take 3 instructions to split nibbles and 4
// dot products, some 4 cycles, against about 7 cycles to read them from DRAM at 37 GB/s and 4 GHz.
//
// Several rows are bound by operations: 64 bytes of two strips and 4 rows take 32 dot products and 6 instructions to
// split nibbles, 19 cycles, and with the float32 chain 28. On a 2-core Xeon with two threads M = 4 so takes 0.27 ms,
// 1.6 times M = 1 (4096 x 4096, groups of 128), wherever codes are fetched to and how far ahead.
#pragma once

#include <algorithm>

#include "cpu/gemm_epilogue.h"
#include "cpu/group_numbers.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "cpu/team_product.h"

namespace qops::cpu::QOPS_ISA_NS {

inline constexpr int kMaxBlock = 128;
inline constexpr int kSlices = 8;
// A tile of 4 rows x 2 strips x 2 digits sums in 16 of AVX-512's 32 registers; with 16 registers a vector takes two.
inline constexpr int kMaxTileRows = kVectorRegisters >= 32 ? 4 : 2;
constexpr int max_tile_rows(int digits) { return digits == 2 ? kMaxTileRows : kMaxTileRows / 2; }
// Few rows have sums for twice the strips: one row needs 8 that are independent to hide the latency of the dot product
// (5 cycles, 2 a cycle), and each strip is a stream from memory.
constexpr int strips_of_tile(int rows, int digits) {
  return (kVectorRegisters >= 32 ? 2 : 1) * (rows <= max_tile_rows(digits) / 2 ? 2 : 1);
}

// How far ahead of its tile's strips codes are fetched, all together: the hardware alone reads 76 % of what memory
// gives at M = 1 and 47 % at M = 4, with this 91 and 70 % (4096 x 4096, a 2-core Xeon, against 8 streams that are only
// read).
inline constexpr int64_t kFetchBytes = 4 << 10;
// Where a tile's strips are no longer than this together, what the next ones hold is fetched in their place: decoding
// with K = 576 and 1536 then takes 0.91 (one thread) and 0.94 (two) of the time.
inline constexpr int64_t kShortStrips = 64 << 10;

// Blocks of at most kMaxBlock columns, none across a group's border. Walked with next(), not indexed: an index would
// cost two 64-bit divisions a block, as long as the products of 32 columns.
struct Blocks {
  int64_t group_size, groups, count;

  Blocks(int64_t k, int64_t group_size)
      : group_size(group_size),
        groups(group_size == 0 ? 0 : k / group_size),
        count(groups * ((group_size + kMaxBlock - 1) / kMaxBlock)) {}
};

struct Block {
  int64_t index = 0, group = 0, begin = 0, size, left;  // left: columns of the group from `begin` on

  explicit Block(const Blocks& blocks)
      : size(std::min<int64_t>(kMaxBlock, blocks.group_size)), left(blocks.group_size) {}

  void next(const Blocks& blocks) {
    ++index;
    begin += size;
    left -= size;
    if (left == 0) {
      ++group;
      left = blocks.group_size;
    }
    size = std::min<int64_t>(kMaxBlock, left);
  }
};

// How the bytes of a weight become dot-product operands.
struct Int4Codes {
  static constexpr int kColumns = 8;  // columns in 64 packed bytes
  static constexpr int kSteps = 2;    // dot products of 4 columns in them
  static B8x64 step(B8x64 packed, int i) { return i == 0 ? low_nibbles(packed) : high_nibbles(packed); }
  static I32x16 dot_signed_x(I32x16 sum, B8x64 q, B8x64 x) { return dot_short(sum, q, x); }
  static I32x16 dot_unsigned_x(I32x16 sum, B8x64 q, B8x64 x) { return dot_short(sum, x, q); }
  // What the dot products of the top and of the lower digits need subtracted per unit of the digit's sum.
  static constexpr int kTopBias = 8;
  static constexpr int kLowBias = 8;
  // The constant beside those products where w = s q + o.
  static F32x16 offset(F32x16 scale, F32x16 o) { return fma(scale, set1(8.0f), o); }
};
struct Int8Codes {
  static constexpr int kColumns = 4;
  static constexpr int kSteps = 1;
  static B8x64 step(B8x64 packed, int) { return packed; }
  static I32x16 dot_signed_x(I32x16 sum, B8x64 q, B8x64 x) { return dot(sum, flip_sign_bits(q), x); }
  static I32x16 dot_unsigned_x(I32x16 sum, B8x64 q, B8x64 x) { return dot(sum, x, q); }
  static constexpr int kTopBias = 128;  // flip_sign_bits turns q into q + 128
  static constexpr int kLowBias = 0;
  static F32x16 offset(F32x16, F32x16 o) { return o; }
};

// --- activations -----------------------------------------------------------------------------------------------------

// Up to max_tile_rows rows of x that take the same number of digits. For each block and row:
//   digits  [K/4][digit][row] words of 4 bytes, top digit first
//   scale   sx;  sum = sx * (sum of v);  correction[digit] = -bias * (sum of the digit's bytes), where the dot products
//   start: the code's bias (8 for int4) leaves the products q - 8
struct Tile {
  int rows = 0;
  int digits = 2;
  int64_t row[kMaxTileRows];
  uint8_t* bytes = nullptr;
  float* scale = nullptr;         // [blocks][rows]
  float* sum = nullptr;           // [blocks][rows]
  int32_t* correction = nullptr;  // [blocks][digits][rows]
};

// Columns begin .. begin + n of a row of x, in packed order, as float32: f(k, lanes, vector of columns begin + k ...).
template <class T, class F>
inline void for_each_vector(const T* x, const int32_t* perm, int64_t begin, int64_t n, const F& f) {
  for (int64_t k = 0; k < n; k += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, n - k);
    if (perm == nullptr) {
      f(k, lanes, load_n(x + begin + k, lanes));
      continue;
    }
    T gathered[kLanes];
    for (int64_t i = 0; i < lanes; ++i) gathered[i] = x[perm[begin + k + i]];
    f(k, lanes, load_n(gathered, lanes));
  }
}

// The bits of |x|, whose integer order puts NaN above infinity.
inline I32x16 abs_bits(F32x16 x) { return as_int(x) & set1(int32_t{0x7fffffff}); }

// Whether two digits of a row could show: the error bound 2^-16 sum_b n_b a_b against half of the output's own rounding
// of a row of this size, 2^-p / 2 of sum |x| without each block's largest element; or a scale of two digits would be
// subnormal. A function of the row alone.
struct FourDigits {
  double bound = 0, rest = 0;
  bool subnormal = false;

  void add_block(float largest, float sum, int64_t size) {
    subnormal |= largest > 0.0f && largest < 0x1p-100f;
    bound += static_cast<double>(largest) * static_cast<double>(size);
    rest += static_cast<double>(sum) - static_cast<double>(largest);
  }
  template <class T>
  bool needed() const {
    constexpr double kHalfRounding = std::is_same_v<T, BFloat16> ? 0x1p-9 : 0x1p-12;
    return subnormal || bound * 0x1p-16 > kHalfRounding * rest;
  }
};

// Scale of a block and the factors that turn x into v: v = rne(x * pre * inverse), x ~ v * scale.
struct BlockScale {
  float scale, pre, inverse;
};
inline BlockScale block_scale(float a, int digits) {
  if (a == 0.0f) return {0.0f, 1.0f, 0.0f};
  if (!(a <= 3.402823466e38f)) return {bit_cast<float>(0x7fc00000u), 1.0f, 0.0f};  // the row becomes NaN
  if (digits == 2) return {a / 32767.0f, 1.0f, 32767.0f / a};
  const float pre = a < 0x1p-64f ? 0x1p64f : 1.0f;  // keeps a normal and the inverse finite
  const int pre_exponent = a < 0x1p-64f ? 64 : 0;
  const int exponent = static_cast<int>(bit_cast<uint32_t>(a * pre) >> 23) - 127 - pre_exponent;  // 2^exponent <= a
  const int e = std::max(exponent - 30, -149);  // no float32 has a bit below 2^-149
  const uint32_t scale = e >= -126 ? static_cast<uint32_t>(e + 127) << 23 : 1u << (149 + e);
  return {bit_cast<float>(scale), pre, bit_cast<float>(static_cast<uint32_t>(127 - e - pre_exponent) << 23)};
}

// A row of x as digits, in one pass. Each vector of them goes to out.digits(block, k, digit, bytes, lanes), with k from
// the block's beginning, and what belongs to a block to out.end_block(block, sums of the digits, scale). Returns
// whether the row needs four digits; two are then not enough.
template <int kDigits, class T, class Out>
inline bool write_digits(const T* row, const int32_t* perm, const Blocks& blocks, const Out& out) {
  FourDigits four;
  for (Block b(blocks); b.index < blocks.count; b.next(blocks)) {
    float x[kMaxBlock];
    I32x16 largest = set1(int32_t{0});
    F32x16 sum = set1(0.0f);
    for_each_vector(row, perm, b.begin, b.size, [&](int64_t k, int64_t lanes, F32x16 v) {
      store_n(x + k, v, lanes);
      largest = max(largest, abs_bits(v));
      sum = sum + as_float(abs_bits(v));
    });
    const float most = bit_cast<float>(max_lanes(largest));
    four.add_block(most, sum_lanes(sum), b.size);
    const BlockScale s = block_scale(most, kDigits);
    // A factor of 0 (block of zeros, NaN or infinity) times a non-finite x would be NaN: clear the bits instead.
    const I32x16 keep = set1(s.inverse == 0.0f ? int32_t{0} : int32_t{-1});
    I32x16 sums[kDigits];
    QOPS_UNROLL for (I32x16& digit_sum : sums) digit_sum = set1(int32_t{0});
    for (int64_t k = 0; k < b.size; k += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, b.size - k);
      const F32x16 scaled = load_n(x + k, n) * set1(s.pre) * set1(s.inverse);
      const I32x16 v = to_int(as_float(as_int(scaled) & keep));
      const I32x16 byte = set1(int32_t{0xff});
      const I32x16 digit[4] = {kDigits == 2 ? shift_right<8>(v) : shift_right<24>(v),
                               (kDigits == 2 ? v : shift_right<16>(v)) & byte, shift_right<8>(v) & byte, v & byte};
      QOPS_UNROLL for (int d = 0; d < kDigits; ++d) {
        sums[d] = sums[d] + digit[d];
        out.digits(b, k, d, digit[d], n);
      }
    }
    int32_t digit_sums[kDigits];
    QOPS_UNROLL for (int d = 0; d < kDigits; ++d) digit_sums[d] = sum_lanes(sums[d]);
    out.end_block(b, digit_sums, s.scale);
  }
  return kDigits == 2 && four.needed<T>();
}

// sx * (sum of v).
inline float sum_of_values(const int32_t* digit_sums, int digits, float scale) {
  int64_t sum = 0;
  for (int d = 0; d < digits; ++d) sum = sum * 256 + digit_sums[d];
  return static_cast<float>(sum) * scale;
}

// Row r of a tile.
struct TileRow {
  const Tile& tile;
  int r, top_bias, low_bias;

  // With zero points the kernel multiplies by z instead of the codes' biases.
  template <class Codes>
  static TileRow of(const WeightOnlyGemmParams& p, const Tile& tile, int r) {
    const bool zero_points = p.kind == WeightKind::kZeroPoint;
    return {tile, r, zero_points ? 1 : Codes::kTopBias, zero_points ? 1 : Codes::kLowBias};
  }

  void digits(const Block& b, int64_t k, int d, I32x16 values, int64_t n) const {
    uint8_t* out = tile.bytes + (((b.begin + k) / 4 * tile.digits + d) * tile.rows + r) * 4;
    uint8_t low[kLanes];
    store_bytes(low, values);
    for (int64_t i = 0; i < n; i += 4) std::memcpy(out + i * tile.digits * tile.rows, low + i, 4);
  }
  void end_block(const Block& b, const int32_t* sums, float scale) const {
    for (int d = 0; d < tile.digits; ++d) {
      const uint32_t bias = static_cast<uint32_t>(d == 0 ? top_bias : low_bias);
      // Of a row that turns out to need four digits the two may be anything; they are written again.
      const uint32_t correction = 0u - static_cast<uint32_t>(sums[d]) * bias;
      tile.correction[(b.index * tile.digits + d) * tile.rows + r] = static_cast<int32_t>(correction);
    }
    tile.scale[b.index * tile.rows + r] = scale;
    tile.sum[b.index * tile.rows + r] = sum_of_values(sums, tile.digits, scale);
  }
};

// --- one tile of y ---------------------------------------------------------------------------------------------------

// finish() apart from the code of the tiles, which would lose 2 % at 4096 x 4096 and 18 % at 1536 x 576 (int4_gemm,
// M = 1).
template <class T, class... Sums>
[[gnu::noinline]] void finish_apart(const WeightOnlyGemmParams& p, Sums... sums) {
  with_epilogue(p, [&](auto epilogue) { finish<decltype(epilogue)::value, T>(p, sums...); });
}

// Rows x (16 * Strips) outputs from strip `strip` on; Digits as in the tile. kLevels: whether scales have two, which is
// asked here and not at each group.
template <class Codes, class T, int Rows, int Strips, int Digits, bool kLevels>
inline void gemm_tile(const WeightOnlyGemmParams& p, const Blocks& blocks, const Numbers& numbers, const Tile& tile,
                      int64_t strip) {
  const int64_t strip_bytes = p.k / Codes::kColumns * 64;
  const char* w = static_cast<const char*>(p.packed) + strip * strip_bytes;
  const GroupNumbers &scales = numbers.scales, &zeros = numbers.zeros;
  const int64_t first = strip - scales.first_strip;
  const bool with_offset = has_float_zeros(p.kind);
  F32x16 total[Strips][Rows], y[Strips][Rows];
  for (int s = 0; s < Strips; ++s) {
    for (int r = 0; r < Rows; ++r) total[s][r] = y[s][r] = set1(0.0f);
  }
  const uint8_t* x = tile.bytes;
  const int64_t ahead = Strips * strip_bytes <= kShortStrips ? Strips * strip_bytes : kFetchBytes / Strips;
  int64_t slice = 1;
  for (Block b(blocks); b.index < blocks.count; b.next(blocks)) {
    const int32_t* correction = tile.correction + b.index * Digits * Rows;
    I32x16 sum[Strips][Rows][Digits];
    QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
      QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
        QOPS_UNROLL for (int d = 0; d < Digits; ++d) sum[s][r][d] = set1(correction[d * Rows + r]);
      }
    }
    if (p.kind == WeightKind::kZeroPoint) {
      QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
        const I32x16 z = load(reinterpret_cast<const uint8_t*>(zeros.address<kLevels>(b.group, first + s)));
        QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
          QOPS_UNROLL for (int d = 0; d < Digits; ++d) sum[s][r][d] = z * sum[s][r][d];
        }
      }
    }
    for (int64_t n = b.size / Codes::kColumns; n > 0; --n, w += 64) {
      B8x64 codes[Strips];
      QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
        codes[s] = load_bytes(w + s * strip_bytes);
        // Into L1 for few rows, which wait for memory alone; L2 else.
        __builtin_prefetch(w + s * strip_bytes + ahead, 0, Strips >= 4 ? 3 : 2);
      }
      QOPS_UNROLL for (int step = 0; step < Codes::kSteps; ++step, x += 4 * Digits * Rows) {
        B8x64 q[Strips];
        QOPS_UNROLL for (int s = 0; s < Strips; ++s) q[s] = Codes::step(codes[s], step);
        QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
          QOPS_UNROLL for (int d = 0; d < Digits; ++d) {
            const B8x64 digit = broadcast_4_bytes(x + 4 * (d * Rows + r));
            QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
              sum[s][r][d] = d == 0 ? Codes::dot_signed_x(sum[s][r][d], q[s], digit)
                                    : Codes::dot_unsigned_x(sum[s][r][d], q[s], digit);
            }
          }
        }
      }
    }
    QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
      const F32x16 scale = scales.load<kLevels>(b.group, first + s);
      if constexpr (Strips >= 4) {
        prefetch(scales.address<kLevels>(b.group, first + s + Strips));
        if (p.zeros != nullptr) prefetch(zeros.address<kLevels>(b.group, first + s + Strips));
      }
      QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
        F32x16 value;
        if constexpr (Digits == 2) {
          value = to_float(shift_left<8>(sum[s][r][0]) + sum[s][r][1]);
        } else {
          value = fma(to_float(shift_left<8>(sum[s][r][0]) + sum[s][r][1]), set1(65536.0f),
                      to_float(shift_left<8>(sum[s][r][2]) + sum[s][r][3]));
        }
        total[s][r] = fma(scale, value * set1(tile.scale[b.index * Rows + r]), total[s][r]);
      }
      if (with_offset) {
        // Chosen for all codes, though only those of 4 bits have float zeros: without the choice GCC 12 copies 6 of 16
        // sums in the loop above (8-bit codes, 4 rows, AVX-512).
        const F32x16 z = zeros.load<kLevels>(b.group, first + s);
        const F32x16 offset = p.kind == WeightKind::kOffset ? Codes::offset(scale, z) : scale * (set1(8.0f) - z);
        QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
          total[s][r] = fma(offset, set1(tile.sum[b.index * Rows + r]), total[s][r]);
        }
      }
    }
    if ((b.index + 1) * kSlices >= slice * blocks.count) {  // the last block of this slice (or of several short ones)
      while ((b.index + 1) * kSlices >= slice * blocks.count && slice <= kSlices) ++slice;
      QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
        QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
          y[s][r] = y[s][r] + total[s][r];
          total[s][r] = set1(0.0f);
        }
      }
    }
  }
  QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
    if (p.bias != nullptr) {
      const F32x16 bias = bias_of_strip(p, strip + s);
      QOPS_UNROLL for (int r = 0; r < Rows; ++r) y[s][r] = y[s][r] + bias;
    }
  }
  if (p.is_plain()) {
    QOPS_UNROLL for (int s = 0; s < Strips; ++s) {
      const int64_t column = (strip + s) * kStripRows;
      QOPS_UNROLL for (int r = 0; r < Rows; ++r) {
        store_n(static_cast<T*>(p.y) + tile.row[r] * p.n + column, y[s][r], p.n - column);
      }
    }
    return;
  }
  const auto place = [&](int i) { return Place{tile.row[i / Strips], strip + i % Strips}; };
  const auto sum = [&](int i) { return y[i % Strips][i / Strips]; };
  constexpr int kCount = Rows * Strips;
  QOPS_UNROLL for (int i = 0; i + 1 < kCount; i += 2) finish_apart<T>(p, place(i), sum(i), place(i + 1), sum(i + 1));
  if constexpr (kCount % 2 != 0) finish_apart<T>(p, place(kCount - 1), sum(kCount - 1));
}

// --- the whole product -----------------------------------------------------------------------------------------------

template <class Codes, class T, int Rows, int Digits, bool kLevels>
inline void gemm_strips(const WeightOnlyGemmParams& p, const Blocks& blocks, const Numbers& numbers, const Tile& tile,
                        int64_t begin, int64_t end) {
  constexpr int kWide = strips_of_tile(Rows, Digits);
  int64_t strip = begin;
  for (; strip + kWide <= end; strip += kWide)
    gemm_tile<Codes, T, Rows, kWide, Digits, kLevels>(p, blocks, numbers, tile, strip);
  for (; strip < end; ++strip) gemm_tile<Codes, T, Rows, 1, Digits, kLevels>(p, blocks, numbers, tile, strip);
}

template <class Codes, class T, bool kLevels>
inline void gemm_rows(const WeightOnlyGemmParams& p, const Blocks& blocks, const Numbers& numbers, const Tile& tile,
                      int64_t begin, int64_t end) {
  const auto with_rows = [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    if (tile.digits == 2) return gemm_strips<Codes, T, kRows, 2, kLevels>(p, blocks, numbers, tile, begin, end);
    if constexpr (kRows <= max_tile_rows(4)) {
      gemm_strips<Codes, T, kRows, 4, kLevels>(p, blocks, numbers, tile, begin, end);
    }
  };
  if (tile.rows == 1) return with_rows(std::integral_constant<int, 1>{});
  if (tile.rows == 2) return with_rows(std::integral_constant<int, 2>{});
  if constexpr (kMaxTileRows == 4) {
    if (tile.rows == 3) return with_rows(std::integral_constant<int, 3>{});
    return with_rows(std::integral_constant<int, 4>{});
  }
}

inline int64_t strips_of(const WeightOnlyGemmParams& p) { return (p.n + kStripRows - 1) / kStripRows; }
inline int64_t strip_grain(const WeightOnlyGemmParams& p) { return 1 + (8 << 10) / (p.k * p.x_rows.count + 1); }

// The rows of x in tiles: neither a row's digits nor its bits depend on the other rows.
struct Tiles {
  Tile* of;
  int64_t count = 0;

  static int64_t most(int64_t rows) { return rows / max_tile_rows(4) + 2; }

  // Rows of as many digits share tiles.
  Tiles(Tile* memory, const uint8_t* digits_of_row, int64_t rows) : of(memory) {
    for (const int digits : {2, 4}) {
      Tile tile{};
      tile.digits = digits;
      for (int64_t row = 0; row < rows; ++row) {
        if (digits_of_row[row] != digits) continue;
        tile.row[tile.rows++] = row;
        if (tile.rows == max_tile_rows(digits)) close(tile);
      }
      close(tile);
    }
  }

  // Whether the rows have as many digits as their tiles.
  bool fit(const uint8_t* digits_of_row) const {
    bool fits = true;
    for (const Tile* tile = of; tile < of + count; ++tile) {
      for (int r = 0; r < tile->rows; ++r) fits &= digits_of_row[tile->row[r]] == tile->digits;
    }
    return fits;
  }

  static size_t bytes(const WeightOnlyGemmParams& p, const Blocks& blocks, int rows, int digits) {
    return Pieces::bytes<uint8_t>(p.k * rows * digits) + 2 * Pieces::bytes<float>(blocks.count * rows) +
           Pieces::bytes<int32_t>(blocks.count * rows * digits);
  }
  size_t bytes(const WeightOnlyGemmParams& p, const Blocks& blocks) const {
    size_t sum = 0;
    for (int64_t t = 0; t < count; ++t) sum += bytes(p, blocks, of[t].rows, of[t].digits);
    return sum;
  }
  void take_memory(const WeightOnlyGemmParams& p, const Blocks& blocks, Pieces& memory) const {
    for (Tile* tile = of; tile < of + count; ++tile) {
      tile->bytes = memory.take<uint8_t>(p.k * tile->rows * tile->digits);
      tile->scale = memory.take<float>(blocks.count * tile->rows);
      tile->sum = memory.take<float>(blocks.count * tile->rows);
      tile->correction = memory.take<int32_t>(blocks.count * tile->rows * tile->digits);
    }
  }

 private:
  void close(Tile& tile) {
    if (tile.rows > 0) of[count++] = tile;
    tile.rows = 0;
  }
};

// Two digits are a guess: where a row turns out to need four, digits_of_row says so afterwards.
template <class Codes, class T>
inline void write_tile(const WeightOnlyGemmParams& p, const Blocks& blocks, const Tile& tile, uint8_t* digits_of_row) {
  for (int r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.row[r];
    const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    const TileRow out = TileRow::of<Codes>(p, tile, r);
    const bool needs_four =
        tile.digits == 2 ? write_digits<2>(x, p.perm, blocks, out) : write_digits<4>(x, p.perm, blocks, out);
    if (needs_four) digits_of_row[row] = 4;
  }
}

// The number of digits that is tried first.
template <class T>
inline void guess_digits(uint8_t* digits_of_row, int64_t rows) {
  std::memset(digits_of_row, std::is_same_v<T, float> ? 4 : 2, static_cast<size_t>(rows));
}

// y of some strips. Four of them stay in L2 while every tile of x passes over them.
template <class Codes, class T>
inline void gemm_tiles(const WeightOnlyGemmParams& p, const Blocks& blocks, const Tiles& tiles, int64_t begin,
                       int64_t end) {
  for_each_chunk(p, blocks.groups, tiles.count, begin, end, [&](const Numbers& numbers, int64_t strip, int64_t stop) {
    for (int64_t t = 0; t < tiles.count; ++t) {
      numbers.scales.super_shift == 0 ? gemm_rows<Codes, T, false>(p, blocks, numbers, tiles.of[t], strip, stop)
                                      : gemm_rows<Codes, T, true>(p, blocks, numbers, tiles.of[t], strip, stop);
    }
  });
}

// Of rows that two digits hold; the others are in tiles of half as many rows.
inline void tell_plan(const WeightOnlyGemmParams& p, const ThreadPool& pool) {
  const int64_t rows = std::min<int64_t>(p.x_rows.count, max_tile_rows(2));
  pool.listener->tell("kernel", QOPS_ISA_NAME);
  pool.listener->tell("tile_rows", rows);
  pool.listener->tell("tile_strips", strips_of_tile(static_cast<int>(rows), 2));
  tell_tasks(pool, strips_of(p), strip_grain(p));
}

// y of the rows whose number of digits is not 0.
template <class Codes, class T>
inline Status multiply_rows(const WeightOnlyGemmParams& p, const ThreadPool& pool, const Blocks& blocks,
                            uint8_t* digits_of_row) {
  const int64_t m = p.x_rows.count, row_grain = 1 + (16 << 10) / (p.k + 1);
  Scratch index(Scratch::bytes<Tile>(Tiles::most(m)));
  if (!index.ok()) return Status::kOutOfMemory;
  while (true) {
    const Tiles tiles(index.take<Tile>(0), digits_of_row, m);
    Scratch scratch(tiles.bytes(p, blocks));
    if (!scratch.ok()) return Status::kOutOfMemory;
    tiles.take_memory(p, blocks, scratch);
    parallel_for(pool, tiles.count, 1 + row_grain / kMaxTileRows, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) write_tile<Codes, T>(p, blocks, tiles.of[t], digits_of_row);
    });
    if (!tiles.fit(digits_of_row)) continue;  // rare, and once: the tiles are cut again
    parallel_for(pool, strips_of(p), strip_grain(p),
                 [&](int64_t begin, int64_t end) { gemm_tiles<Codes, T>(p, blocks, tiles, begin, end); });
    return Status::kOk;
  }
}

template <class Codes, class T>
inline Status weight_only_gemm(const WeightOnlyGemmParams& p, const ThreadPool& pool) {
  const int64_t m = p.x_rows.count;
  if (pool.listener != nullptr) [[unlikely]] {
    if (m > 0 && p.n > 0) tell_plan(p, pool);
    return Status::kOk;
  }
  if (p.perm != nullptr && !valid_permutation_range(p)) return Status::kIndexOutOfRange;
  if (m == 0 || p.n == 0) return Status::kOk;
  Scratch scratch(Scratch::bytes<uint8_t>(m));
  if (!scratch.ok()) return Status::kOutOfMemory;
  uint8_t* digits_of_row = scratch.take<uint8_t>(m);
  guess_digits<T>(digits_of_row, m);
  return multiply_rows<Codes, T>(p, pool, Blocks(p.k, p.group_size), digits_of_row);
}

// The same product for a team of threads (cpu/team_product.h).
template <class Codes, class T>
struct WeightOnlyTeamProduct {
  static constexpr size_t kMostDigits = 4;

  static size_t bytes(const WeightOnlyGemmParams& p) {
    const int64_t m = p.x_rows.count;
    const size_t of_row = Tiles::bytes(p, Blocks(p.k, p.group_size), 1, kMostDigits);
    return Pieces::bytes<uint8_t>(m) + Pieces::bytes<Tiles>(1) + Pieces::bytes<Tile>(Tiles::most(m)) +
           static_cast<size_t>(m) * of_row;
  }

  static void prepare(const WeightOnlyGemmParams& p, void* memory) {
    const int64_t m = p.x_rows.count;
    const Blocks blocks(p.k, p.group_size);
    Pieces pieces(memory);
    Tiles* tiles = pieces.take<Tiles>(1);
    uint8_t* digits_of_row = pieces.take<uint8_t>(m);
    Tile* first = pieces.take<Tile>(Tiles::most(m));
    guess_digits<T>(digits_of_row, m);
    do {
      *tiles = Tiles(first, digits_of_row, m);
      Pieces digits = pieces;
      tiles->take_memory(p, blocks, digits);
      for (int64_t t = 0; t < tiles->count; ++t) write_tile<Codes, T>(p, blocks, tiles->of[t], digits_of_row);
    } while (!tiles->fit(digits_of_row));
  }

  static void multiply(const WeightOnlyGemmParams& p, void* memory, int64_t begin, int64_t end) {
    gemm_tiles<Codes, T>(p, Blocks(p.k, p.group_size), *static_cast<const Tiles*>(memory), begin, end);
  }

  static constexpr TeamProduct<WeightOnlyGemmParams> kProduct{&bytes, &prepare, &multiply};
};

template <class Codes>
inline const TeamProduct<WeightOnlyGemmParams>& weight_only_team_product(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return WeightOnlyTeamProduct<Codes, Half>::kProduct;
    case DType::kBFloat16: return WeightOnlyTeamProduct<Codes, BFloat16>::kProduct;
    default: return WeightOnlyTeamProduct<Codes, float>::kProduct;
  }
}

}  // namespace qops::cpu::QOPS_ISA_NS
