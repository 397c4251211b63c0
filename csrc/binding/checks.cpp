#include "binding/checks.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <sstream>

#include "binding/device.h"
#include "binding/huge_pages.h"

namespace qops::binding {
std::string to_string(Sizes sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  return text + "]";
}

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e4m3fnuz: return "float8_e4m3fnuz";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Float8_e5m2fnuz: return "float8_e5m2fnuz";
    default: return "another dtype";
  }
}

namespace {

constexpr double kMaxFloat = std::numeric_limits<float>::max();

bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

int64_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
    case ScalarType::Char: return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    default: return 4;
  }
}

std::string device_name(const Tensor& t) {
  switch (t.device().type()) {
    case torch::headeronly::DeviceType::CPU: return "cpu";
    case torch::headeronly::DeviceType::CUDA: return "cuda:" + std::to_string(t.get_device_index());
    case torch::headeronly::DeviceType::Meta: return "meta";
    default: return "another device";
  }
}

}  // namespace

void Checker::require_tensor(const Tensor& t, const char* arg) const {
  if (!t.defined()) unsupported(std::string(arg) + " must be a tensor, got None");
}

ScalarType Checker::dtype_of(const Tensor& t, const char* arg) const {
  require_tensor(t, arg);
  try {
    return t.scalar_type();
  } catch (const std::exception&) {
    return ScalarType::Undefined;
  }
}

