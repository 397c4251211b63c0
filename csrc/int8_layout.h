// How a packed 8-bit weight lies in a GPU's memory: one layout for every kernel and architecture. (The CPU's stands in
// cpu/weight_pack.cpp.)
//
// A strip is 16 rows of w; rows past N and columns past K, which is padded to a multiple of 64, hold zeros. K is
// contiguous in a strip, so a strip is one linear range, and the array [S, 16 Kp] a matrix of bytes. Its unit is a
// fragment of 16 rows x 32 columns, 512 bytes: the A operand of mma.m16n8k32, w being A and the tokens the n8 side.
// Lane l = 4 g + t of a warp owns 16 bytes of it, its four registers:
//
//   fragment | lane 0  | lane 1  | ...  | lane 31 |        lane l     | a0      | a1      | a2        | a3        |
//   byte     0        16        32     496       512       byte 16 l  0         4         8           12         16
//                                                          row        g         g + 8     g           g + 8
//                                                          columns    4 t ..    4 t ..    16 + 4 t .. 16 + 4 t ..
//
// Two fragments are a block of 64 columns, the unit in which K is padded and cut. Four adjacent strips are the 64 rows
// of a wgmma A tile, strip w that of warp w: the same bytes.
#pragma once

#include "kernels.h"

namespace qops::int8 {

inline constexpr int kBlockColumns = 64;
inline constexpr int kBlockBytes = 1024;
inline constexpr int kFragmentColumns = 32;
inline constexpr int kFragmentBytes = 512;
inline constexpr int kFragments = kBlockColumns / kFragmentColumns;
inline constexpr int kLaneBytes = 16;
inline constexpr int kLanes = 32;

QOPS_ALWAYS_INLINE constexpr int64_t strips(int64_t n) { return n / kStripRows + (n % kStripRows != 0); }
QOPS_ALWAYS_INLINE constexpr int64_t blocks(int64_t k) { return k / kBlockColumns + (k % kBlockColumns != 0); }
QOPS_ALWAYS_INLINE constexpr int64_t strip_bytes(int64_t k) { return blocks(k) * kBlockBytes; }

// A code within its fragment.
struct Place {
  int lane, a, byte;  // a: the register
};
struct Code {
  int row, column;
};

QOPS_ALWAYS_INLINE constexpr Place place_of(Code c) {
  return {4 * (c.row % 8) + c.column % 16 / 4, c.row / 8 + 2 * (c.column / 16), c.column % 4};
}
QOPS_ALWAYS_INLINE constexpr Code code_of(Place p) {
  return {p.lane / 4 + 8 * (p.a % 2), 4 * (p.lane % 4) + 16 * (p.a / 2) + p.byte};
}

// Byte of w[n, k] in the packed array.
QOPS_ALWAYS_INLINE constexpr int64_t byte_of(int64_t n, int64_t k, int64_t columns) {
  const Place p = place_of({static_cast<int>(n % kStripRows), static_cast<int>(k % kFragmentColumns)});
  return n / kStripRows * strip_bytes(columns) + k / kFragmentColumns * kFragmentBytes + kLaneBytes * p.lane + 4 * p.a +
         p.byte;
}

namespace proof {

constexpr bool codes_have_one_place_each() {
  for (int row = 0; row < kStripRows; ++row) {
    for (int column = 0; column < kFragmentColumns; ++column) {
      const Place p = place_of({row, column});
      const Code c = code_of(p);
      if (p.lane < 0 || p.lane >= kLanes || p.a < 0 || p.a > 3 || p.byte < 0 || p.byte > 3) return false;
      if (c.row != row || c.column != column) return false;
    }
  }
  return true;
}
// Into as many places as there are codes: so the map is a bijection.
static_assert(codes_have_one_place_each() && kLanes * kLaneBytes == kStripRows * kFragmentColumns);
static_assert(kLanes * kLaneBytes == kFragmentBytes && kFragments * kFragmentBytes == kBlockBytes);
// The fragment of the PTX manual: a0 and a2 are row l / 4, a1 and a3 row l / 4 + 8; a2 and a3 are columns 16 and up.
static_assert(code_of({5, 0, 0}).row == 1 && code_of({5, 0, 0}).column == 4);
static_assert(code_of({5, 1, 0}).row == 9 && code_of({5, 1, 0}).column == 4);
static_assert(code_of({5, 2, 3}).row == 1 && code_of({5, 2, 3}).column == 23);
static_assert(byte_of(17, 64, 72) == 2 * 1024 + 1024 + 64);

}  // namespace proof
}  // namespace qops::int8
