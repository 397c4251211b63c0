// What a CPU can do at most: streams of memory, and the peaks of its multiply-add units.
//
// limits.py compiles this on the machine that it measures (-march=native -fopenmp) and loads it into the process of a
// benchmark, where OpenMP is the one of torch: the same threads as the operators'.

#include <omp.h>

#include <cstdint>

#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef __AMX_TILE__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Vector = int64_t __attribute__((vector_size(64), aligned(64), may_alias));
constexpr int64_t kLineBytes = sizeof(Vector);
constexpr int kUnroll = 8;

// As one stream, or as several at once, which is how a product reads the rows of a weight.
template <int kStreams>
int64_t read_lines(const Vector* from, int64_t lines) {
  constexpr int kEach = kUnroll / kStreams;
  Vector sums[kUnroll] = {};
  const int64_t part = lines / kUnroll * kEach;
  for (int64_t i = 0; i < part; i += kEach)
    for (int u = 0; u < kUnroll; ++u) sums[u] ^= from[u / kEach * part + i + u % kEach];
  for (int64_t i = part * kStreams; i < lines; ++i) sums[0] ^= from[i];
  for (int u = 1; u < kUnroll; ++u) sums[0] ^= sums[u];
  int64_t all = 0;
  for (int u = 0; u < kUnroll; ++u) all ^= sums[0][u];
  return all;
}

void copy_lines(Vector* to, const Vector* from, int64_t lines, [[maybe_unused]] bool past_cache) {
#ifdef __AVX512F__
  if (past_cache) {
    for (int64_t i = 0; i < lines; ++i)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(from + i));
    _mm_sfence();
    return;
  }
#endif
  for (int64_t i = 0; i < lines; ++i) to[i] = from[i];
}

struct Range {
  int64_t begin, end;
};

// Of this thread.
Range share(int64_t size) {
  const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
  return {thread * size / threads, (thread + 1) * size / threads};
}

// Each multiplies and adds into registers alone, `rounds` times on every thread, and returns the operations per thread.
// As assembly: compilers spill or reorder these loops.
using Peak = double(int64_t rounds);

#if defined(__AVX512F__)
#define EACH_OF_16(OP) \
  OP(0) OP(1) OP(2) OP(3) OP(4) OP(5) OP(6) OP(7) OP(8) OP(9) OP(10) OP(11) OP(12) OP(13) OP(14) OP(15)
#define CLOBBERS                                                                                                      \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15"
#define VECTOR_PEAK(name, instruction, operations)                                                            \
  double name(int64_t rounds) {                                                                               \
    const __m512i a = _mm512_set1_epi32(0x3f813f82), b = _mm512_set1_epi32(0x01020304);                       \
    for (int64_t i = 0; i < rounds; ++i) asm volatile(EACH_OF_16(instruction) : : "v"(a), "v"(b) : CLOBBERS); \
    return 16.0 * operations * rounds;                                                                        \
  }
#define FMA(i) "vfmadd231ps %0, %1, %%zmm" #i "\n"
VECTOR_PEAK(f32_peak, FMA, 32)
#ifdef __AVX512BF16__
#define DPBF16(i) "vdpbf16ps %0, %1, %%zmm" #i "\n"
VECTOR_PEAK(bf16_vector_peak, DPBF16, 64)
#endif
#ifdef __AVX512VNNI__
#define DPBUSD(i) "vpdpbusd %0, %1, %%zmm" #i "\n"
VECTOR_PEAK(int8_vector_peak, DPBUSD, 128)
#endif
#elif defined(__FMA__)
#define EACH_OF_12(OP) OP(0) OP(1) OP(2) OP(3) OP(4) OP(5) OP(6) OP(7) OP(8) OP(9) OP(10) OP(11)
#define FMA(i) "vfmadd231ps %0, %1, %%ymm" #i "\n"
#define CLOBBERS "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11"
double f32_peak(int64_t rounds) {
  const __m256 a = _mm256_set1_ps(1.01f), b = _mm256_set1_ps(0.01f);
  for (int64_t i = 0; i < rounds; ++i) asm volatile(EACH_OF_12(FMA) : : "x"(a), "x"(b) : CLOBBERS);
  return 12.0 * 16 * rounds;
}
// Products of bytes without VNNI: pairs to 16 bits, those to 32 bits, a sum.
double int8_vector_peak(int64_t rounds) {
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5), ones = _mm256_set1_epi16(1);
#define PAIRS(i) \
  "vpmaddubsw %0, %1, %%ymm12\n vpmaddwd %%ymm12, %2, %%ymm12\n vpaddd %%ymm12, %%ymm" #i ", %%ymm" #i "\n"
  for (int64_t i = 0; i < rounds; ++i)
    asm volatile(EACH_OF_12(PAIRS) : : "x"(a), "x"(b), "x"(ones) : CLOBBERS, "xmm12");
  return 12.0 * 64 * rounds;
}
#else
// Eight chains of a vector that the compiler knows how to multiply and add.
double f32_peak(int64_t rounds) {
  using Floats = float __attribute__((vector_size(16)));
  Floats sums[8] = {}, a = {1.01f, 1.01f, 1.01f, 1.01f};
  for (int64_t i = 0; i < rounds; ++i) {
    for (auto& sum : sums) sum = sum * a + a;
    asm volatile("" ::: "memory");
  }
  for (auto& sum : sums) asm volatile("" : : "m"(sum));
  return 8.0 * 8 * rounds;
}
#endif

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The kernel hands out tiles on request; once for the process.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

