// Races, bank conflicts and sectors of kernels as they run in the emulator.
//
// Kernels, and they alone, are compiled with -fsanitize=thread, whose runtime is not linked: before each load and store
// g++ calls __tsan_read4() and the like, and those are here. The return address is the place in the source. What g++
// does not see comes from the emulator through tracer.h: ldmatrix, stmatrix, cp.async, atomics and who waits for whom.
//
// Races: each thread has an epoch, which ends where others can wait for it, and a clock: of each other thread the last
// epoch that it knows to have ended. An access races with an earlier one that its thread does not know of, no matter in
// which order the two have run. Shuffles and mma order nothing.
//
// Requests: the n-th executions of an instruction by the lanes of a warp since they were last in one place are one
// request. Shared memory serves it in wavefronts, each of which takes one word from each of 32 banks; global memory in
// sectors of 32 bytes.
#include "emulator/tracer/tracer.h"

#include <pthread.h>

#include <algorithm>
#include <map>
#include <span>
#include <unordered_map>

#include "emulator/tracer/tracer_report.h"

namespace emu {
namespace trace {

// Last known epochs of the threads of a block, by its number.
using Clock = std::map<uint64_t, std::vector<uint32_t>>;
using SharedClock = std::shared_ptr<const Clock>;

struct ThreadTrace {
  ThreadId id = 0;
  uint32_t epoch = 1;
  SharedClock known;
  const std::vector<uint32_t>* known_of_block = nullptr;  // in `known`
  SharedClock fenced;                                     // what later relaxed atomics release: known at the last fence
  SharedClock seen;  // what the next fence acquires: released through words that relaxed atomics have read
};

struct Request {
  uint32_t lanes = 0;
  std::array<uint8_t, kWarpSize> bytes{};
  std::array<uint64_t, kWarpSize> address{};
};

struct OpenRequests {
  Instruction instruction;
  std::array<uint32_t, kWarpSize> executions{};
  std::vector<Request> requests;
};

struct WarpTrace {
  std::unordered_map<Instruction, OpenRequests, HashOfInstruction> of_instruction;
  std::vector<OpenRequests*> open;
};

struct BlockTrace {
  std::vector<ThreadTrace> threads;
  std::vector<WarpTrace> warps;
  std::array<SharedClock, kBarriers> barriers;
};

namespace {

struct Event {
  ThreadId thread = 0;
  uint32_t epoch = 0;  // 0: none
  Place place = nullptr;
};

struct Cell {
  struct Other : Event {
    Access kind;
  };
  Event write;
  Place in_flight = nullptr;      // of a write that has begun
  bool has_atomic_write = false;  // among the others
  std::vector<Other> others;      // since that write, by thread and kind
};

// Four bytes, until somebody touches a part of them.
struct Word {
  Cell whole;
  std::unique_ptr<std::array<Cell, 4>> bytes;
};

constexpr uintptr_t kPageBytes = 1024;
using Page = std::array<Word, kPageBytes / 4>;

struct Tracer {
  const void* kernel = nullptr;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  uintptr_t last_page = 0;
  Page* last = nullptr;
  std::unordered_map<const void*, SharedClock> released;  // through words of memory
  Sites sites;
  Races races;
  Costs costs;

  // The address of the copy is the place.
  Place keep(const Site& at) { return &sites.try_emplace({at.file_name(), at.line(), at.column()}, at).first->second; }

  Word& word(uintptr_t address) {
    const uintptr_t page = address / kPageBytes;
    if (last == nullptr || page != last_page) {
      std::unique_ptr<Page>& found = pages[page];
      if (found == nullptr) found = std::make_unique<Page>();
      last_page = page;
      last = found.get();
    }
    return (*last)[address % kPageBytes / 4];
  }

