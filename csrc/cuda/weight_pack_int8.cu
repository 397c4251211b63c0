// int8_pack and int8_unpack: canonical codes [N, K] <-> the layout of int8_layout.h.
//
// Bound by memory: each byte is read once and written once. A warp turns one fragment of 16 rows x 32 columns; its
// lanes move words of four columns, which lie in 16 sectors of 32 bytes there (two instructions use each of them up)
// and in one range of 512 bytes here.
#include "cuda/row.cuh"
#include "int8_layout.h"

namespace qops::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kWarps = kMaxThreads / kWarp;

template <bool kPack>
__global__ void __launch_bounds__(kMaxThreads) int8_pack_kernel(const __grid_constant__ WeightPackParams p) {
  const int64_t fragments_of_strip = int8::blocks(p.k) * int8::kFragments;
  const int64_t fragment = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (fragment >= int8::strips(p.n) * fragments_of_strip) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t first_row = fragment / fragments_of_strip * kStripRows;
  const int64_t first_column = fragment % fragments_of_strip * int8::kFragmentColumns;
  // Calls f(register, byte of its four codes in the canonical weight, whether they are in it).
  const auto for_words = [&](const auto& f) {
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const int8::Code first = int8::code_of({lane, a, 0});
      const int64_t row = first_row + first.row, column = first_column + first.column;
      f(a, row * p.k + column, row < p.n && column < p.k);
    }
  };
  const int64_t at = fragment * int8::kFragmentBytes + lane * int8::kLaneBytes;
  if constexpr (kPack) {
    const uint8_t* source = static_cast<const uint8_t*>(p.source);
    const bool aligned = reinterpret_cast<uintptr_t>(source) % 4 == 0;  // rows take a multiple of 8 bytes
    uint32_t words[4] = {};
    for_words([&](int a, int64_t byte, bool inside) {
      if (!inside) return;
      if (aligned) {
        words[a] = *reinterpret_cast<const uint32_t*>(source + byte);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) words[a] |= static_cast<uint32_t>(source[byte + i]) << 8 * i;
      }
    });
    *reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.target) + at) =
        make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    const uint4 four = *reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(p.source) + at);
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
    for_words([&](int a, int64_t byte, bool inside) {
      if (inside) *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.target) + byte) = words[a];
    });
  }
}

template <bool kPack>
Status run(const WeightPackParams& p, const Queue& queue) {
  const int64_t fragments = int8::strips(p.n) * int8::blocks(p.k) * int8::kFragments;
  return launch_blocks(&int8_pack_kernel<kPack>, (fragments + kWarps - 1) / kWarps, kMaxThreads, 0, queue, p);
}

}  // namespace

Status int8_pack(const WeightPackParams& p, const Queue& queue) { return run<true>(p, queue); }
Status int8_unpack(const WeightPackParams& p, const Queue& queue) { return run<false>(p, queue); }

}  // namespace qops::cuda
