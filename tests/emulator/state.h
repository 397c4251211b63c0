// What a launch consists of while it runs. Shared by the emulator's own sources only.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "emulator/emu.h"
#include "emulator/fiber.h"

namespace emu {

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxBlockThreads = 1024;
inline constexpr int kMaxWarps = kMaxBlockThreads / kWarpSize;
inline constexpr int kBarriers = 16;
inline constexpr int kPoison = 0xff;
inline constexpr std::size_t kUnaskedSharedBytes = 48 * 1024;  // of a block whose kernel has not been allowed more

struct Block;
struct Warp;
namespace trace {
struct BlockTrace;
}

struct AsyncCopy {
  uint8_t* destination;
  const uint8_t* source;
  int bytes;
  int source_bytes;
  std::array<uint8_t, 16> at_issue;  // the source, then
  const char* instruction;
  Site at;
};

struct Thread {
  Indices indices;
  Warp* warp = nullptr;
  Fiber fiber;
  // What a thread that is neither ready nor exited waits in.
  const char* waits_in = nullptr;
  Site waits_at;
  uint32_t waits_mask = 0;
  int waits_barrier = -1;
  int waits_threads = 0;
  Tally tally{};  // of the barrier that this thread has left last
  std::vector<AsyncCopy> copies;
  std::vector<std::size_t> group_ends;  // in `copies`, of the committed groups
  bool has_waited = false;              // for the kernel before

  uint32_t bit() const { return 1u << indices.lane; }
};

// Lanes that have come to a collective, until the last one comes.
struct Meeting {
  Collective collective;
  Combine combine;
  uint32_t arrived = 0;
  Site at;  // of the first one
  std::array<void*, kWarpSize> args{};
};

struct LateStore {
  uint8_t* destination;
  std::size_t bytes;
  std::array<uint8_t, 16> data;
};

struct Warp {
  Block* block = nullptr;
  int number = 0;
  Thread* threads = nullptr;
  uint32_t existing = 0;  // lanes
  uint32_t live = 0;      // that have not exited
  uint32_t ready = 0;     // that can run
  int last_lane = kWarpSize - 1;
  uint32_t priority = 0;
  std::vector<Meeting> meetings;  // by mask; few at a time
  std::vector<LateStore> late_stores;
};

struct Barrier {
  bool open = false;  // some warp has arrived, and not all of them have
  bool whole_block = false;
  bool waited_in = false;  // by a warp, and not only arrived at
  bool reduces = false;    // what those warps wait for
  int threads = 0;         // expected
  int warps_arrived = 0;
  Tally tally{};
  Site at;  // of the first arrival
  std::array<uint32_t, kMaxWarps> waiting{};
};

struct SharedArray {
  const void* declaration;
  const char* name;
  Site at;
  std::unique_ptr<uint8_t[]> storage;
  uint8_t* data;
  std::size_t bytes;
  uint32_t address;
};

struct Block {
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int live_warps = 0;
  bool lets_dependents_start = false;
  std::array<Barrier, kBarriers> barriers;
  std::vector<SharedArray> arrays;  // the first one is the dynamic one
  uint32_t next_address = 0;
  std::size_t static_bytes = 0;
  std::shared_ptr<trace::BlockTrace> trace;  // where kTraced
};

struct Scheduler {
  Options options;
  const void* kernel_address = nullptr;
  std::string kernel;
  std::size_t dynamic_bytes = 0;
  bool is_dependent = false;
  const std::function<void()>* body = nullptr;
  uint64_t random_state = 0;
  Fiber main;
  Thread* current = nullptr;  // null: launch() itself runs
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<Warp*> warps;      // of all resident blocks
  std::size_t cursor = 0;        // the warp that ran last
  uint32_t priorities_hold = 0;  // switches, on average
  Block* finished = nullptr;
  std::string fault;
  uint64_t switches_at_exit = 0;  // when a thread ended last
  Stats stats;

  uint32_t random();
  uint32_t random_below(uint32_t n) { return static_cast<uint32_t>(uint64_t{random()} * n >> 32); }
};
extern constinit thread_local Scheduler* t_scheduler;

// Returns when the current thread is chosen again. Unless its bit in warp->ready is set, somebody has to set it.
void run_another();

std::string limits_violated(const Options& options, dim3 grid, dim3 block, std::size_t shared_bytes);

// A fault unless a block of this kernel may have so much static and dynamic shared memory, on the current GPU.
void require_shared_bytes(const void* kernel, std::size_t static_bytes, std::size_t dynamic_bytes, const Site& at);

void start_shared_memory(Block& block, std::size_t dynamic_bytes);
void end_shared_memory(Block& block);  // throws Fault where something wrote past an array
void land_stores(Warp& warp);
void lane_exited(Warp& warp);    // completes meetings that waited for it
void warp_exited(Block& block);  // completes barriers that waited for it
void require_no_copies(const Thread& thread);
// Of a dependent launch: this would not be ordered behind the kernel before.
void require_waited(const Thread& thread, const char* what, const Site& at);

}  // namespace emu