void Checker::refuse_grad(const Tensor& t, const char* arg) const {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  // The stable ABI does not tell. But autograd refuses to resize a tensor that it follows, even to the size that it
  // has, and where it follows none this does nothing.
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 3> resized{from(t), from(t), from(std::nullopt)};
  if (torch_call_dispatcher("aten::resize_as_", "", resized.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS) {
    const Tensor returned = to<Tensor>(resized[0]);  // t once more, for us to let go of
    return;
  }
  // Only where t requires grad has a view of it a history.
  std::array<StableIValue, 1> stack{from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::alias", "", stack.data(), TORCH_ABI_VERSION));
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_leaf", "", stack.data(), TORCH_ABI_VERSION));
  if (to<bool>(stack[0])) {
    unsupported(std::string(arg) + " must not have a tangent, as qops has no forward-mode derivatives, got one");
  }
  unsupported(std::string(arg) +
              " must not require grad, as qops has no autograd kernels (torch.no_grad() or torch.inference_mode() "
              "around the call allows it), got requires_grad = True");
}

DType Checker::float_dtype(const Tensor& t, const char* arg, const char* or_else) const {
  const DType dtype = one_of_float(dtype_of(t, arg), arg, "have dtype", or_else);
  refuse_grad(t, arg);
  return dtype;
}

DType Checker::as_float_dtype(ScalarType dtype, const char* arg) const { return one_of_float(dtype, arg, "be"); }

DType Checker::one_of_float(ScalarType dtype, const char* arg, const char* verb, const char* or_else) const {
  switch (dtype) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default:
      unsupported(std::string(arg) + " must " + verb + " float32, float16 or bfloat16" + or_else + ", got " +
                  dtype_name(dtype));
  }
}

void Checker::dtype(const Tensor& t, const char* arg, ScalarType expected) const {
  if (const ScalarType actual = dtype_of(t, arg); actual != expected) {
    unsupported(std::string(arg) + " must have dtype " + dtype_name(expected) + ", got " + dtype_name(actual));
  }
  if (is_float(expected)) refuse_grad(t, arg);
}

void Checker::same_dtype(const Tensor& t, const char* arg, const Tensor& other, const char* other_arg) const {
  const ScalarType actual = dtype_of(t, arg), expected = dtype_of(other, other_arg);
  if (actual != expected) {
    unsupported(std::string(arg) + " must have the dtype of " + other_arg + " = " + dtype_name(expected) + ", got " +
                dtype_name(actual));
  }
  if (is_float(actual)) refuse_grad(t, arg);
}

DType Checker::float32_or_same_dtype(const Tensor& t, const char* arg, const Tensor& other,
                                     const char* other_arg) const {
  const ScalarType actual = dtype_of(t, arg), expected = dtype_of(other, other_arg);
  if (actual != ScalarType::Float && actual != expected) {
    unsupported(std::string(arg) + " must have dtype float32 or the dtype of " + other_arg + " = " +
                dtype_name(expected) + ", got " + dtype_name(actual));
  }
  return float_dtype(t, arg);
}

void Checker::index_dtype(const Tensor& t, const char* arg) const {
  const ScalarType actual = dtype_of(t, arg);
  if (actual != ScalarType::Int && actual != ScalarType::Long) {
    unsupported(std::string(arg) + " must have dtype int32 or int64, got " + dtype_name(actual));
  }
}

void Checker::device(const Tensor& t, const char* arg, const Tensor& like) const {
  require_tensor(t, arg);
  const bool is_here = device::kIsCuda ? t.is_cuda() && t.get_device_index() == like.get_device_index() : t.is_cpu();
  if (is_here) return;
  const std::string here = device::kIsCuda ? like.is_cuda() ? device_name(like) : "a CUDA device" : "cpu";
  unsupported(std::string(arg) + " must be on " + here + ", got " + device_name(t));
}

void Checker::shape(const Tensor& t, const char* arg, const char* letters, Sizes expected) const {
  if (t.sizes().equals(expected)) return;
  refuse(arg, std::string("have shape ") + letters + " = " + to_string(expected), to_string(t.sizes()));
}

void Checker::same_shape(const Tensor& t, const char* arg, const Tensor& other, const char* other_arg) const {
  const auto a = t.sizes(), b = other.sizes();
  bool equal = a.size() == b.size();
  for (size_t i = 0; equal && i < a.size(); ++i) equal = a[i] == b[i];
  if (equal) return;
  refuse(arg, std::string("have the shape of ") + other_arg + " = " + to_string(b), to_string(a));
}

void Checker::at_least_1d(const Tensor& t, const char* arg) const {
  if (t.dim() < 1) refuse(arg, "have at least 1 dimension", "0");
}

void Checker::dense_last_dim(const Tensor& t, const char* arg) const {
  const int64_t last = t.dim() - 1;
  if (t.size(last) <= 1 || t.numel() == 0 || t.stride(last) == 1) return;
  refuse(arg, "have stride 1 in its last dimension", std::to_string(t.stride(last)));
}

void Checker::contiguous(const Tensor& t, const char* arg) const {
  if (t.is_contiguous()) return;
  refuse(arg, "be contiguous", "strides " + to_string(t.strides()));
}

namespace {

struct Dim {
  int64_t size;
  int64_t stride_bytes;
};

// Dimensions that move through memory, largest stride first.
std::vector<Dim> dims_by_stride(const Tensor& t) {
  std::vector<Dim> dims;
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t element_bytes = static_cast<int64_t>(t.element_size());
  dims.reserve(sizes.size());
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1) dims.push_back({sizes[d], strides[d] * element_bytes});
  }
  std::sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.stride_bytes > b.stride_bytes; });
  return dims;
}

// From the first byte to behind the last one.
int64_t extent_bytes(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return (last + 1) * static_cast<int64_t>(t.element_size());
}

// Whether blocks of block_bytes, repeated along the first n dimensions, keep apart.
bool nest(const std::vector<Dim>& dims, size_t n, int64_t block_bytes) {
  while (n-- > 0) {
    if (dims[n].stride_bytes < block_bytes) return false;
    block_bytes += dims[n].stride_bytes * (dims[n].size - 1);
  }
  return true;
}

}  // namespace

void Checker::no_overlap_within(const Tensor& t, const char* arg) const {
  if (t.numel() == 0) return;
  const std::vector<Dim> dims = dims_by_stride(t);
  if (nest(dims, dims.size(), static_cast<int64_t>(t.element_size()))) return;
  refuse(arg, "hold every element once to be written in place",
         "shape " + to_string(t.sizes()) + " with strides " + to_string(t.strides()));
}

