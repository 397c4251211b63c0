// int8_gemm: y = R(fmaf(s_x[m], float(sum_k (q[m, k] - zero_point[m]) w[n, k]) * s_w[n], bias[n])), and what becomes of
// it (Epilogue of kernels.h) before it is stored.
//
// Idea. w is the A operand of mma.m16n8k32 for every M and tokens are the n8 side, so few tokens are padded to eight
// and not to 64. Sums are exact integers modulo 2^32 in any order: int8_config.h cuts the product as it suits the GPU,
// and where blocks share a tile a second kernel adds what they have. Both operands pass through a ring of stages in
// shared memory that runs on from tile to tile; w lies there as it does in memory, in fragments. With zero points,
//     sum_k (q - zero_point) w  =  sum_k q w  -  zero_point * sum_k w,
// and sum_k w comes from dp4a with ones, on fragments that are in registers anyway: two registers for each strip and no
// work for the tensor cores, which a product with ones would keep busy for 1 / 8 of the time at 128 tokens. A pass of
// its own would read the weights twice.
//
// Bound by the bytes of w up to M of some 64, by the tensor cores beyond. wgmma, which is to take the place of this
// kernel there on sm_90a, can read the same layout.
//
// q is copied to scratch first where its rows do not begin at multiples of 16 bytes (K an odd multiple of 8, as a
// rule).
#include "cuda/gate.cuh"
#include "cuda/int8_config.h"
#include "cuda/ptx.cuh"
#include "cuda/quantize_row.cuh"

namespace qops::cuda {
namespace {

constexpr int kMaxThreads = 256;

struct Job {
  Int8GemmParams p;
  int8::Plan plan;
  int32_t* partials;  // of tiles that blocks share
  bool y_aligned;     // four columns of it at a time
};

template <int kTokens>
struct Tile {
  static constexpr int8::TileShape kShape = int8::tile_shape(kTokens);
  static constexpr int kThreads = kShape.threads();
  static constexpr int kStrips = kShape.strips_of_warp;
  static constexpr int kTokenTiles = kShape.token_tiles();
  static constexpr int kStages = kShape.stages;
};

// --- the ring --------------------------------------------------------------------------------------------------------

// What this thread copies of the units of a block, one unit after the other.
template <class T>
class Source {
 public:
  QOPS_DEVICE Source(const Job& job, const int8::Part& part) : tile_(part.first_tile), k_(part.first_k) {
    if (job.plan.k_blocks == 0) tile_ = part.end_tile;
    if (tile_ < part.end_tile) enter_tile(job);
  }

