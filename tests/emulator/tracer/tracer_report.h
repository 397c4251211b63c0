// What the tracer has counted, and how it tells it: by kernel and line of the source.
#pragma once

#include <compare>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "emulator/state.h"

namespace emu::trace {

// The number of a block in its grid, and in the lowest bits that of a thread in it.
using ThreadId = uint64_t;
inline constexpr int kThreadBits = 10;
static_assert(1 << kThreadBits == kMaxBlockThreads);
inline uint64_t block_of(ThreadId id) { return id >> kThreadBits; }
inline std::size_t number_of(ThreadId id) { return id % kMaxBlockThreads; }

// An instruction in the source: a return address in the kernel, or the tracer's copy of a Site.
using Place = const void*;

struct Instruction {
  const void* kernel;
  Place place;
  const char* name;
  bool shared;
  bool operator==(const Instruction&) const = default;
};

struct HashOfInstruction {
  std::size_t operator()(const Instruction& i) const {
    return reinterpret_cast<std::size_t>(i.place) * 31 + reinterpret_cast<std::size_t>(i.name) * 2 + i.shared;
  }
};

struct RaceKey {
  const void* kernel;
  const char* what;
  Place second, first;
  bool shared;
  auto operator<=>(const RaceKey&) const = default;
};

struct Race {
  ThreadId second_thread, first_thread;  // of one of them
  uint64_t times = 0;
};

struct Cost {
  uint64_t requests = 0, taken = 0, least = 0;
};

// By file, line and column; the address of the copy is the place.
using Sites = std::map<std::tuple<const char*, uint32_t, uint32_t>, Site>;
using Races = std::map<RaceKey, Race>;
using Costs = std::unordered_map<Instruction, Cost, HashOfInstruction>;

// Lines of take_trace().
std::vector<std::string> report(const Races& races, const Costs& costs, const Sites& sites);

}  // namespace emu::trace
