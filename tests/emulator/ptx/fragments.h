// Which element of a matrix each lane holds: the layouts of mma.sync and of ldmatrix / stmatrix, as functions. The
// emulation moves data by them, and the tests compare them with CuTe's tables.
#pragma once

namespace emu::fragments {

struct Element {
  int row;
  int column;
};

// Element i of lane's fragment of a 16-bit A [16, 16]: four registers of two elements each.
constexpr Element mma_m16n8k16_a(int lane, int i) {
  return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8};
}

// Of a 16-bit B [16, 8], rows being k: two registers.
constexpr Element mma_m16n8k16_b(int lane, int i) { return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4}; }

// Of an 8-bit A [16, 32]: four registers of four elements each.
constexpr Element mma_m16n8k32_a(int lane, int i) {
  return {lane / 4 + i / 4 % 2 * 8, lane % 4 * 4 + i % 4 + i / 8 * 16};
}

// Of an 8-bit B [32, 8], rows being k: two registers.
constexpr Element mma_m16n8k32_b(int lane, int i) { return {lane % 4 * 4 + i % 4 + i / 4 * 16, lane / 4}; }

// Of a 32-bit C or D [16, 8]: four registers.
constexpr Element mma_m16n8_c(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

// Half h of a lane's register for an 8 x 8 matrix of 16-bit elements, in memory order (row = what one lane addresses).
constexpr Element matrix_8x8(int lane, int h) { return {lane / 4, lane % 4 * 2 + h}; }
constexpr Element matrix_8x8_trans(int lane, int h) { return {lane % 4 * 2 + h, lane / 4}; }

// The lane that addresses a row.
constexpr int lane_of_row(int matrix, int row) { return 8 * matrix + row; }

}  // namespace emu::fragments
