"""zentorch (AMD's ZenDNN for torch): weight-only and dynamically quantised linear layers, RMSNorm.

Its prepacked form of the dynamic layer gives garbage at K = 4096 (2.13.0.2), and the plain form is as fast. It has no
rotary embedding and no quantiser of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.layouts import SYMMETRIC_ZERO, codes, unsupported
from bench.problems import Axes, Result
from bench.problems.int4_gemm import Int4Gemm
from bench.problems.int8_gemm import Int8Gemm
from bench.problems.rms_norm import Norm
from bench.problems.shared.provider import Provider

REQUIRES = ("zentorch",)


def int4_gemm(p: Int4Gemm) -> Callable[[], Result]:
    import zentorch  # noqa: F401  (registers the operators)

    # Signed codes around 0 where weights are symmetric, unsigned ones with zero points: the other pairs are misread.
    offset = SYMMETRIC_ZERO if p.zeros is None else 0
    weight = torch.ops.zentorch.zentorch_woq_repack_weight((codes(p).to(torch.int8) - offset).contiguous())
    zeros = None if p.zeros is None else p.zeros.to(torch.int8).T.contiguous()
    return functools.partial(
        torch.ops.zentorch.zentorch_woq_linear, p.x, weight.T, p.scales.T.contiguous(), zeros, None
    )


def int8_gemm(p: Int8Gemm) -> Callable[[], Result]:
    import zentorch  # noqa: F401

    x = (p.q.float() * p.scale[:, None]).to(p.out_dtype)
    return functools.partial(torch.ops.zentorch.zentorch_dynamic_qlinear, x, p.codes.clone(), p.w_scale.clone(), None)


def rms_norm(p: Norm) -> Callable[[], Result]:
    import zentorch  # noqa: F401

    return functools.partial(torch.ops.zentorch.zentorch_rms_norm, p.x, p.weight, p.eps)


def add_rms_norm(p: Norm) -> Callable[[], Result]:
    """In place, as it is called in models: only the first call has the problem's inputs."""
    import zentorch  # noqa: F401

    assert p.residual is not None
    x, residual = p.x.clone(), p.residual.clone()

    def call() -> tuple[Tensor, Tensor]:
        torch.ops.zentorch.zentorch_add_rms_norm_(x, p.weight, residual, p.eps)
        return x, residual

    return call


def _bfloat16_only(device: str, axes: Axes) -> str | None:
    return None if axes["dtype"] == "bfloat16" else "bfloat16 only"


PROVIDERS = [
    Provider(
        "zentorch",
        "int4_gemm",
        ("cpu",),
        int4_gemm,
        "bf16 weights",
        REQUIRES,
        unsupported=unsupported(dtypes=("bfloat16",)),
    ),
    Provider(
        "zentorch",
        "int8_gemm",
        ("cpu",),
        int8_gemm,
        "int8 activations again, per row; quantisation included",
        REQUIRES,
        unsupported=_bfloat16_only,
    ),
    *(
        Provider("zentorch", op, ("cpu",), build, accuracy, REQUIRES, unsupported=_bfloat16_only)
        for op, build, accuracy in (
            ("rms_norm", rms_norm, "fp32 inside"),
            ("add_rms_norm", add_rms_norm, "fp32 inside, in place"),
        )
    ),
]
