// int8_gemm: y = R(fmaf(s_x[m], float(sum_k (q[m, k] - zero_point[m]) w[n, k]) * s_w[n], bias[n])).
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
#include "cuda/elements.cuh"
#include "cuda/int8_config.h"
#include "cuda/ptx.cuh"
#include "cuda/row.cuh"

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
      if (piece >= T::kShape.tokens * 4) break;
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
  static constexpr int kWeightPieces = int8::kTileStrips / kStripsAtOnce;
  static constexpr int kTokenPieces = (T::kShape.tokens * 4 + T::kThreads - 1) / T::kThreads;

  QOPS_DEVICE void enter_tile(const Job& job) {
    constexpr int kPiecesOfStrip = int8::kBlockBytes / 16;
    const int8::Position at = job.plan.position(tile_);
    const int64_t strip = at.row_tile * int8::kTileStrips + threadIdx.x / kPiecesOfStrip;
    const int64_t left = int8::strips(job.p.n) - strip;
    strips_left_ = left < int8::kTileStrips ? static_cast<int>(left) : int8::kTileStrips;
    weights_ = static_cast<const uint8_t*>(job.p.packed) + strip * job.plan.k_blocks * int8::kBlockBytes +
               threadIdx.x % kPiecesOfStrip * 16;
#pragma unroll
    for (int i = 0; i < kTokenPieces; ++i) {
      const int64_t m = at.token_tile * T::kShape.tokens + (i * T::kThreads + threadIdx.x) / 4;
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

// Four columns of y, and what belongs to them.
class Columns {
 public:
  QOPS_DEVICE Columns(const Job& job, int64_t n) : n_(n), inside_(n < job.p.n) {
    load_four(job.p.w_scale, job.p.w_scale_dtype, inside_ && job.p.k > 0, scale_);
    load_four(job.p.bias, job.p.bias_dtype, inside_ && job.p.bias != nullptr, bias_);
  }

  QOPS_DEVICE bool inside() const { return inside_; }

  QOPS_DEVICE void store(const Job& job, int64_t m, const uint4& sums) const {
    const int64_t at = m * job.p.n + n_;
    const uint32_t acc[4] = {sums.x, sums.y, sums.z, sums.w};
    if (job.p.dtype == DType::kInt32) return store_words(static_cast<uint32_t*>(job.p.y) + at, acc, job.y_aligned);
    const float scale = job.p.scale[job.p.scale_rows.offset(m)];
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float t = static_cast<float>(static_cast<int32_t>(acc[i])) * scale_[i];
      y[i] = job.p.bias == nullptr ? scale * t : fmaf(scale, t, bias_[i]);
    }
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

 private:
  QOPS_DEVICE void load_four(const void* values, DType dtype, bool any, float (&four)[4]) const {
    Vector v;
    load<false>(values, dtype, n_, any ? 4 : 0, v);
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = v[i];
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

  // One unit. weights: of the warp's first strip, this lane's 16 bytes; tokens: token_address() of its first tiles.
  QOPS_DEVICE void add(const uint8_t* weights, uint32_t tokens) {
    constexpr int kOnes = 0x01010101;
#pragma unroll
    for (int f = 0; f < int8::kFragments; ++f) {
      const uint32_t at = tokens ^ f * int8::kNextFragment;
      uint32_t b[T::kTokenTiles][2];
      if constexpr (T::kTokenTiles == 1) {
        ptx::ldmatrix_x2(b[0], at);
      } else {
#pragma unroll
        for (int t = 0; t < T::kTokenTiles; t += 2) {
          uint32_t two[4];
          ptx::ldmatrix_x4(two, at + 8 * t * int8::kTokenBytes);
#pragma unroll
          for (int i = 0; i < 4; ++i) b[t + i / 2][i % 2] = two[i];
        }
      }
#pragma unroll
      for (int s = 0; s < T::kStrips; ++s) {
        const uint4 words = *reinterpret_cast<const uint4*>(weights + s * int8::kBlockBytes + f * int8::kFragmentBytes);
        const uint32_t a[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int t = 0; t < T::kTokenTiles; ++t) ptx::mma_m16n8k32_s8(of[s][t], a, b[t]);
        if constexpr (kZeroPoint) {
#pragma unroll
          for (int i = 0; i < 4; ++i) of_w[s][i % 2] = __dp4a(static_cast<int>(a[i]), kOnes, of_w[s][i % 2]);
        }
      }
    }
  }

  // Gives the sums of a tile to y, or to its slot of the partial sums. first_token, first_strip: of the warp, in the
  // tile; staging: the warp's own.
  QOPS_DEVICE void write(const Job& job, int64_t tile, int32_t* slot, int first_token, int first_strip,
                         uint32_t* staging) {
    constexpr int kStride = T::kShape.sum_stride(), kChunks = T::kStrips * kStripRows / 4;
    const int lane = threadIdx.x % kWarp;
    const int8::Position at = job.plan.position(tile);
    const int column = first_strip * kStripRows + lane % kChunks * 4;  // in the tile, of this lane, of all its tokens
    const Columns columns(job, at.row_tile * int8::kTileRows + column);
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
#pragma unroll
    for (int t = 0; t < T::kTokenTiles; ++t) {
      const int token = first_token + 8 * t;
      const int64_t m = at.token_tile * T::kShape.tokens + token;
      if (m >= job.p.q_rows.count) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int of_lane = 2 * (lane % 4) + i;
        uint32_t zero_point = 0;
        if (kZeroPoint && m + of_lane < job.p.q_rows.count) {
          zero_point = static_cast<uint32_t>(job.p.zero_point[job.p.zero_point_rows.offset(m + of_lane)]);
        }
#pragma unroll
        for (int s = 0; s < T::kStrips; ++s) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t sum = static_cast<uint32_t>(of[s][t][2 * half + i]);
            if constexpr (kZeroPoint) sum -= zero_point * static_cast<uint32_t>(of_w[s][half]);
            staging[of_lane * kStride + s * kStripRows + 8 * half + lane / 4] = sum;
          }
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int row = lane / kChunks; row < 8; row += kWarp / kChunks) {
        if (m + row >= job.p.q_rows.count || !columns.inside()) break;
        const uint4 four = *reinterpret_cast<const uint4*>(staging + row * kStride + lane % kChunks * 4);
        if (slot == nullptr) {
          columns.store(job, m + row, four);
        } else {
          *reinterpret_cast<uint4*>(slot + (token + row) * int8::kTileRows + column) = four;
        }
      }
      __syncwarp();
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
  const int first_strip = warp % kShape.strip_warps() * T::kStrips;
  const int first_token = warp / kShape.strip_warps() * T::kTokenTiles * 8;
  const uint32_t ring = ptx::shared_address(shared);
  uint32_t* const staging =
      reinterpret_cast<uint32_t*>(shared + T::kStages * kStageBytes) + warp * 8 * kShape.sum_stride();

  const int8::Part part = job.plan.part(blockIdx.x);
  Source<T> source(job, part);
  for (int stage = 0; stage < T::kStages - 1; ++stage) {
    source.copy(job, part, ring + stage * kStageBytes);
    ptx::cp_async_commit();
  }
  Sums<T, kZeroPoint> sums;
  int stage = 0;
  for (int64_t tile = part.first_tile; tile < part.end_tile; ++tile) {
    const int begin = tile == part.first_tile ? part.first_k : 0;
    const int end = tile + 1 == part.end_tile ? part.end_k : job.plan.k_blocks;
    sums.clear();
#pragma unroll 1
    for (int k = begin; k < end; ++k) {
      ptx::cp_async_wait<T::kStages - 2>();
      // Also: all have read the stage before this one, which is filled now.
      __syncthreads();
      source.copy(job, part, ring + (stage == 0 ? T::kStages - 1 : stage - 1) * kStageBytes);
      ptx::cp_async_commit();
      sums.add(shared + stage * kStageBytes + first_strip * int8::kBlockBytes + lane * int8::kLaneBytes,
               ring + stage * kStageBytes + int8::kWeightBytes + first_token * int8::kTokenBytes +
                   int8::token_address(lane));
      stage = stage + 1 == T::kStages ? 0 : stage + 1;
    }
    int32_t* slot = nullptr;
    if (begin != 0 || end != job.plan.k_blocks) {
      slot = job.partials + job.plan.slot(blockIdx.x, tile) * kTokens * int8::kTileRows;
    }
    sums.write(job, tile, slot, first_token, first_strip, staging);
  }
}

// The tiles that blocks of the first kernel share: eight tokens of one each block, four sums a thread.
template <int kTokens>
__global__ void __launch_bounds__(kMaxThreads) int8_gemm_add_kernel(const __grid_constant__ Job job) {
  static_assert(kMaxThreads * 4 == 8 * int8::kTileRows);
  const int8::Split split = job.plan.split_at(int64_t{blockIdx.x} + 1);
  if (split.last < split.first) return;
  const int token = blockIdx.y * 8 + threadIdx.x / kWarp, column = threadIdx.x % kWarp * 4;
  const int8::Position at = job.plan.position(split.tile);
  const int64_t m = at.token_tile * kTokens + token;
  const Columns columns(job, at.row_tile * int8::kTileRows + column);
  if (m >= job.p.q_rows.count || !columns.inside()) return;
  uint4 sums = make_uint4(0, 0, 0, 0);
  for (int64_t block = split.first; block <= split.last; ++block) {
    const int64_t slot = job.plan.slot(block, split.tile) * kTokens;
    const uint4 more = *reinterpret_cast<const uint4*>(job.partials + (slot + token) * int8::kTileRows + column);
    sums = make_uint4(sums.x + more.x, sums.y + more.y, sums.z + more.z, sums.w + more.w);
  }
  columns.store(job, m, sums);
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

int8::Plan plan_of(const Int8GemmParams& p) { return int8::plan_int8_gemm(p.q_rows.count, p.n, p.k, current_gpu()); }

bool is_empty(const Int8GemmParams& p) { return p.q_rows.count == 0 || p.n == 0; }

template <int kTokens>
Status run(const Job& job, cudaStream_t stream) {
  void (*const kernel)(Job) =
      job.p.zero_point == nullptr ? &int8_gemm_kernel<kTokens, false> : &int8_gemm_kernel<kTokens, true>;
  const Status status = launch_blocks(kernel, job.plan.blocks, Tile<kTokens>::kThreads,
                                      Tile<kTokens>::kShape.shared_bytes(), stream, job);
  if (status != Status::kOk || !job.plan.split || job.plan.blocks == 1) return status;
  const dim3 grid(static_cast<unsigned>(job.plan.blocks - 1), kTokens / 8);
  return launch(&int8_gemm_add_kernel<kTokens>, grid, dim3(kMaxThreads), 0, stream, job);
}

}  // namespace

int64_t int8_gemm_scratch_bytes(const Int8GemmParams& p) {
  return is_empty(p) ? 0 : copy_bytes(p) + plan_of(p).scratch_bytes();
}

Status int8_gemm(const Int8GemmParams& params, cudaStream_t stream) {
  if (is_empty(params)) return Status::kOk;
  Job job{params, plan_of(params), {}, {}};
  Int8GemmParams& p = job.p;
  if (!multiple_of_16(p.packed)) return Status::kUnsupported;
  uint8_t* const scratch = static_cast<uint8_t*>(p.scratch);
  job.partials = reinterpret_cast<int32_t*>(scratch + copy_bytes(p));
  job.y_aligned = reinterpret_cast<uintptr_t>(p.y) % (p.dtype == DType::kInt32 ? 16 : 4 * size_of(p.dtype)) == 0;
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
