// int4_pack and int4_unpack: canonical codes [N, K/2] <-> the layout of int4_layout.h.
//
// Bound by memory: each byte is read once and written once. A warp turns one block of 16 rows x 64 columns, which both
// sides hold in whole sectors of 32 bytes: 16 pieces of rows there, 512 bytes in one range here. Between them stands
// shared memory, the warp's own.
#include "cuda/row.cuh"
#include "int4_layout.h"

namespace qops::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kWarps = kMaxThreads / kWarp;
constexpr int kRowWords = int4::kBlockColumns / int4::kCodesOfWord;
// 12 words from row to row: the rows of a lane's reads (8 at once, 8 bytes of each) lie in different banks.
constexpr int kPitch = 4 * 12;
constexpr int kRowsAtOnce = kWarp / kRowWords;

// Four bytes at any address; `aligned` is the same for all threads.
QOPS_DEVICE uint32_t load_word(const uint8_t* p, bool aligned) {
  if (aligned) return *reinterpret_cast<const uint32_t*>(p);
  return p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24;
}

// The bytes of the canonical block that lane 4 g + t owns in step j: row g or g + 8, two columns of one half of the
// step.
struct Bytes {
  int at[4];  // of registers a0 .. a3

  QOPS_DEVICE Bytes(int lane, int step) {
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const int4::Code even = int4::code_of({lane, step, a});
      at[a] = even.row * kPitch + even.column / 2;
    }
  }
};

template <bool kPack>
__global__ void __launch_bounds__(kMaxThreads) pack_kernel(const __grid_constant__ WeightPackParams p) {
  QOPS_SHARED(uint8_t, shared, kWarps * kStripRows * kPitch);
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t blocks_of_strip = int4::blocks(p.k);
  if (block >= int4::strips(p.n) * blocks_of_strip) return;  // a whole warp
  const int lane = threadIdx.x % kWarp;
  const int64_t row_bytes = p.k / 2;
  const int64_t first_row = block / blocks_of_strip * kStripRows;
  const int64_t first_byte = block % blocks_of_strip * (int4::kBlockColumns / 2);
  uint8_t* const tile = shared + threadIdx.x / kWarp * kStripRows * kPitch;
  uint4* const packed = reinterpret_cast<uint4*>(static_cast<uint8_t*>(kPack ? p.target : const_cast<void*>(p.source)) +
                                                 block * int4::kBlockBytes) +
                        lane;

  // Calls f(byte in the tile, byte of the canonical weight, whether it has that byte) for each word of the block.
  const auto for_words = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < kStripRows / kRowsAtOnce; ++i) {
      const int row = i * kRowsAtOnce + lane / kRowWords, byte = lane % kRowWords * 4;
      const bool inside = first_row + row < p.n && first_byte + byte < row_bytes;
      f(row * kPitch + byte, (first_row + row) * row_bytes + first_byte + byte, inside);
    }
  };

  if constexpr (kPack) {
    const uint8_t* source = static_cast<const uint8_t*>(p.source);
    const bool aligned = reinterpret_cast<uintptr_t>(source) % 4 == 0;  // rows take a multiple of 4 bytes
    for_words([&](int in_tile, int64_t at, bool inside) {
      *reinterpret_cast<uint32_t*>(tile + in_tile) = inside ? load_word(source + at, aligned) : int4::kPaddingWord;
    });
    __syncwarp();
    uint32_t words[int4::kSteps];
#pragma unroll
    for (int step = 0; step < int4::kSteps; ++step) {
      const Bytes bytes(lane, step);
      words[step] = 0;
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const uint32_t pair = tile[bytes.at[a]];
        words[step] |= (pair & 15) << 4 * a | pair >> 4 << (16 + 4 * a);
      }
    }
    *packed = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    const uint4 four = *packed;
    const uint32_t words[int4::kSteps] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int step = 0; step < int4::kSteps; ++step) {
      const Bytes bytes(lane, step);
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const uint32_t pair = words[step] >> 4 * a;
        tile[bytes.at[a]] = static_cast<uint8_t>((pair & 15) | (pair >> 16 & 15) << 4);
      }
    }
    __syncwarp();
    uint8_t* target = static_cast<uint8_t*>(p.target);
    for_words([&](int in_tile, int64_t at, bool inside) {
      if (inside) *reinterpret_cast<uint32_t*>(target + at) = *reinterpret_cast<const uint32_t*>(tile + in_tile);
    });
  }
}

template <bool kPack>
Status run(const WeightPackParams& p, const Queue& queue) {
  const int64_t blocks = int4::strips(p.n) * int4::blocks(p.k);
  return launch_blocks(&pack_kernel<kPack>, (blocks + kWarps - 1) / kWarps, kMaxThreads, 0, queue, p);
}

}  // namespace

Status int4_pack(const WeightPackParams& p, const Queue& queue) { return run<true>(p, queue); }
Status int4_unpack(const WeightPackParams& p, const Queue& queue) { return run<false>(p, queue); }

}  // namespace qops::cuda
