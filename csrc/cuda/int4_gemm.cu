// int4_gemm, and of int8_weight_only_gemm what is not the kernels for its codes: the plan, what comes before the
// product (x in packed order) and after it (slices of several blocks); and the product of so many rows that weights of
// 4 bits are made into numbers first, for cuBLAS.
//
// x is copied to scratch first where the weight has a permutation, where rows of x do not begin at multiples of 16
// bytes, or where they have several strides and are many: 4 M K bytes of traffic in L2 and one more launch.
// Rows of float32 become three of bfloat16 each, whose sums are added at the end: three times the rows, two launches
// more, and all the bits of x. For a few rows, which reading the weights bounds, that is next to nothing.
#include "cuda/dense_weights.cuh"
#include "cuda/weight_only_gemm.cuh"

namespace qops::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kParts = 3;  // of bfloat16 in a float32

// target[m, k] = x[m, perm[k]], eight columns a thread. An index out of range gives NaN: it cannot be told before the
// launch.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    gather_kernel(const __grid_constant__ WeightOnlyGemmParams p, T* target) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x, chunks = p.k / kVector;
  if (i >= p.x_rows.count * chunks) return;
  const int64_t m = i / chunks, k = i % chunks * kVector;
  const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(m);
  uint32_t words[kVector / 2];
#pragma unroll
  for (int pair = 0; pair < kVector / 2; ++pair) {
    uint32_t halves[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int64_t column = k + 2 * pair + h;
      if (p.perm != nullptr) column = p.perm[column];
      halves[h] = column >= 0 && column < p.k ? to_bits(x[column]) : 0x7fff;  // NaN in both types
    }
    words[pair] = halves[0] | halves[1] << 16;
  }
  *reinterpret_cast<uint4*>(target + m * p.k + k) = make_uint4(words[0], words[1], words[2], words[3]);
}

// The same of x in float32, three rows for each: [3][rows][K] of bfloat16, the largest part last. Each has 8 of the 24
// bits, cut and not rounded, so that none overflows and their sum is x (but for bits below 2^-133).
__global__ void __launch_bounds__(kMaxThreads)
    split_kernel(const __grid_constant__ WeightOnlyGemmParams p, int64_t row0, int64_t rows, uint16_t* target) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x, chunks = p.k / kVector;
  if (i >= rows * chunks) return;
  const int64_t m = i / chunks, k = i % chunks * kVector;
  const float* x = static_cast<const float*>(p.x) + p.x_rows.offset(row0 + m);
  uint32_t words[kParts][kVector / 2] = {};
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    int64_t column = k + e;
    if (p.perm != nullptr) column = p.perm[column];
    float left = column >= 0 && column < p.k ? x[column] : __uint_as_float(0x7fffffffu);  // NaN
#pragma unroll
    for (int part = kParts - 1; part >= 0; --part) {
      const uint32_t bits = __float_as_uint(left) & 0xffff0000u;
      words[part][e / 2] |= e % 2 == 0 ? bits >> 16 : bits;
      const float value = __uint_as_float(bits);
      left = left == value ? 0.0f : left - value;  // of infinity nothing is left
    }
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    *reinterpret_cast<uint4*>(target + (part * rows + m) * p.k + k) =
        make_uint4(words[part][0], words[part][1], words[part][2], words[part][3]);
  }
}

// Sums that another kernel has left, [slices][rows][columns]: of y's rows from `row0` and columns from `column0` on, or
// of the tiles that blocks share, one below the other. `factors`: what the weights of each column were multiplied by.
struct Sums {
  const float* at;
  int64_t rows, columns;
  int64_t row0, column0;
  bool of_tiles;
  const float* factors;
};

