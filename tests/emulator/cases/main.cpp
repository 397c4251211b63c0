// Runs cases by name: see usage(). One line per run: case, policy, seed, outcome and what was wrong.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include "emulator/cases/cases.h"
#include "emulator/emu.h"

namespace {

// All cases are small: a launch that takes longer hangs.
constexpr uint64_t kMaxSwitches = 1'000'000;

std::vector<cases::Case> all_cases() {
  std::vector<cases::Case> all;
  for (const auto& some : {cases::block_cases(), cases::matrix_cases(), cases::instruction_cases(),
                           cases::small_cases(), cases::launch_cases()}) {
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

void run(const cases::Case& the_case, std::string_view policy, uint64_t seed, std::string_view left_out) {
  emu::Options& options = emu::options();
  options = {};
  options.left_out = left_out;
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

int usage() {
  std::fprintf(stderr,
               "usage: emulator_tests list\n"
               "       emulator_tests run FIRST:LAST POLICY,... NAME...\n"
               "       emulator_tests without FILE:LINE FIRST:LAST POLICY,... NAME...   a synchronisation left out\n"
               "       emulator_tests synchronisations NAME...                          those that a run comes past\n"
               "A build with the tracer adds what it has seen of each case: races, requests to memory.\n");
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string_view> args(argv + 1, argv + argc);
  const std::vector<cases::Case> all = all_cases();
  if (args.empty()) return usage();
  const std::string_view command = args[0];
  args.erase(args.begin());
  if (command == "list") {
    for (const cases::Case& c : all) {
      std::printf("%s %s\n", c.kind == cases::Kind::kSound ? "sound" : "planted", c.name);
    }
    return 0;
  }
  std::string_view left_out, seeds = "0:1", policies = "fifo";
  const auto take = [&](std::string_view& argument) {
    if (args.empty()) return;
    argument = args[0];
    args.erase(args.begin());
  };
  if (command == "without") take(left_out);
  if (command == "without" || command == "run") {
    take(seeds);
    take(policies);
  } else if (command != "synchronisations") {
    return usage();
  }
  uint64_t first = 0, last = 0;
  const std::vector<std::string_view> range = split(seeds, ':');
  std::from_chars(range.front().begin(), range.front().end(), first);
  std::from_chars(range.back().begin(), range.back().end(), last);
  for (std::string_view name : args) {
    const auto found = std::find_if(all.begin(), all.end(), [&](const cases::Case& c) { return c.name == name; });
    if (found == all.end()) return usage();
    for (std::string_view policy : split(policies, ',')) {
      for (uint64_t seed = first; seed < last; ++seed) run(*found, policy, seed, left_out);
    }
    if constexpr (emu::kTraced) {
      for (const std::string& line : emu::take_trace()) std::printf("%s\t%s\n", found->name, line.c_str());
    }
  }
  if (command == "synchronisations") {
    for (const emu::Synchronisation& s : emu::synchronisations()) {
      std::printf("%s %s\n", emu::to_text(s.at).c_str(), s.name);
    }
  }
  return 0;
}
