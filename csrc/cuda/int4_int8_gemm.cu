// int4_int8_gemm: the plan, what comes before the product (x in packed order, rows from multiples of 16 bytes on) and
// after it (slices of several blocks).
//
// x is copied to scratch first where the weight has a permutation or rows of x do not begin at multiples of 16 bytes:
// 2 M K bytes of traffic in L2 and one more launch.
#include "cuda/int4_int8_gemm.cuh"

namespace qops::cuda {
namespace {

constexpr int kMaxThreads = 256;

// target[m, k] = x[m, perm[k]], rows `stride` apart: a block for each row, eight columns a thread at a time. An index
// out of range cannot be told before the launch, and int8 has no NaN: the row's scale takes it.
__global__ void __launch_bounds__(kMaxThreads) int4_int8_gather_kernel(const __grid_constant__ Int4Int8GemmParams p,
                                                                       uint8_t* target, int64_t stride, float* scales) {
  const int64_t m = blockIdx.x;
  const uint8_t* x = static_cast<const uint8_t*>(p.x) + p.x_rows.offset(m);
  bool is_bad = false;
  for (int64_t k = 8 * threadIdx.x; k < p.k; k += 8 * kMaxThreads) {
    uint32_t words[2] = {};
#pragma unroll
    for (int byte = 0; byte < 8; ++byte) {
      int64_t column = k + byte;
      if (p.perm != nullptr) column = p.perm[column];
      const bool inside = column >= 0 && column < p.k;
      is_bad = is_bad || !inside;
      words[byte / 4] |= (inside ? static_cast<uint32_t>(x[column]) : 0) << byte % 4 * 8;
    }
    *reinterpret_cast<uint2*>(target + m * stride + k) = make_uint2(words[0], words[1]);
  }
  const int any = __syncthreads_or(is_bad ? 1 : 0);
  if (threadIdx.x == 0) scales[m] = any != 0 ? __uint_as_float(0x7fc00000u) : p.x_scale[p.x_scale_rows.offset(m)];
}

// The total of one group that is all of K, from its sum.
QOPS_DEVICE float total_of_group(const Int4Int8Job& job, int64_t n, int32_t sum) {
  Vector scale;
  load<false>(job.p.scales, job.p.scale_dtype,
              n / kStripRows * kStripRows + int4::scale_place(static_cast<int>(n % kStripRows)), 1, scale);
  return fmaf(scale[0], static_cast<float>(sum >> job.format.shift), 0.0f);
}

// Adds the slices of the tiles that blocks share, left to right, and makes y of them: four columns a thread. It begins
// before the product has ended.
__global__ void __launch_bounds__(kMaxThreads) int4_int8_add_kernel(const __grid_constant__ Int4Int8Job job) {
  const GemmPlan& plan = job.plan;
  const int64_t rows = (plan.tiles() - plan.whole) * plan.live;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x;
  const int64_t row = min(i / (kTileRows / 4), rows - 1), column = i % (kTileRows / 4) * 4;
  const TilePosition at = plan.position(plan.whole + row / plan.live);
  const int64_t m = at.token_tile * plan.live + row % plan.live, n = at.row_tile * kTileRows + column;
  ptx::griddepcontrol_wait();
  if (i >= rows * (kTileRows / 4) || m >= job.p.x_rows.count || n >= job.p.n) return;
  int4_int8::finish_sums(job, m, n, [&](int64_t of, float (&t)[4]) {
    const float* first = job.sums + row * kTileRows + column + (of - n);
    const auto slice = [&](int index) { return *reinterpret_cast<const uint4*>(first + index * rows * kTileRows); };
    if (job.slices.is_one_group) {
      uint4 sum = slice(0);
      for (int part = 1; part < plan.k_parts; ++part) {
        const uint4 more = slice(part);
        sum = make_uint4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
      }
      const uint32_t words[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) t[e] = total_of_group(job, of + e, static_cast<int32_t>(words[e]));
      return;
    }
#pragma unroll
    for (int index = 0; index < kSlices; ++index) {
      const uint4 bits = slice(index);
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float total = __uint_as_float(words[e]);
        t[e] = index == 0 ? total : t[e] + total;
      }
    }
  });
}

bool copies_x(const Int4Int8GemmParams& p) {
  bool aligned = p.perm == nullptr && multiple_of_16(p.x);
  for (int d = 0; d < p.x_rows.dims; ++d) aligned = aligned && p.x_rows.stride[d] % 16 == 0;
  return !aligned && p.k > 0;
}

constexpr int64_t kScratchAlignment = 256;
int64_t padded(int64_t bytes) { return ceil_div(bytes, kScratchAlignment) * kScratchAlignment; }

// Rows of x, then a scale for each.
int64_t copy_stride(const Int4Int8GemmParams& p) { return ceil_div(p.k, 16) * 16; }
int64_t rows_bytes(const Int4Int8GemmParams& p) { return padded(p.x_rows.count * copy_stride(p)); }
int64_t copy_bytes(const Int4Int8GemmParams& p) { return copies_x(p) ? rows_bytes(p) + padded(p.x_rows.count * 4) : 0; }

// No blocks where CUDA does not tell what the GPU is.
GemmPlan plan_of(const Int4Int8GemmParams& p) {
  thread_local PlanCacheOf<&int4_int8::plan_int4_int8_gemm> plans;
  const Gpu gpu = current_gpu();
  if (gpu.multiprocessors == 0) return {};
  return plans({4, p.x_rows.count, p.n, p.k, p.group_size, p.kind, false, gpu});
}

bool is_empty(const Int4Int8GemmParams& p) { return p.x_rows.count == 0 || p.n == 0; }

void tell_plan(const Int4Int8GemmParams& p, const GemmPlan& plan, PlanListener& listener) {
  tell_gpu(listener, current_gpu());
  listener.tell("route", "tiled");
  listener.tell("strips", plan.strips);
  listener.tell("tokens", plan.live);
  listener.tell("k_parts", plan.k_parts);
  listener.tell("blocks", plan.blocks);
  listener.tell("threads", kGemmThreads);
  listener.tell("stages", plan.stages);
  listener.tell("shared_bytes", plan.shared_bytes);
  listener.tell("copies_q", copies_x(p) ? "yes" : "no");
  listener.tell("scratch_bytes", int4_int8_gemm_scratch_bytes(p));
}

}  // namespace

