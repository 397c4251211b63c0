// Codes of 4 bits (int4_layout.h) as fragments of mma.m16n8k16: exact q - z, or q - 8 where weights have float zeros.
#pragma once

#include "cuda/weight_only_fragment.cuh"

namespace qops::cuda {

// A code as the low bits of the mantissa of 1024 (fp16) or 128 (bf16) is 1024 + q; what is subtracted is 1024 + z. fp16
// reads row g + 8 four bits higher, as 1024 + 16 q, and takes it down by fma(1024 + 16 q, 1 / 16, -(64 + z)), which is
// exact: half of the shifts are saved.
template <class T>
struct Int4Codes {
  using Element = T;
  static constexpr int kBits = 4, kBlockBytes = int4::kBlockBytes;
  static constexpr uint32_t kBase = kIsHalf<T> ? 0x64006400u : 0x43004300u;

  // Scales and zeros of a lane's two rows of a strip, for one group.
  struct Rows : PairedScales {
    static constexpr bool kHasZeroPoints = true;
    uint32_t zero[2];  // what is subtracted
    float offset[2];

    // The zeros of weights that have no zero points.
    QOPS_DEVICE void begin() { set_zeros(8, 8); }
    QOPS_DEVICE void load_zeros(const uint8_t* zeros, int pair) {
      const uint32_t two = reinterpret_cast<const uint16_t*>(zeros)[pair];
      set_zeros(two & 0xff, two >> 8);
    }
    QOPS_DEVICE void load_offsets(const uint8_t* zeros, int pair, bool is_offset) {
      const float2 two = reinterpret_cast<const float2*>(zeros)[pair];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float z = i == 0 ? two.x : two.y;
        offset[i] = is_offset ? fmaf(scale[i], 8.0f, z) : scale[i] * (8.0f - z);
      }
    }

   private:
    // Of 0 .. 16.
    QOPS_DEVICE void set_zeros(uint32_t z0, uint32_t z1) {
      zero[0] = kBase + z0 * 0x00010001u;
      // 64 + z in fp16: 0x5400 + 16 z up to 127.
      zero[1] = kIsHalf<T> ? 0xd400d400u + z1 * 0x00100010u : kBase + z1 * 0x00010001u;
    }
  };

  // Of eight tokens, for steps `step`, which is even, and the next one. x: x_address() of the lane for step 0.
  static QOPS_DEVICE void load_tokens(uint32_t (&b)[4], uint32_t x, int step, int offset) {
    constexpr uint32_t kOtherHalf = 64;
    static_assert(x_address(4, 0, 2, 5) == (x_address(4, 0, 0, 5) ^ kOtherHalf));
    ptx::ldmatrix_x4(b, (step == 0 ? x : x ^ kOtherHalf) + offset);
  }

  // The codes of one step of a lane as its A fragment.
  static QOPS_DEVICE void dequantise(const uint32_t (&raw)[4], int step, const Rows& rows, uint32_t (&a)[4]) {
    constexpr int kAndOr = 0xea;  // (a & b) | c
    const uint32_t word = raw[step];
    if constexpr (kIsHalf<T>) {
      const __half2 sixteenth = __half2(__ushort_as_half(0x2c00), __ushort_as_half(0x2c00));
      const uint32_t high = word >> 8;
      const uint32_t low_rows[2] = {ptx::lop3<kAndOr>(word, 0x000f000fu, kBase),
                                    ptx::lop3<kAndOr>(high, 0x000f000fu, kBase)};
      const uint32_t high_rows[2] = {ptx::lop3<kAndOr>(word, 0x00f000f0u, kBase),
                                     ptx::lop3<kAndOr>(high, 0x00f000f0u, kBase)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[2 * i] = subtract<T>(low_rows[i], rows.zero[0]);
        a[2 * i + 1] = pair_bits(__hfma2(pair_of<T>(high_rows[i]), sixteenth, pair_of<T>(rows.zero[1])));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = subtract<T>(ptx::lop3<kAndOr>(word >> (4 * i), 0x000f000fu, kBase), rows.zero[i % 2]);
    }
  }
};

}  // namespace qops::cuda
