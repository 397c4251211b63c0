"""Random calls of the norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import qops
from qops._numerics import rms_norm_exact
from qops.ops.quantize_int8 import quantize_int8_ref
from tests.support.properties.property_calls import Call, Result
from tests.support.properties.property_draws import Sampler, Strategy
from tests.support.properties.property_rows import (
    NORM_COLUMNS,
    RULES,
    finish,
    give_outputs,
    int8_rows,
    norm_style,
    norm_ways,
    out_of,
)


def norm(op: str, *, add: bool, int8: bool) -> Callable[[Sampler], Call]:
    """rms_norm, with a residual, with int8 results."""
    public = getattr(qops, op)

    def strategy(s: Sampler) -> Call:
        leading, h, dtype = s.rows_of_any_number(), s.columns(NORM_COLUMNS), s.dtype()
        arguments: dict[str, Any] = {"x": s.rows(s.values((*leading, h), dtype))}
        if add:
            arguments["residual"] = s.rows(s.values((*leading, h), dtype))
        weight = s.values((h,), s.dtype())
        arguments |= {"weight": s.contiguous(weight)} | norm_style(s)
        if int8:
            arguments["rule"] = s.choice(RULES)

        def results(leading: tuple[int, ...]) -> list[Result]:
            row = ((*leading, h), dtype)
            return [*(int8_rows(leading, h) if int8 else [row]), *([row] if add else [])]

        def expected(a: dict[str, Any]) -> tuple[Tensor, ...]:
            z = (a["x"].float() + a["residual"].float()).to(dtype) if add else a["x"]
            y = rms_norm_exact(z, a["weight"], a["eps"], a["weight_offset"], a["rounding"])
            return (*(quantize_int8_ref(y, a["rule"]) if int8 else [y]), *([z] if add else []))

        def typed(a: dict[str, Any]) -> object:
            style = {name: a[name] for name in ("weight_offset", "rounding", *(["rule"] if int8 else []))}
            if call.written:
                style["out"] = out_of(call, a)
            return public(*[a[name] for name in ("x", *(["residual"] if add else []), "weight", "eps")], **style)

        call = Call(op, "default", arguments, expected, results(leading), typed=typed)
        if s.one_in(2):
            call.overload = "out"
            names = ["q", "scale"] if int8 else ["y"] if add else ["out"]
            replaces = [] if int8 else [(names[0], "x")]
            if add:
                names.append("residual_out")
                replaces.append(("residual_out", "residual"))
            give_outputs(s, call, *names, replaces=replaces)
        return finish(s, call, lambda: norm_ways(s, call, h), ["x", "residual"] if add else ["x"], results)

    return strategy


CALLS: dict[str, Strategy] = {
    "rms_norm": norm("rms_norm", add=False, int8=False),
    "add_rms_norm": norm("add_rms_norm", add=True, int8=False),
}
