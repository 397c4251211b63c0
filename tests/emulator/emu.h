// CUDA's execution model on a CPU: one fiber per CUDA thread, an adversarial scheduler, and faults with names.
//
// The first part is for those who launch kernels; the second one is what cuda_emu.h and ptx_emu.* are made of. Launches
// from several OS threads at a time are independent of each other; one launch runs on the thread that calls it.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace emu {

// --- launching -------------------------------------------------------------------------------------------------------

// Which thread runs next, wherever there is a choice.
enum class Policy : uint8_t {
  kFifo,    // a warp runs until all its threads wait, then the next one does
  kRandom,  // any warp, any lane
  kPrio,    // one warp runs as far ahead of the others as it can; now and then another one
};

struct Options {
  uint64_t seed = 1;  // of every choice: a seed and a policy replay a launch exactly
  Policy policy = Policy::kPrio;
  // The current GPU: compute capability times ten, what it lacks is a fault; multiprocessors that a launch may ask for,
  // any number of blocks runs.
  int arch = 90;
  int multiprocessors = 132;
  int code_arch = 0;        // that kernels have been compiled for: an older one, or 0: the GPU's
  unsigned stream = 0;      // the number of the caller's stream, to which launches have to go; 0: the default stream
  bool captures = false;    // that stream is being captured into a graph
  std::string refused;      // a function of the runtime that fails: "cudaLaunchKernelEx"
  bool records = false;     // what the runtime is asked (runtime.h)
  bool runs = true;         // else launches are asked everything, and their kernels do not run
  int resident_blocks = 0;  // that run interleaved; 0: one to four, drawn from the seed
  // Switches between threads, while none of them ends, until a launch counts as one that hangs: about two seconds. A
  // block that multiplies 64 x 4096 by 4096 x 32 by mma.sync takes 0.3 million.
  uint64_t max_switches = 20'000'000;
  std::size_t stack_bytes = 128 * 1024;
  // A synchronisation that all threads skip, by its place: "pipeline.cuh:64". A kernel that never fails without one of
  // its synchronisations does not need it, or is not tested enough.
  std::string left_out;
};

// Of the next launches of this OS thread.
Options& options();

// Where in a kernel's source an instruction stands: a default argument of everything that can wait or fail.
using Site = std::source_location;

// Dynamic shared memory that a block may have.
std::size_t max_shared_bytes(int arch);

// What a kernel did wrong. The message names kernel, block, thread, what is wrong and where, and how to replay it.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Where launches of this OS thread have synchronised so far, in order of first use.
struct Synchronisation {
  const char* name;
  Site at;
};
const std::vector<Synchronisation>& synchronisations();

// "pipeline.cuh:64".
std::string to_text(const Site& at);

// Bytes that cp.async has read from global memory in the launches of this OS thread so far.
uint64_t copied_bytes();

#if defined(EMULATOR_TRACER)
inline constexpr bool kTraced = true;
#else
inline constexpr bool kTraced = false;
#endif

// Of a build with the tracer: what the launches of this OS thread have done since it was last asked, one line each with
// tabs between its fields, and of them how many races.
std::vector<std::string> take_trace();
std::size_t races_seen();

struct Stats {
  uint64_t switches = 0;     // between threads
  uint64_t blocks_told = 0;  // that have let dependents start
};

// Runs thread_body() once per CUDA thread. `kernel` is the function whose name messages give. A dependent one may have
// begun while the kernel before ran, so that each of its threads has to wait before it touches global memory.
Stats launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, bool is_dependent,
             const std::function<void()>& thread_body);

// --- inside a kernel -------------------------------------------------------------------------------------------------

// Ends the launch with a Fault, on the stack of launch(): none crosses a fiber. What the kernel's threads hold is lost.
[[noreturn]] void fault(const Site& at, const char* format, ...) __attribute__((format(__printf__, 2, 3)));

struct Indices {
  uint3 thread;
  uint3 block;
  dim3 block_dim;
  dim3 grid_dim;
  int lane;
};
extern constinit thread_local const Indices* t_indices;
inline const Indices& indices() { return *t_indices; }

// Lets others run first, if they are chosen.
void pause();

// Of a thread that spins: lets others run, so that what it waits for can happen.
void yield();

// Whether options().left_out names this place; every synchronisation asks first.
bool is_left_out(const char* name, const Site& at);

