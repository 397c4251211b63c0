// y[r] = sum of row r of x by two kernels: blocks of the first one sum parts of rows, the second one adds the parts,
// and may begin before that.
#pragma once

#include "cuda/ptx.cuh"

namespace dependent {

using namespace qops;

enum class Bug {
  kNone,
  kNobodyTold,        // none: the second one begins later
  kNoWait,            // reads what may not be there
  kIdleThreadsLeave,  // without a wait: such a kernel may end before the first one
  kReadsBefore,
  kLoadsBefore,  // likewise, by an instruction of its own
  kWritesBefore  // where others may still read
};

constexpr int kThreads = 64;

// x [part, column, row], of up to 64 rows.
template <Bug kBug>
__global__ void sum_parts(const float* x, float* parts, int columns, int rows) {
  if constexpr (kBug != Bug::kNobodyTold) ptx::griddepcontrol_launch_dependents();
  const int row = threadIdx.x, part = blockIdx.x;
  if (row >= rows) return;
  float sum = 0;
  for (int c = 0; c < columns; ++c) sum += x[(part * columns + c) * rows + row];
  parts[part * rows + row] = sum;
}

template <Bug kBug>
__global__ void add_parts(const float* parts, float* y, int count, int rows) {
  const int row = threadIdx.x;
  float sum = 0;
  if (kBug == Bug::kIdleThreadsLeave && row >= rows) return;
  if (row < rows) {
    if constexpr (kBug == Bug::kReadsBefore) sum = parts[row];
    if constexpr (kBug == Bug::kLoadsBefore) {
      sum = __uint_as_float(ptx::ld_nc(reinterpret_cast<const uint32_t*>(parts) + row));
    }
    if constexpr (kBug == Bug::kWritesBefore) ptx::st_cs(reinterpret_cast<uint32_t*>(y) + row, 0);
  }
  if constexpr (kBug != Bug::kNoWait) ptx::griddepcontrol_wait();
  if (row >= rows) return;
  constexpr int kFirst = kBug == Bug::kReadsBefore || kBug == Bug::kLoadsBefore ? 1 : 0;
  for (int part = kFirst; part < count; ++part) sum += parts[part * rows + row];
  y[row] = sum;
}

}  // namespace dependent
