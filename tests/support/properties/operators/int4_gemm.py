"""Random calls of int4_gemm."""

from __future__ import annotations

from tests.support.properties.property_draws import Strategy
from tests.support.properties.property_gemm import weight_only

CALLS: dict[str, Strategy] = {"int4_gemm": lambda s: weight_only(s, bits=4)}
