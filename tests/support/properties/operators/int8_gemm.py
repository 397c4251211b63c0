"""Random calls of int8_gemm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import qops
from qops.testing import FLOAT_DTYPES, generator
from tests.support.ops.contracts import int8_gemm_exact, mix_gate_up, packed
from tests.support.properties.property_calls import Call, Fault, Result
from tests.support.properties.property_draws import Sampler, Strategy
from tests.support.properties.property_gemm import (
    EPILOGUES,
    OUT_DTYPES,
    ROWS,
    SIZES,
    after_epilogue,
    epilogue_of,
    epilogue_ways,
    give_weight,
    scales_of,
    size_ways,
    strips,
    untyped,
    weight_ways,
)
from tests.support.properties.property_rows import (
    F32,
    INT8,
    Ways,
    finish,
    give_outputs,
    output_ways,
    zero_dim,
)


def int8_gemm(s: Sampler) -> Call:
    leading, n, k = s.rows_of_any_number(), s.choice(ROWS), s.choice(SIZES)
    epilogue = s.choice(EPILOGUES)
    fused = epilogue != "none" or s.one_in(8)
    if epilogue == "silu_mul":
        n = s.choice((16, 48, 0, 80))
    rng = generator(s.integer(0, 2**20))
    exact = not s.one_in(6)
    codes = torch.randint(-128, 128, (n, k), generator=rng).to(INT8)
    w_scale = scales_of(s, (n, 1), s.dtype(), exact=exact)
    out_dtype = s.choice(OUT_DTYPES if epilogue == "none" else FLOAT_DTYPES)
    rows = () if s.one_in(4) else leading
    arguments: dict[str, Any] = {
        "q": s.rows(s.values((*leading, k), INT8)),
        "scale": s.strided(s.values(rows, F32)) if rows else s.values((), F32),
        "zero_point": None,
    }
    if s.one_in(2):
        rows = s.choice((rows, ()))
        low, high = (-128, 127) if s.one_in(2) else (-(2**31), 2**31 - 1)
        values = torch.randint(low, high, rows, generator=rng).int()
        arguments["zero_point"] = s.strided(values) if rows else values
    mixed = mix_gate_up if epilogue == "silu_mul" else lambda rows: rows
    w_scales = strips(mixed(w_scale))[:, : 1 if k else 0]
    arguments |= {"packed": packed(mixed(codes), 8), "w_scale": w_scales, "bias": None}
    if out_dtype != torch.int32 and s.one_in(2):
        arguments["bias"] = s.contiguous(torch.randn(n, generator=rng).to(s.dtype()))
    arguments["out_features"] = n
    asked = epilogue_of(s, epilogue, (*leading, n), out_dtype)
    if fused:
        arguments |= {"out_dtype": out_dtype, **asked}

    def expected(a: dict[str, Any]) -> tuple[Tensor, ...]:
        zero = a["zero_point"]
        scale = a["scale"].resolve_neg()
        y = int8_gemm_exact(a["q"], scale, zero, codes, w_scale[:, 0], a["bias"], out_dtype)
        return (after_epilogue(a, y),)

    columns = n // 2 if epilogue == "silu_mul" else n
    results: list[Result] = [((*leading, columns), INT8 if epilogue == "out_scale" else out_dtype)]
    call = Call("int8_gemm", "fused" if fused else "default", arguments, expected, results)
    if s.one_in(2):
        call.overload = "fused_out" if fused else "out"
        give_outputs(s, call, "out", replaces=[("out", "residual")] if epilogue == "residual" else ())
    else:
        arguments["out_dtype"] = out_dtype
    if exact and n > 0 and k > 0:
        weight: Any = qops.Int8Weight.from_canonical(codes, w_scale)
        if epilogue == "silu_mul":
            weight.mix_gate_up()

        def public(a: dict[str, Any], weight: Any) -> object:
            names = ("zero_point", "out_dtype", "out", *asked)
            rest = {name: a[name] for name in names if name in a}
            return qops.int8_gemm(a["q"], a["scale"], weight, a["bias"], **rest)

        give_weight(call, public, weight)
    return finish(s, call, lambda: int8_gemm_ways(s, call, k))


def int8_gemm_ways(s: Sampler, call: Call, k: int) -> Ways:
    a = call.arguments
    dtypes = {"q": (INT8,), "scale": (F32,), "zero_point": (torch.int32,), "packed": (INT8,)}
    dtypes |= {"w_scale": FLOAT_DTYPES, "bias": FLOAT_DTYPES, "out": OUT_DTYPES}
    dtypes |= {"residual": FLOAT_DTYPES, "out_scale": (F32,), "out_zero_point": (torch.int32,)}
    if a.get("out_scale") is not None:
        dtypes["out"] = (INT8,)
    optional = [name for name in ("residual", "out_scale", "out_zero_point") if a.get(name) is not None]
    names = ("q", "scale", "zero_point", "packed", "w_scale", "bias", *optional)
    inputs = [name for name in names if a[name] is not None]

    def columns() -> Fault:
        a["q"] = torch.ones((2, k + s.choice((1, 8, -1) if k > 0 else (1, 8))), dtype=INT8)
        return Fault(("q",), (ValueError,))

    def too_many_columns() -> Fault:
        most = 131071 if a["zero_point"] is None else 65793
        wide = (most // 8 + 1) * 8
        a["packed"] = torch.zeros((-(-a["out_features"] // 16), 16 * wide), dtype=INT8)
        a["q"] = torch.zeros((*a["q"].shape[:-1], 1), dtype=INT8).expand(*a["q"].shape[:-1], wide)
        return Fault(("q",), (ValueError,))

    def epilogue_of_integers() -> Fault | None:
        asked = [name for name in ("residual", "silu_mul", "out_scale") if a[name] is not None and a[name] is not False]
        if not asked:
            return None
        a["out_dtype"], call.typed = torch.int32, None
        return Fault(("bias", *asked), (ValueError,))

    def bias_of_integers() -> Fault | None:
        if call.written:
            return None
        a["out_dtype"], a["bias"] = torch.int32, torch.zeros(a["out_features"])
        return Fault(("bias",), (ValueError,))

    def rows(name: str) -> Callable[[], Fault | None]:
        def replace() -> Fault | None:
            if a[name] is None:
                return None
            a[name] = torch.zeros((*a["q"].shape[:-1], 3), dtype=a[name].dtype)
            return Fault((name,), (ValueError,))

        return replace

    ways = [
        *s.tensor_faults(call, dtypes, ["bias"], ["zero_point", "bias", *optional]),
        *s.last_dim(call, "q", *(["bias"] if a["bias"] is not None else [])),
        *zero_dim(s, call, "q"),
        *s.not_contiguous(call, "packed", "w_scale"),
        *s.shapes(call, ["packed", "w_scale"], ["q"]),
        *(s.shapes(call, ["bias"]) if a["bias"] is not None else []),
        *output_ways(s, call, inputs),
        *size_ways(s, call, k, grouped=False),
        ("q", columns),
        ("q packed out_features", too_many_columns),
        ("bias out_dtype out_features", bias_of_integers),
        ("scale q", rows("scale")),
        ("zero_point q", rows("zero_point")),
        *s.requires_grad(call, "scale", "bias"),
    ]
    if call.overload.startswith("fused"):
        ways.append(("out_dtype out residual", epilogue_of_integers))
        ways += epilogue_ways(s, call, "q")
    if "out_dtype" in a:
        bad = (torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e5m2)
        ways += s.scalar(call, "out_dtype", bad, (RuntimeError,))[:2]
    names = ("packed", "w_scale", "out_features")
    return [*untyped(call, ways, *names), *weight_ways(s, call)]


CALLS: dict[str, Strategy] = {"int8_gemm": int8_gemm}
