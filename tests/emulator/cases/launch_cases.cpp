// What a launch asks of CUDA's runtime before a kernel runs: limits of shared memory, streams, captures. On a GPU these
// planted bugs are errors that the driver returns, or none at all.
#include <array>
#include <barrier>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "cuda/launch.h"
#include "emulator/cases/cases.h"

namespace cases {
namespace {

constexpr int kKiB = 1024;

template <int kCase>
__global__ void nothing() {}

constexpr int kOwnWords = 256;

// Has static and dynamic shared memory.
template <int kCase>
__global__ void touches(uint32_t* y, int bytes) {
  QOPS_SHARED(uint32_t, own, kOwnWords);
  QOPS_DYNAMIC_SHARED(shared);
  own[threadIdx.x] = threadIdx.x;
  shared[bytes - 1 - static_cast<int>(threadIdx.x)] = static_cast<uint8_t>(threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = own[threadIdx.x] + shared[bytes - 1 - static_cast<int>(threadIdx.x)];
}

const void* address(void (*kernel)()) { return reinterpret_cast<const void*>(kernel); }

void require(bool ok, const char* what) {
  if (!ok) throw WrongResult(what);
}

void allow(const void* kernel, int bytes) {
  require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess, "refused");
}

void start(void (*kernel)(), int bytes, cudaStream_t stream = emu::stream_of(emu::current_gpu())) {
  const cudaLaunchConfig_t config{1, 32, static_cast<std::size_t>(bytes), stream, nullptr, 0};
  require(cudaLaunchKernelEx(&config, kernel) == cudaSuccess, "refused");
}

template <int kCase>
void run_touches(int arch) {
  emu::options().arch = arch;
  // All that is left beside its own.
  const int bytes = static_cast<int>(emu::max_shared_bytes(arch)) - 4 * kOwnWords;
  std::array<uint32_t, 32> y{};
  const qops::Status status = qops::cuda::launch(&touches<kCase>, 1, 32, static_cast<std::size_t>(bytes),
                                                 emu::stream_of(emu::current_gpu()), y.data(), bytes);
  require(status == qops::Status::kOk, "refused");
  for (uint32_t i = 0; i < 32; ++i) require(y[i] == 2 * i, "another sum");
}

void run_current_gpu() {
  for (const int arch : {80, 86, 89, 90, 103, 120, 89}) {
    for (const int multiprocessors : {132, 84}) {
      emu::options().arch = arch;
      emu::options().multiprocessors = multiprocessors;
      const qops::cuda::Gpu gpu{multiprocessors, static_cast<int64_t>(emu::max_shared_bytes(arch)), arch};
      for (int again = 0; again < 2; ++again) require(qops::cuda::current_gpu() == gpu, "another GPU");
    }
  }
}

// No rows need no launch, and more than a grid holds are no launch either.
void run_blocks_of_a_grid() {
  const cudaStream_t stream = emu::stream_of(emu::current_gpu());
  emu::options().records = true;
  emu::options().runs = false;
  const auto try_blocks = [&](int64_t blocks, qops::Status wanted, std::size_t launches) {
    require(qops::cuda::launch_blocks(&nothing<7>, blocks, 32, 0, stream) == wanted, "another status");
    require(emu::take_calls().size() == launches, "another number of launches");
  };
  try_blocks(0, qops::Status::kOk, 0);
  try_blocks(0x7fffffff, qops::Status::kOk, 1);
  try_blocks(0x80000000, qops::Status::kUnsupported, 0);
}

// Before the kernel has run and after it, on GPUs of which one allows less.
void run_limit_beside_static_memory() {
  for (const int arch : {90, 120, 80}) run_touches<0>(arch);
}

void run_limit_without_room_for_static_memory() {
  const auto kernel = &touches<1>;
  allow(reinterpret_cast<const void*>(kernel), 227 * kKiB);
  std::array<uint32_t, 32> y{};
  const cudaLaunchConfig_t config{1, 32, kKiB, nullptr, nullptr, 0};
  require(cudaLaunchKernelEx(&config, kernel, y.data(), kKiB) == cudaSuccess, "refused");
}

// Small and large launches of one kernel, by two threads at a time.
void run_two_threads() {
  std::array<std::exception_ptr, 2> failed{};
  std::barrier together(2);
  const auto work = [&](std::size_t thread) {
    for (int round = 0; round < 50; ++round) {
      together.arrive_and_wait();
      try {
        const std::size_t bytes = (thread == 0 ? 50 : 200) * kKiB;
        if (qops::cuda::launch(&nothing<0>, 1, 32, bytes, cudaStream_t{}) == qops::Status::kOk) continue;
        throw WrongResult("a launch was refused");
      } catch (...) {
        failed[thread] = std::current_exception();
      }
    }
  };
  std::thread other(work, 1);
  work(0);
  other.join();
  for (const std::exception_ptr& error : failed) {
    if (error != nullptr) std::rethrow_exception(error);
  }
}

void run_launch_without_a_limit() { start(&nothing<1>, 48 * kKiB + 1); }

template <int kArch, int kBytes>
void run_limit_past_opt_in() {
  emu::options().arch = kArch;
  allow(address(&nothing<2>), kBytes);
}

void run_limit_of_another_gpu() {
  emu::options().arch = 80;
  allow(address(&nothing<3>), 100 * kKiB);
  emu::options().arch = 90;
  start(&nothing<3>, 100 * kKiB);
}

void run_limit_lowered() {
  allow(address(&nothing<4>), 200 * kKiB);
  allow(address(&nothing<4>), 100 * kKiB);
}

void run_another_stream() {
  emu::options().stream = 1;
  start(&nothing<5>, 0, nullptr);
}

void run_stream_of_another_gpu() {
  emu::options().stream = 1;
  const cudaStream_t stream = emu::stream_of(emu::current_gpu());
  emu::options().multiprocessors = 7;
  start(&nothing<5>, 0, stream);
}

// A launch may be captured, and what it asks of a kernel's attributes before.
void run_capture() {
  emu::options().stream = 1;
  emu::options().captures = true;
  start(&nothing<6>, 0);
  run_touches<2>(90);
}

void run_capture_default_stream() {
  emu::options().captures = true;
  start(&nothing<6>, 0);
}

void run_capture_malloc() {
  void* memory = nullptr;
  require(cudaMalloc(&memory, 16) == cudaSuccess && cudaFree(memory) == cudaSuccess, "no memory");
  emu::options().captures = true;
  static_cast<void>(cudaMalloc(&memory, 16));
}

void run_capture_free() {
  emu::options().captures = true;
  static_cast<void>(cudaFree(nullptr));
}

void run_capture_synchronise_stream() {
  require(cudaStreamSynchronize(nullptr) == cudaSuccess, "no wait");
  emu::options().captures = true;
  static_cast<void>(cudaStreamSynchronize(nullptr));
}

void run_capture_synchronise_device() {
  require(cudaDeviceSynchronize() == cudaSuccess, "no wait");
  emu::options().captures = true;
  static_cast<void>(cudaDeviceSynchronize());
}

void start_with(cudaLaunchAttributeID attribute) {
  cudaLaunchAttribute attributes[1]{};
  attributes[0].id = attribute;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config{1, 32, 0, emu::stream_of(emu::current_gpu()), attributes, 1};
  require(cudaLaunchKernelEx(&config, &nothing<8>) == cudaSuccess, "refused");
}

void run_dependence_on_sm_89() {
  emu::options().arch = 89;
  start_with(cudaLaunchAttributeProgrammaticStreamSerialization);
}

void run_another_attribute() { start_with(cudaLaunchAttributeCooperative); }

// A launch depends on the one before where the code that runs can wait for it, asked of each GPU.
void run_dependent_where_code_waits() {
  emu::options().records = true;
  emu::options().runs = false;
  struct Gpu {
    int arch, code_arch;
    bool dependent;
  };
  for (const Gpu& gpu : {Gpu{90, 0, true}, {89, 0, false}, {100, 80, false}, {120, 0, true}, {90, 0, true}}) {
    emu::options().arch = gpu.arch;
    emu::options().code_arch = gpu.code_arch;
    const qops::cuda::Dependent where{emu::stream_of(emu::current_gpu())};
    require(qops::cuda::launch(&nothing<9>, 1, 32, 0, where) == qops::Status::kOk, "refused");
    const std::vector<std::string> calls = emu::take_calls();
    require(calls.size() == 1 && calls[0].ends_with(" dependent") == gpu.dependent, "another kind of launch");
  }
  emu::options().multiprocessors = 11;  // a GPU that nobody has asked
  emu::options().refused = "cudaFuncGetAttributes";
  const qops::cuda::Dependent last{emu::stream_of(emu::current_gpu())};
  require(qops::cuda::launch(&nothing<9>, 1, 32, 0, last) == qops::Status::kLaunchFailed, "launched");
}

const Case kCases[] = {
    {Kind::kPlanted, "attribute_of_dependence_on_sm_89", run_dependence_on_sm_89},
    {Kind::kPlanted, "attribute_of_no_such_launch", run_another_attribute},
    {Kind::kSound, "dependent_where_code_waits", run_dependent_where_code_waits},
    {Kind::kSound, "current_gpu", run_current_gpu},
    {Kind::kSound, "blocks_of_a_grid", run_blocks_of_a_grid},
    {Kind::kSound, "limit_beside_static_memory", run_limit_beside_static_memory},
    {Kind::kSound, "limit_of_two_threads", run_two_threads},
    {Kind::kSound, "limit_of_sm_89", run_limit_past_opt_in<89, 99 * kKiB>},
    {Kind::kPlanted, "limit_past_sm_89", run_limit_past_opt_in<89, 99 * kKiB + 1>},
    {Kind::kPlanted, "limit_past_sm_90", run_limit_past_opt_in<90, 227 * kKiB + 1>},
    {Kind::kPlanted, "limit_missing", run_launch_without_a_limit},
    {Kind::kPlanted, "limit_of_another_gpu", run_limit_of_another_gpu},
    {Kind::kPlanted, "limit_lowered", run_limit_lowered},
    {Kind::kPlanted, "limit_without_room_for_static_memory", run_limit_without_room_for_static_memory},
    {Kind::kPlanted, "stream_of_nobody", run_another_stream},
    {Kind::kPlanted, "stream_of_another_gpu", run_stream_of_another_gpu},
    {Kind::kSound, "capture", run_capture},
    {Kind::kPlanted, "capture_default_stream", run_capture_default_stream},
    {Kind::kPlanted, "capture_malloc", run_capture_malloc},
    {Kind::kPlanted, "capture_free", run_capture_free},
    {Kind::kPlanted, "capture_synchronise_stream", run_capture_synchronise_stream},
    {Kind::kPlanted, "capture_synchronise_device", run_capture_synchronise_device},
};

}  // namespace

std::span<const Case> launch_cases() { return kCases; }

}  // namespace cases