void Checker::no_overlap(const Tensor& t, const char* arg, const Tensor& other, const char* other_arg) const {
  if (t.numel() == 0 || other.numel() == 0) return;
  const int64_t distance =
      static_cast<const char*>(other.const_data_ptr()) - static_cast<const char*>(t.const_data_ptr());
  int64_t extent = extent_bytes(t), other_extent = extent_bytes(other);
  if (distance >= extent || -distance >= other_extent) return;
  // Outer dimensions that both have are taken off until what is left lies side by side, and repeats without collision.
  const std::vector<Dim> dims = dims_by_stride(t), other_dims = dims_by_stride(other);
  for (size_t outer = 0; outer < dims.size() && outer < other_dims.size(); ++outer) {
    const Dim& dim = dims[outer];
    if (dim.size != other_dims[outer].size || dim.stride_bytes != other_dims[outer].stride_bytes) break;
    extent -= dim.stride_bytes * (dim.size - 1);
    other_extent -= dim.stride_bytes * (dim.size - 1);
    if (distance < extent && -distance < other_extent) continue;
    const int64_t both = std::max(extent, distance + other_extent) - std::min(int64_t{0}, distance);
    if (nest(dims, outer + 1, both)) return;
    break;
  }
  refuse(arg, std::string("lie apart from ") + other_arg + " in memory", "overlapping tensors");
}

void Checker::no_overlap_unless_same(const Tensor& t, const char* arg, const Tensor& other,
                                     const char* other_arg) const {
  if (t.const_data_ptr() == other.const_data_ptr() && other.is_contiguous()) return;
  no_overlap(t, arg, other, other_arg);
}

void Checker::output(const Tensor& t, const char* arg, const Tensor& like, ScalarType expected, const char* letters,
                     Sizes sizes) const {
  device(t, arg, like);
  dtype(t, arg, expected);
  shape(t, arg, letters, sizes);
  contiguous(t, arg);
}

QuantizeRule Checker::quantize_rule(std::string_view rule) const {
  if (rule == "127") return QuantizeRule::k127;
  if (rule == "compressed-tensors") return QuantizeRule::kCompressedTensors;
  if (rule == "torchao") return QuantizeRule::kTorchao;
  refuse("rule", "be \"127\", \"compressed-tensors\" or \"torchao\"", "\"" + std::string(rule) + "\"");
}

bool Checker::rule_divides(std::string_view rule, std::string_view other) const {
  if (rule == "compressed-tensors") return true;
  if (rule == other) return false;
  refuse("rule", "be \"" + std::string(other) + "\" or \"compressed-tensors\"", "\"" + std::string(rule) + "\"");
}

bool Checker::rounding_is_hf(std::string_view rounding) const {
  if (rounding == "hf") return true;
  if (rounding == "fp32") return false;
  refuse("rounding", "be \"hf\" or \"fp32\"", "\"" + std::string(rounding) + "\"");
}

RmsNormStyle Checker::rms_norm_style(double eps, double weight_offset, std::string_view rounding) const {
  const auto shown = [](double value) {
    std::ostringstream text;
    text << value;
    return text.str();
  };
  // Beyond float32, which kernels compute in, is infinite too.
  if (!(eps >= 0.0 && eps <= kMaxFloat)) refuse("eps", "be a float32 that is finite and not negative", shown(eps));
  if (!(std::abs(weight_offset) <= kMaxFloat)) {
    refuse("weight_offset", "be a finite float32", shown(weight_offset));
  }
  const bool hf = rounding_is_hf(rounding);
  if (weight_offset != 0.0 && hf) refuse("rounding", "be \"fp32\" with a non-zero weight_offset", "\"hf\"");
  return {static_cast<float>(eps), static_cast<float>(weight_offset), hf};
}

