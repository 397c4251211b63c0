// Places become lines of the source by addr2line, which comes with every g++.
#include "emulator/tracer/tracer_report.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <sstream>

namespace emu::trace {
namespace {

struct Frame {
  std::string function, file;
  int line;

  std::string place() const { return file.substr(file.rfind('/') + 1) + ":" + std::to_string(line); }
  // Of a header of the emulator, of CUDA or of the language.
  bool is_kernel() const {
    if (line == 0 || file.find("/include/") != file.npos) return false;
    const std::string name = file.substr(file.rfind('/') + 1);
    return name != "emu.h" && name != "cuda_emu.h" && name != "ptx_emu.h";
  }
};

// Innermost first, for each address in the program or library that this code is in.
std::map<uintptr_t, std::vector<Frame>> frames_of(const std::vector<uintptr_t>& addresses) {
  std::map<uintptr_t, std::vector<Frame>> frames;
  Dl_info info;
  link_map* map = nullptr;
  if (dladdr1(reinterpret_cast<void*>(&frames_of), &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) == 0) {
    return frames;
  }
  const std::string program =
      map->l_name[0] != '\0' ? map->l_name : std::filesystem::read_symlink("/proc/self/exe").string();
  constexpr std::size_t kAtOnce = 4000;  // of a command line
  for (std::size_t first = 0; first < addresses.size(); first += kAtOnce) {
    std::ostringstream command;
    command << "addr2line -a -i -f -C -e '" << program << "'" << std::hex;
    for (std::size_t i = first; i < std::min(first + kAtOnce, addresses.size()); ++i) {
      command << " 0x" << addresses[i] - map->l_addr;
    }
    FILE* pipe = popen(command.str().c_str(), "r");
    if (pipe == nullptr) return frames;
    std::vector<Frame>* current = nullptr;
    std::array<char, 1 << 16> buffer;
    std::string function;
    while (std::fgets(buffer.data(), static_cast<int>(buffer.size()), pipe) != nullptr) {
      std::string line = buffer.data();
      while (!line.empty() && line.back() == '\n') line.pop_back();
      if (line.starts_with("0x")) {
        current = &frames[std::stoull(line, nullptr, 16) + map->l_addr];
        function.clear();
      } else if (function.empty()) {
        function = line;
      } else if (current != nullptr) {
        const std::size_t colon = line.rfind(':');
        current->push_back({function, line.substr(0, colon), std::atoi(line.c_str() + colon + 1)});
        function.clear();
      }
    }
    pclose(pipe);
  }
  return frames;
}

// `norm_kernel<float, ...>` of `void qops::cuda::(anonymous namespace)::norm_kernel<float, ...>(...)`.
std::string short_name(std::string name) {
  for (std::size_t i; (i = name.find("(anonymous namespace)::")) != name.npos;) name.erase(i, 23);
  int depth = 0;
  std::size_t begin = 0, end = name.size();
  for (std::size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (depth > 0) continue;
    if (name[i] == ':' || name[i] == ' ') begin = i + 1;
    if (name[i] == '(') {
      end = i;
      break;
    }
  }
  return name.substr(begin, end - begin);
}

class Names {
 public:
  Names(const Races& races, const Costs& costs, const Sites& sites) {
    std::vector<uintptr_t> addresses;
    const auto want = [&](Place place) {
      if (!is_site(place)) addresses.push_back(reinterpret_cast<uintptr_t>(place) - 1);  // in the call
    };
    for (const auto& [key, at] : sites) sites_.emplace(&at, to_text(at));
    for (const auto& [key, race] : races) {
      want(key.second);
      want(key.first);
      addresses.push_back(reinterpret_cast<uintptr_t>(key.kernel));
    }
    for (const auto& [instruction, cost] : costs) {
      want(instruction.place);
      addresses.push_back(reinterpret_cast<uintptr_t>(instruction.kernel));
    }
    std::sort(addresses.begin(), addresses.end());
    addresses.erase(std::unique(addresses.begin(), addresses.end()), addresses.end());
    frames_ = frames_of(addresses);
  }

  std::string kernel(const void* kernel) const {
    const auto found = frames_.find(reinterpret_cast<uintptr_t>(kernel));
    return found == frames_.end() || found->second.empty() ? "?" : short_name(found->second.back().function);
  }

  // "elements.cuh:39 < rms_norm.cu:41": a line of a kernel's source, and those that it is inlined into.
  std::string place(Place place) const {
    if (is_site(place)) return sites_.at(place);
    const auto found = frames_.find(reinterpret_cast<uintptr_t>(place) - 1);
    if (found == frames_.end()) return "?";
    std::string text;
    for (const Frame& frame : found->second) {
      if (frame.is_kernel()) text += (text.empty() ? "" : " < ") + frame.place();
    }
    return text.empty() ? "?" : text;
  }

 private:
  bool is_site(Place place) const { return sites_.contains(place); }

  std::unordered_map<Place, std::string> sites_;
  std::map<uintptr_t, std::vector<Frame>> frames_;
};

std::string thread_text(ThreadId id) {
  return "thread " + std::to_string(number_of(id)) + " of block " + std::to_string(block_of(id));
}

}  // namespace

std::vector<std::string> report(const Races& races, const Costs& costs, const Sites& sites) {
  const Names names(races, costs, sites);
  std::vector<std::string> lines;
  for (const auto& [key, race] : races) {
    std::ostringstream line;
    line << "race\t" << names.kernel(key.kernel) << "\t" << (key.shared ? "shared" : "global") << "\t" << key.what
         << "\t" << names.place(key.second) << "\t" << names.place(key.first) << "\t" << thread_text(race.second_thread)
         << ", " << thread_text(race.first_thread) << "\t" << race.times;
    lines.push_back(line.str());
  }
  // By line: one line of the source is several instructions where it is unrolled or inlined.
  std::map<std::string, Cost> sums;
  for (const auto& [instruction, cost] : costs) {
    Cost& sum = sums[names.kernel(instruction.kernel) + "\t" + (instruction.shared ? "shared" : "global") + "\t" +
                     instruction.name + "\t" + names.place(instruction.place)];
    sum.requests += cost.requests;
    sum.taken += cost.taken;
    sum.least += cost.least;
  }
  for (const auto& [text, cost] : sums) {
    std::ostringstream line;
    line << "requests\t" << text << "\t" << cost.requests << "\t" << cost.taken << "\t" << cost.least;
    lines.push_back(line.str());
  }
  return lines;
}

}  // namespace emu::trace
