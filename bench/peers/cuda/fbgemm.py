"""FBGEMM GenAI's mixed-input GEMM (CUTLASS, sm_90a): bfloat16 by preshuffled int4."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from bench.peers import libraries
from bench.peers.layouts import added_to_centred, multiples, unsupported
from bench.problems import Result
from bench.problems.int4_gemm import Int4Gemm
from bench.problems.shared.provider import Provider

LIBRARY = "fbgemm_gpu/experimental/gen_ai/fbgemm_gpu_experimental_gen_ai.so"
GROUPS = (64, 128)


def int4_gemm(p: Int4Gemm) -> Callable[[], Result]:
    libraries.load(LIBRARY)
    # Two's complement nibbles, even k low: the sign bit of code - 8 is the inverted top bit of the code.
    signed = (p.qweight ^ 0x88).view(torch.int8)
    packed, scales = torch.ops.fbgemm.preshuffle_i4(signed, p.scales.T.contiguous())
    zeros = added_to_centred(p).to(p.x.dtype).T.contiguous()
    return functools.partial(torch.ops.fbgemm.bf16i4bf16_shuffled, p.x, packed, scales, zeros)


PROVIDERS = [
    Provider(
        "fbgemm",
        "int4_gemm",
        ("cuda",),
        int4_gemm,
        "bf16 weights, bf16 zeros, fp32 sums",
        ("fbgemm-gpu-genai",),
        unsupported=unsupported(
            kinds=("symmetric", "zero_point", "offset"),
            dtypes=("bfloat16",),
            groups=GROUPS,
            multiple_of=multiples(16, 64),
        ),
    )
]