  // Begins to copy the next unit, if there is one, into the stage at `stage`.
  QOPS_DEVICE void copy(const Job& job, const int8::Part& part, uint32_t stage) {
    if (tile_ == part.end_tile) return;
    const uint8_t* const anywhere = static_cast<const uint8_t*>(job.p.packed);
    const int64_t piece_stride = kStripsAtOnce * int64_t{job.plan.k_blocks} * int8::kBlockBytes;
#pragma unroll
    for (int i = 0; i < kWeightPieces; ++i) {
      const bool inside = i * kStripsAtOnce < strips_left_;
      const uint8_t* source = weights_ + i * piece_stride + int64_t{k_} * int8::kBlockBytes;
      ptx::cp_async_cg_zfill(stage + (i * T::kThreads + threadIdx.x) * 16, inside ? source : anywhere, inside ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < kTokenPieces; ++i) {
      const int piece = i * T::kThreads + threadIdx.x;
      if (piece >= job.plan.live_tokens * 4) break;
      const int64_t column = int64_t{k_} * int8::kBlockColumns + piece % 4 * 16;
      const int64_t left = tokens_[i] == nullptr ? 0 : job.p.k - column;
      const uint32_t bytes = left >= 16 ? 16 : left > 0 ? static_cast<uint32_t>(left) : 0;
      ptx::cp_async_cg_zfill(stage + int8::kWeightBytes + int8::token_place(piece / 4, piece % 4),
                             bytes > 0 ? tokens_[i] + column : anywhere, bytes);
    }
    if (++k_ < (tile_ + 1 == part.end_tile ? part.end_k : job.plan.k_blocks)) return;
    k_ = 0;
    if (++tile_ < part.end_tile) enter_tile(job);
  }

 private:
  static constexpr int kStripsAtOnce = T::kThreads * 16 / int8::kBlockBytes;
  static constexpr int kWeightPieces = kTileStrips / kStripsAtOnce;
  static constexpr int kTokenPieces = (T::kShape.tokens * 4 + T::kThreads - 1) / T::kThreads;

  QOPS_DEVICE void enter_tile(const Job& job) {
    constexpr int kPiecesOfStrip = int8::kBlockBytes / 16;
    const TilePosition at = job.plan.position(tile_);
    const int64_t strip = at.row_tile * kTileStrips + threadIdx.x / kPiecesOfStrip;
    const int64_t left = int8::strips(job.p.n) - strip;
    strips_left_ = left < kTileStrips ? static_cast<int>(left) : kTileStrips;
    weights_ = static_cast<const uint8_t*>(job.p.packed) + strip * job.plan.k_blocks * int8::kBlockBytes +
               threadIdx.x % kPiecesOfStrip * 16;
#pragma unroll
    for (int i = 0; i < kTokenPieces; ++i) {
      const int64_t m = at.token_tile * job.plan.live_tokens + (i * T::kThreads + threadIdx.x) / 4;
      const uint8_t* q = static_cast<const uint8_t*>(job.p.q);
      tokens_[i] = m < job.p.q_rows.count ? q + job.p.q_rows.offset(m) : nullptr;
    }
  }

  int64_t tile_;
  int k_;
  int strips_left_;  // of w, from this thread's first one on
  const uint8_t* weights_;
  const uint8_t* tokens_[kTokenPieces];  // their rows of q; null past M
};

// --- from sums to y --------------------------------------------------------------------------------------------------

// What the epilogues of y are made of, for a dtype that is the same for all threads.
QOPS_DEVICE float rounded(DType dtype, float x) {
  return dtype == DType::kFloat32 ? x : dtype == DType::kFloat16 ? round_to<__half>(x) : round_to<__nv_bfloat16>(x);
}

// Four columns of the product, and what belongs to them.
class Columns {
 public:
  QOPS_DEVICE Columns(const Job& job, int64_t n) : n_(n), inside_(n < job.p.n) {
    load_four(job.p.w_scale, job.p.w_scale_dtype, n, inside_ && job.p.k > 0, scale_);
    const int64_t row = job.p.epilogue == Epilogue::kSiluMul ? unmixed_row(n, job.p.n) : n;
    load_four(job.p.bias, job.p.bias_dtype, row, inside_ && job.p.bias != nullptr, bias_);
  }

  // By all threads of a warp, with four columns of a row each; of rows past M nothing is stored.
  QOPS_DEVICE void store(const Job& job, int64_t m, const uint4& sums) const {
    const bool valid = inside_ && m < job.p.q_rows.count;
    const uint32_t acc[4] = {sums.x, sums.y, sums.z, sums.w};
    const int64_t at = m * job.p.n + n_;
    if (job.p.dtype == DType::kInt32) {
      if (valid) store_words(static_cast<uint32_t*>(job.p.y) + at, acc, job.y_aligned);
      return;
    }
    const float scale = valid ? job.p.scale[job.p.scale_rows.offset(m)] : 0.0f;
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float t = static_cast<float>(static_cast<int32_t>(acc[i])) * scale_[i];
      y[i] = job.p.bias == nullptr ? scale * t : fmaf(scale, t, bias_[i]);
    }
    if (job.p.is_plain()) {
      if (valid) store_values(job, at, y);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = rounded(job.p.dtype, y[i]);
    if (job.p.epilogue == Epilogue::kSiluMul) {
      const bool is_gate = n_ % kStripRows < 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // up: 8 columns, so two lanes, further
        const float up = __shfl_xor_sync(kAllLanes, y[i], 2);
        y[i] = rounded(job.p.dtype, silu(lanes::Lane{y[i]}).v) * up;
      }
      if (valid && is_gate) store_values(job, m * (job.p.n / 2) + unmixed_row(n_, job.p.n), y);
    } else if (job.p.epilogue == Epilogue::kInt8) {
      const StaticQuantizer quantizer(job.p.out_scale, job.p.out_zero_point);
      uint32_t codes = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) codes |= (static_cast<uint32_t>(quantizer.code(y[i])) & 0xff) << 8 * i;
      if (valid) store_codes(static_cast<int8_t*>(job.p.y) + at, codes, job.y_aligned);
    } else if (valid) {
      float residual[4];
      load_four(job.p.residual, job.p.dtype, job.p.residual_rows.offset(m) + n_, true, residual);
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] += residual[i];
      store_values(job, at, y);
    }
  }

