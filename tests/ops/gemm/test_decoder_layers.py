"""decoder_layers: the bits, the texts of errors and the writes of attention_block and mlp_block in turn."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qops.ops.decoder_block import PARTS, SETTINGS
from qops.testing import FLOAT_DTYPES, assert_bitwise
from tests.support.ops.block_chain import attention_chain, mlp_chain
from tests.support.ops.blocks import attention_arguments, mlp_arguments
from tests.support.properties.overloads import STRATEGIES
from tests.support.properties.property_draws import HUGE, Sampler

OP = torch.ops.qops.decoder_layers
Layer = tuple[dict[str, Any], dict[str, Any]]
STYLE = ("eps", "weight_offset", "rounding")
TABLES = ("cos", "sin", "positions")


def of_layers(layers: list[Layer]) -> dict[str, Any]:
    """Arguments of the operator, by those of both blocks of each layer. What all share is the first one's."""
    first = layers[0][0]
    found: dict[str, Any] = {name: first[name] for name in ("x", *STYLE, "scale", *TABLES, "mask")}
    parts, settings = [], []
    for number, (attention, mlp) in enumerate(layers):
        norms = {"mlp_norm": mlp["norm"], "mlp_post_norm": mlp["post_norm"]}
        every = {**mlp, **attention, **norms, "rotates": any(attention[name] is not None for name in TABLES)}
        every["number"] = number
        parts += [every[name] for name in PARTS]
        settings += [int(every[name]) for name in SETTINGS]
    caches = {name: [attention[name] for attention, _ in layers] for name in ("keys", "values")}
    return {**found, "weights": parts, "settings": settings, **caches}


