#include "emulator/ptx/ptx_emu.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "emulator/ptx/fragments.h"
#include "emulator/tracer/tracer.h"

namespace emu::ptx {

namespace {

constexpr int kLanes = 32;

// Opaque: whatever else is given as a policy is a fault.
constexpr uint64_t kEvictFirst = 0x12f0000000000000;
constexpr uint64_t kEvictLast = 0x14f0000000000000;

void require_policy(uint64_t policy, const char* instruction, const Site& at) {
  if (policy != kEvictFirst && policy != kEvictLast) {
    fault(at, "%s: 0x%llx is no cache policy", instruction, static_cast<unsigned long long>(policy));
  }
}

template <class T>
T load_global(const T* source, const char* instruction, const Site& at) {
  require_global(source, sizeof(T), instruction, at);
  if constexpr (kTraced) trace::access(source, sizeof(T), trace::Access::kRead, instruction, at);
  return *source;
}

template <class T>
void store_global(T* destination, T s, const char* instruction, const Site& at) {
  require_global(destination, sizeof(T), instruction, at);
  if constexpr (kTraced) trace::access(destination, sizeof(T), trace::Access::kWrite, instruction, at);
  *destination = s;
}

// --- ldmatrix, stmatrix ----------------------------------------------------------------------------------------------

constexpr std::size_t kRowBytes = 16;

struct LoadMatrix {
  uint16_t row[8];  // of the matrix that this lane addresses
  uint32_t* d;
};

template <int kMatrices, bool kTrans>
bool combine_load(void* const* args, uint32_t, const Site&) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      uint32_t word = 0;
      for (int half = 0; half < 2; ++half) {
        const auto e = kTrans ? fragments::matrix_8x8_trans(lane, half) : fragments::matrix_8x8(lane, half);
        const auto* source = static_cast<const LoadMatrix*>(args[fragments::lane_of_row(matrix, e.row)]);
        word |= static_cast<uint32_t>(source->row[e.column]) << (16 * half);
      }
      static_cast<LoadMatrix*>(args[lane])->d[matrix] = word;
    }
  }
  return true;
}

template <int kMatrices, bool kTrans>
void load_matrix(const char* name, uint32_t* d, uint32_t shared, const Site& at) {
  require_arch(75, name, at);
  LoadMatrix args{{}, d};
  // Lanes past 8 kMatrices address nothing. A row is read when its lane comes, as early as is legal.
  if (indices().lane < 8 * kMatrices) {
    const uint8_t* row = shared_pointer(shared, kRowBytes, kRowBytes, name, at);
    if constexpr (kTraced) trace::access(row, kRowBytes, trace::Access::kRead, name, at);
    std::memcpy(args.row, row, kRowBytes);
  }
  meet({.name = name, .one_place = true, .whole_warp = true}, &args, combine_load<kMatrices, kTrans>, at);
}

struct StoreMatrix {
  const char* name;
  uint8_t* row;  // that this lane addresses
  const uint32_t* s;
};

// No lane's store is ordered before another lane's load, or its own load of what others have brought.
template <int kMatrices, bool kTrans>
bool combine_store(void* const* args, uint32_t, const Site& at) {
  uint16_t rows[8 * kMatrices][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      const uint32_t word = static_cast<const StoreMatrix*>(args[lane])->s[matrix];
      for (int half = 0; half < 2; ++half) {
        const auto e = kTrans ? fragments::matrix_8x8_trans(lane, half) : fragments::matrix_8x8(lane, half);
        rows[fragments::lane_of_row(matrix, e.row)][e.column] = static_cast<uint16_t>(word >> (16 * half));
      }
    }
  }
  for (int lane = 0; lane < 8 * kMatrices; ++lane) {
    const auto* mine = static_cast<const StoreMatrix*>(args[lane]);
    store_late(mine->row, rows[lane], kRowBytes, lane, mine->name, at);
  }
  return true;
}

template <int kMatrices, bool kTrans>
void store_matrix(const char* name, uint32_t shared, const uint32_t* s, const Site& at) {
  require_arch(90, name, at);
  StoreMatrix args{name, nullptr, s};
  if (indices().lane < 8 * kMatrices) args.row = shared_pointer(shared, kRowBytes, kRowBytes, name, at);
  meet({.name = name, .one_place = true, .whole_warp = true}, &args, combine_store<kMatrices, kTrans>, at);
}

// --- mma -------------------------------------------------------------------------------------------------------------

template <class D>
struct MmaArgs {
  D* d;
  const uint32_t* a;
  const uint32_t* b;
};

