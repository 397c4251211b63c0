// Accesses whose cost is known, one a line, and behind each what the tracer has to count: instruction, wavefronts or
// sectors, and how many there would be at least. Then accesses that race, and such that do not. Read by
// tests/cuda/test_tracer.py.
#include <cstdio>

#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace {

using namespace qops;

constexpr int kWords = 64 * 32;

struct Memory {
  alignas(256) uint32_t x[kWords], y[kWords];
  alignas(256) uint32_t flag[1];
};

// One warp.
__global__ void costs(Memory* global) {
  QOPS_SHARED(uint32_t, shared, kWords);
  const uint32_t* const x = global->x;
  uint32_t* const y = global->y;
  const uint32_t lane = threadIdx.x;
  for (uint32_t i = lane; i < kWords; i += 32) shared[i] = i;  // shared store 4: 64 / 64
  __syncwarp();
  uint32_t sum = 0;

  sum += x[lane];                                             // global load 4: 4 / 4
  sum += x[lane + 1];                                         // global load 4: 5 / 4
  sum += x[2 * lane];                                         // global load 4: 8 / 4
  sum += x[8 * lane];                                         // global load 4: 32 / 4
  sum += x[5];                                                // global load 4: 1 / 1
  if (lane < 8) sum += x[lane + 8];                           // global load 4: 1 / 1
  sum += reinterpret_cast<const uint8_t*>(x)[lane];           // global load 1: 1 / 1
  const auto pair = reinterpret_cast<const uint2*>(x)[lane];  // global load 8: 8 / 8
  sum += pair.x ^ pair.y;
  const auto four = ptx::ld_nc(reinterpret_cast<const uint4*>(x) + lane);  // global ld.global.nc.v4: 16 / 16
  sum += four.x ^ four.y ^ four.z ^ four.w;
  const auto far = ptx::ld_nc(reinterpret_cast<const uint4*>(x) + 2 * lane);  // global ld.global.nc.v4: 32 / 16
  sum += far.x ^ far.y ^ far.z ^ far.w;
  for (uint32_t i = 0; i < 3 + lane % 2; ++i) sum += x[32 * i + lane];  // global load 4: 16 / 14

  sum += shared[lane];                                            // shared load 4: 1 / 1
  sum += shared[7];                                               // shared load 4: 1 / 1
  sum += shared[2 * lane];                                        // shared load 4: 2 / 1
  sum += shared[32 * lane];                                       // shared load 4: 32 / 1
  sum += shared[33 * lane];                                       // shared load 4: 1 / 1
  sum += reinterpret_cast<uint8_t*>(shared)[lane];                // shared load 1: 1 / 1
  const auto wide = reinterpret_cast<uint4*>(shared)[lane];       // shared load 16: 4 / 4
  const auto apart = reinterpret_cast<uint4*>(shared)[2 * lane];  // shared load 16: 8 / 4
  sum += wide.x ^ wide.w ^ apart.x ^ apart.w;
  uint32_t d[4];
  ptx::ldmatrix_x4(d, ptx::shared_address(shared + 4 * lane));  // shared ldmatrix.x4: 4 / 4
  sum += d[0] ^ d[3];
  ptx::ldmatrix_x4(d, ptx::shared_address(shared + 32 * lane));  // shared ldmatrix.x4: 32 / 4
  sum += d[0] ^ d[3];
  __syncwarp();
  const uint32_t to = ptx::shared_address(shared + 8 * lane);
  ptx::cp_async_cg(to, x + 4 * lane);  // shared cp.async: 8 / 4, global cp.async: 16 / 16
  ptx::cp_async_wait_all();
  __syncwarp();

  atomicAdd(&y[0], sum);  // global atomicAdd: 1 / 1
  __syncwarp();
  y[lane] = sum;                                                   // global store 4: 4 / 4
  y[256 + 4 * lane] = sum;                                         // global store 4: 16 / 4
  ptx::st_cs(reinterpret_cast<uint2*>(y + 512) + 2 * lane, pair);  // global st.global.cs.v2: 16 / 8
}

// Thread 0 of block 0 gives a word to thread 0 of block 1.
enum class Handover { kNone, kAcquireRelease, kFences, kFenceMissing };

template <Handover kHandover>
__global__ void hand_over(Memory* global) {
  constexpr bool kFenced = kHandover == Handover::kFences;
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    global->x[0] = 1;  // written
    if constexpr (kFenced || kHandover == Handover::kFenceMissing) __threadfence();
    if constexpr (kHandover == Handover::kAcquireRelease) {
      ptx::st_release(global->flag, 1);
    } else {
      atomicExch(global->flag, 1u);
    }
    return;
  }
  if constexpr (kHandover == Handover::kAcquireRelease) {
    while (ptx::ld_acquire(global->flag) == 0) {
    }
  } else {
    while (atomicAdd(global->flag, 0u) == 0) {
    }
  }
  if constexpr (kFenced) __threadfence();
  global->y[0] = global->x[0];  // read
}

Memory memory;

template <Handover kHandover>
void run(const char* name) {
  memory = {};
  static_cast<void>(cuda::launch(&hand_over<kHandover>, 2, 32, 0, cudaStream_t{}, &memory));
  for (const std::string& line : emu::take_trace()) std::printf("%s\t%s\n", name, line.c_str());
}

}  // namespace

int main() {
  emu::options().policy = emu::Policy::kFifo;
  emu::options().resident_blocks = 2;
  static_cast<void>(cuda::launch(&costs, 1, 32, 0, cudaStream_t{}, &memory));
  for (const std::string& line : emu::take_trace()) std::printf("costs\t%s\n", line.c_str());
  run<Handover::kNone>("none");
  run<Handover::kAcquireRelease>("acquire and release");
  run<Handover::kFences>("fences");
  run<Handover::kFenceMissing>("fence missing");
}
