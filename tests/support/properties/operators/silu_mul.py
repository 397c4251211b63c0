"""Random calls of silu_mul."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import qops
from qops.ops.quantize_int8 import quantize_int8_ref
from qops.testing import FLOAT_DTYPES
from tests.support.ops.contracts import silu_mul_exact
from tests.support.properties.property_calls import Call, Fault, Result
from tests.support.properties.property_draws import Sampler, Strategy
from tests.support.properties.property_rows import (
    BAD_ROUNDINGS,
    BAD_RULES,
    F32,
    INT8,
    ROUNDINGS,
    RULES,
    Ways,
    finish,
    give_outputs,
    int8_rows,
    out_of,
    output_ways,
    zero_dim,
)


def silu_mul(s: Sampler, *, int8: bool = False) -> Call:
    leading, columns, dtype, apart = s.rows_of_any_number(), s.columns(), s.dtype(), s.one_in(2)
    names = ["gate", "up"] if apart else ["gate_up"]
    last = columns if apart else 2 * columns
    arguments: dict[str, Any] = {name: s.rows(s.values((*leading, last), dtype)) for name in names}
    arguments["rounding"] = s.choice(ROUNDINGS)
    if int8:
        arguments["rule"] = s.choice(RULES)

    def results(leading: tuple[int, ...]) -> list[Result]:
        return int8_rows(leading, columns) if int8 else [((*leading, columns), dtype)]

    def expected(a: dict[str, Any]) -> tuple[Tensor, ...]:
        gate, up = (a["gate"], a["up"]) if apart else (a["gate_up"][..., :columns], a["gate_up"][..., columns:])
        y = silu_mul_exact(gate, up, a["rounding"])
        return quantize_int8_ref(y, a["rule"]) if int8 else (y,)

    def typed(a: dict[str, Any]) -> object:
        style = {name: a[name] for name in ("rounding", *(["rule"] if int8 else []))}
        if call.written:
            style["out"] = out_of(call, a)
        return (qops.silu_mul_int8 if int8 else qops.silu_mul)(*[a[name] for name in names], **style)

    op = "silu_mul_int8" if int8 else "silu_mul"
    call = Call(op, "apart" if apart else "default", arguments, expected, results(leading), typed=typed)
    if s.one_in(2):
        call.overload = "apart_out" if apart else "out"
        replaces = [("out", name) for name in names] if apart and not int8 else []
        give_outputs(s, call, *(["q", "scale"] if int8 else ["out"]), replaces=replaces)

    def odd() -> Fault:
        call.arguments["gate_up"] = torch.ones((*leading, last + 1), dtype=dtype)
        return Fault(("gate_up",), (ValueError,))

    def other_float() -> Fault:
        other = s.choice([other for other in FLOAT_DTYPES if other != dtype])
        call.arguments["up"] = call.arguments["up"].detach().to(other)
        return Fault(("up",), (RuntimeError,))

    def ways() -> Ways:
        dtypes = {name: FLOAT_DTYPES for name in (*names, "out")} | {"q": (INT8,), "scale": (F32,)}
        return [
            *s.tensor_faults(call, dtypes, [*names, "out"]),
            *s.last_dim(call, *names),
            *zero_dim(s, call, names[0]),
            *(s.shapes(call, ["up"], ["gate"]) if apart else [("gate_up", odd)]),
            *([("up", other_float)] if apart else []),
            *s.scalar(call, "rounding", BAD_ROUNDINGS),
            *(s.scalar(call, "rule", BAD_RULES) if int8 else []),
            *output_ways(s, call, names),
            *s.requires_grad(call, *names),
        ]

    return finish(s, call, ways, names, results)


CALLS: dict[str, Strategy] = {"silu_mul": silu_mul}
