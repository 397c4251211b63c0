// How a packed 4-bit weight lies in a GPU's memory: one layout for every kernel and architecture. (The CPU's stands in
// cpu/weight_pack.cpp.)
//
// A strip is 16 rows of w; rows past N and columns past K, which is padded to a multiple of 64, hold code 8 (kernels
// feed zeros of x to the columns of padding). K is contiguous in a strip, so a strip is one linear range, and the
// array [S, 8 Kp] a matrix of bytes. Its unit is a block of 16 rows x 64 columns, 512 bytes: four k16 steps of the A
// operand of mma.m16n8k16, w being A and the tokens the n8 side. Lane l = 4 g + t of a warp owns 16 bytes of it, a word
// of 32 bits for each step j:
//
//   block   | lane 0  | lane 1  | ...  | lane 31 |        lane l     | step 0 | step 1 | step 2 | step 3 |
//   byte    0        16        32     496       512       byte 16 l  0        4        8        12      16
//
//   word     nibble     7       6       5       4    |   3       2       1       0
//            bits     31-28   27-24   23-20   19-16  | 15-12   11-8     7-4     3-0
//            register   a3      a2      a1      a0   |   a3      a2      a1      a0
//            row        g+8     g       g+8     g    |   g+8     g       g+8     g
//            column   2t+9    2t+9    2t+1    2t+1   | 2t+8    2t+8    2t      2t         of the step
//
// So (word >> 4 i) & 0x000f000f are the two codes of register ai, the even column low, as the operand wants them. Four
// adjacent strips are the 64 rows of a wgmma A tile, strip w that of warp w: the same bytes.
//
// Scales and zeros [S, K / group_size, 16] stand, within a strip, with the two rows of a lane side by side: row r at
// 2 (r % 8) + r / 8.
#pragma once

#include "kernels.h"

namespace qops::int4 {

inline constexpr int kBlockColumns = 64;
inline constexpr int kBlockBytes = 512;
inline constexpr int kLaneBytes = 16;
inline constexpr int kStepColumns = 16;
inline constexpr int kSteps = kBlockColumns / kStepColumns;
inline constexpr int kLanes = 32;
inline constexpr int kCodesOfWord = 8;
inline constexpr uint32_t kPaddingWord = 0x88888888u;

QOPS_ALWAYS_INLINE constexpr int64_t strips(int64_t n) { return n / kStripRows + (n % kStripRows != 0); }
QOPS_ALWAYS_INLINE constexpr int64_t blocks(int64_t k) { return k / kBlockColumns + (k % kBlockColumns != 0); }
QOPS_ALWAYS_INLINE constexpr int64_t strip_bytes(int64_t k) { return blocks(k) * kBlockBytes; }

// A code within its block.
struct Place {
  int lane, step, nibble;
};
struct Code {
  int row, column;
};

QOPS_ALWAYS_INLINE constexpr Place place_of(Code c) {
  const int k = c.column % kStepColumns;
  const int a = c.row / 8 + 2 * (k / 8);  // the register
  return {4 * (c.row % 8) + k % 8 / 2, c.column / kStepColumns, a + 4 * (k % 2)};
}
QOPS_ALWAYS_INLINE constexpr Code code_of(Place p) {
  const int a = p.nibble % 4;
  return {p.lane / 4 + 8 * (a % 2), kStepColumns * p.step + 2 * (p.lane % 4) + 8 * (a / 2) + p.nibble / 4};
}

// Where the scale and the zero of row r of a strip stand, and the row of what stands there.
QOPS_ALWAYS_INLINE constexpr int scale_place(int row) { return 2 * (row % 8) + row / 8; }
QOPS_ALWAYS_INLINE constexpr int scale_row(int place) { return place / 2 + 8 * (place % 2); }

namespace proof {

constexpr bool codes_have_one_place_each() {
  for (int row = 0; row < kStripRows; ++row) {
    for (int column = 0; column < kBlockColumns; ++column) {
      const Place p = place_of({row, column});
      const Code c = code_of(p);
      if (p.lane < 0 || p.lane >= kLanes || p.step < 0 || p.step >= kSteps) return false;
      if (p.nibble < 0 || p.nibble >= kCodesOfWord || c.row != row || c.column != column) return false;
    }
  }
  return true;
}
constexpr bool scales_have_one_place_each() {
  for (int row = 0; row < kStripRows; ++row) {
    const int place = scale_place(row);
    if (place < 0 || place >= kStripRows || scale_row(place) != row) return false;
  }
  return true;
}
// Into as many places as there are codes: so the maps are bijections.
static_assert(codes_have_one_place_each() && kLanes * kSteps * kCodesOfWord == kStripRows * kBlockColumns);
static_assert(scales_have_one_place_each());
static_assert(kLanes * kLaneBytes == kBlockBytes && kSteps * 4 == kLaneBytes);
// The fragment of the PTX manual: a0 and a2 are row l / 4, a1 and a3 row l / 4 + 8; a2 and a3 are columns 8 and up.
static_assert(code_of({5, 0, 0}).row == 1 && code_of({5, 0, 0}).column == 2);
static_assert(code_of({5, 0, 4}).row == 1 && code_of({5, 0, 4}).column == 3);
static_assert(code_of({5, 0, 1}).row == 9 && code_of({5, 0, 1}).column == 2);
static_assert(code_of({5, 3, 2}).row == 1 && code_of({5, 3, 2}).column == 58);
static_assert(scale_place(8) == scale_place(0) + 1);

}  // namespace proof
}  // namespace qops::int4
