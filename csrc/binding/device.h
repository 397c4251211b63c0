// The device whose kernels a binding calls. Bindings are compiled once per module: for _C with the CPU's kernels, for
// _C_cuda (QOPS_CUDA) with CUDA's. For the tests they are those of _C_cuda, linked to an emulator of CUDA and to a
// torch that says that tensors in the CPU's memory are on a GPU.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "binding/checks.h"
#include "binding/plan.h"

#if !defined(QOPS_CUDA)
#include "binding/thread_pool.h"
#else
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

// QOPS_REGISTER(m) { m.impl("<op>", TORCH_BOX(&<op>)); }: a binding's functions as the implementations of this device.
// The schemas may be registered before or after.
#if defined(QOPS_EMULATED)
#define QOPS_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(qops_emu, CPU, m)
#elif defined(QOPS_CUDA)
#define QOPS_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(qops, CUDA, m)
#else
#define QOPS_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(qops, CPU, m)
#endif

// That qops.explain() knows an operator, whose kernel and parameters these are.
#define QOPS_EXPLAIN(op, Params, kernel)                                                            \
  static const Explainable explainable_##op(#op, [](const char* name, std::string_view arguments) { \
    return device::explain<Params>(name, arguments, &device::kernels::kernel);                      \
  });

namespace qops::binding::device {

// How weights are packed there, by kind of device and version; exported models name it. A change of
// cpu/weight_pack.cpp, or of int4_layout.h or int8_layout.h, raises the number, here and in python/qops/_layout.py.
#if defined(QOPS_CUDA)
inline constexpr std::string_view kLayout = "cuda 1";
namespace kernels = qops::cuda;
// What a tensor holds is not known when the kernel is launched.
inline constexpr bool kValuesAreReadable = false;
template <class Params>
using Kernel = Status (*)(const Params&, const cuda::Queue&);
#else
inline constexpr std::string_view kLayout = "cpu 1";
namespace kernels = qops::cpu;
inline constexpr bool kValuesAreReadable = true;
template <class Params>
using Kernel = Status (*)(const Params&, const ThreadPool&);
#endif

// The plan of a call, and whether the kernel could tell it. Cold, as is all that asks for it: it is not to be inlined
// between the calls of every day.
template <class Params>
[[gnu::cold, gnu::noinline]] Status ask(const char* op, Kernel<Params> kernel, Params params, std::string& text) {
#if defined(QOPS_CUDA)
  PlanLine line(op);
  const cuda::Queue where{nullptr, &line};
#else
  PlanLine line(op);
  line.add("isa", cpu::isa_level());
  ThreadPool where = thread_pool();
  where.threads = static_cast<int>(torch::stable::get_num_threads());  // whatever keeps this machine busy just now
  where.listener = &line;
#endif
  describe_call(params, line);
  const Status status = kernel(params, where);
  text = line.text();
  return status;
}

// Of QOPS_LOG: what cannot run says so itself.
template <class Params>
[[gnu::cold, gnu::noinline]] void log_plan_of(const Checker& check, Kernel<Params> kernel, const Params& params) {
  std::string text;
  if (ask(check.op(), kernel, params, text) == Status::kOk) log_plan(text);
}

// Of qops.explain().
template <class Params>
[[gnu::cold, gnu::noinline]] std::string explain(const char* op, std::string_view arguments, Kernel<Params> kernel) {
  Params params{};
  Question question(op, arguments);
  describe_call(params, question);
  question.finish();
  std::string text;
  Checker(op).ok(ask(op, kernel, params, text));
  return text;
}

#if defined(QOPS_CUDA)
// DenseProduct by torch; `context` is the device. Results of float32 keep cuBLAS from adding the parts of a split K in
// bfloat16, which torch allows it by default.
inline void dense_product(void* context, DType dtype, const void* x, int64_t x_stride, const void* w, float* sums,
                          int64_t m, int64_t n, int64_t k) {
  const auto& device = *static_cast<const torch::stable::Device*>(context);
  const auto matrix = [&](const void* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                          ScalarType type) {
    return torch::stable::from_blob(const_cast<void*>(data), {rows, columns}, {row_stride, column_stride}, device,
                                    type);
  };
  const ScalarType type = dtype == DType::kFloat16 ? ScalarType::Half : ScalarType::BFloat16;
  const Tensor a = matrix(x, m, k, x_stride, 1, type);
  const Tensor b = matrix(w, k, n, 1, k, type);
  const Tensor c = matrix(sums, m, n, n, 1, ScalarType::Float);
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(a), from(b), from(ScalarType::Float), from(c)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  const Tensor returned = torch::stable::detail::to<Tensor>(stack[0]);  // c once more, for us to let go of
}

inline constexpr bool kIsCuda = true;

// On the current stream of the device of `on`.
template <class Params>
Status run(const Checker& check, Kernel<Params> kernel, const std::type_identity_t<Params>& params, const Tensor& on) {
  const int32_t index = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  if (plans_are_logged) [[unlikely]]
    log_plan_of(check, kernel, params);
  return kernel(params, {static_cast<cudaStream_t>(stream), nullptr});
}

// What a kernel needs of the memory of the device of `on` while it runs, in params.scratch: for this call, from the
// allocator of torch, which keeps it from others until this stream is done with it.
template <class Params>
[[nodiscard]] std::optional<Tensor> take_scratch(const Checker& check, int64_t (*needed)(const Params&),
                                                 std::type_identity_t<Params>& params, const Tensor& on) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  const int64_t bytes = needed(params);
  if (bytes == 0) return std::nullopt;
  std::optional<Tensor> scratch = check.new_tensor(on, {bytes}, ScalarType::Byte);
  params.scratch = scratch->mutable_data_ptr();
  return scratch;
}

inline std::string last_error() { return cudaGetErrorString(cudaGetLastError()); }
#else
inline constexpr bool kIsCuda = false;

inline std::string last_error() { return ""; }

template <class Params>
Status run(const Checker& check, Kernel<Params> kernel, const std::type_identity_t<Params>& params, const Tensor&) {
  if (plans_are_logged) [[unlikely]]
    log_plan_of(check, kernel, params);
  return kernel(params, thread_pool());
}
#endif

}  // namespace qops::binding::device
