// What the kernel of int4_int8_gemm_tiled.cu is made of: from packed codes and bytes of x in shared memory to float32
// sums in the order of the contract.
//
// A k32 step of mma.m16n8k32 is two words of a lane. Its four bytes of a0 are columns 2 t, 2 t + 8, 2 t + 1, 2 t + 9
// (int4_layout.h), so x has to have its bytes in that order: in every 16 of them the halves are interleaved
// (interleaved()), which K, being summed over, does not mind. Then even nibbles of a word are rows g, odd ones rows
// g + 8, and three instructions make fragments of eight codes: bytes of 16 (q - 8), by a shift, masks and a flip of the
// sign. With zero points it is seven, and bytes of q - z.
//
// The sum of a group begins at the bits of the float 1.5 * 2^23 (of 1.5 * 2^19 where bytes are 16 times too large):
// with up to 256 columns it stays an integer of 23 bits, and what was added to the integer is, read as a float, the sum
// itself above that number. Two instructions scale and add it, both exact until fmaf() rounds; larger groups are
// converted.
#pragma once

#include "cuda/int4_int8_config.h"
#include "cuda/weight_only_fragment.cuh"

namespace qops::cuda::int4_int8 {

// --- x ---------------------------------------------------------------------------------------------------------------

QOPS_DEVICE uint4 interleaved(uint4 x) {
  constexpr uint32_t kLow = 0x5140, kHigh = 0x7362;  // bytes 0, 1 of two words in turns, and 2, 3
  return make_uint4(ptx::prmt(x.x, x.z, kLow), ptx::prmt(x.x, x.z, kHigh), ptx::prmt(x.y, x.w, kLow),
                    ptx::prmt(x.y, x.w, kHigh));
}

QOPS_DEVICE int sum_of_bytes(uint4 x) {
  constexpr int kOnes = 0x01010101;
  int sum = __dp4a(static_cast<int>(x.x), kOnes, 0);
  sum = __dp4a(static_cast<int>(x.y), kOnes, sum);
  sum = __dp4a(static_cast<int>(x.z), kOnes, sum);
  return __dp4a(static_cast<int>(x.w), kOnes, sum);
}

// --- codes to fragments ----------------------------------------------------------------------------------------------

// Of eight codes of a lane, four of row g and four of row g + 8. zero: 80 - z in each byte, where there are zero
// points.
QOPS_DEVICE void to_bytes(uint32_t word, uint32_t& low_row, uint32_t& high_row) {
  constexpr int kAndXor = 0x6a;  // (a & b) ^ c
  low_row = ptx::lop3<kAndXor>(word << 4, 0xf0f0f0f0u, 0x80808080u);
  high_row = ptx::lop3<kAndXor>(word, 0xf0f0f0f0u, 0x80808080u);
}
QOPS_DEVICE void to_bytes(uint32_t word, const uint32_t (&zero)[2], uint32_t& low_row, uint32_t& high_row) {
  low_row = ((word & 0x0f0f0f0fu) + zero[0]) ^ 0x80808080u;
  high_row = ((word >> 4 & 0x0f0f0f0fu) + zero[1]) ^ 0x80808080u;
}

// --- sums ------------------------------------------------------------------------------------------------------------

// How integers become floats: the bits at which a sum begins, else 0 and the shift that takes the factor 16 away.
struct SumFormat {
  int32_t start;
  int shift;

  SumFormat(const WeightOnlyGemmParams& p, const Slices& slices) : start(0), shift(4) {
    const bool has_zero_points = p.kind == WeightKind::kZeroPoint;
    if (has_zero_points) shift = 0;
    // 16 * 8 * 128 * 256 = 2^22. Sums that blocks hand on begin at 0.
    if (p.group_size <= 256 && !slices.is_one_group) start = has_zero_points ? 0x4b400000 : 0x49400000;
  }
};

// Scales of a lane's two rows of a strip, for one group, and what else a kind has: zero points, 0x80 - z in each byte,
// or the bits of offsets.
struct RowNumbers : PairedScales {
  static constexpr bool kHasZeroPoints = true;
  uint32_t more[2];

  QOPS_DEVICE void load_zeros(const uint8_t* zeros, int pair) {
    const uint32_t two = reinterpret_cast<const uint16_t*>(zeros)[pair];
    more[0] = (0x80 - (two & 0xff)) * 0x01010101u;
    more[1] = (0x80 - (two >> 8)) * 0x01010101u;
  }
  QOPS_DEVICE void load_offsets(const uint8_t* zeros, int pair, bool is_offset) {
    const float2 two = reinterpret_cast<const float2*>(zeros)[pair];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float z = i == 0 ? two.x : two.y;
      more[i] = __float_as_uint(is_offset ? fmaf(scale[i], 8.0f, z) : scale[i] * (8.0f - z));
    }
  }
};

// The sums of a warp: kStrips strips x kTiles tiles of eight tokens. `total` is that of the slice so far, `part` of the
// group.
template <int kStrips, int kTiles, bool kFine>
struct WarpSums {
  // Whether the first products of a group begin its sums: an instruction less for each, and two loops of products.
  static constexpr bool kPeels = !kFine && kStrips * kTiles >= 8;
  float total[kStrips][kTiles][4];
  int32_t part[kStrips][kTiles][4];
  RowNumbers scales[kStrips];

