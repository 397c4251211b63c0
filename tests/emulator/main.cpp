// Runs cases by name: `emulator_tests list`, or `emulator_tests run SEEDS POLICIES NAME...` with SEEDS as in 0:50 and
// POLICIES as in fifo,random,prio. One line per run: outcome, case, policy, seed and what was wrong.
#include <charconv>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include "emulator/cases.h"
#include "emulator/emu.h"

namespace {

// All cases are small: a launch that takes longer hangs.
constexpr uint64_t kMaxSwitches = 1'000'000;

std::vector<cases::Case> all_cases() {
  std::vector<cases::Case> all;
  for (const auto& some :
       {cases::block_cases(), cases::matrix_cases(), cases::instruction_cases(), cases::small_cases()}) {
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (std::size_t end; (end = text.find(separator)) != text.npos; text.remove_prefix(end + 1)) {
    parts.push_back(text.substr(0, end));
  }
  parts.push_back(text);
  return parts;
}

void run(const cases::Case& the_case, std::string_view policy, uint64_t seed) {
  emu::Options& options = emu::options();
  options = {};
  options.seed = seed;
  options.max_switches = kMaxSwitches;
  options.policy = policy == "fifo"     ? emu::Policy::kFifo
                   : policy == "random" ? emu::Policy::kRandom
                                        : emu::Policy::kPrio;
  std::string outcome = "ok", message;
  // Before the run, for a sanitizer ends the process in the middle of it.
  std::printf("%s %.*s %llu ", the_case.name, static_cast<int>(policy.size()), policy.data(),
              static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  try {
    the_case.run();
  } catch (const emu::Fault& fault) {
    outcome = "fault";
    message = fault.what();
  } catch (const cases::WrongResult& wrong) {
    outcome = "wrong";
    message = wrong.what();
  }
  for (char& c : message) {
    if (c == '\n') c = '|';
  }
  std::printf("%s %s\n", outcome.c_str(), message.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string_view> args(argv + 1, argv + argc);
  const std::vector<cases::Case> all = all_cases();
  if (args.size() == 1 && args[0] == "list") {
    for (const cases::Case& c : all) {
      std::printf("%s %s\n", c.kind == cases::Kind::kSound ? "sound" : "planted", c.name);
    }
    return 0;
  }
  if (args.size() < 4 || args[0] != "run") {
    std::fprintf(stderr, "usage: emulator_tests list | run FIRST:LAST POLICY,... NAME...\n");
    return 2;
  }
  const std::vector<std::string_view> range = split(args[1], ':');
  uint64_t first = 0, last = 0;
  std::from_chars(range.front().begin(), range.front().end(), first);
  std::from_chars(range.back().begin(), range.back().end(), last);
  for (std::size_t i = 3; i < args.size(); ++i) {
    bool known = false;
    for (const cases::Case& c : all) {
      if (args[i] != c.name) continue;
      known = true;
      for (std::string_view policy : split(args[2], ',')) {
        for (uint64_t seed = first; seed < last; ++seed) run(c, policy, seed);
      }
    }
    if (!known) {
      std::fprintf(stderr, "no case %s\n", argv[i + 1]);
      return 2;
    }
  }
  return 0;
}
