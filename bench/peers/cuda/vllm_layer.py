"""A W8A8 layer of vLLM's operators: its CUTLASS product between its norms, quantisers, rotary embedding and SiLU.

Everything is written to tensors that are allocated once. The residual is added to in place, so the problem's inputs are
those of the first call alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.cuda.vllm_gemm import REQUIRES
from bench.peers.cuda.vllm_rows import new_int8_rows, ops
from bench.problems import Axes, Result
from bench.problems.models.int8_layer import Int8Layer
from bench.problems.shared.operator import EPS
from bench.problems.shared.provider import Provider


def int8_layer(p: Int8Layer, fused: bool) -> Callable[[], Result]:
    """``fused``: norms emit int8; else, as in its models, a quantiser of its own follows each."""
    op, t = ops(), p.rows
    weights = {name: (codes.clone().T, scale[:, None].clone()) for name, (codes, scale) in p.weights().items()}
    outputs = {
        name: torch.empty(t, scale.shape[0], dtype=p.x.dtype, device=p.device) for name, (_, scale) in weights.items()
    }
    rows = {name: new_int8_rows(p.x, columns.shape[0]) for name, (columns, _) in weights.items()}
    x, residual, activated = p.x.clone(), p.residual.clone(), p.x.new_empty(t, p.down.shape[1])
    positions, cache = torch.arange(t, device=p.device), torch.cat((p.cos, p.sin), dim=-1)
    head = p.cos.shape[1] * 2
    q, k, v = outputs["qkv"].split([heads * head for heads in p.heads], dim=1)

    def quantize(name: str, values: Tensor) -> None:
        into, scale = rows[name]
        op.dynamic_scaled_int8_quant(into, values, scale, None)

    def norm(name: str, values: Tensor, weight: Tensor) -> None:
        if fused:
            into, scale = rows[name]
            op.rms_norm_dynamic_per_token_quant(into, values, weight, scale, EPS, None, residual)
            return
        op.fused_add_rms_norm(values, residual, weight, EPS)
        quantize(name, values)

    def linear(name: str) -> None:
        (into, scale), (columns, w_scale) = rows[name], weights[name]
        op.cutlass_scaled_mm(outputs[name], into, columns, scale, w_scale, None)

    def call() -> tuple[Tensor, ...]:
        norm("qkv", x, p.first_norm)
        linear("qkv")
        op.rotary_embedding(positions, q, k, head, cache, True)
        quantize("o", p.attention)
        linear("o")
        norm("gate_up", outputs["o"], p.second_norm)
        linear("gate_up")
        op.silu_and_mul(activated, outputs["gate_up"])
        quantize("down", activated)
        linear("down")
        return *(part.unflatten(1, (-1, head)) for part in (q, k, v)), residual, outputs["down"]

    return call


def _unsupported(device: str, axes: Axes) -> str | None:
    sizes = [int(axes[name]) for name in ("H", "I")]
    return None if all(size % 16 == 0 for size in sizes) else "multiples of 16 only"


PROVIDERS = [
    Provider(
        name,
        "int8_layer",
        ("cuda",),
        functools.partial(int8_layer, fused=fused),
        f"exact sums, {rounding}, in place",
        REQUIRES,
        unsupported=_unsupported,
    )
    for name, fused, rounding in (
        ("vllm", False, "rounded as Transformers"),
        ("vllm fused", True, "fp32 sum of x and residual"),
    )
]
