// Runs every sound case on a GPU: what the emulator lets pass, hardware computes alike. Usage: hardware_tests [SEEDS]
#include <cstdio>
#include <cstdlib>

#include "emulator/cases/harness.h"

int main(int argc, char** argv) {
  const int seeds = argc > 1 ? std::atoi(argv[1]) : 20;
  int runs = 0, wrong = 0;
  for (const auto& some :
       {cases::block_cases(), cases::matrix_cases(), cases::instruction_cases(), cases::small_cases()}) {
    for (const cases::Case& c : some) {
      if (c.kind != cases::Kind::kSound) continue;
      for (int seed = 0; seed < seeds; ++seed) {
        emu::options().seed = static_cast<uint64_t>(seed);
        try {
          hardware::arena().used = 0;
          ++runs;
          c.run();
        } catch (const std::exception& error) {
          ++wrong;
          std::printf("%s, seed %d: %s\n", c.name, seed, error.what());
        }
      }
    }
  }
  std::printf("%d runs, %d wrong\n", runs, wrong);
  return runs == 0 || wrong != 0;
}