def chain(layers: list[Layer]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What every layer gives, and the caches as they are then."""
    first, outputs, keys, values = layers[0][0], [], [], []
    x = first["x"]
    for attention, mlp in layers:
        shared = {name: first[name] for name in (*TABLES, "scale", "mask")}
        if attention["cos"] is None:
            shared |= dict.fromkeys(TABLES)
        x, k, v = attention_chain({**attention, **shared, **{name: first[name] for name in STYLE}, "x": x})
        x = mlp_chain({**mlp, **{name: first[name] for name in STYLE}, "x": x})
        outputs.append(x)
        keys.append(k)
        values.append(v)
    return torch.stack(outputs), keys, values


def check(layers: list[Layer], what: object = "") -> None:
    want, keys, values = chain(layers)
    given = of_layers(layers)
    got = OP(**given)
    assert got.is_contiguous()
    assert_bitwise(got, want, f"{what}")
    for name, caches in (("keys", keys), ("values", values)):
        for cache, expected in zip(given[name], caches, strict=True):
            assert_bitwise(cache, expected, f"{name} of {what}")


def layer(dtype: torch.dtype, batch: int, t: int, past: int, seed: int, **more: Any) -> Layer:
    names = ("bits", "kind", "given", "post_norm", "style", "bias", "act_order")
    mlp = {name: more[name] for name in names if name in more}
    return (
        attention_arguments(dtype, batch, t, past, seed=seed, **more),
        mlp_arguments(dtype, (batch, t), mixed=seed % 2 == 0, seed=seed, **mlp),
    )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_the_bits_of_the_blocks(dtype):
    kinds = [
        {"kind": "offset"},
        {"bits": 8, "kind": "symmetric", "given": "255"},
        {"kind": "zero_point", "act_order": True, "given": "127"},
        {"bits": 8, "kind": "symmetric"},
    ]
    for (batch, t, past), count in itertools.product(((1, 1, 130), (2, 3, 5), (1, 8, 260), (3, 1, 0)), (1, 2, 5)):
        for post_norm, style in ((False, ("hf", 0.0)), (True, ("fp32", 1.0))):
            more = {"post_norm": post_norm, "style": style, "bias": torch.float32 if post_norm else None}
            layers = [layer(dtype, batch, t, past, i, **kinds[i % 4], **more) for i in range(count)]
            check(layers, f"{count} layers, B = {batch}, T = {t} behind {past}, {more}")


def test_what_differs_from_layer_to_layer():
    dtype = torch.bfloat16
    for positions in (None, torch.int64):
        layers = [layer(dtype, 2, 2, 30, 0, positions=positions, how={"window": 3, "first_position": 100})]
        layers.append(layer(dtype, 2, 2, 9, 1, rotary=0))
        layers.append(layer(dtype, 2, 2, 200, 2, heads=(6, 3), qk_norm=True, how={"window": 150}))
        layers.append(layer(dtype, 2, 2, 30, 3, h=64, heads=(2, 1), d=24 if positions is None else 16))
        check(layers, f"{positions}")
    masked = [layer(dtype, 1, 3, 12, i) for i in range(3)]
    masked[0][0]["mask"] = torch.rand(1, 1, 3, 15, generator=torch.Generator().manual_seed(0)) < 0.7
    check(masked, "a mask")


def test_layers_may_share_a_cache_and_weights():
    """One after the other, as the blocks would."""
    attention, mlp = layer(torch.float32, 1, 2, 20, 0)
    given, x = of_layers([(attention, mlp)] * 3), attention["x"]
    cache = {name: attention[name].clone() for name in ("keys", "values")}
    want = []
    for _ in range(3):
        x = torch.ops.qops.mlp_block(**{**mlp, "x": torch.ops.qops.attention_block(**{**attention, "x": x, **cache})})
        want.append(x)
    assert_bitwise(OP(**given), torch.stack(want))
    for name, expected in cache.items():
        assert_bitwise(attention[name], expected, name)


@pytest.mark.parametrize("sizes", [(0, 1), (2, 0)], ids=str)
def test_nothing_to_compute(sizes):
    layers = [layer(torch.float32, *sizes, 4, i) for i in range(2)]
    assert OP(**of_layers(layers)).shape == (2, *sizes, 64)
    none = of_layers(layers) | {"weights": [], "settings": [], "keys": [], "values": []}
    assert OP(**none).shape == (0, *sizes, 64)


def texts(given: dict[str, Any], *, fakes: bool = True) -> list[str]:
    """The errors of a call with tensors and with fake ones, nothing being written."""
    caches = [
        cache
        for cache in (*given["keys"], *given["values"])
        if isinstance(cache, Tensor) and cache.dtype in FLOAT_DTYPES
    ]
    before = [cache.clone() for cache in caches]
    mode, found = FakeTensorMode(), []

    def faked(value: Any) -> Any:
        if isinstance(value, list):
            return [faked(item) for item in value]
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    calls = [given, {name: faked(value) for name, value in given.items()}] if fakes else [given]
    for arguments in calls:
        with pytest.raises((ValueError, RuntimeError)) as error:
            OP(**arguments)
        found.append(f"{type(error.value).__name__}: {error.value}")
    for cache, held in zip(caches, before, strict=True):
        assert_bitwise(cache, held)
    return found


def test_lists_of_a_wrong_length():
    given = of_layers([layer(torch.float32, 1, 1, 4, i) for i in range(3)])
    for name, each in (("weights", len(PARTS)), ("settings", len(SETTINGS)), ("values", 1)):
        for wrong in (given[name][:-1], [*given[name], given[name][0]]):
            text = f"ValueError: qops.decoder_layers: {name} must hold {each} for each of 3 layers, got {len(wrong)}"
            assert texts({**given, name: wrong}) == [text, text]


@pytest.mark.parametrize("part", [name for name in PARTS if name.endswith("scales") or name in ("norm", "o", "down")])
def test_parts_that_are_needed(part):
    given = of_layers([layer(torch.float32, 1, 1, 4, i) for i in range(3)])
    given["weights"][len(PARTS) + PARTS.index(part)] = None
    text = f"RuntimeError: qops.decoder_layers: layer 1: {part} must be a tensor, got None"
    assert texts(given) == [text, text]


def test_errors_name_the_layer_by_its_number():
    """Of the checks, of the kernels and of both blocks; what is wrong of the numbers that stay without one."""
    for part, value, text in (
        ("o_scales", torch.ones(4), r"o_scales must have shape \[S, K / group_size, 16\] with S = 4, got \[4\]"),
        ("mlp_norm", torch.ones(9), r"mlp_norm must have shape \[H\] = \[64\], got \[9\]"),
        ("k_norm", torch.ones(9), r"k_norm must have shape \[D\] = \[16\], got \[9\]"),
        ("qkv_perm", torch.full((64,), -3).int(), r"qkv_perm must hold indices in 0 \.\. 63, got -3"),
        ("down_perm", torch.full((96,), 96).int(), r"down_perm must hold indices in 0 \.\. 95, got 96"),
    ):
        for index, number in ((0, 7), (2, 2**40)):
            given = of_layers([layer(torch.float32, 1, 1, 4, i) for i in range(3)])
            given["weights"][index * len(PARTS) + PARTS.index(part)] = value
            given["settings"][(index + 1) * len(SETTINGS) - 1] = number
            for found in texts(given, fakes="perm" not in part):
                assert re.fullmatch(f"ValueError: qops.decoder_layers: layer {number}: {text}", found), found
    given = of_layers([layer(torch.float32, 1, 1, 4, i, positions=torch.int64) for i in range(3)])
    given["positions"] = torch.full_like(given["positions"], -1)
    (found,) = texts(given, fakes=False)
    assert found.startswith("ValueError: qops.decoder_layers: positions must ")


def as_one_layer(op: str, a: dict[str, Any]) -> dict[str, Any]:
    """A call of a block as half of a layer, whose other half fits."""
    x = a["x"]
    (batch, t, h), style = x.shape, {name: a[name] for name in STYLE}
    if op == "attention_block":
        return of_layers([(a, mlp_arguments(x.dtype, (batch, t), h, 16))])
    return of_layers([(attention_arguments(x.dtype, batch, t, 3, h, (2, 1), 8) | style | {"x": x}, a)])


@pytest.mark.parametrize("op", ["attention_block", "mlp_block"])
def test_what_a_block_refuses_is_refused_with_its_words(op):
    rng, seen = random.Random(op), []
    with torch.no_grad():
        for _ in range(800):
            call = STRATEGIES[op](Sampler(rng.randint))
            a, x = call.arguments, call.arguments["x"]
            tensors = [t for _, t in call.tensors()]
            if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES or x.dim() != 3 or x.shape[2] % 8 or call.grad:
                continue
            if (
                len(call.faults) > 1
                or x.shape[1] > 8
                or any(t.is_meta or max(t.shape, default=1) >= HUGE for t in tensors)
            ):
                continue
            try:
                getattr(torch.ops.qops, op)(**a)
                continue
            except (ValueError, RuntimeError) as error:
                text = f"{type(error).__name__}: {error}"
            if f"qops.{op}: " not in text or " softcap must " in text:  # torch's own, and what layers do not have
                continue
            if a.get("keys", x) is None or a.get("values", x) is None:  # no item of torch's lists
                continue
            given = as_one_layer(op, a)
            # What the stable ABI has no name for, fake tensors have one for.
            fakes = all(fault.fake for fault in call.faults) and "another dtype" not in text
            of_layer = "qops.decoder_layers: layer 0: "
            expected = text.replace(f"qops.{op}: ", of_layer)
            if op == "mlp_block":
                for name in ("norm", "post_norm"):
                    expected = expected.replace(f"{of_layer}{name} ", f"{of_layer}mlp_{name} ")
            assert set(texts(given, fakes=fakes)) == {expected}
            seen.append(text)
    assert len(set(seen)) > 25
