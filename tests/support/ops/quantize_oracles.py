"""Per-token int8 as compressed-tensors and torchao compute it, and a table of what they gave.

``python -m tests.support.ops.quantize_oracles`` writes the table anew; it needs both packages.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from qops.testing import FLOAT_DTYPES, generator

TABLE = Path(__file__).resolve().parents[2] / "data" / "quantize_int8_rules.json"
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
NAN, INF = float("nan"), float("inf")


def compressed_tensors(x: Tensor) -> tuple[Tensor, Tensor]:
    """q and scale of rows [T, K] by compressed-tensors, scale widened from the dtype of x."""
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.quant_args import QuantizationArgs
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

    args = QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True, symmetric=True)
    x = x[None]  # the strategy "token" keeps two dimensions, so two dimensions would give one scale for all tokens
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    q = quantize(x, scale, zero_point, args, dtype=torch.int8)
    return q[0], scale[0, :, 0].float()


def compressed_tensors_asym(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, scale and zero point of rows [T, K] by compressed-tensors, scale widened from the dtype of x."""
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.quant_args import QuantizationArgs
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

    args = QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True, symmetric=False)
    x = x[None]  # as above
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    q = quantize(x, scale, zero_point, args, dtype=torch.int8)
    return q[0], scale[0, :, 0].float(), zero_point[0, :, 0].to(torch.int32)


