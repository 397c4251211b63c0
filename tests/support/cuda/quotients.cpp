// The divisions that rows take a short way to, against division itself, over all elements of 16 bits and with any
// reciprocal within as many ulp as the argument says: rcp.approx is off by one. Prints how many it has tried, and what
// differs.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "cuda/gate.cuh"
#include "cuda/quantize_row.cuh"

namespace {

using namespace qops::cuda;

int differing = 0;
long tried = 0;

void compare(const char* what, float element, float got, float want) {
  ++tried;
  if (std::bit_cast<uint32_t>(got) == std::bit_cast<uint32_t>(want) || (std::isnan(got) && std::isnan(want))) return;
  if (++differing <= 20) std::printf("%s of %a: %a, not %a\n", what, element, got, want);
}

struct Reciprocal {
  int ulps;

  float operator()(float x) const {
    const auto flushed = [](float value) { return std::fpclassify(value) == FP_SUBNORMAL ? value * 0.0f : value; };
    const float nearest = flushed(1.0f / flushed(x));
    if (!std::isnormal(nearest)) return nearest;
    return flushed(std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) + static_cast<uint32_t>(ulps)));
  }
};

template <class T>
void compare_all(int most) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float x = widen(from_bits<T>(bits));
    const float silu = round_to<T>(qops::silu(lanes::Lane{x}).v);
    for (int ulps = -most; ulps <= most; ++ulps) {
      const Reciprocal reciprocal{ulps};
      compare("silu", x, round_to<T>(silu_before_rounding<T>(x, reciprocal)), silu);
      if (bits >= 0x8000) continue;
      const float factor = factor_127(x, reciprocal);
      const float all = std::isfinite(x) && std::isfinite(127.0f / x) ? 127.0f / x : 0.0f;
      compare("127 / a", x, factor <= FLT_MAX ? factor : 0.0f, all);
      if (all != 0.0f) compare("a / 127", x, scale_127(x), x / 127.0f);
    }
  }
}

}  // namespace

int main(int, char** argv) {
  const int most = std::atoi(argv[1]);
  compare_all<__half>(most);
  compare_all<__nv_bfloat16>(most);
  std::printf("%ld tried, %d differ\n", tried, differing);
}
