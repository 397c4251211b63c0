"""Random calls of int4_int8_gemm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import qops
from qops.ops.int4_gemm import KINDS
from qops.ops.quantize_int8 import quantize_int8_ref
from qops.testing import FLOAT_DTYPES, generator
from tests.support.ops.contracts import int4_int8_gemm_exact, mix_gate_up, packed
from tests.support.properties.property_calls import Call, Fault, Result
from tests.support.properties.property_draws import INT64, Sampler, Strategy
from tests.support.properties.property_gemm import (
    EPILOGUES,
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
    BAD_RULES,
    F32,
    INT8,
    RULES,
    Ways,
    finish,
    give_outputs,
    output_ways,
    zero_dim,
)


def int4_int8_gemm(s: Sampler) -> Call:
    leading, n, k = s.rows_of_any_number(), s.choice(ROWS), s.choice(SIZES)
    epilogue = s.choice(EPILOGUES)
    fused = epilogue != "none" or s.one_in(8)
    if epilogue == "silu_mul":
        n = s.choice((16, 48, 0, 80))
    groups = s.choice([1, *(k // g for g in range(16, k, 16) if k % g == 0)]) if k > 0 else 0
    kind = s.choice(KINDS)
    exact = not s.one_in(6)
    rng = generator(s.integer(0, 2**20))
    codes = torch.randint(16, (n, k), generator=rng).to(torch.uint8)
    scales = scales_of(s, (n, groups), s.dtype(), exact=exact)
    zeros, perm = None, None
    if kind == "zero_point":
        zeros = torch.randint(17, (n, groups), generator=rng).to(torch.uint8)
    elif kind != "symmetric":
        zeros = (torch.randn((n, groups), generator=rng) * 4).to(s.dtype())
    if s.one_in(3):
        perm = torch.randperm(k, generator=rng).int() if exact else torch.randint(max(k, 1), (k,), generator=rng).int()
    out_dtype = s.dtype()
    of_floats = s.one_in(3)  # which become rows of int8 in the call
    rows = () if s.one_in(4) else leading
    mixed = mix_gate_up if epilogue == "silu_mul" else lambda rows: rows
    if of_floats:
        given: dict[str, Any] = {"x": s.rows(s.values((*leading, k), out_dtype)), "rule": s.choice(RULES)}
    else:
        given = {"q": s.rows(s.values((*leading, k), INT8))}
        given["scale"] = s.strided(s.values(rows, F32)) if rows else s.values((), F32)
    arguments = given | {
        "packed": packed(mixed(codes), 4),
        "scales": strips(mixed(scales)),
        "zeros": None if zeros is None else strips(mixed(zeros)),
        "perm": perm,
        "bias": None if s.one_in(2) else s.contiguous(torch.randn(n, generator=rng).to(s.dtype())),
        "out_features": n,
        "group_size": k // groups if groups else 0,
        "kind": KINDS.index(kind),
    }
    asked = epilogue_of(s, epilogue, (*leading, n), out_dtype)
    if fused or of_floats:
        arguments |= asked if of_floats else {"out_dtype": out_dtype, **asked}

    def expected(a: dict[str, Any]) -> tuple[Tensor, ...]:
        q, scale = quantize_int8_ref(a["x"], a["rule"]) if of_floats else (a["q"], a["scale"])
        y = int4_int8_gemm_exact(q, scale, codes, scales, zeros, kind, perm, a["bias"], out_dtype)
        return (after_epilogue(a, y),)

    columns = n // 2 if epilogue == "silu_mul" else n
    results: list[Result] = [((*leading, columns), INT8 if epilogue == "out_scale" else out_dtype)]
    overload, overload_out = ("fused", "fused_out") if fused else ("default", "out")
    if of_floats:
        overload, overload_out = "of_floats", "of_floats_out"
    call = Call("int4_int8_gemm", overload, arguments, expected, results)
    if s.one_in(2):
        call.overload = overload_out
        give_outputs(s, call, "out", replaces=[("out", "residual")] if epilogue == "residual" else ())
    elif not of_floats:
        arguments["out_dtype"] = out_dtype
    if exact and n > 0 and k > 0:
        qweight = codes[:, 0::2] | codes[:, 1::2] << 4
        weight: Any = qops.Int4Weight.from_canonical(qweight, scales, kind=kind, zeros=zeros, perm=perm)
        if epilogue == "silu_mul":
            weight.mix_gate_up()

        def public(a: dict[str, Any], weight: Any) -> object:
            rest = {name: a[name] for name in ("out_dtype", "out", *asked) if name in a}
            if of_floats:
                return qops.int4_gemm(a["x"], weight, a["bias"], activation="int8", rule=a["rule"], **rest)
            return qops.int4_int8_gemm(a["q"], a["scale"], weight, a["bias"], **rest)

        give_weight(call, public, weight)
    return finish(s, call, lambda: int4_int8_gemm_ways(s, call, k))


def int4_int8_gemm_ways(s: Sampler, call: Call, k: int) -> Ways:
    a = call.arguments
    rows = "x" if "x" in a else "q"
    dtypes = {
        "x": FLOAT_DTYPES,
        "q": (INT8,),
        "scale": (F32,),
        "packed": (torch.uint8,),
        "scales": (*FLOAT_DTYPES, INT8),
        "bias": FLOAT_DTYPES,
    }
    dtypes |= {"zeros": (torch.uint8,) if a["kind"] == 1 else FLOAT_DTYPES}
    dtypes |= {"perm": (torch.int32,), "residual": FLOAT_DTYPES}
    dtypes |= {"out_scale": (F32,), "out_zero_point": (torch.int32,)}
    dtypes["out"] = FLOAT_DTYPES if a.get("out_scale") is None else (INT8,)
    inner = [name for name in ("packed", "scales", "zeros", "perm") if a[name] is not None]
    extra = [name for name in ("residual", "out_scale", "out_zero_point") if a.get(name) is not None]
    optional = ["bias", "perm", "zeros", *extra]

    def columns() -> Fault:
        a[rows] = torch.ones((2, k + s.choice((1, 8, -1) if k > 0 else (1, 8))), dtype=a[rows].dtype)
        return Fault((rows,), (ValueError,))

    def bad_perm() -> Fault | None:
        if a["perm"] is None or k == 0:
            return None
        a["perm"] = a["perm"].clone()
        a["perm"][s.integer(0, k - 1)] = s.choice((-1, k, 2**31 - 1, -(2**31)))
        return Fault(("perm",), (ValueError,), fake=False)

    def zeros_or_none() -> Fault:
        a["zeros"] = torch.zeros(a["scales"].shape, dtype=torch.uint8) if a["zeros"] is None else None
        return Fault(("zeros",), (ValueError,))

    def too_large() -> Fault:
        """K beyond its bound in groups within theirs, or one group beyond that."""
        wide, g = s.choice(((1 << 20, 128), (1 << 17, 1 << 17)))
        a["packed"] = torch.zeros((-(-a["out_features"] // 16), 8 * wide), dtype=torch.uint8)
        a["scales"] = torch.zeros((a["packed"].shape[0], wide // g, 16))
        a["zeros"], a["perm"], a["kind"], a["group_size"] = None, None, 0, g
        a[rows] = torch.zeros((*a[rows].shape[:-1], 1), dtype=a[rows].dtype).expand(*a[rows].shape[:-1], wide)
        return Fault((rows, "group_size"), (ValueError,))

    def scale_rows() -> Fault:
        a["scale"] = torch.zeros((*a["q"].shape[:-1], 3))
        return Fault(("scale",), (ValueError,))

    of_rows = ("x",) if rows == "x" else ("q", "scale")
    inputs = [name for name in (*of_rows, *inner, "bias", *extra) if a[name] is not None and name != "perm"]
    ways = [
        *s.tensor_faults(call, dtypes, call.written, optional),
        *output_ways(s, call, inputs),
        *s.last_dim(call, rows, *(["bias"] if a["bias"] is not None else [])),
        *zero_dim(s, call, rows),
        *s.not_contiguous(call, *inner),
        *s.shapes(call, inner, [rows, "scales"]),
        *(s.shapes(call, ["bias"]) if a["bias"] is not None else []),
        *size_ways(s, call, k, grouped=True),
        *s.requires_grad(call, "x" if rows == "x" else "scale", "bias"),
        (rows, columns),
        ("perm", bad_perm),
        ("zeros scales", zeros_or_none),
        (f"{rows} packed scales zeros perm kind group_size out_features", too_large),
        *s.scalar(call, "kind", (-1, 4, *INT64[3:])),
    ]
    if rows == "x":
        ways += s.scalar(call, "rule", BAD_RULES)
    else:
        ways.append(("scale q", scale_rows))
    if call.overload.startswith(("fused", "of_floats")):
        ways += epilogue_ways(s, call, rows)
    if "out_dtype" in a:
        bad = (torch.float64, torch.int8, torch.int32, torch.bool, torch.float8_e5m2)
        ways += s.scalar(call, "out_dtype", bad, (RuntimeError,))[:2]
    names = (*inner, "perm", "kind", "zeros", "out_features", "group_size")
    return [*untyped(call, ways, *names), *weight_ways(s, call)]


CALLS: dict[str, Strategy] = {"int4_int8_gemm": int4_int8_gemm}
