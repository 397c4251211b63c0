// What the kernels of int4_gemm and int8_weight_only_gemm share: from packed codes and scales in shared memory to
// float32 sums in the canonical order. Codes of 4 and of 8 bits are two classes, int4_codes.cuh and int8_codes.cuh,
// which make fragments of them.
//
// w is the A operand of mma.m16n8k16 (16 rows, a strip), tokens are the n8 side. Exact integers q - z go into the
// product; the sum of a group, float32 from 0 on, is scaled once:
//     part = sum of (q - z) x;   total = fmaf(s, part, total);   w with an offset: total = fmaf(o, sum of x, total)
// The sum of x comes from the tensor cores as well, as the product with a fragment of ones: the same instruction shape
// in every kernel, no pass of its own, and each lane gets it for the tokens that it has sums for.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/ptx.cuh"
#include "cuda/weight_only_config.h"

namespace qops::cuda {

// --- copies ----------------------------------------------------------------------------------------------------------

// What a warp copies, and reads, at a time.
inline constexpr int kCopyBytes = 32 * int4::kLaneBytes;

// 16 bytes of weights, which no other block reads. sm_120 refuses the hint where it can see that it is of no use to
// it ("illegal instruction" in the wild), and does without.
QOPS_DEVICE void copy_codes(uint32_t shared, const uint8_t* source, uint64_t policy) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  ptx::cp_async_cg(shared, source);
#else
  ptx::cp_async_cg_zfill_hint(shared, source, 16, policy);
#endif
}

// Until all but `stages` - 2 of this thread's newest groups of copies have landed, of a ring of one of kRingStages: the
// more stages, the fewer instructions.
QOPS_DEVICE void wait_for_stage(int stages) {
  ptx::cp_async_wait<8>();
  if (stages == 10) return;
  ptx::cp_async_wait<6>();
  if (stages == 8) return;
  ptx::cp_async_wait<4>();
  if (stages == 6) return;
  ptx::cp_async_wait<2>();
  if (stages == 4) return;
  ptx::cp_async_wait<1>();
  if (stages == 2) ptx::cp_async_wait<0>();
}

// --- values that loops keep ------------------------------------------------------------------------------------------

// The value of a lane, as something that the compiler does not work out anew in each step of a loop.
QOPS_DEVICE uint32_t held(uint32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
template <class T>
QOPS_DEVICE const T* held(const T* pointer, int lane) {
  const uint64_t address = reinterpret_cast<uint64_t>(pointer);
  const uint64_t high = held(static_cast<uint32_t>(address >> 32), lane);
  return reinterpret_cast<const T*>(high << 32 | held(static_cast<uint32_t>(address), lane));
}
// Of all lanes alike, and known to be: branches on it are not taken to diverge.
QOPS_DEVICE uint32_t uniform(uint32_t value) { return held(value, 0); }

// --- products --------------------------------------------------------------------------------------------------------

template <class T>
inline constexpr bool kIsHalf = std::is_same_v<T, __half>;

// a - b of pairs of T.
template <class T>
QOPS_DEVICE uint32_t subtract(uint32_t a, uint32_t b) {
  return pair_bits(__hsub2(pair_of<T>(a), pair_of<T>(b)));
}

template <class T>
QOPS_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kIsHalf<T>) {
    ptx::mma_m16n8k16_f16(d, a, b);
  } else {
    ptx::mma_m16n8k16_bf16(d, a, b);
  }
}

// --- groups ----------------------------------------------------------------------------------------------------------

// Where scales and zeros come from, and how they lie in a stage: [groups][16] scales, then as many zeros. A parameter
// of the kernels: in constant memory it takes no registers.
struct ScaleSource {
  const uint8_t* scales;
  const uint8_t* zeros;  // or null
  int groups;
  int units_of_group;  // of GroupWalk
  int scale_bytes;     // of 16 rows: 32 or 64
  int zero_bytes;      // 16, 64, or 0
  WeightKind kind;
  DType dtype;

  ScaleSource(const WeightOnlyGemmParams& p, bool fine)
      : scales(static_cast<const uint8_t*>(p.scales)),
        zeros(static_cast<const uint8_t*>(p.zeros)),
        groups(p.k == 0 ? 0 : static_cast<int>(p.k / p.group_size)),
        units_of_group(units(p.k, p.group_size, fine)),
        scale_bytes(p.scale_dtype == DType::kFloat32 ? 64 : 32),
        zero_bytes(p.zeros == nullptr                 ? 0
                   : p.kind == WeightKind::kZeroPoint ? 16
                                                      : 64),
        kind(p.kind),
        dtype(p.scale_dtype) {}

