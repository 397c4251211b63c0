// Launches, the scheduler, faults.
#include "emulator/emu.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>

#include "emulator/tracer/tracer.h"

namespace emu {

constinit thread_local const Indices* t_indices = nullptr;
constinit thread_local Scheduler* t_scheduler = nullptr;

namespace {

struct SpareStacks {
  std::vector<Fiber> fibers;
  ~SpareStacks() {
    for (Fiber& fiber : fibers) release_stack(fiber);
  }
};
thread_local SpareStacks t_spare_stacks;
thread_local std::vector<Synchronisation> t_synchronisations;

const char* name_of(Policy policy) {
  switch (policy) {
    case Policy::kFifo: return "fifo";
    case Policy::kRandom: return "random";
    case Policy::kPrio: return "prio";
  }
  return "?";
}

// `reduce<2>` of `void ns::reduce<2>(float const*, int)`.
std::string name_of_kernel(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "a kernel without a symbol";
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);
  int depth = 0;
  for (std::size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == '(' && depth == 0) {
      name.resize(i);
      break;
    }
  }
  return name.starts_with("void ") ? name.substr(5) : name;
}

std::string triple(uint3 i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

std::string format_text(const char* format, va_list args) {
  va_list again;
  va_copy(again, args);
  std::string text(static_cast<std::size_t>(std::vsnprintf(nullptr, 0, format, args)), '\0');
  std::vsnprintf(text.data(), text.size() + 1, format, again);
  va_end(again);
  return text;
}

std::string lanes_text(uint32_t lanes) {
  std::string text;
  for (int first = 0; first < kWarpSize; ++first) {
    if (!(lanes >> first & 1)) continue;
    int last = first;
    while (last + 1 < kWarpSize && lanes >> (last + 1) & 1) ++last;
    text += (text.empty() ? "" : ",") + std::to_string(first);
    if (last > first) text += "-" + std::to_string(last);
    first = last;
  }
  return std::popcount(lanes) == 1 ? "lane " + text : "lanes " + text;
}

std::string state_of(const Thread& thread) {
  if (!(thread.warp->live & thread.bit())) return "exited";
  if (thread.warp->ready & thread.bit()) return "can run";
  std::string text = std::string("waiting in ") + thread.waits_in;
  if (thread.waits_barrier >= 0) {
    text += " (barrier " + std::to_string(thread.waits_barrier) + ", ";
    text += thread.waits_threads == 0 ? "all threads)" : std::to_string(thread.waits_threads) + " threads)";
  } else {
    char mask[32];
    std::snprintf(mask, sizeof mask, " (mask 0x%08x)", thread.waits_mask);
    text += mask;
  }
  return text + " at " + to_text(thread.waits_at);
}

// One line per warp.
std::string who_waits_where(const Scheduler& scheduler) {
  std::string text;
  for (const Warp* warp : scheduler.warps) {
    std::map<std::string, uint32_t> states;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (warp->existing >> lane & 1) states[state_of(warp->threads[lane])] |= 1u << lane;
    }
    text += "\n  block " + triple(warp->block->index) + " warp " + std::to_string(warp->number) + ": ";
    const char* separator = "";
    for (const auto& [state, lanes] : states) {
      text += separator + (lanes == warp->existing ? "all" : lanes_text(lanes)) + " " + state;
      separator = "; ";
    }
  }
  return text;
}

// --- choosing who runs -----------------------------------------------------------------------------------------------

int lowest_lane_after(uint32_t lanes, int lane) {
  const uint32_t later = lane == kWarpSize - 1 ? 0 : lanes & ~0u << (lane + 1);
  return std::countr_zero(later != 0 ? later : lanes);
}

int random_lane(Scheduler& scheduler, uint32_t lanes) {
  for (uint32_t skip = scheduler.random_below(static_cast<uint32_t>(std::popcount(lanes))); skip > 0; --skip) {
    lanes &= lanes - 1;
  }
  return std::countr_zero(lanes);
}

// Index into scheduler.warps, or its size.
std::size_t first_ready_warp(const Scheduler& scheduler, std::size_t from) {
  const std::size_t n = scheduler.warps.size();
  std::size_t at = from % n;
  for (std::size_t i = 0; i < n; ++i, at = at + 1 < n ? at + 1 : 0) {
    if (scheduler.warps[at]->ready != 0) return at;
  }
  return n;
}