  void forget_memory() {
    pages.clear();
    last = nullptr;
  }
};
thread_local Tracer t_tracer;

// --- order -----------------------------------------------------------------------------------------------------------

int number_in_block(const Thread& thread) { return static_cast<int>(&thread - thread.warp->block->threads.data()); }

ThreadTrace& trace_of(const Thread& thread) {
  return thread.warp->block->trace->threads[static_cast<std::size_t>(number_in_block(thread))];
}

void know(ThreadTrace& thread, const SharedClock& clock) {
  thread.known = clock;
  thread.known_of_block = &clock->at(block_of(thread.id));
}

void add(Clock& to, const Clock& from) {
  for (const auto& [block, epochs] : from) {
    std::vector<uint32_t>& mine = to[block];
    mine.resize(std::max(mine.size(), epochs.size()));
    for (std::size_t i = 0; i < epochs.size(); ++i) mine[i] = std::max(mine[i], epochs[i]);
  }
}

// Either may be null.
SharedClock both(const SharedClock& a, const SharedClock& b) {
  if (a == nullptr || b == nullptr) return a == nullptr ? b : a;
  auto clock = std::make_shared<Clock>(*a);
  add(*clock, *b);
  return clock;
}

// `before`, if any, and everything that the threads know and have done; a new epoch of theirs begins.
SharedClock joined(const SharedClock& before, std::span<ThreadTrace* const> threads) {
  auto clock = before == nullptr ? std::make_shared<Clock>() : std::make_shared<Clock>(*before);
  const Clock* added = nullptr;
  for (const ThreadTrace* thread : threads) {
    // As a rule they all know the same.
    if (thread->known.get() != added) add(*clock, *thread->known);
    added = thread->known.get();
  }
  for (ThreadTrace* thread : threads) {
    (*clock)[block_of(thread->id)][number_of(thread->id)] = thread->epoch;
    ++thread->epoch;
  }
  return clock;
}

std::vector<ThreadTrace*> traces_of(const Warp& warp, uint32_t lanes) {
  std::vector<ThreadTrace*> traces;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lanes >> lane & 1) traces.push_back(&trace_of(warp.threads[lane]));
  }
  return traces;
}

bool knows(const ThreadTrace& thread, const Event& event) {
  if (event.epoch == 0 || event.thread == thread.id) return true;
  const uint64_t block = block_of(event.thread);
  const std::vector<uint32_t>* epochs = thread.known_of_block;
  if (block != block_of(thread.id)) {
    const auto found = thread.known->find(block);
    if (found == thread.known->end()) return false;
    epochs = &found->second;
  }
  return event.epoch <= (*epochs)[number_of(event.thread)];
}

// --- races -----------------------------------------------------------------------------------------------------------

bool is_write(Access kind) { return kind == Access::kWrite || kind == Access::kAtomicWrite; }
bool is_atomic(Access kind) { return kind == Access::kAtomicRead || kind == Access::kAtomicWrite; }

void report(const char* what, const ThreadTrace& thread, Place place, ThreadId other, Place other_place, bool shared) {
  const RaceKey key{t_tracer.kernel, what, place, other_place, shared};
  ++t_tracer.races.try_emplace(key, Race{thread.id, other}).first->second.times;
}

void check(Cell& cell, const ThreadTrace& thread, Access kind, Place place, bool shared) {
  const auto race = [&](const char* what, const Event& other) {
    report(what, thread, place, other.thread, other.place, shared);
  };
  const bool writes = is_write(kind);
  if (cell.in_flight != nullptr) {
    report(writes ? "write during asynchronous write" : "read during asynchronous write", thread, place,
           cell.write.thread, cell.in_flight, shared);
  } else if (!knows(thread, cell.write)) {
    race(writes ? "write after write" : "read after write", cell.write);
  }
  // Two reads, and two atomic accesses, do not race.
  if (writes || cell.has_atomic_write) {
    for (const Cell::Other& other : cell.others) {
      if ((is_atomic(kind) && is_atomic(other.kind)) || (!writes && !is_write(other.kind))) continue;
      if (knows(thread, other)) continue;
      race(!is_write(other.kind) ? "write after read" : writes ? "write after write" : "read after write", other);
    }
  }
  const Event event{thread.id, thread.epoch, place};
  if (kind == Access::kWrite) {
    // Whatever comes later and races with an access before this one races with this one too.
    cell.others.clear();
    cell.has_atomic_write = false;
    cell.write = event;
    return;
  }
  if (kind == Access::kAtomicWrite) cell.has_atomic_write = true;
  const auto at = std::lower_bound(cell.others.begin(), cell.others.end(), std::pair(thread.id, kind),
                                   [](const Cell::Other& other, const std::pair<ThreadId, Access>& key) {
                                     return std::pair(other.thread, other.kind) < key;
                                   });
  if (at != cell.others.end() && at->thread == thread.id && at->kind == kind) {
    *at = {event, kind};
  } else {
    cell.others.insert(at, {event, kind});
  }
}

template <class F>
void for_cells(const void* address, std::size_t bytes, const F& f) {
  const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
  for (uintptr_t at = begin / 4 * 4; at < end; at += 4) {
    Word& word = t_tracer.word(at);
    if (at >= begin && at + 4 <= end && word.bytes == nullptr) {
      f(word.whole);
      continue;
    }
    if (word.bytes == nullptr) {
      word.bytes = std::make_unique<std::array<Cell, 4>>();
      word.bytes->fill(word.whole);
    }
    for (uintptr_t byte = std::max(at, begin); byte < std::min(at + 4, end); ++byte) f((*word.bytes)[byte - at]);
  }
}

// --- requests --------------------------------------------------------------------------------------------------------

std::size_t sort_unique(std::vector<uint64_t>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values.size();
}

// Calls f(unit) for each unit of so many bytes that a lane of [first, first + lanes) touches.
template <class F>
void for_units(const Request& request, int first, int lanes, uint64_t unit_bytes, const F& f) {
  for (int lane = first; lane < first + lanes; ++lane) {
    if (!(request.lanes >> lane & 1)) continue;
    const uint64_t begin = request.address[lane], end = begin + request.bytes[lane];
    for (uint64_t unit = begin / unit_bytes; unit * unit_bytes < end; ++unit) f(unit);
  }
}

// 32 lanes at a time for up to 4 bytes a lane, 16 for 8 bytes, 8 for 16. As many wavefronts as the fullest bank has
// words.
void add_wavefronts(const Request& request, Cost& cost) {
  constexpr int kBanks = 32;
  const int widest = *std::max_element(request.bytes.begin(), request.bytes.end());
  const int lanes = widest <= 4 ? 32 : widest <= 8 ? 16 : 8;
  thread_local std::vector<uint64_t> words;
  for (int first = 0; first < kWarpSize; first += lanes) {
    words.clear();
    for_units(request, first, lanes, 4, [](uint64_t word) { words.push_back(word); });
    if (words.empty()) continue;
    sort_unique(words);
    std::array<uint32_t, kBanks> in_bank{};
    for (uint64_t word : words) ++in_bank[word % kBanks];
    cost.taken += *std::max_element(in_bank.begin(), in_bank.end());
    cost.least += 1;
  }
}

void add_sectors(const Request& request, Cost& cost) {
  constexpr uint64_t kSectorBytes = 32;
  thread_local std::vector<uint64_t> sectors, bytes;
  sectors.clear();
  bytes.clear();
  for_units(request, 0, kWarpSize, kSectorBytes, [](uint64_t sector) { sectors.push_back(sector); });
  for_units(request, 0, kWarpSize, 1, [](uint64_t byte) { bytes.push_back(byte); });
  cost.taken += sort_unique(sectors);
  cost.least += (sort_unique(bytes) + kSectorBytes - 1) / kSectorBytes;
}

void add_request(const Thread& thread, uint64_t address, std::size_t bytes, const Instruction& instruction) {
  const auto lane = static_cast<std::size_t>(thread.indices.lane);
  WarpTrace& warp = thread.warp->block->trace->warps[static_cast<std::size_t>(thread.warp->number)];
  OpenRequests& open = warp.of_instruction[instruction];
  if (open.requests.empty()) {
    open.instruction = instruction;
    warp.open.push_back(&open);
  }
  const uint32_t execution = open.executions[lane]++;
  if (execution == open.requests.size()) open.requests.emplace_back();
  Request& request = open.requests[execution];
  request.lanes |= thread.bit();
  request.bytes[lane] = static_cast<uint8_t>(bytes);
  request.address[lane] = address;
}

void close_requests(WarpTrace& warp) {
  for (OpenRequests* open : warp.open) {
    Cost& cost = t_tracer.costs[open->instruction];
    for (const Request& request : open->requests) {
      ++cost.requests;
      (open->instruction.shared ? add_wavefronts : add_sectors)(request, cost);
    }
    open->requests.clear();
    open->executions.fill(0);
  }
  warp.open.clear();
}

// --- one access ------------------------------------------------------------------------------------------------------

const SharedArray* array_of(const Block& block, const void* address) {
  const auto* byte = static_cast<const uint8_t*>(address);
  for (const SharedArray& array : block.arrays) {
    if (byte >= array.data && byte < array.data + array.bytes) return &array;
  }
  return nullptr;
}

constexpr std::size_t kMaxRequestBytes = 16;

void count(const Thread& thread, const void* address, std::size_t bytes, const char* name, Place place) {
  if (bytes == 0 || bytes > kMaxRequestBytes) return;
  const SharedArray* array = array_of(*thread.warp->block, address);
  const uint64_t at = array == nullptr ? reinterpret_cast<uintptr_t>(address)
                                       : array->address + (static_cast<const uint8_t*>(address) - array->data);
  add_request(thread, at, bytes, {t_tracer.kernel, place, name, array != nullptr});
}

void access_at(const Thread& thread, const void* address, std::size_t bytes, Access kind, const char* name,
               Place place) {
  count(thread, address, bytes, name, place);
  const bool shared = array_of(*thread.warp->block, address) != nullptr;
  const ThreadTrace& trace = trace_of(thread);
  if (!shared && t_scheduler->is_dependent && !thread.has_waited) {
    report(is_write(kind) ? "write before griddepcontrol.wait" : "read before griddepcontrol.wait", trace, place,
           trace.id, place, false);
  }
  for_cells(address, bytes, [&](Cell& cell) { check(cell, trace, kind, place, shared); });
}

}  // namespace

