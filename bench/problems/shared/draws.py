"""Random numbers of the inputs, all of one seed."""

from __future__ import annotations

import torch
from torch import Tensor


class Random:
    """Numbers of one seed, drawn where they are used."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def bytes(self, rows: int, columns: int) -> Tensor:
        """uint8, uniform. Eight bytes a draw, which makes a gigabyte of weights a matter of a second."""
        words = torch.empty((rows * columns + 7) // 8, dtype=torch.int64, device=self.device)
        words.random_(-(1 << 63), None, generator=self.generator)
        return words.view(torch.uint8)[: rows * columns].view(rows, columns)

    def int8_codes(self, n: int, k: int) -> Tensor:
        """-127 ... 127."""
        return self.bytes(n, k).view(torch.int8).clamp_(min=-127)

    def int8_scales(self, k: int, *shape: int) -> Tensor:
        """With which codes over K columns, times numbers of about 1, give results of about 1."""
        return self.uniform(0.5, 1.5, *shape) / (73 * k**0.5)

    def int4_scales(self, k: int, *shape: int) -> Tensor:
        """The same for 4-bit codes around 8."""
        return self.uniform(0.5, 1.5, *shape) / (4.6 * k**0.5)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def activations(self, *shape: int) -> Tensor:
        """Normal, about one channel in 64 20 times larger, as in the residual stream of an LLM."""
        outliers = torch.rand(shape[-1], generator=self.generator, device=self.device) < 1 / 64
        return self.normal(*shape) * torch.where(outliers, 20.0, 1.0)