def compressed_tensors_static(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """q by compressed-tensors, whose scale has the dtype of x and whose zero point is an int8."""
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.quant_args import QuantizationArgs

    args = QuantizationArgs(num_bits=8, type="int", strategy="tensor", symmetric=zero_point is None)
    zero = None if zero_point is None else zero_point.to(torch.int8)
    return quantize(x, scale.to(x.dtype), zero, args, dtype=torch.int8)


def _torchao(x: Tensor, mapping: str) -> tuple[Tensor, Tensor, Tensor]:
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    t = Int8Tensor.from_hp(x, PerRow(), mapping_type=MappingType[mapping])
    return t.qdata, t.scale[:, 0], t.zero_point[:, 0].to(torch.int32)


def torchao(x: Tensor) -> tuple[Tensor, Tensor]:
    """q and scale of rows [T, K] by torchao."""
    return _torchao(x, "SYMMETRIC")[:2]


def torchao_asym(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, scale and zero point of rows [T, K] by torchao."""
    return _torchao(x, "ASYMMETRIC")


def near_ties(rows: int, k: int, dtype: torch.dtype, seed: int, steps: float = 127.5) -> Tensor:
    """Rows of values next to (n + 1/2) * scale, scale = max|x| / steps, where another order of operations shows."""
    rng = generator(seed)
    a = torch.rand(rows, 1, generator=rng).double() + 0.5
    n = torch.randint(-127, 127, (rows, k), generator=rng)
    x = (n + 0.5) * a / steps
    x[:, :1] = a
    return x.to(dtype)


def special_rows(dtype: torch.dtype) -> Tensor:
    """One row per corner: zeros, subnormals, the scale's lower limits, the largest values, NaN and infinities."""
    info = torch.finfo(dtype)
    tiny, most = info.smallest_normal * info.eps, info.max  # the smallest subnormal and the largest value
    limits = [127.5 * 2.0**-n for n in (7, 10, 23, 24, 25)]
    rows = [[0.0, -0.0, 0.0, 0.0], [tiny, 0.0, -tiny, 3 * tiny], [most, -most, 1.0, most / 2]]
    rows += [[NAN, 1.0, -2.0, 0.0], [INF, 1.0, -2.0, NAN], [1.0, -INF, INF, 2.0], [1.0, -1.0, 0.5, 1e-3]]
    rows += [[limit, -limit / 3, limit / 127.5, 0.49 * limit] for limit in limits]
    rows += [[n * tiny, -tiny, (n // 2) * tiny, 5 * tiny] for n in (63, 64, 127, 191, 192, 320, 400)]
    return torch.tensor(rows, dtype=torch.float64).to(dtype)


# Pairs (scale, x) of 16-bit types for which x / scale is a tie and x * (1 / scale) is not: all but a few per dtype.
RECIPROCAL_TIES = {
    torch.float32: (),
    torch.bfloat16: ((244, 366), (240, 600), (208, 1352), (224, 2800)),
    torch.float16: ((1700, 2550), (1272, 4452), (1312, 17712), (1664, 44096)),
}


def inputs(dtype: torch.dtype) -> Tensor:
    """The rows of the table [T, 8]."""
    rows = [special_rows(dtype).repeat(1, 2), near_ties(16, 8, dtype, seed=2)]
    random = torch.randn(16, 8, generator=generator(1)) * torch.logspace(-8, 4, 16)[:, None]
    ties = [[127.5 * scale, x, -x, x / 2, scale, 0, -scale, 1] for scale, x in RECIPROCAL_TIES[dtype]]
    return torch.cat((*rows, random.to(dtype), (torch.tensor(ties).view(-1, 8) / 4096).to(dtype)))


# Of the static results in the table; every dtype holds the scale, and its multiples by halves of small odd numbers.
STATIC_SCALE, STATIC_ZERO_POINT = torch.tensor([5 / 128]), torch.tensor([-7], dtype=torch.int32)


def static_inputs(dtype: torch.dtype) -> Tensor:
    """Ties, which an odd zero point moves, and values from one end of the range to the other."""
    ties = (torch.arange(-16, 16) + 0.5) * STATIC_SCALE
    return torch.cat((ties.double(), torch.arange(-32, 32).double() ** 3 / 6301)).to(dtype)


def to_bits(t: Tensor) -> list[int] | list[list[int]]:
    return t.view(BITS[t.dtype]).tolist() if t.is_floating_point() else t.tolist()


def from_bits(bits: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
    return torch.tensor(bits, dtype=BITS[dtype]).view(dtype)


def table() -> dict[str, object]:
    cases: list[dict[str, object]] = []
    for dtype in FLOAT_DTYPES:
        x = inputs(dtype)
        case: dict[str, object] = {"dtype": str(dtype).removeprefix("torch."), "x": to_bits(x)}
        for rule, oracle in (("compressed-tensors", compressed_tensors), ("torchao", torchao)):
            q, scale = oracle(x)
            case[rule] = {"q": to_bits(q), "scale": to_bits(scale)}
        rows = x[x.isfinite().all(-1)][::3]
        parts = dict(zip(("q", "scale", "zero_point"), map(to_bits, compressed_tensors_asym(rows)), strict=True))
        case["compressed-tensors asym"] = {"x": to_bits(rows), **parts}
        codes = compressed_tensors_static(static_inputs(dtype), STATIC_SCALE, STATIC_ZERO_POINT)
        case["compressed-tensors static"] = to_bits(codes)
        cases.append(case)
    x = torch.cat((near_ties(16, 8, torch.float32, seed=3, steps=255), inputs(torch.float32)[-8:].abs()))
    q, scale, zero_point = torchao_asym(x)
    asym = {"x": to_bits(x), "q": to_bits(q), "scale": to_bits(scale), "zero_point": to_bits(zero_point)}
    versions = {name: version(name) for name in ("torch", "compressed-tensors", "torchao")}
    return {
        "what": "rows x [T, 8] and their per-token int8 by two packages on the CPU; floats as integers of their bits",
        "made_by": "python -m tests.support.ops.quantize_oracles",
        "versions": {**versions, "machine": platform.machine()},
        "cases": cases,
        "torchao_asym": asym,
    }


if __name__ == "__main__":
    lines = json.dumps(table(), separators=(",", ":"))
    TABLE.write_text(lines.replace('{"dtype"', '\n{"dtype"').replace(',"torchao', ',\n"torchao') + "\n")