std::size_t choose_warp(Scheduler& scheduler, bool yielded) {
  const std::size_t n = scheduler.warps.size();
  switch (scheduler.options.policy) {
    case Policy::kFifo: return first_ready_warp(scheduler, scheduler.cursor + (yielded ? 1 : 0));
    case Policy::kRandom: return first_ready_warp(scheduler, scheduler.random_below(static_cast<uint32_t>(n)));
    case Policy::kPrio: break;
  }
  if (scheduler.random_below(scheduler.priorities_hold) == 0) {
    for (Warp* warp : scheduler.warps) warp->priority = 1 + scheduler.random_below(1 << 20);
  }
  // A warp that spins waits for one of the others.
  if (yielded) scheduler.warps[scheduler.cursor]->priority = 0;
  // From the next one on, so that of warps that all spin each has its turn. Without a division: this is a third of what
  // the emulator does.
  std::size_t best = n, at = scheduler.cursor;
  int64_t highest = -1;
  for (std::size_t i = 0; i < n; ++i) {
    at = at + 1 < n ? at + 1 : 0;
    const Warp& warp = *scheduler.warps[at];
    if (warp.ready != 0 && warp.priority > highest) {
      best = at;
      highest = warp.priority;
    }
  }
  return best;
}

Thread& choose_thread(Scheduler& scheduler, bool yielded) {
  const std::size_t chosen = choose_warp(scheduler, yielded);
  // Here a later instruction whose effects land "when no thread can run" delivers one of them and chooses again.
  if (chosen == scheduler.warps.size()) {
    fault(Site(), "deadlock: no thread can run%s", who_waits_where(scheduler).c_str());
  }
  if (++scheduler.stats.switches - scheduler.switches_at_exit > scheduler.options.max_switches) {
    fault(Site(), "hangs: no thread has ended in %llu switches%s",
          static_cast<unsigned long long>(scheduler.options.max_switches), who_waits_where(scheduler).c_str());
  }
  Warp& warp = *scheduler.warps[chosen];
  scheduler.cursor = chosen;
  const int lane = scheduler.options.policy == Policy::kFifo ? lowest_lane_after(warp.ready, warp.last_lane)
                                                             : random_lane(scheduler, warp.ready);
  warp.last_lane = lane;
  warp.ready &= ~(1u << lane);
  return warp.threads[lane];
}

void set_current(Scheduler& scheduler, Thread* thread) {
  scheduler.current = thread;
  t_indices = thread != nullptr ? &thread->indices : nullptr;
}

void switch_to_another(bool yielded) {
  Scheduler& scheduler = *t_scheduler;
  Thread& self = *scheduler.current;
  Thread& next = choose_thread(scheduler, yielded);
  if (&next == &self) return;
  set_current(scheduler, &next);
  switch_fiber(self.fiber, next.fiber);
}

// --- a thread's life -------------------------------------------------------------------------------------------------

[[noreturn]] void run_thread() {
  Scheduler& scheduler = *t_scheduler;
  (*scheduler.body)();
  Thread& self = *scheduler.current;
  require_no_copies(self);
  require_waited(self, "the end of the thread", Site());
  Warp& warp = *self.warp;
  warp.live &= ~self.bit();
  scheduler.switches_at_exit = scheduler.stats.switches;
  lane_exited(warp);
  if (warp.live == 0) {
    --warp.block->live_warps;
    warp_exited(*warp.block);
  }
  if (warp.block->live_warps == 0) {
    scheduler.finished = warp.block;
    set_current(scheduler, nullptr);
    leave_fiber(self.fiber, scheduler.main);
  }
  Thread& next = choose_thread(scheduler, false);
  set_current(scheduler, &next);
  leave_fiber(self.fiber, next.fiber);
  __builtin_trap();
}

std::unique_ptr<Block> make_block(dim3 grid, dim3 dim) {
  auto block = std::make_unique<Block>();
  const int count = static_cast<int>(dim.x * dim.y * dim.z);
  block->threads.resize(static_cast<std::size_t>(count));
  block->warps.resize(static_cast<std::size_t>((count + kWarpSize - 1) / kWarpSize));
  for (int i = 0; i < count; ++i) {
    Thread& thread = block->threads[i];
    const unsigned linear = static_cast<unsigned>(i);
    thread.indices = {{linear % dim.x, linear / dim.x % dim.y, linear / (dim.x * dim.y)}, {}, dim, grid, i % kWarpSize};
    thread.warp = &block->warps[i / kWarpSize];
    thread.warp->existing |= thread.bit();
    if (!t_spare_stacks.fibers.empty()) {
      thread.fiber = t_spare_stacks.fibers.back();
      t_spare_stacks.fibers.pop_back();
    }
  }
  for (std::size_t i = 0; i < block->warps.size(); ++i) {
    block->warps[i].block = block.get();
    block->warps[i].number = static_cast<int>(i);
    block->warps[i].threads = &block->threads[i * kWarpSize];
  }
  return block;
}

