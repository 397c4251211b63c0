// Memory for one call of a kernel.
#pragma once

#include <cstddef>
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
  static constexpr size_t kAlignment = 64;
  static size_t round_up(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  char* memory_;

 private:
  size_t used_ = 0;
};

// Aligned by hand: glibc before 2.38 does not find the memory again that aligned_alloc() has given and free() has taken
// back, and a process that decodes grew by 20 KB a forward without end.
class Scratch : public Pieces {
 public:
  explicit Scratch(size_t bytes) : Scratch(std::malloc(bytes + kAlignment), nullptr) {}
  ~Scratch() { std::free(whole_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool ok() const { return whole_ != nullptr; }

 private:
  Scratch(void* whole, std::nullptr_t)
      : Pieces(reinterpret_cast<void*>(round_up(reinterpret_cast<uintptr_t>(whole)))), whole_(whole) {}

  void* const whole_;
};

}  // namespace qops::cpu::QOPS_ISA_NS
