// Threads of a pool that promises no threads, as a team whose members may wait for each other.
//
// at::parallel_for cuts its range by the threads that it gets, and those need not be as many as it says beforehand
// (OMP_THREAD_LIMIT, OMP_DYNAMIC, a region inside another one), nor run at the same time: a pool of tasks may run one
// chunk after another. So each chunk asks at a gate on the caller's stack. The first one to come waits a few
// microseconds for the others, then closes the gate; whoever comes later finds it closed and does nothing. All who came
// run, so they can wait for each other, with any pool.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "binding/back_off.h"
#include "kernels.h"

namespace qops::binding {

inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

class Meeting {
 public:
  // Opening a region takes 0.7 us where its threads are awake, so who has not come by then sleeps or is kept busy.
  static constexpr int64_t kPatienceNs = 5000;

  explicit Meeting(int64_t patience_ns) : patience_ns_(patience_ns) {}

  // The rank of who comes, or -1 after the gate has closed. `expected`: how many may come, to the best of one's
  // knowledge.
  int join(int64_t expected) {
    uint32_t state = gate_.load(std::memory_order_relaxed);
    do {
      if ((state & kClosed) != 0) return -1;
    } while (!gate_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel));
    if (state == 0) {
      close(expected);
    } else {
      wait_until([&] { return (gate_.load(std::memory_order_acquire) & kClosed) != 0; });
    }
    return static_cast<int>(state);
  }

  // After join().
  int size() const { return static_cast<int>(gate_.load(std::memory_order_relaxed) & ~kClosed); }

  // Returns when all who joined have called it.
  void meet() {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size())) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    wait_until([&] { return round_.load(std::memory_order_acquire) != round; });
  }

  // How long all others waited for one, where that was long enough to look at a clock. Of one time at most so much
  // counts: BackOff says why.
  int64_t waited_ns() const { return size() < 2 ? 0 : waited_ns_.load(std::memory_order_relaxed) / (size() - 1); }

 private:
  static constexpr uint32_t kClosed = uint32_t{1} << 31;
  // Some 20 us, by which all but a thread that lost its core has come.
  static constexpr int kSpins = 400;

  void close(int64_t expected) {
    const int64_t start = now_ns();
    while (size() < expected && now_ns() - start < patience_ns_) pause();
    gate_.fetch_or(kClosed, std::memory_order_acq_rel);
  }

  template <class Condition>
  void wait_until(const Condition& condition) {
    for (int i = 0; i < kSpins; ++i) {
      if (condition()) return;
      pause();
    }
    const int64_t start = now_ns();
    while (!condition()) sched_yield();
    waited_ns_.fetch_add(std::min(now_ns() - start, BackOff::kMostLostNs), std::memory_order_relaxed);
  }

  int64_t patience_ns_;
  std::atomic<uint32_t> gate_{0};
  std::atomic<int64_t> waited_ns_{0};
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

// Who came, and how long they waited.
struct Came {
  int threads;
  int64_t waited_ns;
};

// ThreadPool::run_team() on a pool whose parallel_for(n, f) calls f(begin, end) over ranges that cover [0, n).
template <class ParallelFor>
Came run_team(const ParallelFor& parallel_for, int most, ThreadPool::TeamBody body, void* arg,
              int64_t patience_ns = Meeting::kPatienceNs) {
  Meeting meeting(patience_ns);
  parallel_for(int64_t{most}, [&](int64_t begin, int64_t end) {
    const int64_t chunk = end - begin;
    const int rank = meeting.join((most + chunk - 1) / chunk);
    if (rank < 0) return;
    body(arg, Team{rank, meeting.size(), &meeting, [](void* at) { static_cast<Meeting*>(at)->meet(); }});
  });
  return {meeting.size(), meeting.waited_ns()};
}

}  // namespace qops::binding
