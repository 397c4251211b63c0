"""decoder_layers: the bits, the texts of errors and the writes of attention_block and mlp_block in turn."""

from __future__ import annotations

import gc
import itertools
import random
import re
import weakref
from collections.abc import Callable
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


def chain(layers: list[Layer]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
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
    return outputs, keys, values


def plan_of(given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """What `decoder_plan` gives, and the other arguments of `decoder_layers.planned`."""
    names = ("weights", "settings", *STYLE, "scale")
    rest = {name: value for name, value in given.items() if name not in names}
    rest["first_positions"] = given["settings"][SETTINGS.index("first_position") :: len(SETTINGS)]
    return torch.ops.qops.decoder_plan(**{name: given[name] for name in names}), rest


def planned(given: dict[str, Any]) -> list[Tensor]:
    """The same call by a plan."""
    plan, rest = plan_of(given)
    return OP.planned(**rest, plan=plan)


def check(layers: list[Layer], what: object = "") -> None:
    want, keys, values = chain(layers)
    given = of_layers(layers)
    before = {name: [cache.clone() for cache in given[name]] for name in ("keys", "values")}
    for call in (lambda: OP(**given), lambda: planned(given)):
        for name, caches in before.items():
            for cache, held in zip(given[name], caches, strict=True):
                cache.copy_(held)
        for index, (y, expected) in enumerate(zip(call(), want, strict=True)):
            assert y.is_contiguous()
            assert_bitwise(y, expected, f"layer {index} of {what}")
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
    assert_bitwise(torch.stack(OP(**given)), torch.stack(want))
    for name, expected in cache.items():
        assert_bitwise(attention[name], expected, name)


@pytest.mark.parametrize("sizes", [(0, 1), (2, 0)], ids=str)
def test_nothing_to_compute(sizes):
    layers = [layer(torch.float32, *sizes, 4, i) for i in range(2)]
    for call in (lambda given: OP(**given), planned):
        assert [y.shape for y in call(of_layers(layers))] == [(*sizes, 64)] * 2
    none = of_layers(layers) | {"weights": [], "settings": [], "keys": [], "values": []}
    assert OP(**none) == []


def texts(given: dict[str, Any], *, fakes: bool = True) -> list[str]:
    """The errors of a call with tensors and with fake ones, nothing being written; those by a plan are the same."""
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

    def text_of(call: Callable[..., Any], arguments: dict[str, Any]) -> str:
        with pytest.raises((ValueError, RuntimeError)) as error:
            call(arguments)
        return f"{type(error.value).__name__}: {error.value}"

    calls = [given, {name: faked(value) for name, value in given.items()}] if fakes else [given]
    for arguments in calls:
        found.append(text_of(lambda arguments: OP(**arguments), arguments))
    # A plan counts its layers by its settings, and knows its device by the first norm. Beside a mask it has no window.
    fits = len(given["settings"]) == len(SETTINGS) * len(given["keys"]) and given["weights"][0] is not None
    if fits and (given["mask"] is None or ": window must " not in found[0]):
        assert text_of(planned, given).replace("qops.decoder_plan: ", "qops.decoder_layers: ") == found[0]
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


# Plans ---------------------------------------------------------------------------------------------------------------


def some_layers(count: int = 3, **more: Any) -> dict[str, Any]:
    return of_layers([layer(torch.float32, 1, 2, 6, i, **more) for i in range(count)])


def check_as_given(plan: Tensor, rest: dict[str, Any], given: dict[str, Any]) -> None:
    """A call by the plan gives and writes what one with everything does."""
    before = {name: [cache.clone() for cache in given[name]] for name in ("keys", "values")}
    want, written = OP(**given), {name: [cache.clone() for cache in given[name]] for name in before}
    for name, caches in before.items():
        for cache, held in zip(given[name], caches, strict=True):
            cache.copy_(held)
    for index, (y, expected) in enumerate(zip(OP.planned(**rest, plan=plan), want, strict=True)):
        assert_bitwise(y, expected, f"layer {index}")
    for name, caches in written.items():
        for cache, expected in zip(given[name], caches, strict=True):
            assert_bitwise(cache, expected, name)


def test_a_plan_serves_many_calls():
    given = some_layers()
    plan, rest = plan_of(given)
    for _ in range(3):
        check_as_given(plan, rest, given)
        rest["x"] = given["x"] = OP.planned(**rest, plan=plan)[-1]


def test_a_plan_of_more_layers_than_there_are_caches_computes_the_first():
    given = some_layers(4)
    plan, rest = plan_of(given)
    for count in (0, 1, 3):
        lists = {name: rest[name][:count] for name in ("keys", "values", "first_positions")}
        of_each = {"weights": len(PARTS), "settings": len(SETTINGS), "keys": 1, "values": 1}
        fewer = {**given, **{name: given[name][: each * count] for name, each in of_each.items()}}
        check_as_given(plan, {**rest, **lists}, fewer)


def test_lists_that_a_plan_does_not_fit():
    given = some_layers()
    plan, rest = plan_of(given)
    more = {name: [*rest[name], rest[name][0]] for name in ("keys", "values", "first_positions")}
    text = "qops.decoder_layers: keys must hold one for each layer of the plan = 3 at most, got 4"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        OP.planned(**{**rest, **more}, plan=plan)
    for name in ("values", "first_positions"):
        for wrong in (rest[name][:2], more[name]):
            text = f"qops.decoder_layers: {name} must hold 1 for each of 3 layers, got {len(wrong)}"
            with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
                OP.planned(**{**rest, name: wrong}, plan=plan)
    settings = given["settings"]
    for wrong, text in (
        ([], "settings must hold those of a layer, got 0"),
        (settings[:9], "settings must hold those of a layer, got 9"),
        (settings[:-1], f"settings must hold {len(SETTINGS)} for each of 2 layers, got {len(settings) - 1}"),
        (settings[: len(SETTINGS)], f"weights must hold {len(PARTS)} for each of 1 layers, got {3 * len(PARTS)}"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'qops.decoder_plan: {text}')}$"):
            plan_of({**given, "settings": wrong})
    with pytest.raises(RuntimeError, match=r"^qops\.decoder_plan: norm must be a tensor, got None$"):
        plan_of({**given, "weights": [None, *given["weights"][1:]]})


def test_another_tensor_than_a_plan():
    """A copy of one, a view behind it, and memory of any other kind; a view of all of it is as good as itself."""
    given = some_layers()
    plan, rest = plan_of(given)
    text = r"^qops\.decoder_layers: plan must be what decoder_plan has given, got another tensor$"
    for other in (plan.clone(), plan[1:], torch.ones(1, dtype=torch.uint8), torch.zeros(0), given["x"]):
        with pytest.raises(ValueError, match=text):
            OP.planned(**rest, plan=other)
    with pytest.raises(RuntimeError, match=r"^qops\.decoder_layers: plan must be on cpu, got meta$"):
        OP.planned(**rest, plan=plan.to("meta"))
    check_as_given(plan.view(-1), rest, given)


def test_a_window_does_not_count_beside_a_mask():
    """Transformers' masks have it in them."""
    given, windowed = some_layers(), some_layers(how={"window": 3})
    _, rest = plan_of(given)
    plan, _ = plan_of(windowed)
    every = given | {"mask": torch.ones(1, 1, 2, 8, dtype=torch.bool)}
    every["mask"][..., 1:3] = False
    check_as_given(plan, rest | {"mask": every["mask"]}, every)
    apart = OP.planned(**rest, plan=plan)[-1] - OP(**given)[-1]
    assert apart.abs().max() > 0, "without a mask it counts"


def test_tensors_of_a_plan_that_are_changed_in_place():
    given = some_layers()
    plan, rest = plan_of(given)
    kept = [y.clone() for y in OP.planned(**rest, plan=plan)]

    def check_seen(index: int, change: Callable[[], object]) -> None:
        """By layer `index`, and not by those before it."""
        change()
        check_as_given(plan, rest, given)
        got = OP.planned(**rest, plan=plan)
        assert [torch.equal(y, before) for y, before in zip(got, kept, strict=True)] == [n < index for n in range(3)]
        kept[:] = got

    def part(index: int, name: str) -> Tensor:
        return given["weights"][index * len(PARTS) + PARTS.index(name)]

    check_seen(2, lambda: part(2, "norm").mul_(2))
    check_seen(1, lambda: part(1, "down_scales").neg_())
    check_seen(0, lambda: part(0, "o").bitwise_xor_(7))
    norm, scales = part(2, "mlp_norm"), part(1, "qkv_scales")
    check_seen(2, lambda: setattr(norm, "data", 3 * norm.data))
    check_seen(1, lambda: setattr(scales, "data", (2 * scales).clone()))
    part(1, "norm").resize_(72)
    text = r"^qops\.decoder_layers: layer 1: norm must have shape \[H\] = \[64\], got \[72\]$"
    with pytest.raises(ValueError, match=text):
        OP.planned(**rest, plan=plan)


def test_a_plan_keeps_its_tensors_as_long_as_somebody_keeps_it():
    given = some_layers()
    plan, rest = plan_of(given)
    want = OP(**given)
    tensors = [weakref.ref(tensor) for tensor in given["weights"] if tensor is not None]
    gc.disable()
    try:
        del given
        view = plan[:]
        del plan
        assert all(tensor() is not None for tensor in tensors)
        assert_bitwise(OP.planned(**rest, plan=view)[-1], want[-1])
        del view
        assert all(tensor() is None for tensor in tensors)
    finally:
        gc.enable()


def test_plans_do_not_know_each_other():
    """Of two with the same tensors, one may go; a new one may have its memory."""
    given = some_layers()
    first, rest = plan_of(given)
    for _ in range(20):
        second, _ = plan_of(some_layers() | {"scale": 0.5})
        del first
        first, _ = plan_of(given)
        check_as_given(first, rest, given)
        check_as_given(second, rest, given | {"scale": 0.5})


def test_a_fake_plan_is_like_a_real_one():
    given, mode = some_layers(), FakeTensorMode()
    names = ("weights", "settings", *STYLE, "scale")
    fakes = [t if t is None else mode.from_tensor(t) for t in given["weights"]]
    plan, fake = plan_of(given)[0], torch.ops.qops.decoder_plan(**{n: given[n] for n in names} | {"weights": fakes})
    assert (fake.shape, fake.dtype, fake.device) == (plan.shape, plan.dtype, plan.device)
