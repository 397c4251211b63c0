// What threads of a block share: barriers, shared memory; and the copies into it.
#include <algorithm>
#include <bit>
#include <cstring>

#include "emulator/tracer/tracer.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emu {

// --- barriers --------------------------------------------------------------------------------------------------------
// A barrier counts warps: a warp has arrived when all its lanes that have not exited have.

namespace {

thread_local uint64_t t_copied_bytes = 0;

struct BarrierArgs {
  const char* name;
  int barrier;
  int threads;
  bool arrive_only;
  bool reduces;
  bool predicate;
};

int expected_warps(const Block& block, const Barrier& barrier) {
  return barrier.whole_block ? block.live_warps : barrier.threads / kWarpSize;
}

void release_if_complete(Block& block, Barrier& barrier) {
  if (!barrier.open || barrier.warps_arrived < expected_warps(block, barrier)) return;
  if constexpr (kTraced) trace::leave(block, static_cast<int>(&barrier - block.barriers.data()));
  for (Warp& warp : block.warps) {
    const uint32_t lanes = barrier.waiting[static_cast<std::size_t>(warp.number)];
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lanes >> lane & 1) warp.threads[lane].tally = barrier.tally;
    }
    warp.ready |= lanes;
  }
  barrier = Barrier{};
}

bool warp_arrives(void* const* args, uint32_t lanes, const Site& at) {
  const auto& first = *static_cast<const BarrierArgs*>(args[std::countr_zero(lanes)]);
  // The lane that completes the meeting may be one that exits; it is of the same warp.
  Warp& warp = *t_scheduler->current->warp;
  Block& block = *warp.block;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const auto& other = *static_cast<const BarrierArgs*>(args[lane]);
    if (other.barrier != first.barrier || other.threads != first.threads) {
      fault(at, "%s: lanes of one warp name different barriers: %d with %d threads, %d with %d threads", first.name,
            first.barrier, first.threads, other.barrier, other.threads);
    }
  }
  land_stores(warp);
  if constexpr (kTraced) trace::arrive(warp, lanes, first.barrier);
  Barrier& barrier = block.barriers[static_cast<std::size_t>(first.barrier)];
  const int threads = first.threads == 0 ? static_cast<int>(block.warps.size()) * kWarpSize : first.threads;
  if (!barrier.open) {
    barrier.open = true;
    barrier.whole_block = first.threads == 0;
    barrier.threads = threads;
    barrier.at = at;
    barrier.tally = {true, false, 0};
  } else if (barrier.threads != threads) {
    fault(at, "%s: barrier %d expects %d threads here, and %d at %s", first.name, first.barrier, threads,
          barrier.threads, to_text(barrier.at).c_str());
  }
  if (!first.arrive_only) {
    if (barrier.waited_in && barrier.reduces != first.reduces) {
      fault(at, "%s: barrier %d is used by a reduction and by something else at the same time, at %s", first.name,
            first.barrier, to_text(barrier.at).c_str());
    }
    barrier.waited_in = true;
    barrier.reduces = first.reduces;
    barrier.waiting[static_cast<std::size_t>(warp.number)] |= lanes;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      const bool predicate = static_cast<const BarrierArgs*>(args[lane])->predicate;
      barrier.tally.all &= predicate;
      barrier.tally.any |= predicate;
      barrier.tally.count += predicate;
      warp.threads[lane].waits_barrier = first.barrier;
      warp.threads[lane].waits_threads = first.threads;
    }
  }
  ++barrier.warps_arrived;
  release_if_complete(block, barrier);
  return first.arrive_only;
}

void arrive(BarrierArgs args, const Site& at) {
  const int most = static_cast<int>(t_scheduler->current->warp->block->warps.size()) * kWarpSize;
  if (args.barrier < 0 || args.barrier >= kBarriers) {
    fault(at, "%s: a block has barriers 0 to 15, got %d", args.name, args.barrier);
  }
  if (args.threads < 0 || args.threads % kWarpSize != 0) {
    fault(at, "%s: the number of threads must be a multiple of 32, got %d", args.name, args.threads);
  }
  if (args.threads > most) {
    fault(at, "%s: waits for %d threads, the block has %d", args.name, args.threads, most);
  }
  if (args.arrive_only && args.threads == 0) fault(at, "%s: needs a number of threads", args.name);
  meet({.name = args.name, .one_place = true}, &args, warp_arrives, at);
}

}  // namespace

