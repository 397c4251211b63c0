// y[8 i + j] = nibble j of packed[i] - 8, as fp16: lop3 puts a nibble into the mantissa of 1024.
#pragma once

#include "cuda/ptx.cuh"

namespace dequantize {

using namespace qops;

enum class Bug {
  kNone,
  kWrongMask,      // one bit too wide
  kWrongTable,     // (a | b) & c
  kWrongSelector,  // of the byte permutation that puts neighbours together
};

template <Bug kBug>
__global__ void dequantize(const uint32_t* packed, uint32_t* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  constexpr uint32_t kMask = kBug == Bug::kWrongMask ? 0x001f001f : 0x000f000f;
  constexpr uint32_t kMagic = 0x64006400;  // two times 1024
  constexpr int kTable = kBug == Bug::kWrongTable ? (0xf0 | 0xcc) & 0xaa : (0xf0 & 0xcc) | 0xaa;
  const __half2 offset = __halves2half2(__float2half(1032.0f), __float2half(1032.0f));
  uint32_t pairs[4];  // nibbles j and j + 4
  for (int j = 0; j < 4; ++j) {
    const uint32_t bits = ptx::lop3<kTable>(packed[i] >> (4 * j), kMask, kMagic);
    const __half2 value = __hsub2(*reinterpret_cast<const __half2*>(&bits), offset);
    pairs[j] = *reinterpret_cast<const uint32_t*>(&value);
  }
  constexpr uint32_t kHigh = kBug == Bug::kWrongSelector ? 0x7623 : 0x7632;
  uint4 out;
  out.x = ptx::prmt(pairs[0], pairs[1], 0x5410);
  out.y = ptx::prmt(pairs[2], pairs[3], 0x5410);
  out.z = ptx::prmt(pairs[0], pairs[1], kHigh);
  out.w = ptx::prmt(pairs[2], pairs[3], kHigh);
  ptx::st_cs(reinterpret_cast<uint4*>(y) + i, out);
}

}  // namespace dequantize
