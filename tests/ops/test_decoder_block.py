"""attention_block and mlp_block against the chains of operators that they stand for, bit for bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import qops
from qops.ops._checks import INT4_KINDS
from qops.testing import FLOAT_DTYPES, Guarded, assert_bitwise, generator
from tests.support.ops.block_chain import CACHE, check_attention, check_mlp, fresh, whole_of
from tests.support.ops.blocks import attention_arguments, block_bias, block_weight, mlp_arguments, of_weight

OPS = torch.ops.qops
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAN, INFINITY = float("nan"), math.inf
KINDS = [(4, kind) for kind in INT4_KINDS] + [(8, kind) for kind in ("symmetric", "offset")]
STYLES = (("hf", 0.0), ("fp32", 0.0), ("fp32", 1.0))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "kind"), KINDS)
def test_every_kind_of_weight(bits, kind, dtype):
    turn = KINDS.index((bits, kind)) + FLOAT_DTYPES.index(dtype)
    for seed, (act_order, post_norm, mixed) in enumerate(itertools.product((False, True), repeat=3), start=turn):
        linears = {"bits": bits, "kind": kind, "act_order": act_order, "bias": (None, F32, BF16)[seed % 3]}
        scales = FLOAT_DTYPES[seed // 2 % 3]
        more = {"post_norm": post_norm, "seed": seed, "scales": scales, "style": STYLES[seed % 3]}
        check_mlp(mlp_arguments(dtype, (1, 1 + seed % 3), mixed=mixed, **linears, **more), f"{seed}")
        check_attention(attention_arguments(dtype, 1 + seed % 2, 1 + seed % 5, 20, **linears, **more), f"{seed}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_weights_of_both_widths_in_one_block(dtype):
    other = {"bits": 8, "kind": "symmetric", "group": 32, "bias": F16}
    check_mlp(mlp_arguments(dtype, (3,), down=other), "down of 8 bits")
    check_attention(attention_arguments(dtype, o=other), "o of 8 bits")
    four = {"bits": 4, "kind": "float_zero", "act_order": True}
    check_mlp(mlp_arguments(dtype, (3,), bits=8, kind="offset", down=four), "down of 4 bits")
    check_attention(attention_arguments(dtype, bits=8, kind="offset", o=four), "o of 4 bits")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_norms(style, dtype):
    for norm, post_norm, qk_norm in itertools.product(FLOAT_DTYPES, (False, True), (False, True)):
        more = {"norm": norm, "post_norm": post_norm, "style": style}
        check_mlp(mlp_arguments(dtype, (2, 2), **more), f"{norm}")
        check_attention(attention_arguments(dtype, 2, 2, 9, qk_norm=qk_norm, **more), f"{norm} {qk_norm}")
    one = attention_arguments(dtype, qk_norm=True, style=style)
    for name in ("q_norm", "k_norm"):
        check_attention(fresh({**one, name: None}), f"no {name}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("tables", [F32, None], ids=["float32 tables", "tables of x"])
def test_rotary_and_positions(tables, dtype):
    tables = tables or dtype
    for r, positions, of_all in itertools.product((0, 2, 10, 24), (None, torch.int32, torch.int64), (False, True)):
        more = {"rotary": r, "tables": tables, "positions": positions, "positions_of_all": of_all}
        for t in (1, 4):
            a = attention_arguments(dtype, 2, t, 7, heads=(3, 1), d=24, **more)
            check_attention(a, f"R = {r}, {positions} {of_all}, T = {t}")
    wide = attention_arguments(dtype, 2, 3, 7, tables=tables, positions=torch.int64, positions_of_all=True)
    apart = {name: torch.stack((wide[name], wide[name]), -1)[..., 0] for name in ("cos", "sin", "positions")}
    check_attention(wide | apart, "tables and positions that are not dense")


SHAPES = [(b, t, past) for b in (1, 2, 3) for t in range(1, 9) for past in (0, 5)] + [(1, 1, 127), (2, 2, 300)]
HEADS = ((1, 1, 64), (9, 3, 64), (5, 5, 16), (7, 1, 32), (6, 2, 80), (3, 3, 8), (4, 2, 128), (2, 1, 40), (8, 4, 1))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_tokens_and_sequences(dtype):
    for b, t, past in SHAPES:
        check_attention(attention_arguments(dtype, b, t, past, heads=(6, 2)), f"B = {b}, T = {t} behind {past}")
        check_mlp(mlp_arguments(dtype, (b, t)), f"B = {b}, T = {t}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads(heads, dtype):
    q_heads, kv_heads, d = heads
    for t, h in ((1, 64), (3, 576 if d == 64 else 200)):
        for qk_norm in (False, True):
            a = attention_arguments(dtype, 1, t, 40, h, (q_heads, kv_heads), d, qk_norm=qk_norm)
            check_attention(a, f"T = {t}, H = {h}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_sizes_of_an_mlp(dtype):
    for h, columns in itertools.product((8, 16, 72, 256), (8, 24, 136, 520)):
        a = mlp_arguments(dtype, (40,), h, columns, mixed=columns % 16 == 8)
        for rows in (0, 1, 2, 3, 5, 8, 17, 40):
            check_mlp(a | {"x": a["x"][:rows]}, f"{rows} of {h}, {columns}")
    a = mlp_arguments(dtype, (2, 1, 3, 2))
    check_mlp(a | {"x": a["x"].transpose(0, 2)}, "leading dimensions in another order")
    check_mlp(a | {"x": torch.stack((a["x"], a["x"]), 2)[:, :, 1]}, "x that lies apart")
    check_mlp(mlp_arguments(dtype, ()), "one row without leading dimensions")


FORMS = (
    {},
    {"window": 1},
    {"window": 5},
    {"window": 130, "first_position": 1000},
    {"window": 2**62},
    {"softcap": 2.0},
    {"scale": -0.5, "first_position": 127},
    {"mask": True},
    {"mask": True, "softcap": 30.0, "first_position": 3},
)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_attention_takes(form, dtype):
    for b, t, past in ((1, 1, 200), (2, 4, 130), (3, 8, 3)):
        how = dict(form)
        if "mask" in form:
            how["mask"] = torch.rand(b, 1, t, past + t, generator=generator(t)) < 0.6
            how["mask"][0, :, 0] = False  # a token that attends to nothing
        check_attention(attention_arguments(dtype, b, t, past, how=how), f"B = {b}, T = {t}")


def caches(b, h, s, d, dtype):
    """Views [B, Hkv, S, D] of all kinds into memory of NaN."""
    nan = torch.full((4 * b * h * (s + 9) * (d + 8),), NAN, dtype=dtype)
    return {
        "contiguous": nan[: b * h * s * d].view(b, h, s, d),
        "rows that lie apart": nan[: b * h * s * (d + 5)].view(b, h, s, d + 5)[..., 2 : d + 2],
        "tokens before heads": nan[: b * h * s * d].view(b, s, h, d).transpose(1, 2),
        "keys and values by turns": nan[: 2 * b * h * s * d].view(b, h, s, 2, d)[:, :, :, 1],
        "every second sequence": nan[: 2 * b * h * s * d].view(2 * b, h, s, d)[::2],
        "heads before sequences": nan[: b * h * s * d].view(h, b, s, d).transpose(0, 1),
    }


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_caches_of_any_strides(dtype):
    for t in (1, 3):
        plain = attention_arguments(dtype, 2, t, 35, heads=(6, 3))
        want = OPS.attention_block(**fresh(plain))
        for name in caches(2, 3, 35 + t, 16, dtype):
            held = {arg: caches(2, 3, 35 + t, 16, dtype)[name].copy_(plain[arg]) for arg in CACHE}
            assert_bitwise(check_attention(plain | held, name), want, name)
    both = torch.full((2, 3, 38, 32), NAN, dtype=dtype)  # keys and values side by side in one tensor
    pair = {"keys": both[..., :16].copy_(plain["keys"]), "values": both[..., 16:].copy_(plain["values"])}
    assert_bitwise(OPS.attention_block(**(plain | pair)), want, "one tensor")
    assert not bool(both.isnan().any())


def test_rows_that_need_four_digits_and_rows_of_nan():
    """Rows of one call are done in different ways, and a NaN in one leaves the others alone."""
    for dtype, index in itertools.product(FLOAT_DTYPES, range(3)):
        large, tiny = (1e4, 1e-4) if dtype == F16 else (1e6, 1e-6)
        mlp, attention = mlp_arguments(dtype, (3,)), attention_arguments(dtype, 1, 3, 10)
        for a, check, row in ((mlp, check_mlp, 0), (attention, check_attention, 1)):
            rows = a["x"].view(-1, 64)
            rows[index] *= tiny
            rows[index, 5] = large
            check(a if row == 0 else fresh(a), "one large element")
            clean = OPS.mlp_block(**mlp)
            rows[index, 7] = NAN
            check(a if row == 0 else fresh(a), "NaN")
            rows[index, 7] = INFINITY
            y = check(a if row == 0 else fresh(a), "infinity")
            if row == 0:
                others = torch.arange(3) != index
                assert_bitwise(y[others], clean[others], "the other rows")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_threads(threads, count):
    """Also of weights large enough that a team is worth it."""
    for dtype, t in itertools.product((BF16, F32), (1, 5)):
        large = {"h": 576, "group": 32}
        calls = [
            (mlp_arguments(dtype, (t,), columns=1536, post_norm=post_norm, mixed=not post_norm, **large), OPS.mlp_block)
            for post_norm in (False, True)
        ] + [
            (
                attention_arguments(dtype, 1, t, past, heads=(9, 3), d=64, post_norm=past > 2, **large),
                OPS.attention_block,
            )
            for past in (2, 700)
        ]
        for a, operator in calls:
            threads(1)
            first = fresh(a) if operator is OPS.attention_block else a
            want = operator(**first)
            threads(count)
            for _ in range(3):
                again = fresh(a) if operator is OPS.attention_block else a
                assert_bitwise(operator(**again), want, f"{count} threads")
                for name in CACHE if operator is OPS.attention_block else ():
                    assert_bitwise(again[name], first[name], name)


def test_tokens_together_or_one_after_another():
    for dtype in FLOAT_DTYPES:
        a = attention_arguments(dtype, 2, 6, 125, qk_norm=True, positions=torch.int64, positions_of_all=True)
        one = fresh(a)
        together = OPS.attention_block(**fresh(a))
        for t in range(6):
            step = {name: one[name][:, :, : 125 + t + 1] for name in CACHE}
            step |= {"x": a["x"][:, t : t + 1], "positions": a["positions"][:, t : t + 1]}
            got = OPS.attention_block(**(one | step))
            assert_bitwise(got, together[:, t : t + 1], f"token {t}")


@pytest.mark.parametrize("bits", [4, 8])
def test_typed_functions(bits):
    weights = [
        block_weight(n, k, bits=bits, kind="offset", act_order=True, seed=seed, mixed=seed == 2)
        for seed, (n, k) in enumerate(((128, 64), (64, 64), (192, 64), (64, 96)))
    ]
    biases = [block_bias(weight.out_features, BF16, seed) for seed, weight in enumerate(weights)]
    a = attention_arguments(BF16, 2, 2, 9, qk_norm=True, post_norm=True, positions=torch.int32)
    for name, weight, bias in zip(("qkv", "o"), weights, biases, strict=False):
        a |= of_weight(name, weight, bias)
    m = mlp_arguments(BF16, (2, 3), post_norm=True, style=("fp32", 1.0))
    for name, weight, bias in zip(("gate_up", "down"), weights[2:], biases[2:], strict=True):
        m |= of_weight(name, weight, bias)
    got = qops.mlp_block(
        m["x"],
        m["norm"],
        m["eps"],
        *weights[2:],
        gate_up_bias=biases[2],
        down_bias=biases[3],
        post_norm=m["post_norm"],
        weight_offset=1.0,
        rounding="fp32",
    )
    assert_bitwise(got, OPS.mlp_block(**m))
    names = ("cos", "sin", "positions", "q_norm", "k_norm", "post_norm", "weight_offset", "rounding")
    more = {name: a[name] for name in names} | {"qkv_bias": biases[0], "o_bias": biases[1]}
    mask = torch.rand(2, 1, 2, 11, generator=generator(0)) < 0.5
    for how in ({}, {"window": 3, "softcap": 2.0, "first_position": 5, "scale": 0.3}, {"mask": mask}):
        one, other = fresh(a), fresh(a) | how
        got = qops.attention_block(a["x"], a["norm"], a["eps"], *weights[:2], one["keys"], one["values"], **more, **how)
        assert_bitwise(got, OPS.attention_block(**other), str(how))
        for name in CACHE:
            assert_bitwise(one[name], other[name], name)
    plain = attention_arguments(BF16, rotary=0) | of_weight("qkv", weights[0], None) | of_weight("o", weights[1], None)
    other = fresh(plain)
    got = qops.attention_block(plain["x"], plain["norm"], 1e-5, *weights[:2], plain["keys"], plain["values"])
    assert_bitwise(got, OPS.attention_block(**other), "defaults")


def test_weights_that_a_typed_function_refuses():
    gate_up, down, mixed = block_weight(32, 16), block_weight(16, 16), block_weight(32, 16, mixed=True)
    of_8_bits = block_weight(16, 16, bits=8, kind="offset")
    x, norm, cache = torch.ones(1, 1, 16), torch.ones(16), torch.zeros(1, 1, 3, 8)
    empty = torch.zeros(1, 1, 3, 0)
    cases = (
        (lambda: qops.mlp_block(x, norm, 1e-5, norm, down), TypeError, "mlp_block: gate_up must be a .*, got Tensor"),
        (lambda: qops.mlp_block(x, norm, 1e-5, gate_up, None), TypeError, "mlp_block: down must be .*, got NoneType"),
        (
            lambda: qops.mlp_block(x, norm, 1e-5, gate_up, mixed),
            ValueError,
            "mlp_block: down must have mixed_gate_up = False, got True",
        ),
        (
            lambda: qops.attention_block(x, norm, 1e-5, mixed, down, cache, cache.clone()),
            ValueError,
            "attention_block: qkv must have mixed_gate_up = False, got True",
        ),
        (
            lambda: qops.attention_block(x, norm, 1e-5, gate_up, mixed, cache, cache.clone()),
            ValueError,
            "attention_block: o must have mixed_gate_up = False, got True",
        ),
        (
            lambda: qops.attention_block(x, norm, 1e-5, gate_up, down, empty, empty),
            ValueError,
            r"attention_block: keys must have shape .* divides the columns of o = 16, got \[1, 1, 3, 0\]",
        ),
        (
            lambda: qops.mlp_block(x, norm, 1e-5, gate_up, down, gate_up_input="255"),
            ValueError,
            "mlp_block: gate_up_input must be 'float', '127', 'compressed-tensors' or 'torchao' for a weight of 4 "
            "bits, got '255'",
        ),
        (
            lambda: qops.attention_block(x, norm, 1e-5, gate_up, of_8_bits, cache, cache.clone(), o_input="128"),
            ValueError,
            "attention_block: o_input must be 'float', '127', 'compressed-tensors', 'torchao', '255' or "
            "'compressed-tensors-asymmetric', got '128'",
        ),
        (
            lambda: qops.mlp_block(x, norm, 1e-5, gate_up, of_8_bits, down_input="127"),
            ValueError,
            "mlp_block: down must have kind 'symmetric' with down_input = '127', got 'offset'",
        ),
        (
            lambda: qops.mlp_block(x, norm, 1e-5, block_weight(32, 16).unpack(), down),
            RuntimeError,
            "the weight is not packed",
        ),
    )
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()


def mlp(**changes):
    return "mlp_block", mlp_arguments(F32, (1, 2), 64, 96, mixed=False, bias=F32) | changes


def attention(**changes):
    a = attention_arguments(F32, 2, 3, 4, qk_norm=True, positions=torch.int64, bias=F32)
    return "attention_block", {**a, **changes}


X, K = torch.ones(2, 3, 64), torch.ones(2, 2, 7, 16)
MASK = torch.ones(2, 1, 3, 7, dtype=torch.bool)
ERRORS = [
    (mlp, {"x": X.double()}, RuntimeError, "x must have dtype float32, float16 or bfloat16, got float64"),
    (mlp, {"x": torch.ones(())}, ValueError, "x must have at least 1 dimension"),
    (mlp, {"x": X[..., :60]}, ValueError, "x must have a last dimension H that is a positive multiple of 8, got 60"),
    (mlp, {"x": X[..., :0]}, ValueError, "x must have a last dimension H that is a positive multiple of 8, got 0"),
    (mlp, {"x": X.mT.contiguous().mT}, ValueError, "x must have stride 1 in its last dimension, got 3"),
    (mlp, {"x": torch.ones(2, 56)}, ValueError, r"norm must have shape \[H\] = \[56\], got \[64\]"),
    (mlp, {"norm": torch.ones(64).int()}, RuntimeError, "norm must have dtype .*, got int32"),
    (mlp, {"norm": torch.ones(128)[::2]}, ValueError, "norm must have stride 1 in its last dimension, got 2"),
    (mlp, {"post_norm": torch.ones(63)}, ValueError, r"post_norm must have shape \[H\] = \[64\], got \[63\]"),
    (mlp, {"eps": -1.0}, ValueError, "eps must be .*, got -1"),
    (mlp, {"weight_offset": 1.0}, ValueError, "rounding must be .*got"),
    (mlp, {"rounding": "half"}, ValueError, 'rounding must be "hf" or "fp32", got "half"'),
    (mlp, {"down": torch.ones(4, 768)}, RuntimeError, "down must have dtype uint8 or int8, got float32"),
    (mlp, {"down": torch.ones(4).byte()}, ValueError, "down must have 2 dimensions, got 1"),
    (
        mlp,
        {"down": torch.ones(4, 760).byte()},
        ValueError,
        "down must hold a multiple of 8 columns of 8 elements a strip, got 760",
    ),
    (
        mlp,
        {"down": torch.ones(4, 704).byte()},
        ValueError,
        r"gate_up must hold a weight \[N, K\] = \[176, 64\], got 12 strips of 64 columns",
    ),
    (
        mlp,
        {"down": torch.ones(5, 768).byte()},
        ValueError,
        r"down must hold a weight \[N, K\] = \[64, 96\], got 5 strips of 96 columns",
    ),
    (mlp, {"gate_up": torch.ones(12, 512).int()}, RuntimeError, "gate_up must have dtype uint8 or int8, got int32"),
    (
        mlp,
        {"gate_up": torch.ones(12, 1024).byte()[:, ::2]},
        ValueError,
        "gate_up must be contiguous, got strides",
    ),
    (
        mlp,
        {"down_scales": torch.ones(4, 6)},
        ValueError,
        r"down_scales must have shape \[S, K / group_size, 16\] with S = 4, got \[4, 6\]",
    ),
    (
        mlp,
        {"down_scales": torch.ones(4, 12, 16)},
        ValueError,
        "down_scales must have one group, or groups of a multiple of 16 columns that divides K = 96, got 12 groups",
    ),
    (mlp, {"down_scales": torch.ones(4, 6, 16).int()}, RuntimeError, "down_scales must have dtype .*, got int32"),
    (
        mlp,
        {"down_scales": torch.ones(5, 6, 16)},
        ValueError,
        r"down_scales must have shape \[S, K / group_size, 16\] with S = 4, got \[5, 6, 16\]",
    ),
    (
        mlp,
        {"down_scales": torch.ones(4, 6, 15)},
        ValueError,
        r"down_scales must have shape \[S, K / group_size, 16\] with S = 4, got \[4, 6, 15\]",
    ),
    (mlp, {"down_scales": torch.ones(4, 0, 16)}, ValueError, "down_scales must have one group, or .* got 0 groups"),
    (mlp, {"down_scales": torch.ones(4, 5, 16)}, ValueError, "down_scales must have one group, or .* got 5 groups"),
    (mlp, {"down_scales": torch.ones(4, 16, 6).mT}, ValueError, "down_scales must be contiguous, got strides"),
    (mlp, {"down_zeros": torch.ones(4, 16, 6).byte().mT}, ValueError, "down_zeros must be contiguous, got strides"),
    (mlp, {"down_perm": torch.arange(192).int()[::2]}, ValueError, r"down_perm must be contiguous, got strides \[2\]"),
    (mlp, {"down_bias": torch.ones(128)[::2]}, ValueError, "down_bias must have stride 1 in its last dimension, got 2"),
    (mlp, {"down_kind": 4}, ValueError, r"down_kind must be 0 \(symmetric\), 1 .* or 3 \(offset\), got 4"),
    (mlp, {"down_kind": 0}, ValueError, "down_zeros must be None for kind 0, got a tensor"),
    (mlp, {"down_zeros": None}, ValueError, "down_zeros must be given for this kind, got None"),
    (mlp, {"down_kind": 2}, RuntimeError, "down_zeros must have dtype float32, .* got uint8"),
    (mlp, {"down_zeros": torch.ones(4, 1, 16).byte()}, ValueError, "down_zeros must have the shape of down_scales"),
    (mlp, {"down_perm": torch.arange(96)}, RuntimeError, "down_perm must have dtype int32, got int64"),
    (mlp, {"down_perm": torch.arange(95).int()}, ValueError, r"down_perm must have shape \[K\] = \[96\], got \[95\]"),
    (mlp, {"gate_up_bias": torch.ones(96)}, ValueError, r"gate_up_bias must have shape \[N\] = \[192\], got \[96\]"),
    (mlp, {"gate_up_bias": torch.ones(192).int()}, RuntimeError, "gate_up_bias must have dtype .*, got int32"),
    (attention, {"x": X[0]}, ValueError, r"x must have 3 dimensions \[B, T, H\], got 2"),
    (attention, {"x": torch.ones(2, 9, 64)}, ValueError, "x must have at most 8 tokens T, got 9"),
    (attention, {"x": X[:1]}, ValueError, r"keys must have shape .* with B = 1, D = 16, got \[2, 2, 7, 16\]"),
    (attention, {"keys": K.half()}, RuntimeError, "keys must have the dtype of x = float32, got float16"),
    (attention, {"values": K.half()}, RuntimeError, "values must have the dtype of x = float32, got float16"),
    (attention, {"keys": K[0]}, ValueError, r"keys must have 4 dimensions \[B, Hkv, S, D\], got 3"),
    (attention, {"values": K[0]}, ValueError, r"values must have 4 dimensions \[B, Hkv, S, D\], got 3"),
    (attention, {"keys": K[..., :15].contiguous()}, ValueError, r"keys must have shape .* with a D that divides"),
    (attention, {"keys": K[:, :0]}, ValueError, r"keys must have shape .* with a D that divides"),
    (attention, {"keys": torch.ones(2, 3, 7, 16)}, ValueError, "o must have a multiple of Hkv = 3 heads, got 4"),
    (attention, {"keys": K[:, :, :2]}, ValueError, "keys must have at least T = 3 rows, got 2"),
    (attention, {"values": K[:, :, :6]}, ValueError, r"values must have the shape of keys = \[2, 2, 7, 16\], got"),
    (attention, {"keys": K.mT.contiguous().mT}, ValueError, "keys must have stride 1 in its last dimension, got 7"),
    (attention, {"values": K.mT.contiguous().mT}, ValueError, "values must have stride 1 in its last dimension, got 7"),
    (attention, {"mask": MASK.float()}, RuntimeError, "mask must have dtype bool, got float32"),
    (attention, {"mask": MASK[..., 1:]}, ValueError, r"mask must have shape \[B or 1, 1, T or 1, S\] = .*, got"),
    (attention, {"mask": MASK, "window": 3}, ValueError, "window must be 0 with a mask, got 3"),
    (attention, {"window": -1}, ValueError, r"window must lie in 0 \.\. 2\^62, got -1"),
    (attention, {"scale": NAN}, ValueError, "scale must be a finite float32, got nan"),
    (attention, {"softcap": -2.0}, ValueError, "softcap must be a float32 that is finite and not negative, got -2"),
    (attention, {"first_position": -2}, ValueError, r"first_position must lie in 0 \.\. 2\^62, got -2"),
    (attention, {"q_norm": torch.ones(8)}, ValueError, r"q_norm must have shape \[D\] = \[16\], got \[8\]"),
    (attention, {"k_norm": torch.ones(16).int()}, RuntimeError, "k_norm must have dtype .*, got int32"),
    (attention, {"sin": None}, ValueError, "sin must be given with cos, got None"),
    (attention, {"cos": None}, ValueError, "sin must be None without cos, got a tensor"),
    (attention, {"cos": None, "sin": None}, ValueError, "positions must be None without cos, got a tensor"),
    (
        attention,
        {"cos": torch.ones(9, 9)},
        ValueError,
        r"cos must have shape \[positions, R / 2\] with R <= D = 16, got",
    ),
    (attention, {"sin": torch.ones(9, 8)}, ValueError, "sin must have the shape of cos"),
    (attention, {"cos": torch.ones(10, 8).half()}, RuntimeError, "sin must have the dtype of cos|cos must have"),
    (attention, {"positions": torch.ones(3)}, RuntimeError, "positions must have dtype int32 or int64, got float32"),
    (attention, {"positions": torch.ones(4).long()}, ValueError, r"positions must have shape \[T\] = \[3\] or .*, got"),
    (
        attention,
        {"positions": None, "cos": torch.ones(2, 8), "sin": torch.ones(2, 8)},
        ValueError,
        "cos must have at least T = 3 rows without positions, got 2",
    ),
    (
        attention,
        {"qkv": torch.ones(8, 256).byte()},
        ValueError,
        r"qkv must hold a weight \[N, K\] = \[128, 64\], got 8 strips of 32 columns",
    ),
    (attention, {"o_bias": torch.ones(63)}, ValueError, r"o_bias must have shape \[N\] = \[64\], got \[63\]"),
    (
        attention,
        {"o": torch.ones(4, 1024).char(), "o_kind": 1},
        ValueError,
        r"o_kind must be 0 \(symmetric\) or 3 \(offset\) for a weight of 8 bits, got 1",
    ),
    (
        attention,
        {"o": torch.ones(4, 1024).char(), "o_kind": 2},
        ValueError,
        r"o_kind must be 0 \(symmetric\) or 3 \(offset\) for a weight of 8 bits, got 2",
    ),
]


def on_meta(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


@pytest.mark.parametrize(("make", "changes", "error", "text"), ERRORS, ids=[f"{e[0].__name__} {e[3]}" for e in ERRORS])
def test_errors_are_the_same_with_fake_tensors(make, changes, error, text):
    op, a = make(**changes)
    before = {name: whole_of(a[name]).clone() for name in CACHE if name in a}
    messages = []
    for there in (a, {name: on_meta(value) for name, value in a.items()}):
        with pytest.raises(error, match=rf"^qops\.{op}: {text}") as caught:
            getattr(OPS, op)(**there)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    for name, held in before.items():
        assert_bitwise(whole_of(a[name]), held, "written before the error")


@pytest.mark.parametrize("bad", [-1, 2**31 - 1, -(2**31)])
def test_indices_of_a_perm_that_are_out_of_range(bad):
    for make, names in ((mlp, ("gate_up", "down")), (attention, ("qkv", "o"))):
        for name in names:
            op, a = make()
            k = 96 if name == "down" else 64
            perm = torch.arange(k).int()
            perm[k // 2] = bad
            a[f"{name}_perm"] = perm
            before = {cache: whole_of(a[cache]).clone() for cache in CACHE if cache in a}
            with pytest.raises(
                ValueError, match=rf"qops\.{op}: {name}_perm must hold indices in 0 \.\. {k - 1}, got {bad}"
            ):
                getattr(OPS, op)(**a)
            for cache, held in before.items():
                assert_bitwise(whole_of(a[cache]), held, "written before the error")


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_positions_that_are_out_of_range(bad):
    _, a = attention()
    a["positions"] = a["positions"].expand(2, 3).clone()
    a["positions"][1, 2] = bad
    before = {name: whole_of(a[name]).clone() for name in CACHE}
    with pytest.raises(ValueError, match=rf"qops\.attention_block: positions must .*, got {bad}"):
        OPS.attention_block(**a)
    for name, held in before.items():
        assert_bitwise(whole_of(a[name]), held, "written before the error")


def test_caches_that_hold_an_element_twice():
    _, a = attention()
    for name in CACHE:
        with pytest.raises(ValueError, match=rf"{name} must hold every element once to be written in place"):
            OPS.attention_block(**{**a, name: torch.zeros(1, 2, 7, 16).expand(2, 2, 7, 16)})


def test_empty_calls():
    for batch, t in ((0, 1), (1, 0), (0, 0)):
        a = attention_arguments(F32, batch, t, 5, positions=torch.int64)
        assert OPS.attention_block(**a).shape == (batch, t, 64)
    for leading in ((0,), (2, 0)):
        assert OPS.mlp_block(**mlp_arguments(F32, leading)).shape == (*leading, 64)


def test_what_is_written_stands_between_guards():
    for dtype in FLOAT_DTYPES:
        a = attention_arguments(dtype, 2, 3, 20)
        guarded = {name: Guarded(a[name].contiguous()) for name in CACHE}
        OPS.attention_block(**(a | {name: guard.tensor for name, guard in guarded.items()}))
        for guard in guarded.values():
            guard.check()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(dtype):
    with torch.inference_mode(False), torch.no_grad():
        m = mlp_arguments(dtype, (2, 3), post_norm=True, bias=F32)
        torch.library.opcheck(OPS.mlp_block.default, (), m)
        masks = (None, torch.ones(1, 1, 2, 11, dtype=torch.bool))
        for mask in masks:
            a = attention_arguments(dtype, 2, 2, 9, qk_norm=True, positions=torch.int64, how={"mask": mask})
            torch.library.opcheck(OPS.attention_block.default, (), {**a, **{n: a[n].contiguous() for n in CACHE}})


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)  # inductor does not know the poisoned torch.empty
    m = mlp_arguments(BF16, (2, 2))
    a = attention_arguments(BF16, 2, 2, 9)

    def layer(x, keys, values):
        y = OPS.attention_block(**(a | {"x": x, "keys": keys, "values": values}))
        return OPS.mlp_block(**(m | {"x": y})) + keys[:, 0, -1:, :1]

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    caches = [[a[name].clone() for name in CACHE] for _ in range(2)]
    assert_bitwise(compiled(a["x"], *caches[0]), layer(a["x"], *caches[1]))
    for got, want in zip(*caches, strict=True):
        assert_bitwise(got, want)