Tally barrier_sync(const char* name, int barrier, int threads, const Site& at) {
  if (is_left_out(name, at)) return {};
  arrive({name, barrier, threads, false, false, false}, at);
  return t_scheduler->current->tally;
}

Tally barrier_reduce(const char* name, int barrier, int threads, bool predicate, const Site& at) {
  arrive({name, barrier, threads, false, true, predicate}, at);
  return t_scheduler->current->tally;
}

void barrier_arrive(const char* name, int barrier, int threads, const Site& at) {
  if (is_left_out(name, at)) return;
  arrive({name, barrier, threads, true, false, false}, at);
}

void warp_exited(Block& block) {
  for (Barrier& barrier : block.barriers) {
    if (barrier.whole_block) release_if_complete(block, barrier);
  }
}

// --- shared memory ---------------------------------------------------------------------------------------------------
// Each array is an allocation of its exact size between guards: AddressSanitizer reports an access to a guard, and
// without it end_shared_memory() finds what was written there.

namespace {

constexpr std::size_t kGuardBytes = 128;
constexpr uint8_t kGuard = 0xa5;
// 0 is no address, as in a kernel that sm_90 reserves the first KiB for.
constexpr uint32_t kFirstAddress = 1024;
constexpr std::size_t kDynamicAlignment = 1024;

std::size_t round_up(std::size_t n, std::size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

uint8_t* add_array(Block& block, const void* declaration, const char* name, std::size_t bytes, std::size_t alignment,
                   const Site& at) {
  const std::size_t total = kGuardBytes + bytes + kGuardBytes;
  auto storage = std::make_unique_for_overwrite<uint8_t[]>(total + alignment);
  const auto begin = reinterpret_cast<uintptr_t>(storage.get()) + kGuardBytes;
  uint8_t* data = storage.get() + kGuardBytes + (round_up(begin, alignment) - begin);
  std::memset(data - kGuardBytes, kGuard, total);
  std::memset(data, kPoison, bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(data - kGuardBytes, kGuardBytes);
  __asan_poison_memory_region(data + bytes, kGuardBytes);
#endif
  const auto address = static_cast<uint32_t>(round_up(block.next_address, alignment));
  block.next_address = static_cast<uint32_t>(address + bytes + kGuardBytes);
  block.arrays.push_back({declaration, name, at, std::move(storage), data, bytes, address});
  return data;
}

const SharedArray* array_of(const Block& block, const void* pointer) {
  const auto p = reinterpret_cast<uintptr_t>(pointer);
  for (const SharedArray& array : block.arrays) {
    const auto begin = reinterpret_cast<uintptr_t>(array.data);
    if (p >= begin && p <= begin + array.bytes) return &array;
  }
  return nullptr;
}

}  // namespace

void start_shared_memory(Block& block, std::size_t dynamic_bytes) {
  block.next_address = kFirstAddress;
  block.static_bytes = 0;
  add_array(block, nullptr, "the dynamic shared memory", dynamic_bytes, kDynamicAlignment, Site());
}

void end_shared_memory(Block& block) {
  for ([[maybe_unused]] const SharedArray& array : block.arrays) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(array.data - kGuardBytes, kGuardBytes + array.bytes + kGuardBytes);
#else
    const auto end = static_cast<std::ptrdiff_t>(array.bytes);
    for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(kGuardBytes); ++i) {
      for (const std::ptrdiff_t offset : {-1 - i, end + i}) {
        if (array.data[offset] == kGuard) continue;
        fault(array.at, "block (%u,%u,%u) has written to offset %td of %s, which has %zu bytes", block.index.x,
              block.index.y, block.index.z, offset, array.name, array.bytes);
      }
    }
#endif
  }
  block.arrays.clear();
}

