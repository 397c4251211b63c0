// A kernel, sound or with a planted bug, with inputs and the right result: what the driver runs by name.
#pragma once

#include <span>
#include <stdexcept>

namespace cases {

// The kernel ran to its end, and what it computed is wrong.
class WrongResult : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Kind { kSound, kPlanted };

struct Case {
  Kind kind;
  const char* name;
  void (*run)();  // under emu::options(); throws emu::Fault or WrongResult
};

std::span<const Case> block_cases();        // barriers, shuffles, shared memory, several blocks
std::span<const Case> matrix_cases();       // asynchronous copies, ldmatrix, stmatrix, mma
std::span<const Case> instruction_cases();  // every form of every instruction
std::span<const Case> small_cases();        // votes, reductions, atomics; limits of a launch
std::span<const Case> launch_cases();       // of the emulator alone: attributes, streams, captures

}  // namespace cases
