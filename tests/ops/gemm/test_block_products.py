"""Blocks whose linears multiply int8: W8A8 and W4A8, by every rule, alone and beside others, bit for bit the chain."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import qops
from qops.ops.decoder_block import INPUTS
from qops.testing import FLOAT_DTYPES, assert_bitwise
from tests.support.ops.block_chain import CACHE, check_attention, check_mlp, fresh
from tests.support.ops.blocks import (
    INT8_PRODUCTS,
    attention_arguments,
    block_bias,
    block_weight,
    mlp_arguments,
    of_weight,
)

OPS = torch.ops.qops
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
STYLES = (("hf", 0.0), ("fp32", 0.0), ("fp32", 1.0))
# What each operator multiplies: weights and input.
LINEARS = {
    "int4_gemm": {"bits": 4, "kind": "zero_point", "act_order": True},
    "int8_weight_only_gemm": {"bits": 8, "kind": "offset", "group": 16},
    "int4_int8_gemm": {"bits": 4, "kind": "offset", "given": "127"},
    "int8_gemm": {"bits": 8, "kind": "symmetric", "given": "127"},
    "int8_gemm with zero points": {"bits": 8, "kind": "symmetric", "given": "255"},
}
OF_INT8 = [how for how in LINEARS.values() if "given" in how]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "kind", "given"), INT8_PRODUCTS)
def test_every_kind_of_weight_and_rule(bits, kind, given, dtype):
    forms = itertools.product((False, True), (None, F32, BF16), (False, True), (False, True))
    for seed, (act_order, bias, post_norm, mixed) in enumerate(forms):
        linears = {"bits": bits, "kind": kind, "given": given, "act_order": act_order, "bias": bias}
        more = {"post_norm": post_norm, "seed": seed, "scales": FLOAT_DTYPES[seed % 3], "style": STYLES[seed % 3]}
        check_mlp(mlp_arguments(dtype, (1, 1 + seed % 3), mixed=mixed, **linears, **more), seed)
        check_attention(attention_arguments(dtype, 1 + seed % 2, 1 + seed % 5, 20, **linears, **more), seed)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_operators_of_all_kinds_in_one_block(dtype):
    for (first, one), (last, other) in itertools.product(LINEARS.items(), LINEARS.items()):
        other = {"given": "float", "act_order": False, "group": 16, **other}
        for seed, bias in enumerate((None, F16)):
            what = f"{first}, then {last}"
            check_mlp(mlp_arguments(dtype, (3,), mixed=seed == 0, bias=bias, down=other, seed=seed, **one), what)
            check_attention(attention_arguments(dtype, 1, 2, 9, bias=bias, o=other, seed=seed, **one), what)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("how", OF_INT8, ids=str)
def test_rows_and_sizes(how, dtype):
    for h, columns in itertools.product((8, 72, 256), (8, 24, 136, 520)):
        for rows in (*range(9), 17, 40):
            check_mlp(
                mlp_arguments(dtype, (rows,), h, columns, mixed=columns % 16 == 8, **how), f"{rows} {h} {columns}"
            )
    for batch, t, heads, d in ((1, 8, (9, 3), 64), (3, 2, (6, 2), 80), (1, 1, (7, 1), 32), (2, 3, (2, 1), 40)):
        a = attention_arguments(dtype, batch, t, 40, 200, heads, d, qk_norm=t == 3, **how)
        check_attention(a, f"{batch} {t} {heads}")
    none = mlp_arguments(dtype, (3,), 64, 8, **how)
    no_columns = {name: none[name].narrow(*(0, 0, 0)) for name in ("gate_up", "gate_up_scales")}
    no_columns |= {"down": none["down"].narrow(1, 0, 0), "down_scales": none["down_scales"].narrow(1, 0, 0)}
    for name in ("gate_up_zeros", "down_zeros"):
        kept = none[name]
        no_columns[name] = None if kept is None else kept.narrow(0 if name[0] == "g" else 1, 0, 0)
    check_mlp({**none, **no_columns}, "no columns")


@pytest.mark.parametrize("how", OF_INT8, ids=str)
def test_rows_of_zeros_and_rows_that_are_not_finite(how):
    for dtype, value in itertools.product(FLOAT_DTYPES, (0.0, math.nan, math.inf, 1e-30, 6e4)):
        for index in range(3):
            mlp, attention = mlp_arguments(dtype, (3,), **how), attention_arguments(dtype, 1, 3, 10, **how)
            clean = OPS.mlp_block(**mlp)
            for a in (mlp, attention):
                rows = a["x"].view(-1, 64)
                rows[index] = value if value in (0.0, 1e-30) else rows[index].index_fill(0, torch.tensor(5), value)
            y = check_mlp(mlp, f"{value}")
            check_attention(attention, f"{value}")
            others = torch.arange(3) != index
            assert_bitwise(y[others], clean[others], "the other rows")


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("how", OF_INT8, ids=str)
def test_threads(threads, how, count):
    """Of weights large enough that a team is worth it."""
    for dtype, rows in itertools.product((BF16, F32), (1, 5, 8)):
        large = {"h": 576, **how}
        mlp = mlp_arguments(dtype, (rows,), columns=1536, **large)
        attention = attention_arguments(dtype, 1, rows, 300, heads=(9, 3), d=64, **large)
        threads(1)
        want, first = OPS.mlp_block(**mlp), fresh(attention)
        attended = OPS.attention_block(**first)
        threads(count)
        for _ in range(3):
            assert_bitwise(OPS.mlp_block(**mlp), want)
            again = fresh(attention)
            assert_bitwise(OPS.attention_block(**again), attended)
            for name in CACHE:
                assert_bitwise(again[name], first[name], name)


@pytest.mark.parametrize("how", OF_INT8, ids=str)
def test_rows_together_or_alone(how):
    for dtype in FLOAT_DTYPES:
        a = mlp_arguments(dtype, (8,), **how)
        together = OPS.mlp_block(**a)
        for row in range(8):
            assert_bitwise(OPS.mlp_block(**{**a, "x": a["x"][row : row + 1]}), together[row : row + 1])


@pytest.mark.parametrize(("bits", "kind", "given"), INT8_PRODUCTS)
def test_typed_functions(bits, kind, given):
    shapes = ((128, 64), (64, 64), (192, 64), (64, 96))
    weights = [
        block_weight(n, k, bits=bits, kind=kind, group=k if bits == 8 else 16, seed=seed, mixed=seed == 2)
        for seed, (n, k) in enumerate(shapes)
    ]
    biases = [block_bias(weight.out_features, BF16, seed) for seed, weight in enumerate(weights)]
    m = mlp_arguments(BF16, (2, 3))
    for name, weight, bias, its in zip(("gate_up", "down"), weights[2:], biases[2:], (given, "float"), strict=True):
        m |= of_weight(name, weight, bias, its)
    named = {"gate_up_bias": biases[2], "down_bias": biases[3], "gate_up_input": given}
    assert_bitwise(qops.mlp_block(m["x"], m["norm"], m["eps"], *weights[2:], **named), OPS.mlp_block(**m))
    a = attention_arguments(BF16, rotary=0)
    for name, weight, bias, its in zip(("qkv", "o"), weights, biases, ("float", given), strict=False):
        a |= of_weight(name, weight, bias, its)
    other, named = fresh(a), {"qkv_bias": biases[0], "o_bias": biases[1], "o_input": given}
    got = qops.attention_block(a["x"], a["norm"], 1e-5, *weights[:2], a["keys"], a["values"], **named)
    assert_bitwise(got, OPS.attention_block(**other))
    last = "'torchao' for a weight of 4 bits" if bits == 4 else "'compressed-tensors-asymmetric'"
    text = f"mlp_block: down_input must be 'float', '127', .* or {last}, got 'int8'"
    with pytest.raises(ValueError, match=text):
        qops.mlp_block(m["x"], m["norm"], m["eps"], *weights[2:], down_input="int8")


FOUR, EIGHT = {"bits": 4, "kind": "zero_point"}, {"bits": 8, "kind": "symmetric"}
FOUR_INPUTS = "0 (float), 1 (127), 2 (compressed-tensors) or 3 (torchao) for a weight of 4 bits"
EIGHT_INPUTS = "0 (float), 1 (127), 2 (compressed-tensors), 3 (torchao), 4 (255) or 5 (compressed-tensors-asymmetric)"
BOTH = "for a weight of 8 bits and an input of int8"


def narrow(k: int, **linear) -> dict:
    """An MLP of 8 columns between gate, up and down whose x has K columns: gate_up is of one strip."""
    return mlp_arguments(F32, (1,), k, 8, mixed=False, **linear)


REFUSED = [
    (lambda: mlp_arguments(F32, **FOUR) | {"down_input": 4}, f"down_input must be {FOUR_INPUTS}, got 4"),
    (lambda: mlp_arguments(F32, **FOUR) | {"gate_up_input": -1}, f"gate_up_input must be {FOUR_INPUTS}, got -1"),
    (lambda: attention_arguments(F32, **EIGHT) | {"qkv_input": 6}, f"qkv_input must be {EIGHT_INPUTS}, got 6"),
    (
        lambda: attention_arguments(F32, bits=8, kind="offset", group=64) | {"o_input": 1},
        f"o_kind must be 0 (symmetric) {BOTH}, got 3",
    ),
    (
        lambda: attention_arguments(F32, **EIGHT) | {"qkv_input": 5},
        f"qkv_scales must have one group {BOTH}, got 4 groups",
    ),
    (
        lambda: mlp_arguments(F32, act_order=True, group=1 << 20, **EIGHT) | {"down_input": 2},
        f"down_perm must be None {BOTH}, got a tensor",
    ),
    (
        lambda: narrow(131072, given="127", **EIGHT),
        "gate_up must have at most 131071 columns for an input of int8, got 131072",
    ),
    (
        lambda: narrow(65800, given="255", **EIGHT),
        "gate_up must have at most 65793 columns for an input of int8 with zero points, got 65800",
    ),
    (
        lambda: narrow(131072, given="127", group=131072, **FOUR),
        "gate_up_scales must have groups of at most 131071 columns for an input of int8, got 131072",
    ),
    (
        lambda: narrow(1 << 20, given="torchao", group=1 << 16, **FOUR),
        "gate_up must have at most 1048575 columns for an input of int8, got 1048576",
    ),
]


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_what_has_no_operator_is_refused(make, text):
    """With the same words by the fake kernel."""
    a, mode = make(), FakeTensorMode()
    faked = {name: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for name, t in a.items()}
    op = "attention_block" if "keys" in a else "mlp_block"
    for arguments in (a, faked):
        with pytest.raises(ValueError) as error:
            getattr(OPS, op)(**arguments)
        assert str(error.value) == f"qops.{op}: {text}"


def test_the_largest_k(threads):
    """Of the limits of int8_gemm and int4_int8_gemm, the largest products."""
    for k, how in ((131064, {**EIGHT, "given": "127"}), (65792, {**EIGHT, "given": "255"})):
        a = narrow(k, **how)
        a["gate_up"].fill_(-128)
        a["x"].fill_(3.0)
        check_mlp(a, f"K = {k}")


@pytest.mark.parametrize("how", OF_INT8, ids=str)
def test_opcheck(how):
    with torch.inference_mode(False), torch.no_grad():
        torch.library.opcheck(OPS.mlp_block.default, (), mlp_arguments(BF16, (2, 3), bias=F32, **how))
        a = attention_arguments(BF16, 2, 2, 9, **how)
        torch.library.opcheck(OPS.attention_block.default, (), {**a, **{n: a[n].contiguous() for n in CACHE}})


def test_plans_name_what_is_multiplied():
    sizes = {"rows": 1, "h": 576, "columns": 1536, "dtype": BF16, "device": "cpu"}
    for given in INPUTS[1:]:
        line = qops.explain("mlp_block", gate_up_has_8_bits=True, gate_up_input=given, **sizes)
        assert f" gate_up_input={given} " in line
        assert "down_input" not in line
    with pytest.raises(ValueError, match="down_input must have no zero points for a weight of 4 bits"):
        qops.explain("mlp_block", down_input="255", **sizes)
