"""Random calls of int4_dequantize."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import qops
from qops.ops.int4_gemm import KINDS
from qops.testing import FLOAT_DTYPES, generator
from tests.support.ops.contracts import int4_dequantize_exact, mix_gate_up, packed
from tests.support.properties.property_calls import Call, Fault
from tests.support.properties.property_draws import INT64, Sampler, Strategy
from tests.support.properties.property_gemm import (
    ROWS,
    SIZES,
    give_weight,
    scales_of,
    size_ways,
    strips,
    untyped,
    weight_ways,
)
from tests.support.properties.property_rows import INT8, Ways, finish


def int4_dequantize(s: Sampler) -> Call:
    mixed_gate_up = s.one_in(3)
    n, k, dtype = s.choice((16, 48, 0, 80) if mixed_gate_up else ROWS), s.choice(SIZES), s.dtype()
    groups = s.choice([1, *(k // g for g in range(16, k, 16) if k % g == 0)]) if k > 0 else 0
    kind, exact = s.choice(KINDS), not s.one_in(6)
    rng = generator(s.integer(0, 2**20))
    codes = torch.randint(16, (n, k), generator=rng).to(torch.uint8)
    scales, zeros = scales_of(s, (n, groups), s.dtype(), exact=exact), None
    if kind == "zero_point":
        zeros = torch.randint(17 if exact else 256, (n, groups), generator=rng).to(torch.uint8)
    elif kind != "symmetric":
        zeros = (torch.randn((n, groups), generator=rng) * 4).to(s.dtype())
    mixed = mix_gate_up if mixed_gate_up else lambda rows: rows
    arguments: dict[str, Any] = {
        "packed": s.contiguous(packed(mixed(codes), 4)),
        "scales": strips(mixed(scales)),
        "zeros": None if zeros is None else strips(mixed(zeros)),
        "out_features": n,
        "group_size": k // groups if groups else 0,
        "kind": KINDS.index(kind),
        "dtype": dtype,
        "mixed_gate_up": mixed_gate_up,
    }

    def expected(a: dict[str, Any]) -> tuple[Tensor, ...]:
        return (int4_dequantize_exact(codes, scales, zeros, kind, a["dtype"]),)

    call = Call("int4_dequantize", "default", arguments, expected, [((n, k), dtype)])
    if exact and n > 0 and k > 0:
        qweight = codes[:, 0::2] | codes[:, 1::2] << 4
        weight = qops.Int4Weight.from_canonical(qweight, scales, kind=kind, zeros=zeros)
        if mixed_gate_up:
            weight.mix_gate_up()
        give_weight(call, lambda a, weight: qops.int4_dequantize(weight, a["dtype"]), weight)
    return finish(s, call, lambda: int4_dequantize_ways(s, call, k))


def int4_dequantize_ways(s: Sampler, call: Call, k: int) -> Ways:
    a = call.arguments
    inner = [name for name in ("packed", "scales", "zeros") if a[name] is not None]
    zeros = (torch.uint8,) if a["kind"] == 1 else FLOAT_DTYPES
    dtypes = {"packed": (torch.uint8,), "scales": (*FLOAT_DTYPES, torch.int8), "zeros": zeros}

    def zeros_or_none() -> Fault:
        a["zeros"] = torch.zeros(a["scales"].shape, dtype=torch.uint8) if a["zeros"] is None else None
        return Fault(("zeros",), (ValueError,))

    ways = [
        *s.tensor_faults(call, dtypes, (), ["zeros"]),
        *s.not_contiguous(call, *inner),
        *s.shapes(call, inner, ["scales"]),
        *size_ways(s, call, k, grouped=True),
        ("zeros scales", zeros_or_none),
        *s.scalar(call, "kind", (-1, 4, *INT64[3:])),
        *s.scalar(call, "dtype", (torch.float64, INT8, torch.int64, torch.bool, torch.float8_e5m2), (RuntimeError,))[
            :2
        ],
    ]
    return [*untyped(call, ways, *inner, "kind", "zeros", "out_features", "group_size"), *weight_ways(s, call)]


CALLS: dict[str, Strategy] = {"int4_dequantize": int4_dequantize}
