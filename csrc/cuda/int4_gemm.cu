// int4_gemm: the plan, what comes before the product (x in packed order) and after it (slices of several blocks).
//
// x is copied to scratch first where the weight has a permutation, or where rows of x do not begin at multiples of 16
// bytes: 4 M K bytes of traffic in L2 and one more launch.
#include "cuda/int4_gemm.cuh"

namespace qops::cuda {
namespace {

constexpr int kMaxThreads = 256;

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

// The slices of k_parts blocks, added left to right.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    add_slices_kernel(const __grid_constant__ WeightOnlyGemmParams p, const Alignment aligned, const float* slices) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x, chunks = p.n / kVector;
  if (i >= p.x_rows.count * chunks) return;
  const int64_t m = i / chunks, n = i % chunks * kVector, columns = int4::strips(p.n) * kStripRows;
  finish<T>(p, aligned, m, n, [&](int64_t column, Vector& sums) {
    load<true>(slices + m * columns + column, kVector, sums);
#pragma unroll
    for (int slice = 1; slice < kSlices; ++slice) {
      Vector more;
      load<true>(slices + (slice * p.x_rows.count + m) * columns + column, kVector, more);
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums[e] = sums[e] + more[e];
    }
  });
}

bool copies_x(const WeightOnlyGemmParams& p) { return p.perm != nullptr || !aligned(p.x, p.x_rows, p.k, p.dtype); }

int64_t copy_bytes(const WeightOnlyGemmParams& p) {
  return copies_x(p) ? ceil_div(p.x_rows.count * p.k * 2, 256) * 256 : 0;
}

GemmPlan plan_of(const WeightOnlyGemmParams& p) {
  return plan_int4_gemm(p.x_rows.count, p.n, p.k, p.group_size, p.kind, current_gpu());
}

bool is_empty(const WeightOnlyGemmParams& p) { return p.x_rows.count == 0 || p.n == 0; }

// Blocks of 64 columns and groups are counted in 32 bits.
constexpr int64_t kMaxColumns = int64_t{1} << 34;

}  // namespace

int64_t int4_gemm_scratch_bytes(const WeightOnlyGemmParams& p) {
  return is_empty(p) ? 0 : copy_bytes(p) + plan_of(p).scratch_bytes(p.x_rows.count, p.n);
}

Status int4_gemm(const WeightOnlyGemmParams& p, cudaStream_t stream) {
  if (is_empty(p)) return Status::kOk;
  if (p.k >= kMaxColumns || !multiple_of_16(p.packed) || !multiple_of_16(p.scales) || !multiple_of_16(p.zeros)) {
    return Status::kUnsupported;
  }
  Int4Job job{p, plan_of(p), {}, nullptr};
  if (job.plan.blocks == 0 || job.plan.blocks > 0x7fffffff) return Status::kUnsupported;
  job.aligned = {multiple_of_16(p.y), multiple_of_16(p.bias),
                 p.residual != nullptr && aligned(p.residual, p.residual_rows, p.n, p.dtype)};
  job.slices = reinterpret_cast<float*>(static_cast<uint8_t*>(p.scratch) + copy_bytes(p));
  const auto with_16_bits = [&](const auto& run) {
    return p.dtype == DType::kFloat16    ? run(__half{})
           : p.dtype == DType::kBFloat16 ? run(__nv_bfloat16{})
                                         : Status::kUnsupported;
  };
  if (copies_x(p)) {
    const Status status = with_16_bits([&](auto element) {
      return launch_blocks(&gather_kernel<decltype(element)>, ceil_div(p.x_rows.count * (p.k / kVector), kMaxThreads),
                           kMaxThreads, 0, stream, p, static_cast<decltype(element)*>(p.scratch));
    });
    if (status != Status::kOk) return status;
    job.p.x = p.scratch;
    job.p.perm = nullptr;
    job.p.x_rows = {};
    job.p.x_rows.count = p.x_rows.count;
    job.p.x_rows.dims = 1;
    job.p.x_rows.size[0] = p.x_rows.count;
    job.p.x_rows.stride[0] = p.k;
  }
  const Status status = job.plan.decode ? int4_gemm_decode(job, stream) : int4_gemm_tiled(job, stream);
  if (status != Status::kOk || job.plan.k_parts == 1) return status;
  return with_16_bits([&](auto element) {
    return launch_blocks(&add_slices_kernel<decltype(element)>, ceil_div(p.x_rows.count * (p.n / kVector), kMaxThreads),
                         kMaxThreads, 0, stream, job.p, job.aligned, job.slices);
  });
}

}  // namespace qops::cuda
