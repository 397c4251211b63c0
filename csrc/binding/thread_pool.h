// torch's intra-op threads as the pool of the CPU's kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "binding/back_off.h"
#include "binding/team.h"

namespace qops::binding {

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
    others_.fetch_add(1, std::memory_order_relaxed);
    int64_t last = other_end_.load(std::memory_order_relaxed);
    while (last < end && !other_end_.compare_exchange_weak(last, end)) {
    }
  }

  // After the region.
  void tell(BackOff& listener) const {
    const int64_t other = other_end_.load(std::memory_order_relaxed);
    if (own_end_ == 0 || other == 0) return;
    const int64_t waited = std::min(std::abs(own_end_ - other), BackOff::kMostLostNs);
    listener.hear(own_end_, 1 + others_.load(std::memory_order_relaxed), waited, own_ns_);
  }

 private:
  inline static thread_local char marker_;
  const char* caller_ = &marker_;
  int64_t own_end_ = 0, own_ns_ = 0;
  std::atomic<int64_t> other_end_{0};
  std::atomic<int> others_{0};
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
    const Came came = binding::run_team(parallel_for, most, body, arg);
    const int64_t end = now_ns();
    back_off.hear(end, came.threads, came.waited_ns, end - begin - came.waited_ns);
  };
  const bool alone = back_off.has_run_alone() && back_off.runs_alone(now_ns());
  return {run, run_team, alone ? 1 : static_cast<int>(torch::stable::get_num_threads()), nullptr};
}

}  // namespace qops::binding
