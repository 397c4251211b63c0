"""int8_gemm against what PyTorch has for 8-bit activations and weights, and against dense products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import qops
from bench.problems.shared.cases import Selection
from bench.problems.shared.draws import Random
from bench.problems.shared.gemm import Gemm
from bench.problems.shared.operator import Traffic, at, sizes_of
from bench.problems.shared.provider import Axes, Formula, Provider, Result

UNSIGNED_ZERO = 128


@dataclass(frozen=True)
class Int8Gemm:
    """``y[m, n] = scale[m] * w_scale[n] * sum_k q[m, k] * codes[n, k]`` in ``out_dtype``."""

    q: Tensor
    scale: Tensor
    codes: Tensor
    w_scale: Tensor
    out_dtype: torch.dtype

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    def dense(self) -> tuple[Tensor, Tensor]:
        """The products of scales and codes, which quantising took apart."""
        x = (self.q.float() * self.scale[:, None]).to(self.out_dtype)
        return x, (self.codes.float() * self.w_scale[:, None]).to(self.out_dtype)


class Int8GemmOperator(Gemm):
    axes = "layer M N K"
    unit = "int8"
    accuracy = "exact sums"

    def weights(self, k: int, selection: Selection) -> list[dict[str, int | str]]:
        return [{}]

    def make(self, axes: Axes, rng: Random, dtype: torch.dtype) -> Int8Gemm:
        """Weights are drawn first, so that they do not depend on M, and of a size that gives results of about 1."""
        m, n, k = sizes_of(axes, "M N K")
        codes = rng.int8_codes(n, k)
        w_scale = rng.int8_scales(k, n)
        q = rng.int8_codes(m, k)
        return Int8Gemm(q, rng.uniform(0.01, 0.05, m), codes, w_scale, dtype)

    def exact(self, problem: Int8Gemm, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
        assert columns is not None
        sums = at(problem.q, rows).double() @ at(problem.codes, columns).double().T
        return (sums * at(problem.w_scale, columns).double() * at(problem.scale, rows).double()[:, None],)

    def stored_bytes(self, axes: Axes) -> int:
        n, k = sizes_of(axes, "N K")
        return n * k + 4 * n

    def traffic(self, axes: Axes) -> Traffic:
        m, k = sizes_of(axes, "M K")
        return super().traffic(axes)._replace(read=self.weight_bytes(axes) + m * (k + 4))

    def ours(self, problem: Int8Gemm) -> Callable[[], Result]:
        weight = qops.Int8Weight.from_canonical(problem.codes, problem.w_scale[:, None])
        return functools.partial(qops.int8_gemm, problem.q, problem.scale, weight, out_dtype=problem.out_dtype)

    def formulas(self) -> list[Formula]:
        return [*super().formulas(), int_mm("onednn _int_mm", ("cpu",)), int_mm("cublas _int_mm", ("cuda",))]

    def compiled(self) -> list[Formula]:
        return [int_mm("torch.compile _int_mm", ("cuda",))]

    def providers(self) -> list[Provider]:
        packed = Provider("onednn qlinear", self.name, ("cpu",), qlinear, self.accuracy, rebuilt=True)
        return [*super().providers(), packed]


def int_mm(name: str, devices: tuple[str, ...]) -> Formula:
    def arguments(p: Int8Gemm) -> tuple[Any, ...]:
        return p.q, p.scale, p.codes.clone(), p.w_scale, p.out_dtype

    return Formula(name, Int8GemmOperator.accuracy, arguments, lambda p: scaled_int_mm, devices, int_mm_limits)


def scaled_int_mm(q: Tensor, scale: Tensor, codes: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What a W8A8 linear is without a kernel of its own."""
    return (torch._int_mm(q, codes.T) * w_scale * scale[:, None]).to(dtype)


def int_mm_limits(device: str, axes: Axes) -> str | None:
    return "torch._int_mm needs M > 16 on CUDA" if device == "cuda" and int(axes["M"]) <= 16 else None


def qlinear(p: Int8Gemm) -> Callable[[], Result]:
    """With unsigned activations, 128 above the signed code: signed ones end in oneDNN's reference kernel."""
    unsigned = (p.q.int() + UNSIGNED_ZERO).to(torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(p.codes.clone(), None)
    zeros = torch.zeros(len(p.w_scale), dtype=torch.int32)

    def call() -> Tensor:
        y = torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, UNSIGNED_ZERO, packed, p.w_scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return (y * p.scale[:, None]).to(p.out_dtype)

    return call


OPERATORS = (Int8GemmOperator("int8_gemm"),)
