"""What torch itself has for weights of 4 and 8 bits: ``_weight_int4pack_mm`` ("tinygemm") and ``_weight_int8pack_mm``.

On the CPU, float32 activations fall to code without vectors (seconds for what takes milliseconds), and the int8 kernel
has none for float16: benchmarks ask for bfloat16 and float16 alone, and the latter is refused where it crawls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from bench.peers.layouts import added_to_centred, codes, unsupported
from bench.problems import Axes, Result
from bench.problems.int4_gemm import Int4Gemm
from bench.problems.int8_weight_only_gemm import Int8WeightOnlyGemm
from bench.problems.shared.provider import Provider

INNER_K_TILES = 8
GROUPS = (32, 64, 128, 256)


def int4_gemm(p: Int4Gemm) -> Callable[[], Result]:
    scales_and_zeros = torch.stack((p.scales, added_to_centred(p).to(p.x.dtype)), dim=-1).transpose(0, 1).contiguous()
    if p.x.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes(p).int(), 1)
        gemm = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        # Here even k is in the high nibble.
        swapped = (p.qweight << 4) | (p.qweight >> 4)
        packed = torch.ops.aten._convert_weight_to_int4pack(swapped, INNER_K_TILES)
        gemm = torch.ops.aten._weight_int4pack_mm
    return functools.partial(gemm, p.x, packed, p.group_size, scales_and_zeros)


def int8_weight_only_gemm(p: Int8WeightOnlyGemm) -> Callable[[], Result]:
    return functools.partial(torch.ops.aten._weight_int8pack_mm, p.x, p.codes.clone(), p.scales.flatten())


def _int4_unsupported(device: str, axes: Axes) -> str | None:
    n, k, group = int(axes["N"]), int(axes["K"]), int(axes["G"])
    if group not in GROUPS:
        return f"group sizes {', '.join(map(str, GROUPS))} only"
    if axes["dtype"] != "bfloat16":
        return "bfloat16 activations only" if device == "cuda" else "float16 has no vector kernel"
    if device == "cpu":
        return None if n % 16 == 0 else "N % 16 = 0 only"
    fits = n % 8 == 0 and k % (16 * INNER_K_TILES) == 0
    return None if fits else f"N % 8 = 0 and K % {16 * INNER_K_TILES} = 0 only"


def _int8_unsupported(device: str, axes: Axes) -> str | None:
    if axes["G"] != axes["K"]:
        return "scales per channel only"
    return unsupported(dtypes=("bfloat16",))(device, axes)


PROVIDERS = [
    Provider(
        "torch int4pack",
        "int4_gemm",
        ("cpu", "cuda"),
        int4_gemm,
        "exact weights, bf16 zeros, fp32 sums",
        unsupported=_int4_unsupported,
    ),
    Provider(
        "torch int8pack",
        "int8_weight_only_gemm",
        ("cpu",),
        int8_weight_only_gemm,
        "exact weights, fp32 sums",
        unsupported=_int8_unsupported,
    ),
]
