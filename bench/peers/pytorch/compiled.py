"""torch.compile of the eager formulas, and of the scales around torch._int_mm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.peers.providers import Provider
from bench.peers.pytorch.eager import DENSE_LAYER, FORMULAS, LIBRARIES, Formula
from bench.peers.pytorch.vendor import int_mm_limits, scaled_int_mm
from bench.problems import Int8Gemm, Problem, Result

NAME = "torch.compile"


@functools.lru_cache(maxsize=1)
def _compiled(function: Callable[..., Result], shapes: tuple[Any, ...]) -> Callable[..., Result]:
    """For these shapes alone. One at a time: past eight shapes dynamo would give up on a function, silently."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def _call(function: Callable[..., Result], arguments: tuple[Any, ...]) -> Callable[[], Result]:
    leaves, _ = torch.utils._pytree.tree_flatten(arguments)
    key = tuple((t.shape, t.stride(), t.dtype) if isinstance(t, torch.Tensor) else t for t in leaves)
    return functools.partial(_compiled(function, key), *arguments)


def _build(formula: Formula, problem: Problem) -> Callable[[], Result]:
    return _call(formula.function(problem), formula.arguments(problem))


def _int_mm(p: Int8Gemm) -> Callable[[], Result]:
    return _call(scaled_int_mm, (p.q, p.scale, p.codes.clone(), p.w_scale, p.out_dtype))


PROVIDERS = [
    *(
        Provider(NAME, f.op, ("cpu", "cuda"), functools.partial(_build, f), f"{f.accuracy}, or less often")
        for f in FORMULAS
    ),
    *(
        Provider(
            f"{NAME}, {library} {DENSE_LAYER.name}",
            DENSE_LAYER.op,
            (device,),
            functools.partial(_build, DENSE_LAYER),
            DENSE_LAYER.accuracy,
            weight_bits=16,
        )
        for device, library in LIBRARIES.items()
    ),
    Provider(f"{NAME} _int_mm", "int8_gemm", ("cuda",), _int_mm, "exact sums", unsupported=int_mm_limits),
]
