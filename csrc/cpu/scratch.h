// Memory for one call of a kernel.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace qops::cpu::QOPS_ISA_NS {

// Cuts memory into pieces that are aligned to 64 bytes.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += bytes<T>(count);
    return piece;
  }
  template <class T>
  static size_t bytes(int64_t count) {
    return round_up(static_cast<size_t>(count) * sizeof(T));
  }

 protected:
  static size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

  char* memory_;

 private:
  size_t used_ = 0;
};

class Scratch : public Pieces {
 public:
  explicit Scratch(size_t bytes) : Pieces(std::aligned_alloc(64, round_up(bytes + 1))) {}
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool ok() const { return memory_ != nullptr; }
};

}  // namespace qops::cpu::QOPS_ISA_NS
