"""rms_norm and add_rms_norm against eager PyTorch: its own F.rms_norm, and the formula in Transformers' LlamaRMSNorm.

Few rows are timed hot, as decoding finds them: the layer before has just written them. Many rows are timed cold.
"""

from __future__ import annotations

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


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden", HIDDEN)
def bench_rms_norm(compare: Comparison, hidden: int, rows: int) -> None:
    x = random_activations(rows, hidden, dtype=DTYPE, seed=0)
    weight = random_activations(hidden, dtype=DTYPE, seed=1, outliers=False)
    copies = compare.copies(x.nbytes) if rows >= COLD_FROM else 1
    inputs = [(x.clone(), weight) for _ in range(copies)]
    providers = [
        Provider(OURS, lambda x, weight: qops.rms_norm(x, weight, EPS), inputs),
        Provider("torch F.rms_norm", functional_norm, inputs),
        Provider("transformers formula", transformers_norm, inputs),
    ]
    axes = {"T": rows, "H": hidden, "dtype": "bfloat16", "cache": "cold" if rows >= COLD_FROM else "hot"}
    reference = rms_norm_ref(x, weight, EPS, rounding="fp32")
    compare("rms_norm", axes, providers, reference, bytes_moved=2 * x.nbytes, flops=4 * x.numel())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden", HIDDEN)
def bench_add_rms_norm(compare: Comparison, hidden: int, rows: int) -> None:
    x, residual = (random_activations(rows, hidden, dtype=DTYPE, seed=seed) for seed in (0, 1))
    weight = random_activations(hidden, dtype=DTYPE, seed=2, outliers=False)
    copies = compare.copies(2 * x.nbytes) if rows >= COLD_FROM else 1
    inputs = [(x.clone(), residual.clone(), weight) for _ in range(copies)]

    def unfused(norm):
        def run(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            z = x + residual
            return norm(z, weight), z

        return run

    providers = [
        Provider(OURS, lambda x, residual, weight: qops.add_rms_norm(x, residual, weight, EPS), inputs),
        Provider("torch + F.rms_norm", unfused(functional_norm), inputs),
        Provider("torch + transformers formula", unfused(transformers_norm), inputs),
    ]
    axes = {"T": rows, "H": hidden, "dtype": "bfloat16", "cache": "cold" if rows >= COLD_FROM else "hot"}
    z = x + residual
    reference = (rms_norm_ref(z, weight, EPS, rounding="fp32"), z.double())
    compare("add_rms_norm", axes, providers, reference, bytes_moved=4 * x.nbytes, flops=5 * x.numel())
