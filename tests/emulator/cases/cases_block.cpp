#include <numeric>

#include "emulator/cases/harness.h"
#include "emulator/cases/kernels/dependent.cuh"
#include "emulator/cases/kernels/handoff.cuh"
#include "emulator/cases/kernels/row_sums.cuh"
#include "emulator/cases/kernels/scan.cuh"
#include "emulator/cases/kernels/split_sum.cuh"
#include "emulator/cases/kernels/transpose.cuh"

namespace cases {
namespace {

template <row_sums::Bug kBug, int kStride = 72>
void run_row_sums() {
  constexpr int kRows = 5, kColumns = 72;
  Random random(1);
  // The last row ends where the allocation does.
  const auto x = generate((kRows - 1) * kStride + kColumns, [&] { return random.integer(); });
  auto y = poisoned<float>(kRows * row_sums::kWarps);
  launch(row_sums::row_sums<kBug>, 2, row_sums::kThreads, 0, x.data(), y.data(), kRows, kColumns, kStride);
  Vector<float> want;
  for (int r = 0; r < kRows; ++r) {
    const auto row = x.begin() + r * kStride;
    want.insert(want.end(), row_sums::kWarps, std::accumulate(row, row + kColumns, 0.0f));
  }
  require_equal(y, want);
}

template <transpose::Bug kBug>
void run_transpose() {
  constexpr int kM = 40, kN = 50;
  Random random(2);
  const auto x = generate(kM * kN, [&] { return random.integer(); });
  auto y = poisoned<float>(kM * kN);
  launch(transpose::transpose<kBug>, dim3(2, 2), dim3(transpose::kTile, transpose::kRows), 0, x.data(), y.data(), kM,
         kN);
  Vector<float> want(kM * kN);
  for (int r = 0; r < kM; ++r) {
    for (int c = 0; c < kN; ++c) want[c * kM + r] = x[r * kN + c];
  }
  require_equal(y, want);
}

template <scan::Bug kBug>
void run_scan() {
  constexpr int kBlocks = 3;
  Random random(3);
  const auto x = generate(kBlocks * scan::kThreads, [&] { return random.below(100) + 1; });
  auto y = poisoned<int>(x.size());
  launch(scan::scan<kBug>, kBlocks, scan::kThreads, 0, x.data(), y.data());
  Vector<int> want(x.size());
  for (int b = 0; b < kBlocks; ++b) {
    const auto begin = x.begin() + b * scan::kThreads;
    std::partial_sum(begin, begin + scan::kThreads, want.begin() + b * scan::kThreads);
  }
  require_equal(y, want);
}

template <split_sum::Bug kBug>
void run_split_sum() {
  constexpr int kTiles = 3, kSplits = 4, kColumns = 5, kThreads = split_sum::kThreads;
  constexpr int kPerTile = kSplits * kColumns * kThreads;
  auto partial = poisoned<float>(kTiles * kSplits * kThreads);
  Vector<uint32_t> counter(kTiles, 0);
  for (int repeat = 0; repeat < 2; ++repeat) {
    Random random(4 + static_cast<uint64_t>(repeat));
    const auto x = generate(kTiles * kPerTile, [&] { return random.integer(); });
    auto y = poisoned<float>(kTiles * kThreads);
    launch(split_sum::split_sum<kBug>, dim3(kTiles, kSplits), kThreads, 0, x.data(), partial.data(), counter.data(),
           y.data(), kColumns);
    Vector<float> want(kTiles * kThreads, 0.0f);
    for (int i = 0; i < kTiles * kPerTile; ++i) want[i / kPerTile * kThreads + i % kThreads] += x[i];
    require_equal(y, want);
  }
}

template <handoff::Bug kBug>
void run_handoff() {
  constexpr int kTiles = 6;
  Random random(6);
  const auto x = generate(kTiles * 32, [&] { return random.integer(); });
  auto y = poisoned<float>(x.size());
  launch(handoff::handoff<kBug>, 1, handoff::kThreads, 0, x.data(), y.data(), kTiles);
  Vector<float> want = x;
  for (float& v : want) v *= 2;
  require_equal(y, want);
}

template <dependent::Bug kBug, int kArch = 90, int kCodeArch = 0>
void run_dependent() {
  constexpr int kParts = 5, kColumns = 3, kRows = 40;
  emu::options().arch = kArch;
  emu::options().code_arch = kCodeArch;
  Random random(7);
  const auto x = generate(kParts * kColumns * kRows, [&] { return random.integer(); });
  auto parts = poisoned<float>(kParts * kRows), y = poisoned<float>(kRows);
  launch_first(dependent::sum_parts<kBug>, kParts, dependent::kThreads, 0, x.data(), parts.data(), kColumns, kRows);
  launch_dependent(dependent::add_parts<kBug>, 1, dependent::kThreads, 0, parts.data(), y.data(), kParts, kRows);
  Vector<float> want(kRows, 0.0f);
  for (int i = 0; i < kParts * kColumns * kRows; ++i) want[i % kRows] += x[i];
  require_equal(y, want);
}

constexpr Case kCases[] = {
    {Kind::kSound, "dependent", run_dependent<dependent::Bug::kNone>},
    {Kind::kSound, "dependent_nobody_told", run_dependent<dependent::Bug::kNobodyTold>},
    {Kind::kSound, "dependent_on_sm_80", run_dependent<dependent::Bug::kNone, 80>},
    {Kind::kSound, "dependent_of_older_code", run_dependent<dependent::Bug::kNone, 100, 80>},
    {Kind::kPlanted, "dependent_no_wait", run_dependent<dependent::Bug::kNoWait>},
    {Kind::kPlanted, "dependent_idle_threads_leave", run_dependent<dependent::Bug::kIdleThreadsLeave>},
    {Kind::kPlanted, "dependent_reads_before", run_dependent<dependent::Bug::kReadsBefore>},
    {Kind::kPlanted, "dependent_loads_before", run_dependent<dependent::Bug::kLoadsBefore>},
    {Kind::kPlanted, "dependent_writes_before", run_dependent<dependent::Bug::kWritesBefore>},
    {Kind::kSound, "row_sums", run_row_sums<row_sums::Bug::kNone>},
    {Kind::kSound, "row_sums_odd_stride", run_row_sums<row_sums::Bug::kNone, 73>},
    {Kind::kPlanted, "row_sums_missing_barrier", run_row_sums<row_sums::Bug::kMissingBarrier>},
    {Kind::kPlanted, "row_sums_missing_reuse_barrier", run_row_sums<row_sums::Bug::kMissingReuseBarrier>},
    {Kind::kPlanted, "row_sums_barrier_in_branch", run_row_sums<row_sums::Bug::kBarrierInBranch>},
    {Kind::kPlanted, "row_sums_shuffle_in_branch", run_row_sums<row_sums::Bug::kShuffleInBranch>},
    {Kind::kPlanted, "row_sums_lane_outside_mask", run_row_sums<row_sums::Bug::kLaneOutsideMask>},
    {Kind::kPlanted, "row_sums_width_not_power_of_two", run_row_sums<row_sums::Bug::kWidthNotPowerOfTwo>},
    {Kind::kPlanted, "row_sums_vector_past_end", run_row_sums<row_sums::Bug::kVectorPastEnd>},
    {Kind::kPlanted, "row_sums_misaligned_vectors", run_row_sums<row_sums::Bug::kMisalignedVectors, 73>},
    {Kind::kSound, "transpose", run_transpose<transpose::Bug::kNone>},
    {Kind::kPlanted, "transpose_missing_barrier", run_transpose<transpose::Bug::kMissingBarrier>},
    {Kind::kPlanted, "transpose_row_past_end", run_transpose<transpose::Bug::kRowPastEnd>},
    {Kind::kPlanted, "transpose_unpadded_tile", run_transpose<transpose::Bug::kUnpaddedTile>},
    {Kind::kPlanted, "transpose_static_past_limit", run_transpose<transpose::Bug::kStaticPastLimit>},
    {Kind::kSound, "scan", run_scan<scan::Bug::kNone>},
    {Kind::kPlanted, "scan_no_bound", run_scan<scan::Bug::kNoBound>},
    {Kind::kPlanted, "scan_missing_barrier", run_scan<scan::Bug::kMissingBarrier>},
    {Kind::kPlanted, "scan_divergent_collective", run_scan<scan::Bug::kDivergentCollective>},
    {Kind::kPlanted, "scan_reads_exited_lane", run_scan<scan::Bug::kReadsExitedLane>},
    {Kind::kSound, "split_sum", run_split_sum<split_sum::Bug::kNone>},
    {Kind::kPlanted, "split_sum_missing_barrier", run_split_sum<split_sum::Bug::kMissingBarrier>},
    {Kind::kPlanted, "split_sum_missing_flag_barrier", run_split_sum<split_sum::Bug::kMissingFlagBarrier>},
    {Kind::kPlanted, "split_sum_counter_not_reset", run_split_sum<split_sum::Bug::kCounterNotReset>},
    {Kind::kPlanted, "split_sum_one_early", run_split_sum<split_sum::Bug::kOneEarly>},
    {Kind::kPlanted, "split_sum_waits_for_all_blocks", run_split_sum<split_sum::Bug::kWaitsForAllBlocks>},
    {Kind::kSound, "handoff", run_handoff<handoff::Bug::kNone>},
    {Kind::kPlanted, "handoff_no_wait_for_empty", run_handoff<handoff::Bug::kNoWaitForEmpty>},
    {Kind::kPlanted, "handoff_no_arrival", run_handoff<handoff::Bug::kNoArrival>},
    {Kind::kPlanted, "handoff_counts_differ", run_handoff<handoff::Bug::kCountsDiffer>},
    {Kind::kPlanted, "handoff_count_too_large", run_handoff<handoff::Bug::kCountTooLarge>},
    {Kind::kPlanted, "handoff_count_not_warps", run_handoff<handoff::Bug::kCountNotWarps>},
    {Kind::kPlanted, "handoff_seventeenth_barrier", run_handoff<handoff::Bug::kSeventeenth>},
};

}  // namespace

std::span<const Case> block_cases() { return kCases; }

}  // namespace cases
