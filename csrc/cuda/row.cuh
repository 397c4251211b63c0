// Kernels on rows: which threads own which elements, reductions over a row, and the launch.
//
// The threads of a row are those of row_tree.h: a warp, with several rows in a block, or a whole block. A thread keeps
// its vectors in registers between the passes over a row (kChunks of them), so memory is read once; only rows of more
// than 32768 elements, and rows that are not aligned to 16 bytes, are read again (kChunks = 0), from L2 as a rule.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/launch.h"

namespace qops::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;
// Rows of a block where a row has a warp.
inline constexpr int kWarpsOfRows = 4;

// What a kernel on rows is compiled for.
template <int kThreads_, int kChunks_, bool kAligned_>
struct RowShape {
  static constexpr int kThreads = kThreads_;  // of a row
  static constexpr int kChunks = kChunks_;    // vectors that a thread holds; 0: any number, none held
  static constexpr bool kAligned = kAligned_;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRowsOfBlock = kThreads == kWarp ? kWarpsOfRows : 1;
  static constexpr int kBlock = kThreads * kRowsOfBlock;
  static constexpr bool kHeld = kChunks > 0;
  static constexpr int kFull = kChunks / 2;  // so many of them lie in every row that has this shape: with_row_shape()
};

template <class Shape>
QOPS_DEVICE int64_t row_of_thread() {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Shape::kRowsOfBlock;
  return Shape::kRowsOfBlock == 1 ? first : first + threadIdx.x / Shape::kThreads;
}

// Of threads in the last block, whose rows there are not: whole warps.
template <class Shape>
QOPS_DEVICE bool is_beyond(int64_t row, int64_t rows) {
  return Shape::kRowsOfBlock > 1 && row >= rows;
}

template <class Shape>
QOPS_DEVICE int thread_of_row() {
  return Shape::kRowsOfBlock == 1 ? threadIdx.x : threadIdx.x % Shape::kThreads;
}

// Calls f(chunk, at, n) for each vector of the thread: its first element, and how many of it are elements of the row.
template <class Shape, class F>
QOPS_DEVICE void for_chunks(int64_t columns, const F& f) {
  constexpr uint32_t kStride = kVector * Shape::kThreads;
  const uint32_t first = kVector * thread_of_row<Shape>();
  if constexpr (Shape::kHeld) {
#pragma unroll
    for (int chunk = 0; chunk < Shape::kChunks; ++chunk) {
      const uint32_t at = first + static_cast<uint32_t>(chunk) * kStride;
      if (chunk < Shape::kFull || at < static_cast<uint32_t>(columns)) f(chunk, int64_t{at}, columns - at);
    }
  } else {
    for (int64_t at = first; at < columns; at += kStride) f(0, at, columns - at);
  }
}

// What a thread keeps of its row between passes.
template <class Shape>
struct Held {
  float vectors[Shape::kHeld ? Shape::kChunks : 1][kVector];

  // A vector that was put here; where none is held, read(at, n, v) reads it again.
  template <class Read>
  QOPS_DEVICE void get(int chunk, int64_t at, int64_t n, Vector& v, const Read& read) const {
    if constexpr (Shape::kHeld) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = vectors[chunk][i];
    } else {
      read(at, n, v);
    }
  }
};

// One value of each warp, combined over the threads of a row; every thread gets the result. `shared` has a place for
// each warp and is used once.
template <class Shape, class V, class F>
QOPS_DEVICE V combine_warps(V value, V* shared, const F& combine) {
  if constexpr (Shape::kWarps == 1) {
    return value;
  } else {
    const int lane = threadIdx.x % kWarp;
    if (lane == 0) shared[threadIdx.x / kWarp] = value;
    __syncthreads();
    // Every warp does the same, in the order of row_tree.h; lanes behind the last warp repeat the others.
    V total = shared[lane % Shape::kWarps];
#pragma unroll
    for (int stride = Shape::kWarps / 2; stride > 0; stride /= 2) {
      total = combine(total, __shfl_xor_sync(kAllLanes, total, stride));
    }
    return total;
  }
}

// Step 2 of row_tree.h.
QOPS_DEVICE float sum_of_vector(const Vector& partials) {
  float fours[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) fours[i] = partials[i] + partials[i + 4];
  return (fours[0] + fours[2]) + (fours[1] + fours[3]);
}

// Steps 2 and 3.
template <class Shape>
QOPS_DEVICE float sum_of_row(const Vector& partials, float* shared) {
  float sum = sum_of_vector(partials);
#pragma unroll
  for (int stride = kWarp / 2; stride > 0; stride /= 2) sum += __shfl_xor_sync(kAllLanes, sum, stride);
  return combine_warps<Shape>(sum, shared, [](float a, float b) { return a + b; });
}

template <class Shape>
QOPS_DEVICE uint32_t max_of_row(uint32_t value, uint32_t* shared) {
  value = __reduce_max_sync(kAllLanes, value);
  return combine_warps<Shape>(value, shared, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}

inline size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline bool multiple_of_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether every row of `columns` elements begins at a multiple of 16 bytes.
inline bool aligned(const void* p, const Rows& rows, int64_t columns, DType dtype) {
  bool ok = multiple_of_16(p) && columns % kVector == 0;
  for (int d = 0; d < rows.dims; ++d) ok = ok && rows.stride[d] * static_cast<int64_t>(size_of(dtype)) % 16 == 0;
  return ok;
}

// Calls run(T{}) with the element type of `dtype`.
template <class F>
Status with_element(DType dtype, const F& run) {
  switch (dtype) {
    case DType::kFloat32: return run(float{});
    case DType::kFloat16: return run(__half{});
    case DType::kBFloat16: return run(__nv_bfloat16{});
    default: return Status::kUnsupported;
  }
}

// Calls run(Shape{}) with the shape for rows of this length: the one with the fewest chunks, so that more than half of
// these begin and end within the row.
template <class F>
Status with_row_shape(int64_t columns, bool is_aligned, const F& run) {
  const int threads = row_threads(columns);
  const int64_t chunks = (columns + kVector * threads - 1) / (kVector * threads);
  if (threads == 32) {
    if (!is_aligned) return run(RowShape<32, 0, false>{});
    if (chunks <= 1) return run(RowShape<32, 1, true>{});
    if (chunks <= 2) return run(RowShape<32, 2, true>{});
    return run(RowShape<32, 4, true>{});
  }
  if (threads == 128) {
    if (!is_aligned) return run(RowShape<128, 0, false>{});
    if (chunks <= 2) return run(RowShape<128, 2, true>{});
    if (chunks <= 4) return run(RowShape<128, 4, true>{});
    return run(RowShape<128, 8, true>{});
  }
  if (!is_aligned) return run(RowShape<512, 0, false>{});
  if (chunks <= 4) return run(RowShape<512, 4, true>{});
  if (chunks <= 8) return run(RowShape<512, 8, true>{});
  return run(RowShape<512, 0, true>{});
}

// Launches `kernel` with one group of threads for each row.
template <class Shape, class... Parameters, class... Arguments>
Status launch_rows(void (*kernel)(Parameters...), int64_t rows, size_t shared_bytes, const Queue& queue,
                   const Arguments&... arguments) {
  return launch_blocks(kernel, (rows + Shape::kRowsOfBlock - 1) / Shape::kRowsOfBlock, Shape::kBlock, shared_bytes,
                       queue, arguments...);
}

}  // namespace qops::cuda
