// What regions of threads tell csrc/binding/back_off.h, and when it lets them run alone: returns the line of what is
// not so.
#include "binding/back_off.h"

#define CHECK(condition) \
  if (!(condition)) return __LINE__

namespace {

using qops::binding::BackOff;
constexpr int64_t kMs = 1'000'000;

// Regions of 2 ms by two threads, in each of which one is waited for so long, until it runs alone: how many.
int regions_until_alone(BackOff& back_off, int64_t& now, int64_t waited, int64_t worked = 2 * kMs, int threads = 2) {
  for (int count = 1; count <= 1000; ++count) {
    now += worked + waited;
    back_off.hear(now, threads, waited, worked);
    if (back_off.runs_alone(now)) return count;
  }
  return 0;
}

int64_t alone_ms(const BackOff& back_off, int64_t now) {
  int64_t ms = 0;
  while (back_off.runs_alone(now + ms * kMs)) ++ms;
  return ms;
}

}  // namespace

int main() {
  int64_t now = 1000 * kMs;
  {
    BackOff back_off;
    back_off.hear(now, 2, BackOff::kMostLostNs, 0);
    CHECK(!back_off.runs_alone(now) && !back_off.has_run_alone());  // once is nothing
    back_off.hear(now, 2, BackOff::kMostLostNs, 0);
    CHECK(back_off.runs_alone(now) && back_off.has_run_alone() && !back_off.runs_alone(now + BackOff::kShortestNs));
  }
  {
    BackOff back_off;
    CHECK(regions_until_alone(back_off, now, 0) == 0);
    CHECK(regions_until_alone(back_off, now, kMs * 4 / 10) == 0);         // uneven parts
    CHECK(regions_until_alone(back_off, now, 400'000, 10'000) == 0);      // of small ones
    CHECK(regions_until_alone(back_off, now, 2 * kMs) == 0);              // half a core is as good as one thread
    CHECK(regions_until_alone(back_off, now, 5 * kMs, 2 * kMs, 4) == 0);  // of four threads, two more are left
    CHECK(regions_until_alone(back_off, now, kMs, 0, 1) == 11);           // nobody came
    now += 1000 * kMs;
    CHECK(regions_until_alone(back_off, now, 3 * kMs) == 11);
    now += 1000 * kMs;
    CHECK(regions_until_alone(back_off, now, 6 * kMs) == 3);
  }
  {
    BackOff back_off;
    for (const int64_t ms : {20, 40, 80, 160, 320, 320}) {
      regions_until_alone(back_off, now, 6 * kMs);
      CHECK(alone_ms(back_off, now) == ms);
      now += ms * kMs;
    }
    now += 600 * kMs;
    regions_until_alone(back_off, now, 6 * kMs);
    CHECK(alone_ms(back_off, now) == 20);
  }
  {
    BackOff back_off;  // what was lost is earned again
    for (int i = 0; i < 1000; ++i) {
      now += 10 * kMs;
      back_off.hear(now, 2, i % 4 == 0 ? 5 * kMs : 0, 2 * kMs);
      CHECK(!back_off.runs_alone(now));
    }
  }
  return 0;
}
