// Compares the fragment layouts of fragments.h with CuTe's tables, element by element. CuTe maps (thread, value) to a
// position that counts down the columns of A [M, K], B [N, K] and C [M, N], and to a bit of what ldmatrix moves.
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <map>

#include "emulator/ptx/fragments.h"

namespace {

namespace fragments = emu::fragments;
using fragments::Element;

constexpr int kLanes = 32;

void report(const char* what, int compared, int mismatches) {
  std::printf("%s %d compared %d mismatches\n", what, compared, mismatches);
}

// `transposed`: B is [K, 8] here, and [N, K] in CuTe.
template <class Layout>
void compare(const char* what, Layout layout, int values, int rows, bool transposed, Element (*ours)(int, int)) {
  int mismatches = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < values; ++i) {
      const Element e = ours(lane, i);
      const int position = transposed ? e.column + e.row * rows : e.row + e.column * rows;
      mismatches += static_cast<int>(layout(lane, i)) != position;
    }
  }
  const bool complete = static_cast<int>(cute::size<1>(layout)) == values;
  report(what, kLanes * values, mismatches + !complete);
}

template <class Op>
void compare_mma(const char* what, int k_values_a, int k_values_b, Element (*a)(int, int), Element (*b)(int, int)) {
  using Traits = cute::MMA_Traits<Op>;
  std::printf("%s: ", what);
  compare("A", typename Traits::ALayout{}, k_values_a, 16, false, a);
  std::printf("%s: ", what);
  compare("B", typename Traits::BLayout{}, k_values_b, 8, true, b);
  std::printf("%s: ", what);
  compare("C", typename Traits::CLayout{}, 4, 16, false, fragments::mma_m16n8_c);
}

// Both of CuTe's layouts number the bits that the instruction moves: in memory, 128 of each addressing lane's row; in
// registers, 16 of each half.
template <class Memory, class Registers>
void compare_matrices(const char* what, Memory memory, Registers registers, int matrices, bool trans) {
  std::map<int, Element> place;  // of the first bit of an element: addressing lane, column
  for (int lane = 0; lane < 8 * matrices; ++lane) {
    for (int column = 0; column < 8; ++column) place[static_cast<int>(memory(lane, column * 16))] = {lane, column};
  }
  int mismatches = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int matrix = 0; matrix < matrices; ++matrix) {
      for (int half = 0; half < 2; ++half) {
        const Element ours = trans ? fragments::matrix_8x8_trans(lane, half) : fragments::matrix_8x8(lane, half);
        const auto found = place.find(static_cast<int>(registers(lane, (matrix * 2 + half) * 16)));
        mismatches += found == place.end() || found->second.row != fragments::lane_of_row(matrix, ours.row) ||
                      found->second.column != ours.column;
      }
    }
  }
  report(what, kLanes * matrices * 2, mismatches);
}

template <class Op>
void compare_load(const char* what, int matrices, bool trans) {
  using Traits = cute::Copy_Traits<Op>;
  compare_matrices(what, typename Traits::SrcLayout{}, typename Traits::DstLayout{}, matrices, trans);
}

template <class Op>
void compare_store(const char* what, int matrices, bool trans) {
  using Traits = cute::Copy_Traits<Op>;
  compare_matrices(what, typename Traits::DstLayout{}, typename Traits::SrcLayout{}, matrices, trans);
}

}  // namespace

int main() {
  compare_mma<cute::SM80_16x8x16_F32F16F16F32_TN>("mma.m16n8k16.f16", 8, 4, fragments::mma_m16n8k16_a,
                                                  fragments::mma_m16n8k16_b);
  compare_mma<cute::SM80_16x8x16_F32BF16BF16F32_TN>("mma.m16n8k16.bf16", 8, 4, fragments::mma_m16n8k16_a,
                                                    fragments::mma_m16n8k16_b);
  compare_mma<cute::SM80_16x8x32_S32S8S8S32_TN>("mma.m16n8k32.s8", 16, 8, fragments::mma_m16n8k32_a,
                                                fragments::mma_m16n8k32_b);
  compare_load<cute::SM75_U32x1_LDSM_N>("ldmatrix.x1", 1, false);
  compare_load<cute::SM75_U32x2_LDSM_N>("ldmatrix.x2", 2, false);
  compare_load<cute::SM75_U32x4_LDSM_N>("ldmatrix.x4", 4, false);
  compare_load<cute::SM75_U16x2_LDSM_T>("ldmatrix.x1.trans", 1, true);
  compare_load<cute::SM75_U16x4_LDSM_T>("ldmatrix.x2.trans", 2, true);
  compare_load<cute::SM75_U16x8_LDSM_T>("ldmatrix.x4.trans", 4, true);
  compare_store<cute::SM90_U32x1_STSM_N>("stmatrix.x1", 1, false);
  compare_store<cute::SM90_U32x2_STSM_N>("stmatrix.x2", 2, false);
  compare_store<cute::SM90_U32x4_STSM_N>("stmatrix.x4", 4, false);
  compare_store<cute::SM90_U16x2_STSM_T>("stmatrix.x1.trans", 1, true);
  compare_store<cute::SM90_U16x4_STSM_T>("stmatrix.x2.trans", 2, true);
  compare_store<cute::SM90_U16x8_STSM_T>("stmatrix.x4.trans", 4, true);
  // Shows that a comparison can fail.
  compare_load<cute::SM75_U32x4_LDSM_N>("deliberately wrong", 4, true);
  return 0;
}
