"""Numbers as fractions, and their one rounding to float32."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def fraction(value: Tensor) -> Fraction:
    return Fraction(value.double().item())


def round_to_float32(value: Fraction) -> float:
    """Nearest float32, ties to even, decided in exact arithmetic."""
    guess = torch.tensor(float(value), dtype=torch.float32)
    ends = [torch.nextafter(guess, torch.tensor(end)) for end in (-math.inf, math.inf)]
    return min((guess, *ends), key=lambda t: (abs(fraction(t) - value), t.view(torch.int32).item() & 1)).item()
