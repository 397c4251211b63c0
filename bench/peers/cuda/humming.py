"""Humming: W4A16 and W8A16 kernels compiled at run time (NVRTC) for each N, K and tile.

The first call of a shape compiles for seconds; the result is cached on disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.peers.layouts import int32_words, unsupported
from bench.problems import Result
from bench.problems.int4_gemm import Int4Gemm
from bench.problems.int8_weight_only_gemm import Int8WeightOnlyGemm
from bench.problems.shared.provider import Provider


def _packed_zeros(zeros: Tensor) -> Tensor:
    """uint8 [N, K/G] to int32 [N / 8, K/G], eight rows in a word, the first lowest."""
    by_group = zeros.T
    return int32_words(by_group[:, 0::2] | (by_group[:, 1::2] << 4), rows=len(by_group)).T.contiguous()


def build(p: Int4Gemm | Int8WeightOnlyGemm) -> Callable[[], Result]:
    from humming.layer import HummingLayer

    k, n = p.x.shape[1], p.scales.shape[0]
    config: dict[str, Any] = {
        "dtype": "uint4" if isinstance(p, Int4Gemm) else "uint8",
        "group_size": 0 if p.group_size == k else p.group_size,
        "scale_dtype": str(p.x.dtype).removeprefix("torch."),
    }
    if isinstance(p, Int4Gemm):
        tensors = {"weight": p.qweight.view(torch.int32)}
        if p.zeros is not None:
            config["has_zero_point"] = True
            tensors["zero_point"] = _packed_zeros(p.zeros)
    else:
        tensors = {"weight": (p.codes.view(torch.uint8) ^ 128).view(torch.int32)}
    tensors["weight_scale"] = p.scales
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=p.x.dtype).to(p.x.device)
    layer.load_from_tensors(tensors)
    layer.transform()
    return functools.partial(layer, p.x)


PROVIDERS = [
    Provider(
        "humming",
        op,
        ("cuda",),
        build,
        "16-bit weights, fp32 sums",
        ("humming-kernels",),
        unsupported=unsupported(),
    )
    for op in ("int4_gemm", "int8_weight_only_gemm")
]
