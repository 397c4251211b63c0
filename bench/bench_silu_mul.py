"""silu_mul against eager PyTorch on the same merged projection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qops
from bench.harness import OURS, Comparison, Provider
from qops.testing import random_activations

DTYPE = torch.bfloat16
ROWS = (1, 16, 256, 2048)
INTERMEDIATE = (1536, 14336)
COLD_FROM = 256


def eager(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("intermediate", INTERMEDIATE)
def bench_silu_mul(compare: Comparison, intermediate: int, rows: int) -> None:
    gate_up = random_activations(rows, 2 * intermediate, dtype=DTYPE, seed=0)
    copies = compare.copies(gate_up.nbytes) if rows >= COLD_FROM else 1
    inputs = [(gate_up.clone(),) for _ in range(copies)]
    providers = [Provider(OURS, qops.silu_mul, inputs), Provider("torch F.silu *", eager, inputs)]
    axes: dict[str, int | str] = {"T": rows, "I": intermediate, "dtype": "bfloat16"}
    axes["cache"] = "cold" if rows >= COLD_FROM else "hot"
    gate, up = gate_up.double().chunk(2, dim=-1)
    outputs = rows * intermediate
    compare(
        "silu_mul",
        axes,
        providers,
        F.silu(gate) * up,
        bytes_moved=3 * outputs * gate_up.element_size(),
        flops=5 * outputs,
    )
