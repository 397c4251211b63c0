// exp_poly over an array, for test_silu_mul.py, which compiles it once with scalar lanes and once at the level in use.
#include "cpu/simd.h"
#include "exp_poly.h"

using namespace qops::cpu::QOPS_ISA_NS;

extern "C" void exp_poly_probe(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store_n(y + i, qops::exp_poly(load_n(x + i, n - i)), n - i);
}
