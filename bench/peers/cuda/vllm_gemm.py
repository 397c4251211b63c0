"""vLLM's GEMMs from the shared objects of its wheel: Marlin and Machete for weight-only, CUTLASS for int8.

Marlin takes weights as GPTQ stores them ([K / 8, N], eight k of a column in an int32, the first lowest) and repacks
them with an operator of its own. Scales and zero points must come in the order in which a warp's tensor-core fragments
meet their columns, which is made here from that description.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers import libraries
from bench.peers.layouts import int32_words, multiples, unsupported
from bench.problems import Axes, Result
from bench.problems.int4_gemm import Int4Gemm
from bench.problems.int8_gemm import Int8Gemm
from bench.problems.int8_weight_only_gemm import Int8WeightOnlyGemm
from bench.problems.shared.provider import Provider

REQUIRES = ("vllm",)
LIBRARY = "vllm/_C.abi3.so"
STABLE_LIBRARY = "vllm/_C_stable_libtorch.abi3.so"
MARLIN_GROUPS = (32, 64, 128)
MACHETE_GROUPS = (64, 128)


def scalar_type_id(bits: int, bias: int) -> int:
    """vLLM's number for unsigned codes around ``bias``: bit fields exponent, mantissa, sign, bias, finite, NaNs."""
    ieee_nans = 1
    return bits << 8 | bias << 17 | ieee_nans << 50


def marlin_scales(scales: Tensor, single_group: bool) -> Tensor:
    """[N, K/G] to [K/G, N], columns in the order of fragments.

    A thread of a 64-column tile works on the columns of one residue modulo 8. With one group the scale is applied to
    results, of which it holds pairs in each of four 8-column blocks.
    """
    by_group = scales.T.contiguous()
    tiles = by_group.view(-1, 4, 4, 2) if single_group else by_group.view(-1, 8, 8)
    return tiles.transpose(1, 2).reshape(by_group.shape).contiguous()


def marlin_zeros(zeros: Tensor) -> Tensor:
    """uint8 [N, K/G] to int32 [K/G, N / 8]: the order of grouped scales, then even nibbles before odd ones."""
    ordered = marlin_scales(zeros, single_group=False)
    nibbles = ordered.view(ordered.shape[0], -1, 4, 2).transpose(2, 3).flatten(2)
    return int32_words(nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), rows=ordered.shape[0])


def _gptq(p: Int4Gemm | Int8WeightOnlyGemm) -> tuple[Tensor, int, int]:
    """A view [K * bits / 32, N] of the unsigned codes, its bits and the number of its type."""
    if isinstance(p, Int4Gemm):
        words, bits, bias = p.qweight.view(torch.int32), 4, 8 if p.zeros is None else 0
    else:
        words, bits, bias = (p.codes.view(torch.uint8) ^ 128).view(torch.int32), 8, 128
    return words.T, bits, scalar_type_id(bits, bias)


def marlin(p: Int4Gemm | Int8WeightOnlyGemm) -> Callable[[], Result]:
    libraries.load(LIBRARY)
    ops = torch.ops._C
    (m, k), n, device = p.x.shape, p.scales.shape[0], p.x.device
    words, bits, type_id = _gptq(p)
    none = torch.empty(0, dtype=torch.int32, device=device)
    packed = ops.gptq_marlin_repack(words.contiguous(), none, k, n, bits, False)
    scales = marlin_scales(p.scales, single_group=p.group_size == k)
    zeros = marlin_zeros(p.zeros) if isinstance(p, Int4Gemm) and p.zeros is not None else none
    # Locks, one for each block that may run. Marlin leaves them zero.
    blocks = torch.cuda.get_device_properties(device).multi_processor_count
    workspace = torch.zeros(blocks, dtype=torch.int32, device=device)
    # fmt: off
    return functools.partial(
        ops.marlin_gemm,
        p.x, None, packed, None, scales, None, None, zeros, none, none, workspace, type_id, m, n, k,
        True,   # K is whole
        False,  # no atomic additions
        True,   # reduce in float32
        False,  # zero points are integers
    )
    # fmt: on


def machete(p: Int4Gemm | Int8WeightOnlyGemm) -> Callable[[], Result]:
    libraries.load(LIBRARY)
    ops = torch.ops._C
    words, _, type_id = _gptq(p)
    packed = ops.machete_prepack_B(words, p.x.dtype, type_id, p.x.dtype)
    zeros = None
    if isinstance(p, Int4Gemm) and p.zeros is not None:
        zeros = (-p.scales * p.zeros.to(p.scales.dtype)).T.contiguous()
    scales = p.scales.T.contiguous()
    return functools.partial(ops.machete_mm, p.x, packed, type_id, None, scales, zeros, p.group_size, None, None, None)


def int8_gemm(p: Int8Gemm) -> Callable[[], Result]:
    libraries.load(STABLE_LIBRARY)
    y = torch.empty(p.q.shape[0], p.codes.shape[0], dtype=p.out_dtype, device=p.q.device)
    scale, w_scale, columns = p.scale[:, None], p.w_scale[:, None].clone(), p.codes.clone().T

    def call() -> Tensor:
        torch.ops._C.cutlass_scaled_mm(y, p.q, columns, scale, w_scale, None)
        return y

    return call


def _marlin_shapes(n: int, k: int) -> str | None:
    fits = (n % 64 == 0 and k % 128 == 0) or (n % 128 == 0 and k % 64 == 0)
    return None if fits else "multiples of 64 and 128 only"


def _int8_unsupported(device: str, axes: Axes) -> str | None:
    return multiples(16, 16)(int(axes["N"]), int(axes["K"]))


PROVIDERS = [
    *(
        Provider(
            "vllm marlin",
            op,
            ("cuda",),
            marlin,
            "16-bit weights, fp32 sums",
            REQUIRES,
            unsupported=unsupported(groups=MARLIN_GROUPS, multiple_of=_marlin_shapes),
        )
        for op in ("int4_gemm", "int8_weight_only_gemm")
    ),
    *(
        Provider(
            "vllm machete",
            op,
            ("cuda",),
            machete,
            "16-bit weights, fp32 sums",
            REQUIRES,
            unsupported=unsupported(groups=MACHETE_GROUPS, multiple_of=multiples(128, 64)),
        )
        for op in ("int4_gemm", "int8_weight_only_gemm")
    ),
    Provider("vllm cutlass", "int8_gemm", ("cuda",), int8_gemm, "exact sums", REQUIRES, unsupported=_int8_unsupported),
]
