#include "binding/checks.h"

namespace qops::binding {

std::string to_string(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
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
    default: return "another dtype";
  }
}

DType Checker::float_dtype(const Tensor& t, const char* arg) const {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default:
      unsupported(std::string(arg) + " must have dtype float32, float16 or bfloat16, got " +
                  dtype_name(t.scalar_type()));
  }
}

void Checker::dtype(const Tensor& t, const char* arg, ScalarType expected) const {
  if (t.scalar_type() != expected) {
    unsupported(std::string(arg) + " must have dtype " + dtype_name(expected) + ", got " + dtype_name(t.scalar_type()));
  }
}

void Checker::same_dtype(const Tensor& t, const char* arg, const Tensor& other, const char* other_arg) const {
  if (t.scalar_type() != other.scalar_type()) {
    unsupported(std::string(arg) + " must have the dtype of " + other_arg + " = " + dtype_name(other.scalar_type()) +
                ", got " + dtype_name(t.scalar_type()));
  }
}

void Checker::cpu(const Tensor& t, const char* arg) const {
  if (!t.is_cpu()) unsupported(std::string(arg) + " must be on the CPU like the other arguments");
}

void Checker::shape(const Tensor& t, const char* arg, const char* letters,
                    std::initializer_list<int64_t> expected) const {
  const auto sizes = t.sizes();
  bool equal = sizes.size() == expected.size();
  for (size_t i = 0; equal && i < sizes.size(); ++i) equal = sizes[i] == expected.begin()[i];
  if (equal) return;
  require(false, arg,
          std::string("have shape ") + letters + " = " +
              to_string(torch::headeronly::IntHeaderOnlyArrayRef(expected.begin(), expected.size())),
          to_string(sizes));
}

void Checker::same_shape(const Tensor& t, const char* arg, const Tensor& other, const char* other_arg) const {
  const auto a = t.sizes(), b = other.sizes();
  bool equal = a.size() == b.size();
  for (size_t i = 0; equal && i < a.size(); ++i) equal = a[i] == b[i];
  if (equal) return;
  require(false, arg, std::string("have the shape of ") + other_arg + " = " + to_string(b), to_string(a));
}

void Checker::at_least_1d(const Tensor& t, const char* arg) const {
  require(t.dim() >= 1, arg, "have at least 1 dimension", "0");
}

void Checker::dense_last_dim(const Tensor& t, const char* arg) const {
  const int64_t last = t.dim() - 1;
  if (t.size(last) <= 1 || t.numel() == 0 || t.stride(last) == 1) return;
  require(false, arg, "have stride 1 in its last dimension", std::to_string(t.stride(last)));
}

void Checker::contiguous(const Tensor& t, const char* arg) const {
  if (t.is_contiguous()) return;
  require(false, arg, "be contiguous", "strides " + to_string(t.strides()));
}

void Checker::disjoint(const Tensor& out, const Tensor& t, const char* arg) const {
  if (out.numel() == 0 || t.numel() == 0) return;
  // First byte of the tensor and first byte behind its last element.
  const auto range = [](const Tensor& x) {
    const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
    uintptr_t last = 0;
    for (int64_t d = 0; d < x.dim(); ++d) last += static_cast<uintptr_t>((x.size(d) - 1) * x.stride(d));
    return std::pair(begin, begin + (last + 1) * static_cast<uintptr_t>(x.element_size()));
  };
  const auto [out_begin, out_end] = range(out);
  const auto [begin, end] = range(t);
  require(out_end <= begin || end <= out_begin, "out", std::string("not overlap ") + arg, "overlapping memory");
}

bool Checker::rounding_is_hf(std::string_view rounding) const {
  require(rounding == "hf" || rounding == "fp32", "rounding", "be \"hf\" or \"fp32\"",
          "\"" + std::string(rounding) + "\"");
  return rounding == "hf";
}

Rows Checker::rows(const Tensor& t, const char* arg, int trailing_dims) const {
  Rows rows;
  const auto sizes = t.sizes(), strides = t.strides();
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
    require(rows.dims < Rows::kMaxDims, arg,
            "have at most " + std::to_string(Rows::kMaxDims) + " leading dimensions that cannot be merged",
            "strides " + to_string(strides));
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
  if (status != Status::kOk) unsupported("no kernel for this combination of arguments");
}

ThreadPool thread_pool() {
  return {[](int64_t n, int64_t grain, ThreadPool::Body body, void* arg) {
            torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(arg, begin, end); });
          },
          static_cast<int>(torch::stable::get_num_threads())};
}

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype, std::nullopt,
                              like.device());
}

}  // namespace qops::binding
