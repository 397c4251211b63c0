import qops.ops.weight_pack  # noqa: F401  (registers the fake kernels of the packing ops)
from qops.ops.int4_gemm import int4_gemm
from qops.ops.int8_gemm import int8_gemm
from qops.ops.int8_weight_only_gemm import int8_weight_only_gemm
from qops.ops.rms_norm import add_rms_norm, rms_norm
from qops.ops.rotary import rotary, rotary_
from qops.ops.silu_mul import silu_mul

__all__ = [
    "add_rms_norm",
    "int4_gemm",
    "int8_gemm",
    "int8_weight_only_gemm",
    "rms_norm",
    "rotary",
    "rotary_",
    "silu_mul",
]
