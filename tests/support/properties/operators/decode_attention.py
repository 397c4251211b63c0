"""Random calls of decode_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import qops
from qops.testing import FLOAT_DTYPES, generator
from tests.support.ops.attention_oracle import decode_attention_exact
from tests.support.properties.property_calls import Call, Fault
from tests.support.properties.property_draws import Sampler, Strategy
from tests.support.properties.property_rows import Ways, finish, give_outputs, out_of, output_ways

NOT_FINITE = (float("nan"), float("inf"), -float("inf"), 1e39)
NEGATIVE = (-1, -(2**63), 2**63 - 1)


def decode_attention(s: Sampler) -> Call:
    batch, t = s.choice((1, 2, 0)), s.choice((1, 2, 3, 8, 0))
    kv_heads, group = s.choice((1, 2, 3)), s.choice((1, 3, 4, 7, 0))
    d, rows = s.choice((16, 8, 1, 7, 33, 64, 0)), t + s.choice((1, 0, 5, 130, 17))
    dtype = s.dtype()
    q = s.rows(s.values((batch, t, kv_heads * group, d), dtype))
    k, v = (s.rows(s.values((batch, kv_heads, rows, d), dtype)) for _ in range(2))
    mask = None
    if s.one_in(2):
        sizes = (s.choice((batch, 1)), 1, s.choice((t, 1)), rows)
        mask = s.strided(torch.rand(sizes, generator=generator(s.integer(0, 2**20))) < 0.7)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "scale": s.choice((0.25, 1.0, -0.5, 0.0, 3e38)), "mask": mask}
    arguments |= {
        "window": s.choice((0, 1, 3, 130, 2**62)) if mask is None else 0,
        "softcap": s.choice((0.0, 2.0, 50.0, 1e-30)),
    }
    arguments["first_position"] = s.choice((0, 1, 127, 1000, 2**61))
    shape = tuple(q.shape)

    def expected(a: dict[str, Any]) -> tuple[Tensor, ...]:
        return (decode_attention_exact(**{name: a[name] for name in arguments}),)

    call = Call("decode_attention", "default", arguments, expected, [(shape, dtype)])
    call.typed = lambda a: qops.decode_attention(**a)
    if s.one_in(2):
        call.overload = "out"
        arguments_of = dict(arguments)
        call.arguments = arguments_of
        give_outputs(s, call, "out")
        call.typed = lambda a: qops.decode_attention(**{n: a[n] for n in arguments}, out=out_of(call, a))
    return finish(s, call, lambda: ways_of(s, call))


def ways_of(s: Sampler, call: Call) -> Ways:
    a = call.arguments
    dtype, t, kv_heads = a["q"].dtype, a["q"].shape[1], a["k"].shape[1]

    def replaced(name: str, value: Callable[[], Tensor | None], *blamed: str, kinds: Any = (ValueError,)) -> Any:
        def replace() -> Fault | None:
            other = value()
            if other is None:
                return None
            a[name] = other
            return Fault((name, *blamed), kinds)

        return (" ".join((name, *blamed)), replace)

    def many_tokens() -> Tensor | None:
        return a["q"].new_zeros((a["q"].shape[0], 9, *a["q"].shape[2:]))

    def odd_heads() -> Tensor | None:
        sizes = (*a["q"].shape[:2], kv_heads + 1, a["q"].shape[3])
        return None if kv_heads == 1 else a["q"].new_zeros(sizes)

    def few_rows() -> Tensor | None:
        return None if t == 0 else a["k"][:, :, : t - 1].clone()

    def other_float(name: str) -> Callable[[], Tensor]:
        return lambda: a[name].detach().to(s.choice([other for other in FLOAT_DTYPES if other != dtype]))

    floats = ("q", "k", "v")
    ways: Ways = [
        *s.tensor_faults(
            call,
            {name: FLOAT_DTYPES for name in (*floats, "out")} | {"mask": (torch.bool,)},
            ["k", "v", "out"],
            ["mask"],
        ),
        *(replaced(name, other_float(name), kinds=(RuntimeError,)) for name in ("k", "v")),
        *s.last_dim(call, *floats),
        *s.shapes(call, ["v"], ["k"]),
        replaced("q", many_tokens, "out", "k", "mask"),
        replaced("q", odd_heads, "out", "k"),
        replaced("k", few_rows, "q", "v", "mask"),
        replaced("q", lambda: torch.zeros(a["q"].shape[1:], dtype=dtype)),
        replaced("k", lambda: torch.zeros((*a["k"].shape, 1), dtype=dtype)),
        replaced("k", lambda: a["k"].new_zeros((a["k"].shape[0] + 1, *a["k"].shape[1:])), "v"),
        replaced("k", lambda: a["k"].new_zeros((*a["k"].shape[:3], a["k"].shape[3] + 1)), "v"),
        *s.scalar(call, "scale", NOT_FINITE),
        *s.scalar(call, "softcap", (*NOT_FINITE, -1.0)),
        *s.scalar(call, "window", NEGATIVE),
        *s.scalar(call, "first_position", NEGATIVE),
        *s.requires_grad(call, *floats),
    ]
    if a["mask"] is not None:
        wrong = (lambda m: m[0], lambda m: m.expand(m.shape[0], 2, *m.shape[2:]), lambda m: torch.cat((m, m, m), 3))
        ways += [replaced("mask", lambda: s.choice(wrong)(a["mask"]) if a["mask"].numel() else None)]
        ways += s.scalar(call, "window", (1, 2**62))
    return [*ways, *output_ways(s, call, floats)] if call.written else ways


CALLS: dict[str, Strategy] = {"decode_attention": decode_attention}