float from_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
  // Scaling by 2^112 moves the bias of the exponent, and makes subnormals normal.
  float value = std::bit_cast<float>(magnitude) * 0x1p112f;
  if ((bits & 0x7c00) == 0x7c00) value = std::bit_cast<float>(magnitude | 0x7f800000);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
}

float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// d += a b. In which order the hardware adds is not specified for floats; here k goes up, and the accumulator comes
// last. Products of 16-bit floats are exact in float32.
template <int kK, class In, class Sum>
void multiply(const In (&a)[16][kK], const In (&b)[kK][8], Sum (&sum)[16][8]) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) sum[row][column] = 0;
    for (int k = 0; k < kK; ++k) {
      for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
    }
  }
}

template <float (*kToFloat)(uint16_t)>
bool combine_mma_16(void* const* args, uint32_t, const Site&) {
  float a[16][16], b[16][8], sum[16][8];
  const auto element = [](const uint32_t* registers, int i) {
    return kToFloat(static_cast<uint16_t>(registers[i / 2] >> (i % 2 * 16)));
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto* mine = static_cast<const MmaArgs<float>*>(args[lane]);
    for (int i = 0; i < 8; ++i) {
      const auto e = fragments::mma_m16n8k16_a(lane, i);
      a[e.row][e.column] = element(mine->a, i);
    }
    for (int i = 0; i < 4; ++i) {
      const auto e = fragments::mma_m16n8k16_b(lane, i);
      b[e.row][e.column] = element(mine->b, i);
    }
  }
  multiply(a, b, sum);
  for (int lane = 0; lane < kLanes; ++lane) {
    float* d = static_cast<const MmaArgs<float>*>(args[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const auto e = fragments::mma_m16n8_c(lane, i);
      d[i] += sum[e.row][e.column];
    }
  }
  return true;
}

bool combine_mma_s8(void* const* args, uint32_t, const Site&) {
  int32_t a[16][32], b[32][8], sum[16][8];
  const auto element = [](const uint32_t* registers, int i) {
    return static_cast<int8_t>(registers[i / 4] >> (i % 4 * 8));
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto* mine = static_cast<const MmaArgs<int32_t>*>(args[lane]);
    for (int i = 0; i < 16; ++i) {
      const auto e = fragments::mma_m16n8k32_a(lane, i);
      a[e.row][e.column] = element(mine->a, i);
    }
    for (int i = 0; i < 8; ++i) {
      const auto e = fragments::mma_m16n8k32_b(lane, i);
      b[e.row][e.column] = element(mine->b, i);
    }
  }
  multiply(a, b, sum);
  for (int lane = 0; lane < kLanes; ++lane) {
    int32_t* d = static_cast<const MmaArgs<int32_t>*>(args[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const auto e = fragments::mma_m16n8_c(lane, i);
      d[i] = static_cast<int32_t>(static_cast<uint32_t>(d[i]) + static_cast<uint32_t>(sum[e.row][e.column]));
    }
  }
  return true;
}

template <class D>
void mma(const char* name, D* d, const uint32_t* a, const uint32_t* b, Combine combine, const Site& at) {
  require_arch(80, name, at);
  MmaArgs<D> args{d, a, b};
  meet({.name = name, .one_place = true, .whole_warp = true}, &args, combine, at);
}

}  // namespace

uint32_t shared_address(const void* pointer, Site at) { return emu::shared_address(pointer, at); }

// --- asynchronous copies ---------------------------------------------------------------------------------------------

void cp_async(uint32_t shared, const void* source, int bytes, uint32_t source_bytes, const Site& at) {
  const char* name = "cp.async";
  require_arch(80, name, at);
  const auto size = static_cast<std::size_t>(bytes);
  if (source_bytes > size) fault(at, "%s: reads %u bytes to write %d", name, source_bytes, bytes);
  require_global(source, size, name, at);
  uint8_t* destination = shared_pointer(shared, size, size, name, at);
  copy_async(destination, source, bytes, static_cast<int>(source_bytes), name, at);
}

void cp_async_cg(uint32_t shared, const void* source, Site at) { cp_async(shared, source, 16, 16, at); }

void cp_async_cg_zfill(uint32_t shared, const void* source, uint32_t source_bytes, Site at) {
  cp_async(shared, source, 16, source_bytes, at);
}

void cp_async_cg_zfill_hint(uint32_t shared, const void* source, uint32_t source_bytes, uint64_t policy, Site at) {
  require_policy(policy, "cp.async.cg", at);
  cp_async(shared, source, 16, source_bytes, at);
}

void cp_async_commit(Site at) { copies_commit(at); }

void cp_async_wait_all(Site at) { copies_wait_all(at); }

// --- words in shared memory ------------------------------------------------------------------------------------------

void ld_shared(uint32_t (&d)[2], uint32_t shared, Site at) {
  const uint8_t* source = shared_pointer(shared, sizeof(d), sizeof(d), "ld.shared.v2", at);
  if constexpr (kTraced) trace::access(source, sizeof(d), trace::Access::kRead, "ld.shared.v2", at);
  std::memcpy(d, source, sizeof(d));
}

// --- matrices --------------------------------------------------------------------------------------------------------

void ldmatrix_x1(uint32_t (&d)[1], uint32_t shared, Site at) { load_matrix<1, false>("ldmatrix.x1", d, shared, at); }
void ldmatrix_x2(uint32_t (&d)[2], uint32_t shared, Site at) { load_matrix<2, false>("ldmatrix.x2", d, shared, at); }
void ldmatrix_x4(uint32_t (&d)[4], uint32_t shared, Site at) { load_matrix<4, false>("ldmatrix.x4", d, shared, at); }
void ldmatrix_x1_trans(uint32_t (&d)[1], uint32_t shared, Site at) {
  load_matrix<1, true>("ldmatrix.x1.trans", d, shared, at);
}
void ldmatrix_x2_trans(uint32_t (&d)[2], uint32_t shared, Site at) {
  load_matrix<2, true>("ldmatrix.x2.trans", d, shared, at);
}
void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t shared, Site at) {
  load_matrix<4, true>("ldmatrix.x4.trans", d, shared, at);
}