  static int units(int64_t k, int64_t group_size, bool fine) {
    const int64_t of_block = fine ? int4::kSteps : 1;
    return static_cast<int>(group_size == k ? int4::blocks(k) * of_block : group_size * of_block / int4::kBlockColumns);
  }

  // Piece i (of kPieces) of what a strip needs of `count` groups from `group` on.
  template <bool kFine>
  static constexpr int kPieces = scale_bytes_of_strip(kFine) / 16;

  template <bool kFine>
  QOPS_DEVICE void copy(uint32_t shared, int64_t strip, int group, int count, int piece) const {
    constexpr int kHalf = kPieces<kFine> / 2;
    const bool of_zeros = piece >= kHalf;
    const int bytes = of_zeros ? zero_bytes : scale_bytes, at = 16 * (piece % kHalf);
    if (at >= count * bytes) return;
    const uint8_t* source = of_zeros ? zeros : scales;
    ptx::cp_async_cg(shared + 16 * piece, source + (strip * groups + group) * bytes + at);
  }
};

// A walk along K in units of one k16 step where groups may end at any of them (fine), else of 64 columns.
template <bool kFine>
struct GroupWalk {
  static constexpr int kUnits = kFine ? int4::kSteps : 1;  // of a block of 64 columns

  int group = 0;
  int left = 0;  // units of it that are still to come

  QOPS_DEVICE void seek(const ScaleSource& source, int block) {
    const int unit = block * kUnits;
    group = unit / source.units_of_group;
    left = source.units_of_group - unit % source.units_of_group;
  }
  QOPS_DEVICE bool begins(const ScaleSource& source) const { return left == source.units_of_group; }
  // Past one unit; whether the group ended with it.
  QOPS_DEVICE bool next(const ScaleSource& source) {
    if (--left > 0) return false;
    ++group;
    left = source.units_of_group;
    return true;
  }
  // Past a block; how many groups it touched.
  QOPS_DEVICE int next_block(const ScaleSource& source) {
    int touched = 1;
    for (left -= kUnits; left < 0; left += source.units_of_group) {
      ++group;
      ++touched;
    }
    if (left == 0) {
      ++group;
      left = source.units_of_group;
    }
    return touched;
  }
};

// Scales of a lane's two rows of a strip, of one group, where they stand side by side.
struct PairedScales {
  float scale[2];

  QOPS_DEVICE void load_float32(const uint8_t* scales, int pair) {
    const float2 two = reinterpret_cast<const float2*>(scales)[pair];
    scale[0] = two.x;
    scale[1] = two.y;
  }
  template <class Scale>
  QOPS_DEVICE void load_16_bits(const uint8_t* scales, int pair) {
    const uint32_t two = reinterpret_cast<const uint32_t*>(scales)[pair];
    scale[0] = widen(from_bits<Scale>(two & 0xffff));
    scale[1] = widen(from_bits<Scale>(two >> 16));
  }
};

// Scales of neighbouring strips, and what else their rows have. `slots`: of the first one in a stage; `index`: of the
// group in it. has_offset: whether rows have offsets, by the kernel or by the kind.
template <bool kFine, class Rows, int kStrips>
QOPS_DEVICE void load_scales(Rows (&rows)[kStrips], const ScaleSource& source, bool has_offset, const uint8_t* slots,
                             int index, int lane) {
  const int pair = lane / 4;
  const auto each = [&](const uint8_t* first, const auto& load) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) load(rows[s], first + s * scale_bytes_of_strip(kFine));
  };
  const uint8_t* scales = slots + index * source.scale_bytes;
  // By two values, as a choice among three of one becomes a jump through a table.
  if (source.scale_bytes == 4 * kStripRows) {
    each(scales, [&](Rows& of, const uint8_t* at) { of.load_float32(at, pair); });
  } else if (source.dtype == DType::kBFloat16) {
    each(scales, [&](Rows& of, const uint8_t* at) { of.template load_16_bits<__nv_bfloat16>(at, pair); });
  } else {
    each(scales, [&](Rows& of, const uint8_t* at) { of.template load_16_bits<__half>(at, pair); });
  }
  const uint8_t* zeros = slots + kGroupRowBytes * groups_of_stage(kFine) + index * source.zero_bytes;
  if (has_offset) {
    const bool is_offset = source.kind == WeightKind::kOffset;
    each(zeros, [&](Rows& of, const uint8_t* at) { of.load_offsets(at, pair, is_offset); });
  } else if constexpr (Rows::kHasZeroPoints) {
    if (source.kind == WeightKind::kZeroPoint) {
      each(zeros, [&](Rows& of, const uint8_t* at) { of.load_zeros(at, pair); });
    }
  }
}

