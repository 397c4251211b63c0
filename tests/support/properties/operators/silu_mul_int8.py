"""Random calls of silu_mul_int8."""

from __future__ import annotations

from tests.support.properties.operators.silu_mul import silu_mul
from tests.support.properties.property_draws import Strategy

CALLS: dict[str, Strategy] = {"silu_mul_int8": lambda s: silu_mul(s, int8=True)}