 private:
  static QOPS_DEVICE void load_four(const void* values, DType dtype, int64_t at, bool any, float (&four)[4]) {
    Vector v;
    load<false>(values, dtype, at, any ? 4 : 0, v);
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = v[i];
  }

  // Rounds them.
  static QOPS_DEVICE void store_values(const Job& job, int64_t at, const float (&y)[4]) {
    if (job.p.dtype == DType::kFloat32) {
      const uint32_t words[4] = {__float_as_uint(y[0]), __float_as_uint(y[1]), __float_as_uint(y[2]),
                                 __float_as_uint(y[3])};
      store_words(static_cast<uint32_t*>(job.p.y) + at, words, job.y_aligned);
    } else if (job.p.dtype == DType::kFloat16) {
      store_halves(static_cast<__half*>(job.p.y) + at, y, job.y_aligned);
    } else {
      store_halves(static_cast<__nv_bfloat16*>(job.p.y) + at, y, job.y_aligned);
    }
  }
  static QOPS_DEVICE void store_words(uint32_t* y, const uint32_t (&words)[4], bool aligned) {
    if (aligned) {
      *reinterpret_cast<uint4*>(y) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = words[i];
    }
  }
  template <class E>
  static QOPS_DEVICE void store_halves(E* y, const float (&values)[4], bool aligned) {
    if (aligned) {
      uint32_t words[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        words[i] = to_bits(narrow<E>(values[2 * i])) | to_bits(narrow<E>(values[2 * i + 1])) << 16;
      }
      *reinterpret_cast<uint2*>(y) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = narrow<E>(values[i]);
    }
  }
  static QOPS_DEVICE void store_codes(int8_t* y, uint32_t codes, bool aligned) {
    if (aligned) {
      *reinterpret_cast<uint32_t*>(y) = codes;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = static_cast<int8_t>(codes >> 8 * i);
    }
  }

  int64_t n_;
  bool inside_;
  float scale_[4], bias_[4];
};

// The sums of a warp: strips by tiles of eight tokens.
template <class T, bool kZeroPoint>
struct Sums {
  int32_t of[T::kStrips][T::kTokenTiles][4];
  int32_t of_w[kZeroPoint ? T::kStrips : 1][2];  // of w alone, rows g and g + 8: this lane's share of the columns

  QOPS_DEVICE void clear() {
#pragma unroll
    for (int s = 0; s < T::kStrips; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kZeroPoint) of_w[s][i / 2] = 0;
#pragma unroll
        for (int t = 0; t < T::kTokenTiles; ++t) of[s][t][i] = 0;
      }
    }
  }

  // One unit, of all tiles of eight tokens or of the first `live` ones. weights: of the warp's first strip, this lane's
  // 16 bytes; tokens: token_address() of its first tiles.
  template <bool kSkips>
  QOPS_DEVICE void add(const uint8_t* weights, uint32_t tokens, int live) {
#pragma unroll
    for (int f = 0; f < int8::kFragments; ++f) {
      uint32_t a[T::kStrips][4];
#pragma unroll
      for (int s = 0; s < T::kStrips; ++s) load_weights(weights, s, f, a[s]);
#pragma unroll
      for (int t = 0; t < T::kTokenTiles; t += 2) {
        if (kSkips && t >= live) break;
        const uint32_t at = (tokens ^ f * int8::kNextFragment) + 8 * t * int8::kTokenBytes;
        uint32_t b[2][2];
        if constexpr (T::kTokenTiles == 1) {
          ptx::ldmatrix_x2(b[0], at);
        } else {
          uint32_t two[4];
          ptx::ldmatrix_x4(two, at);
#pragma unroll
          for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = two[i];
        }
#pragma unroll
        for (int i = 0; i < 2 && t + i < T::kTokenTiles; ++i) {
          if (kSkips && t + i >= live) break;
#pragma unroll
          for (int s = 0; s < T::kStrips; ++s) ptx::mma_m16n8k32_s8(of[s][t + i], a[s], b[i]);
        }
      }
    }
  }

  // Gives the sums of a tile to y, or to its slot of the partial sums. token_warp, first_strip: the warp's place in the
  // tile; staging: its own.
  QOPS_DEVICE void write(const Job& job, int64_t tile, int32_t* slot, int token_warp, int first_strip,
                         uint32_t* staging) {
    constexpr int kStride = T::kShape.sum_stride(), kChunks = T::kStrips * kStripRows / 4;
    const int lane = threadIdx.x % kWarp;
    const TilePosition at = job.plan.position(tile);
    const int first_token = token_warp * job.plan.token_tiles_of_warp(T::kShape.token_warps) * 8;
    const int live = job.plan.live_tiles(at.token_tile, token_warp, T::kShape.token_warps);
    const int column = first_strip * kStripRows + lane % kChunks * 4;  // in the tile, of this lane, of all its tokens
    const Columns columns(job, at.row_tile * kTileRows + column);
    if constexpr (kZeroPoint) {
#pragma unroll
      for (int s = 0; s < T::kStrips; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // the four lanes of a row
          of_w[s][half] += __shfl_xor_sync(kAllLanes, of_w[s][half], 1);
          of_w[s][half] += __shfl_xor_sync(kAllLanes, of_w[s][half], 2);
        }
      }
    }
    // Not unrolled: what follows the sums would be there once for each tile of tokens.