int64_t int4_int8_gemm_scratch_bytes(const Int4Int8GemmParams& p) {
  return is_empty(p) ? 0 : copy_bytes(p) + plan_of(p).scratch_bytes(p.x_rows.count, p.n, p.k);
}

Status int4_int8_gemm(const Int4Int8GemmParams& params, const Queue& queue) {
  if (is_empty(params)) return Status::kOk;
  if (!multiple_of_16(params.packed) || !multiple_of_16(params.scales) || !multiple_of_16(params.zeros)) {
    return Status::kUnsupported;
  }
  const int4_int8::Slices slices(params.k, params.group_size, params.kind);
  Int4Int8Job job{params, plan_of(params), slices, {params, slices}, nullptr, false, 0};
  Int4Int8GemmParams& p = job.p;
  if (job.plan.blocks == 0) return Status::kLaunchFailed;
  if (job.plan.items() > 0x7fffffff) return Status::kUnsupported;
  if (queue.listener != nullptr) [[unlikely]] {
    tell_plan(p, job.plan, *queue.listener);
    return Status::kOk;
  }
  uint8_t* const scratch = static_cast<uint8_t*>(p.scratch);
  job.sums = reinterpret_cast<float*>(scratch + copy_bytes(p));
  const size_t element_bytes = p.epilogue == Epilogue::kInt8 ? 1 : size_of(p.dtype);
  job.y_aligned = reinterpret_cast<uintptr_t>(p.y) % (4 * element_bytes) == 0;
  job.is_read_once = job.plan.token_tiles == 1;
  if (copies_x(p)) {
    float* const x_scales = reinterpret_cast<float*>(scratch + rows_bytes(p));
    const Status status = launch_blocks(&int4_int8_gather_kernel, p.x_rows.count, kMaxThreads, 0, queue, p, scratch,
                                        copy_stride(p), x_scales);
    if (status != Status::kOk) return status;
    p.x = scratch;
    p.x_rows = dense_rows(p.x_rows.count, copy_stride(p));
    p.x_scale = x_scales;
    p.x_scale_rows = dense_rows(p.x_rows.count, 1);
    p.perm = nullptr;
  }
  const Status status = int4_int8_gemm_tiled(job, queue);
  const GemmPlan& plan = job.plan;
  if (status != Status::kOk || !plan.has_second_kernel()) return status;
  const int64_t fours = (plan.tiles() - plan.whole) * plan.live * (kTileRows / 4);
  return launch_blocks(&int4_int8_add_kernel, ceil_div(fours, kMaxThreads), kMaxThreads, 0, Dependent{queue.stream},
                       job);
}

}  // namespace qops::cuda