void stmatrix_x1(uint32_t shared, const uint32_t (&s)[1], Site at) {
  store_matrix<1, false>("stmatrix.x1", shared, s, at);
}
void stmatrix_x2(uint32_t shared, const uint32_t (&s)[2], Site at) {
  store_matrix<2, false>("stmatrix.x2", shared, s, at);
}
void stmatrix_x4(uint32_t shared, const uint32_t (&s)[4], Site at) {
  store_matrix<4, false>("stmatrix.x4", shared, s, at);
}
void stmatrix_x1_trans(uint32_t shared, const uint32_t (&s)[1], Site at) {
  store_matrix<1, true>("stmatrix.x1.trans", shared, s, at);
}
void stmatrix_x2_trans(uint32_t shared, const uint32_t (&s)[2], Site at) {
  store_matrix<2, true>("stmatrix.x2.trans", shared, s, at);
}
void stmatrix_x4_trans(uint32_t shared, const uint32_t (&s)[4], Site at) {
  store_matrix<4, true>("stmatrix.x4.trans", shared, s, at);
}

void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site at) {
  mma("mma.m16n8k16.f16", d, a, b, combine_mma_16<from_f16>, at);
}
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site at) {
  mma("mma.m16n8k16.bf16", d, a, b, combine_mma_16<from_bf16>, at);
}
void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site at) {
  mma("mma.m16n8k32.s8", d, a, b, combine_mma_s8, at);
}
void mma_m16n8k32_s8_from(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int32_t (&c)[4],
                          Site at) {
  std::copy(std::begin(c), std::end(c), std::begin(d));
  mma_m16n8k32_s8(d, a, b, at);
}

// --- bits and numbers ------------------------------------------------------------------------------------------------

uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t control = selector >> (4 * i) & 0xf;
    auto byte = static_cast<uint8_t>(bytes >> (8 * (control & 7)));
    if (control & 8) byte = byte & 0x80 ? 0xff : 0;
    d |= static_cast<uint32_t>(byte) << (8 * i);
  }
  return d;
}

int32_t cvt_rni_sat_s8(float x) {
  if (std::isnan(x)) return 0;
  return static_cast<int32_t>(std::clamp(std::nearbyint(x), -128.0f, 127.0f));
}

uint32_t cvt_pack_sat_s8(int32_t a, int32_t b, uint32_t c) {
  const auto byte = [](int32_t value) { return static_cast<uint32_t>(std::clamp(value, -128, 127)) & 0xff; };
  return c << 16 | byte(a) << 8 | byte(b);
}

