"""QuACK: RMSNorm in CuTe DSL, compiled at the first call of a shape."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.problems import Result
from bench.problems.rms_norm import Norm
from bench.problems.shared.provider import Provider


def norm(p: Norm) -> Callable[[], Result]:
    from quack.rmsnorm import rmsnorm_fwd

    def call() -> Tensor | tuple[Tensor, Tensor]:
        y, z, _ = rmsnorm_fwd(p.x, p.weight, residual=p.residual, eps=p.eps)
        return y if p.residual is None else (y, z)

    return call


PROVIDERS = [
    Provider("quack", op, ("cuda",), norm, accuracy, ("quack-kernels",))
    for op, accuracy in (("rms_norm", "rounded once"), ("add_rms_norm", "fp32 sum of x and residual"))
]