// --- what the emulator tells -----------------------------------------------------------------------------------------

void start_launch(const void* kernel) {
  t_tracer.kernel = kernel;
  t_tracer.released.clear();
  t_tracer.forget_memory();
}

void start_block(Block& block) {
  block.trace = std::make_shared<BlockTrace>();
  BlockTrace& trace = *block.trace;
  const dim3 grid = block.threads.front().indices.grid_dim;
  const uint64_t number = (uint64_t{block.index.z} * grid.y + block.index.y) * grid.x + block.index.x;
  trace.threads.resize(block.threads.size());
  trace.warps.resize(block.warps.size());
  const SharedClock nothing = std::make_shared<Clock>(Clock{{number, std::vector<uint32_t>(block.threads.size())}});
  for (std::size_t i = 0; i < trace.threads.size(); ++i) {
    trace.threads[i].id = number << kThreadBits | i;
    know(trace.threads[i], nothing);
  }
}

void end_block(Block& block) {
  for (WarpTrace& warp : block.trace->warps) close_requests(warp);
  for (const SharedArray& array : block.arrays) {
    for_cells(array.data, array.bytes, [](Cell& cell) { cell = {}; });
  }
}

void access(const void* address, std::size_t bytes, Access kind, const char* instruction, const Site& at) {
  access_at(*t_scheduler->current, address, bytes, kind, instruction, t_tracer.keep(at));
}

