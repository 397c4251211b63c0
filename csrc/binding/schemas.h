// The full list of schemas. Library: what STABLE_TORCH_LIBRARY gives, whose type has no public name.
#pragma once

namespace qops::binding {

template <class Library>
void define_schemas(Library& m) {
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? mask=None, int window=0, "
      "float softcap=0.0, int first_position=0) -> Tensor");
  m.def(
      "decode_attention.out(Tensor q, Tensor k, Tensor v, float scale, Tensor? mask=None, int window=0, "
      "float softcap=0.0, int first_position=0, *, Tensor(a!) out) -> ()");
  m.def(
      "int4_dequantize(Tensor packed, Tensor scales, Tensor? zeros, int out_features, int group_size, int kind, "
      "ScalarType dtype, bool mixed_gate_up=False) -> Tensor");
  // Four more arguments, even if none is given, take as long as a fifth of a small call: overloads of their own.
  m.def(
      "int4_gemm(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, int out_features, "
      "int group_size, int kind, bool batch_invariant=False) -> Tensor");
  m.def(
      "int4_gemm.out(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, "
      "int out_features, int group_size, int kind, bool batch_invariant=False, *, Tensor(a!) out) -> ()");
  m.def(
      "int4_gemm.fused(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, "
      "int out_features, int group_size, int kind, bool batch_invariant=False, Tensor? residual=None, "
      "bool silu_mul=False, Tensor? out_scale=None, Tensor? out_zero_point=None) -> Tensor");
  m.def(
      "int4_gemm.fused_out(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, "
      "int out_features, int group_size, int kind, bool batch_invariant=False, Tensor? residual=None, "
      "bool silu_mul=False, Tensor? out_scale=None, Tensor? out_zero_point=None, *, Tensor(a!) out) -> ()");
  m.def(
      "attention_block(Tensor x, Tensor norm, Tensor? post_norm, float eps, float weight_offset, str rounding, "
      "Tensor qkv, Tensor qkv_scales, Tensor? qkv_zeros, Tensor? qkv_perm, Tensor? qkv_bias, int qkv_kind, "
      "int qkv_input, Tensor? q_norm, Tensor? k_norm, Tensor? cos, Tensor? sin, Tensor? positions, Tensor(a!) keys, "
      "Tensor(b!) values, Tensor o, Tensor o_scales, Tensor? o_zeros, Tensor? o_perm, Tensor? o_bias, int o_kind, "
      "int o_input, float scale, Tensor? mask=None, int window=0, float softcap=0.0, int first_position=0) -> Tensor");
  m.def(
      "decoder_layers(Tensor x, Tensor?[] weights, int[] settings, float eps, float weight_offset, str rounding, "
      "float scale, Tensor? cos, Tensor? sin, Tensor? positions, Tensor(a!)[] keys, Tensor(b!)[] values, "
      "Tensor? mask=None) -> Tensor[]");
  m.def(
      "decoder_layers.planned(Tensor x, Tensor plan, Tensor? cos, Tensor? sin, Tensor? positions, Tensor(a!)[] keys, "
      "Tensor(b!)[] values, int[] first_positions, Tensor? mask=None) -> Tensor[]");
  m.def(
      "decoder_plan(Tensor?[] weights, int[] settings, float eps, float weight_offset, str rounding, float scale) "
      "-> Tensor");
  m.def(
      "mlp_block(Tensor x, Tensor norm, Tensor? post_norm, float eps, float weight_offset, str rounding, "
      "Tensor gate_up, Tensor gate_up_scales, Tensor? gate_up_zeros, Tensor? gate_up_perm, Tensor? gate_up_bias, "
      "int gate_up_kind, int gate_up_input, bool mixed_gate_up, Tensor down, Tensor down_scales, Tensor? down_zeros, "
      "Tensor? down_perm, Tensor? down_bias, int down_kind, int down_input) -> Tensor");
  m.def(
      "int4_int8_gemm(Tensor q, Tensor scale, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, "
      "int out_features, int group_size, int kind, ScalarType out_dtype) -> Tensor");
  m.def(
      "int4_int8_gemm.out(Tensor q, Tensor scale, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, "
      "Tensor? bias, int out_features, int group_size, int kind, *, Tensor(a!) out) -> ()");
  m.def(
      "int4_int8_gemm.fused(Tensor q, Tensor scale, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, "
      "Tensor? bias, int out_features, int group_size, int kind, ScalarType out_dtype, Tensor? residual=None, "
      "bool silu_mul=False, Tensor? out_scale=None, Tensor? out_zero_point=None) -> Tensor");
  m.def(
      "int4_int8_gemm.fused_out(Tensor q, Tensor scale, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, "
      "Tensor? bias, int out_features, int group_size, int kind, ScalarType out_dtype, Tensor? residual=None, "
      "bool silu_mul=False, Tensor? out_scale=None, Tensor? out_zero_point=None, *, Tensor(a!) out) -> ()");
  // Of x, which it rounds to int8 first.
  m.def(
      "int4_int8_gemm.of_floats(Tensor x, str rule, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, "
      "Tensor? bias, int out_features, int group_size, int kind, Tensor? residual=None, bool silu_mul=False, "
      "Tensor? out_scale=None, Tensor? out_zero_point=None) -> Tensor");
  m.def(
      "int4_int8_gemm.of_floats_out(Tensor x, str rule, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, "
      "Tensor? bias, int out_features, int group_size, int kind, Tensor? residual=None, bool silu_mul=False, "
      "Tensor? out_scale=None, Tensor? out_zero_point=None, *, Tensor(a!) out) -> ()");
  m.def("check_layout(Tensor packed, str layout) -> ()");
  m.def("int4_pack(Tensor qweight) -> Tensor");
  m.def("int4_unpack(Tensor packed, int out_features) -> Tensor");
  m.def(
      "int8_embedding(Tensor ids, Tensor packed, Tensor scales, Tensor? zeros, int out_features, int group_size, "
      "ScalarType dtype, bool mixed_gate_up=False) -> Tensor");
  m.def(
      "int8_gemm(Tensor q, Tensor scale, Tensor? zero_point, Tensor packed, Tensor w_scale, Tensor? bias, "
      "int out_features, ScalarType out_dtype) -> Tensor");
  m.def(
      "int8_gemm.out(Tensor q, Tensor scale, Tensor? zero_point, Tensor packed, Tensor w_scale, Tensor? bias, "
      "int out_features, *, Tensor(a!) out) -> ()");
  m.def(
      "int8_gemm.fused(Tensor q, Tensor scale, Tensor? zero_point, Tensor packed, Tensor w_scale, Tensor? bias, "
      "int out_features, ScalarType out_dtype, Tensor? residual=None, bool silu_mul=False, Tensor? out_scale=None, "
      "Tensor? out_zero_point=None) -> Tensor");
  m.def(
      "int8_gemm.fused_out(Tensor q, Tensor scale, Tensor? zero_point, Tensor packed, Tensor w_scale, Tensor? "
      "bias, "
      "int out_features, ScalarType out_dtype, Tensor? residual=None, bool silu_mul=False, Tensor? out_scale=None, "
      "Tensor? out_zero_point=None, *, Tensor(a!) out) -> ()");
  m.def("int8_pack(Tensor qweight) -> Tensor");
  m.def("int8_unpack(Tensor packed, int out_features) -> Tensor");
  m.def(
      "int8_weight_only_gemm(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, "
      "int out_features, int group_size) -> Tensor");
  m.def(
      "int8_weight_only_gemm.out(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? "
      "bias, "
      "int out_features, int group_size, *, Tensor(a!) out) -> ()");
  m.def("quantize_int8(Tensor x, str rule=\"127\") -> (Tensor, Tensor)");
  m.def("quantize_int8.out(Tensor x, str rule=\"127\", *, Tensor(a!) q, Tensor(b!) scale) -> ()");
  m.def("quantize_int8_asym(Tensor x, str rule=\"255\") -> (Tensor, Tensor, Tensor)");
  m.def(
      "quantize_int8_asym.out(Tensor x, str rule=\"255\", *, Tensor(a!) q, Tensor(b!) scale, Tensor(c!) "
      "zero_point) "
      "-> ()");
  m.def("quantize_int8_static(Tensor x, Tensor scale, Tensor? zero_point=None, str rule=\"torchao\") -> Tensor");
  m.def(
      "quantize_int8_static.out(Tensor x, Tensor scale, Tensor? zero_point=None, str rule=\"torchao\", *, "
      "Tensor(a!) q) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset=0.0, str rounding=\"hf\") -> Tensor");
  m.def(
      "rms_norm.out(Tensor x, Tensor weight, float eps, float weight_offset=0.0, str rounding=\"hf\", *, "
      "Tensor(a!) out) -> ()");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset=0.0, "
      "str rounding=\"hf\") -> (Tensor, Tensor)");
  m.def(
      "add_rms_norm.out(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset=0.0, "
      "str rounding=\"hf\", *, Tensor(a!) y, Tensor(b!) residual_out) -> ()");
  m.def(
      "rms_norm_int8(Tensor x, Tensor weight, float eps, float weight_offset=0.0, str rounding=\"hf\", "
      "str rule=\"127\") -> (Tensor, Tensor)");
  m.def(
      "rms_norm_int8.out(Tensor x, Tensor weight, float eps, float weight_offset=0.0, str rounding=\"hf\", "
      "str rule=\"127\", *, Tensor(a!) q, Tensor(b!) scale) -> ()");
  m.def(
      "add_rms_norm_int8(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset=0.0, "
      "str rounding=\"hf\", str rule=\"127\") -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_rms_norm_int8.out(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset=0.0, "
      "str rounding=\"hf\", str rule=\"127\", *, Tensor(a!) q, Tensor(b!) scale, Tensor(c!) residual_out) -> ()");
  m.def(
      "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions=None, bool interleaved=False) "
      "-> (Tensor, Tensor)");
  m.def(
      "rotary_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? positions=None, bool interleaved=False) "
      "-> ()");
  m.def(
      "qk_norm_rotary(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps, "
      "Tensor? positions=None, bool interleaved=False, float weight_offset=0.0, str rounding=\"hf\") "
      "-> (Tensor, Tensor)");
  m.def(
      "qk_norm_rotary_(Tensor(a!) q, Tensor(b!) k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
      "float eps, Tensor? positions=None, bool interleaved=False, float weight_offset=0.0, str rounding=\"hf\") "
      "-> ()");
  m.def("silu_mul(Tensor gate_up, str rounding=\"hf\") -> Tensor");
  m.def("silu_mul.apart(Tensor gate, Tensor up, str rounding=\"hf\") -> Tensor");
  m.def("silu_mul.out(Tensor gate_up, str rounding=\"hf\", *, Tensor(a!) out) -> ()");
  m.def("silu_mul.apart_out(Tensor gate, Tensor up, str rounding=\"hf\", *, Tensor(a!) out) -> ()");
  m.def("silu_mul_int8(Tensor gate_up, str rounding=\"hf\", str rule=\"127\") -> (Tensor, Tensor)");
  m.def("silu_mul_int8.apart(Tensor gate, Tensor up, str rounding=\"hf\", str rule=\"127\") -> (Tensor, Tensor)");
  m.def(
      "silu_mul_int8.out(Tensor gate_up, str rounding=\"hf\", str rule=\"127\", *, Tensor(a!) q, Tensor(b!) scale) "
      "-> ()");
  m.def(
      "silu_mul_int8.apart_out(Tensor gate, Tensor up, str rounding=\"hf\", str rule=\"127\", *, Tensor(a!) q, "
      "Tensor(b!) scale) -> ()");
}

}  // namespace qops::binding
