// A stack of its own for each CUDA thread, and the switch between two of them. A hand-written switch costs about 10 ns;
// swapcontext() costs twenty times that, for a signal mask that nobody changes here.
#pragma once

#include <cstddef>

namespace emu {

struct Fiber {
  void* stack_pointer = nullptr;
  void* stack = nullptr;  // lowest address
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's, while the fiber is not running
};

// Lets the fiber start in entry(), on a stack of the given size, at the next switch to it. entry() must not return. The
// stack of an earlier run is used again.
void prepare(Fiber& fiber, std::size_t stack_bytes, void (*entry)());

// Goes on in `to`; returns when something switches back to `from`. What runs on the stack that the program was started
// with needs a Fiber as well, and nothing else.
void switch_fiber(Fiber& from, Fiber& to);

// Goes on in `to` for good: `from` may only be prepared again.
void leave_fiber(Fiber& from, Fiber& to);

void release_stack(Fiber& fiber);

}  // namespace emu