void begin_write(const void* address, std::size_t bytes, int lane, const char* instruction, const Site& at) {
  const Thread& thread = t_scheduler->current->warp->threads[lane];
  const Place place = t_tracer.keep(at);
  access_at(thread, address, bytes, Access::kWrite, instruction, place);
  for_cells(address, bytes, [&](Cell& cell) { cell.in_flight = place; });
}

void land_write(const void* address, std::size_t bytes) {
  for_cells(address, bytes, [](Cell& cell) {
    cell.in_flight = nullptr;
    // The thread that has begun it, now.
    cell.write.epoch = t_scheduler->current->warp->block->trace->threads[number_of(cell.write.thread)].epoch;
  });
}

void end_read(const void* address, std::size_t bytes, const Site& at) {
  const ThreadTrace& trace = trace_of(*t_scheduler->current);
  const Place place = t_tracer.keep(at);
  for_cells(address, bytes, [&](Cell& cell) { check(cell, trace, Access::kRead, place, false); });
}

void synchronise(Warp& warp, uint32_t lanes) {
  const std::vector<ThreadTrace*> threads = traces_of(warp, lanes);
  const SharedClock clock = joined(nullptr, threads);
  for (ThreadTrace* thread : threads) know(*thread, clock);
}

void arrive(Warp& warp, uint32_t lanes, int barrier) {
  SharedClock& clock = warp.block->trace->barriers[static_cast<std::size_t>(barrier)];
  clock = joined(clock, traces_of(warp, lanes));
}

void leave(Block& block, int barrier) {
  SharedClock& clock = block.trace->barriers[static_cast<std::size_t>(barrier)];
  const Barrier& state = block.barriers[static_cast<std::size_t>(barrier)];
  for (const Warp& warp : block.warps) {
    // A thread that has exited waits no more, and has arrived.
    if (state.whole_block) clock = joined(clock, traces_of(warp, warp.existing & ~warp.live));
  }
  for (const Warp& warp : block.warps) {
    const uint32_t lanes = state.waiting[static_cast<std::size_t>(warp.number)];
    for (ThreadTrace* thread : traces_of(warp, lanes)) know(*thread, clock);
  }
  clock = nullptr;
}

