#include <numeric>

#include "emulator/cases/harness.h"
#include "emulator/cases/kernels/instructions.cuh"

namespace cases {
namespace {

void run_copies() {
  constexpr int kBytes = instructions::kCopyBytes;
  struct alignas(16) Bytes {
    uint8_t byte[kBytes];
  };
  for (uint32_t size : {0u, 2u, 7u, 16u}) {
    Random random(31 + size);
    Vector<Bytes> x(1), y(1);
    for (uint8_t& byte : x[0].byte) byte = static_cast<uint8_t>(random.below(255));
    launch(instructions::copies, 1, 32, 0, x[0].byte, reinterpret_cast<uint4*>(y[0].byte), size);
    Vector<int> got(y[0].byte, y[0].byte + kBytes), want(x[0].byte, x[0].byte + kBytes);
    const auto fill = [&](std::size_t begin, std::size_t end, std::size_t copied) {
      for (std::size_t i = begin + copied; i < end; ++i) want[i] = 0;
    };
    fill(4, 8, std::min(size, 4u));
    fill(16, 24, std::min(size, 8u));
    fill(24, 32, 0);
    fill(48, 64, size);
    fill(80, 96, size);
    require_equal(got, want);
  }
}

void run_matrices() {
  Random random(32);
  const auto x = generate(7 * 64, [&] { return static_cast<uint16_t>(random.below(0xffff)); });
  auto y = poisoned<uint16_t>(2 * x.size());
  launch(instructions::matrices, 1, 32, 0, x.data(), y.data());
  Vector<uint16_t> want = x;
  want.insert(want.end(), x.begin(), x.end());
  require_equal(y, want);
}

void run_hints() {
  Random random(33);
  struct alignas(16) Words {
    uint32_t word[16];
  };
  Vector<Words> x(1), y(1);
  for (uint32_t& word : x[0].word) word = random.bits();
  launch(instructions::hints, 1, 32, 0, x[0].word, y[0].word);
  require_equal(Vector<uint32_t>(y[0].word, y[0].word + 16), Vector<uint32_t>(x[0].word, x[0].word + 16));
}

void run_message() {
  constexpr int kWarps = 4;
  Vector<uint32_t> word(1, 0), flag(1, 0), received(1, 0), y(kWarps, 0);
  launch(instructions::message, 1, kWarps * 32, 0, word.data(), flag.data(), received.data(), y.data());
  require_equal(y, {42, 43, 43, 43});
}

void run_registers() {
  auto y = poisoned<int>(256);
  launch(instructions::registers, 1, 256, 0, y.data());
  Vector<int> want(256);
  std::iota(want.begin(), want.end(), 0);
  require_equal(y, want);
}

constexpr Case kCases[] = {
    {Kind::kSound, "instructions_copies", run_copies},       {Kind::kSound, "instructions_matrices", run_matrices},
    {Kind::kSound, "instructions_hints", run_hints},         {Kind::kSound, "instructions_message", run_message},
    {Kind::kSound, "instructions_registers", run_registers},
};

}  // namespace

std::span<const Case> instruction_cases() { return kCases; }

}  // namespace cases
