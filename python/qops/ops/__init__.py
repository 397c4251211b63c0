import qops.ops.weight_pack  # noqa: F401  (registers the fake kernels of the packing ops)
from qops.ops.decode_attention import decode_attention
from qops.ops.decoder_block import attention_block, mlp_block
from qops.ops.int4_dequantize import int4_dequantize
from qops.ops.int4_gemm import int4_gemm, int4_int8_gemm
from qops.ops.int8_gemm import int8_gemm
from qops.ops.int8_weight_only_gemm import int8_weight_only_gemm
from qops.ops.qk_norm_rotary import qk_norm_rotary, qk_norm_rotary_
from qops.ops.quantize_int8 import quantize_int8, quantize_int8_asym, quantize_int8_static
from qops.ops.rms_norm import add_rms_norm, rms_norm
from qops.ops.rms_norm_int8 import add_rms_norm_int8, rms_norm_int8
from qops.ops.rotary import rotary, rotary_
from qops.ops.silu_mul import silu_mul
from qops.ops.silu_mul_int8 import silu_mul_int8

__all__ = [
    "add_rms_norm",
    "add_rms_norm_int8",
    "attention_block",
    "decode_attention",
    "int4_dequantize",
    "int4_gemm",
    "int4_int8_gemm",
    "int8_gemm",
    "int8_weight_only_gemm",
    "mlp_block",
    "qk_norm_rotary",
    "qk_norm_rotary_",
    "quantize_int8",
    "quantize_int8_asym",
    "quantize_int8_static",
    "rms_norm",
    "rms_norm_int8",
    "rotary",
    "rotary_",
    "silu_mul",
    "silu_mul_int8",
]