// Switches so far: the emulator's clock.
uint64_t clock();

void require_arch(int arch, const char* instruction, const Site& at);
void require_aligned(const void* pointer, std::size_t bytes, const char* instruction, const Site& at);
// Before an atomic instruction reads and writes: aligned, and others have run.
void begin_atomic(const void* pointer, std::size_t bytes, const char* instruction, const Site& at);
// Aligned, not in shared memory, and by a thread that has waited for the kernel before, where it has to.
void require_global(const void* pointer, std::size_t bytes, const char* instruction, const Site& at);

// The code that runs knows instructions of this architecture.
int code_arch();

// What lanes of one warp do together. The last lane of `mask` to come runs combine() for all of them.
struct Collective {
  const char* name;
  uint32_t mask = 0xffffffff;
  int qualifier = 0;        // lanes must agree on it
  bool one_place = false;   // .aligned: all lanes stand at one place in the source
  bool whole_warp = false;  // 32 lanes, none of which has exited
};
// `args[lane]` is what each of the `lanes` brought; a result is written into it. False keeps the lanes waiting: whoever
// wakes them is up to combine().
using Combine = bool (*)(void* const* args, uint32_t lanes, const Site& at);
void meet(const Collective& collective, void* args, Combine combine, const Site& at);

// Both also make visible what the warp has stored with store_late(); others may run at a fence.
void sync_warp(uint32_t mask, const Site& at);
void fence();

// Bits of another lane, by PTX's rules for shfl.sync.
enum class Shuffle : uint8_t { kIndex, kUp, kDown, kXor };
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t bits, int operand, int width, std::size_t bytes, const Site& at);

struct Vote {
  uint32_t ballot;   // lanes whose predicate holds
  uint32_t lanes;    // lanes that voted
  uint32_t matches;  // lanes with this lane's value
};
Vote vote(const char* name, uint32_t mask, uint64_t value, const Site& at);

enum class Reduce : uint8_t { kAdd, kMin, kMax, kMinSigned, kMaxSigned, kAnd, kOr, kXor };
uint32_t reduce(const char* name, Reduce kind, uint32_t mask, uint32_t value, const Site& at);

// The 16 barriers of a block. `threads` 0: all of the block. What holds in every thread, in any, in how many.
struct Tally {
  bool all;
  bool any;
  int count;
};
Tally barrier_sync(const char* name, int barrier, int threads, const Site& at);
Tally barrier_reduce(const char* name, int barrier, int threads, bool predicate, const Site& at);
void barrier_arrive(const char* name, int barrier, int threads, const Site& at);

// Shared memory of the current block: starts out as 0xff (NaN, -1), between guards.
uint8_t* static_shared(const void* declaration, const char* name, std::size_t bytes, std::size_t alignment,
                       Site at = Site::current());
uint8_t* dynamic_shared();
uint32_t shared_address(const void* pointer, const Site& at);
uint8_t* shared_pointer(uint32_t address, std::size_t bytes, std::size_t alignment, const char* instruction,
                        const Site& at);

// A store of a lane of the current warp that lands as late as is legal: when the warp synchronises or fences. Until
// then, poison.
void store_late(uint8_t* destination, const void* source, std::size_t bytes, int lane, const char* instruction,
                const Site& at);

// A copy that lands as late as is legal: the destination is poisoned now and written in copies_wait(); a source that
// changes in between, and a destination that is written in between, are faults.
void copy_async(uint8_t* destination, const void* source, int bytes, int source_bytes, const char* instruction,
                const Site& at);
void copies_commit(const Site& at);
void copies_wait(std::size_t pending_groups, const Site& at);
void copies_wait_all(const Site& at);

// By this block: the kernel launched next, if it depends on this one, may start. And of that one: waits for this one.
void let_dependents_start();
void wait_for_kernel_before(const char* instruction, const Site& at);

}  // namespace emu

// Each declaration has an identity of its own, and each instance of a template around it too.
#define EMU_STATIC_SHARED(T, count, alignment)         \
  *reinterpret_cast<T(*)[count]>(::emu::static_shared( \
      [] {                                             \
        static const char identity = 0;                \
        return static_cast<const void*>(&identity);    \
      }(),                                             \
      #T "[" #count "]", sizeof(T) * (count), alignment))
