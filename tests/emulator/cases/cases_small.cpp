#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "emulator/cases/harness.h"
#include "emulator/cases/kernels/small.cuh"

namespace cases {
namespace {

void run_warp_results() {
  constexpr int kLanes = 32, kRow = small::kWarpResults;
  Random random(21);
  const auto x = generate(kLanes, [&] { return random.below(40) - 20; });
  auto y = poisoned<unsigned>(kLanes * kRow);
  launch(small::warp_results, 1, kLanes, 0, x.data(), y.data());
  Vector<unsigned> want;
  unsigned positive = 0, bits = 0;
  int sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (x[lane] > 0) positive |= 1u << lane;
    sum += x[lane];
    bits ^= static_cast<unsigned>(x[lane]);
  }
  const auto [least, most] = std::minmax_element(x.begin(), x.end());
  for (int lane = 0; lane < kLanes; ++lane) {
    const int low = lane / 8 * 8, high = low + 7;
    unsigned equal = 0;
    for (int other = 0; other < kLanes; ++other) equal |= static_cast<unsigned>(x[other] == x[lane]) << other;
    for (int value : {static_cast<int>(positive), static_cast<int>(std::count(x.begin(), x.end(), 3) > 0), 1,
                      static_cast<int>(equal), -1, 1, sum, *least, *most, static_cast<int>(bits),
                      x[lane + 3 <= high ? lane + 3 : lane], x[lane - 3 >= low ? lane - 3 : lane],
                      x[(lane ^ 9) <= high ? lane ^ 9 : lane], x[low + 3],
                      static_cast<int>(positive & (lane < 16 ? 0x0000ffffu : 0xffff0000u)), 1}) {
      want.push_back(static_cast<unsigned>(value));
    }
  }
  require_equal(y, want);
}

void run_counts() {
  constexpr int kBlocks = 3, kThreads = 48;
  Random random(22);
  const auto x = generate(kBlocks * kThreads, [&] { return random.below(40) - 20; });
  Vector<int> y(2 + 4 * kBlocks, 0), want(y.size(), 0);
  Vector<float> sums(1, 0.0f);
  Vector<unsigned long long> exchanged(1, 0);
  launch(small::counts, kBlocks, kThreads, 0, x.data(), y.data(), sums.data(), exchanged.data());
  for (int b = 0; b < kBlocks; ++b) {
    const auto begin = x.begin() + b * kThreads, end = begin + kThreads;
    want[2 + 4 * b] = static_cast<int>(std::count_if(begin, end, [](int v) { return v > 0; }));
    want[2 + 4 * b + 1] = 1;
    want[2 + 4 * b + 3] = *std::max_element(begin, end);
  }
  for (int v : x) {
    want[0] += v;
    want[1] = std::min(want[1], v);
  }
  require_equal(y, want);
  require_equal(sums, {static_cast<float>(want[0])});
  if (exchanged[0] < 1 || exchanged[0] > x.size()) throw WrongResult("no thread has won the exchange");
}

void run_conversions() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const Vector<float> x = {0.5f,
                           1.5f,
                           2.5f,
                           -0.5f,
                           -1.5f,
                           126.5f,
                           127.5f,
                           300.0f,
                           -128.5f,
                           -129.0f,
                           kInfinity,
                           -kInfinity,
                           std::numeric_limits<float>::quiet_NaN()};
  Vector<int> want = {0, 2, 2, 0, -2, 126, 127, 127, -128, -128, 127, -128, 0};
  for (std::size_t i = 0; i < x.size(); ++i) {
    want.push_back(0x56780000 | (want[x.size() - 1 - i] & 0xff) << 8 | (want[i] & 0xff));
  }
  auto y = poisoned<int>(2 * x.size());
  launch(small::conversions, 1, 32, 0, x.data(), y.data(), static_cast<int>(x.size()));
  require_equal(y, want);
}

// Within 2 ulp; nothing subnormal goes in or comes out.
void run_reciprocals() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const Vector<float> x = {1.0f,        -3.0f,     0x1.fffffep+5f, 0x1p+125f, -0x1p-126f,
                           0x1.8p+126f, 0x1p-127f, 0.0f,           -kInfinity};
  const Vector<float> want = {1.0f,      -1.0f / 3.0f, 1.0f / 0x1.fffffep+5f, 0x1p-125f, -0x1p+126f, 0.0f, kInfinity,
                              kInfinity, -0.0f};
  auto y = poisoned<float>(x.size());
  launch(small::reciprocals, 1, 32, 0, x.data(), y.data(), static_cast<int>(x.size()));
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (std::abs(y[i] - want[i]) <= std::abs(want[i]) * 0x1p-22f) y[i] = want[i];
  }
  require_equal(y, want);
}

// One step inside each limit, and one past it.
template <int kArch, int kGrid, int kThreads, int kSharedBytes>
void run_launch() {
  emu::options().arch = kArch;
  launch(small::nothing, dim3(1, kGrid), kThreads, kSharedBytes);
}

template <int kOffset>
void run_touches_shared() {
  launch(small::touches_shared_past_end, 1, 1, 33, kOffset);
}

#if !defined(__CUDACC__)
void run_wrong_space() {
  Vector<uint32_t> y(1);
  launch(small::loads_through_wrong_space, 1, 1, 0, y.data());
}

void run_registers() { launch(small::grows_registers_of_half_a_warp, 1, 32, 0); }
#endif

void run_no_policy() {
  Vector<uint4> x(1), y(1);
  launch(small::gives_no_policy, 1, 1, 0, x.data(), y.data());
}

constexpr int kKiB = 1024;

constexpr Case kCases[] = {
    {Kind::kSound, "warp_results", run_warp_results},
    {Kind::kSound, "counts", run_counts},
    {Kind::kSound, "conversions", run_conversions},
    {Kind::kSound, "reciprocals", run_reciprocals},
    {Kind::kSound, "launch_1024_threads", run_launch<90, 1, 1024, 0>},
    {Kind::kPlanted, "launch_1025_threads", run_launch<90, 1, 1025, 0>},
    {Kind::kPlanted, "launch_grid_too_high", run_launch<90, 65536, 32, 0>},
    {Kind::kSound, "launch_shared_of_sm_80", run_launch<80, 1, 32, 163 * kKiB>},
    {Kind::kPlanted, "launch_shared_past_sm_80", run_launch<80, 1, 32, 163 * kKiB + 1>},
    {Kind::kSound, "launch_shared_of_sm_90", run_launch<90, 1, 32, 227 * kKiB>},
    {Kind::kPlanted, "launch_shared_past_sm_120", run_launch<120, 1, 32, 100 * kKiB>},
    {Kind::kSound, "shared_last_byte", run_touches_shared<32>},
    {Kind::kPlanted, "shared_one_past_end", run_touches_shared<33>},
    {Kind::kPlanted, "shared_one_before", run_touches_shared<-1>},
    {Kind::kPlanted, "hint_without_policy", run_no_policy},
#if !defined(__CUDACC__)
    {Kind::kPlanted, "loads_shared_as_global", run_wrong_space},
    {Kind::kPlanted, "setmaxnreg_by_half_a_warp", run_registers},
#endif
};

}  // namespace

std::span<const Case> small_cases() { return kCases; }

}  // namespace cases
