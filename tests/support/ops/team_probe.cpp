// Runs teams (csrc/binding/team.h) on pools of every kind, and says how large they were: "<pool> <size>" a line.
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "binding/team.h"

namespace {

using qops::Team;
using Range = std::function<void(int64_t, int64_t)>;

// Each member adds to a sum that all of them read after each wait.
struct Work {
  static constexpr int kPhases = 50;

  int64_t sums[kPhases] = {};
  std::atomic<int> members{0};
  std::atomic<int> size{0};
  std::atomic<int> wrong{0};
  std::vector<int64_t> slots = std::vector<int64_t>(64);

  void run(const Team& team) {
    members += 1;
    size = team.size;
    for (int phase = 0; phase < kPhases; ++phase) {
      slots[static_cast<size_t>(team.rank)] = phase + team.rank;
      team.wait();
      int64_t sum = 0;
      for (int rank = 0; rank < team.size; ++rank) sum += slots[static_cast<size_t>(rank)];
      if (sum != team.size * (phase + (team.size - 1) / 2.0)) wrong += 1;
      team.wait();
    }
  }
};

template <class Pool>
bool show(const char* name, int most, const Pool& pool, int64_t patience_ns = qops::binding::Meeting::kPatienceNs) {
  Work work;
  const auto body = [](void* arg, const Team& team) { static_cast<Work*>(arg)->run(team); };
  qops::binding::run_team(pool, most, body, &work, patience_ns);
  std::printf("%s %d\n", name, work.size.load());
  return work.wrong == 0 && work.members == work.size && work.size >= 1 && work.size <= most;
}

void threads_of(int count, int64_t n, const Range& f) {
  std::vector<std::thread> threads;
  for (int i = 1; i < count; ++i) threads.emplace_back([&, i] { f(n * i / count, n * (i + 1) / count); });
  f(0, n / count);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  bool good = true;
  for (int repeat = 0; repeat < 20; ++repeat) {
    constexpr int64_t kForever = 60'000'000'000;
    good &= show("all", 4, [](int64_t n, const Range& f) { threads_of(4, n, f); }, kForever);
    good &= show("all of two", 2, [](int64_t n, const Range& f) { threads_of(2, n, f); }, kForever);
    good &= show("threads", 4, [](int64_t n, const Range& f) { threads_of(4, n, f); });
    good &= show("fewer", 5, [](int64_t n, const Range& f) { threads_of(2, n, f); });
    good &= show("one", 4, [](int64_t n, const Range& f) { f(0, n); });
    // A pool of tasks with one worker: chunk after chunk, in any order.
    good &= show("queue", 4, [](int64_t n, const Range& f) {
      for (int64_t i = 0; i < n; ++i) f(i, i + 1);
    });
    good &= show("backwards", 4, [](int64_t n, const Range& f) {
      for (int64_t i = n; i > 0; --i) f(i - 1, i);
    });
    good &= show("worker", 3, [](int64_t n, const Range& f) {
      std::thread([&] {
        for (int64_t i = 0; i < n; ++i) f(i, i + 1);
      }).join();
    });
    // A chunk that comes long after the gate has closed.
    good &= show("late", 2, [](int64_t, const Range& f) {
      std::thread late([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        f(1, 2);
      });
      f(0, 1);
      late.join();
    });
    // Several callers at once, each with threads of its own.
    std::vector<std::thread> callers;
    std::atomic<bool> all{true};
    for (int caller = 0; caller < 3; ++caller) {
      callers.emplace_back([&] {
        if (!show("callers", 3, [](int64_t n, const Range& f) { threads_of(3, n, f); })) all = false;
      });
    }
    for (std::thread& caller : callers) caller.join();
    good &= all;
  }
  return good ? 0 : 1;
}
