"""Random calls of attention_block and mlp_block, which must give what the chain of operators gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import qops
from qops.ops._checks import INT4_KINDS
from qops.ops.decoder_block import INPUTS
from qops.testing import FLOAT_DTYPES, generator
from tests.support.ops.block_chain import attention_chain, mlp_chain
from tests.support.ops.blocks import INT8_PRODUCTS, Weight, block_weight, of_weight
from tests.support.properties.property_calls import Call, Fault
from tests.support.properties.property_draws import INT64, Sampler, Strategy
from tests.support.properties.property_gemm import give_weight, untyped
from tests.support.properties.property_rows import (
    BAD_EPS,
    BAD_OFFSETS,
    BAD_ROUNDINGS,
    F32,
    INT8,
    Ways,
    finish,
    norm_style,
)

HIDDEN = (16, 8, 32, 48, 72)
NOT_FINITE = (float("nan"), float("inf"), -float("inf"), 1e39)
NEGATIVE = (-1, -(2**63), 2**63 - 1)
PARTS = ("", "_scales", "_zeros", "_perm", "_bias", "_kind", "_input")
# bits, kind and input.
PRODUCTS = [(4, kind, "float") for kind in INT4_KINDS] + [(8, kind, "float") for kind in ("symmetric", "offset")]


def linear(s: Sampler, name: str, n: int, k: int, *, may_be_mixed: bool = False) -> tuple[dict[str, Any], Weight]:
    bits, kind, given = s.choice(s.choice((PRODUCTS, INT8_PRODUCTS)))
    is_w8a8 = bits == 8 and given != "float"
    groups = [] if is_w8a8 else [g for g in range(16, k, 16) if k % g == 0]
    weight = block_weight(
        n,
        k,
        bits=bits,
        kind=kind,
        group=s.choice([k, *groups]),
        scales=s.dtype(),
        act_order=not is_w8a8 and s.one_in(3),
        mixed=may_be_mixed and s.one_in(2),
        seed=s.integer(0, 2**20),
    )
    bias = s.contiguous(s.values((n,), s.dtype())) if s.one_in(2) else None
    return of_weight(name, weight, bias, given), weight


def inputs_of(a: dict[str, Any], *names: str) -> dict[str, str]:
    """As the typed functions take them."""
    return {f"{name}_input": INPUTS[a[f"{name}_input"]] for name in names}


def norms(s: Sampler, h: int) -> dict[str, Any]:
    found: dict[str, Any] = {"norm": s.contiguous(s.values((h,), s.dtype()))}
    found["post_norm"] = s.contiguous(s.values((h,), s.dtype())) if s.one_in(3) else None
    return found | norm_style(s)


def mlp_block(s: Sampler) -> Call:
    h, columns, leading = s.choice(HIDDEN), s.choice((16, 8, 24, 40)), s.leading()
    dtype = s.dtype()
    x = s.rows(s.values((*leading, h), dtype))
    arguments: dict[str, Any] = {"x": x} | norms(s, h)
    gate_up, first = linear(s, "gate_up", 2 * columns, h, may_be_mixed=True)
    down, last = linear(s, "down", h, columns)
    arguments |= gate_up | {"mixed_gate_up": first.mixed_gate_up} | down
    call = Call("mlp_block", "default", arguments, lambda a: (mlp_chain(a),), [((*leading, h), dtype)])

    def typed(a: dict[str, Any], weights: tuple[Weight, Weight]) -> object:
        named = ("gate_up_bias", "down_bias", "post_norm", "weight_offset", "rounding")
        more = {name: a[name] for name in named} | inputs_of(a, "gate_up", "down")
        return qops.mlp_block(a["x"], a["norm"], a["eps"], *weights, **more)

    give_weight(call, typed, (first, last))
    return finish(s, call, lambda: block_ways(s, call, {"gate_up": (2 * columns, h), "down": (h, columns)}))


def attention_block(s: Sampler) -> Call:
    batch, t, h = s.choice((1, 2, 0)), s.choice((1, 2, 3, 8, 0)), s.choice(HIDDEN)
    kv_heads, group, d = s.choice((1, 2, 3)), s.choice((1, 2, 3)), s.choice((8, 16, 24, 40))
    rows, dtype = t + s.choice((1, 0, 5, 130, 17)), s.dtype()
    arguments: dict[str, Any] = {"x": s.rows(s.values((batch, t, h), dtype))} | norms(s, h)
    shapes = {"qkv": ((group + 2) * kv_heads * d, h), "o": (h, group * kv_heads * d)}
    qkv, first = linear(s, "qkv", *shapes["qkv"])
    o, last = linear(s, "o", *shapes["o"])
    arguments |= qkv
    for name in ("q_norm", "k_norm"):
        arguments[name] = s.contiguous(s.values((d,), s.dtype())) if s.one_in(3) else None
    arguments |= {"cos": None, "sin": None, "positions": None}
    if not s.one_in(4):
        tables, pairs, p = s.choice((dtype, F32)), s.integer(0, d // 2), t + s.integer(1, 3)
        arguments |= {name: s.strided(s.values((p, pairs), tables)) for name in ("cos", "sin")}
        if s.one_in(2):
            sizes = s.choice(((t,), (batch, t)))
            values = torch.tensor([s.integer(0, p - 1) for _ in range(torch.Size(sizes).numel())]).view(sizes)
            arguments["positions"] = s.strided(values.to(s.choice((torch.int32, torch.int64))))
    for name in ("keys", "values"):
        arguments[name] = s.rows(s.values((batch, kv_heads, rows, d), dtype), writable=True)
    arguments |= o | {"scale": s.choice((0.25, 1.0, -0.5, 0.0, 3e38)), "mask": None}
    if s.one_in(2):
        sizes = (s.choice((batch, 1)), 1, s.choice((t, 1)), rows)
        arguments["mask"] = s.strided(torch.rand(sizes, generator=generator(s.integer(0, 2**20))) < 0.7)
    arguments["window"] = s.choice((0, 1, 3, 130, 2**62)) if arguments["mask"] is None else 0
    arguments["softcap"] = s.choice((0.0, 2.0, 50.0, 1e-30))
    arguments["first_position"] = s.choice((0, 1, 127, 1000, 2**61))
    call = Call("attention_block", "default", arguments, attention_chain, [((batch, t, h), dtype)])
    call.written = ("keys", "values")

    def typed(a: dict[str, Any], weights: tuple[Weight, Weight]) -> object:
        named = ("cos", "sin", "positions", "qkv_bias", "o_bias", "q_norm", "k_norm", "post_norm", "weight_offset")
        more = {name: a[name] for name in (*named, "rounding", "scale", "mask", "window", "softcap", "first_position")}
        more |= inputs_of(a, "qkv", "o")
        return qops.attention_block(a["x"], a["norm"], a["eps"], *weights, a["keys"], a["values"], **more)

    give_weight(call, typed, (first, last))
    return finish(s, call, lambda: attention_ways(s, call, shapes))


def replaced(
    call: Call, name: str, value: Callable[[], Any], *blamed: str, kinds: Any = (ValueError,), fake: bool = True
) -> Any:
    """Nothing where the value is None."""

    def replace() -> Fault | None:
        other = value()
        if other is None:
            return None
        call.arguments[name] = other
        return Fault((name, *blamed), kinds, fake=fake)

    return (" ".join((name, *blamed)), replace)


def of_weights(names: Iterable[str]) -> list[str]:
    """What the typed functions take out of their weights."""
    return [name + part for name in names for part in PARTS if part != "_bias"]


def linear_ways(s: Sampler, call: Call, name: str, k: int) -> Ways:
    a = call.arguments
    packed, scales, zeros, perm, bias, kind, given = (name + part for part in PARTS)
    has_8_bits = a[packed].dtype == INT8

    def bad_perm() -> Tensor | None:
        if a[perm] is None or k == 0 or 0 in a["x"].shape:
            return None
        indices = a[perm].clone()
        indices[s.integer(0, k - 1)] = s.choice((-1, k, 2**31 - 1, -(2**31)))
        return indices

    def zeros_or_none() -> Fault:
        a[zeros] = torch.zeros(a[scales].shape, dtype=torch.uint8) if a[zeros] is None else None
        return Fault((zeros,), (ValueError,))

    kinds = (1, 2, -1, 4, *INT64[3:]) if has_8_bits else (-1, 4, *INT64[3:])
    inner = [arg for arg in (packed, scales, zeros, perm) if a[arg] is not None]
    related = ("gate_up", "down") if call.op == "mlp_block" else ("keys", "o", "qkv")
    ways: Ways = [
        *s.shapes(call, [arg for arg in inner if arg != packed], (scales, zeros)),
        *s.shapes(call, [packed], (*related, "x", scales)),
        *s.not_contiguous(call, *inner),
        *s.scalar(call, kind, kinds),
        *s.scalar(call, given, (-1, 6, *INT64[3:]) if has_8_bits else (-1, 4, 5, 6, *INT64[3:])),
        replaced(call, perm, bad_perm, fake=False),
        (f"{zeros} {scales}", zeros_or_none),
        *s.requires_grad(call, scales),
    ]

    ways = untyped(call, ways, *of_weights([name]))
    if a[bias] is not None:
        ways += [*s.shapes(call, [bias]), *s.last_dim(call, bias), *s.requires_grad(call, bias)]
    return ways


def block_ways(s: Sampler, call: Call, shapes: dict[str, tuple[int, int]]) -> Ways:
    a = call.arguments
    dtypes: dict[str, tuple[torch.dtype, ...]] = {
        name: FLOAT_DTYPES for name in ("x", "norm", "post_norm", "q_norm", "k_norm", "cos", "sin", "keys", "values")
    }
    dtypes |= {"positions": (torch.int32, torch.int64), "mask": (torch.bool,)}
    weights = [name for name in ("norm", "post_norm", "q_norm", "k_norm") if a.get(name) is not None]
    optional = [
        *weights[1:],
        "mask",
        "positions",
        "cos",
        "sin",
        *(name + part for name in shapes for part in ("_perm", "_bias", "_zeros")),
    ]
    for name in shapes:
        dtypes |= {name: (torch.uint8, INT8), f"{name}_scales": (*FLOAT_DTYPES, INT8), f"{name}_bias": FLOAT_DTYPES}
        dtypes |= {f"{name}_zeros": (torch.uint8,) if a[f"{name}_kind"] == 1 else FLOAT_DTYPES}
        dtypes |= {f"{name}_perm": (torch.int32,)}

    tensors = s.tensor_faults(call, dtypes, ["keys", "values", "cos", "sin", "x"], optional)

    def offset_with_hf() -> Fault:
        a.update(weight_offset=1.0, rounding="hf")
        return Fault(("rounding", "weight_offset"), (ValueError,))

    def odd_h() -> Tensor:
        return torch.zeros((*a["x"].shape[:-1], a["x"].shape[-1] + s.choice((1, 4, 8))), dtype=a["x"].dtype)

    return [
        *untyped(call, tensors, *of_weights(shapes)),
        *s.last_dim(call, "x", *weights),
        *s.shapes(call, weights),
        *s.scalar(call, "eps", BAD_EPS),
        *s.scalar(call, "weight_offset", BAD_OFFSETS),
        *s.scalar(call, "rounding", BAD_ROUNDINGS),
        ("rounding weight_offset", offset_with_hf),
        replaced(call, "x", odd_h, "norm", "keys"),
        *s.requires_grad(call, "x", *weights),
        *(way for name, (_, k) in shapes.items() for way in linear_ways(s, call, name, k)),
    ]


def attention_ways(s: Sampler, call: Call, shapes: dict[str, tuple[int, int]]) -> Ways:
    a = call.arguments
    (batch, t, h), (_, kv_heads, rows, d), dtype = a["x"].shape, a["keys"].shape, a["x"].dtype

    def other_float(name: str) -> Callable[[], Tensor]:
        return lambda: a[name].to(s.choice([other for other in FLOAT_DTYPES if other != a[name].dtype]))

    def of_shape(name: str, *shape: int) -> Any:
        return replaced(call, name, lambda: torch.zeros(shape, dtype=dtype), "keys", "values", "mask", "o", "positions")

    def bad_position() -> Tensor | None:
        if a["positions"].numel() == 0 or a["cos"].shape[1] == 0 or batch * t * h == 0:
            return None
        bad = s.choice((-1, a["cos"].shape[0], 2**31 - 1, 2**31, -(2**63)))
        positions = a["positions"].clone().contiguous().to(torch.int64 if abs(bad) >= 2**31 else a["positions"].dtype)
        positions.view(-1)[s.integer(0, positions.numel() - 1)] = bad
        return positions

    def twice(name: str) -> Callable[[], Tensor | None]:
        def make() -> Tensor | None:
            many = [dim for dim in range(3) if a[name].shape[dim] > 1]
            if not many or a[name].numel() == 0:
                return None
            dim = s.choice(many)
            return a[name].narrow(dim, 0, 1).clone().expand(a[name].shape)

        return make

    read = [name for name, _ in call.tensors() if name not in call.written and not name.endswith("_perm")]
    overlap = s.overlap(call, ("keys", "values"), *((w, other) for w in call.written for other in read))
    ways: Ways = [
        *block_ways(s, call, shapes),
        *(replaced(call, name, other_float(name), kinds=(RuntimeError,)) for name in ("keys", "values")),
        *s.last_dim(call, "keys", "values"),
        *s.shapes(call, ["values"]),
        of_shape("x", t, h),
        of_shape("x", batch, 9, h),
        of_shape("x", batch + 1, t, h),
        of_shape("keys", batch, kv_heads, rows, d, 1),
        of_shape("keys", batch, kv_heads, rows, d + 1),
        of_shape("keys", batch, 0, rows, d),
        of_shape("keys", batch, shapes["o"][1] // d + 1, rows, d),
        *([of_shape("keys", batch, kv_heads, t - 1, d)] if t > 0 else []),
        *(replaced(call, name, twice(name), fake=False) for name in call.written),
        *s.scalar(call, "scale", NOT_FINITE),
        *s.scalar(call, "softcap", (*NOT_FINITE, -1.0)),
        *s.scalar(call, "window", NEGATIVE),
        *s.scalar(call, "first_position", NEGATIVE),
        *s.requires_grad(call, "keys", "values"),
        *untyped(call, overlap, *of_weights(shapes)),
    ]
    if a["mask"] is not None:
        wrong = (lambda m: m[0], lambda m: m.expand(m.shape[0], 2, *m.shape[2:]), lambda m: torch.cat((m, m, m), 3))
        ways += [replaced(call, "mask", lambda: s.choice(wrong)(a["mask"]) if a["mask"].numel() else None)]
        ways += s.scalar(call, "window", (1, 2**62))
    if a["cos"] is None:
        ways += [
            replaced(call, "sin", lambda: torch.zeros(9, 1)),
            replaced(call, "positions", lambda: torch.zeros(t, dtype=torch.int64)),
        ]
        return ways
    p = a["cos"].shape[0]

    def one_alone() -> Fault:
        a[s.choice(("cos", "sin"))] = None
        return Fault(("sin",), (ValueError,))

    ways += [
        ("cos sin", one_alone),
        replaced(call, "sin", other_float("sin"), kinds=(RuntimeError,)),
        replaced(call, "cos", lambda: torch.zeros(p, d // 2 + 1, dtype=a["cos"].dtype), "sin"),
        replaced(call, "cos", lambda: torch.zeros(p, dtype=a["cos"].dtype), "sin"),
        *s.shapes(call, ["sin"]),
        *s.requires_grad(call, "cos", "sin"),
    ]
    if a["positions"] is not None:
        ways += [
            replaced(call, "positions", bad_position, "cos", fake=False),
            replaced(call, "positions", lambda: a["positions"][..., None, None, None].clone()),
            replaced(call, "positions", lambda: torch.zeros(t + 1, dtype=torch.int64)),
        ]
    return ways


CALLS: dict[str, Strategy] = {"attention_block": attention_block, "mlp_block": mlp_block}
