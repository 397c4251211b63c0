"""int8_weight_only_gemm against dense products, for the weights that decoding reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import qops
from bench.problems.shared.cases import Selection
from bench.problems.shared.draws import Random
from bench.problems.shared.gemm import WeightOnly, WeightOnlyGemm
from bench.problems.shared.operator import sizes_of
from bench.problems.shared.provider import Axes

OFFSET_BYTES = 4


@dataclass(frozen=True)
class Int8WeightOnlyGemm(WeightOnly):
    """``y[M, N] = x[M, K] @ w[N, K].T``, ``w = s * code + o`` with a scale, and an offset or none, for each row and
    group."""

    x: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int

    def dequantize(self, rows: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
        def at(tensor: Tensor) -> Tensor:
            return tensor if rows is None else tensor[rows.to(tensor.device)]

        scales = at(self.scales).to(dtype)[..., None]
        codes = at(self.codes).to(dtype).view(*scales.shape[:2], self.group_size)
        weight = codes * scales
        return (weight if self.zeros is None else weight + at(self.zeros).to(dtype)[..., None]).flatten(1)

    def arguments(self) -> tuple[Tensor, qops.Int8Weight]:
        kind = "symmetric" if self.zeros is None else "offset"
        return self.x, qops.Int8Weight.from_canonical(self.codes, self.scales, kind=kind, zeros=self.zeros)


class Int8WeightOnlyGemmOperator(WeightOnlyGemm):
    axes = "layer M N K G"

    def weights(self, k: int, selection: Selection) -> list[dict[str, int | str]]:
        """The groups of GGUF's formats: Q8_0, and Q5_1 and Q5_K, whose kind "offset" has an axis of its own."""
        symmetric, offset = {"G": 32}, {"G": 32, "kind": "offset"}
        return [symmetric, *([offset] if selection.formats is None or "offset" in selection.formats else [])]

    def make(self, axes: Axes, rng: Random, dtype: torch.dtype) -> Int8WeightOnlyGemm:
        """Weights are drawn first, so that they do not depend on M, and of a size that gives results of about 1."""
        m, n, k, group = sizes_of(axes, "M N K G")
        codes = rng.int8_codes(n, k)
        scales = rng.int8_scales(k, n, k // group).to(dtype)
        zeros = scales.float() * rng.uniform(-16, 16, n, k // group) if "kind" in axes else None
        return Int8WeightOnlyGemm(rng.activations(m, k).to(dtype), codes, scales, zeros, group)

    def stored_bytes(self, axes: Axes) -> int:
        n, k, group, size = sizes_of(axes, "N K G dtype")
        return n * k + n * (k // group) * (size + OFFSET_BYTES * ("kind" in axes))


OPERATORS = (Int8WeightOnlyGemmOperator("int8_weight_only_gemm"),)
