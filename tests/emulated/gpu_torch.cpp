// A torch with GPUs for the bindings of this module: tensors in the CPU's memory are on a GPU, guards make one current,
// each has a stream, and what only a GPU has (mm of bfloat16 into float32) is done on the CPU. The linker (--wrap)
// leads the module's calls of functions of torch's C interface here, where __real_ names torch's own.
//
// What a binding allocates holds NaN, and what it lets go of without returning it, scratch, holds NaN again: on a GPU
// others may have written there by then.
#include "gpu_torch.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "emulator/runtime.h"

namespace {

constexpr int32_t kCpu = 0;
std::atomic<int> g_gpu_of_tensors{-1};
std::atomic<const void*> g_elsewhere{nullptr};  // memory on the GPU after that

int gpu_of_tensors() {
  const int gpu = g_gpu_of_tensors;
  return gpu < 0 ? emu::current_gpu() : gpu;
}

bool is_gpu(int32_t device_type) { return device_type == aoti_torch_device_type_cuda(); }

void require_there(const char* function, int32_t gpu) {
  if (gpu != gpu_of_tensors()) {
    emu::fault(emu::Site(), "%s: memory of GPU %d, for tensors of GPU %d", function, gpu, gpu_of_tensors());
  }
}

struct Memory {
  void* data;
  std::size_t bytes;
};
std::mutex g_mutex;
std::map<AtenTensorHandle, Memory> g_allocated;  // and not returned so far

struct Guard {
  int before;
};

}  // namespace

namespace emulated {

void place_tensors(int gpu) { g_gpu_of_tensors = gpu; }
void place_elsewhere(const void* memory) { g_elsewhere = memory; }

}  // namespace emulated

extern "C" {

AOTITorchError __real_aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type);
AOTITorchError __wrap_aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type) {
  const AOTITorchError error = __real_aoti_torch_get_device_type(tensor, type);
  if (*type == kCpu) *type = aoti_torch_device_type_cuda();
  return error;
}

AOTITorchError __wrap_aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  void* data = nullptr;
  const AOTITorchError error = aoti_torch_get_data_ptr(tensor, &data);
  *index = gpu_of_tensors() + (data != nullptr && data == g_elsewhere ? 1 : 0);
  return error;
}

AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(new Guard{emu::current_gpu()});
  emu::set_current_gpu(index);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle handle) {
  Guard* const guard = reinterpret_cast<Guard*>(handle);
  emu::set_current_gpu(guard->before);
  delete guard;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_aoti_torch_get_current_cuda_stream(int32_t index, void** stream) {
  *stream = emu::stream_of(index);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __real_aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                               int32_t dtype, int32_t type, int32_t index, AtenTensorHandle* tensor);
AOTITorchError __wrap_aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                               int32_t dtype, int32_t type, int32_t index, AtenTensorHandle* tensor) {
  if (!is_gpu(type)) return __real_aoti_torch_empty_strided(dims, sizes, strides, dtype, type, index, tensor);
  require_there("empty_strided", index);
  const AOTITorchError error = __real_aoti_torch_empty_strided(dims, sizes, strides, dtype, kCpu, 0, tensor);
  if (error != AOTI_TORCH_SUCCESS) return error;
  void* data = nullptr;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(*tensor, &data));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(*tensor, &bytes));
  if (bytes > 0) std::memset(data, 0xff, static_cast<std::size_t>(bytes));
  emu::record("allocate " + std::to_string(bytes));
  const std::lock_guard lock(g_mutex);
  g_allocated[*tensor] = {data, static_cast<std::size_t>(bytes)};
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __real_aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* another);
AOTITorchError __wrap_aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* another) {
  {
    const std::lock_guard lock(g_mutex);
    g_allocated.erase(tensor);
  }
  return __real_aoti_torch_new_tensor_handle(tensor, another);
}

AOTITorchError __real_aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError __wrap_aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  {
    const std::lock_guard lock(g_mutex);
    if (const auto scratch = g_allocated.find(tensor); scratch != g_allocated.end()) {
      if (scratch->second.bytes > 0) std::memset(scratch->second.data, 0xff, scratch->second.bytes);
      emu::record("free " + std::to_string(scratch->second.bytes));
      g_allocated.erase(scratch);
    }
  }
  return __real_aoti_torch_delete_tensor_object(tensor);
}

AOTITorchError __real_aoti_torch_create_tensor_from_blob_v2(void* data, int64_t dims, const int64_t* sizes,
                                                            const int64_t* strides, int64_t offset, int32_t dtype,
                                                            int32_t type, int32_t index, AtenTensorHandle* tensor,
                                                            int32_t layout, const uint8_t* metadata,
                                                            int64_t metadata_bytes);
AOTITorchError __wrap_aoti_torch_create_tensor_from_blob_v2(void* data, int64_t dims, const int64_t* sizes,
                                                            const int64_t* strides, int64_t offset, int32_t dtype,
                                                            int32_t type, int32_t index, AtenTensorHandle* tensor,
                                                            int32_t layout, const uint8_t* metadata,
                                                            int64_t metadata_bytes) {
  if (is_gpu(type)) {
    require_there("from_blob", index);
    type = kCpu;
    index = 0;
  }
  return __real_aoti_torch_create_tensor_from_blob_v2(data, dims, sizes, strides, offset, dtype, type, index, tensor,
                                                      layout, metadata, metadata_bytes);
}

AOTITorchError __real_torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack,
                                            uint64_t version);
AOTITorchError __wrap_torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack,
                                            uint64_t version) {
  if (std::string(op) != "aten::mm") return __real_torch_call_dispatcher(op, overload, stack, version);
  using torch::headeronly::ScalarType;
  using torch::stable::Tensor;
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  if (std::string(overload) != "dtype_out") emu::fault(emu::Site(), "aten::mm.%s: only dtype_out is known", overload);
  require_there("aten::mm", emu::current_gpu());
  const Tensor a = to<Tensor>(stack[0]), b = to<Tensor>(stack[1]);
  const Tensor sums = to<Tensor>(stack[3]);
  if (to<ScalarType>(stack[2]) != ScalarType::Float || sums.scalar_type() != ScalarType::Float ||
      a.scalar_type() != b.scalar_type() ||
      (a.scalar_type() != ScalarType::BFloat16 && a.scalar_type() != ScalarType::Half)) {
    emu::fault(emu::Site(), "aten::mm.dtype_out: only 16-bit floats of one type into float32 are known");
  }
  emu::record("mm " + std::to_string(a.size(0)) + " " + std::to_string(b.size(1)) + " " + std::to_string(a.size(1)));
  std::array<StableIValue, 3> exact{from(torch::stable::to(a, ScalarType::Float)),
                                    from(torch::stable::to(b, ScalarType::Float)), from(sums)};
  const AOTITorchError error = __real_torch_call_dispatcher("aten::mm", "out", exact.data(), version);
  stack[0] = exact[0];
  return error;
}

}  // extern "C"
