"""Random calls of the operators that work on rows: quantisers, norms, rotary, SiLU-mul."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import qops
from qops._numerics import rms_norm_exact, rotary_exact
from qops.ops.quantize_int8 import quantize_int8_asym_ref, quantize_int8_ref, quantize_int8_static_ref
from qops.testing import FLOAT_DTYPES
from tests.support.ops.contracts import silu_mul_exact
from tests.support.properties.property_calls import Call, Fault, Result
from tests.support.properties.property_draws import COLUMNS, HUGE, Sampler

RULES = ("127", "compressed-tensors", "torchao")
BAD_RULES = ("", "128", "127 ", "Torchao", "hf")
ROUNDINGS = ("hf", "fp32")
BAD_ROUNDINGS = ("", "HF", "fp16", "127")
BAD_EPS = (float("nan"), -1e-6, float("inf"), 1e39, -float("inf"))
BAD_OFFSETS = (float("nan"), float("inf"), -1e39)
NORM_COLUMNS = (*COLUMNS, 300, 1030)
INT8, F32 = torch.int8, torch.float32
Ways = list[tuple[str, Callable[[], Fault | None]]]


def leading_of(s: Sampler) -> tuple[int, ...]:
    return (0, HUGE) if s.one_in(20) else s.leading()


def zero_dim(s: Sampler, call: Call, name: str) -> Ways:
    def scalar() -> Fault:
        call.arguments[name] = torch.ones((), dtype=call.arguments[name].dtype)
        return Fault((name,), (ValueError,))

    return [(name, scalar)]


def huge(s: Sampler, call: Call, names: Sequence[str], results: Callable[[tuple[int, ...]], list[Result]]) -> None:
    """More rows than memory holds, or than 2^63 bytes, in tensors that take none: one row again and again."""
    columns = call.arguments[names[0]].shape[-1]
    leading = s.choice(((HUGE,), (2, HUGE), (2**57 if columns < 64 else 2**50,), (HUGE, 1)))
    for name in names:
        t = call.arguments[name]
        call.arguments[name] = s.values((t.shape[-1],), t.dtype).expand(*leading, t.shape[-1])
    call.results = results(leading)
    overflow = too_large = False
    for shape, dtype in call.results:
        extent = dtype.itemsize
        for size in shape:
            extent *= max(size, 1)
        overflow |= extent >= 2**63
        too_large |= torch.Size(shape).numel() * dtype.itemsize >= 2**40
    if s.one_in(3):
        on_meta(call)
        too_large = False
    if overflow or too_large:
        call.faults.append(Fault(("the result",), (ValueError, RuntimeError), fake=overflow))


def on_meta(call: Call) -> None:
    if call.typed_with is not None:  # whose weight stays
        call.typed = None
    for name, t in list(call.tensors()):
        call.arguments[name] = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def give_outputs(s: Sampler, call: Call, *names: str, replaces: Sequence[tuple[str, str]] = ()) -> None:
    """The caller's tensors for the results; ``replaces``: (output, input) that may be one tensor."""
    call.written, call.replaces = names, tuple(replaces)
    for name, (shape, dtype) in zip(names, call.results, strict=True):
        call.arguments[name] = s.contiguous(s.buffer(torch.Size(shape).numel(), dtype).view(shape))
    for name, other in replaces:
        t = call.arguments[other]
        if t.is_contiguous() and not t.is_neg() and s.one_in(3):
            call.arguments[name] = t


def out_of(call: Call, arguments: dict[str, Any]) -> Any:
    """``out=`` of a typed function."""
    outputs = tuple(arguments[name] for name in call.written)
    return outputs[0] if len(outputs) == 1 else outputs


