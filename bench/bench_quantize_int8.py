"""quantize_int8 and its asymmetric and static forms against the same formula in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qops
from bench.harness import OURS, Comparison, Provider
from qops.ops.quantize_int8 import quantize_int8_asym_ref, quantize_int8_ref, quantize_int8_static_ref
from qops.testing import random_activations

DTYPE = torch.bfloat16
ROWS = (1, 16, 256, 2048)
COLUMNS = (576, 4096)
COLD_FROM = 256
SCALE = torch.tensor(0.05)
ZERO_POINT = torch.tensor(3, dtype=torch.int32)


def eager_127(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    a = wide.abs().amax(-1, keepdim=True)
    return (wide * (127 / a)).round().to(torch.int8), (a / 127).squeeze(-1)


def eager_compressed_tensors(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).clamp(-128, 127).round().to(torch.int8), scale.float().squeeze(-1)


def eager_torchao(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(-1, keepdim=True) / 127.5).float()
    return (x * (1 / scale)).round().clamp(-128, 127).to(torch.int8), scale.squeeze(-1)


def eager_asym(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.float()
    low, high = wide.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / 255
    zero_point = -128 - (low / scale).round()
    q = ((wide * (1 / scale)).round() + zero_point).clamp(-128, 127).to(torch.int8)
    return q, scale.squeeze(-1), zero_point.squeeze(-1).to(torch.int32)


def eager_static(x: Tensor) -> Tensor:
    return ((x * (1 / SCALE)).round() + ZERO_POINT).clamp(-128, 127).to(torch.int8)


Results = Tensor | tuple[Tensor, ...]
FORMS: dict[str, tuple[Callable[[Tensor], Results], Callable[[Tensor], Results], Callable[[Tensor], Results]]] = {
    "127": (qops.quantize_int8, eager_127, quantize_int8_ref),
    "compressed-tensors": (
        lambda x: qops.quantize_int8(x, "compressed-tensors"),
        eager_compressed_tensors,
        lambda x: quantize_int8_ref(x, "compressed-tensors"),
    ),
    "torchao": (
        lambda x: qops.quantize_int8(x, "torchao"),
        eager_torchao,
        lambda x: quantize_int8_ref(x, "torchao"),
    ),
    "asym": (qops.quantize_int8_asym, eager_asym, quantize_int8_asym_ref),
    "static": (
        lambda x: qops.quantize_int8_static(x, SCALE, ZERO_POINT),
        eager_static,
        lambda x: quantize_int8_static_ref(x, SCALE, ZERO_POINT),
    ),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("form", FORMS)
def bench_quantize_int8(compare: Comparison, form: str, columns: int, rows: int) -> None:
    ours, eager, reference = FORMS[form]
    x = random_activations(rows, columns, dtype=DTYPE, seed=0)
    copies = compare.copies(x.nbytes) if rows >= COLD_FROM else 1
    inputs = [(x.clone(),) for _ in range(copies)]
    providers = [Provider(OURS, ours, inputs), Provider("torch eager", eager, inputs)]
    axes: dict[str, int | str] = {"T": rows, "K": columns, "dtype": "bfloat16", "rule": form}
    axes["cache"] = "cold" if rows >= COLD_FROM else "hot"
    exact = reference(x)
    exact = exact.double() if isinstance(exact, Tensor) else tuple(t.double() for t in exact)
    op = f"quantize_int8_{form}" if form in ("asym", "static") else "quantize_int8"
    compare(op, axes, providers, exact, bytes_moved=x.nbytes + x.numel() + 4 * rows, flops=3 * x.numel())
