// A product of few rows inside a block of operators, by a team of threads: each thread prepares all rows of x in memory
// of its own, which costs a microsecond or two and spares a wait, and multiplies the strips that are its part. The bits
// are those of the operator, which is where these functions are defined.
#pragma once

#include "cpu/simd.h"

namespace qops::cpu::QOPS_ISA_NS {

// Asked before a product, which does not look.
inline bool valid_permutation_range(const WeightOnlyGemmParams& p) {
  bool valid = true;
  for (int64_t j = 0; j < p.k; ++j) valid &= p.perm[j] >= 0 && p.perm[j] < p.k;
  for (int64_t j = 0; !valid && j < p.k; ++j) {
    if (p.perm[j] < 0 || p.perm[j] >= p.k) *p.bad_index = p.perm[j];
  }
  return valid;
}

template <class Params>
struct TeamProduct {
  size_t (*bytes)(const Params& p);  // that prepare() takes, at most; a multiple of 64
  void (*prepare)(const Params& p, void* memory);
  void (*multiply)(const Params& p, void* memory, int64_t begin_strip, int64_t end_strip);
};

// For y of that dtype.
const TeamProduct<WeightOnlyGemmParams>& int4_team_product(DType dtype);
const TeamProduct<WeightOnlyGemmParams>& int8_weight_only_team_product(DType dtype);
const TeamProduct<Int4Int8GemmParams>& int4_int8_team_product(DType dtype);
const TeamProduct<Int8GemmParams>& int8_team_product(DType dtype);

}  // namespace qops::cpu::QOPS_ISA_NS
