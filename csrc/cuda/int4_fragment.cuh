// What the kernels of int4_gemm share: from packed codes and scales in shared memory to float32 sums in the canonical
// order.
//
// w is the A operand of mma.m16n8k16 (16 rows, a strip), tokens are the n8 side. Exact integers q - z go into the
// product; the sum of a group, float32 from 0 on, is scaled once:
//     part = sum of (q - z) x;   total = fmaf(s, part, total);   w with an offset: total = fmaf(o, sum of x, total)
// The sum of x comes from the tensor cores as well, as the product with a fragment of ones: the same instruction shape
// in every kernel, no pass of its own, and each lane gets it for the tokens that it has sums for.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/int4_config.h"
#include "cuda/ptx.cuh"
#include "int4_layout.h"

namespace qops::cuda {

// --- copies ----------------------------------------------------------------------------------------------------------

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

// --- codes to fragments ----------------------------------------------------------------------------------------------

template <class T>
inline constexpr bool kIsHalf = std::is_same_v<T, __half>;

template <class T>
QOPS_DEVICE uint32_t subtract(uint32_t a, uint32_t b) {
  if constexpr (kIsHalf<T>) {
    const __half2 d = __hsub2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const uint32_t*>(&d);
  } else {
    const __nv_bfloat162 d =
        __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const uint32_t*>(&d);
  }
}

// A code as the low bits of the mantissa of 1024 (fp16) or 128 (bf16) is 1024 + q; what is subtracted is 1024 + z.
template <class T>
inline constexpr uint32_t kBase = kIsHalf<T> ? 0x64006400u : 0x43004300u;

// The pair to subtract for a zero point of 0 .. 16; for int8 rows what four codes are added to
// (int4_int8_fragment.cuh). fp16 reads row g + 8 four bits higher, as 1024 + 16 q, and takes it down by fma(1024 + 16
// q, 1 / 16, -(64 + z)), which is exact: half of the shifts are saved.
template <class T>
QOPS_DEVICE uint32_t zero_pair(int half_of_strip, uint32_t z) {
  if constexpr (kIsHalf<T>) {
    // 64 + z in fp16: 0x5400 + 16 z up to 127.
    return half_of_strip == 0 ? kBase<T> + z * 0x00010001u : 0xd400d400u + z * 0x00100010u;
  } else {
    return kBase<T> + z * 0x00010001u;
  }
}

// The codes of one k16 step of a lane as its A fragment q - z. zero: of rows g and g + 8.
template <class T>
QOPS_DEVICE void dequantise(uint32_t word, const uint32_t (&zero)[2], uint32_t (&a)[4]) {
  constexpr int kAndOr = 0xea;  // (a & b) | c
  if constexpr (kIsHalf<T>) {
    const __half2 sixteenth = __half2(__ushort_as_half(0x2c00), __ushort_as_half(0x2c00));
    const uint32_t high = word >> 8;
    const uint32_t low_rows[2] = {ptx::lop3<kAndOr>(word, 0x000f000fu, kBase<T>),
                                  ptx::lop3<kAndOr>(high, 0x000f000fu, kBase<T>)};
    const uint32_t high_rows[2] = {ptx::lop3<kAndOr>(word, 0x00f000f0u, kBase<T>),
                                   ptx::lop3<kAndOr>(high, 0x00f000f0u, kBase<T>)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[2 * i] = subtract<T>(low_rows[i], zero[0]);
      const __half2 d = __hfma2(*reinterpret_cast<const __half2*>(&high_rows[i]), sixteenth,
                                *reinterpret_cast<const __half2*>(&zero[1]));
      a[2 * i + 1] = *reinterpret_cast<const uint32_t*>(&d);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = subtract<T>(ptx::lop3<kAndOr>(word >> (4 * i), 0x000f000fu, kBase<T>), zero[i % 2]);
  }
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

  explicit ScaleSource(const WeightOnlyGemmParams& p)
      : scales(static_cast<const uint8_t*>(p.scales)),
        zeros(static_cast<const uint8_t*>(p.zeros)),
        groups(p.k == 0 ? 0 : static_cast<int>(p.k / p.group_size)),
        units_of_group(units(p.k, p.group_size)),
        scale_bytes(p.scale_dtype == DType::kFloat32 ? 64 : 32),
        zero_bytes(p.zeros == nullptr                 ? 0
                   : p.kind == WeightKind::kZeroPoint ? 16
                                                      : 64),
        kind(p.kind),
        dtype(p.scale_dtype) {}

  static int units(int64_t k, int64_t group_size) {
    const int64_t of_block = is_fine(k, group_size) ? int4::kSteps : 1;
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

// Scales and zeros of a lane's two rows of a strip, for one group.
template <class T, bool kOffset>
struct RowScales {
  float scale[2];
  uint32_t zero[2];
  float offset[2];

  QOPS_DEVICE void set_zeros(uint32_t z0, uint32_t z1) {
    zero[0] = zero_pair<T>(0, z0);
    zero[1] = zero_pair<T>(1, z1);
  }
  // Of the pair of rows at `scales` and `zeros`.
  QOPS_DEVICE void load_float32(const float2* scales) {
    scale[0] = scales->x;
    scale[1] = scales->y;
  }
  template <class Scale>
  QOPS_DEVICE void load_16_bits(const uint32_t* scales) {
    scale[0] = widen(from_bits<Scale>(*scales & 0xffff));
    scale[1] = widen(from_bits<Scale>(*scales >> 16));
  }
  QOPS_DEVICE void load_zeros(const uint16_t* zeros) { set_zeros(*zeros & 0xff, *zeros >> 8); }
  QOPS_DEVICE void load_offsets(const float2* zeros, bool is_offset) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float z = i == 0 ? zeros->x : zeros->y;
      offset[i] = is_offset ? fmaf(scale[i], 8.0f, z) : scale[i] * (8.0f - z);
    }
  }
};

// Those of neighbouring strips. `slots`: of the first one in a stage; `index`: of the group in it. has_offset: whether
// rows have offsets, by the kernel or by the kind.
template <bool kFine, class Rows, int kStrips>
QOPS_DEVICE void load_scales(Rows (&scales)[kStrips], const ScaleSource& source, bool has_offset, const uint8_t* slots,
                             int index, int lane) {
  const int pair = lane / 4;
  const auto each = [&](const auto& load) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) load(scales[s], s * scale_bytes_of_strip(kFine));
  };
  const uint8_t* of_scales = slots + index * source.scale_bytes;
  const auto at = [&]<class U>(const uint8_t* first, int strip, const U*) {
    return reinterpret_cast<const U*>(first + strip) + pair;
  };
  constexpr float2* kFloats = nullptr;
  constexpr uint32_t* kWords = nullptr;
  if (source.dtype == DType::kBFloat16) {
    each([&](auto& rows, int strip) { rows.template load_16_bits<__nv_bfloat16>(at(of_scales, strip, kWords)); });
  } else if (source.dtype == DType::kFloat16) {
    each([&](auto& rows, int strip) { rows.template load_16_bits<__half>(at(of_scales, strip, kWords)); });
  } else {
    each([&](auto& rows, int strip) { rows.load_float32(at(of_scales, strip, kFloats)); });
  }
  const uint8_t* zeros = slots + kGroupRowBytes * groups_of_stage(kFine) + index * source.zero_bytes;
  if (has_offset) {
    const bool is_offset = source.kind == WeightKind::kOffset;
    each([&](auto& rows, int strip) { rows.load_offsets(at(zeros, strip, kFloats), is_offset); });
  } else if (source.kind == WeightKind::kZeroPoint) {
    constexpr uint16_t* kPairs = nullptr;
    each([&](auto& rows, int strip) { rows.load_zeros(at(zeros, strip, kPairs)); });
  }
}