def finish(
    s: Sampler,
    call: Call,
    ways: Callable[[], Ways],
    rows: Sequence[str] = (),
    results: Callable[[tuple[int, ...]], list[Result]] | None = None,
) -> Call:
    """Leaves a call as it is, moves it to meta, makes it huge, or breaks it."""
    kind = s.integer(0, 19)
    if kind < 9:
        return call
    if kind == 9:
        on_meta(call)
    elif kind == 10 and results is not None and not call.written:
        huge(s, call, rows, results)
    elif kind == 11 and rows and not call.written and results is not None:
        shape = (2, 2, 2, 2, 2, call.arguments[rows[0]].shape[-1])
        if shape[-1] == 0:
            return call
        for name in rows:
            t = call.arguments[name]
            call.arguments[name] = s.values((*shape[:-1], t.shape[-1]), t.dtype)
        bad = s.choice(rows)
        call.arguments[bad] = s.unmergeable(call.arguments[bad], 5)
        call.results = results(shape[:-1])
        call.faults.append(Fault((bad,), (ValueError,)))
    else:
        s.break_one(call, ways())
    return call


# --- quantisers ------------------------------------------------------------------------------------------------------


def int8_rows(leading: tuple[int, ...], k: int) -> list[Result]:
    return [((*leading, k), INT8), (leading, F32)]


def output_ways(s: Sampler, call: Call, inputs: Sequence[str]) -> Ways:
    """What can be wrong with tensors that the caller gives for results."""
    names = call.written
    pairs = [(a, b) for a in names for b in (*inputs, *names) if a != b]
    return [*s.not_contiguous(call, *names), *s.shapes(call, names), *s.overlap(call, *pairs)]


def quantize_int8(s: Sampler) -> Call:
    leading, k, dtype, rule = leading_of(s), s.choice(COLUMNS), s.dtype(), s.choice(RULES)
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
    leading, k, dtype = leading_of(s), s.choice(COLUMNS), s.dtype()

    def results(leading: tuple[int, ...]) -> list[Result]:
        return [*int8_rows(leading, k), (leading, torch.int32)]

    call = Call(
        op="quantize_int8_asym",
        overload="default",
        arguments={"x": s.rows(s.values((*leading, k), dtype))},
        expected=lambda a: quantize_int8_asym_ref(a["x"]),
        results=results(leading),
        typed=lambda a: qops.quantize_int8_asym(a["x"]),
    )
    if s.one_in(2):
        call.overload = "out"
        give_outputs(s, call, "q", "scale", "zero_point")
        call.typed = lambda a: qops.quantize_int8_asym(a["x"], out=(a["q"], a["scale"], a["zero_point"]))

    def ways() -> Ways:
        dtypes = {"x": FLOAT_DTYPES, "q": (INT8,), "scale": (F32,), "zero_point": (torch.int32,)}
        return [
            *s.tensor_faults(call, dtypes),
            *s.last_dim(call, "x"),
            *zero_dim(s, call, "x"),
            *output_ways(s, call, ["x"]),
            *s.requires_grad(call, "x"),
        ]

    return finish(s, call, ways, ["x"], results)


def quantize_int8_static(s: Sampler) -> Call:
    leading, k, dtype = leading_of(s), s.choice(COLUMNS), s.dtype()
    scale = torch.tensor(s.choice((1.0, 0.02, 1e-30, 3e38, 1e-45))).reshape((1,) * s.integer(0, 3))
    zero_point = None if s.one_in(3) else torch.tensor(s.integer(-128, 127), dtype=torch.int32)

    def results(leading: tuple[int, ...]) -> list[Result]:
        return [((*leading, k), INT8)]

    call = Call(
        op="quantize_int8_static",
        overload="default",
        arguments={"x": s.rows(s.values((*leading, k), dtype)), "scale": scale, "zero_point": zero_point},
        expected=lambda a: (quantize_int8_static_ref(a["x"], a["scale"].view(()), a["zero_point"]),),
        results=results(leading),
        typed=lambda a: qops.quantize_int8_static(a["x"], a["scale"], a["zero_point"]),
    )
    if s.one_in(2):
        call.overload = "out"
        give_outputs(s, call, "q")
        call.typed = lambda a: qops.quantize_int8_static(a["x"], a["scale"], a["zero_point"], out=a["q"])

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
            *output_ways(s, call, ["x"]),
            *s.requires_grad(call, "x", "scale"),
            ("scale", bad_value("scale", (0.0, -1.0, float("nan"), float("inf")), F32)),
            ("zero_point", bad_value("zero_point", (-129, 128, 2**31 - 1, -(2**31)), torch.int32)),
            *s.shapes_of_one(call, "scale"),
        ]
        optional = zero_point is None
        return [way for way in found if not (optional and way[0] == "zero_point")] if optional else found

    return finish(s, call, ways, ["x"], results)