void release(const void* word) {
  ThreadTrace* const self = &trace_of(*t_scheduler->current);
  SharedClock& clock = t_tracer.released[word];
  clock = joined(clock, {&self, 1});
}

void acquire(const void* word) {
  ThreadTrace& self = trace_of(*t_scheduler->current);
  know(self, both(self.known, t_tracer.released[word]));
}

void relaxed(const void* word) {
  ThreadTrace& self = trace_of(*t_scheduler->current);
  SharedClock& clock = t_tracer.released[word];
  self.seen = both(self.seen, clock);
  clock = both(clock, self.fenced);
}

void fence() {
  ThreadTrace* const self = &trace_of(*t_scheduler->current);
  know(*self, both(self->known, self->seen));
  self->fenced = joined(nullptr, {&self, 1});
}

void converge(Warp& warp) { close_requests(warp.block->trace->warps[static_cast<std::size_t>(warp.number)]); }

// --- what g++ tells --------------------------------------------------------------------------------------------------

namespace {

// Of the thread that launches, with what it hands to kernels.
struct HostStack {
  void* begin = nullptr;
  std::size_t bytes = 0;
  HostStack() {
    pthread_attr_t attributes;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) return;
    pthread_attr_getstack(&attributes, &begin, &bytes);
    pthread_attr_destroy(&attributes);
  }
};

void plain_access(const void* address, std::size_t bytes, Access kind, const char* name, Place place) {
  const Scheduler* scheduler = t_scheduler;
  if (scheduler == nullptr || scheduler->current == nullptr) return;  // the host's
  const Thread& thread = *scheduler->current;
  const auto offset_in = [&](const void* object) {
    return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(object);
  };
  if (offset_in(thread.fiber.stack) < thread.fiber.stack_bytes) return;                        // registers of a GPU
  if (offset_in(&thread) < sizeof thread || offset_in(&t_indices) < sizeof t_indices) return;  // threadIdx and the like
  thread_local const HostStack host;
  if (offset_in(host.begin) < host.bytes) return;
  access_at(thread, address, bytes, kind, name, place);
}

}  // namespace
}  // namespace trace

std::vector<std::string> take_trace() {
  trace::Tracer& tracer = trace::t_tracer;
  std::vector<std::string> lines = trace::report(tracer.races, tracer.costs, tracer.sites);
  tracer.races.clear();
  tracer.costs.clear();
  return lines;
}

std::size_t races_seen() { return trace::t_tracer.races.size(); }

}  // namespace emu

// --- the entry points of -fsanitize=thread ---------------------------------------------------------------------------

#define EMU_ENTRY_POINT(function, bytes, kind, name, ...)                              \
  void function(__VA_ARGS__) {                                                         \
    using enum emu::trace::Access;                                                     \
    emu::trace::plain_access(address, bytes, kind, name, __builtin_return_address(0)); \
  }
#define EMU_ENTRY_POINTS(bytes)                                                              \
  EMU_ENTRY_POINT(__tsan_read##bytes, bytes, kRead, "load " #bytes, void* address)           \
  EMU_ENTRY_POINT(__tsan_write##bytes, bytes, kWrite, "store " #bytes, void* address)        \
  EMU_ENTRY_POINT(__tsan_unaligned_read##bytes, bytes, kRead, "load " #bytes, void* address) \
  EMU_ENTRY_POINT(__tsan_unaligned_write##bytes, bytes, kWrite, "store " #bytes, void* address)

extern "C" {

void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}  // of the host's exceptions
EMU_ENTRY_POINT(__tsan_read1, 1, kRead, "load 1", void* address)
EMU_ENTRY_POINT(__tsan_write1, 1, kWrite, "store 1", void* address)
EMU_ENTRY_POINTS(2)
EMU_ENTRY_POINTS(4)
EMU_ENTRY_POINTS(8)
EMU_ENTRY_POINTS(16)
EMU_ENTRY_POINT(__tsan_read_range, bytes, kRead, "load", void* address, std::size_t bytes)
EMU_ENTRY_POINT(__tsan_write_range, bytes, kWrite, "store", void* address, std::size_t bytes)

}  // extern "C"
