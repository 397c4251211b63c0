// Rows in parallel, for kernels that write a row to L1 before they turn it into their result.
#pragma once

#include <algorithm>

#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace qops::cpu::QOPS_ISA_NS {

// Calls f(row, buffer) for every row; the buffer holds `columns` elements of T and is used by no other row meanwhile.
// `streams`: whether f may stream(). The end of that waits until memory has all, so it comes once for all rows.
template <class T, class F>
inline Status for_rows_with_buffer(const ThreadPool& pool, int64_t rows, int64_t grain, int64_t columns, bool streams,
                                   const F& f) {
  if (rows == 0) return Status::kOk;
  if (pool.listener != nullptr) [[unlikely]] {
    tell_tasks(pool, rows, grain);
    return Status::kOk;
  }
  const int64_t parts = std::min<int64_t>(pool.threads, (rows - 1) / grain + 1);
  Scratch scratch(static_cast<size_t>(parts) * Scratch::bytes<T>(columns));
  if (!scratch.ok()) return Status::kOutOfMemory;
  T* buffers = scratch.take<T>(0);
  const int64_t stride = static_cast<int64_t>(Scratch::bytes<T>(columns) / sizeof(T));
  // The first `longer` parts have one row more than the others.
  const int64_t rows_per_part = rows / parts, longer = rows % parts;
  const auto first_row = [&](int64_t part) { return part * rows_per_part + std::min(part, longer); };
  parallel_for(pool, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t row = first_row(part); row < first_row(part + 1); ++row) f(row, buffers + part * stride);
    }
    if (streams) end_stream();
  });
  return Status::kOk;
}

}  // namespace qops::cpu::QOPS_ISA_NS