// Adds slices left to right and makes y of them. Where the product is ours it begins before that has ended.
template <class T, int kCount>
__global__ void __launch_bounds__(kMaxThreads)
    finish_kernel(const __grid_constant__ WeightOnlyGemmParams p, const __grid_constant__ GemmPlan plan,
                  const Alignment aligned, const Sums from) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x, chunks = from.columns / kVector;
  const int64_t row = i / chunks, column = i % chunks * kVector;
  int64_t m = from.row0 + row, n = from.column0 + column;
  if (from.of_tiles) {
    const TilePosition at = plan.position(plan.whole + min(row, from.rows - 1) / plan.live);
    m = at.token_tile * plan.live + row % plan.live;
    n = at.row_tile * kTileRows + column;
  }
  ptx::griddepcontrol_wait();
  if (row >= from.rows || m >= p.x_rows.count || n >= p.n) return;
  finish_sums<T>(p, aligned, m, n, [&](int64_t at, Vector& sums) {
    const float* first = from.at + row * from.columns + column + (at - n);
    load<true>(first, kVector, sums);
#pragma unroll
    for (int slice = 1; slice < kCount; ++slice) {
      Vector more;
      load<true>(first + slice * from.rows * from.columns, kVector, more);
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums[e] = sums[e] + more[e];
    }
    if constexpr (kIsHalf<T> && kCount == 1) {
      Vector factors;
      load<true>(from.factors + column + (at - n), kVector, factors);
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums[e] = sums[e] * inverse_factor(factors[e]);
    }
  });
}

// By the type of x that kernels multiply.
template <class F>
Status with_16_bits(DType dtype, const F& run) {
  return dtype == DType::kFloat16 ? run(__half{}) : run(__nv_bfloat16{});
}

template <class T, int kCount, class Where>
Status launch_finish(const WeightOnlyJob& job, const Sums& sums, const Where& where) {
  return launch_blocks(&finish_kernel<T, kCount>, ceil_div(sums.rows * (sums.columns / kVector), kMaxThreads),
                       kMaxThreads, 0, where, job.p, job.plan, job.aligned, sums);
}

// cuBLAS and the tiled kernel take one stride for all rows. (Of float32 x is what split_kernel has made.)
bool copies_x(const WeightOnlyGemmParams& p, const GemmPlan& plan) {
  if (p.dtype == DType::kFloat32) return false;
  return p.perm != nullptr || !aligned(p.x, p.x_rows, p.k, p.dtype) ||
         (plan.kind != GemmPlan::Kind::kDecode && p.x_rows.dims > 1);
}

constexpr int64_t kScratchAlignment = 256;
int64_t padded(int64_t bytes) { return ceil_div(bytes, kScratchAlignment) * kScratchAlignment; }

int64_t copy_bytes(const WeightOnlyGemmParams& p, const GemmPlan& plan) {
  return copies_x(p, plan) ? padded(p.x_rows.count * p.k * 2) : 0;
}

// No blocks where CUDA does not tell what the GPU is.
GemmPlan plan_of(const WeightOnlyGemmParams& p, int64_t rows, int bits) {
  thread_local PlanCache plans;
  const Gpu gpu = current_gpu();
  if (gpu.multiprocessors == 0) return {};
  const bool may_round = p.dtype != DType::kFloat32 && !p.batch_invariant;
  return plans({bits, rows, p.n, p.k, p.group_size, p.kind, may_round, gpu});
}

bool is_empty(const WeightOnlyGemmParams& p) { return p.x_rows.count == 0 || p.n == 0; }

// Blocks of 64 columns and groups are counted in 32 bits.
constexpr int64_t kMaxColumns = int64_t{1} << 34;

// Some strips at a time: weights as numbers; and some rows at a time, their product with x, and y of its sums. float16
// cannot hold every weight: there, each row is multiplied by a power of two, and its sums are divided by it.
Status multiply_dense(const WeightOnlyJob& job, const Queue& queue) {
  const WeightOnlyGemmParams& p = job.p;
  const int64_t strips = int4::strips(p.n), groups = p.k / p.group_size, m = p.x_rows.count;
  const auto at = [](const void* array, int64_t bytes) {
    return array == nullptr ? nullptr : static_cast<const uint8_t*>(array) + bytes;
  };
  const int64_t scale_bytes = p.scale_dtype == DType::kFloat32 ? 4 : 2;
  const int64_t zero_bytes = p.kind == WeightKind::kZeroPoint ? 1 : 4;
  const bool is_half = p.dtype == DType::kFloat16;
  float* const w = job.sums + job.plan.strips * kStripRows * job.plan.rows;
  float* const factors = is_half ? w + job.plan.strips * kStripRows * p.k / 2 : nullptr;
  for (int64_t strip = 0; strip < strips; strip += job.plan.strips) {
    const int64_t row0 = strip * kStripRows, rows = min_of(job.plan.strips * kStripRows, p.n - row0);
    Int4DequantizeParams weights{};
    weights.packed = at(p.packed, strip * int4::strip_bytes(p.k));
    weights.scales = at(p.scales, row0 * groups * scale_bytes);
    weights.zeros = at(p.zeros, row0 * groups * zero_bytes);
    weights.w = w;
    weights.dtype = p.dtype;
    weights.scale_dtype = p.scale_dtype;
    weights.kind = p.kind;
    weights.n = rows;
    weights.k = p.k;
    weights.group_size = p.group_size;
    Status status = is_half ? int4_row_factors(weights, factors, queue) : Status::kOk;
    if (status != Status::kOk) return status;
    status = is_half ? int4_dequantize_by_rows(weights, factors, queue) : int4_dequantize(weights, queue);
    if (status != Status::kOk) return status;
    for (int64_t first = 0; first < m; first += job.plan.rows) {
      const int64_t count = min_of(job.plan.rows, m - first);
      p.product.run(p.product.context, p.dtype, at(p.x, first * p.x_rows.stride[0] * 2), p.x_rows.stride[0], w,
                    job.sums, count, rows, p.k);
      const Sums sums{job.sums, count, rows, first, row0, false, factors};
      status =
          with_16_bits(p.dtype, [&](auto element) { return launch_finish<decltype(element), 1>(job, sums, queue); });
      if (status != Status::kOk) return status;
    }
  }
  return Status::kOk;
}

