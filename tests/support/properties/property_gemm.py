"""Random calls of the matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qops
from qops._layout import LEVEL_GROUPS, SUPER_COLUMNS, levels_into_strips, widen_levels, with_levels
from qops.ops.int4_gemm import KINDS
from qops.ops.quantize_int8 import quantize_int8_static_ref
from qops.testing import FLOAT_DTYPES, generator
from tests.support.ops.contracts import mix_gate_up, packed, silu_mul_exact
from tests.support.ops.weight_only_oracle import gemm_row
from tests.support.properties.property_calls import Call, Fault, Result
from tests.support.properties.property_draws import INT64, Sampler
from tests.support.properties.property_rows import (
    F32,
    INT8,
    Ways,
    finish,
    give_outputs,
    output_ways,
    zero_dim,
)

ROWS = (8, 16, 24, 40, 0, 72)
SIZES = (8, 16, 48, 32, 64, 0, 80, 144, 256)
OUT_DTYPES = (*FLOAT_DTYPES, torch.int32)


def strips(t: Tensor) -> Tensor:
    """[N, groups] to [S, groups, 16], zeros behind row N."""
    n, groups = t.shape
    whole = torch.zeros((-(-n // 16), 16, groups), dtype=t.dtype)
    whole.view(-1)[: t.numel()] = t.reshape(-1)
    return whole.transpose(1, 2).contiguous()


def scales_of(s: Sampler, shape: tuple[int, int], dtype: torch.dtype, *, exact: bool) -> Tensor:
    """Of one size; where the typed weight need not take them, NaN and infinity are among them."""
    t = torch.randn(shape, generator=generator(s.integer(0, 2**20))) * s.choice((1.0, 0.01, 1e-6, 0.0))
    if not exact and t.numel() > 0:
        t.view(-1)[s.integer(0, t.numel() - 1)] = s.choice((float("nan"), float("inf"), 1e37))
    return t.to(dtype)


def size_ways(s: Sampler, call: Call, k: int, *, grouped: bool) -> Ways:
    """out_features and group_size at the ends of int64, and near what would fit."""

    def replaced(name: str, values: tuple[int, ...], *blamed: str) -> Callable[[], Fault | None]:
        def replace() -> Fault | None:
            value = s.choice([value for value in values if value != call.arguments[name]])
            if name == "group_size" and (value == k or (value > 0 and value % 16 == 0 and k % value == 0)):
                # A size that fits K, but not these scales, unless both say that there is no group.
                if call.arguments["scales"].shape[1] == (k // value if value else 0):
                    return None
                blamed_now = (*blamed, "scales")
            else:
                blamed_now = blamed
            call.arguments[name], call.typed = value, None
            return Fault((name, *blamed_now), (ValueError,))

        return replace

    n = call.arguments["out_features"]
    near = tuple(n + d for d in (-16, 16, 4, 1))
    ways: Ways = [("out_features packed", replaced("out_features", (*INT64[1:], *near), "packed"))]
    if grouped:
        ways.append(("group_size scales", replaced("group_size", (*INT64, 16, 24, k + 16, 2 * k, 8), "packed")))
    return [*ways, *s.scalar(call, "out_features", (2**63, -(2**63) - 1, 2**70, 8.5), (RuntimeError, TypeError))]


def untyped(call: Call, ways: Ways, *names: str) -> Ways:
    """Faults of arguments that the typed function takes out of its weight."""

    def wrap(way: Callable[[], Fault | None]) -> Callable[[], Fault | None]:
        def apply() -> Fault | None:
            fault = way()
            if fault is not None:
                call.typed = None
            return fault

        return apply

    return [(touched, wrap(way) if set(touched.split()) & set(names) else way) for touched, way in ways]


def give_weight(call: Call, public: Callable[[dict[str, Any], Any], object], weight: object) -> None:
    """The typed function takes a weight for several of the arguments."""
    call.typed = lambda a: public(a, weight)
    call.typed_with = public


def weight_ways(s: Sampler, call: Call) -> Ways:
    """A weight that is none, for the typed function."""

    def replace() -> Fault | None:
        public = call.typed_with
        if call.typed is None or public is None:
            return None
        weight = s.choice((torch.zeros(8, 8), None, torch.nn.Linear(8, 8)))
        call.typed = lambda a: public(a, weight)
        return Fault(("weight",), (TypeError,), typed_only=True)

    return [("weight", replace)]


# --- weight-only products --------------------------------------------------------------------------------------------


def weight_only_exact(
    a: dict[str, Any], codes: Tensor, scales: Tensor, zeros: Tensor | None, kind: str, perm: Tensor | None, bits: int
) -> Tensor:
    x, n, k = a["x"], codes.shape[0], codes.shape[1]
    if n == 0:  # however many rows
        return torch.empty((*x.shape[:-1], 0), dtype=x.dtype)
    rows = x.resolve_neg().reshape(-1, k) if x.numel() > 0 else torch.zeros((torch.Size(x.shape[:-1]).numel(), k))
    y = torch.zeros((rows.shape[0], n), dtype=x.dtype)
    origin = 8 if bits == 4 else 0
    numbers = codes.numpy().astype(np.int64) - (0 if kind == "zero_point" else origin)
    with np.errstate(all="ignore"):
        for index, row in enumerate(rows):
            row = row if perm is None else row[perm.long()]
            if not row.isfinite().all():
                y[index] = float("nan")
                continue
            if k == 0:
                y[index] = 0 if a["bias"] is None else a["bias"].to(x.dtype)
                continue
            z = None if zeros is None else zeros.float().numpy()
            total = gemm_row(row, numbers, scales.float().numpy(), z, kind, k // scales.shape[1], a["bias"], origin)
            y[index] = total.to(x.dtype)
    return y.view(*x.shape[:-1], n)


EPILOGUES = ("none", "none", "residual", "silu_mul", "out_scale")


def after_epilogue(a: dict[str, Any], y: Tensor) -> Tensor:
    """What a product makes of its rounded result: the operators that it saves."""
    if a.get("residual") is not None:
        return (y.float() + a["residual"].float()).to(y.dtype)
    if a.get("silu_mul"):
        return silu_mul_exact(*y.chunk(2, dim=-1))
    if a.get("out_scale") is not None:
        return quantize_int8_static_ref(y, a["out_scale"].view(()), a["out_zero_point"])
    return y


def epilogue_of(s: Sampler, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments; ``shape``: of the product."""
    found: dict[str, Any] = {
        "residual": None,
        "silu_mul": name == "silu_mul",
        "out_scale": None,
        "out_zero_point": None,
    }
    if name == "residual":
        found["residual"] = s.rows(s.values(shape, dtype))
    if name == "out_scale":
        found["out_scale"] = torch.tensor(s.choice((1.0, 0.02, 1e-30, 3e38, 1e-45))).reshape((1,) * s.integer(0, 3))
        if s.one_in(2):
            found["out_zero_point"] = torch.tensor(s.integer(-128, 127), dtype=torch.int32)
    return found


