// y = 2 x through a ring of cp.async stages, each tile reversed and reversed back, so that every thread reads what
// another one has copied.
#pragma once

#include "cuda/ptx.cuh"

namespace pipeline {

using namespace qops;

enum class Bug {
  kNone,
  kWaitsTooLittle,         // one group more may be in flight than is legal
  kMissingBarrier,         // each thread waits for its own copies alone
  kRefillsStageBeingRead,  // the stage of this tile instead of the one before
  kMissingCommit,          // wait_group does not cover what no group holds
  kNoFinalWait,            // exits with copies in flight
  kTailReadWhole,          // no zero fill: reads past the end of x
  kTailSizeTooLarge,       // asks for more source bytes than are copied
  kMisalignedSource,
  kMisalignedDestination,
  kWritesSource,       // x changes while it is copied
  kWritesDestination,  // stores into a stage that a copy fills
};

constexpr int kThreads = 64;
constexpr int kStages = 3;
constexpr int kTile = kThreads * 4;  // floats: 16 bytes per thread

template <Bug kBug>
__device__ void issue(float* stage, float* x, int tile, int tiles, int n) {
  const int i = tile * kTile + 4 * static_cast<int>(threadIdx.x);
  float* const slot = stage + 4 * threadIdx.x;
  if (tile < tiles) {
    const int left = n - i > 0 ? n - i : 0;
    uint32_t bytes = left < 4 ? 4 * left : 16;
    if constexpr (kBug == Bug::kTailReadWhole) bytes = 16;
    if constexpr (kBug == Bug::kTailSizeTooLarge) bytes = bytes < 16 ? 32 : 16;
    const float* source = left > 0 || kBug == Bug::kTailReadWhole ? x + i : x;
    if constexpr (kBug == Bug::kMisalignedSource) source = x + 1;
    const uint32_t shared = ptx::shared_address(slot) + (kBug == Bug::kMisalignedDestination ? 8 : 0);
    ptx::cp_async_cg_zfill(shared, source, bytes);
    if constexpr (kBug == Bug::kWritesSource) {
      if (i < n) x[i] += 1;
    }
    if constexpr (kBug == Bug::kWritesDestination) slot[0] = 0;
  }
  if constexpr (kBug != Bug::kMissingCommit) ptx::cp_async_commit();
}

template <Bug kBug>
__global__ void pipeline(float* x, float* y, int n) {
  QOPS_DYNAMIC_SHARED(bytes);
  auto* const ring = reinterpret_cast<float*>(bytes);
  const int tiles = (n + kTile - 1) / kTile;
  for (int tile = 0; tile < kStages - 1; ++tile) issue<kBug>(ring + tile * kTile, x, tile, tiles, n);
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::cp_async_wait<kBug == Bug::kWaitsTooLittle ? kStages - 1 : kStages - 2>();
    // This tile is there for all threads, and all of them have read the tile before, whose stage is filled next.
    if constexpr (kBug != Bug::kMissingBarrier) __syncthreads();
    const int next = tile + kStages - 1;
    const int refilled = kBug == Bug::kRefillsStageBeingRead ? tile % kStages : next % kStages;
    issue<kBug>(ring + refilled * kTile, x, next, tiles, n);
    const float* const stage = ring + tile % kStages * kTile;
    for (int j = threadIdx.x; j < kTile; j += kThreads) {
      const int mirrored = kTile - 1 - j;
      const int i = tile * kTile + mirrored;
      if (i < n) y[i] = 2 * stage[mirrored];
    }
  }
  // The groups that are still open hold nothing.
  if constexpr (kBug == Bug::kNoFinalWait) issue<kBug>(ring, x, 0, tiles, n);
}

}  // namespace pipeline