# --- norms -----------------------------------------------------------------------------------------------------------


def norm_style(s: Sampler) -> dict[str, Any]:
    rounding = s.choice(ROUNDINGS)
    offset = s.choice((0.0, 1.0, -0.5, 1e30)) if rounding == "fp32" else 0.0
    return {"eps": s.choice((1e-5, 0.0, 1e-6, 1.0, 1e38)), "weight_offset": offset, "rounding": rounding}


def norm_ways(s: Sampler, call: Call, h: int) -> Ways:
    def offset_with_hf() -> Fault:
        call.arguments |= {"weight_offset": 1.0, "rounding": "hf"}
        return Fault(("rounding", "weight_offset"), (ValueError,))

    rows = [name for name in ("x", "residual") if name in call.arguments]

    def other_float(name: str) -> Callable[[], Fault]:
        def replace() -> Fault:
            t = call.arguments[name]
            other = s.choice([dtype for dtype in FLOAT_DTYPES if dtype != t.dtype])
            call.arguments[name] = t.detach().to(other)
            return Fault(("residual", *call.written), (RuntimeError,))

        return replace

    dtypes = {name: FLOAT_DTYPES for name in ("x", "residual", "weight", "residual_out", "y", "out")}
    return [
        *s.tensor_faults(call, dtypes | {"q": (INT8,), "scale": (F32,)}, ["residual"]),
        *s.last_dim(call, *rows, "weight"),
        *zero_dim(s, call, "x"),
        *s.shapes(call, ["weight"], ["x"]),
        *(s.shapes(call, ["residual"]) if len(rows) == 2 else []),
        *([("residual", other_float("residual"))] if len(rows) == 2 else []),
        *s.scalar(call, "eps", BAD_EPS),
        *s.scalar(call, "weight_offset", BAD_OFFSETS),
        *s.scalar(call, "rounding", BAD_ROUNDINGS),
        *(s.scalar(call, "rule", BAD_RULES) if "rule" in call.arguments else []),
        ("rounding weight_offset", offset_with_hf),
        *output_ways(s, call, [*rows, "weight"]),
        *s.requires_grad(call, *rows, "weight"),
    ]


def norm(op: str, *, add: bool, int8: bool) -> Callable[[Sampler], Call]:
    """rms_norm, with a residual, with int8 results."""
    public = getattr(qops, op)

    def strategy(s: Sampler) -> Call:
        leading, h, dtype = leading_of(s), s.choice(NORM_COLUMNS), s.dtype()
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


# --- SiLU-mul --------------------------------------------------------------------------------------------------------


def silu_mul(s: Sampler, *, int8: bool = False) -> Call:
    leading, columns, dtype, apart = leading_of(s), s.choice(COLUMNS), s.dtype(), s.one_in(2)
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


# --- rotary ----------------------------------------------------------------------------------------------------------