uint8_t* static_shared(const void* declaration, const char* name, std::size_t bytes, std::size_t alignment, Site at) {
  Block& block = *t_scheduler->current->warp->block;
  for (const SharedArray& array : block.arrays) {
    if (array.declaration == declaration) return array.data;
  }
  block.static_bytes += bytes;
  if (block.static_bytes > kUnaskedSharedBytes) {
    fault(at, "%zu bytes of static shared memory: 49152 are possible", block.static_bytes);
  }
  const std::size_t total = block.static_bytes + t_scheduler->dynamic_bytes;
  const std::string violated = limits_violated(t_scheduler->options, indices().grid_dim, indices().block_dim, total);
  if (!violated.empty()) fault(at, "%s", violated.c_str());
  require_shared_bytes(t_scheduler->kernel_address, block.static_bytes, t_scheduler->dynamic_bytes, at);
  return add_array(block, declaration, name, bytes, alignment, at);
}

uint8_t* dynamic_shared() { return t_scheduler->current->warp->block->arrays.front().data; }

uint32_t shared_address(const void* pointer, const Site& at) {
  const SharedArray* array = array_of(*t_scheduler->current->warp->block, pointer);
  if (array == nullptr) fault(at, "cvta.to.shared: %p is not in the block's shared memory", pointer);
  return array->address + static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - array->data);
}

uint8_t* shared_pointer(uint32_t address, std::size_t bytes, std::size_t alignment, const char* instruction,
                        const Site& at) {
  if (address % alignment != 0) {
    fault(at, "%s: the shared address 0x%x must be a multiple of %zu", instruction, address, alignment);
  }
  for (const SharedArray& array : t_scheduler->current->warp->block->arrays) {
    if (address < array.address || address - array.address > array.bytes) continue;
    if (address - array.address + bytes > array.bytes) {
      fault(at, "%s: %zu bytes at offset %u run past the end of %s of %zu bytes", instruction, bytes,
            address - array.address, array.name, array.bytes);
    }
    return array.data + (address - array.address);
  }
  fault(at, "%s: 0x%x is not in the block's shared memory", instruction, address);
}

void require_aligned(const void* pointer, std::size_t bytes, const char* instruction, const Site& at) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fault(at, "%s: the address %p must be a multiple of %zu", instruction, pointer, bytes);
  }
}

void begin_atomic(const void* pointer, std::size_t bytes, const char* instruction, const Site& at) {
  require_aligned(pointer, bytes, instruction, at);
  if (array_of(*t_scheduler->current->warp->block, pointer) == nullptr) {
    require_waited(*t_scheduler->current, instruction, at);
  }
  pause();
  if constexpr (kTraced) {
    trace::access(pointer, bytes, trace::Access::kAtomicWrite, instruction, at);
    trace::relaxed(pointer);
  }
}

void require_global(const void* pointer, std::size_t bytes, const char* instruction, const Site& at) {
  require_aligned(pointer, bytes, instruction, at);
  if (array_of(*t_scheduler->current->warp->block, pointer) != nullptr) {
    fault(at, "%s: the address %p is in shared memory", instruction, pointer);
  }
  require_waited(*t_scheduler->current, instruction, at);
}

// --- dependent launches ----------------------------------------------------------------------------------------------
// A launch has ended when the next one begins: nothing that a thread reads too early could be missing. So what counts
// is that it has waited.

void let_dependents_start() {
  Block& block = *t_scheduler->current->warp->block;
  if (!block.lets_dependents_start) ++t_scheduler->stats.blocks_told;
  block.lets_dependents_start = true;
}

void wait_for_kernel_before(const char* instruction, const Site& at) {
  if (!t_scheduler->is_dependent) return;
  bool& has_waited = t_scheduler->current->has_waited;
  has_waited = true;  // already for what is_left_out() does, which a tracer may see
  has_waited = !is_left_out(instruction, at);
  pause();
}

void require_waited(const Thread& thread, const char* what, const Site& at) {
  if (!t_scheduler->is_dependent || thread.has_waited) return;
  fault(at, "%s comes before griddepcontrol.wait, in a kernel that depends on the one before", what);
}

// --- late stores, asynchronous copies --------------------------------------------------------------------------------