Rows Checker::rows(const Tensor& t, const char* arg, int trailing_dims) const {
  Rows rows;
  const auto sizes = t.sizes(), strides = t.strides();
  if (t.numel() == 0) {
    // Nothing is addressed, and strides may be any: all rows are the first one. torch multiplies the same sizes for
    // numel without a sign, so that 2^63 rows of nothing are a tensor; more are none.
    for (int64_t d = 0; d < t.dim() - trailing_dims; ++d) {
      if (__builtin_mul_overflow(rows.count, sizes[d], &rows.count)) {
        refuse(arg, "have fewer than 2^63 rows", "shape " + to_string(sizes));
      }
    }
    rows.dims = 1;
    rows.size[0] = rows.count;
    return rows;
  }
  // Built from the innermost leading dimension outwards, then turned round.
  for (int64_t d = t.dim() - trailing_dims - 1; d >= 0; --d) {
    rows.count *= sizes[d];
    if (sizes[d] == 1) continue;
    if (rows.dims > 0) {
      const int last = rows.dims - 1;
      if (strides[d] == rows.stride[last] * rows.size[last]) {
        rows.size[last] *= sizes[d];
        continue;
      }
    }
    if (rows.dims == Rows::kMaxDims) {
      refuse(arg, "have at most " + std::to_string(Rows::kMaxDims) + " leading dimensions that cannot be merged",
             "strides " + to_string(strides));
    }
    rows.size[rows.dims] = sizes[d];
    rows.stride[rows.dims++] = strides[d];
  }
  for (int a = 0, b = rows.dims - 1; a < b; ++a, --b) {
    std::swap(rows.size[a], rows.size[b]);
    std::swap(rows.stride[a], rows.stride[b]);
  }
  return rows;
}

void Checker::ok(Status status) const {
  if (status == Status::kOutOfMemory) unsupported("out of memory for the scratch of this call");
  if (status == Status::kLaunchFailed) unsupported("CUDA refused to launch the kernel: " + device::last_error());
  if (status != Status::kOk) unsupported("no kernel for this combination of arguments");
}

static bool poisoned = false;

void poison_outputs(bool on) { poisoned = on; }

std::vector<int64_t> with_last_size(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = last;
  return sizes;
}

std::vector<int64_t> leading_sizes(const Tensor& t) { return {t.sizes().begin(), t.sizes().end() - 1}; }

Tensor Checker::new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) const {
  const Sizes shape(sizes.data(), sizes.size());
  int64_t bytes = element_bytes(dtype);
  std::vector<int64_t> strides(sizes.size());
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = bytes / element_bytes(dtype);
    // Sizes of 0 are left out: torch's strides are products of the others.
    if (sizes[d] != 0 && __builtin_mul_overflow(bytes, sizes[d], &bytes)) {
      refuse("the result", "take fewer than 2^63 bytes", dtype_name(dtype) + " " + to_string(shape));
    }
  }
  // Not torch::stable::empty, which looks aten::empty up by its name in every call: 0.9 of 2.6 us of a small one. What
  // stands here takes 30 % of rms_norm of one row of 576 bfloat16, nearly all of it in malloc, and goes with `out=`;
  // the way from Python to the function takes 42 %, torch's conversions of arguments 10, checks 11, the kernel 4 (perf
  // on Sapphire Rapids).
  const torch::stable::Device device = like.device();
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), static_cast<int32_t>(dtype),
      static_cast<int32_t>(device.type()), static_cast<int32_t>(device.index()), &handle);
  if (error != AOTI_TORCH_SUCCESS) {
    unsupported("the result must fit into memory, got " + dtype_name(dtype) + " " + to_string(shape));
  }
  Tensor tensor(handle);
  if (bytes >= kLeastForHugePages && tensor.is_cpu() && tensor.numel() > 0) {
    ask_for_huge_pages(tensor.mutable_data_ptr(), bytes);
  }
  if (poisoned && tensor.is_cpu()) {
    std::fill_n(static_cast<unsigned char*>(tensor.mutable_data_ptr()), tensor.numel() * element_bytes(dtype), 0xff);
  }
  return tensor;
}

}  // namespace qops::binding
