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

// This thread's eight tiles, of that size but for the first `few`, which have `rows` rows, from here to the end of the
// scope. What the tiles held before is lost. Other libraries configure tiles for themselves, so none of ours outlive a
// task.
class TileScope {
 public:
  explicit TileScope(int few = 0, int rows = kTileRows) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(config) == 64);
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = kTileRowBytes;
      config.rows[tile] = static_cast<uint8_t>(tile < few ? rows : kTileRows);
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~TileScope() { asm volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
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

// Always inlined, as prefetch() is.
QOPS_ALWAYS_INLINE void prefetch_to_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace qops::cpu::QOPS_ISA_NS