def rotary(s: Sampler, *, in_place: bool = False, normed: bool = False) -> Call:
    leading, t, d = s.leading(2), s.choice((1, 2, 3, 4, 0)), s.choice((2, 4, 8, 16, 34, 1, 0, 3, 6))
    dtype, pairs = s.dtype(), s.integer(0, d // 2)
    heads, kv_heads = s.integer(0, 3), s.integer(0, 3)
    with_positions = s.one_in(2)
    p = s.integer(1, 6) if with_positions else t + s.integer(0, 3)
    shapes = [(*leading, t, h, d) for h in (heads, kv_heads)]
    if s.one_in(3):  # parts of one tensor, as of a merged qkv
        both = s.strided(s.values((*leading, t, heads + kv_heads + 1, d), dtype), writable=in_place)
        q, k = both[..., :heads, :], both[..., heads : heads + kv_heads, :]
    else:
        q, k = (s.strided(s.values(shape, dtype), writable=in_place) for shape in shapes)
    table_dtype = s.choice((dtype, F32))
    arguments: dict[str, Any] = {"q": q, "k": k}
    arguments |= {name: s.strided(s.values((p, pairs), table_dtype)) for name in ("cos", "sin")}
    arguments["positions"] = None
    if with_positions:
        sizes = s.choice(((t,), (*leading, t)))
        values = torch.tensor([s.integer(0, p - 1) for _ in range(torch.Size(sizes).numel())]).view(sizes)
        arguments["positions"] = s.strided(values.to(s.choice((torch.int32, torch.int64))))
    arguments["interleaved"] = s.one_in(2)
    if normed:
        arguments |= {name: s.contiguous(s.values((d,), s.dtype())) for name in ("q_weight", "k_weight")}
        arguments |= norm_style(s)

    def expected(a: dict[str, Any]) -> tuple[Tensor, ...]:
        rest = (a["cos"], a["sin"], a["positions"], a["interleaved"])
        heads = {name: a[name] for name in ("q", "k")}
        if normed:
            style = (a["eps"], a["weight_offset"], a["rounding"])
            heads = {name: rms_norm_exact(x, a[f"{name}_weight"], *style) for name, x in heads.items()}
        return tuple(rotary_exact(x, *rest) for x in heads.values())

    op = ("qk_norm_" if normed else "") + ("rotary_" if in_place else "rotary")
    public: Callable[..., object] = getattr(qops, op)
    call = Call(op, "default", arguments, expected, [(shape, dtype) for shape in shapes])
    call.typed = lambda a: public(**a)
    if in_place:
        call.written = ("q", "k")
    return finish(s, call, lambda: rotary_ways(s, call, t, p))


def rotary_ways(s: Sampler, call: Call, t: int, p: int) -> Ways:
    a = call.arguments
    floats = {name: FLOAT_DTYPES for name in ("q", "k", "cos", "sin", "q_weight", "k_weight")}
    weights = [name for name in ("q_weight", "k_weight") if name in a]
    index = (torch.int32, torch.int64)
    moved = a["q"].shape[-1] > 0 and a["q"].shape[-2] + a["k"].shape[-2] > 0

    def position(bad: int) -> Callable[[], Fault | None]:
        def replace() -> Fault | None:
            positions = a["positions"]
            if positions is None or positions.numel() == 0 or not moved or 0 in a["q"].shape[:-2]:
                return None
            positions = positions.clone().contiguous().to(torch.int64 if abs(bad) >= 2**31 else positions.dtype)
            positions.view(-1)[s.integer(0, positions.numel() - 1)] = bad
            a["positions"] = positions
            return Fault(("positions",), (ValueError,), fake=False)

        return replace

    def replaced(name: str, value: Callable[[], Tensor | None], *blamed: str, kinds: Any = (ValueError,)) -> Any:
        def replace() -> Fault | None:
            t = value()
            if t is None:
                return None
            a[name] = t
            return Fault((name, *blamed), kinds)

        return (" ".join((name, *blamed)), replace)

    def sized(name: str, d: int, by: int = 1) -> Callable[[], Tensor]:
        def make() -> Tensor:
            sizes = list(a[name].shape)
            sizes[d] += by
            return torch.zeros(sizes, dtype=a[name].dtype)

        return make

    def other_float(name: str, *allowed: torch.dtype) -> Callable[[], Tensor]:
        return lambda: a[name].to(s.choice([d for d in FLOAT_DTYPES if d not in allowed]))

    def wide_tables() -> Fault:
        for name in ("cos", "sin"):
            a[name] = torch.zeros(a["cos"].shape[0], a["q"].shape[-1] // 2 + 1, dtype=a["cos"].dtype)
        return Fault(("cos",), (ValueError,))

    def few_rows() -> Fault | None:
        if a["positions"] is not None or t == 0:
            return None
        for name in ("cos", "sin"):
            a[name] = a[name][: t - 1].clone()
        return Fault(("cos",), (ValueError,))

    def expanded(name: str) -> Callable[[], Fault | None]:
        def replace() -> Fault | None:
            x = a[name]
            many = [d for d in range(x.dim()) if x.shape[d] > 1]
            if not call.written or x.numel() == 0 or not many:
                return None
            d = s.choice(many)
            a[name] = x.narrow(d, 0, 1).clone().expand(x.shape)
            return Fault((name,), (ValueError,), fake=False)

        return replace

    def unmergeable() -> Fault | None:
        q = a["q"]
        if q.numel() == 0 or a["positions"] is not None or q.shape[-3] != 2:
            return None
        lead = (2, 2, 2, 2, 2)
        a["q"] = s.unmergeable(torch.zeros(*lead, *q.shape[-2:], dtype=q.dtype), 5)
        a["k"] = torch.zeros(*lead, *a["k"].shape[-2:], dtype=q.dtype)
        return Fault(("q",), (ValueError,))

    dtype, table = a["q"].dtype, a["cos"].dtype
    ways: Ways = [
        *s.tensor_faults(call, floats | {"positions": index}, ["k", "cos"], ["positions"]),
        replaced("k", other_float("k", dtype), kinds=(RuntimeError,)),
        replaced("sin", other_float("sin", table), kinds=(RuntimeError,)),
        *((name, way) for name, way in [("cos sin q", few_rows), ("cos sin q", wide_tables), ("q k", unmergeable)]),
        *(replaced(name, sized(name, d), "k") for name in ("q", "k") for d in (-1, -3)),
        replaced("q", lambda: torch.zeros(a["q"].shape[-2:], dtype=dtype), "k"),
        replaced("k", lambda: torch.zeros((1, *a["k"].shape), dtype=dtype)),
        *(replaced(name, sized(name, d), "sin") for name in ("cos", "sin") for d in (0, 1)),
        replaced("cos", lambda: torch.zeros(a["cos"].shape[0], dtype=table)),
        *(("positions q k", position(bad)) for bad in (-1, p, 2**31 - 1, 2**31, 2**63 - 1, -(2**63))),
        *s.requires_grad(call, "q", "k", "cos", "sin", *weights),
        *s.scalar(call, "interleaved", ("yes", b"1"), (RuntimeError, TypeError))[:2],
        ("q", expanded("q")),
        ("k", expanded("k")),
    ]
    if a["positions"] is not None:
        ways.append(replaced("positions", sized("positions", -1)))
        ways.append(replaced("positions", lambda: a["positions"][..., None, None, None].clone()))
    if weights:
        ways += [
            *s.last_dim(call, *weights),
            *s.shapes(call, weights, ["q", "k"]),
            *s.scalar(call, "eps", BAD_EPS),
            *s.scalar(call, "weight_offset", BAD_OFFSETS),
            *s.scalar(call, "rounding", BAD_ROUNDINGS),
        ]
    if call.written:
        others = ["cos", "sin", *weights, *(["positions"] if a["positions"] is not None else [])]
        ways += s.overlap(call, ("q", "k"), *((w, o) for w in ("q", "k") for o in others))
    return ways


ROW_OPS: dict[str, Callable[[Sampler], Call]] = {
    "quantize_int8": quantize_int8,
    "quantize_int8_asym": quantize_int8_asym,
    "quantize_int8_static": quantize_int8_static,
    "rms_norm": norm("rms_norm", add=False, int8=False),
    "add_rms_norm": norm("add_rms_norm", add=True, int8=False),
    "rms_norm_int8": norm("rms_norm_int8", add=False, int8=True),
    "add_rms_norm_int8": norm("add_rms_norm_int8", add=True, int8=True),
    "rotary": rotary,
    "rotary_": lambda s: rotary(s, in_place=True),
    "qk_norm_rotary": lambda s: rotary(s, normed=True),
    "qk_norm_rotary_": lambda s: rotary(s, in_place=True, normed=True),
    "silu_mul": silu_mul,
    "silu_mul_int8": lambda s: silu_mul(s, int8=True),
}
