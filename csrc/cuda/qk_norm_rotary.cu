// qk_norm_rotary: rms_norm of every head of q and k over its D elements, then rotary.
//
// Bound by memory, which one pass halves: a head is read once, waits normalised and rounded in shared memory for its
// partners, and is written once. The rows of row.cuh are the heads, those of a token side by side.
#include "cuda/norm_row.cuh"
#include "cuda/rotate_head.cuh"

namespace qops::cuda {
namespace {

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kBlock, 1)
    qk_norm_rotary_kernel(const __grid_constant__ QkNormRotaryParams params) {
  QOPS_SHARED(float, sums, Shape::kWarps);
  QOPS_DYNAMIC_SHARED(shared);
  const RotaryParams& p = params.rotary;
  const int64_t all_heads = p.q.heads + p.k.heads;
  const int64_t row = row_of_thread<Shape>();
  if (row >= p.q.x_tokens.count * all_heads) return;  // a whole warp; heads of several warps have a block each
  const int64_t token = row / all_heads;
  const bool is_q = row % all_heads < p.q.heads;
  const int64_t head = row % all_heads - (is_q ? 0 : p.q.heads);
  const RotaryHeads& heads = is_q ? p.q : p.k;
  const void* weight = is_q ? params.q_weight : params.k_weight;
  const DType weight_dtype = is_q ? params.q_weight_dtype : params.k_weight_dtype;
  const T* x = static_cast<const T*>(heads.x) + heads.x_tokens.offset(token) + head * heads.x_head_stride;
  T* y = static_cast<T*>(heads.y) + heads.y_tokens.offset(token) + head * heads.y_head_stride;
  T* normed = reinterpret_cast<T*>(shared) + threadIdx.x / Shape::kThreads * ((p.d + kVector - 1) / kVector * kVector);

  const auto read = [&](int64_t at, int64_t n, Vector& v) {
    load_strided<Shape::kAligned>(x + at * heads.x_stride, heads.x_stride, n, v);
  };
  Held<Shape> held;
  Vector partials = {};
  for_chunks<Shape>(p.d, [&](int chunk, int64_t at, int64_t n) {
    read(at, n, held.vectors[chunk]);
    add_squares(held.vectors[chunk], partials);
  });
  const float rstd = rstd_of_row<Shape>(partials, p.d, params.style, sums);
  for_chunks<Shape>(p.d, [&](int chunk, int64_t at, int64_t n) {
    Vector v, w;
    held.get(chunk, at, n, v, read);
    load<Shape::kAligned>(weight, weight_dtype, at, n, w);
    normalise<T>(v, w, rstd, params.style);
    store<Shape::kAligned>(normed + at, n, v);
  });
  if constexpr (Shape::kThreads == kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }

  const int64_t position = position_of(p, token);
  const int rotating = rotating_units(p), units = rotating + copying_units(p);
  for (int unit = thread_of_row<Shape>(); unit < units; unit += Shape::kThreads) {
    if (unit < rotating) {
      rotate_unit<Shape::kAligned>(p, position, unit, normed, 1, y, heads.y_stride);
    } else {
      copy_unit<Shape::kAligned>(p, unit - rotating, normed, 1, y, heads.y_stride);
    }
  }
}

// Heads that take more of shared memory have no kernel.
constexpr int64_t kMaxShared = 48 << 10;

}  // namespace

Status qk_norm_rotary(const QkNormRotaryParams& params, const Queue& queue) {
  const RotaryParams& p = params.rotary;
  const int64_t rows = p.q.x_tokens.count * (p.q.heads + p.k.heads);
  if (p.d == 0 || rows == 0) return Status::kOk;
  const bool is_aligned =
      aligned(p) && p.d % kVector == 0 && multiple_of_16(params.q_weight) && multiple_of_16(params.k_weight);
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    return with_row_shape(p.d, is_aligned, [&](auto shape) {
      using Shape = decltype(shape);
      const int64_t bytes =
          Shape::kRowsOfBlock * ((p.d + kVector - 1) / kVector * kVector) * static_cast<int64_t>(sizeof(T));
      if (bytes > kMaxShared) return Status::kUnsupported;
      return launch_rows<Shape>(&qk_norm_rotary_kernel<T, Shape>, rows, static_cast<size_t>(bytes), queue, params);
    });
  });
}

}  // namespace qops::cuda