def epilogue_ways(s: Sampler, call: Call, x: str = "x") -> Ways:
    """x: the argument with the rows."""
    a = call.arguments

    def bad_value(name: str, values: tuple[float, ...]) -> Callable[[], Fault | None]:
        def replace() -> Fault | None:
            if a[name] is None:
                return None
            a[name] = torch.tensor(s.choice(values), dtype=a[name].dtype)
            return Fault((name,), (ValueError,), fake=False)

        return replace

    def lone_zero_point() -> Fault | None:
        if a["out_scale"] is not None:
            return None
        a["out_zero_point"] = torch.tensor(0, dtype=torch.int32)
        return Fault(("out_zero_point",), (ValueError,))

    def two_of_them() -> Fault | None:
        if a["residual"] is None and not a["silu_mul"]:
            return None
        a["out_scale"] = torch.ones(())
        return Fault(("residual", "out_scale"), (ValueError,))

    def other_dtype() -> Fault | None:
        if a["residual"] is None:
            return None
        a["residual"] = a["residual"].to(s.choice([d for d in FLOAT_DTYPES if d != a["residual"].dtype]))
        return Fault(("residual",), (RuntimeError,))

    ways = [
        ("out_scale", bad_value("out_scale", (0.0, -1.0, float("nan"), float("inf")))),
        ("out_zero_point", bad_value("out_zero_point", (-129, 128, 2**31 - 1, -(2**31)))),
        ("out_scale out_zero_point", lone_zero_point),
        ("residual silu_mul out_scale out", two_of_them),
        ("residual out", other_dtype),
        *(s.shapes_of_one(call, "out_scale") if a["out_scale"] is not None else []),
    ]

    def unmergeable() -> Fault | None:
        if call.written or a["residual"].shape[-1] == 0:
            return None
        shape = (2, 2, 2, 2, 2)
        a[x] = torch.ones((*shape, a[x].shape[-1]), dtype=a[x].dtype)
        if x == "q":
            a["scale"] = torch.ones(())
        if "zero_point" in a:
            a["zero_point"] = None
        a["residual"] = s.unmergeable(torch.ones((*shape, a["residual"].shape[-1]), dtype=a["residual"].dtype), 5)
        return Fault(("residual",), (ValueError,))

    if a["residual"] is not None:
        ways += [*s.last_dim(call, "residual"), *s.shapes(call, ["residual"]), *s.requires_grad(call, "residual")]
        ways.append((f"{x} scale zero_point residual", unmergeable))
    return ways


