// The C++ side of every schema in registration.cpp.
#pragma once

#include <string_view>
#include <tuple>

#include "binding/checks.h"

namespace qops::binding {

Tensor int4_dequantize(const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                       int64_t out_features, int64_t group_size, int64_t kind, ScalarType dtype, bool gate_up);
Tensor int4_gemm(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                 const std::optional<Tensor>& perm, const std::optional<Tensor>& bias, int64_t out_features,
                 int64_t group_size, int64_t kind, bool batch_invariant);
void int4_gemm_out(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                   const std::optional<Tensor>& perm, const std::optional<Tensor>& bias, int64_t out_features,
                   int64_t group_size, int64_t kind, bool batch_invariant, const Tensor& out);
Tensor int4_gemm_fused(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                       const std::optional<Tensor>& perm, const std::optional<Tensor>& bias, int64_t out_features,
                       int64_t group_size, int64_t kind, bool batch_invariant, const std::optional<Tensor>& residual,
                       bool silu_mul, const std::optional<Tensor>& out_scale,
                       const std::optional<Tensor>& out_zero_point);
void int4_gemm_fused_out(const Tensor& x, const Tensor& packed, const Tensor& scales,
                         const std::optional<Tensor>& zeros, const std::optional<Tensor>& perm,
                         const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size, int64_t kind,
                         bool batch_invariant, const std::optional<Tensor>& residual, bool silu_mul,
                         const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point,
                         const Tensor& out);
Tensor int8_gemm(const Tensor& q, const Tensor& scale, const std::optional<Tensor>& zero_point, const Tensor& packed,
                 const Tensor& w_scale, const std::optional<Tensor>& bias, int64_t out_features, ScalarType out_dtype);
void int8_gemm_out(const Tensor& q, const Tensor& scale, const std::optional<Tensor>& zero_point, const Tensor& packed,
                   const Tensor& w_scale, const std::optional<Tensor>& bias, int64_t out_features, const Tensor& out);
Tensor int8_gemm_fused(const Tensor& q, const Tensor& scale, const std::optional<Tensor>& zero_point,
                       const Tensor& packed, const Tensor& w_scale, const std::optional<Tensor>& bias,
                       int64_t out_features, ScalarType out_dtype, const std::optional<Tensor>& residual, bool silu_mul,
                       const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point);
void int8_gemm_fused_out(const Tensor& q, const Tensor& scale, const std::optional<Tensor>& zero_point,
                         const Tensor& packed, const Tensor& w_scale, const std::optional<Tensor>& bias,
                         int64_t out_features, ScalarType out_dtype, const std::optional<Tensor>& residual,
                         bool silu_mul, const std::optional<Tensor>& out_scale,
                         const std::optional<Tensor>& out_zero_point, const Tensor& out);
Tensor int8_weight_only_gemm(const Tensor& x, const Tensor& packed, const Tensor& scales, std::optional<Tensor> bias,
                             int64_t out_features, int64_t group_size);
void int8_weight_only_gemm_out(const Tensor& x, const Tensor& packed, const Tensor& scales, std::optional<Tensor> bias,
                               int64_t out_features, int64_t group_size, const Tensor& out);

void check_layout(const Tensor& packed, std::string_view layout);
Tensor int4_pack(const Tensor& qweight);
Tensor int4_unpack(const Tensor& packed, int64_t out_features);
Tensor int8_pack(const Tensor& qweight);
Tensor int8_unpack(const Tensor& packed, int64_t out_features);

std::tuple<Tensor, Tensor> quantize_int8(const Tensor& x, std::string_view rule);
void quantize_int8_out(const Tensor& x, std::string_view rule, const Tensor& q, const Tensor& scale);
std::tuple<Tensor, Tensor, Tensor> quantize_int8_asym(const Tensor& x);
void quantize_int8_asym_out(const Tensor& x, const Tensor& q, const Tensor& scale, const Tensor& zero_point);
Tensor quantize_int8_static(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point);
void quantize_int8_static_out(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                              const Tensor& q);

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset, std::string_view rounding);
void rms_norm_out(const Tensor& x, const Tensor& weight, double eps, double weight_offset, std::string_view rounding,
                  const Tensor& out);
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                                        double weight_offset, std::string_view rounding);
void add_rms_norm_out(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, double weight_offset,
                      std::string_view rounding, const Tensor& y, const Tensor& residual_out);
std::tuple<Tensor, Tensor> rms_norm_int8(const Tensor& x, const Tensor& weight, double eps, double weight_offset,
                                         std::string_view rounding, std::string_view rule);
void rms_norm_int8_out(const Tensor& x, const Tensor& weight, double eps, double weight_offset,
                       std::string_view rounding, std::string_view rule, const Tensor& q, const Tensor& scale);
std::tuple<Tensor, Tensor, Tensor> add_rms_norm_int8(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                     double eps, double weight_offset, std::string_view rounding,
                                                     std::string_view rule);
void add_rms_norm_int8_out(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                           double weight_offset, std::string_view rounding, std::string_view rule, const Tensor& q,
                           const Tensor& scale, const Tensor& residual_out);

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                  const std::optional<Tensor>& positions, bool interleaved);
void rotary_(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
             const std::optional<Tensor>& positions, bool interleaved);

std::tuple<Tensor, Tensor> qk_norm_rotary(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                          const Tensor& k_weight, const Tensor& cos, const Tensor& sin, double eps,
                                          const std::optional<Tensor>& positions, bool interleaved,
                                          double weight_offset, std::string_view rounding);
void qk_norm_rotary_(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
                     const Tensor& cos, const Tensor& sin, double eps, const std::optional<Tensor>& positions,
                     bool interleaved, double weight_offset, std::string_view rounding);

Tensor silu_mul(const Tensor& gate_up, std::string_view rounding);
Tensor silu_mul_gate_up(const Tensor& gate, const Tensor& up, std::string_view rounding);
void silu_mul_out(const Tensor& gate_up, std::string_view rounding, const Tensor& out);
void silu_mul_gate_up_out(const Tensor& gate, const Tensor& up, std::string_view rounding, const Tensor& out);
std::tuple<Tensor, Tensor> silu_mul_int8(const Tensor& gate_up, std::string_view rounding, std::string_view rule);
std::tuple<Tensor, Tensor> silu_mul_int8_gate_up(const Tensor& gate, const Tensor& up, std::string_view rounding,
                                                 std::string_view rule);
void silu_mul_int8_out(const Tensor& gate_up, std::string_view rounding, std::string_view rule, const Tensor& q,
                       const Tensor& scale);
void silu_mul_int8_gate_up_out(const Tensor& gate, const Tensor& up, std::string_view rounding, std::string_view rule,
                               const Tensor& q, const Tensor& scale);

}  // namespace qops::binding