// The sums of a warp: kStrips strips x kTiles tiles of eight tokens. `total` is that of the slice so far, `part` of the
// group; x_sum of x in the group.
template <class Codes, int kStrips, int kTiles, bool kFine, bool kOffset>
struct WarpSums {
  using T = typename Codes::Element;
  static constexpr int kStripCount = kStrips, kTileCount = kTiles;
  float total[kStrips][kTiles][4];
  float part[kStrips][kTiles][4];
  float x_sum[kTiles][4];
  typename Codes::Rows rows[kStrips];

  // Once.
  QOPS_DEVICE void begin() {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) rows[s].begin();
  }

  QOPS_DEVICE void begin_slice() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x_sum[t][i] = 0.0f;
#pragma unroll
        for (int s = 0; s < kStrips; ++s) total[s][t][i] = part[s][t][i] = 0.0f;
      }
    }
  }

  QOPS_DEVICE void end_group() {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[s][t][i] = fmaf(rows[s].scale[i / 2], part[s][t][i], total[s][t][i]);
          if constexpr (kOffset) total[s][t][i] = fmaf(rows[s].offset[i / 2], x_sum[t][i % 2], total[s][t][i]);
          part[s][t][i] = 0.0f;
        }
      }
    }
    if constexpr (kOffset) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x_sum[t][i] = 0.0f;
      }
    }
  }

  // One block of 64 columns. `codes` and `slots`: of the first strip, the next ones behind it; `x`: x_address() of
  // this lane for the first tile, in shared memory; tokens from there on. Where groups are whole blocks: `begins`: a
  // group, and its end is the caller's, end_group(). Else it says whether nothing came before in these strips, and
  // `is_last` whether this block is the last one of its slice. Tiles from `tiles` on are left out where kAllTiles does
  // not say that there are none.
  template <bool kAllTiles = true>
  QOPS_DEVICE void add_block(const uint8_t* codes, const uint8_t* slots, uint32_t x, int lane,
                             const ScaleSource& source, GroupWalk<kFine>& walk, bool begins, bool is_last,
                             int tiles = kTiles) {
    [[maybe_unused]] const int first_group = walk.group;
    constexpr int kStepsOfLoad = int4::kSteps * kCopyBytes / Codes::kBlockBytes;
    uint32_t raw[kStrips][4];
    uint32_t b[kTiles][4];
#pragma unroll
    for (int j = 0; j < int4::kSteps; ++j) {
      if (j % kStepsOfLoad == 0) {
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          const uint8_t* at = codes + s * Codes::kBlockBytes + j / kStepsOfLoad * kCopyBytes;
          const uint4 words = *reinterpret_cast<const uint4*>(at + lane * int4::kLaneBytes);
          raw[s][0] = words.x;
          raw[s][1] = words.y;
          raw[s][2] = words.z;
          raw[s][3] = words.w;
        }
      }
      if (j % 2 == 0) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (kAllTiles || t < tiles) Codes::load_tokens(b[t], x, j, 8 * t * kTokenStageBytes);
        }
      }
      if constexpr (kFine) {
        if (((j == 0 && begins) || walk.begins(source)) && walk.group < source.groups) {
          load_scales<kFine>(rows, source, kOffset, slots, walk.group - first_group, lane);
        }
      } else if (j == 0 && begins) {
        load_scales<kFine>(rows, source, kOffset, slots, 0, lane);
      }
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        uint32_t a[4];
        Codes::dequantise(raw[s], j, rows[s], a);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (kAllTiles || t < tiles) multiply<T>(part[s][t], a, {b[t][j % 2 * 2], b[t][j % 2 * 2 + 1]});
        }
      }
      if constexpr (kOffset) {
        constexpr uint32_t kOne = kIsHalf<T> ? 0x3c003c00u : 0x3f803f80u;
        const uint32_t ones[4] = {kOne, kOne, kOne, kOne};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (kAllTiles || t < tiles) multiply<T>(x_sum[t], ones, {b[t][j % 2 * 2], b[t][j % 2 * 2 + 1]});
        }
      }
      if constexpr (kFine) {
        const bool ended = walk.next(source);
        if (ended || (j == int4::kSteps - 1 && is_last)) end_group();
      }
    }
  }
};

}  // namespace qops::cuda