void start_block(Scheduler& scheduler, Block& block, uint3 index) {
  block.index = index;
  block.live_warps = static_cast<int>(block.warps.size());
  block.barriers.fill({});
  block.lets_dependents_start = false;
  for (Thread& thread : block.threads) {
    thread.indices.block = index;
    thread.copies.clear();
    thread.group_ends.clear();
    thread.has_waited = false;
    prepare(thread.fiber, scheduler.options.stack_bytes, run_thread);
  }
  for (Warp& warp : block.warps) {
    warp.live = warp.ready = warp.existing;
    warp.last_lane = kWarpSize - 1;
    warp.priority = 1 + scheduler.random_below(1 << 20);
    warp.meetings.clear();
    warp.late_stores.clear();
  }
  start_shared_memory(block, scheduler.dynamic_bytes);
  if constexpr (kTraced) trace::start_block(block);
}

// Every order of blocks is legal, and none of them waits for another one to start.
std::vector<uint32_t> block_order(Scheduler& scheduler, uint32_t count) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (scheduler.options.policy == Policy::kFifo) return order;
  for (uint32_t i = count; i > 1; --i) std::swap(order[i - 1], order[scheduler.random_below(i)]);
  return order;
}

void run(Scheduler& scheduler, dim3 grid, dim3 dim) {
  const uint32_t count = grid.x * grid.y * grid.z;
  const std::vector<uint32_t> order = block_order(scheduler, count);
  const uint32_t wanted = scheduler.options.resident_blocks > 0
                              ? static_cast<uint32_t>(scheduler.options.resident_blocks)
                              : 1 + scheduler.random_below(4);
  const uint32_t slots = std::min(wanted, count);
  // From an instruction's length, for bugs between neighbours, to one in which a warp of 32 lanes runs a pipeline
  // ahead.
  scheduler.priorities_hold = 16u << (2 * scheduler.random_below(4));
  for (uint32_t i = 0; i < slots; ++i) {
    Block& block = *scheduler.resident.emplace_back(make_block(grid, dim));
    for (Warp& warp : block.warps) scheduler.warps.push_back(&warp);
  }
  const auto index_of = [&](uint32_t i) { return uint3{i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)}; };
  uint32_t started = 0;
  for (; started < slots; ++started) start_block(scheduler, *scheduler.resident[started], index_of(order[started]));
  for (uint32_t ended = 0; ended < count; ++ended) {
    Thread& next = choose_thread(scheduler, false);
    set_current(scheduler, &next);
    switch_fiber(scheduler.main, next.fiber);
    if (!scheduler.fault.empty()) throw Fault(scheduler.fault);
    if constexpr (kTraced) trace::end_block(*scheduler.finished);
    end_shared_memory(*scheduler.finished);
    if (started < count) start_block(scheduler, *scheduler.finished, index_of(order[started++]));
  }
}

}  // namespace

uint32_t Scheduler::random() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return static_cast<uint32_t>((z ^ z >> 31) >> 32);
}

std::string to_text(const Site& at) {
  const std::string file = at.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(at.line());
}

void run_another() { switch_to_another(false); }

void pause() {
  Thread& self = *t_scheduler->current;
  self.warp->ready |= self.bit();
  // Fifo has no chance to move on by itself, and the thread may be spinning after all.
  switch_to_another(t_scheduler->options.policy == Policy::kFifo);
}

void yield() {
  Thread& self = *t_scheduler->current;
  self.warp->ready |= self.bit();
  switch_to_another(true);
}

const std::vector<Synchronisation>& synchronisations() { return t_synchronisations; }

bool is_left_out(const char* name, const Site& at) {
  const auto here = [&](const Synchronisation& s) {
    return s.at.line() == at.line() && s.at.column() == at.column() && s.at.file_name() == at.file_name();
  };
  if (std::none_of(t_synchronisations.begin(), t_synchronisations.end(), here))
    t_synchronisations.push_back({name, at});
  const std::string& left_out = t_scheduler->options.left_out;
  return !left_out.empty() && left_out == to_text(at);
}

