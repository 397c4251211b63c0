// What every binding needs: argument checks with one wording, and the way from stable tensors to kernel parameters.
//
// Messages read "qops.<op>: <argument> must <requirement>, got <actual>". Values that are wrong throw
// std::invalid_argument, which Python sees as ValueError; a dtype or layout without a kernel throws std::runtime_error.
// (STD_TORCH_CHECK would put the path of a source file on the build machine into the text.)
// The fake kernels in python/qops/ops raise the same words; tests compare the two.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "kernels.h"

namespace qops::binding {

using torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;

// The op that is being called; every check starts from it.
class Checker {
 public:
  explicit constexpr Checker(const char* op) : op_(op) {}
  // Of one of the layers that the op computes, by the number that messages give it.
  constexpr Checker(const char* op, int64_t layer) : op_(op), layer_(layer) {}

  constexpr const char* op() const { return op_; }

  [[noreturn]] void fail(const std::string& what) const { throw std::invalid_argument(prefix() + what); }
  [[noreturn]] void unsupported(const std::string& what) const { throw std::runtime_error(prefix() + what); }

  [[noreturn]] void refuse(const char* arg, const std::string& requirement, const std::string& actual) const {
    fail(std::string(arg) + " must " + requirement + ", got " + actual);
  }
  // Of an index that a tensor holds, where Python's callers expect an IndexError.
  [[noreturn]] void refuse_index(const char* arg, const std::string& requirement, int64_t actual) const {
    throw std::out_of_range(prefix() + arg + " must " + requirement + ", got " + std::to_string(actual));
  }
  // Where building the two texts costs more than the call can spare, ask first and then refuse().
  void require(bool ok, const char* arg, const std::string& requirement, const std::string& actual) const {
    if (!ok) refuse(arg, requirement, actual);
  }

  // The dispatcher lets None pass for a tensor; device() and everything that looks at a dtype asks this first.
  void require_tensor(const Tensor& t, const char* arg) const;
  // Undefined for a dtype that the stable ABI has no name for.
  ScalarType dtype_of(const Tensor& t, const char* arg) const;
  // What follows, up to index_dtype(), also refuses a tensor whose gradients or tangents would be lost, in grad mode:
  // each tensor of an op passes one of them.
  // x is float32, float16 or bfloat16. `or_else`: what it might have been, for the message.
  DType float_dtype(const Tensor& t, const char* arg, const char* or_else = "") const;
  // The same of an argument that is a dtype.
  DType as_float_dtype(ScalarType dtype, const char* arg) const;
  void same_dtype(const Tensor& t, const char* arg, const Tensor& other, const char* other_arg) const;
  void dtype(const Tensor& t, const char* arg, ScalarType expected) const;
  DType float32_or_same_dtype(const Tensor& t, const char* arg, const Tensor& other, const char* other_arg) const;
  // int32 or int64.
  void index_dtype(const Tensor& t, const char* arg) const;
  // On the device that these bindings are for; with several of its kind, on that of `like`.
  void device(const Tensor& t, const char* arg, const Tensor& like) const;
  // Exactly this shape; `letters` names it, e.g. "[N, K]".
  void shape(const Tensor& t, const char* arg, const char* letters, Sizes expected) const;
  void same_shape(const Tensor& t, const char* arg, const Tensor& other, const char* other_arg) const;
  void at_least_1d(const Tensor& t, const char* arg) const;
  // Stride 1 in the last dimension (a dimension of size 0 or 1 has any stride).
  void dense_last_dim(const Tensor& t, const char* arg) const;
  void contiguous(const Tensor& t, const char* arg) const;
  // For tensors that an op writes in place. No two indices reach one element: each stride passes the extent of the
  // dimensions with smaller strides (true of every slice and transposition of a contiguous tensor).
  void no_overlap_within(const Tensor& t, const char* arg) const;
  // The two share no memory, or are parts of the same rows, e.g. q and k of one qkv tensor.
  void no_overlap(const Tensor& t, const char* arg, const Tensor& other, const char* other_arg) const;
  // As no_overlap(), for a contiguous t of the dtype and shape of `other`: it may also be `other` itself, where the
  // kernel reads each element before it writes there.
  void no_overlap_unless_same(const Tensor& t, const char* arg, const Tensor& other, const char* other_arg) const;
  // A tensor that an op writes, given by the caller: on the device of `like`, of this dtype and shape, contiguous.
  void output(const Tensor& t, const char* arg, const Tensor& like, ScalarType expected, const char* letters,
              Sizes sizes) const;
  // "hf" -> true, "fp32" -> false.
  bool rounding_is_hf(std::string_view rounding) const;
  // What every form of rms_norm adds: eps >= 0 and weight_offset, both finite in float32.
  RmsNormStyle rms_norm_style(double eps, double weight_offset, std::string_view rounding) const;
  QuantizeRule quantize_rule(std::string_view rule) const;
  // Of the asymmetric and the static quantisers: "compressed-tensors" -> true, the other one -> false.
  bool rule_divides(std::string_view rule, std::string_view other) const;
  // Leading dimensions, merged where the strides allow.
  Rows rows(const Tensor& t, const char* arg, int trailing_dims = 1) const;
  void ok(Status status) const;
  // Uninitialised contiguous tensor on the device of `like`.
  Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) const;
  Tensor contiguous_like(const Tensor& like) const {
    return new_tensor(like, {like.sizes().begin(), like.sizes().end()}, like.scalar_type());
  }

 private:
  // 0.6 us a tensor, so in grad mode alone. The typed functions of Python look for tangents in every mode.
  void refuse_grad(const Tensor& t, const char* arg) const;
  DType one_of_float(ScalarType dtype, const char* arg, const char* verb, const char* or_else = "") const;
  std::string prefix() const {
    const std::string of_layer = layer_ == kNoLayer ? "" : "layer " + std::to_string(layer_) + ": ";
    return std::string("qops.") + op_ + ": " + of_layer;
  }

  static constexpr int64_t kNoLayer = -1;
  const char* op_;
  int64_t layer_ = kNoLayer;
};

std::string to_string(Sizes sizes);
std::string dtype_name(ScalarType dtype);

// For tests: whether new tensors on the CPU are filled with NaN (integers: -1), so that an element that no kernel
// writes shows. torch's own option for that does not reach the function that makes them.
void poison_outputs(bool on);

// The sizes of t, the last one replaced; or without the last one.
std::vector<int64_t> with_last_size(const Tensor& t, int64_t last);
std::vector<int64_t> leading_sizes(const Tensor& t);

}  // namespace qops::binding
