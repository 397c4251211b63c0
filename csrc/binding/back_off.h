// When the threads of a process have a neighbour on their cores, and one thread does better.
//
// A scheduler takes a core away for milliseconds, and the others wait for its thread: a token of 10 ms may take 40.
// Now and then that happens on every machine that others use too, and costs less than what several threads gain between
// two times. So what counts is the balance: what regions of several threads have waited, less what they have gained
// against one thread. Who is too far behind lets all regions of the process run on the caller's thread for a while,
// longer if it happens again. No result depends on the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace qops::binding {

class BackOff {
 public:
  // Less is the uneven end of a region, or a thread that had to wake.
  static constexpr int64_t kLostNs = 500'000;
  // More in one piece is no neighbour on the core, but a process that was stopped.
  static constexpr int64_t kMostLostNs = 8'000'000;
  static constexpr int64_t kDebtNs = 10'000'000;
  static constexpr int64_t kShortestNs = 20'000'000;
  static constexpr int64_t kLongestNs = 320'000'000;
  // After so long without, it begins with the shortest time.
  static constexpr int64_t kForgottenNs = 500'000'000;

  bool has_run_alone() const { return alone_until_.load(std::memory_order_relaxed) != 0; }
  bool runs_alone(int64_t now) const { return now < alone_until_.load(std::memory_order_relaxed); }

  // At the end of a region of so many threads: how long they waited for one of them, and the caller worked.
  void hear(int64_t now, int threads, int64_t waited_ns, int64_t worked_ns) {
    const int64_t lost = waited_ns < kLostNs ? 0 : waited_ns;
    int64_t debt = debt_.load(std::memory_order_relaxed);
    if (lost == 0 && debt == 0) return;
    debt = std::max<int64_t>(0, debt + lost - worked_ns * (threads - 1));
    if (debt > kDebtNs) {
      debt = 0;
      const int64_t before = alone_until_.load(std::memory_order_relaxed), time = time_.load(std::memory_order_relaxed);
      const int64_t next = now - before > kForgottenNs ? kShortestNs : std::min(2 * time, kLongestNs);
      time_.store(next, std::memory_order_relaxed);
      alone_until_.store(now + next, std::memory_order_relaxed);
    }
    debt_.store(debt, std::memory_order_relaxed);
  }

 private:
  std::atomic<int64_t> alone_until_{0};
  std::atomic<int64_t> time_{0};
  std::atomic<int64_t> debt_{0};
};

}  // namespace qops::binding
