"""Random calls of the rotary operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import qops
from qops._numerics import rms_norm_exact, rotary_exact
from qops.testing import FLOAT_DTYPES
from tests.support.properties.property_calls import Call, Fault
from tests.support.properties.property_draws import Sampler, Strategy
from tests.support.properties.property_rows import BAD_EPS, BAD_OFFSETS, BAD_ROUNDINGS, F32, Ways, finish, norm_style


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


CALLS: dict[str, Strategy] = {"rotary": rotary, "rotary_": lambda s: rotary(s, in_place=True)}
