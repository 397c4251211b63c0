// What lanes of a warp do together.
#include <algorithm>
#include <bit>
#include <cstring>

#include "emulator/tracer/tracer.h"

namespace emu {
namespace {

// Lanes that the meeting still waits for.
uint32_t missing(const Warp& warp, const Meeting& meeting) {
  return meeting.collective.mask & warp.live & ~meeting.arrived;
}

void complete(Warp& warp, std::size_t i) {
  // combine() may not see the meeting: it can start the next one.
  const Meeting meeting = warp.meetings[i];
  warp.meetings.erase(warp.meetings.begin() + static_cast<std::ptrdiff_t>(i));
  if (kTraced && meeting.arrived == warp.live) trace::converge(warp);
  const bool go_on = meeting.combine == nullptr || meeting.combine(meeting.args.data(), meeting.arrived, meeting.at);
  if (go_on) warp.ready |= meeting.arrived;
}

void require_agreement(const Collective& mine, const Meeting& theirs, const Thread& self, const Site& at) {
  const Collective& other = theirs.collective;
  const int lane = std::countr_zero(theirs.arrived);
  const char* difference = nullptr;
  if (std::strcmp(mine.name, other.name) != 0) {
    difference = "another collective";
  } else if (mine.qualifier != other.qualifier) {
    difference = "other qualifiers";
  } else if (mine.one_place && (at.line() != theirs.at.line() || std::strcmp(at.file_name(), theirs.at.file_name()))) {
    difference = "another place, which an .aligned instruction may not be at";
  }
  if (difference == nullptr) return;
  fault(at, "divergent collective: lane %d is in %s, lane %d of the same mask 0x%08x is in %s at %s: %s",
        self.indices.lane, mine.name, lane, mine.mask, other.name, to_text(theirs.at).c_str(), difference);
}

}  // namespace

void meet(const Collective& collective, void* args, Combine combine, const Site& at) {
  Thread& self = *t_scheduler->current;
  Warp& warp = *self.warp;
  if (!(collective.mask & self.bit())) {
    fault(at, "%s: lane %d calls it with the mask 0x%08x, which it is not in", collective.name, self.indices.lane,
          collective.mask);
  }
  if (collective.whole_warp && warp.live != 0xffffffff) {
    fault(at, "%s: needs all 32 lanes of the warp, 0x%08x are there", collective.name, warp.live);
  }
  auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(),
                              [&](const Meeting& m) { return m.collective.mask == collective.mask; });
  if (meeting == warp.meetings.end()) {
    warp.meetings.push_back({collective, combine, 0, at, {}});
    meeting = std::prev(warp.meetings.end());
  } else {
    require_agreement(collective, *meeting, self, at);
  }
  meeting->arrived |= self.bit();
  meeting->args[static_cast<std::size_t>(self.indices.lane)] = args;
  self.waits_in = collective.name;
  self.waits_at = at;
  self.waits_mask = collective.mask;
  self.waits_barrier = -1;
  if (missing(warp, *meeting) == 0) complete(warp, static_cast<std::size_t>(meeting - warp.meetings.begin()));
  // The last lane to come is ready again, and yet it is open which of them runs first.
  run_another();
}

void sync_warp(uint32_t mask, const Site& at) {
  if (is_left_out("__syncwarp", at)) return;
  const auto combine = [](void* const*, uint32_t lanes, const Site&) {
    Warp& warp = *t_scheduler->current->warp;
    land_stores(warp);
    if constexpr (kTraced) trace::synchronise(warp, lanes);
    return true;
  };
  meet({.name = "__syncwarp", .mask = mask}, nullptr, combine, at);
}

void fence() {
  land_stores(*t_scheduler->current->warp);
  if constexpr (kTraced) trace::fence();
  pause();
}

void lane_exited(Warp& warp) {
  for (std::size_t i = 0; i < warp.meetings.size();) {
    const Meeting& meeting = warp.meetings[i];
    if (meeting.collective.whole_warp) {
      fault(meeting.at, "%s: a lane exits while others of its warp wait for it", meeting.collective.name);
    }
    if (missing(warp, meeting) == 0) {
      complete(warp, i);
    } else {
      ++i;
    }
  }
}

// --- shuffles, votes, reductions -------------------------------------------------------------------------------------

