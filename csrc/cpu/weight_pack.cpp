// Packing of integer weights for the CPU, one layout for all ISA levels; bijective.
//
// A strip is 16 rows of w; rows past N are padding (code 8 for int4, 0 for int8). Within a strip K is contiguous, so
// that one output tile streams one linear range, and each 32-bit lane of a vector holds codes of one row:
//
//   int4, 64 bytes = 16 rows x 8 columns (k .. k+7), from canonical [N, K/2] (even k in the low nibble):
//     byte 4 r + j:   7 6 5 4 | 3 2 1 0        row r, j = 0 .. 3
//                     q[k+4+j]| q[k+j]
//   int8, 64 bytes = 16 rows x 4 columns, from canonical [N, K]:
//     byte 4 r + j:   q[k+j]
#include "cpu/simd.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

// Nibbles 3210 -> bytes 3.2.1.0
uint32_t spread(uint32_t v) {
  v = (v | v << 8) & 0x00ff00ffu;
  return (v | v << 4) & 0x0f0f0f0fu;
}
uint32_t gather(uint32_t v) {
  v = (v | v >> 4) & 0x00ff00ffu;
  return (v | v >> 8) & 0x0000ffffu;
}

struct Int4 {
  static constexpr int kColumns = 8;  // of one 32-bit word
  static constexpr uint32_t kPadding = 0x88888888u;
  static uint32_t pack(uint32_t word) { return spread(word & 0xffff) | spread(word >> 16) << 4; }
  static uint32_t unpack(uint32_t word) { return gather(word & 0x0f0f0f0fu) | gather(word >> 4 & 0x0f0f0f0fu) << 16; }
};
struct Int8 {
  static constexpr int kColumns = 4;
  static constexpr uint32_t kPadding = 0;
  static uint32_t pack(uint32_t word) { return word; }
  static uint32_t unpack(uint32_t word) { return word; }
};

template <class Layout, bool kPack>
Status run(const WeightPackParams& p, const ThreadPool& pool) {
  constexpr int64_t kWordBytes = 4;
  constexpr int64_t kFrom = kPack ? kWordBytes : kWordBytes * kStripRows;
  constexpr int64_t kTo = kPack ? kWordBytes * kStripRows : kWordBytes;
  const int64_t words = p.k / Layout::kColumns;  // of one row
  if (words == 0) return Status::kOk;            // however many rows
  const int64_t strips = (p.n + kStripRows - 1) / kStripRows;
  const char* source = static_cast<const char*>(p.source);
  char* target = static_cast<char*>(p.target);
  parallel_for(pool, strips, 1 + (16 << 10) / (words + 1), [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      for (int r = 0; r < kStripRows; ++r) {
        const int64_t row = strip * kStripRows + r;
        const int64_t canonical = row * words * kWordBytes;
        const int64_t packed = (strip * kStripRows * words + r) * kWordBytes;
        char* to = target + (kPack ? packed : canonical);
        if (row >= p.n) {
          for (int64_t i = 0; kPack && i < words; ++i) std::memcpy(to + i * kTo, &Layout::kPadding, kWordBytes);
          continue;
        }
        const char* from = source + (kPack ? canonical : packed);
        for (int64_t i = 0; i < words; ++i) {
          uint32_t word;
          std::memcpy(&word, from + i * kFrom, kWordBytes);
          word = kPack ? Layout::pack(word) : Layout::unpack(word);
          std::memcpy(to + i * kTo, &word, kWordBytes);
        }
      }
    }
  });
  return Status::kOk;
}

}  // namespace

Status int4_pack(const WeightPackParams& p, const ThreadPool& pool) { return run<Int4, true>(p, pool); }
Status int4_unpack(const WeightPackParams& p, const ThreadPool& pool) { return run<Int4, false>(p, pool); }
Status int8_pack(const WeightPackParams& p, const ThreadPool& pool) { return run<Int8, true>(p, pool); }
Status int8_unpack(const WeightPackParams& p, const ThreadPool& pool) { return run<Int8, false>(p, pool); }

}  // namespace qops::cpu::QOPS_ISA_NS
