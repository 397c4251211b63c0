"""Random calls of the operators on weights: packing, and dequantising."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import qops
from qops.ops.int4_gemm import KINDS
from qops.testing import FLOAT_DTYPES, generator
from tests.support.ops.contracts import int4_dequantize_exact, mix_gate_up, nibbles, packed
from tests.support.properties.property_calls import Call, Fault
from tests.support.properties.property_draws import INT64, Sampler
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
from tests.support.properties.property_rows import F32, INT8, Ways, finish

# --- int4_dequantize -------------------------------------------------------------------------------------------------


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
        zeros = torch.randn((n, groups), generator=rng) * 4
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
    dtypes = {"packed": (torch.uint8,), "scales": FLOAT_DTYPES, "zeros": (torch.uint8,) if a["kind"] == 1 else (F32,)}

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


# --- packing ---------------------------------------------------------------------------------------------------------


def pack(s: Sampler, *, bits: int) -> Call:
    n, k = s.choice(ROWS), s.choice(SIZES)
    dtype = torch.uint8 if bits == 4 else INT8
    if s.one_in(12):  # sizes that only nothing has
        n, k = s.choice(((2**40, 0), (0, 2**40), (2**62, 0)))
        shape = (n, k)
        qweight, result = torch.empty(shape, dtype=dtype), (n // 16, 16 * k)
    else:
        qweight = s.contiguous(s.values((n, k * bits // 8), dtype))
        result = (-(-n // 16), 2 * bits * k)

    def expected(a: dict[str, Any]) -> tuple[Tensor, ...]:
        q = a["qweight"]
        if q.numel() == 0:
            return (torch.empty(result, dtype=dtype),)
        return (packed(nibbles(q) if bits == 4 else q, bits),)

    call = Call(f"int{bits}_pack", "default", {"qweight": qweight}, expected, [(result, dtype)])

    def sized() -> Fault:
        shape = s.choice(((12, 32), (8, 3), (8, 33), (8,), (8, 32, 1), (), (0, 2**58), (0, 2**62), (4, 0)))
        call.arguments["qweight"] = torch.empty(shape, dtype=dtype)
        return Fault(("qweight",), (ValueError,))

    def ways() -> Ways:
        return [
            *s.tensor_faults(call, {"qweight": (dtype,)}),
            *s.not_contiguous(call, "qweight"),
            *[("qweight", sized)] * 3,
        ]

    return finish(s, call, ways)


def unpack(s: Sampler, *, bits: int) -> Call:
    n, k = s.choice(ROWS), s.choice(SIZES)
    dtype = torch.uint8 if bits == 4 else INT8
    result = (n, k * bits // 8)
    if s.one_in(12):
        n, k = s.choice(((2**40, 0), (2**63 - 8, 0), (0, 2**40)))
        result = (n, k // (2 if bits == 4 else 1))
        strips_packed = torch.empty((n // 16 + (n % 16 > 0), 2 * bits * k), dtype=dtype)
    else:
        strips_packed = s.contiguous(s.values((-(-n // 16), 2 * bits * k), dtype))

    def expected(a: dict[str, Any]) -> tuple[Tensor, ...]:
        p = a["packed"]
        if p.numel() == 0:
            return (torch.empty(result, dtype=dtype),)
        per = 8 if bits == 4 else 4
        lanes = p.view(-1, k // per, 16, 4)
        if bits == 4:
            lanes = torch.cat((lanes & 15, lanes >> 4), dim=-1)
        codes = lanes.transpose(1, 2).reshape(-1, k)[:n]
        return (codes[:, 0::2] | codes[:, 1::2] << 4 if bits == 4 else codes,)

    arguments = {"packed": strips_packed, "out_features": n}
    call = Call(f"int{bits}_unpack", "default", arguments, expected, [(result, dtype)])

    def features() -> Fault:
        here = call.arguments["packed"].shape[0]
        options = [
            v
            for v in (*INT64, min(n + 16, 2**63 - 1), n + 4, -8)
            if not (v % 8 == 0 and v >= 0 and -(-v // 16) == here)
        ]
        call.arguments["out_features"] = s.choice(options)
        return Fault(("out_features", "packed"), (ValueError,))

    def sized() -> Fault:
        strip = 16 * 8 * bits // 8
        shape = (call.arguments["packed"].shape[0], strip + s.choice((1, strip // 2, 16)))
        call.arguments["packed"] = torch.empty(shape[1:] if s.one_in(3) or shape[0] > 100 else shape, dtype=dtype)
        return Fault(("packed",), (ValueError,))

    def ways() -> Ways:
        bad = (2**63, -(2**63) - 1, 8.5)
        return [
            *s.tensor_faults(call, {"packed": (dtype,)}),
            *s.not_contiguous(call, "packed"),
            *[("packed", sized), ("out_features packed", features)] * 2,
            *s.scalar(call, "out_features", bad, (RuntimeError, TypeError)),
        ]

    return finish(s, call, ways)


def check_layout(s: Sampler) -> Call:
    """The layout is the device's, and nothing else is looked at."""
    dtype = s.choice((torch.uint8, INT8, F32))
    arguments = {"packed": s.values((s.choice(ROWS), s.choice(SIZES)), dtype), "layout": "cpu 1"}
    call = Call("check_layout", "default", arguments, lambda a: (), [])
    bad = ("", "cpu", "cpu 0", "cpu 2", "cpu 11", "cuda 1", "CPU 1")
    return finish(s, call, lambda: s.scalar(call, "layout", bad))


WEIGHT_OPS: dict[str, Callable[[Sampler], Call]] = {
    "check_layout": check_layout,
    "int4_dequantize": int4_dequantize,
    "int4_pack": lambda s: pack(s, bits=4),
    "int4_unpack": lambda s: unpack(s, bits=4),
    "int8_pack": lambda s: pack(s, bits=8),
    "int8_unpack": lambda s: unpack(s, bits=8),
}
