// decode_attention: a few new tokens of each sequence attend to its cache of keys and values.
//
// What bounds it and the order of sums: cpu/attend.h. The items of all sequences and heads in parallel, then the rows
// of the result.
#include "cpu/attend.h"
#include "cpu/scratch.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

template <class T>
Status run(const DecodeAttentionParams& p, const ThreadPool& pool) {
  const AttentionPlan plan = plan_attention(p);
  // 128 K products of elements of q and k are some 4 us of work, four times what waking a thread costs.
  const int64_t grain = 1 + (128 << 10) / (plan.rows * std::min(p.s, int64_t{kChunk}) * plan.width + 1);
  if (pool.listener != nullptr) [[unlikely]] {
    tell_tasks(pool, plan.items, grain);
    return Status::kOk;
  }
  Scratch memory(plan.scratch_bytes());
  if (!memory.ok()) return Status::kOutOfMemory;
  float* scratch = memory.take<float>(0);
  parallel_for(pool, plan.items, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) attend_chunk<T>(p, plan, item, scratch);
  });
  const int64_t rows_grain = 1 + (16 << 10) / (plan.chunks * plan.width);
  parallel_for(pool, p.batch * p.t * p.q_heads, rows_grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) combine_row<T>(p, plan, row, scratch);
  });
  return Status::kOk;
}

}  // namespace

Status decode_attention(const DecodeAttentionParams& p, const ThreadPool& pool) {
  if (p.batch == 0 || p.t == 0 || p.q_heads == 0 || p.d == 0) return Status::kOk;  // however large the others
  if (p.s > int64_t{1} << 62) return Status::kOutOfMemory;                         // positions would be no int64
  return with_dtype(p.dtype, [&](auto* element) { return run<std::remove_pointer_t<decltype(element)>>(p, pool); });
}

}  // namespace qops::cpu::QOPS_ISA_NS
