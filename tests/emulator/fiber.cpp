#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers on the current stack, its stack pointer in *save, and goes on where another stack
// was left.
extern "C" void emu_switch_stack(void** save, void* stack_pointer);

#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch_stack
.type emu_switch_stack, @function
emu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_stack, . - emu_switch_stack
)");
#elif defined(__aarch64__)
// Run by an instruction emulator, which compared the registers; no such machine was at hand.
asm(R"(
.text
.globl emu_switch_stack
.type emu_switch_stack, %function
emu_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emu_switch_stack, . - emu_switch_stack
)");
#else
#error "the emulator knows how to switch stacks on x86-64 and aarch64"
#endif

namespace emu {
namespace {

thread_local Fiber* t_previous = nullptr;
thread_local void (*t_entry)() = nullptr;

// The first thing on a stack after every switch to it.
void arrived([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
  // Only the stack that the program was started with has bounds that are not known yet.
  if (t_previous->stack == nullptr) {
    t_previous->stack = const_cast<void*>(bottom);
    t_previous->stack_bytes = bytes;
  }
#endif
}

void first_arrival() {
  arrived(nullptr);
  t_entry();
  __builtin_trap();
}

void go(Fiber& from, Fiber& to, [[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
  t_previous = &from;
  emu_switch_stack(&from.stack_pointer, to.stack_pointer);
  arrived(from.fake_stack);
}

void* map_stack(std::size_t bytes) {
  // An overflow runs into the page without access below the stack.
  const std::size_t guard = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* mapped =
      mmap(nullptr, guard + bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapped, guard, PROT_NONE);
  return static_cast<uint8_t*>(mapped) + guard;
}

}  // namespace

void prepare(Fiber& fiber, std::size_t stack_bytes, void (*entry)()) {
  if (fiber.stack_bytes != stack_bytes) {
    release_stack(fiber);
    fiber.stack = map_stack(stack_bytes);
    fiber.stack_bytes = stack_bytes;
  }
#if defined(__SANITIZE_ADDRESS__)
  // Frames of an earlier run that was abandoned have left their red zones.
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);
  fiber.fake_stack = nullptr;
#endif
  t_entry = entry;
  // What emu_switch_stack() finds: registers, all zero, and where to go on. Zeros above end a debugger's backtrace.
  auto* top = reinterpret_cast<uint64_t*>(static_cast<uint8_t*>(fiber.stack) + stack_bytes);
  const auto start = reinterpret_cast<uint64_t>(&first_arrival);
#if defined(__x86_64__)
  top -= 2;  // the return address lies at a multiple of 16, as after a call
  top[0] = start;
  top[1] = 0;
  constexpr int kSaved = 6;
  top -= kSaved;
  for (int i = 0; i < kSaved; ++i) top[i] = 0;
#else
  constexpr int kSaved = 20;
  constexpr int kLinkRegister = 11;
  top -= kSaved;
  for (int i = 0; i < kSaved; ++i) top[i] = i == kLinkRegister ? start : 0;
#endif
  fiber.stack_pointer = top;
}

void switch_fiber(Fiber& from, Fiber& to) { go(from, to, false); }

void leave_fiber(Fiber& from, Fiber& to) { go(from, to, true); }

void release_stack(Fiber& fiber) {
  if (fiber.stack == nullptr) return;
  const std::size_t guard = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  munmap(static_cast<uint8_t*>(fiber.stack) - guard, guard + fiber.stack_bytes);
  fiber.stack = nullptr;
  fiber.stack_bytes = 0;
}

}  // namespace emu
