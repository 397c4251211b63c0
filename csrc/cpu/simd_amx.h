// Tiles of AMX (TILE, INT8): included by simd.h at the level that has them beside AVX-512's vectors.
//
// In assembly because GCC 12's intrinsics do not say which memory they read: the compiler may move a store of the
// operand behind the load of its tile, and drops all of a configuration but its first 8 bytes.
#pragma once

#include <cstdint>

namespace qops::cpu::QOPS_ISA_NS {

// A tile holds 16 rows of 64 bytes: 16 x 16 int32 sums, 16 rows of x by 64 of K, or a strip of w by 64 of K.
inline constexpr int kTileRows = 16;
inline constexpr int kTileRowBytes = 64;
inline constexpr int kTileBytes = kTileRows * kTileRowBytes;

struct TileShape {
  int rows = kTileRows, row_bytes = kTileRowBytes;
};

// This thread's eight tiles from here to the end of the scope. What they held before is lost. Other libraries configure
// tiles for themselves, so none of ours outlive a task.
class TileScope {
 public:
  // The first `few` have `rows` rows.
  explicit TileScope(int few = 0, int rows = kTileRows) {
    configure([&](int tile) { return TileShape{tile < few ? rows : kTileRows}; });
  }
  // Tiles 4 and 5, whose rows are of x, and 6 and 7, of w, hold just so many columns.
  static TileScope of_columns(int columns) { return TileScope(TileShape{kTileRows, columns}, TileShape{columns / 4}); }
  ~TileScope() { asm volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  TileScope(TileShape x, TileShape w) {
    configure([&](int tile) { return tile < 4 ? TileShape() : tile < 6 ? x : w; });
  }

  template <class F>
  static void configure(const F& shape_of) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(config) == 64);
    for (int tile = 0; tile < 8; ++tile) {
      const TileShape shape = shape_of(tile);
      config.row_bytes[tile] = static_cast<uint16_t>(shape.row_bytes);
      config.rows[tile] = static_cast<uint8_t>(shape.rows);
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
};

template <int kTile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// Rows of 64 bytes at p, p + row_bytes, ...
template <int kTile>
inline void load_tile(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%1, %2, 1), %%tmm%c0" : : "i"(kTile), "r"(p), "r"(row_bytes) : "memory");
}
template <int kTile>
inline void store_tile(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c0, (%1, %2, 1)" : : "i"(kTile), "r"(p), "r"(row_bytes) : "memory");
}

// sum[m][n] += x[m][4i + j] w[i][4n + j] over i and j, all signed; exact modulo 2^32.
template <int kSum, int kX, int kW>
inline void dot_tiles() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kX), "i"(kW));
}

// As above with unsigned x.
template <int kSum, int kX, int kW>
inline void dot_tiles_unsigned_x() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kX), "i"(kW));
}

// Codes of a weight on their way into a tile.
inline B8x64 subtract_bytes(B8x64 a, B8x64 b) { return {_mm512_sub_epi8(a.v, b.v)}; }
inline void store(uint8_t* p, B8x64 a) { _mm512_storeu_si512(p, a.v); }

// Shifts left by 8 as vpshufb: shifts of 512 bits have one port, which the floating-point operations need beside tiles.
inline I32x16 shift_left_a_byte(I32x16 a) {
  const __m512i from = _mm512_broadcast_i32x4(_mm_setr_epi8(-1, 0, 1, 2, -1, 4, 5, 6, -1, 8, 9, 10, -1, 12, 13, 14));
  return {_mm512_shuffle_epi8(a.v, from)};
}

// Always inlined, as prefetch() is.
QOPS_ALWAYS_INLINE void prefetch_to_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
QOPS_ALWAYS_INLINE void prefetch_to_write(const void* p) {
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));
}

}  // namespace qops::cpu::QOPS_ISA_NS