  // f(strip, tile, element) for the sums of the first `tiles` tiles.
  template <class F>
  static QOPS_DEVICE void for_each(int tiles, const F& f) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t >= tiles) break;
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) f(s, t, i);
      }
    }
  }

  QOPS_DEVICE void begin_slice(const SumFormat& format) {
    for_each(kTiles, [&](int s, int t, int i) {
      total[s][t][i] = 0.0f;
      if (!kPeels) part[s][t][i] = format.start;
    });
  }

  // x_sums: int32, of x in the group, of the lane's two tokens of the first tile.
  QOPS_DEVICE void end_group(const ScaleSource& source, const SumFormat& format, const uint8_t* x_sums) {
    const auto each = [&](const auto& number) {
      for_each(kTiles, [&](int s, int t, int i) {
        total[s][t][i] = fmaf(scales[s].scale[i / 2], number(part[s][t][i]), total[s][t][i]);
        if (!kPeels) part[s][t][i] = format.start;
      });
    };
    if (format.start != 0) {
      each([&](int32_t sum) { return __int_as_float(sum) - __int_as_float(format.start); });
    } else {
      each([&](int32_t sum) { return static_cast<float>(sum >> format.shift); });
    }
    if (!has_float_zeros(source.kind)) return;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int2 sums = *reinterpret_cast<const int2*>(x_sums + 32 * t);
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[s][t][i] = fmaf(__uint_as_float(scales[s].more[i / 2]),
                                static_cast<float>(i % 2 == 0 ? sums.x : sums.y), total[s][t][i]);
        }
      }
    }
  }

  // Products of 32 columns. `x`: of the first tile; kFirst: the first ones of their group.
  template <bool kAllTiles, bool kFirst>
  QOPS_DEVICE void multiply(const uint32_t (&a)[kStrips][4], uint32_t x, const SumFormat& format, int tiles) {
    const int32_t start[4] = {format.start, format.start, format.start, format.start};
#pragma unroll
    for (int t = 0; t < kTiles; t += 2) {
      if (!kAllTiles && t >= tiles) break;
      uint32_t b[4];
      ptx::ldmatrix_x4(b, x + 8 * t * int8::kTokenBytes);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!kAllTiles && t + i >= tiles) break;
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          if constexpr (kFirst) {
            ptx::mma_m16n8k32_s8_from(part[s][t + i], a[s], {b[2 * i], b[2 * i + 1]}, start);
          } else {
            ptx::mma_m16n8k32_s8(part[s][t + i], a[s], {b[2 * i], b[2 * i + 1]});
          }
        }
      }
    }
  }

  // One block of 64 columns. `codes` and `slots`: of the first strip, the next ones behind it; `x`: token_address() of
  // this lane for the first two tiles; `x_sums`: as end_group() has them, for the first of the steps
  // that groups may end with; `begins`: a group, where groups are whole blocks, and its end is the caller's; kZeros:
  // whether there are zero points. Tiles from `tiles` on are left out where kAllTiles does not say that there are none.
  template <bool kAllTiles, bool kZeros, int kTokens, class F>
  QOPS_DEVICE void add_block(const uint8_t* codes, const uint8_t* slots, uint32_t x, const uint8_t* x_sums, int lane,
                             const ScaleSource& source, const SumFormat& format, GroupWalk<true>& walk, bool begins,
                             int tiles, const F& meanwhile) {
    [[maybe_unused]] const int first_group = walk.group;
    uint32_t raw[kStrips][4];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const uint4 words = *reinterpret_cast<const uint4*>(codes + s * int4::kBlockBytes + lane * int4::kLaneBytes);
      raw[s][0] = words.x, raw[s][1] = words.y, raw[s][2] = words.z, raw[s][3] = words.w;
    }
    meanwhile();
    if constexpr (!kFine) {
      if (begins) load_scales<kFine>(scales, source, has_float_zeros(source.kind), slots, 0, lane);
    }
    uint32_t a[kStrips][4];
#pragma unroll
    for (int j = 0; j < int4::kSteps; ++j) {
      const int half = j % 2;
      if constexpr (kFine) {
        if (walk.begins(source) && walk.group < source.groups) {
          load_scales<kFine>(scales, source, has_float_zeros(source.kind), slots, walk.group - first_group, lane);
        }
      }
      if constexpr (kZeros) {
#pragma unroll
        for (int s = 0; s < kStrips; ++s) to_bytes(raw[s][j], scales[s].more, a[s][2 * half], a[s][2 * half + 1]);
      } else {
#pragma unroll
        for (int s = 0; s < kStrips; ++s) to_bytes(raw[s][j], a[s][2 * half], a[s][2 * half + 1]);
      }
      const uint32_t x_of_step = x ^ j / 2 * int8::kNextFragment;
      bool ended = false;
      if constexpr (kFine) {
        ended = walk.group < source.groups;  // columns of padding are of no group
        ended = walk.next(source) && ended;
        if (half == 0 && ended) {  // between the two halves of an instruction's columns
#pragma unroll
          for (int s = 0; s < kStrips; ++s) a[s][2] = a[s][3] = 0;
          multiply<kAllTiles, false>(a, x_of_step, format, tiles);
          end_group(source, format, x_sums + 4 * j * sums_of_step(kTokens));
#pragma unroll
          for (int s = 0; s < kStrips; ++s) a[s][0] = a[s][1] = 0;
        }
      }
      if (half == 1) {
        if (kPeels && j == 1 && begins) {
          multiply<kAllTiles, true>(a, x_of_step, format, tiles);
        } else {
          multiply<kAllTiles, false>(a, x_of_step, format, tiles);
        }
        if (ended) end_group(source, format, x_sums + 4 * j * sums_of_step(kTokens));
      }
    }
  }
};

}  // namespace qops::cuda::int4_int8
