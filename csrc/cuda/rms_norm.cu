// rms_norm, add_rms_norm and their int8 forms, one row for a group of threads (row.cuh).
//
// Idea: x (and residual) are read once, y (and the sum) written once. The order of the sum: row_tree.h. Weights of 16
// bits like x are multiplied two elements at a time.
//
// Bytes and operations: 4 bytes an element in bf16, 8 with a residual. Rows of 4096 in bf16 on an H100: 78 instructions
// for 256 elements of a warp, 20 cycles of a multiprocessor, where memory takes 79.
#include "cuda/norm_row.cuh"
#include "cuda/quantize_row.cuh"

namespace qops::cuda {
namespace {

template <class T, class Shape, bool kInt8>
__global__ void __launch_bounds__(Shape::kBlock, 1)
    norm_kernel(const __grid_constant__ RmsNormParams p, const __grid_constant__ Int8Output out) {
  QOPS_SHARED(float, sums, Shape::kWarps);
  QOPS_SHARED(uint32_t, maxima, Shape::kWarps);
  const int64_t row = row_of_thread<Shape>();
  if (is_beyond<Shape>(row, p.x_rows.count)) return;
  const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
  const T* residual = nullptr;
  T* sum = nullptr;
  if (p.residual != nullptr) {
    residual = static_cast<const T*>(p.residual) + p.residual_rows.offset(row);
    sum = static_cast<T*>(p.residual_out) + row * p.h;
  }

  Held<Shape> held;
  Vector partials = {};
  for_chunks<Shape>(p.h, [&](int chunk, int64_t at, int64_t n) {
    Vector& z = held.vectors[chunk];
    load<Shape::kAligned>(x + at, n, z);
    if (residual != nullptr) {
      Vector r;
      Words<T> words;
      load<Shape::kAligned>(residual + at, n, r);
#pragma unroll
      for (int i = 0; i < kVector; ++i) z[i] += r[i];
      narrow_words<T>(z, words);
      store_words<Shape::kAligned>(sum + at, n, words);
      widen_words<T>(words, z);
    }
    add_squares(z, partials);
  });
  const float rstd = rstd_of_row<Shape>(partials, p.h, p.style, sums);

  // The sum is read again from where this thread has written it.
  const auto read = [&](int64_t at, int64_t n, Vector& z) {
    load<Shape::kAligned>((residual != nullptr ? sum : x) + at, n, z);
  };
  const auto finish = [&](int chunk, int64_t at, int64_t n, Words<T>& y) {
    Vector z;
    held.get(chunk, at, n, z, read);
    normalise<Shape::kAligned, T>(z, p.weight, p.weight_dtype, at, n, rstd, p.style, y);
  };
  if constexpr (!kInt8) {
    for_chunks<Shape>(p.h, [&](int chunk, int64_t at, int64_t n) {
      Words<T> y;
      finish(chunk, at, n, y);
      store_words<Shape::kAligned>(static_cast<T*>(p.y) + row * p.h + at, n, y);
    });
  } else {
    quantise_row<T, Shape>(row, p.h, out, maxima, finish);
  }
}

template <bool kInt8>
Status run(const RmsNormParams& p, const Int8Output& out, const Queue& queue) {
  if (p.h == 0 && !kInt8) return Status::kOk;  // however many rows
  bool is_aligned = aligned(p.x, p.x_rows, p.h, p.dtype) && multiple_of_16(p.weight);
  is_aligned = is_aligned && (kInt8 ? multiple_of_16(out.q) : multiple_of_16(p.y));
  if (p.residual != nullptr) {
    is_aligned = is_aligned && aligned(p.residual, p.residual_rows, p.h, p.dtype) && multiple_of_16(p.residual_out);
  }
  return with_element(p.dtype, [&](auto element) {
    return with_row_shape(p.h, is_aligned, [&](auto shape) {
      using Shape = decltype(shape);
      return launch_rows<Shape>(&norm_kernel<decltype(element), Shape, kInt8>, p.x_rows.count, 0, queue, p, out);
    });
  });
}

}  // namespace

Status rms_norm(const RmsNormParams& p, const Queue& queue) { return run<false>(p, {}, queue); }
Status rms_norm_int8(const RmsNormInt8Params& p, const Queue& queue) { return run<true>(p.norm, p.out, queue); }

}  // namespace qops::cuda