// The nearest number or one of its neighbours, by the launch's seed: what rests on more than the bound shows.
float rcp_approx(float x) {
  const auto flushed = [](float value) { return std::fpclassify(value) == FP_SUBNORMAL ? value * 0.0f : value; };
  const float nearest = flushed(1.0f / flushed(x));
  if (!std::isnormal(nearest)) return nearest;
  const uint64_t bits = (std::bit_cast<uint32_t>(x) + options().seed) * 0x9e3779b97f4a7c15u;
  return flushed(std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) + static_cast<uint32_t>(bits >> 40) % 3 - 1));
}

// --- global memory ---------------------------------------------------------------------------------------------------

uint64_t policy_evict_first() { return kEvictFirst; }
uint64_t policy_evict_last() { return kEvictLast; }

void prefetch_l2(const void* source, Site at) { require_global(source, 1, "prefetch.global.L2", at); }

uint32_t ld_nc(const uint32_t* source, Site at) { return load_global(source, "ld.global.nc", at); }
uint2 ld_nc(const uint2* source, Site at) { return load_global(source, "ld.global.nc.v2", at); }
uint4 ld_nc(const uint4* source, Site at) { return load_global(source, "ld.global.nc.v4", at); }
uint4 ld_nc_no_allocate(const uint4* source, Site at) { return load_global(source, "ld.global.nc.v4", at); }
uint4 ld_nc_no_allocate_hint(const uint4* source, uint64_t policy, Site at) {
  require_policy(policy, "ld.global.nc.v4", at);
  return load_global(source, "ld.global.nc.v4", at);
}

void st_cs(uint32_t* destination, uint32_t s, Site at) { store_global(destination, s, "st.global.cs", at); }
void st_cs(uint2* destination, uint2 s, Site at) { store_global(destination, s, "st.global.cs.v2", at); }
void st_cs(uint4* destination, uint4 s, Site at) { store_global(destination, s, "st.global.cs.v4", at); }
void st_hint(uint4* destination, uint4 s, uint64_t policy, Site at) {
  require_policy(policy, "st.global.v4", at);
  store_global(destination, s, "st.global.v4", at);
}

// --- between blocks: others may run before each of them, and do while a thread spins ---------------------------------

uint32_t ld_acquire(const uint32_t* source, Site at) {
  yield();
  const char* name = "ld.acquire";
  require_global(source, sizeof(*source), name, at);
  if constexpr (kTraced) {
    trace::access(source, sizeof(*source), trace::Access::kAtomicRead, name, at);
    trace::acquire(source);
  }
  return *source;
}

void st_release(uint32_t* destination, uint32_t s, Site at) {
  pause();
  const char* name = "st.release";
  require_global(destination, sizeof(s), name, at);
  if constexpr (kTraced) {
    trace::access(destination, sizeof(s), trace::Access::kAtomicWrite, name, at);
    trace::release(destination);
  }
  *destination = s;
}

void red_release_add(uint32_t* destination, uint32_t s, Site at) { atom_acq_rel_add(destination, s, at); }

uint32_t atom_acq_rel_add(uint32_t* destination, uint32_t s, Site at) {
  const char* name = "atom.add";
  require_global(destination, sizeof(s), name, at);
  begin_atomic(destination, sizeof(s), name, at);
  if constexpr (kTraced) {
    trace::acquire(destination);
    trace::release(destination);
  }
  const uint32_t before = *destination;
  *destination = before + s;
  return before;
}

void nanosleep(uint32_t nanoseconds, Site at) {
  constexpr uint32_t kMost = 1'000'000;
  if (nanoseconds > kMost) fault(at, "nanosleep: at most %u ns, got %u", kMost, nanoseconds);
  yield();
}

// --- inside a block --------------------------------------------------------------------------------------------------

void griddepcontrol_launch_dependents(Site) {
  if (code_arch() >= 90) let_dependents_start();
}
void griddepcontrol_wait(Site at) {
  if (code_arch() >= 90) wait_for_kernel_before("griddepcontrol.wait", at);
}

void bar_sync(int barrier, int threads, Site at) {
  if (threads == 0) fault(at, "bar.sync: needs a number of threads; __syncthreads() waits for all");
  barrier_sync("bar.sync", barrier, threads, at);
}

void bar_arrive(int barrier, int threads, Site at) { barrier_arrive("bar.arrive", barrier, threads, at); }

void set_max_registers(const char* instruction, int registers, const Site& at) {
  require_arch(90, instruction, at);
  // Registers are not modelled; that all lanes of a warp ask for the same number is.
  meet({.name = instruction, .qualifier = registers, .one_place = true, .whole_warp = true}, nullptr, nullptr, at);
}

}  // namespace emu::ptx
