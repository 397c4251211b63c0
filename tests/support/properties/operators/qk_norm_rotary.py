"""Random calls of the rotary operators with norms."""

from __future__ import annotations

from tests.support.properties.operators.rotary import rotary
from tests.support.properties.property_draws import Strategy

CALLS: dict[str, Strategy] = {
    "qk_norm_rotary": lambda s: rotary(s, normed=True),
    "qk_norm_rotary_": lambda s: rotary(s, in_place=True, normed=True),
}
