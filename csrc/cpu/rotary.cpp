// rotary: turns pairs of elements of every head of q and k by an angle that depends on the token's position.
//
// Bound by memory: every element is read and written once. The arithmetic: cpu/rotate_head.h.
#include <algorithm>

#include "cpu/rotate_head.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

template <class T>
void rotate_heads(const RotaryParams& p, const RotaryHeads& heads, int64_t token, int64_t first, int64_t pairs,
                  const Angles& angles) {
  const int64_t skipped = p.interleaved ? 2 * first : first;
  const int64_t x_begin = heads.x_tokens.offset(token) + skipped * heads.x_stride;
  const int64_t y_begin = heads.y_tokens.offset(token) + skipped * heads.y_stride;
  for (int64_t head = 0; head < heads.heads; ++head) {
    const T* x = static_cast<const T*>(heads.x) + x_begin + head * heads.x_head_stride;
    T* y = static_cast<T*>(heads.y) + y_begin + head * heads.y_head_stride;
    if (p.interleaved) {
      rotate_neighbours(x, heads.x_stride, y, heads.y_stride, pairs, angles);
    } else {
      rotate_halves(x, heads.x_stride, y, heads.y_stride, p.pairs, pairs, angles);
    }
  }
}

template <bool kStream, class T>
void rotate_dense_heads(const RotaryParams& p, const RotaryHeads& heads, int64_t token, int64_t next,
                        const Angles& angles) {
  const T* x = static_cast<const T*>(heads.x) + heads.x_tokens.offset(token);
  const T* after = static_cast<const T*>(heads.x) + heads.x_tokens.offset(next);
  T* y = static_cast<T*>(heads.y) + heads.y_tokens.offset(token);
  for (int64_t head = 0; head < heads.heads; ++head) {
    const RowAhead<T> ahead{after + head * heads.x_head_stride};
    rotate_whole_halves<kStream>(x + head * heads.x_head_stride, y + head * heads.y_head_stride, p.pairs, angles,
                                 [&](const T* from, int64_t i) {
                                   ahead(i);
                                   return load_pair(from + i);
                                 });
  }
}

// Elements R .. D - 1 of every head.
template <class T>
void copy_unrotated(const RotaryParams& p, const RotaryHeads& heads, int64_t token) {
  if (heads.x == heads.y) return;  // in place, or without heads
  const int64_t x_begin = heads.x_tokens.offset(token), y_begin = heads.y_tokens.offset(token);
  for (int64_t head = 0; head < heads.heads; ++head) {
    const T* x = static_cast<const T*>(heads.x) + x_begin + head * heads.x_head_stride;
    T* y = static_cast<T*>(heads.y) + y_begin + head * heads.y_head_stride;
    for (int64_t i = 2 * p.pairs; i < p.d; ++i) y[i * heads.y_stride] = x[i * heads.x_stride];
  }
}

template <class T, class W>
void run(const RotaryParams& p, const ThreadPool& pool) {
  // 16 K elements are about 4 us of work, some four times what waking a thread costs.
  const int64_t grain = 1 + (16 << 10) / ((p.q.heads + p.k.heads) * p.d + 1);
  const int64_t ahead_by = rows_ahead((p.q.heads + p.k.heads) * p.d * static_cast<int64_t>(sizeof(T)));
  const bool is_dense = rotates_whole_halves(p);
  const bool streams_q = is_dense && streams_heads<T>(p, p.q), streams_k = is_dense && streams_heads<T>(p, p.k);
  parallel_for(pool, p.q.x_tokens.count, grain, [&](int64_t begin, int64_t end) {
    // All angles of a head of up to 256 elements, which is rotated at a time.
    float cos[2 * kBlockPairs], sin[2 * kBlockPairs];
    const Angles angles{cos, sin};
    for (int64_t token = begin; token < end; ++token) {
      const int64_t position = position_of(p, token);
      if (is_dense) {
        load_angles<W>(p, position, 0, p.pairs, angles);
        order_as_pairs<T>(cos, p.pairs);
        order_as_pairs<T>(sin, p.pairs);
        const int64_t next = std::min(token + ahead_by, end - 1);
        streams_q ? rotate_dense_heads<true, T>(p, p.q, token, next, angles)
                  : rotate_dense_heads<false, T>(p, p.q, token, next, angles);
        streams_k ? rotate_dense_heads<true, T>(p, p.k, token, next, angles)
                  : rotate_dense_heads<false, T>(p, p.k, token, next, angles);
      } else {
        for (int64_t first = 0; first < p.pairs; first += kBlockPairs) {
          const int64_t pairs = p.pairs - first < kBlockPairs ? p.pairs - first : kBlockPairs;
          load_angles<W>(p, position, first, pairs, angles);
          rotate_heads<T>(p, p.q, token, first, pairs, angles);
          rotate_heads<T>(p, p.k, token, first, pairs, angles);
        }
      }
      copy_unrotated<T>(p, p.q, token);
      copy_unrotated<T>(p, p.k, token);
    }
    if (streams_q || streams_k) end_stream();
  });
}

}  // namespace

Status rotary(const RotaryParams& p, const ThreadPool& pool) {
  if (p.d == 0 || (p.q.heads == 0 && p.k.heads == 0)) return Status::kOk;  // however many tokens
  if (const Status status = check_positions(p, pool); status != Status::kOk) return status;
  return with_dtype(p.dtype, [&](auto* element) {
    return with_dtype(p.table_dtype, [&](auto* angle) {
      run<std::remove_pointer_t<decltype(element)>, std::remove_pointer_t<decltype(angle)>>(p, pool);
      return Status::kOk;
    });
  });
}

}  // namespace qops::cpu::QOPS_ISA_NS
