"""Random calls of int8_weight_only_gemm."""

from __future__ import annotations

from tests.support.properties.property_draws import Strategy
from tests.support.properties.property_gemm import weight_only

CALLS: dict[str, Strategy] = {"int8_weight_only_gemm": lambda s: weight_only(s, bits=8)}
