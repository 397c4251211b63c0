"""GemLite: Triton kernels for M = 1, small M and large M, tuned at the first call of a shape (minutes)."""

from __future__ import annotations

import functools
from collections.abc import Callable

from bench.peers.layouts import SYMMETRIC_ZERO, codes, multiples, unsupported
from bench.problems import Result
from bench.problems.int4_gemm import Int4Gemm
from bench.problems.shared.provider import Provider


def int4_gemm(p: Int4Gemm) -> Callable[[], Result]:
    from gemlite import DType, GemLiteLinear

    k, n = p.x.shape[1], p.scales.shape[0]
    dtype = {"torch.bfloat16": DType.BF16, "torch.float16": DType.FP16}[str(p.x.dtype)]
    layer = GemLiteLinear(
        4, group_size=p.group_size, in_features=k, out_features=n, input_dtype=dtype, output_dtype=dtype
    )
    zeros = SYMMETRIC_ZERO if p.zeros is None else p.zeros.to(p.x.dtype)
    layer.pack(codes(p), p.scales.clone(), zeros, None)
    return functools.partial(layer, p.x)


PROVIDERS = [
    Provider(
        "gemlite",
        "int4_gemm",
        ("cuda",),
        int4_gemm,
        "16-bit weights and scaled zeros, atomic fp32 sums",
        ("gemlite",),
        unsupported=unsupported(per_channel=False, multiple_of=multiples(32, 32)),
    )
]