namespace {

struct ShuffleArgs {
  uint64_t bits;
  uint64_t result;
  int source;
  const char* name;
};

bool combine_shuffle(void* const* args, uint32_t lanes, const Site& at) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    auto* mine = static_cast<ShuffleArgs*>(args[lane]);
    if (!(lanes >> mine->source & 1)) {
      fault(at, "%s: lane %d reads lane %d, which has exited or is not in the mask 0x%08x", mine->name, lane,
            mine->source, lanes);
    }
    mine->result = static_cast<const ShuffleArgs*>(args[mine->source])->bits;
  }
  return true;
}

// The rules of PTX's shfl.sync, whose operand c CUDA makes of the width.
int shuffle_source(Shuffle kind, int lane, int operand, int width) {
  const int segment = kWarpSize - width;  // the bits of a lane's number that name its segment
  const int low = lane & segment;
  const int high = low | (kWarpSize - 1 - segment);
  const int b = operand & (kWarpSize - 1);
  switch (kind) {
    case Shuffle::kUp: return lane - b >= low ? lane - b : lane;
    case Shuffle::kDown: return lane + b <= high ? lane + b : lane;
    case Shuffle::kXor: return (lane ^ b) <= high ? lane ^ b : lane;
    case Shuffle::kIndex: return low | (b & ~segment);
  }
  return lane;
}

struct VoteArgs {
  uint64_t value;
  Vote result;
};

bool combine_vote(void* const* args, uint32_t lanes, const Site&) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lanes >> lane & 1 && static_cast<const VoteArgs*>(args[lane])->value != 0) ballot |= 1u << lane;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    auto* mine = static_cast<VoteArgs*>(args[lane]);
    uint32_t matches = 0;
    for (int other = 0; other < kWarpSize; ++other) {
      if (lanes >> other & 1 && static_cast<const VoteArgs*>(args[other])->value == mine->value) matches |= 1u << other;
    }
    mine->result = {ballot, lanes, matches};
  }
  return true;
}

struct ReduceArgs {
  Reduce kind;
  uint32_t value;
};

uint32_t reduced(Reduce kind, uint32_t a, uint32_t b) {
  const auto sa = static_cast<int32_t>(a);
  const auto sb = static_cast<int32_t>(b);
  switch (kind) {
    case Reduce::kAdd: return a + b;
    case Reduce::kMin: return std::min(a, b);
    case Reduce::kMax: return std::max(a, b);
    case Reduce::kMinSigned: return static_cast<uint32_t>(std::min(sa, sb));
    case Reduce::kMaxSigned: return static_cast<uint32_t>(std::max(sa, sb));
    case Reduce::kAnd: return a & b;
    case Reduce::kOr: return a | b;
    case Reduce::kXor: return a ^ b;
  }
  return 0;
}

bool combine_reduce(void* const* args, uint32_t lanes, const Site&) {
  const int first = std::countr_zero(lanes);
  ReduceArgs total = *static_cast<const ReduceArgs*>(args[first]);
  for (int lane = first + 1; lane < kWarpSize; ++lane) {
    if (lanes >> lane & 1) {
      total.value = reduced(total.kind, total.value, static_cast<const ReduceArgs*>(args[lane])->value);
    }
  }
  for (int lane = first; lane < kWarpSize; ++lane) {
    if (lanes >> lane & 1) static_cast<ReduceArgs*>(args[lane])->value = total.value;
  }
  return true;
}

}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t bits, int operand, int width, std::size_t bytes,
                 const Site& at) {
  static constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  const char* name = kNames[static_cast<int>(kind)];
  if (width < 1 || width > kWarpSize || !std::has_single_bit(static_cast<unsigned>(width))) {
    fault(at, "%s: width must be a power of two up to 32, got %d", name, width);
  }
  ShuffleArgs args{bits, 0, shuffle_source(kind, indices().lane, operand, width), name};
  meet({.name = name, .mask = mask, .qualifier = static_cast<int>(bytes)}, &args, combine_shuffle, at);
  return args.result;
}

Vote vote(const char* name, uint32_t mask, uint64_t value, const Site& at) {
  VoteArgs args{value, {}};
  meet({.name = name, .mask = mask}, &args, combine_vote, at);
  return args.result;
}

uint32_t reduce(const char* name, Reduce kind, uint32_t mask, uint32_t value, const Site& at) {
  ReduceArgs args{kind, value};
  meet({.name = name, .mask = mask, .qualifier = static_cast<int>(kind)}, &args, combine_reduce, at);
  return args.value;
}

}  // namespace emu