// The sums of a warp: kStrips strips x kTiles tiles of eight tokens. `total` is that of the slice so far, `part` of the
// group; x_sum of x in the group.
template <class T, int kStrips, int kTiles, bool kFine, bool kOffset>
struct WarpSums {
  static constexpr int kStripCount = kStrips, kTileCount = kTiles;
  float total[kStrips][kTiles][4];
  float part[kStrips][kTiles][4];
  float x_sum[kTiles][4];
  RowScales<T, kOffset> scales[kStrips];

  // Once: the zeros of weights that have no zero points.
  QOPS_DEVICE void begin() {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) scales[s].set_zeros(8, 8);
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
          total[s][t][i] = fmaf(scales[s].scale[i / 2], part[s][t][i], total[s][t][i]);
          if constexpr (kOffset) total[s][t][i] = fmaf(scales[s].offset[i / 2], x_sum[t][i % 2], total[s][t][i]);
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

  // Of x_address(): x lies at multiples of 128 bytes.
  static constexpr uint32_t kOtherHalf = 64;
  static_assert(x_address(0, 1, 5) == (x_address(0, 0, 5) ^ kOtherHalf));

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
    uint32_t raw[kStrips][4];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const uint4 words = *reinterpret_cast<const uint4*>(codes + s * int4::kBlockBytes + lane * int4::kLaneBytes);
      raw[s][0] = words.x;
      raw[s][1] = words.y;
      raw[s][2] = words.z;
      raw[s][3] = words.w;
    }
    uint32_t b[kTiles][4];
#pragma unroll
    for (int j = 0; j < int4::kSteps; ++j) {
      if (j % 2 == 0) {
        const uint32_t base = j == 0 ? x : x ^ kOtherHalf;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (kAllTiles || t < tiles) ptx::ldmatrix_x4(b[t], base + 8 * t * kTokenStageBytes);
        }
      }
      if constexpr (kFine) {
        if (((j == 0 && begins) || walk.begins(source)) && walk.group < source.groups) {
          load_scales<kFine>(scales, source, kOffset, slots, walk.group - first_group, lane);
        }
      } else if (j == 0 && begins) {
        load_scales<kFine>(scales, source, kOffset, slots, 0, lane);
      }
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        uint32_t a[4];
        dequantise<T>(raw[s][j], scales[s].zero, a);
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