#pragma unroll 1
    for (int i = 0; i < live; ++i) {
      const int token = first_token + 8 * i;
      const int64_t m = at.token_tile * job.plan.live_tokens + token;
      uint32_t zero_points[2] = {};  // of the lane's two tokens
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t row = m + 2 * (lane % 4) + j;
        if (kZeroPoint && row < job.p.q_rows.count) {
          zero_points[j] = static_cast<uint32_t>(job.p.zero_point[job.p.zero_point_rows.offset(row)]);
        }
      }
#pragma unroll
      for (int t = 0; t < T::kTokenTiles; ++t) {  // registers have no index
        if (t == i) stage(t, zero_points, staging);
      }
      __syncwarp();
#pragma unroll 1
      for (int row = lane / kChunks; row < 8; row += kWarp / kChunks) {
        const uint4 four = *reinterpret_cast<const uint4*>(staging + row * kStride + lane % kChunks * 4);
        if (slot == nullptr) {
          columns.store(job, m + row, four);
        } else {
          *reinterpret_cast<uint4*>(slot + (token + row) * kTileRows + column) = four;
        }
      }
      __syncwarp();
    }
  }

 private:
  QOPS_DEVICE void load_weights(const uint8_t* weights, int s, int f, uint32_t (&a)[4]) {
    constexpr int kOnes = 0x01010101;
    const uint4 words = *reinterpret_cast<const uint4*>(weights + s * int8::kBlockBytes + f * int8::kFragmentBytes);
    a[0] = words.x, a[1] = words.y, a[2] = words.z, a[3] = words.w;
    if constexpr (kZeroPoint) {
#pragma unroll
      for (int i = 0; i < 4; ++i) of_w[s][i % 2] = __dp4a(static_cast<int>(a[i]), kOnes, of_w[s][i % 2]);
    }
  }

  // The sums of a tile of eight tokens, to rows of them.
  QOPS_DEVICE void stage(int t, const uint32_t (&zero_points)[2], uint32_t* staging) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int s = 0; s < T::kStrips; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t sum = static_cast<uint32_t>(of[s][t][2 * half + i]);
          if constexpr (kZeroPoint) sum -= zero_points[i] * static_cast<uint32_t>(of_w[s][half]);
          staging[(2 * (lane % 4) + i) * T::kShape.sum_stride() + s * kStripRows + 8 * half + lane / 4] = sum;
        }
      }
    }
  }
};

// --- kernels ---------------------------------------------------------------------------------------------------------

