"""quantize_int8 and its asymmetric and static forms against the same formula in eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.problems.shared.cases import Selection, chosen
from bench.problems.shared.draws import Random
from bench.problems.shared.operator import Operator, Traffic, at, sizes_of
from bench.problems.shared.provider import Axes, Formula
from qops.ops.quantize_int8 import quantize_int8_asym_ref, quantize_int8_ref, quantize_int8_static_ref


@dataclass(frozen=True)
class Quantize:
    """x [T, K] to int8 by ``rule``: "127", "compressed-tensors", "torchao", "asym", "static" (with the last two)."""

    x: Tensor
    rule: str
    scale: Tensor | None
    zero_point: Tensor | None

    def tensors(self) -> tuple[Any, ...]:
        return (self.x,) if self.scale is None else (self.x, self.scale, self.zero_point)

    def arguments(self) -> tuple[Any, ...]:
        return self.tensors() if self.rule in ("asym", "static") else (self.x, self.rule)


class QuantizeOperator(Operator):
    axes = "T K rule"
    accuracy = "bits of the rule"

    def __init__(self, name: str, rules: Sequence[str], row_bytes: int) -> None:
        """``row_bytes``: what a row's scale and zero point take."""
        super().__init__(name)
        self.rules, self.row_bytes, self.tiny = rules, row_bytes, {"rule": rules[0]}

    def shapes(self, selection: Selection) -> list[dict[str, int | str]]:
        rules = chosen(self.rules, selection.formats)
        return [{**width, "rule": rule} for width in super().shapes(selection) for rule in rules]

    def make(self, axes: Axes, rng: Random, dtype: torch.dtype) -> Quantize:
        x, rule = rng.activations(*sizes_of(axes, "T K")).to(dtype), str(axes["rule"])
        if rule != "static":
            return Quantize(x, rule, None, None)
        zero_point = torch.tensor(3, dtype=torch.int32, device=rng.device)
        return Quantize(x, rule, torch.tensor(0.05, device=rng.device), zero_point)

    def exact(self, problem: Quantize, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
        x = at(problem.x, rows)
        if problem.scale is not None:
            zero_point = None if problem.zero_point is None else problem.zero_point.cpu()
            return (quantize_int8_static_ref(x, problem.scale.cpu(), zero_point).double(),)
        asymmetric = problem.rule == "asym"
        results = quantize_int8_asym_ref(x) if asymmetric else quantize_int8_ref(x, problem.rule)
        return tuple(tensor.double() for tensor in results)

    def traffic(self, axes: Axes) -> Traffic:
        t, k, size = sizes_of(axes, "T K dtype")
        return Traffic(t * k * size, t * (k + self.row_bytes), 3 * t * k)

    def formulas(self) -> list[Formula]:
        """The contract itself, up to what float32 rounds in another order."""
        return [Formula("torch eager", "formula of the rule", Quantize.tensors, lambda p: FORMULAS[p.rule])]


def int8_rows(y: Tensor) -> tuple[Tensor, Tensor]:
    """By rule 127: q before it is rounded to an integer, and scale."""
    scale = y.abs().amax(-1, keepdim=True) / 127
    return y / scale, scale.squeeze(-1)


def per_token_127(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    a = wide.abs().amax(-1, keepdim=True)
    return (wide * (127 / a)).round().to(torch.int8), (a / 127).squeeze(-1)


def per_token_compressed_tensors(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).clamp(-128, 127).round().to(torch.int8), scale.float().squeeze(-1)


def per_token_torchao(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(-1, keepdim=True) / 127.5).float()
    return (x * (1 / scale)).round().clamp(-128, 127).to(torch.int8), scale.squeeze(-1)


def per_token_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.float()
    low, high = wide.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / 255
    zero_point = -128 - (low / scale).round()
    q = ((wide * (1 / scale)).round() + zero_point).clamp(-128, 127).to(torch.int8)
    return q, scale.squeeze(-1), zero_point.squeeze(-1).to(torch.int32)


def static(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return ((x * (1 / scale)).round() + zero_point).clamp(-128, 127).to(torch.int8)


FORMULAS = {
    "127": per_token_127,
    "compressed-tensors": per_token_compressed_tensors,
    "torchao": per_token_torchao,
    "asym": per_token_asymmetric,
    "static": static,
}
OPERATORS = (
    QuantizeOperator("quantize_int8", ("127", "compressed-tensors", "torchao"), row_bytes=4),
    QuantizeOperator("quantize_int8_asym", ("asym",), row_bytes=8),
    QuantizeOperator("quantize_int8_static", ("static",), row_bytes=0),
)
