"""rms_norm_int8 and add_rms_norm_int8 against eager PyTorch, and against this library's own operators one by one.

Few rows are timed hot, as decoding finds them: the layer before has just written them. Many rows are timed cold.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qops
from bench.eager_norms import EPS, functional_norm, transformers_norm
from bench.harness import OURS, Comparison, Provider
from qops.ops.rms_norm import rms_norm_ref
from qops.testing import random_activations

DTYPE = torch.bfloat16
ROWS = (1, 16, 256, 2048)
HIDDEN = (576, 4096)
COLD_FROM = 256


def eager_quantize(y: Tensor) -> tuple[Tensor, Tensor]:
    wide = y.float()
    a = wide.abs().amax(-1, keepdim=True)
    return (wide * (127 / a)).round().to(torch.int8), (a / 127).squeeze(-1)


# The accuracy of ours is held against this one: it rounds where ours does, F.rms_norm once less.
def eager(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return eager_quantize(transformers_norm(x, weight))


def functional(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return eager_quantize(functional_norm(x, weight))


def unfused(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return qops.quantize_int8(qops.rms_norm(x, weight, EPS))


def with_residual(norm: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    def run(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        z = x + residual
        return *norm(z, weight), z

    return run


def unfused_with_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, z = qops.add_rms_norm(x, residual, weight, EPS)
    return *qops.quantize_int8(y), z


def reference(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """q before it is rounded to an integer, and scale."""
    y = rms_norm_ref(x, weight, EPS, rounding="fp32")
    scale = y.abs().amax(-1, keepdim=True) / 127
    return y / scale, scale.squeeze(-1)


def axes_of(rows: int, hidden: int) -> dict[str, int | str]:
    return {"T": rows, "H": hidden, "dtype": "bfloat16", "cache": "cold" if rows >= COLD_FROM else "hot"}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden", HIDDEN)
def bench_rms_norm_int8(compare: Comparison, hidden: int, rows: int) -> None:
    x = random_activations(rows, hidden, dtype=DTYPE, seed=0)
    weight = random_activations(hidden, dtype=DTYPE, seed=1, outliers=False)
    copies = compare.copies(x.nbytes) if rows >= COLD_FROM else 1
    inputs = [(x.clone(), weight) for _ in range(copies)]
    providers = [
        Provider(OURS, lambda x, weight: qops.rms_norm_int8(x, weight, EPS), inputs),
        Provider("transformers formula + eager", eager, inputs),
        Provider("torch F.rms_norm + eager", functional, inputs),
        Provider("qops, two operators", unfused, inputs),
    ]
    moved = x.nbytes + x.numel() + 4 * rows
    axes, flops = axes_of(rows, hidden), 7 * x.numel()
    compare("rms_norm_int8", axes, providers, reference(x, weight), bytes_moved=moved, flops=flops)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden", HIDDEN)
def bench_add_rms_norm_int8(compare: Comparison, hidden: int, rows: int) -> None:
    x, residual = (random_activations(rows, hidden, dtype=DTYPE, seed=seed) for seed in (0, 1))
    weight = random_activations(hidden, dtype=DTYPE, seed=2, outliers=False)
    copies = compare.copies(2 * x.nbytes) if rows >= COLD_FROM else 1
    inputs = [(x.clone(), residual.clone(), weight) for _ in range(copies)]
    providers = [
        Provider(OURS, lambda x, residual, weight: qops.add_rms_norm_int8(x, residual, weight, EPS), inputs),
        Provider("transformers formula + eager", with_residual(eager), inputs),
        Provider("torch F.rms_norm + eager", with_residual(functional), inputs),
        Provider("qops, two operators", unfused_with_residual, inputs),
    ]
    z = x + residual
    moved = 3 * x.nbytes + x.numel() + 4 * rows
    exact = (*reference(z, weight), z.double())
    axes, flops = axes_of(rows, hidden), 8 * x.numel()
    compare("add_rms_norm_int8", axes, providers, exact, bytes_moved=moved, flops=flops)
