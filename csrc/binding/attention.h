// The arguments of attention of a few new tokens over a cache of keys and values.
#pragma once

#include <cmath>
#include <limits>
#include <sstream>

#include "binding/device.h"

namespace qops::binding {

inline void four_dims(const Checker& check, const Tensor& t, const char* arg, const char* letters) {
  if (t.dim() != 4) check.refuse(arg, std::string("have 4 dimensions ") + letters, std::to_string(t.dim()));
}

inline void set_strides(const Tensor& t, int64_t (&strides)[3]) {
  const auto all = t.strides();
  for (size_t d = 0; d < 3; ++d) strides[d] = all[d];
}

// A dimension of size 1 serves all.
inline void take_mask(const Checker& check, const Tensor& mask, const Tensor& x, DecodeAttentionParams& p) {
  check.device(mask, "mask", x);
  check.dtype(mask, "mask", ScalarType::Bool);
  four_dims(check, mask, "mask", "[B or 1, 1, T or 1, S]");
  const auto sizes = mask.sizes();
  if ((sizes[0] != p.batch && sizes[0] != 1) || sizes[1] != 1 || (sizes[2] != p.t && sizes[2] != 1) ||
      sizes[3] != p.s) {
    check.refuse("mask",
                 "have shape [B or 1, 1, T or 1, S] = [" + std::to_string(p.batch) + " or 1, 1, " +
                     std::to_string(p.t) + " or 1, " + std::to_string(p.s) + "]",
                 to_string(sizes));
  }
  p.mask = static_cast<const bool*>(mask.const_data_ptr());
  p.mask_strides[0] = sizes[0] == 1 ? 0 : mask.stride(0);
  p.mask_strides[1] = sizes[2] == 1 ? 0 : mask.stride(2);
  p.mask_strides[2] = mask.stride(3);
}

// float32, which kernels compute in.
inline float finite(const Checker& check, double value, const char* arg, bool may_be_negative) {
  if (std::abs(value) <= std::numeric_limits<float>::max() && (may_be_negative || value >= 0.0)) {
    return static_cast<float>(value);
  }
  std::ostringstream text;
  text << value;
  check.refuse(arg, may_be_negative ? "be a finite float32" : "be a float32 that is finite and not negative",
               text.str());
}

inline void not_negative(const Checker& check, int64_t value, const char* arg) {
  if (value < 0 || value > int64_t{1} << 62) check.refuse(arg, "lie in 0 .. 2^62", std::to_string(value));
}

// Of whoever asks for a plan.
inline void check_heads(const Checker& check, const DecodeAttentionParams& p) {
  const bool fits = p.kv_heads == 0 ? p.q_heads == 0 : p.q_heads % p.kv_heads == 0;
  check.require(fits, "q_heads", "be a multiple of kv_heads = " + std::to_string(p.kv_heads),
                std::to_string(p.q_heads));
  constexpr int64_t kMost = int64_t{1} << 48;  // of what plans count
  check.require(p.q_heads == 0 || p.d <= kMost / p.q_heads, "d", "be so small that Hq D <= 2^48", std::to_string(p.d));
}

// Keys and values by their arguments' names.
struct Cache {
  const Tensor &k, &v;
  const char *k_arg, *v_arg;
};

// All but q and y. tokens_arg, heads_arg: what has T and Hq; both, D and the dtype of x and of the cache are known.
inline void take_attention(const Checker& check, const Tensor& x, const Cache& cache, const char* tokens_arg,
                           const char* heads_arg, double scale, const std::optional<Tensor>& mask, int64_t window,
                           double softcap, int64_t first_position, DecodeAttentionParams& p) {
  const auto k_sizes = cache.k.sizes();
  p.kv_heads = k_sizes[1];
  p.s = k_sizes[2];
  if (p.t > kMaxDecodeTokens) check.refuse(tokens_arg, "have at most 8 tokens T", std::to_string(p.t));
  if (k_sizes[0] != p.batch || k_sizes[3] != p.d) {
    check.refuse(cache.k_arg,
                 "have shape [B, Hkv, S, D] with B = " + std::to_string(p.batch) + ", D = " + std::to_string(p.d),
                 to_string(k_sizes));
  }
  if (p.kv_heads == 0 ? p.q_heads != 0 : p.q_heads % p.kv_heads != 0) {
    check.refuse(heads_arg, "have a multiple of Hkv = " + std::to_string(p.kv_heads) + " heads",
                 std::to_string(p.q_heads));
  }
  if (p.s < p.t) check.refuse(cache.k_arg, "have at least T = " + std::to_string(p.t) + " rows", std::to_string(p.s));
  check.same_shape(cache.v, cache.v_arg, cache.k, cache.k_arg);
  check.dense_last_dim(cache.k, cache.k_arg);
  check.dense_last_dim(cache.v, cache.v_arg);
  if (mask) take_mask(check, *mask, x, p);
  p.scale = finite(check, scale, "scale", true);
  not_negative(check, window, "window");
  if (mask && window > 0) check.refuse("window", "be 0 with a mask", std::to_string(window));
  p.window = window;
  p.softcap = finite(check, softcap, "softcap", false);
  not_negative(check, first_position, "first_position");
  p.first_position = first_position;
  p.k = cache.k.const_data_ptr();
  p.v = cache.v.const_data_ptr();
  set_strides(cache.k, p.k_strides);
  set_strides(cache.v, p.v_strides);
}

}  // namespace qops::binding
