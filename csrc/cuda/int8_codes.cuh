// Codes of 8 bits (int8_layout.h) as fragments of mma.m16n8k16: exact q.
//
// Word a of a lane is four neighbouring columns of a row, 4 t .. 4 t + 3 of a k16 step; they take the places of the
// fragment's columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, and those of x do, too: the product is a sum over them. So a
// lane reads 8 bytes of x, and no byte of a word changes its order.
//   float16    bytes of q + 128 in the mantissa of 1024, less 1152: 5 instructions for 4 codes
//   bfloat16   has 7 bits there, and the next one is the exponent's lowest: 128 + (q & 127), less 128 or, where q is
//              negative, 256: 8 instructions for 4 codes
#pragma once

#include "cuda/weight_only_fragment.cuh"

namespace qops::cuda {

template <class T>
struct Int8Codes {
  using Element = T;
  static constexpr int kBits = 8, kBlockBytes = int8::kBlockBytes;

  // Scales and offsets of a lane's two rows of a strip, for one group; all 16 stand as the rows do.
  struct Rows {
    static constexpr bool kHasZeroPoints = false;
    float scale[2];
    float offset[2];

    QOPS_DEVICE void begin() {}
    QOPS_DEVICE void load_float32(const uint8_t* scales, int row) { load_rows(scales, row, scale); }
    template <class Scale>
    QOPS_DEVICE void load_16_bits(const uint8_t* scales, int row) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scale[i] = widen(from_bits<Scale>(reinterpret_cast<const uint16_t*>(scales)[row + 8 * i]));
      }
    }
    QOPS_DEVICE void load_offsets(const uint8_t* offsets, int row, bool) { load_rows(offsets, row, offset); }

   private:
    static QOPS_DEVICE void load_rows(const uint8_t* numbers, int row, float (&two)[2]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) two[i] = reinterpret_cast<const float*>(numbers)[row + 8 * i];
    }
  };

  // Of eight tokens, for steps `step`, which is even, and the next one. x: x_address() of the lane for step 0.
  static QOPS_DEVICE void load_tokens(uint32_t (&b)[4], uint32_t x, int step, int offset) {
    constexpr uint32_t kStep = 32;
    static_assert(x_address(8, 0, 3, 13) == (x_address(8, 0, 0, 13) ^ 3 * kStep));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t two[2];
      ptx::ld_shared(two, (x ^ kStep * static_cast<uint32_t>(step + i)) + static_cast<uint32_t>(offset));
      b[2 * i] = two[0];
      b[2 * i + 1] = two[1];
    }
  }

  // The codes of one step of a lane as its A fragment. raw: of an even step and the next one, each with rows g, g + 8.
  static QOPS_DEVICE void dequantise(const uint32_t (&raw)[4], int step, const Rows&, uint32_t (&a)[4]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint32_t word = raw[step % 2 * 2 + row];
#pragma unroll
      for (int half = 0; half < 2; ++half) a[2 * half + row] = pair_of_codes(word, half);
    }
  }

 private:
  // Codes 2 half and 2 half + 1 of a word.
  static QOPS_DEVICE uint32_t pair_of_codes(uint32_t word, int half) {
    // A byte of the word and one of the constant, twice.
    const uint32_t order = half == 0 ? 0x4140u : 0x4342u;
    if constexpr (kIsHalf<T>) {
      constexpr uint32_t kOffset = 0x64806480u;  // 1024 + 128
      return subtract<T>(ptx::prmt(word ^ 0x80808080u, 0x64646464u, order), kOffset);
    } else {
      const uint32_t bits = ptx::prmt(word, 0x43434343u, order);
      return subtract<T>(bits & 0xff7fff7fu, bits & 0xff80ff80u);
    }
  }
};

}  // namespace qops::cuda
