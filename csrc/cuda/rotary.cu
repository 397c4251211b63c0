// rotary: turns pairs of elements of every head of q and k by an angle that depends on the token's position.
//
// Bound by memory: every element is read and written once; 4 bytes an element in bf16. A block has a token, so its
// angles come from L1 after the first head.
#include "cuda/rotate_head.cuh"

namespace qops::cuda {
namespace {

constexpr int kMaxThreads = 256;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, 1) rotary_kernel(const __grid_constant__ RotaryParams p) {
  const int64_t token = blockIdx.x;
  const int64_t position = position_of(p, token);
  const int rotating = rotating_units(p);
  // In place, or without heads, nothing is copied.
  const unsigned q_units = static_cast<unsigned>(rotating + (p.q.x == p.q.y ? 0 : copying_units(p)));
  const unsigned k_units = static_cast<unsigned>(rotating + (p.k.x == p.k.y ? 0 : copying_units(p)));
  const unsigned all_q = static_cast<unsigned>(p.q.heads) * q_units;
  const unsigned all = all_q + static_cast<unsigned>(p.k.heads) * k_units;
  for (unsigned i = threadIdx.x; i < all; i += blockDim.x) {
    const bool is_q = i < all_q;
    const RotaryHeads& heads = is_q ? p.q : p.k;
    const unsigned at = is_q ? i : i - all_q, units = is_q ? q_units : k_units;
    const int64_t head = at / units;
    const int unit = static_cast<int>(at % units);
    const T* x = static_cast<const T*>(heads.x) + heads.x_tokens.offset(token) + head * heads.x_head_stride;
    T* y = static_cast<T*>(heads.y) + heads.y_tokens.offset(token) + head * heads.y_head_stride;
    if (unit < rotating) {
      rotate_unit<kAligned>(p, position, unit, x, heads.x_stride, y, heads.y_stride);
    } else {
      copy_unit<kAligned>(p, unit - rotating, x, heads.x_stride, y, heads.y_stride);
    }
  }
}

}  // namespace

Status rotary(const RotaryParams& p, const Queue& queue) {
  const int64_t vectors = (p.q.heads + p.k.heads) * (p.d / kVector + 2);
  if (vectors > 0x7fffffff) return Status::kUnsupported;  // a token is counted in 32 bits
  if (p.d == 0 || p.q.heads + p.k.heads == 0) return Status::kOk;
  const int threads = vectors >= kMaxThreads ? kMaxThreads : static_cast<int>((vectors + kWarp - 1) / kWarp) * kWarp;
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = aligned(p) ? &rotary_kernel<T, true> : &rotary_kernel<T, false>;
    return launch_blocks(kernel, p.q.x_tokens.count, threads, 0, queue, p);
  });
}

}  // namespace qops::cuda