template <int kTokens, bool kZeroPoint>
__global__ void __launch_bounds__(Tile<kTokens>::kThreads, 2) int8_gemm_kernel(const __grid_constant__ Job job) {
  using T = Tile<kTokens>;
  constexpr int8::TileShape kShape = T::kShape;
  constexpr int kStageBytes = kShape.stage_bytes();
  QOPS_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first_strip = warp % kShape.strip_warps() * T::kStrips, token_warp = warp / kShape.strip_warps();
  const int first_token = token_warp * job.plan.token_tiles_of_warp(kShape.token_warps) * 8;
  const uint32_t ring = ptx::shared_address(shared);
  const int stages = T::kShape.can_be_deep() ? job.plan.stages : T::kStages;
  uint32_t* const staging = reinterpret_cast<uint32_t*>(shared + stages * kStageBytes) + warp * 8 * kShape.sum_stride();

  const int8::Part part = job.plan.part(blockIdx.x);
  Source<T> source(job, part);
  for (int stage = 0; stage < stages - 1; ++stage) {
    source.copy(job, part, ring + stage * kStageBytes);
    ptx::cp_async_commit();
  }
  Sums<T, kZeroPoint> sums;
  int stage = 0;
  for (int64_t tile = part.first_tile; tile < part.end_tile; ++tile) {
    const int begin = tile == part.first_tile ? part.first_k : 0;
    const int end = tile + 1 == part.end_tile ? part.end_k : job.plan.k_blocks;
    sums.clear();
    const auto multiply = [&](auto skips, int live) {
#pragma unroll 1
      for (int k = begin; k < end; ++k) {
        if (kShape.can_be_deep() && stages == int8::kDeepStages) {
          ptx::cp_async_wait<int8::kDeepStages - 2>();
        } else {
          ptx::cp_async_wait<T::kStages - 2>();
        }
        // Also: all have read the stage before this one, which is filled now.
        __syncthreads();
        source.copy(job, part, ring + (stage == 0 ? stages - 1 : stage - 1) * kStageBytes);
        ptx::cp_async_commit();
        const uint8_t* const weights =
            shared + stage * kStageBytes + first_strip * int8::kBlockBytes + lane * int8::kLaneBytes;
        const uint32_t tokens = ring + stage * kStageBytes + int8::kWeightBytes + first_token * int8::kTokenBytes +
                                int8::token_address(lane);
        sums.template add<decltype(skips)::value>(weights, tokens, live);
        stage = stage + 1 == stages ? 0 : stage + 1;
      }
    };
    const int64_t token_tile = job.plan.position(tile).token_tile;
    const bool full = job.plan.tokens_of(token_tile) == kTokens;  // the same for the whole block
    if constexpr (!kShape.skips()) {
      multiply(std::false_type{}, 0);
    } else if (full && !kZeroPoint) {  // with zero points there are no registers for two loops
      multiply(std::false_type{}, 0);
    } else {
      multiply(std::true_type{}, job.plan.live_tiles(token_tile, token_warp, kShape.token_warps));
    }
    int32_t* slot = nullptr;
    if (begin != 0 || end != job.plan.k_blocks) {
      slot = job.partials + job.plan.slot(blockIdx.x, tile) * job.plan.slot_sums();
    }
    sums.write(job, tile, slot, token_warp, first_strip, staging);
  }
}

// The tiles that blocks of the first kernel share: eight tokens of one each block, four sums a thread.
__global__ void __launch_bounds__(kMaxThreads) int8_gemm_add_kernel(const __grid_constant__ Job job) {
  static_assert(kMaxThreads * 4 == 8 * kTileRows);
  const int8::Split split = job.plan.split_at(int64_t{blockIdx.x} + 1);
  if (split.last < split.first) return;
  const int token = blockIdx.y * 8 + threadIdx.x / kWarp, column = threadIdx.x % kWarp * 4;
  const TilePosition at = job.plan.position(split.tile);
  const Columns columns(job, at.row_tile * kTileRows + column);
  if (token >= job.plan.tokens_of(at.token_tile)) return;  // whole warps
  uint4 sums = make_uint4(0, 0, 0, 0);
  for (int64_t block = split.first; block <= split.last; ++block) {
    const int32_t* slot = job.partials + job.plan.slot(block, split.tile) * job.plan.slot_sums();
    const uint4 more = *reinterpret_cast<const uint4*>(slot + token * kTileRows + column);
    sums = make_uint4(sums.x + more.x, sums.y + more.y, sums.z + more.z, sums.w + more.w);
  }
  columns.store(job, at.token_tile * job.plan.live_tokens + token, sums);
}

