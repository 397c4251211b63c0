"""torch's dynamically quantised linear layer: float activations to u8 with one scale for the whole batch, and the GEMM.

Its users hand it floats, so that is what it gets: the exact values of the problem's int8 rows. The time contains the
quantisation, which the problem has already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from bench.problems import Result
from bench.problems.int8_gemm import Int8Gemm
from bench.problems.shared.provider import Provider


def build(engine: str, p: Int8Gemm) -> Callable[[], Result]:
    if engine not in torch.backends.quantized.supported_engines:
        raise RuntimeError(f"this torch has no quantized engine {engine}")
    # The engine is asked for when weights are packed; the packed weights belong to it.
    torch.backends.quantized.engine = engine
    zeros = torch.zeros(p.codes.shape[0], dtype=torch.int64)
    weight = torch._make_per_channel_quantized_tensor(p.codes.clone(), p.w_scale.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    x = p.q.float() * p.scale[:, None]
    return functools.partial(torch.ops.quantized.linear_dynamic, x, packed, False)


PROVIDERS = [
    Provider(
        f"torch linear_dynamic {engine}",
        "int8_gemm",
        ("cpu",),
        functools.partial(build, engine),
        "int8 activations again, one scale for all rows; float32 in and out; quantisation included",
        rebuilt=True,
    )
    for engine in ("onednn", "fbgemm")
]