void store_late(uint8_t* destination, const void* source, std::size_t bytes, int lane, const char* instruction,
                const Site& at) {
  if constexpr (kTraced) trace::begin_write(destination, bytes, lane, instruction, at);
  LateStore store{destination, bytes, {}};
  std::memcpy(store.data.data(), source, bytes);
  std::memset(destination, kPoison, bytes);
  t_scheduler->current->warp->late_stores.push_back(store);
}

void land_stores(Warp& warp) {
  for (const LateStore& store : warp.late_stores) {
    if constexpr (kTraced) trace::land_write(store.destination, store.bytes);
    std::memcpy(store.destination, store.data.data(), store.bytes);
  }
  warp.late_stores.clear();
}

namespace {

void land(const AsyncCopy& copy, const Site& at) {
  // The copy may have read its source at any time until now, and may have written its destination as early.
  if (std::memcmp(copy.source, copy.at_issue.data(), static_cast<std::size_t>(copy.source_bytes)) != 0) {
    fault(at, "%s of %s: its source has changed while it was in flight", copy.instruction, to_text(copy.at).c_str());
  }
  const auto poisoned = [](uint8_t byte) { return byte == kPoison; };
  if (!std::all_of(copy.destination, copy.destination + copy.bytes, poisoned)) {
    fault(at, "%s of %s: its destination was written while it was in flight", copy.instruction,
          to_text(copy.at).c_str());
  }
  if constexpr (kTraced) {
    trace::end_read(copy.source, static_cast<std::size_t>(copy.source_bytes), copy.at);
    trace::land_write(copy.destination, static_cast<std::size_t>(copy.bytes));
  }
  std::memcpy(copy.destination, copy.source, static_cast<std::size_t>(copy.source_bytes));
  std::memset(copy.destination + copy.source_bytes, 0, static_cast<std::size_t>(copy.bytes - copy.source_bytes));
}

void land_first(Thread& self, std::size_t count, const Site& at) {
  for (std::size_t i = 0; i < count; ++i) land(self.copies[i], at);
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(count));
}

}  // namespace

uint64_t copied_bytes() { return t_copied_bytes; }

void copy_async(uint8_t* destination, const void* source, int bytes, int source_bytes, const char* instruction,
                const Site& at) {
  if constexpr (kTraced) {
    trace::access(source, static_cast<std::size_t>(source_bytes), trace::Access::kRead, instruction, at);
    trace::begin_write(destination, static_cast<std::size_t>(bytes), indices().lane, instruction, at);
  }
  AsyncCopy copy{destination, static_cast<const uint8_t*>(source), bytes, source_bytes, {}, instruction, at};
  std::memcpy(copy.at_issue.data(), source, static_cast<std::size_t>(source_bytes));
  std::memset(destination, kPoison, static_cast<std::size_t>(bytes));
  t_scheduler->current->copies.push_back(copy);
  t_copied_bytes += static_cast<uint64_t>(source_bytes);
}

void copies_commit(const Site& at) {
  if (is_left_out("cp.async.commit_group", at)) return;
  Thread& self = *t_scheduler->current;
  self.group_ends.push_back(self.copies.size());
}

void copies_wait(std::size_t pending_groups, const Site& at) {
  if (is_left_out("cp.async.wait_group", at)) return;
  Thread& self = *t_scheduler->current;
  if (self.group_ends.size() <= pending_groups) return;
  const auto done = static_cast<std::ptrdiff_t>(self.group_ends.size() - pending_groups);
  const std::size_t landed = self.group_ends[static_cast<std::size_t>(done - 1)];
  land_first(self, landed, at);
  self.group_ends.erase(self.group_ends.begin(), self.group_ends.begin() + done);
  for (std::size_t& end : self.group_ends) end -= landed;
}

void copies_wait_all(const Site& at) {
  if (is_left_out("cp.async.wait_all", at)) return;
  Thread& self = *t_scheduler->current;
  land_first(self, self.copies.size(), at);
  self.group_ends.clear();
}

void require_no_copies(const Thread& thread) {
  if (thread.copies.empty()) return;
  fault(thread.copies.front().at, "%s: the thread exits with %zu copies in flight", thread.copies.front().instruction,
        thread.copies.size());
}

}  // namespace emu
