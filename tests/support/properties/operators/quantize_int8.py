"""Random calls of the quantisers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import qops
from qops.ops.quantize_int8 import quantize_int8_asym_ref, quantize_int8_ref, quantize_int8_static_ref
from qops.testing import FLOAT_DTYPES
from tests.support.properties.property_calls import Call, Fault, Result
from tests.support.properties.property_draws import Sampler, Strategy
from tests.support.properties.property_rows import (
    BAD_RULES,
    F32,
    INT8,
    RULES,
    Ways,
    finish,
    give_outputs,
    int8_rows,
    output_ways,
    zero_dim,
)


def quantize_int8(s: Sampler) -> Call:
    leading, k, dtype, rule = s.rows_of_any_number(), s.columns(), s.dtype(), s.choice(RULES)
    call = Call(
        op="quantize_int8",
        overload="default",
        arguments={"x": s.rows(s.values((*leading, k), dtype)), "rule": rule},
        expected=lambda a: quantize_int8_ref(a["x"], a["rule"]),
        results=int8_rows(leading, k),
        typed=lambda a: qops.quantize_int8(a["x"], a["rule"]),
    )
    if s.one_in(2):
        call.overload = "out"
        give_outputs(s, call, "q", "scale")
        call.typed = lambda a: qops.quantize_int8(a["x"], a["rule"], out=(a["q"], a["scale"]))

    def ways() -> Ways:
        dtypes = {"x": FLOAT_DTYPES, "q": (INT8,), "scale": (F32,)}
        return [
            *s.tensor_faults(call, dtypes),
            *s.last_dim(call, "x"),
            *zero_dim(s, call, "x"),
            *s.scalar(call, "rule", BAD_RULES),
            *output_ways(s, call, ["x"]),
            *s.requires_grad(call, "x"),
        ]

    return finish(s, call, ways, ["x"], lambda leading: int8_rows(leading, k))


def quantize_int8_asym(s: Sampler) -> Call:
    leading, k, dtype, rule = s.rows_of_any_number(), s.columns(), s.dtype(), s.choice(("255", "compressed-tensors"))

    def results(leading: tuple[int, ...]) -> list[Result]:
        return [*int8_rows(leading, k), (leading, torch.int32)]

    call = Call(
        op="quantize_int8_asym",
        overload="default",
        arguments={"x": s.rows(s.values((*leading, k), dtype)), "rule": rule},
        expected=lambda a: quantize_int8_asym_ref(a["x"], a["rule"]),
        results=results(leading),
        typed=lambda a: qops.quantize_int8_asym(a["x"], a["rule"]),
    )
    if s.one_in(2):
        call.overload = "out"
        give_outputs(s, call, "q", "scale", "zero_point")
        call.typed = lambda a: qops.quantize_int8_asym(a["x"], a["rule"], out=(a["q"], a["scale"], a["zero_point"]))

    def ways() -> Ways:
        dtypes = {"x": FLOAT_DTYPES, "q": (INT8,), "scale": (F32,), "zero_point": (torch.int32,)}
        return [
            *s.tensor_faults(call, dtypes),
            *s.last_dim(call, "x"),
            *zero_dim(s, call, "x"),
            *s.scalar(call, "rule", (*BAD_RULES, "torchao")),
            *output_ways(s, call, ["x"]),
            *s.requires_grad(call, "x"),
        ]

    return finish(s, call, ways, ["x"], results)


def quantize_int8_static(s: Sampler) -> Call:
    leading, k, dtype, rule = (
        s.rows_of_any_number(),
        s.columns(),
        s.dtype(),
        s.choice(("torchao", "compressed-tensors")),
    )
    scale = torch.tensor(s.choice((1.0, 0.02, 1e-30, 3e38, 1e-45))).reshape((1,) * s.integer(0, 3))
    zero_point = None if s.one_in(3) else torch.tensor(s.integer(-128, 127), dtype=torch.int32)

    def results(leading: tuple[int, ...]) -> list[Result]:
        return [((*leading, k), INT8)]

    call = Call(
        op="quantize_int8_static",
        overload="default",
        arguments={"x": s.rows(s.values((*leading, k), dtype)), "scale": scale, "zero_point": zero_point, "rule": rule},
        expected=lambda a: (quantize_int8_static_ref(a["x"], a["scale"].view(()), a["zero_point"], a["rule"]),),
        results=results(leading),
        typed=lambda a: qops.quantize_int8_static(a["x"], a["scale"], a["zero_point"], a["rule"]),
    )
    if s.one_in(2):
        call.overload = "out"
        give_outputs(s, call, "q")
        call.typed = lambda a: qops.quantize_int8_static(a["x"], a["scale"], a["zero_point"], a["rule"], out=a["q"])

    def bad_value(name: str, values: Sequence[float], dtype: torch.dtype) -> Callable[[], Fault]:
        def replace() -> Fault:
            call.arguments[name] = torch.tensor(s.choice(values), dtype=dtype)
            return Fault((name,), (ValueError,), fake=False)

        return replace

    def ways() -> Ways:
        dtypes = {"x": FLOAT_DTYPES, "q": (INT8,), "scale": (F32,), "zero_point": (torch.int32,)}
        found = [
            *s.tensor_faults(call, dtypes, optional=["zero_point"]),
            *s.last_dim(call, "x"),
            *zero_dim(s, call, "x"),
            *s.scalar(call, "rule", (*BAD_RULES, "127")),
            *output_ways(s, call, ["x"]),
            *s.requires_grad(call, "x", "scale"),
            ("scale", bad_value("scale", (0.0, -1.0, float("nan"), float("inf")), F32)),
            ("zero_point", bad_value("zero_point", (-129, 128, 2**31 - 1, -(2**31)), torch.int32)),
            *s.shapes_of_one(call, "scale"),
        ]
        optional = zero_point is None
        return [way for way in found if not (optional and way[0] == "zero_point")] if optional else found

    return finish(s, call, ways, ["x"], results)


CALLS: dict[str, Strategy] = {
    "quantize_int8": quantize_int8,
    "quantize_int8_asym": quantize_int8_asym,
    "quantize_int8_static": quantize_int8_static,
}
