// int8_gemm: the plan, what comes before the product (rows of q from multiples of 16 bytes on) and after it (tiles that
// blocks share).
//
// q is copied to scratch first where its rows do not begin at multiples of 16 bytes (K an odd multiple of 8, as a
// rule).
#include "cuda/int8_gemm.cuh"

namespace qops::cuda {
namespace {

constexpr int kMaxThreads = 256;

// The tiles that blocks of the first kernel share: eight tokens of one each block, four sums a thread. It begins before
// that kernel has ended.
__global__ void __launch_bounds__(kMaxThreads) int8_gemm_add_kernel(const __grid_constant__ Int8Job job) {
  static_assert(kMaxThreads * 4 == 8 * kTileRows);
  const int8::Split split = job.plan.split_at(blockIdx.x + 1);
  const int token = blockIdx.y * 8 + threadIdx.x / kWarp, column = threadIdx.x % kWarp * 4;
  const TilePosition at = job.plan.position(split.tile);
  const int tokens = job.plan.tokens_of(at.token_tile);
  ptx::griddepcontrol_wait();
  if (split.last < split.first || token >= tokens) return;  // whole warps
  const int8::Columns columns(job, at.row_tile * kTileRows + column);
  uint4 sums = make_uint4(0, 0, 0, 0);
  for (int64_t block = split.first; block <= split.last; ++block) {
    const int32_t* slot = job.partials + job.plan.slot(static_cast<uint32_t>(block), split.tile) * job.plan.slot_sums();
    const uint4 more = *reinterpret_cast<const uint4*>(slot + token * kTileRows + column);
    sums = make_uint4(sums.x + more.x, sums.y + more.y, sums.z + more.z, sums.w + more.w);
  }
  columns.store(job, at.token_tile * job.plan.live_tokens + token, sums);
}

// Rows of q from addresses that are multiples of 16 on, `stride` apart: eight bytes a thread.
__global__ void __launch_bounds__(kMaxThreads)
    int8_gemm_copy_kernel(const __grid_constant__ Int8GemmParams p, uint8_t* target, int64_t stride) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x, pieces = p.k / 8;
  if (i >= p.q_rows.count * pieces) return;
  const int64_t m = i / pieces, k = i % pieces * 8;
  const uint8_t* q = static_cast<const uint8_t*>(p.q) + p.q_rows.offset(m) + k;
  uint32_t words[2] = {};
#pragma unroll
  for (int byte = 0; byte < 8; ++byte) words[byte / 4] |= static_cast<uint32_t>(q[byte]) << byte % 4 * 8;
  *reinterpret_cast<uint2*>(target + m * stride + k) = make_uint2(words[0], words[1]);
}

bool copies_q(const Int8GemmParams& p) {
  bool aligned = multiple_of_16(p.q);
  for (int d = 0; d < p.q_rows.dims; ++d) aligned = aligned && p.q_rows.stride[d] % 16 == 0;
  return !aligned && p.k > 0;
}

int64_t copy_stride(const Int8GemmParams& p) { return ceil_div(p.k, 16) * 16; }
int64_t copy_bytes(const Int8GemmParams& p) { return copies_q(p) ? p.q_rows.count * copy_stride(p) : 0; }

// No blocks where CUDA does not tell what the GPU is.
int8::Plan plan_of(const Int8GemmParams& p) {
  const Gpu gpu = current_gpu();
  return gpu.multiprocessors == 0 ? int8::Plan{} : int8::plan_int8_gemm(p.q_rows.count, p.n, p.k, gpu);
}

bool is_empty(const Int8GemmParams& p) { return p.q_rows.count == 0 || p.n == 0; }

void tell_plan(const Int8GemmParams& p, const int8::Plan& plan, PlanListener& listener) {
  const int8::TileShape tile = int8::tile_shape(plan.tokens);
  tell_gpu(listener, current_gpu());
  listener.tell("route", "tiled");
  listener.tell("strips", kTileStrips);
  listener.tell("tokens", plan.live_tokens);
  listener.tell("split", plan.split ? "yes" : "no");
  listener.tell("blocks", plan.blocks);
  listener.tell("threads", tile.threads());
  listener.tell("stages", plan.stages);
  listener.tell("shared_bytes", tile.shared_bytes(plan.stages));
  listener.tell("copies_q", copies_q(p) ? "yes" : "no");
  listener.tell("scratch_bytes", int8_gemm_scratch_bytes(p));
}

}  // namespace

int64_t int8_gemm_scratch_bytes(const Int8GemmParams& p) {
  return is_empty(p) ? 0 : copy_bytes(p) + plan_of(p).scratch_bytes();
}

Status int8_gemm(const Int8GemmParams& params, const Queue& queue) {
  if (is_empty(params)) return Status::kOk;
  Int8Job job{params, plan_of(params), {}, {}};
  if (job.plan.blocks == 0) return Status::kLaunchFailed;
  Int8GemmParams& p = job.p;
  if (!multiple_of_16(p.packed) || job.plan.tiles() > 0x7fffffff) return Status::kUnsupported;
  if (queue.listener != nullptr) [[unlikely]] {
    tell_plan(p, job.plan, *queue.listener);
    return Status::kOk;
  }
  uint8_t* const scratch = static_cast<uint8_t*>(p.scratch);
  job.partials = reinterpret_cast<int32_t*>(scratch + copy_bytes(p));
  const size_t element_bytes = p.epilogue == Epilogue::kInt8 ? 1 : p.dtype == DType::kInt32 ? 4 : size_of(p.dtype);
  job.y_aligned = reinterpret_cast<uintptr_t>(p.y) % (4 * element_bytes) == 0;
  if (copies_q(p)) {
    const Status status = launch_blocks(&int8_gemm_copy_kernel, ceil_div(p.q_rows.count * (p.k / 8), kMaxThreads),
                                        kMaxThreads, 0, queue, p, scratch, copy_stride(p));
    if (status != Status::kOk) return status;
    p.q = scratch;
    p.q_rows = dense_rows(p.q_rows.count, copy_stride(p));
  }
  const Status status = int8_gemm_tiled(job, queue);
  if (status != Status::kOk || !job.plan.has_second_kernel()) return status;
  const dim3 grid(static_cast<unsigned>(job.plan.blocks - 1), static_cast<unsigned>(job.plan.live_tokens / 8));
  return launch(&int8_gemm_add_kernel, grid, dim3(kMaxThreads), 0, Dependent{queue.stream}, job);
}

}  // namespace qops::cuda
