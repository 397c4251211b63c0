"""Inputs, tolerances and buffers for testing kernels; used by the tests and by the benchmarks."""

from __future__ import annotations

from qops import _numerics
from qops._numerics import (
    Guarded,
    assert_accurate,
    assert_bitwise,
    assert_within,
    decode_attention_bound,
    generator,
    int8_gemm_bound,
    random_activations,
    rms_norm_bound,
    rotary_bound,
    rounding_bound,
    silu_mul_bound,
    strided_rows,
    weight_only_bound,
)

__all__ = [
    "FLOAT_DTYPES",
    "Guarded",
    "assert_accurate",
    "assert_bitwise",
    "assert_within",
    "decode_attention_bound",
    "generator",
    "int8_gemm_bound",
    "random_activations",
    "rms_norm_bound",
    "rotary_bound",
    "rounding_bound",
    "silu_mul_bound",
    "strided_rows",
    "weight_only_bound",
]

FLOAT_DTYPES = _numerics.FLOAT_DTYPES
"""The dtypes of activations."""
