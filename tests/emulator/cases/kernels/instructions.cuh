// Each kernel moves data through every form of one family of instructions, and a host loop says what must come out.
#pragma once

#include "cuda/ptx.cuh"

namespace instructions {

using namespace qops;

constexpr int kCopyBytes = 96;

// y = the bytes of x that each form of cp.async copies, zeros where it fills.
__global__ void copies(const uint8_t* x, uint4* y, uint32_t size) {
  QOPS_SHARED(uint4, target, kCopyBytes / 16);
  const uint32_t to = ptx::shared_address(target);
  const auto store = [&](int i) {
    const uint4 bytes = target[i];
    ptx::st_cs(y + i, bytes);
  };
  ptx::prefetch_l2(x);
  if (threadIdx.x == 0) {
    ptx::cp_async_ca<4>(to, x);
    ptx::cp_async_ca_zfill<4>(to + 4, x + 4, size < 4 ? size : 4);
    ptx::cp_async_ca<8>(to + 8, x + 8);
    ptx::cp_async_commit();
    ptx::cp_async_ca_zfill<8>(to + 16, x + 16, size < 8 ? size : 8);
    ptx::cp_async_ca_zfill<8>(to + 24, x + 24, 0);
    ptx::cp_async_ca<16>(to + 32, x + 32);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    store(0);
    ptx::cp_async_ca_zfill<16>(to + 48, x + 48, size);
    ptx::cp_async_cg(to + 64, x + 64);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    for (int i = 1; i < 5; ++i) store(i);
    ptx::cp_async_cg_zfill_hint(to + 80, x + 80, size, ptx::policy_evict_last());
    ptx::cp_async_wait_all();
    store(5);
  }
}

// y = x through every width of ldmatrix and stmatrix, straight and transposed twice: 7 matrices of 8 x 8 each time;
// then by words of 8 bytes.
__global__ void matrices(const uint16_t* x, uint16_t* y) {
  constexpr int kElements = 7 * 64;
  QOPS_SHARED(uint16_t, from, kElements);
  QOPS_SHARED(uint16_t, to, 2 * kElements);
  for (int i = threadIdx.x; i < kElements; i += 32) from[i] = x[i];
  __syncwarp();
  const auto row = [](uint16_t* matrices, int first, int count) {
    return ptx::shared_address(matrices + first * 64 + threadIdx.x % (8 * count) * 8);
  };
  uint32_t one[1], two[2], four[4];
  ptx::ldmatrix_x1(one, row(from, 0, 1));
  ptx::ldmatrix_x2(two, row(from, 1, 2));
  ptx::ldmatrix_x4(four, row(from, 3, 4));
  ptx::stmatrix_x1(row(to, 0, 1), one);
  ptx::stmatrix_x2(row(to, 1, 2), two);
  ptx::stmatrix_x4(row(to, 3, 4), four);
  ptx::ldmatrix_x1_trans(one, row(from, 0, 1));
  ptx::ldmatrix_x2_trans(two, row(from, 1, 2));
  ptx::ldmatrix_x4_trans(four, row(from, 3, 4));
  ptx::stmatrix_x1_trans(row(to + kElements, 0, 1), one);
  ptx::stmatrix_x2_trans(row(to + kElements, 1, 2), two);
  ptx::stmatrix_x4_trans(row(to + kElements, 3, 4), four);
  __syncwarp();
  for (int i = threadIdx.x; i < kElements / 2; i += 32) {
    uint32_t words[2];
    ptx::ld_shared(words, ptx::shared_address(to + 4 * i));
    reinterpret_cast<uint2*>(y)[i] = make_uint2(words[0], words[1]);
  }
}

// y = x by loads and stores of every width and hint: 4, 8 and three times 16 bytes, from offsets 0, 8, 16, 32 and 48.
__global__ void hints(const uint32_t* x, uint32_t* y) {
  if (threadIdx.x != 0) return;
  const auto* x16 = reinterpret_cast<const uint4*>(x + 4);
  auto* y16 = reinterpret_cast<uint4*>(y + 4);
  ptx::st_cs(y, ptx::ld_nc(x));
  ptx::st_cs(reinterpret_cast<uint2*>(y + 2), ptx::ld_nc(reinterpret_cast<const uint2*>(x + 2)));
  ptx::st_cs(y16, ptx::ld_nc(x16));
  ptx::st_cs(y16 + 1, ptx::ld_nc_no_allocate(x16 + 1));
  ptx::st_hint(y16 + 2, ptx::ld_nc_no_allocate_hint(x16 + 2, ptx::policy_evict_first()), ptx::policy_evict_last());
  y[1] = x[1];
}

// A message from warp 0 to all the others: word, then flag. Each receiver counts itself in.
__global__ void message(uint32_t* word, uint32_t* flag, uint32_t* received, uint32_t* y) {
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 != 0) return;
  if (warp == 0) {
    *word = 42;
    ptx::st_release(flag, 1);
    while (ptx::ld_acquire(received) < blockDim.x / 32 - 1) ptx::nanosleep(20);
    y[0] = *word;
  } else {
    while (ptx::ld_acquire(flag) == 0) {
    }
    y[warp] = *word + static_cast<uint32_t>(clock64() > 0);
    ptx::red_release_add(received, 1);
  }
}

// What sm_90a alone has: two warpgroups that move registers from one to the other.
__global__ void __launch_bounds__(256, 1) registers(int* y) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<40>();
  } else {
    ptx::setmaxnreg_inc<232>();
  }
#endif
  y[threadIdx.x] = static_cast<int>(threadIdx.x);
}

}  // namespace instructions