// The product and, where blocks share it, its sums.
Status multiply(const WeightOnlyJob& job, const WeightOnlyKernels& kernels, const Queue& queue) {
  const GemmPlan& plan = job.plan;
  const bool is_decode = plan.kind == GemmPlan::Kind::kDecode;
  const Status status = is_decode ? kernels.decode(job, queue) : kernels.tiled(job, queue);
  if (status != Status::kOk || !plan.has_second_kernel()) return status;
  const int64_t rows = is_decode ? job.p.x_rows.count : (plan.tiles() - plan.whole) * plan.live;
  const int64_t columns = is_decode ? int4::strips(job.p.n) * kStripRows : kTileRows;
  return with_16_bits(job.p.dtype, [&](auto element) {
    return launch_finish<decltype(element), kSlices>(job, {job.sums, rows, columns, 0, 0, !is_decode, nullptr},
                                                     Dependent{queue.stream});
  });
}

// What scratch has of rows of float32, some at a time: the sums of their parts, the parts, and what a product needs.
struct Float32Rows {
  int64_t at_a_time, last;
  int64_t sums_bytes, parts_bytes, product_bytes;

  Float32Rows(const WeightOnlyGemmParams& p, int bits) {
    const int64_t m = p.x_rows.count, most = max_of(1, kMostScratch / (kParts * (2 * p.k + 4 * p.n)));
    at_a_time = ceil_div(m, ceil_div(m, most));
    last = m - (ceil_div(m, at_a_time) - 1) * at_a_time;
    sums_bytes = padded(kParts * at_a_time * p.n * 4);
    parts_bytes = padded(kParts * at_a_time * p.k * 2);
    product_bytes = 0;
    for (const int64_t rows : {at_a_time, last}) {
      product_bytes = max_of(product_bytes, plan_of(p, kParts * rows, bits).scratch_bytes(kParts * rows, p.n, p.k));
    }
  }

  int64_t bytes() const { return sums_bytes + parts_bytes + product_bytes; }
};

