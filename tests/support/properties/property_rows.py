"""Random calls of the operators that work on rows: quantisers, norms, rotary, SiLU-mul."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qops.testing import FLOAT_DTYPES
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


def int8_rows(leading: tuple[int, ...], k: int) -> list[Result]:
    return [((*leading, k), INT8), (leading, F32)]


def output_ways(s: Sampler, call: Call, inputs: Sequence[str]) -> Ways:
    """What can be wrong with tensors that the caller gives for results."""
    names = call.written
    pairs = [(a, b) for a in names for b in (*inputs, *names) if a != b]
    return [*s.not_contiguous(call, *names), *s.shapes(call, names), *s.overlap(call, *pairs)]


# --- norms ------------------------------------------------------------------------------------------------------------


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