uint64_t clock() { return t_scheduler->stats.switches; }

Options& options() {
  thread_local Options options;
  return options;
}

void fault(const Site& at, const char* format, ...) {
  // What follows is no longer the thread's doing: the tracer is not to count it.
  Thread* const self = t_scheduler == nullptr ? nullptr : t_scheduler->current;
  if (self != nullptr) set_current(*t_scheduler, nullptr);
  va_list args;
  va_start(args, format);
  std::string text = format_text(format, args);
  va_end(args);
  if (at.line() != 0) text += ", at " + to_text(at);
  if (t_scheduler == nullptr) throw Fault(text);
  Scheduler& scheduler = *t_scheduler;
  std::string where = scheduler.kernel + ": ";
  if (self != nullptr) {
    where += "block " + triple(self->indices.block) + " thread " + triple(self->indices.thread) + ": ";
  }
  const std::string replay =
      " [seed " + std::to_string(scheduler.options.seed) + ", policy " + name_of(scheduler.options.policy) + "]";
  scheduler.fault = where + text + replay;
  if (self == nullptr) throw Fault(scheduler.fault);
  leave_fiber(self->fiber, scheduler.main);
  __builtin_trap();
}

int code_arch() {
  const Options& now = options();
  return now.code_arch != 0 ? now.code_arch : now.arch;
}

void require_arch(int arch, const char* instruction, const Site& at) {
  const int have = t_scheduler->options.arch;
  if (have < arch) fault(at, "%s needs sm_%d, this is sm_%d", instruction, arch, have);
}

std::size_t max_shared_bytes(int arch) {
  constexpr std::size_t kKiB = 1024;
  if (arch == 80 || arch == 87) return 163 * kKiB;
  if (arch == 86 || arch == 89 || arch >= 120) return 99 * kKiB;
  return 227 * kKiB;
}

std::string limits_violated(const Options& options, dim3 grid, dim3 block, std::size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxBlockThreads || block.z > 64) {
    return "a block of " + triple(uint3{block.x, block.y, block.z}) + " threads: 1 to 1024 are possible, z up to 64";
  }
  if (uint64_t{grid.x} * grid.y * grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return "a grid of " + triple(uint3{grid.x, grid.y, grid.z}) + " blocks: 1 to (2147483647,65535,65535) are possible";
  }
  if (uint64_t{grid.x} * grid.y * grid.z > 0x7fffffff) return "more blocks than the emulator counts";
  if (shared_bytes > max_shared_bytes(options.arch)) {
    return std::to_string(shared_bytes) + " bytes of shared memory: sm_" + std::to_string(options.arch) + " has " +
           std::to_string(max_shared_bytes(options.arch)) + " for a block";
  }
  return "";
}

Stats launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, bool is_dependent,
             const std::function<void()>& thread_body) {
  if (t_scheduler != nullptr) fault(Site(), "a kernel launches another one");
  Scheduler scheduler;
  scheduler.options = options();
  scheduler.kernel_address = kernel;
  scheduler.kernel = name_of_kernel(kernel);
  scheduler.dynamic_bytes = shared_bytes;
  scheduler.is_dependent = is_dependent;
  scheduler.body = &thread_body;
  scheduler.random_state = scheduler.options.seed * 3 + static_cast<uint64_t>(scheduler.options.policy);
  // Everything that must be undone when a Fault passes.
  struct Scope {
    Scheduler& scheduler;
    explicit Scope(Scheduler& s) : scheduler(s) { t_scheduler = &s; }
    ~Scope() {
      t_scheduler = nullptr;
      t_indices = nullptr;
      for (const auto& resident : scheduler.resident) {
        for (const Thread& thread : resident->threads) {
          if (thread.fiber.stack != nullptr) t_spare_stacks.fibers.push_back(thread.fiber);
        }
      }
    }
  } scope(scheduler);
  const std::string violated = limits_violated(scheduler.options, grid, block, shared_bytes);
  if (!violated.empty()) fault(Site(), "%s", violated.c_str());
  require_shared_bytes(kernel, 0, shared_bytes, Site());
  if (!scheduler.options.runs) return scheduler.stats;
  if constexpr (kTraced) trace::start_launch(kernel);
  run(scheduler, grid, block);
  return scheduler.stats;
}

}  // namespace emu
