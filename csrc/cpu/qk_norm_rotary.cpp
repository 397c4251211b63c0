// qk_norm_rotary: rms_norm of every head of q and k over its D elements, then rotary.
//
// Bound by memory, which one pass halves: a head is read once from DRAM, its normalised elements go no further than L1,
// rounded to the dtype there as rms_norm rounds them, and are written once, rotated. The arithmetic: cpu/norm_row.h,
// cpu/rotate_head.h. It takes 2.5 times a copy of as many bytes past the caches for heads of 128 bfloat16 and 4.5 times
// for heads of 64 (one thread of Sapphire Rapids).
#include "cpu/norm_row.h"
#include "cpu/rotate_head.h"
#include "cpu/row_buffers.h"

namespace qops::cpu::QOPS_ISA_NS {
namespace {

int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// float32 holds every weight exactly; converted once a call, the dtypes of the weights need no kernels of their own.
void widen_weight(const void* weight, DType dtype, int64_t d, float* out) {
  for (int64_t i = 0; i < d; i += kLanes) store(out + i, load_as_float(weight, dtype, i, d - i));
}

// The angles of all pairs of a token.
template <class A>
void load_all_angles(const RotaryParams& p, int64_t token, const Angles& angles) {
  const int64_t position = position_of(p, token);
  for (int64_t first = 0; first < p.pairs; first += kBlockPairs) {
    const int64_t pairs = std::min(kBlockPairs, p.pairs - first);
    const int64_t at = p.interleaved ? 2 * first : first;
    load_angles<A>(p, position, first, pairs, {angles.cos + at, angles.sin + at});
  }
}

// normed: D elements. A head is read in full before it is written.
template <class T>
void norm_and_rotate(const RotaryParams& p, const RmsNormStyle& style, const RotaryHeads& heads, const float* weight,
                     int64_t token, const Angles& angles, T* normed) {
  const int64_t x_begin = heads.x_tokens.offset(token), y_begin = heads.y_tokens.offset(token);
  for (int64_t head = 0; head < heads.heads; ++head) {
    const T* x = static_cast<const T*>(heads.x) + x_begin + head * heads.x_head_stride;
    T* y = static_cast<T*>(heads.y) + y_begin + head * heads.y_head_stride;
    if (heads.x_stride == 1) {
      normalise_row(x, weight, p.d, style, normed);
    } else {
      for (int64_t i = 0; i < p.d; ++i) normed[i] = x[i * heads.x_stride];
      normalise_row(normed, weight, p.d, style, normed);
    }
    if (p.interleaved) {
      rotate_neighbours(normed, 1, y, heads.y_stride, p.pairs, angles);
    } else {
      rotate_halves(normed, 1, y, heads.y_stride, p.pairs, p.pairs, angles);
    }
    for (int64_t i = 2 * p.pairs; i < p.d; ++i) y[i * heads.y_stride] = normed[i];
  }
}

// As norm_and_rotate() of dense heads, in two passes over the token's heads: the chain of one head's sum, division and
// root is long, those of several run side by side.
template <bool kStream, bool kRoundBeforeWeight, class T>
void norm_and_rotate_dense(const RotaryParams& p, const RmsNormStyle& style, const RotaryHeads& heads,
                           const float* weight, int64_t token, int64_t next, const Angles& angles) {
  constexpr int64_t kHeads = 16;
  const int64_t x_begin = heads.x_tokens.offset(token), after = heads.x_tokens.offset(next);
  const int64_t y_begin = heads.y_tokens.offset(token);
  const F32x16 offset = set1(style.weight_offset);
  for (int64_t first = 0; first < heads.heads; first += kHeads) {
    const int64_t n = std::min(kHeads, heads.heads - first);
    const T* x = static_cast<const T*>(heads.x) + x_begin + first * heads.x_head_stride;
    const T* ahead = static_cast<const T*>(heads.x) + after + first * heads.x_head_stride;
    T* y = static_cast<T*>(heads.y) + y_begin + first * heads.y_head_stride;
    float rstd[kHeads] = {};
    for (int64_t head = 0; head < n; ++head) {
      rstd[head] = sum_of_squares(x + head * heads.x_head_stride, p.d, RowAhead<T>{ahead + head * heads.x_head_stride});
    }
    const F32x16 mean = load(rstd) / set1(static_cast<float>(p.d));
    store(rstd, set1(1.0f) / sqrt(mean + set1(style.eps)));
    for (int64_t head = 0; head < n; ++head) {
      const F32x16 factor = set1(rstd[head]);
      const auto finish = [&](F32x16 v, F32x16 w) {
        const F32x16 normed = v * factor;
        return round_in_pair<T>(kRoundBeforeWeight ? round_in_pair<T>(normed) * w : normed * (w + offset));
      };
      const RowAhead<T> lines{ahead + head * heads.x_head_stride};
      rotate_whole_halves<kStream>(x + head * heads.x_head_stride, y + head * heads.y_head_stride, p.pairs, angles,
                                   [&](const T* from, int64_t i) {
                                     fetch_half(lines, p.d / 2 + i / 2, kPair);
                                     const F32x32 v = load_pair(from + i);
                                     return F32x32{finish(v.a, load(weight + i)),
                                                   finish(v.b, load(weight + i + kLanes))};
                                   });
    }
  }
}

template <bool kRoundBeforeWeight, class T>
void norm_and_rotate_dense(const RotaryParams& p, const RmsNormStyle& style, const RotaryHeads& heads,
                           const float* weight, bool streams, int64_t token, int64_t next, const Angles& angles) {
  streams ? norm_and_rotate_dense<true, kRoundBeforeWeight, T>(p, style, heads, weight, token, next, angles)
          : norm_and_rotate_dense<false, kRoundBeforeWeight, T>(p, style, heads, weight, token, next, angles);
}

template <class T, class A>
Status run(const QkNormRotaryParams& params, const ThreadPool& pool) {
  const RotaryParams& p = params.rotary;
  // 8 K elements are about 4 us of work, some four times what waking a thread costs.
  const int64_t tokens = p.q.x_tokens.count, grain = 1 + (8 << 10) / ((p.q.heads + p.k.heads) * p.d + 1);
  if (pool.listener != nullptr) [[unlikely]] {
    tell_tasks(pool, tokens, grain);
    return Status::kOk;
  }
  const int64_t weight_floats = whole_vectors(p.d), angle_floats = whole_vectors(2 * p.pairs);
  Scratch weights(2 * Scratch::bytes<float>(weight_floats));
  if (!weights.ok()) return Status::kOutOfMemory;
  float* q_weight = weights.take<float>(weight_floats);
  float* k_weight = weights.take<float>(weight_floats);
  widen_weight(params.q_weight, params.q_weight_dtype, p.d, q_weight);
  widen_weight(params.k_weight, params.k_weight_dtype, p.d, k_weight);
  const bool is_dense = rotates_whole_halves(p) && 2 * p.pairs == p.d;
  const bool streams_q = is_dense && streams_heads<T>(p, p.q), streams_k = is_dense && streams_heads<T>(p, p.k);
  if (is_dense) {
    order_as_pairs<T>(q_weight, p.d);
    order_as_pairs<T>(k_weight, p.d);
  }
  // A buffer holds the token's angles and one head.
  const int64_t floats = 2 * angle_floats + p.d;
  const int64_t ahead_by = rows_ahead((p.q.heads + p.k.heads) * p.d * static_cast<int64_t>(sizeof(T)));
  const bool streams = streams_q || streams_k;
  return for_rows_with_buffer<float>(pool, tokens, grain, floats, streams, [&](int64_t token, float* buffer) {
    const Angles angles{buffer, buffer + angle_floats};
    T* normed = reinterpret_cast<T*>(buffer + 2 * angle_floats);
    load_all_angles<A>(p, token, angles);
    if (is_dense) {
      order_as_pairs<T>(angles.cos, p.pairs);
      order_as_pairs<T>(angles.sin, p.pairs);
      const int64_t next = std::min(token + ahead_by, tokens - 1);
      const auto both = [&](const auto& heads) {
        heads(p.q, q_weight, streams_q);
        heads(p.k, k_weight, streams_k);
      };
      params.style.round_before_weight
          ? both([&](const RotaryHeads& heads, const float* weight, bool streams) {
              norm_and_rotate_dense<true, T>(p, params.style, heads, weight, streams, token, next, angles);
            })
          : both([&](const RotaryHeads& heads, const float* weight, bool streams) {
              norm_and_rotate_dense<false, T>(p, params.style, heads, weight, streams, token, next, angles);
            });
      return;
    }
    norm_and_rotate<T>(p, params.style, p.q, q_weight, token, angles, normed);
    norm_and_rotate<T>(p, params.style, p.k, k_weight, token, angles, normed);
  });
}

}  // namespace

Status qk_norm_rotary(const QkNormRotaryParams& p, const ThreadPool& pool) {
  if (p.rotary.d == 0 || (p.rotary.q.heads == 0 && p.rotary.k.heads == 0)) return Status::kOk;  // however many tokens
  if (const Status status = check_positions(p.rotary, pool); status != Status::kOk) return status;
  return with_dtype(p.rotary.dtype, [&](auto* element) {
    return with_dtype(p.rotary.table_dtype, [&](auto* angle) {
      return run<std::remove_pointer_t<decltype(element)>, std::remove_pointer_t<decltype(angle)>>(p, pool);
    });
  });
}

}  // namespace qops::cpu::QOPS_ISA_NS
