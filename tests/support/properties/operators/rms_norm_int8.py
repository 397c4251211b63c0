"""Random calls of the norms that emit int8."""

from __future__ import annotations

from tests.support.properties.operators.rms_norm import norm
from tests.support.properties.property_draws import Strategy

CALLS: dict[str, Strategy] = {
    "rms_norm_int8": norm("rms_norm_int8", add=False, int8=True),
    "add_rms_norm_int8": norm("add_rms_norm_int8", add=True, int8=True),
}
