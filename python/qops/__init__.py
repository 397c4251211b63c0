"""Fused quantised operators for LLM inference in PyTorch."""

import logging
from importlib.metadata import PackageNotFoundError, version

from qops._native import build_info, explain
from qops.models import Int4, Int8, Int8WeightOnly, load_model, quantize_model, save_model
from qops.ops import (
    add_rms_norm,
    add_rms_norm_int8,
    int4_dequantize,
    int4_gemm,
    int8_gemm,
    int8_weight_only_gemm,
    qk_norm_rotary,
    qk_norm_rotary_,
    quantize_int8,
    quantize_int8_asym,
    quantize_int8_static,
    rms_norm,
    rms_norm_int8,
    rotary,
    rotary_,
    silu_mul,
    silu_mul_int8,
)
from qops.weights import Int4Weight, Int8Weight

__version__: str
"""Version of the package."""
try:
    __version__ = version("qops")
except PackageNotFoundError:  # the tree is on sys.path without being installed
    __version__ = build_info()["version"]

# Without a handler Python would write warnings to stderr; the application decides.
logging.getLogger("qops").addHandler(logging.NullHandler())

__all__ = [
    "Int4",
    "Int4Weight",
    "Int8",
    "Int8Weight",
    "Int8WeightOnly",
    "__version__",
    "add_rms_norm",
    "add_rms_norm_int8",
    "build_info",
    "explain",
    "int4_dequantize",
    "int4_gemm",
    "int8_gemm",
    "int8_weight_only_gemm",
    "load_model",
    "qk_norm_rotary",
    "qk_norm_rotary_",
    "quantize_int8",
    "quantize_int8_asym",
    "quantize_int8_static",
    "quantize_model",
    "rms_norm",
    "rms_norm_int8",
    "rotary",
    "rotary_",
    "save_model",
    "silu_mul",
    "silu_mul_int8",
]
