"""int4_gemm, exact and with int8 activations, against dense products, for the weights that decoding reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import qops
from bench.problems.shared.cases import Selection, chosen
from bench.problems.shared.draws import Random
from bench.problems.shared.gemm import WeightOnly, WeightOnlyGemm
from bench.problems.shared.operator import sizes_of
from bench.problems.shared.provider import Axes, Result

ZERO_BYTES = {"symmetric": 0, "zero_point": 1, "offset": 4}


@dataclass(frozen=True)
class Int4Gemm(WeightOnly):
    """``y[M, N] = x[M, K] @ w[N, K].T``; w as in ``qops.Int4Weight.from_canonical``.

    Codes are 0 ... 15, even k in the low nibble. By kind, w is ``s * (q - 8)`` ("symmetric"), ``s * (q - z)`` with z
    uint8 ("zero_point") or ``s * q + z`` with z float32 ("offset").
    """

    x: Tensor
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    kind: str

    def dequantize(self, rows: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
        def at(tensor: Tensor) -> Tensor:
            return tensor if rows is None else tensor[rows.to(tensor.device)]

        scales, qweight = at(self.scales).to(dtype)[..., None], at(self.qweight)
        codes = torch.stack((qweight & 15, qweight >> 4), dim=-1).to(dtype).view(*scales.shape[:2], self.group_size)
        if self.zeros is None:
            return (scales * (codes - 8)).flatten(1)
        zeros = at(self.zeros).to(dtype)[..., None]
        weight = scales * codes + zeros if self.kind == "offset" else scales * (codes - zeros)
        return weight.flatten(1)

    def packed(self) -> qops.Int4Weight:
        return qops.Int4Weight.from_canonical(self.qweight, self.scales, kind=self.kind, zeros=self.zeros)

    def arguments(self) -> tuple[Tensor, qops.Int4Weight]:
        return self.x, self.packed()


class Int4GemmOperator(WeightOnlyGemm):
    axes = "layer M N K G kind"
    tiny = {"kind": "symmetric"}  # noqa: RUF012

    def weights(self, k: int, selection: Selection) -> list[dict[str, int | str]]:
        """Offsets in the groups of GGUF's formats."""
        usual = 128 if k % 128 == 0 else 64
        kinds = chosen(ZERO_BYTES, selection.formats)
        return [{"G": 32 if kind == "offset" else usual, "kind": kind} for kind in kinds]

    def make(self, axes: Axes, rng: Random, dtype: torch.dtype) -> Int4Gemm:
        """Weights are drawn first, so that they do not depend on M, and of a size that gives results of about 1."""
        m, n, k, group = sizes_of(axes, "M N K G")
        kind = str(axes["kind"])
        qweight = rng.bytes(n, k // 2)
        scales = rng.int4_scales(k, n, k // group).to(dtype)
        zeros = None
        if kind == "zero_point":
            zeros = rng.uniform(6, 10, n, k // group).to(torch.uint8)
        elif kind == "offset":
            # A file stores them in 16 bits.
            zeros = (-scales.float() * rng.uniform(7, 8, n, k // group)).to(dtype).float()
        elif kind != "symmetric":
            raise ValueError(f"no kind {kind!r}")
        return Int4Gemm(rng.activations(m, k).to(dtype), qweight, scales, zeros, group, kind)

    def stored_bytes(self, axes: Axes) -> int:
        n, k, group, size = sizes_of(axes, "N K G dtype")
        return n * k // 2 + n * (k // group) * (size + ZERO_BYTES[str(axes["kind"])])


class Int4Int8GemmOperator(Int4GemmOperator):
    """Of the same x: each call quantises it."""

    unit = "int8"
    accuracy = "int8 activations per token"

    def weights(self, k: int, selection: Selection) -> list[dict[str, int | str]]:
        """Groups of 32 as well: there the float32 steps weigh most."""
        weights = super().weights(k, selection)
        return [*weights, *({**weight, "G": 32} for weight in weights if weight["kind"] == "symmetric")]

    def ours(self, problem: Int4Gemm) -> Callable[[], Result]:
        return functools.partial(qops.int4_gemm, *problem.arguments(), activation="int8")


OPERATORS = (Int4GemmOperator("int4_gemm"), Int4Int8GemmOperator("int4_int8_gemm"))
