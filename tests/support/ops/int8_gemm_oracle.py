"""What int8_gemm's docstring promises, bit for bit, and inputs for it."""

from __future__ import annotations

import numpy as np
import torch

import qops
from qops.testing import generator
from tests.support.ops.weight_only_oracle import fma


def codes(*shape: int, seed: int) -> torch.Tensor:
    """Random int8 over the whole range; the first two rows hold its ends."""
    q = torch.randint(-128, 128, shape, generator=generator(seed), dtype=torch.int8)
    if len(shape) == 2 and shape[0] > 2:
        q[0], q[1] = -128, 127
    return q


def make_weight(n, k, seed, scale_dtype=torch.float32) -> qops.Int8Weight:
    scales = torch.randn(n, min(k, 1), generator=generator(seed)) * 1e-2
    return qops.Int8Weight.from_canonical(codes(n, k, seed=seed), scales.to(scale_dtype))


def activations(m, k, seed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, scale, zero_point."""
    rng = generator(seed + 100)
    scale = torch.rand(m, generator=rng) * 0.1
    return codes(m, k, seed=seed + 1), scale, torch.randint(-128, 128, (m,), generator=rng, dtype=torch.int32)


def by_contract(q, scale, w: qops.Int8Weight, bias=None, *, zero_point=None, out_dtype=torch.bfloat16):
    """What the docstring promises, bit for bit: exact integers (float64 holds them), float32 steps in numpy."""
    canonical = w.canonical()
    x = q.double() if zero_point is None else q.double() - zero_point.double().reshape(-1, 1)
    exact = (x @ canonical["qweight"].double().T).long().numpy()
    acc = exact.astype(np.uint32).view(np.int32)  # modulo 2^32
    if out_dtype == torch.int32:
        return torch.from_numpy(acc)
    s = scale.reshape(-1, 1).numpy()
    with np.errstate(all="ignore"):
        t = acc.astype(np.float32) * canonical["scales"].float().reshape(-1).numpy()
        y = s * t if bias is None else fma(s, t, bias.float().numpy())
    return torch.from_numpy(y).to(out_dtype)
