// A product of few rows inside a block of operators, by a team of threads: each thread prepares all rows of x in memory
// of its own, which costs a microsecond or two and spares a wait, and multiplies the strips that are its part. The bits
// are those of the operator, which is where these functions are defined.
#pragma once

#include "cpu/simd.h"

namespace qops::cpu::QOPS_ISA_NS {

struct TeamProduct {
  size_t (*bytes)(const WeightOnlyGemmParams& p);  // that prepare() takes, at most; a multiple of 64
  void (*prepare)(const WeightOnlyGemmParams& p, void* memory);
  void (*multiply)(const WeightOnlyGemmParams& p, const void* memory, int64_t begin_strip, int64_t end_strip);
};

// For x of that dtype.
const TeamProduct& int4_team_product(DType dtype);
const TeamProduct& int8_weight_only_team_product(DType dtype);

}  // namespace qops::cpu::QOPS_ISA_NS
