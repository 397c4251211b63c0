"""silu_mul_int8 against eager PyTorch on the same merged projection, and against our operators one by one."""

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


def eager(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, dim=-1)
    wide = (F.silu(gate) * up).float()
    a = wide.abs().amax(-1, keepdim=True)
    return (wide * (127 / a)).round().to(torch.int8), (a / 127).squeeze(-1)


def unfused(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return qops.quantize_int8(qops.silu_mul(gate_up))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("intermediate", INTERMEDIATE)
def bench_silu_mul_int8(compare: Comparison, intermediate: int, rows: int) -> None:
    gate_up = random_activations(rows, 2 * intermediate, dtype=DTYPE, seed=0)
    copies = compare.copies(gate_up.nbytes) if rows >= COLD_FROM else 1
    inputs = [(gate_up.clone(),) for _ in range(copies)]
    providers = [
        Provider(OURS, qops.silu_mul_int8, inputs),
        Provider("torch eager", eager, inputs),
        Provider("qops, two operators", unfused, inputs),
    ]
    axes: dict[str, int | str] = {"T": rows, "I": intermediate, "dtype": "bfloat16"}
    axes["cache"] = "cold" if rows >= COLD_FROM else "hot"
    gate, up = gate_up.double().chunk(2, dim=-1)
    y = F.silu(gate) * up
    scale = y.abs().amax(-1, keepdim=True) / 127
    outputs = rows * intermediate
    compare(
        "silu_mul_int8",
        axes,
        providers,
        (y / scale, scale.squeeze(-1)),  # q before it is rounded to an integer
        bytes_moved=gate_up.nbytes + outputs + 4 * rows,
        flops=8 * outputs,
    )