def weight_only(s: Sampler, *, bits: int) -> Call:
    leading, n, k, dtype = s.rows_of_any_number(), s.choice(ROWS), s.choice(SIZES), s.dtype()
    epilogue = s.choice(EPILOGUES) if bits == 4 else "none"
    if epilogue == "silu_mul":
        n = s.choice((16, 48, 0, 80))
    groups = s.choice([1, *(k // g for g in range(16, k, 16) if k % g == 0)]) if k > 0 else 0
    group_size = k // groups if groups else 0
    weight_class = qops.Int4Weight if bits == 4 else qops.Int8Weight
    kind = s.choice(weight_class.KINDS)
    exact = not s.one_in(6)
    rng = generator(s.integer(0, 2**20))
    low, high = (0, 16) if bits == 4 else (-128, 128)
    codes = torch.randint(low, high, (n, k), generator=rng).to(torch.uint8 if bits == 4 else INT8)
    scales = scales_of(s, (n, groups), s.dtype(), exact=exact)
    zeros, perm = None, None
    two_levels = k == SUPER_COLUMNS and group_size in LEVEL_GROUPS and kind in ("symmetric", "offset") and s.one_in(2)
    stored: dict[str, Tensor] = {}
    if two_levels:
        for name in ("scales", "zeros")[: 2 if kind == "offset" else 1]:
            halves = scales_of(s, (n, 1), torch.float16, exact=exact)
            stored[name] = with_levels(halves, torch.randint(-128, 128, (n, 1, groups), generator=rng).to(INT8))
        scales = widen_levels(stored["scales"])
        zeros = widen_levels(stored["zeros"]) if "zeros" in stored else None
    elif kind == "zero_point":
        zeros = torch.randint(17 if exact else 256, (n, groups), generator=rng).to(torch.uint8)
    elif kind in ("float_zero", "offset"):
        zeros = (torch.randn((n, groups), generator=rng) * 4).to(s.dtype())
    if s.one_in(3):
        perm = torch.randperm(k, generator=rng).int() if exact else torch.randint(max(k, 1), (k,), generator=rng).int()
    x = s.values((*leading, k), dtype)
    mixed = mix_gate_up if epilogue == "silu_mul" else lambda rows: rows
    stored = stored or {name: t for name, t in (("scales", scales), ("zeros", zeros)) if t is not None}
    in_strips = {name: (levels_into_strips if two_levels else strips)(mixed(t)) for name, t in stored.items()}
    arguments: dict[str, Any] = {"x": s.rows(x), "packed": packed(mixed(codes), bits), "zeros": None, **in_strips}
    arguments["perm"] = perm
    arguments["bias"] = None if s.one_in(2) else s.contiguous(torch.randn(n, generator=rng).to(s.dtype()))
    arguments |= {"out_features": n, "group_size": group_size}
    if bits == 4:
        arguments |= {"kind": KINDS.index(kind), "batch_invariant": s.one_in(2)}
        fused = epilogue != "none" or s.one_in(2)
        if fused:
            arguments |= epilogue_of(s, epilogue, (*leading, n), dtype)

    def results(leading: tuple[int, ...]) -> list[Result]:
        columns = n // 2 if epilogue == "silu_mul" else n
        return [((*leading, columns), INT8 if epilogue == "out_scale" else dtype)]

    def expected(a: dict[str, Any]) -> tuple[Tensor, ...]:
        y = weight_only_exact(a, codes, scales, zeros, kind, perm, bits)
        return (after_epilogue(a, y) if bits == 4 else y,)

    op = "int4_gemm" if bits == 4 else "int8_weight_only_gemm"
    has_epilogue = bits == 4 and fused
    call = Call(op, "fused" if has_epilogue else "default", arguments, expected, results(leading))
    if s.one_in(2):
        call.overload = "fused_out" if has_epilogue else "out"
        give_outputs(s, call, "out", replaces=[("out", "residual")] if epilogue == "residual" else ())

    def out() -> dict[str, Any]:
        return {"out": call.arguments["out"]} if call.written else {}

    if exact and n > 0 and k > 0:
        qweight = codes[:, 0::2] | codes[:, 1::2] << 4 if bits == 4 else codes
        weight: Any = weight_class.from_canonical(qweight, **stored, kind=kind, perm=perm)
        if epilogue == "silu_mul":
            weight.mix_gate_up()
        if bits == 4:

            def public(a: dict[str, Any], weight: Any) -> object:
                names = ("batch_invariant", "residual", "silu_mul", "out_scale", "out_zero_point")
                given = {name: a[name] for name in names if name in a}
                return qops.int4_gemm(a["x"], weight, a["bias"], **given, **out())

        else:

            def public(a: dict[str, Any], weight: Any) -> object:
                return qops.int8_weight_only_gemm(a["x"], weight, a["bias"], **out())

        give_weight(call, public, weight)
    # With a residual there are no huge calls: x alone must not change its leading dimensions.
    huge = (["x"], results) if epilogue != "residual" else ([], None)
    return finish(s, call, lambda: weight_only_ways(s, call, k, bits), *huge)


def weight_only_ways(s: Sampler, call: Call, k: int, bits: int) -> Ways:
    a = call.arguments
    codes = torch.uint8 if bits == 4 else INT8
    dtypes: dict[str, tuple[torch.dtype, ...]] = {
        "x": FLOAT_DTYPES,
        "scales": (*FLOAT_DTYPES, INT8),
        "bias": FLOAT_DTYPES,
    }
    dtypes |= {"packed": (codes,), "perm": (torch.int32,), "out": FLOAT_DTYPES}
    inner = [name for name in ("packed", "scales", "zeros", "perm") if a.get(name) is not None]
    two_levels = a["scales"].dtype == INT8
    dtypes["zeros"] = (torch.uint8,) if a.get("kind") == 1 else (INT8,) if two_levels else FLOAT_DTYPES
    if bits == 4:
        dtypes |= {"residual": FLOAT_DTYPES, "out_scale": (F32,), "out_zero_point": (torch.int32,)}
        dtypes["out"] = FLOAT_DTYPES if a.get("out_scale") is None else (INT8,)
    extra = [name for name in ("residual", "out_scale", "out_zero_point") if a.get(name) is not None]
    optional = ["bias", "perm", "zeros", *extra]

    def x_columns() -> Fault:
        a["x"] = torch.ones((2, k + s.choice((1, 8, -1) if k > 0 else (1, 8))), dtype=a["x"].dtype)
        return Fault(("x",), (ValueError,))

    def bad_perm() -> Fault | None:
        if a["perm"] is None or k == 0:
            return None
        a["perm"] = a["perm"].clone()
        a["perm"][s.integer(0, k - 1)] = s.choice((-1, k, 2**31 - 1, -(2**31)))
        return Fault(("perm",), (ValueError,), fake=False)

    def other_kind() -> Fault | None:
        kind = s.choice([kind for kind in (0, 1, 2, 3) if kind != a["kind"]])
        if a["kind"] >= 2 and kind >= 2 and not two_levels:
            return None
        a["kind"] = kind
        return Fault(("zeros", *(("kind",) if two_levels else ())), (ValueError, RuntimeError))

    def zeros_or_none() -> Fault:
        a["zeros"] = torch.zeros(a["scales"].shape, dtype=torch.uint8) if a["zeros"] is None else None
        return Fault(("zeros",), (ValueError,))

    floats = [name for name in call.written if a[name].is_floating_point() and a[name] is not a.get("residual")]
    ways = [
        *s.tensor_faults(call, dtypes, call.written, optional),
        *output_ways(
            s, call, [name for name in ("x", "bias", *inner, *extra) if a[name] is not None and name != "perm"]
        ),
        *s.last_dim(call, "x", *(["bias"] if a["bias"] is not None else [])),
        *zero_dim(s, call, "x"),
        *s.not_contiguous(call, *inner),
        *s.shapes(call, inner, ["x", "scales"]),
        *(s.shapes(call, ["bias"]) if a["bias"] is not None else []),
        *size_ways(s, call, k, grouped=True),
        *s.requires_grad(call, "x", "bias", *floats),
        ("x", x_columns),
        ("perm", bad_perm),
    ]
    if bits == 4:
        ways += [
            ("zeros scales", zeros_or_none),
            ("kind zeros", other_kind),
            *s.scalar(call, "kind", (-1, 4, *INT64[3:])),
            *(epilogue_ways(s, call) if "silu_mul" in a else []),
        ]
    names = (*inner, "perm", "kind", "zeros", "out_features", "group_size")
    return [*untyped(call, ways, *names), *weight_ways(s, call)]