// Rows of q from addresses that are multiples of 16 on, `stride` apart: eight bytes a thread.
__global__ void __launch_bounds__(kMaxThreads)
    int8_gemm_copy_kernel(const __grid_constant__ Int8GemmParams p, uint8_t* target, int64_t stride) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x, pieces = p.k / 8;
  if (i >= p.q_rows.count * pieces) return;
  const int64_t m = i / pieces, k = i % pieces * 8;
  const uint8_t* q = static_cast<const uint8_t*>(p.q) + p.q_rows.offset(m) + k;
  uint32_t words[2] = {};
#pragma unroll
  for (int byte = 0; byte < 8; ++byte) words[byte / 4] |= static_cast<uint32_t>(q[byte]) << byte % 4 * 8;
  *reinterpret_cast<uint2*>(target + m * stride + k) = make_uint2(words[0], words[1]);
}

// --- launches --------------------------------------------------------------------------------------------------------

bool copies_q(const Int8GemmParams& p) {
  bool aligned = multiple_of_16(p.q);
  for (int d = 0; d < p.q_rows.dims; ++d) aligned = aligned && p.q_rows.stride[d] % 16 == 0;
  return !aligned && p.k > 0;
}

int64_t copy_stride(const Int8GemmParams& p) { return ceil_div(p.k, 16) * 16; }
int64_t copy_bytes(const Int8GemmParams& p) { return copies_q(p) ? p.q_rows.count * copy_stride(p) : 0; }

// No blocks where CUDA does not tell what the GPU is.
int8::Plan plan_of(const Int8GemmParams& p) {
  const Gpu gpu = current_gpu();
  return gpu.multiprocessors == 0 ? int8::Plan{} : int8::plan_int8_gemm(p.q_rows.count, p.n, p.k, gpu);
}

bool is_empty(const Int8GemmParams& p) { return p.q_rows.count == 0 || p.n == 0; }

template <int kTokens>
Status run(const Job& job, cudaStream_t stream) {
  void (*const kernel)(Job) =
      job.p.zero_point == nullptr ? &int8_gemm_kernel<kTokens, false> : &int8_gemm_kernel<kTokens, true>;
  const Status status = launch_blocks(kernel, job.plan.blocks, Tile<kTokens>::kThreads,
                                      Tile<kTokens>::kShape.shared_bytes(job.plan.stages), stream, job);
  if (status != Status::kOk || !job.plan.split || job.plan.blocks == 1) return status;
  const dim3 grid(static_cast<unsigned>(job.plan.blocks - 1), static_cast<unsigned>(job.plan.live_tokens / 8));
  return launch(&int8_gemm_add_kernel, grid, dim3(kMaxThreads), 0, stream, job);
}

}  // namespace

int64_t int8_gemm_scratch_bytes(const Int8GemmParams& p) {
  return is_empty(p) ? 0 : copy_bytes(p) + plan_of(p).scratch_bytes();
}

Status int8_gemm(const Int8GemmParams& params, cudaStream_t stream) {
  if (is_empty(params)) return Status::kOk;
  Job job{params, plan_of(params), {}, {}};
  if (job.plan.blocks == 0) return Status::kLaunchFailed;
  Int8GemmParams& p = job.p;
  if (!multiple_of_16(p.packed)) return Status::kUnsupported;
  uint8_t* const scratch = static_cast<uint8_t*>(p.scratch);
  job.partials = reinterpret_cast<int32_t*>(scratch + copy_bytes(p));
  const size_t element_bytes = p.epilogue == Epilogue::kInt8 ? 1 : p.dtype == DType::kInt32 ? 4 : size_of(p.dtype);
  job.y_aligned = reinterpret_cast<uintptr_t>(p.y) % (4 * element_bytes) == 0;
  if (copies_q(p)) {
    const Status status = launch_blocks(&int8_gemm_copy_kernel, ceil_div(p.q_rows.count * (p.k / 8), kMaxThreads),
                                        kMaxThreads, 0, stream, p, scratch, copy_stride(p));
    if (status != Status::kOk) return status;
    p.q = scratch;
    p.q_rows.dims = 1;
    p.q_rows.size[0] = p.q_rows.count;
    p.q_rows.stride[0] = copy_stride(p);
  }
  switch (job.plan.tokens) {
    case 8: return run<8>(job, stream);
    case 16: return run<16>(job, stream);
    case 32: return run<32>(job, stream);
    case 64: return run<64>(job, stream);
    default: return run<128>(job, stream);
  }
}

}  // namespace qops::cuda
