"""rms_norm and add_rms_norm against eager PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qops
from bench.problems.shared.draws import Random
from bench.problems.shared.operator import EPS, Operator, Traffic, at, sizes_of
from bench.problems.shared.provider import Axes, Formula, Result, transformers
from qops.ops.rms_norm import rms_norm_ref


@dataclass(frozen=True)
class Norm:
    """RMSNorm of x [T, H], or of x + residual; with int8 results, quantised per token by rule 127."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    eps: float

    def arguments(self) -> tuple[Any, ...]:
        return tuple(value for value in (self.x, self.residual, self.weight, self.eps) if value is not None)


class NormOperator(Operator):
    axes = "T H"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.adds = name.startswith("add_")
        self.in_place = name == "add_rms_norm"
        if self.in_place:
            self.accuracy = f"{self.accuracy}, in place"

    def make(self, axes: Axes, rng: Random, dtype: torch.dtype) -> Norm:
        t, h = sizes_of(axes, "T H")
        residual = rng.activations(t, h).to(dtype) if self.adds else None
        return Norm(rng.activations(t, h).to(dtype), residual, rng.normal(h).to(dtype), EPS)

    def exact(self, problem: Norm, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
        z = at(problem.x, rows)
        if problem.residual is not None:
            z = z + at(problem.residual, rows)
        results = self.results(rms_norm_ref(z, problem.weight.cpu(), problem.eps, rounding="fp32"))
        return (*results, z.double()) if self.adds else results

    def results(self, y: Tensor) -> tuple[Tensor, ...]:
        """Of the normalised rows."""
        return (y,)

    def traffic(self, axes: Axes) -> Traffic:
        t, h, size = sizes_of(axes, "T H dtype")
        rows = t * (1 + self.adds)
        return Traffic((rows + 1) * h * size, rows * h * size, t * h * (4 + self.adds))

    def ours(self, problem: Norm) -> Callable[[], Result]:
        """add_rms_norm in place, as peers have it alone: at 2,048 x 4,096 new results take twice its time, which the
        system needs for their pages."""
        if not self.in_place or problem.residual is None:
            return super().ours(problem)
        x, residual = problem.x.clone(), problem.residual.clone()
        return functools.partial(qops.add_rms_norm, x, residual, problem.weight, problem.eps, out=(x, residual))

    def form(self, norm: Callable[..., Tensor]) -> Callable[..., Result]:
        return with_residual(norm) if self.adds else norm

    def formulas(self) -> list[Formula]:
        once = self.form(functional_norm)
        return [
            transformers(self.form(transformers_norm), Norm.arguments),
            Formula("torch F.rms_norm", "rounded once", Norm.arguments, lambda problem: once),
        ]


def transformers_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """LlamaRMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def functional_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def with_residual(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        z = x + residual
        return norm(z, weight, eps), z

    return add_norm


OPERATORS = (NormOperator("rms_norm"), NormOperator("add_rms_norm"))
