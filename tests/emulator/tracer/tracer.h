// What the emulator tells the tracer, in a build that has one (kTraced): who waited for whom, and which memory the
// emulator's own instructions touch. Plain loads and stores of kernels tell it themselves; see tracer.cpp.
#pragma once

#include "emulator/state.h"

namespace emu::trace {

enum class Access : uint8_t { kRead, kWrite, kAtomicRead, kAtomicWrite };

void start_launch(const void* kernel);
void start_block(Block& block);
void end_block(Block& block);

// By the current thread, as one request together with the same instruction's accesses of other lanes.
void access(const void* address, std::size_t bytes, Access kind, const char* instruction, const Site& at);

// A write that has begun and may happen at any time until it lands: whatever touches the bytes in between is a race.
// Of `lane` of the current warp.
void begin_write(const void* address, std::size_t bytes, int lane, const char* instruction, const Site& at);
void land_write(const void* address, std::size_t bytes);
// The end of a read that has begun with access().
void end_read(const void* address, std::size_t bytes, const Site& at);

// Everything that these lanes have done is ordered before what they do from now on.
void synchronise(Warp& warp, uint32_t lanes);
void arrive(Warp& warp, uint32_t lanes, int barrier);
void leave(Block& block, int barrier);  // all who wait there
// Through a word of memory: by its own semantics, or by those of a relaxed atomic between two fences.
void release(const void* word);
void acquire(const void* word);
void relaxed(const void* word);
void fence();

// All lanes of the warp that are left stand at one place.
void converge(Warp& warp);

}  // namespace emu::trace