#define FOUR_TILES(op)                                                                            \
  op " %%tmm6, %%tmm4, %%tmm0\n" op " %%tmm7, %%tmm4, %%tmm1\n" op " %%tmm6, %%tmm5, %%tmm2\n" op \
     " %%tmm7, %%tmm5, %%tmm3\n"
#define TILE_PEAK(name, op, operations)                                           \
  double name(int64_t rounds) {                                                   \
    const TileConfig config;                                                      \
    alignas(64) uint8_t ones[1024];                                               \
    for (int i = 0; i < 1024; ++i) ones[i] = i % 2 == 0 ? 0x81 : 0x3f;            \
    asm volatile("ldtilecfg %0" : : "m"(config));                                 \
    asm volatile(                                                                 \
        "tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3\n" \
        "tileloadd (%0,%1,1), %%tmm4\n tileloadd (%0,%1,1), %%tmm5\n"             \
        "tileloadd (%0,%1,1), %%tmm6\n tileloadd (%0,%1,1), %%tmm7\n"             \
        :                                                                         \
        : "r"(ones), "r"(int64_t{64})                                             \
        : "memory");                                                              \
    for (int64_t i = 0; i < rounds; ++i) asm volatile(FOUR_TILES(op)::);          \
    asm volatile("tilerelease");                                                  \
    return 4.0 * operations * rounds;                                             \
  }
TILE_PEAK(bf16_tile_peak, "tdpbf16ps", 2 * 16 * 16 * 32)
TILE_PEAK(int8_tile_peak, "tdpbusd", 2 * 16 * 16 * 64)
#else
bool may_use_tiles() { return false; }
double bf16_tile_peak(int64_t) { return 0; }
double int8_tile_peak(int64_t) { return 0; }
#endif

#if defined(__AVX512F__) && defined(__AVX512BF16__)
Peak* const kBf16Vector = bf16_vector_peak;
#else
Peak* const kBf16Vector = nullptr;
#endif
#if (defined(__AVX512F__) && defined(__AVX512VNNI__)) || (!defined(__AVX512F__) && defined(__FMA__))
Peak* const kInt8Vector = int8_vector_peak;
#else
Peak* const kInt8Vector = nullptr;
#endif

}  // namespace

extern "C" {

// Reads `read` bytes and writes `written` bytes, of which there are no more: each written line copies one that is read.
// All addresses are multiples of 64; the rest of a line is left out. Returns a number that depends on what was read.
int64_t qops_stream(const void* from, int64_t read, void* to, int64_t written, int streams, int past_cache) {
  const auto* source = static_cast<const Vector*>(from);
  auto* target = static_cast<Vector*>(to);
  const int64_t copied = written / kLineBytes, alone = read / kLineBytes - copied;
  int64_t sum = 0;
#pragma omp parallel reduction(^ : sum)
  {
    const Range copy = share(copied), only = share(alone);
    copy_lines(target + copy.begin, source + copy.begin, copy.end - copy.begin, past_cache != 0);
    const Vector* rest = source + copied + only.begin;
    const int64_t lines = only.end - only.begin;
    sum ^= streams == 1 ? read_lines<1>(rest, lines) : read_lines<4>(rest, lines);
  }
  return sum;
}

// Operations of one call on all threads; 0 where the CPU has no such unit. `kind`: 0 f32, 1 bf16, 2 int8.
double qops_peak(int kind, int64_t rounds) {
  Peak* peak = kind == 0 ? f32_peak : kind == 1 ? kBf16Vector : kInt8Vector;
  if (kind != 0 && may_use_tiles()) peak = kind == 1 ? bf16_tile_peak : int8_tile_peak;
  if (peak == nullptr) return 0;
  double operations = 0;
#pragma omp parallel reduction(+ : operations)
  operations += peak(rounds);
  return operations;
}
}
