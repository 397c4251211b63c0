// torch's intra-op threads as the pool of the CPU's kernels.
//
// On a machine that others use too, one of the threads may lose its core for milliseconds while the others wait for it
// in the operating system's or OpenMP's way: a token of 10 ms then takes 40. Who sees that lets all regions of the
// process run on the caller's thread for a while, longer if it happens again. No result depends on the threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "binding/team.h"

namespace qops::binding {

class BackOff {
 public:
  // A scheduler takes a core away for at least so long. Of longer regions the half: parts of one product are not even.
  static constexpr int64_t kLostNs = 1'000'000;
  static constexpr int64_t kShortestNs = 20'000'000;
  static constexpr int64_t kLongestNs = 320'000'000;
  static constexpr int kGoodRegions = 256;

  bool runs_alone() const {
    const int64_t until = alone_until_.load(std::memory_order_relaxed);
    return until != 0 && now_ns() < until;
  }

  // After a region of several threads: how long somebody waited for another one, and worked.
  void hear(int64_t waited_ns, int64_t worked_ns) {
    int64_t time = time_.load(std::memory_order_relaxed);
    if (waited_ns > kLostNs && waited_ns > worked_ns / 2) {
      alone_until_.store(now_ns() + time, std::memory_order_relaxed);
      time_.store(std::min(2 * time, kLongestNs), std::memory_order_relaxed);
      good_.store(0, std::memory_order_relaxed);
    } else if (time > kShortestNs && good_.fetch_add(1, std::memory_order_relaxed) + 1 >= kGoodRegions) {
      time_.store(std::max(time / 2, kShortestNs), std::memory_order_relaxed);
      good_.store(0, std::memory_order_relaxed);
    }
  }

 private:
  std::atomic<int64_t> alone_until_{0};
  std::atomic<int64_t> time_{kShortestNs};
  std::atomic<int> good_{0};
};

inline BackOff back_off;

// When the caller of a region and the last of the others were done with their parts.
class Ends {
 public:
  template <class Part>
  void time(const Part& part) {
    const bool is_caller = &marker_ == caller_;
    const int64_t begin = now_ns();
    part();
    const int64_t end = now_ns();
    if (is_caller) {
      own_end_ = end;
      own_ns_ += end - begin;
      return;
    }
    int64_t last = other_end_.load(std::memory_order_relaxed);
    while (last < end && !other_end_.compare_exchange_weak(last, end)) {
    }
  }

  // After the region.
  void tell(BackOff& listener) const {
    const int64_t other = other_end_.load(std::memory_order_relaxed);
    if (own_end_ != 0 && other != 0) listener.hear(std::abs(own_end_ - other), own_ns_);
  }

 private:
  inline static thread_local char marker_;
  const char* caller_ = &marker_;
  int64_t own_end_ = 0, own_ns_ = 0;
  std::atomic<int64_t> other_end_{0};
};

inline ThreadPool thread_pool() {
  const auto run = [](int64_t n, int64_t grain, ThreadPool::Body body, void* arg) {
    Ends ends;
    torch::stable::parallel_for(0, n, grain,
                                [&](int64_t begin, int64_t end) { ends.time([&] { body(arg, begin, end); }); });
    ends.tell(back_off);
  };
  const auto run_team = [](int most, ThreadPool::TeamBody body, void* arg) {
    const auto parallel_for = [](int64_t n, const auto& f) { torch::stable::parallel_for(0, n, 1, f); };
    const int64_t begin = now_ns();
    const int64_t waited = binding::run_team(parallel_for, most, body, arg);
    back_off.hear(waited, now_ns() - begin - waited);
  };
  const int threads = back_off.runs_alone() ? 1 : static_cast<int>(torch::stable::get_num_threads());
  return {run, run_team, threads, nullptr};
}

}  // namespace qops::binding