Status multiply_float32(const WeightOnlyJob& whole, const WeightOnlyKernels& kernels, const Queue& queue) {
  const WeightOnlyGemmParams& p = whole.p;
  const Float32Rows room(p, kernels.bits);
  uint8_t* const scratch = static_cast<uint8_t*>(p.scratch);
  uint8_t* const parts = scratch + room.sums_bytes;
  for (int64_t first = 0; first < p.x_rows.count; first += room.at_a_time) {
    const int64_t rows = min_of(room.at_a_time, p.x_rows.count - first);
    Status status = launch_blocks(&split_kernel, ceil_div(rows * (p.k / kVector), kMaxThreads), kMaxThreads, 0, queue,
                                  p, first, rows, reinterpret_cast<uint16_t*>(parts));
    if (status != Status::kOk) return status;
    WeightOnlyGemmParams product = p;
    product.x = parts;
    product.x_rows = dense_rows(kParts * rows, p.k);
    product.y = scratch;
    status = multiply(
        {product, plan_of(p, kParts * rows, kernels.bits), {}, reinterpret_cast<float*>(parts + room.parts_bytes)},
        kernels, queue);
    if (status != Status::kOk) return status;
    const Sums sums{reinterpret_cast<const float*>(scratch), rows, p.n, first, 0, false, nullptr};
    status = launch_finish<float, kParts>(whole, sums, queue);
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

void tell_plan(const WeightOnlyGemmParams& p, const GemmPlan& plan, int bits, PlanListener& listener) {
  tell_gpu(listener, current_gpu());
  const bool is_dense = plan.kind == GemmPlan::Kind::kDense;
  listener.tell("route", is_dense ? "dense" : plan.kind == GemmPlan::Kind::kDecode ? "decode" : "tiled");
  listener.tell("strips", plan.strips);
  if (is_dense) {
    listener.tell("rows", plan.rows);
  } else {
    listener.tell("tokens", plan.kind == GemmPlan::Kind::kTiled ? plan.live : plan.tokens);
    listener.tell("k_parts", plan.k_parts);
    listener.tell("blocks", plan.blocks);
    listener.tell("threads", kGemmThreads);
    listener.tell("stages", plan.stages);
    listener.tell("shared_bytes", plan.shared_bytes);
  }
  if (p.dtype == DType::kFloat32) {
    listener.tell("parts_of_x", kParts);
    listener.tell("rows", Float32Rows(p, bits).at_a_time);
  } else {
    listener.tell("copies_x", copies_x(p, plan) ? "yes" : "no");
  }
  listener.tell("scratch_bytes", weight_only_gemm_scratch_bytes(p, bits));
}

}  // namespace

int64_t weight_only_gemm_scratch_bytes(const WeightOnlyGemmParams& p, int bits) {
  if (is_empty(p)) return 0;
  if (p.dtype == DType::kFloat32) return Float32Rows(p, bits).bytes();
  const GemmPlan plan = plan_of(p, p.x_rows.count, bits);
  return copy_bytes(p, plan) + plan.scratch_bytes(p.x_rows.count, p.n, p.k);
}

Status weight_only_gemm(const WeightOnlyGemmParams& p, const WeightOnlyKernels& kernels, const Queue& queue) {
  if (is_empty(p)) return Status::kOk;
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat32) {
    return Status::kUnsupported;
  }
  if (p.k >= kMaxColumns || !multiple_of_16(p.packed) || !multiple_of_16(p.scales) || !multiple_of_16(p.zeros)) {
    return Status::kUnsupported;
  }
  const bool is_float32 = p.dtype == DType::kFloat32;
  const int64_t rows = is_float32 ? kParts * Float32Rows(p, kernels.bits).at_a_time : p.x_rows.count;
  WeightOnlyJob job{p, plan_of(p, rows, kernels.bits), {}, nullptr};
  if (job.plan.blocks == 0) return Status::kLaunchFailed;
  if (job.plan.items() > 0x7fffffff) return Status::kUnsupported;
  if (queue.listener != nullptr) [[unlikely]] {
    tell_plan(p, job.plan, kernels.bits, *queue.listener);
    return Status::kOk;
  }
  job.aligned = {multiple_of_16(p.y), multiple_of_16(p.bias),
                 p.residual != nullptr && aligned(p.residual, p.residual_rows, p.n, p.dtype)};
  if (is_float32) return multiply_float32(job, kernels, queue);
  job.sums = reinterpret_cast<float*>(static_cast<uint8_t*>(p.scratch) + copy_bytes(p, job.plan));
  if (copies_x(p, job.plan)) {
    const Status status = with_16_bits(p.dtype, [&](auto element) {
      return launch_blocks(&gather_kernel<decltype(element)>, ceil_div(p.x_rows.count * (p.k / kVector), kMaxThreads),
                           kMaxThreads, 0, queue, p, static_cast<decltype(element)*>(p.scratch));
    });
    if (status != Status::kOk) return status;
    job.p.x = p.scratch;
    job.p.perm = nullptr;
    job.p.x_rows = dense_rows(p.x_rows.count, p.k);
  }
  return job.plan.kind == GemmPlan::Kind::kDense ? multiply_dense(job, queue) : multiply(job, kernels, queue);
}

int64_t int4_gemm_scratch_bytes(const WeightOnlyGemmParams& p) { return weight_only_gemm_scratch_bytes(p, 4); }

Status int4_gemm(const WeightOnlyGemmParams& p, const Queue& queue) {
  return weight_only_gemm(p, {4, &int4_gemm_decode, &int4_gemm_tiled}, queue);
}

}  // namespace qops::cuda
