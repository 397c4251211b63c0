"""Random calls of the packing operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.ops.contracts import nibbles, packed
from tests.support.properties.property_calls import Call, Fault
from tests.support.properties.property_draws import INT64, Sampler, Strategy
from tests.support.properties.property_gemm import ROWS, SIZES
from tests.support.properties.property_rows import F32, INT8, Ways, finish


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


CALLS: dict[str, Strategy] = {
    "check_layout": check_layout,
    "int4_pack": lambda s: pack(s, bits=4),
    "int4_unpack": lambda s: unpack(s, bits=4),
    "int8_pack": lambda s: pack(s, bits=8),
    "int8_unpack": lambda s: unpack(s, bits=8),
}
