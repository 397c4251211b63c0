// What the kernel of int8_gemm_tiled.cu is made of: the ring in shared memory and what fills it, and the sums of a
// warp, from fragments in the ring to y or to scratch.
#pragma once

#include "cuda/int8_gemm.cuh"
#include "cuda/ptx.cuh"

namespace qops::cuda::int8 {

template <int kTokens>
struct Tile {
  static constexpr TileShape kShape = tile_shape(kTokens);
  static constexpr int kThreads = kShape.threads();
  static constexpr int kStrips = kShape.strips_of_warp;
  static constexpr int kTokenTiles = kShape.token_tiles();
  static constexpr int kStages = kShape.stages;
};

// What this thread copies of the units of a block, one unit after the other.
template <class T>
class Source {
 public:
  QOPS_DEVICE Source(const Int8Job& job, const Part& part) : tile_(part.first_tile), k_(part.first_k) {
    if (job.plan.k_blocks == 0) tile_ = part.end_tile;
    if (tile_ < part.end_tile) enter_tile(job);
  }

  // Begins to copy the next unit, if there is one, into the stage at `stage`.
  QOPS_DEVICE void copy(const Int8Job& job, const Part& part, uint32_t stage) {
    if (tile_ == part.end_tile) return;
    const uint8_t* const anywhere = static_cast<const uint8_t*>(job.p.packed);
    const int64_t piece_stride = kStripsAtOnce * int64_t{job.plan.k_blocks} * kBlockBytes;
#pragma unroll
    for (int i = 0; i < kWeightPieces; ++i) {
      const bool inside = i * kStripsAtOnce < strips_left_;
      const uint8_t* source = weights_ + i * piece_stride + int64_t{k_} * kBlockBytes;
      ptx::cp_async_cg_zfill(stage + (i * T::kThreads + threadIdx.x) * 16, inside ? source : anywhere, inside ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < kTokenPieces; ++i) {
      const int piece = i * T::kThreads + threadIdx.x;
      if (piece >= job.plan.live_tokens * 4) break;
      const int64_t column = int64_t{k_} * kBlockColumns + piece % 4 * 16;
      const int64_t left = tokens_[i] == nullptr ? 0 : job.p.k - column;
      const uint32_t bytes = left >= 16 ? 16 : left > 0 ? static_cast<uint32_t>(left) : 0;
      ptx::cp_async_cg_zfill(stage + kWeightBytes + token_place(piece / 4, piece % 4),
                             bytes > 0 ? tokens_[i] + column : anywhere, bytes);
    }
    if (++k_ < (tile_ + 1 == part.end_tile ? part.end_k : job.plan.k_blocks)) return;
    k_ = 0;
    if (++tile_ < part.end_tile) enter_tile(job);
  }

 private:
  static constexpr int kStripsAtOnce = T::kThreads * 16 / kBlockBytes;
  static constexpr int kWeightPieces = kTileStrips / kStripsAtOnce;
  static constexpr int kTokenPieces = (T::kShape.tokens * 4 + T::kThreads - 1) / T::kThreads;

  QOPS_DEVICE void enter_tile(const Int8Job& job) {
    constexpr int kPiecesOfStrip = kBlockBytes / 16;
    const TilePosition at = job.plan.position(tile_);
    const int64_t strip = at.row_tile * kTileStrips + threadIdx.x / kPiecesOfStrip;
    const int64_t left = strips(job.p.n) - strip;
    strips_left_ = left < kTileStrips ? static_cast<int>(left) : kTileStrips;
    weights_ = static_cast<const uint8_t*>(job.p.packed) + strip * job.plan.k_blocks * kBlockBytes +
               threadIdx.x % kPiecesOfStrip * 16;
#pragma unroll
    for (int i = 0; i < kTokenPieces; ++i) {
      const int64_t m = at.token_tile * job.plan.live_tokens + (i * T::kThreads + threadIdx.x) / 4;
      const uint8_t* q = static_cast<const uint8_t*>(job.p.q);
      tokens_[i] = m < job.p.q_rows.count ? q + job.p.q_rows.offset(m) : nullptr;
    }
  }

  int tile_;
  int k_;
  int strips_left_;  // of w, from this thread's first one on
  const uint8_t* weights_;
  const uint8_t* tokens_[kTokenPieces];  // their rows of q; null past M
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
    for (int f = 0; f < kFragments; ++f) {
      uint32_t a[T::kStrips][4];
#pragma unroll
      for (int s = 0; s < T::kStrips; ++s) load_weights(weights, s, f, a[s]);
#pragma unroll
      for (int t = 0; t < T::kTokenTiles; t += 2) {
        if (kSkips && t >= live) break;
        const uint32_t at = (tokens ^ f * kNextFragment) + 8 * t * kTokenBytes;
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
  QOPS_DEVICE void write(const Int8Job& job, int64_t tile, int32_t* slot, int token_warp, int first_strip,
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
    const uint4 words = *reinterpret_cast<const uint4*>(weights + s * kBlockBytes + f * kFragmentBytes);
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

}  // namespace qops::cuda::int8
