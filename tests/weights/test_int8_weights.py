"""The kinds and act-order of Int8Weight: exact values, rows, merging, what is refused."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import qops
from qops.nn import MLP, Int8Embedding, Int8Linear, Int8WeightOnlyLinear, dense_linear
from qops.testing import assert_bitwise, generator
from qops.weights import Int8Weight
from tests.support.ops.exact import fraction, round_to_float32
from tests.support.ops.random_weights import (
    SCALE_DTYPES,
    assert_tensors_equal,
    empty_like,
    random_int8,
    random_levels,
)

KINDS = Int8Weight.KINDS
FORMS = tuple(itertools.product(KINDS, (False, True)))

# Exact values --------------------------------------------------------------------------------------------------------


def exact(tensors: dict[str, Tensor]) -> Tensor:
    """The weight by the formulas of the docstring, in fractions, rounded once to float32."""
    (n_size, k_size), weight = tensors["qweight"].shape, torch.empty(tensors["qweight"].shape)
    group_size = k_size // tensors["scales"].shape[1]
    for n, k in itertools.product(range(n_size), range(k_size)):
        o = fraction(tensors["zeros"][n, k // group_size]) if "zeros" in tensors else 0
        value = fraction(tensors["scales"][n, k // group_size]) * tensors["qweight"][n, k].item() + o
        weight[n, tensors["perm"][k].item() if "perm" in tensors else k] = round_to_float32(value)
    return weight


@pytest.mark.parametrize("kind, act_order", FORMS)
def test_dequantize_is_the_exact_weight_rounded_once(kind, act_order):
    for dtype, (n, k, g), pack in itertools.product(SCALE_DTYPES, ((8, 24, -1), (24, 32, 16)), (True, False)):
        tensors, weight = random_int8(n, k, g, kind, scale_dtype=dtype, act_order=act_order, pack=pack)
        expected = exact(tensors)
        assert torch.equal(weight.dequantize(), expected)
        for narrow in (torch.float16, torch.bfloat16):  # by value: fractions have no -0
            assert torch.equal(weight.dequantize(narrow), expected.to(narrow))
        ids = torch.arange(n).flip(0)
        assert torch.equal(weight.rows(ids), expected[ids])


def test_dequantize_and_rows_do_not_round_twice():
    """-127 s is a tie of float32, and the offset is too small for float64: only its sign breaks the tie."""
    tensors = {
        "qweight": torch.full((8, 16), -127, dtype=torch.int8),
        "scales": torch.full((8, 1), 1.5 * 2**23 + 64),
        "zeros": torch.tensor([-(2.0**-40), 2.0**-40] * 4)[:, None],
    }
    weight = Int8Weight.from_canonical(**tensors, kind="offset")
    for got in (weight.dequantize(), weight.rows(torch.arange(8))):
        assert torch.equal(got, exact(tensors))
        assert (got[0] != got[1]).all()


def test_dequantize_holds_the_ends_of_float32():
    tensors, _ = random_int8(8, 16, -1, "offset", scale_dtype=torch.float32)
    tensors["scales"].fill_(2.0**-149)
    tensors["zeros"].fill_(2.0**-149)
    weight = Int8Weight.from_canonical(**tensors, kind="offset").dequantize()
    assert torch.equal(weight, exact(tensors)) and (weight != 0).any()
    tensors["scales"].fill_(torch.finfo(torch.float32).max)
    overflow = Int8Weight.from_canonical(**tensors, kind="offset").dequantize()
    assert overflow.isinf().any() and not overflow.isnan().any()


def test_products_that_float32_holds_give_its_multiply_add_signs_of_zeros_included():
    """What libggml computes of K-quants: d * sc and dmin * m are exact, so are products with codes of 8 bits less."""
    halves = torch.tensor([0.0, -0.0, 1.0, -0.5, 2.0**-24, -(2.0**-24), 65504.0, 0.0999755859375])
    factors = torch.tensor([0.0, 1.0, 31.0, 63.0])
    values = (halves[:, None] * factors).flatten()
    scales, offsets = (t.flatten()[:, None] for t in torch.meshgrid(values, values, indexing="ij"))
    codes = torch.tensor([0, 1, -1, 31, -32, 127, -127, -128], dtype=torch.int8).repeat(len(scales), 2)
    weight = Int8Weight.from_canonical(codes, scales, kind="offset", zeros=offsets)
    expected = codes.float() * scales + offsets
    assert {0, -(2**31)} <= set(expected.view(torch.int32).unique().tolist())  # zeros of both signs
    assert_bitwise(weight.dequantize(), expected)
    assert_bitwise(weight.rows(torch.arange(len(codes))), expected)
    assert_bitwise(copy.deepcopy(weight).unpack().dequantize(), expected)
    symmetric = Int8Weight.from_canonical(codes, scales)
    assert_bitwise(symmetric.dequantize(), codes.float() * scales)


def test_unsigned_codes_with_zero_points_are_offsets():
    """As the docstring says: s * (q - z), q and z in 0 ... 255, with codes q - 128."""
    rng = generator(1)
    q, z = torch.randint(256, (16, 64), generator=rng), torch.randint(256, (16, 4), generator=rng)
    for dtype in (torch.float16, torch.bfloat16):
        s = torch.randn(16, 4, generator=rng).to(dtype)
        weight = Int8Weight.from_canonical((q - 128).to(torch.int8), s, kind="offset", zeros=s.float() * (128 - z))
        expected = s.double().repeat_interleave(16, 1) * (q - z.repeat_interleave(16, 1))
        assert torch.equal(weight.dequantize(), expected.float())


# Rows of an embedding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, act_order", FORMS)
@pytest.mark.parametrize("group_size", (-1, 16))
def test_rows_are_rows_of_dequantize(group_size, kind, act_order):
    for (n, k), pack in itertools.product(((8, 48), (40, 48), (96, 240)), (True, False)):
        weight = random_int8(n, k, group_size, kind, act_order=act_order, pack=pack)[1]
        whole = {dtype: weight.dequantize(dtype) for dtype in SCALE_DTYPES}
        mixed = [copy.deepcopy(weight).mix_gate_up()] if n % 16 == 0 else []
        for one, shape, dtype, ids_dtype in itertools.product(
            (weight, *mixed), ((), (0,), (5,), (2, 3)), SCALE_DTYPES, (torch.int64, torch.int32)
        ):
            ids = torch.randint(n, shape, generator=generator(n)).to(ids_dtype)
            assert_bitwise(one.rows(ids, dtype), whole[dtype][ids.long()])
        assert_bitwise(weight.rows(torch.arange(n)), whole[torch.float32])
        assert_bitwise(Int8Embedding(weight, torch.float16)(torch.arange(n)), whole[torch.float16])


@pytest.mark.parametrize("kind, act_order", FORMS)
@pytest.mark.parametrize("pack", (True, False))
@pytest.mark.parametrize("bad", (-1, -16, -40, 40, 41, 47, 48, 2**31))
def test_rows_refuse_ids_out_of_range(bad, pack, kind, act_order):
    # Strips end at 48: ids 40 ... 47 are padding.
    weight = random_int8(40, 48, 16, kind, act_order=act_order, pack=pack)[1]
    text = f"^qops.Int8Weight.rows: ids must lie in 0 ... N - 1, with N = 40 rows, got {bad}$"
    with pytest.raises(IndexError, match=text):
        weight.rows(torch.tensor([[0, bad], [39, -50]]))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_scales_of_two_levels(kind):
    for group_size, mixed in itertools.product((16, 32, 64, 128), (False, True)):
        weight = random_levels(48, 512, group_size, kind, bits=8, act_order=group_size == 32)[1]
        whole, ids = weight.dequantize(), torch.arange(48).flip(0)
        assert_bitwise((weight.mix_gate_up() if mixed else weight).rows(ids), whole[ids])
        assert_bitwise(copy.deepcopy(weight).unpack().rows(ids), whole[ids])


@pytest.mark.parametrize("kind, act_order", FORMS)
def test_rows_are_within_half_a_unit_of_float64(kind, act_order):
    weight = random_int8(104, 240, 16, kind, scale_dtype=torch.float32, act_order=act_order)[1]
    ids = torch.randint(104, (300,), generator=generator(1))
    tensors = weight.canonical()
    stored = tensors["qweight"].double() * tensors["scales"].double().repeat_interleave(16, 1)
    if kind == "offset":
        stored += tensors["zeros"].double().repeat_interleave(16, 1)
    want = stored if not act_order else torch.empty_like(stored).index_copy_(1, tensors["perm"].long(), stored)
    for dtype, bits in ((torch.float32, 24), (torch.bfloat16, 8), (torch.float16, 11)):
        error = (weight.rows(ids, dtype).double() - want[ids]).abs()
        # Rounded to float32 first; the least float16 is 2^-24.
        assert bool((error <= want[ids].abs() * (2.0**-bits + 2.0**-24) + 2.0**-25).all())


def test_rows_in_other_dtypes_and_of_ids_that_lie_apart():
    for pack in (True, False):
        weight = random_int8(40, 48, 16, "offset", pack=pack)[1]
        ids = torch.randint(40, (6, 4, 2), generator=generator(1))
        for dtype in (torch.float64, torch.float8_e4m3fn):
            want = weight.dequantize(dtype).view(torch.uint8).view(40, -1)
            assert torch.equal(weight.rows(ids, dtype).view(torch.uint8).view(6, 4, 2, -1), want[ids])
        for apart in (ids[::2, :, 0], ids.permute(2, 1, 0), ids[:, :1].expand(6, 9, 2)):
            assert_bitwise(weight.rows(apart), weight.dequantize()[apart])


def test_threads_do_not_matter_to_rows(threads):
    weight, ids = random_int8(200, 576, 32, "offset")[1], torch.arange(200).repeat(4)
    threads(1)
    alone = weight.rows(ids, torch.bfloat16)
    threads(2)
    assert_bitwise(weight.rows(ids, torch.bfloat16), alone)


def test_rows_refuse_ids_of_other_dtypes():
    weight = random_int8(40, 48, 16)[1]
    for ids in (None, [0, 1], 3):
        with pytest.raises(TypeError, match=f"Int8Weight.rows: ids must be a tensor, got {type(ids).__name__}"):
            weight.rows(ids)
    for dtype in (torch.float32, torch.bool, torch.uint8):
        with pytest.raises(RuntimeError, match="ids must have dtype int32 or int64"):
            weight.rows(torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("kind, act_order", FORMS)
def test_rows_compile_into_one_graph(kind, act_order):
    torch._dynamo.reset()
    with torch.inference_mode(False), torch.no_grad():
        weight = random_int8(40, 48, 16, kind, act_order=act_order)[1]
        compiled = torch.compile(weight.rows, fullgraph=True, backend="inductor")
        for ids in (torch.tensor([39, 0, 7]), torch.tensor([1])):
            assert torch.equal(compiled(ids), weight.rows(ids))


def test_a_compiled_graph_names_an_id_that_is_out_of_range():
    torch._dynamo.reset()
    with torch.inference_mode(False), torch.no_grad():
        compiled = torch.compile(random_int8(40, 48, 16)[1].rows, fullgraph=True, backend="aot_eager")
        text = r"^qops\.int8_embedding: ids must lie in 0 \.\.\. N - 1, with N = 40 rows, got 40$"
        with pytest.raises(IndexError, match=text):
            compiled(torch.tensor([0, 40]))


def embedding_arguments(device: str, **changes: Any) -> dict[str, Any]:
    weight = random_int8(24, 64, 32, "offset")[1]
    values: dict[str, Any] = {
        "ids": torch.tensor([[23, 0]]),
        **{name: getattr(weight, name) for name in ("packed", "scales", "zeros")},
        **{"out_features": 24, "group_size": 32, "dtype": torch.bfloat16},
        **changes,
    }
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()}


EMBEDDING_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ids dtype": ({"ids": torch.ones(2)}, RuntimeError, "ids must have dtype int32 or int64, got float32"),
    "ids apart": ({"ids": torch.tensor([[0, 1], [2, 3]]).T}, ValueError, "ids must be contiguous, got strides .*"),
    "dtype": ({"dtype": torch.float64}, RuntimeError, "dtype must be float32, float16 or bfloat16, got float64"),
    "packed": ({"packed": torch.zeros(2, 8)}, RuntimeError, "packed must have dtype int8, got float32"),
    "group": ({"group_size": 24}, ValueError, "group_size must be K = 64 or a multiple of 16 that divides it, got 24"),
    "zeros": ({"zeros": torch.zeros(2, 2, 8)}, ValueError, "zeros must have the shape of scales = .*, got"),
    "gate_up": ({"mixed_gate_up": True}, ValueError, "out_features must be a multiple of 16, .*, got 24"),
}


@pytest.mark.parametrize("case", EMBEDDING_ERRORS)
def test_errors_of_the_operator_are_the_same_with_fake_tensors(case):
    changes, error, text = EMBEDDING_ERRORS[case]
    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.int8_embedding: {text}") as caught:
            torch.ops.qops.int8_embedding(**embedding_arguments(device, **changes))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_opcheck_of_the_operator():
    with torch.inference_mode(False), torch.no_grad():
        torch.library.opcheck(torch.ops.qops.int8_embedding.default, tuple(embedding_arguments("cpu").values()))


# Construction and state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change, error, message",
    (
        ("kind", lambda _: "zero_point", ValueError, "kind must be one of symmetric, offset, got 'zero_point'"),
        ("kind", lambda _: "symmetric", ValueError, "kind 'symmetric' takes no zeros"),
        ("zeros", lambda t: None, ValueError, "kind 'offset' needs zeros"),
        ("zeros", lambda t: t.int(), RuntimeError, "zeros must have dtype float16, bfloat16 or float32, got int32"),
        ("zeros", lambda t: t.double(), RuntimeError, "zeros must have dtype float16, .* got float64"),
        ("zeros", lambda t: t[:, :2], ValueError, r"zeros must have shape \[24, 4\], got \[24, 2\]"),
        ("zeros", lambda t: t[0, 0], ValueError, r"zeros must have shape \[24, 4\], got \[\]"),
        ("zeros", lambda t: t / 0, ValueError, "zeros must be finite"),
        ("zeros", lambda t: t.tolist(), TypeError, "zeros must be a tensor, got list"),
        ("zeros", lambda t: t.to("meta"), RuntimeError, "zeros must be on cpu like qweight, got meta"),
        ("scales", lambda t: t * math.nan, ValueError, "scales must be finite"),
        ("perm", lambda t: t.tolist(), TypeError, "perm must be a tensor, got list"),
        ("perm", lambda t: t.float(), RuntimeError, "perm must have dtype int32, got float32"),
        ("perm", lambda t: t[:30], ValueError, r"perm must have shape \[64\], got \[30\]"),
        ("perm", lambda t: t + 1, ValueError, "perm must be a permutation of 0 ... 63, got 64"),
        ("perm", lambda t: t // 16, ValueError, "perm must be .*, got a g_idx: its perm is"),
        ("perm", lambda t: t.long() + 2**32, ValueError, "perm must be a permutation of 0 ... 63, got 2147483647"),
        ("perm", lambda t: t.long() - 2**32, ValueError, "perm must be a permutation of 0 ... 63, got -1"),
    ),
)
def test_construction_refuses(name, change, error, message):
    tensors, _ = random_int8(24, 64, 16, "offset", act_order=True)
    given = {**tensors, "kind": "offset"}
    with pytest.raises(error, match=f"^qops.Int8Weight: {message}"):
        Int8Weight.from_canonical(**{**given, name: change(given[name])})
    with pytest.raises(ValueError, match="kind must be one of symmetric, offset, got 'nf4'"):
        Int8Weight(64, 24, 16, "nf4", scale_dtype=torch.float16)


def test_construction_keeps_dtypes_and_narrows_indices():
    tensors, _ = random_int8(24, 64, 16, "offset", act_order=True)
    for dtype in (torch.float16, torch.bfloat16):
        narrow = {**tensors, "zeros": tensors["zeros"].to(dtype), "perm": tensors["perm"].long()}
        weight = Int8Weight.from_canonical(**narrow, kind="offset")
        assert_tensors_equal(weight.canonical(), {**tensors, "zeros": narrow["zeros"]})


def test_states_of_other_kinds_do_not_load():
    """Nothing is lost or left out in silence: an offset, a perm, or the lack of one."""
    weights = [random_int8(24, 64, 16, kind, act_order=act_order)[1] for kind, act_order in FORMS]
    for target, source in itertools.product(weights, weights):
        loaded = empty_like(target)
        if target is source:
            loaded.load_state_dict(source.state_dict())
            assert_bitwise(loaded.dequantize(), source.dequantize())
            continue
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=r"this weight .* needs .* the state has"):
                loaded.load_state_dict(source.state_dict(), strict=strict)


@pytest.mark.parametrize("pack", (True, False))
@pytest.mark.parametrize("kind, act_order", FORMS)
def test_cat_and_split_are_inverse(kind, act_order, pack):
    parts = [random_int8(n, 64, 16, kind, seed=n)[0] for n in (24, 8, 40)]
    more = {"perm": torch.randperm(64, generator=generator(0)).int()} if act_order else {}
    weights = [Int8Weight.from_canonical(**part, **more, kind=kind, pack=pack) for part in parts]
    merged = Int8Weight.cat(weights)
    assert torch.equal(merged.dequantize(), torch.cat([weight.dequantize() for weight in weights]))
    for part, tensors in zip(merged.split([24, 8, 40]), parts, strict=True):
        assert_tensors_equal(part.canonical(), {**tensors, **more})


def test_only_weights_alike_are_merged():
    base = random_int8(24, 64, 16, "offset", act_order=True)[1]
    for other in (
        random_int8(24, 64, 16, "symmetric", act_order=True)[1],
        random_int8(24, 64, 16, "offset")[1],
        random_int8(24, 64, 32, "offset", act_order=True)[1],
    ):
        assert not base.is_like(other) and not other.is_like(base)
        with pytest.raises(ValueError, match=r"^qops.Int8Weight.cat: weights must be alike"):
            Int8Weight.cat([base, other])
    other = random_int8(24, 64, 16, "offset", act_order=True, seed=1)[1]
    assert not base.is_like(other) and base.is_like(copy.deepcopy(base))
    with pytest.raises(ValueError, match=r"^qops.Int8Weight.cat: weights must share one perm"):
        Int8Weight.cat([base, other])


@pytest.mark.parametrize("pack", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_orders_of_columns_and_rows(kind, pack):
    tensors, weight = random_int8(48, 64, 16, kind, act_order=True, pack=pack)
    whole, order = weight.dequantize(), torch.randperm(48, generator=generator(2))
    assert_bitwise(weight.with_rows(order).dequantize(), whole[order])
    stored = weight.in_stored_order()
    assert not stored.act_order and stored.perm is None and stored.is_packed is pack
    assert_bitwise(stored.dequantize(), whole[:, tensors["perm"].long()])
    mixed = copy.deepcopy(weight).mix_gate_up()
    assert_bitwise(mixed.dequantize(), whole)
    assert_tensors_equal(mixed.canonical(), tensors)


# Who takes what ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, act_order, message",
    (
        ("offset", False, "weight must be symmetric, got kind 'offset'"),
        ("offset", True, "weight must be symmetric, got kind 'offset'"),
        ("symmetric", True, "weight must have act_order = False, got True"),
    ),
)
def test_integer_activations_need_a_symmetric_weight_in_order(kind, act_order, message):
    for group_size, device in itertools.product((-1, 16), ("cpu", "meta")):
        weight = random_int8(16, 32, group_size, kind, act_order=act_order)[1].to(device)
        with pytest.raises(ValueError, match=f"^Int8Linear: {message}"):
            Int8Linear(weight)
        q, scale = torch.ones(2, 32, dtype=torch.int8, device=device), torch.ones(2, device=device)
        with pytest.raises(ValueError, match=f"^qops.int8_gemm: {message}"):
            qops.int8_gemm(q, scale, weight)


def test_down_in_act_order_has_gate_and_up_write_in_its_order():
    """MLP gathers nothing: the rows of gate and up go into the order of down's columns."""
    rng = generator(3)
    down = Int8WeightOnlyLinear(random_int8(32, 48, 16, "offset", act_order=True)[1])
    gate, up = (dense_linear(torch.randn(48, 32, generator=rng)) for _ in range(2))
    mlp = MLP(copy.deepcopy(gate), copy.deepcopy(up), copy.deepcopy(down))
    assert mlp.reordered and not mlp.down_proj.weight.act_order
    x = torch.randn(5, 32, generator=rng)
    assert torch.equal(mlp(x), down(qops.silu_mul(torch.cat((gate(x), up(x)), -1))))
