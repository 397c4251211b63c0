"""Int4Weight and Int8Weight: exact values, layout, quantising, construction; exact where no bound is named."""

from __future__ import annotations

import copy
import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import qops
from qops.testing import assert_bitwise, generator
from qops.weights import Int4Weight, Int8Weight
from tests.support.ops.exact import fraction, round_to_float32
from tests.support.ops.random_weights import (
    KINDS,
    SCALE_DTYPES,
    SHAPES,
    assert_tensors_equal,
    buffers,
    empty_like,
    group_sizes,
    random_int4,
    random_int8,
    some_weights,
)

# Exact arithmetic ----------------------------------------------------------------------------------------------------


def int4_code(tensors: dict[str, Tensor], n: int, k: int) -> int:
    return (tensors["qweight"][n, k // 2].item() >> (4 * (k % 2))) & 15


def exact_int4(tensors: dict[str, Tensor], kind: str) -> Tensor:
    """The weight by the formulas of the docstring, in fractions, rounded once to float32."""
    n_size, k_size = tensors["qweight"].shape[0], 2 * tensors["qweight"].shape[1]
    group_size = k_size // tensors["scales"].shape[1]
    weight = torch.empty(n_size, k_size)
    for n, k in itertools.product(range(n_size), range(k_size)):
        s, q = fraction(tensors["scales"][n, k // group_size]), int4_code(tensors, n, k)
        z = fraction(tensors["zeros"][n, k // group_size]) if "zeros" in tensors else 8
        exact = s * q + z if kind == "offset" else s * (q - z)
        column = tensors["perm"][k].item() if "perm" in tensors else k
        weight[n, column] = round_to_float32(exact)
    return weight


@pytest.mark.parametrize("act_order", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_int4_is_the_exact_weight_rounded_once(kind, act_order):
    for dtype, (n, k, g) in itertools.product(SCALE_DTYPES, ((8, 24, -1), (24, 32, 16))):
        made = [random_int4(n, k, g, kind, scale_dtype=dtype, act_order=act_order, pack=pack) for pack in (True, False)]
        expected = exact_int4(made[0][0], kind)
        for _, weight in made:
            assert torch.equal(weight.dequantize(), expected)
            for narrow in (torch.float16, torch.bfloat16):  # by value: fractions have no -0
                got = weight.dequantize(narrow)
                assert got.dtype == narrow and torch.equal(got, expected.to(narrow))


@pytest.mark.parametrize("kind", ("float_zero", "offset"))
def test_dequantize_does_not_round_twice(kind):
    """15 s is a tie of float32, and the other term is too small for float64: only its sign breaks the tie."""
    scales = torch.full((8, 1), 16777208.0)
    tiny = torch.tensor([-(2.0**-40), 2.0**-40] * 4)[:, None]
    tensors = {"qweight": torch.full((8, 4), 0xFF, dtype=torch.uint8), "scales": scales, "zeros": tiny}
    weight = Int4Weight.from_canonical(**tensors, kind=kind).dequantize()
    assert torch.equal(weight, exact_int4(tensors, kind))
    assert (weight[0] != weight[1]).all()


def test_dequantize_holds_the_ends_of_float32():
    tensors, _ = random_int4(8, 8, -1, "offset", scale_dtype=torch.float32)
    tensors["scales"].fill_(2.0**-149)
    tensors["zeros"].fill_(2.0**-149)
    weight = Int4Weight.from_canonical(**tensors, kind="offset").dequantize()
    assert torch.equal(weight, exact_int4(tensors, "offset")) and (weight > 0).all()
    tensors["scales"].fill_(torch.finfo(torch.float32).max)
    overflow = Int4Weight.from_canonical(**tensors, kind="offset").dequantize()
    assert overflow.isinf().any() and not overflow.isnan().any()


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("group_size", (-1, 16))
def test_dequantize_int8_is_the_exact_weight_rounded_once(group_size, scale_dtype):
    tensors, weight = random_int8(24, 48, group_size, scale_dtype=scale_dtype)
    scales = tensors["scales"].repeat_interleave(48 // tensors["scales"].shape[1], 1)
    expected = (scales.double() * tensors["qweight"].double()).float()  # 24 + 8 bits: exact in float64
    assert torch.equal(weight.dequantize(), expected)
    assert_bitwise(weight.unpack().dequantize(torch.bfloat16), expected.to(torch.bfloat16))


def test_dequantize_covers_every_chunk(monkeypatch):
    import qops._layout

    weights = [weight for _, weight in some_weights()]
    whole = [weight.dequantize() for weight in weights]
    monkeypatch.setattr(qops._layout, "CHUNK_ELEMENTS", 1)
    for weight, expected in zip(weights, whole, strict=True):
        assert torch.equal(weight.dequantize(), expected)
        assert torch.equal(weight.unpack().dequantize(), expected)


# Layout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k", ((8, 8), (16, 24), (40, 72)))
def test_packed_layout(n, k):
    """Element by element, from the index formulas of the layout; padding is code 8 (int4) or 0 (int8)."""
    rng = generator(n)
    q4 = torch.randint(256, (n, k // 2), dtype=torch.uint8, generator=rng)
    q8 = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=rng)
    strips = -(-n // 16)
    packed4 = torch.empty(strips, 8 * k, dtype=torch.uint8)
    packed8 = torch.empty(strips, 16 * k, dtype=torch.int8)
    for row, col in itertools.product(range(16 * strips), range(k)):
        strip, lane = divmod(row, 16)
        packed8[strip, ((col // 4) * 16 + lane) * 4 + col % 4] = q8[row, col] if row < n else 0
        if col % 8 < 4:
            low, high = (int4_code({"qweight": q4}, row, c) if row < n else 8 for c in (col, col + 4))
            packed4[strip, ((col // 8) * 16 + lane) * 4 + col % 4] = low | high << 4
    assert torch.equal(torch.ops.qops.int4_pack(q4), packed4)
    assert torch.equal(torch.ops.qops.int8_pack(q8), packed8)
    assert torch.equal(torch.ops.qops.int4_unpack(packed4, n), q4)
    assert torch.equal(torch.ops.qops.int8_unpack(packed8, n), q8)


def test_packed_scales_and_zeros_layout():
    tensors, weight = random_int4(24, 64, 16, "zero_point")
    assert buffers(weight).keys() == {"packed", "scales", "zeros"}
    for name in ("scales", "zeros"):
        packed = getattr(weight, name)
        assert packed.shape == (2, 4, 16) and packed.dtype == tensors[name].dtype and packed.is_contiguous()
        for row, group in itertools.product(range(32), range(4)):
            assert packed[row // 16, group, row % 16] == (tensors[name][row, group] if row < 24 else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", SHAPES)
def test_int4_packing_is_bijective(n, k, kind):
    for seed, (group_size, dtype, act_order) in enumerate(
        itertools.product(group_sizes(k), SCALE_DTYPES, (False, True))
    ):
        tensors, weight = random_int4(n, k, group_size, kind, scale_dtype=dtype, act_order=act_order, seed=seed)
        assert weight.is_packed and weight.group_size == (k if group_size == -1 else group_size)
        assert_tensors_equal(weight.canonical(), tensors)
        packed = {name: t.clone() for name, t in buffers(weight).items()}
        assert_tensors_equal(buffers(weight.unpack()), tensors)
        assert not weight.is_packed
        assert_tensors_equal(buffers(weight.pack().pack()), packed)


@pytest.mark.parametrize("n, k", ((0, 32), (24, 0), (0, 0)))
def test_empty_weights(n, k):
    empty, bias = torch.empty(n, k), torch.arange(float(n))
    for symmetric, group_size in itertools.product((True, False), (-1, 16)):
        weight = Int4Weight.quantize(empty, group_size, symmetric)
        loaded = empty_like(weight)
        loaded.load_state_dict(weight.state_dict())
        for one in (weight, loaded, copy.deepcopy(weight).unpack().pack().half()):
            assert one.dequantize().shape == (n, k)
            assert torch.equal(qops.int4_gemm(torch.ones(3, k), one, bias), bias.expand(3, n))
    weight = Int8Weight.quantize(empty)
    assert weight.dequantize().shape == (n, k)
    assert torch.equal(qops.int8_weight_only_gemm(torch.ones(3, k), weight, bias), bias.expand(3, n))
    assert weight.rows(torch.arange(n)[::2]).shape == (len(range(0, n, 2)), k)


@pytest.mark.parametrize("kind", Int8Weight.KINDS)
@pytest.mark.parametrize("n, k", SHAPES)
def test_int8_packing_is_bijective(n, k, kind):
    for group_size, dtype, act_order in itertools.product(group_sizes(k), SCALE_DTYPES, (False, True)):
        tensors, weight = random_int8(n, k, group_size, kind, scale_dtype=dtype, act_order=act_order)
        assert_tensors_equal(weight.canonical(), tensors)
        assert_tensors_equal(buffers(weight.unpack()), tensors)
        assert_tensors_equal(weight.pack().canonical(), tensors)


# Quantise ------------------------------------------------------------------------------------------------------------


def weights_to_quantize(n: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random rows, and rows of zeros, one sign, subnormals, the largest finite value and ties between codes."""
    w = torch.randn(n, k, generator=generator(seed))
    w[0] = 0
    w[1] = w[1].abs()
    w[2] = -w[2].abs()
    w[3] *= 1e-7
    w[4] *= torch.finfo(dtype).max / w[4].abs().max() * 0.999
    w[5] = torch.arange(k) % 16 - 7.5
    w[6] = -21 * 2.0**-24 * (torch.arange(k) % 4 == 0)  # float16 rounds the scale, 1.4 subnormal units, to 1
    return w.to(dtype)


def exact_quantize(w: Tensor, group_size: int, scale_dtype: torch.dtype, symmetric: bool):
    """Codes, scales and zero points by the docstring's formulas in fractions; Python rounds fractions half to even."""
    n_size, k_size = w.shape
    groups = k_size // group_size
    codes = torch.empty(n_size, k_size, dtype=torch.int64)
    scales = torch.empty(n_size, groups, dtype=scale_dtype)
    zeros = torch.empty(n_size, groups, dtype=torch.int64)

    def clamped(value: Fraction) -> int:
        return min(max(round(value), 0), 15)

    for n, g in itertools.product(range(n_size), range(groups)):
        values = [fraction(v) for v in w[n, g * group_size : (g + 1) * group_size]]
        low, high = min(0, *values), max(0, *values)
        scales[n, g] = round_to_float32(max(high, -low) / Fraction(15, 2) if symmetric else (high - low) / 15)
        s = fraction(scales[n, g])
        zero = 8 if symmetric else clamped(-low / s) if s else 0
        zeros[n, g] = zero
        for k, value in enumerate(values):
            codes[n, g * group_size + k] = min(max(round(value / s) + zero, 0), 15) if s else zero
    return codes, scales, zeros


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
def test_quantize_int4_follows_the_formula(dtype, symmetric):
    for seed, group_size in enumerate((32, -1)):
        w = weights_to_quantize(8, 64, dtype, seed)
        weight = Int4Weight.quantize(w, group_size, symmetric)
        codes, scales, zeros = exact_quantize(w, weight.group_size, dtype, symmetric)
        got = weight.canonical()
        assert weight.is_packed and weight.kind == ("symmetric" if symmetric else "zero_point")
        assert_bitwise(got["scales"], scales)
        q = torch.stack((got["qweight"] & 15, got["qweight"] >> 4), -1).flatten(1)
        assert torch.equal(q.long(), codes)
        if not symmetric:
            assert torch.equal(got["zeros"].long(), zeros)


@pytest.mark.parametrize("symmetric", (True, False))
def test_quantize_int4_is_within_half_a_step(symmetric):
    w = torch.randn(40, 96, generator=generator(3), dtype=torch.float64)
    weight = Int4Weight.quantize(w, 32, symmetric)
    assert weight.scale_dtype == torch.float32  # no kernel reads float64 scales
    step = weight.canonical()["scales"].double().repeat_interleave(32, 1)
    assert ((weight.dequantize().double() - w).abs() <= step * (0.5 + 1e-6)).all()


def test_quantize_int8_follows_the_formula():
    own = [(dtype, dtype) for dtype in SCALE_DTYPES]
    for dtype, scale_dtype in (*own, (torch.float16, torch.float32), (torch.bfloat16, torch.float32)):
        w = weights_to_quantize(8, 64, dtype, 5)
        got = Int8Weight.quantize(w, 16, scale_dtype).canonical()
        groups = w.view(8, 4, 16).double()
        scales = (groups.abs().amax(-1) / 127).float().to(scale_dtype)
        quotient = torch.where(scales[..., None] == 0, 0, groups / scales.double()[..., None])
        assert_bitwise(got["scales"], scales)
        assert torch.equal(got["qweight"], quotient.round().clamp(-127, 127).view(8, 64).to(torch.int8))
    assert Int8Weight.quantize(w).group_size == 64


@pytest.mark.parametrize("dtype", (*SCALE_DTYPES, torch.float64), ids=str)
def test_int8_scales_are_float32(dtype):
    w = torch.randn(8, 32, generator=generator(0)).to(dtype)
    weight = Int8Weight.quantize(w)
    assert weight.scale_dtype == torch.float32
    assert_bitwise(weight.canonical()["scales"], (w.double().abs().amax(1, keepdim=True) / 127).float())


@pytest.mark.parametrize("dtype", (*SCALE_DTYPES, torch.float64), ids=str)
def test_quantize_leaves_the_weight_alone(dtype):
    w = torch.randn(24, 64, generator=generator(0)).to(dtype)
    before = w.clone()
    for quantize in (Int4Weight.quantize, Int8Weight.quantize):
        quantize(w, 16)
    assert_bitwise(w, before)


@pytest.mark.parametrize("quantize", (Int4Weight.quantize, Int8Weight.quantize))
def test_quantize_zero_groups_are_exact_zeros(quantize):
    w = torch.randn(24, 64, generator=generator(0))
    w[::2, 16:32] = 0
    weight = quantize(w, 16)
    assert (weight.canonical()["scales"][::2, 1] == 0).all()
    assert (weight.dequantize()[::2, 16:32] == 0).all() and (weight.dequantize()[1::2, 16:32] != 0).any()
    underflow = quantize(torch.full((8, 16), 1e-10), -1, scale_dtype=torch.float16)
    assert (underflow.dequantize() == 0).all()


@pytest.mark.parametrize("quantize", (Int4Weight.quantize, Int8Weight.quantize))
def test_quantize_refuses_what_it_cannot_hold(quantize):
    w = torch.randn(24, 64, generator=generator(0))
    for bad in (math.nan, math.inf, -math.inf):
        spoiled = w.clone()
        spoiled[17, 5] = bad
        with pytest.raises(ValueError, match="weight must be finite"):
            quantize(spoiled, 16)
    with pytest.raises(ValueError, match="a scale does not fit in float16"):
        quantize(w * 1e8, 16, scale_dtype=torch.float16)
    with pytest.raises(RuntimeError, match="weight must have a floating-point dtype, got int32"):
        quantize(w.int(), 16)
    with pytest.raises(RuntimeError, match="scales must have dtype float16, bfloat16 or float32, got float64"):
        quantize(w, 16, scale_dtype=torch.float64)
    with pytest.raises(ValueError, match="weight must have 2 dimensions"):
        quantize(w[0], 16)
    for n, k in ((20, 64), (24, 60), (24, 61)):
        with pytest.raises(ValueError, match=r"[NK] must be a multiple of 8, got (20|60|61)"):
            quantize(w[:n, :k], -1)
    for g in (0, -2, 8, 24, 48, 128):
        with pytest.raises(ValueError, match=f"a multiple of 16 that divides K = 64, got {g}"):
            quantize(w, g)


def test_quantize_reads_strided_and_grad_requiring_weights():
    parameter = nn.Parameter(torch.randn(64, 24, generator=generator(0)))
    weight = Int4Weight.quantize(parameter.t(), 16)
    dense = parameter.detach().t().contiguous()
    assert_tensors_equal(weight.canonical(), Int4Weight.quantize(dense, 16).canonical())
    wide = torch.full((24, 128), math.nan)
    wide[:, ::2] = dense
    assert_tensors_equal(weight.canonical(), Int4Weight.quantize(wide[:, ::2], 16).canonical())
    assert not any(t.requires_grad for t in weight.buffers())


# Construction --------------------------------------------------------------------------------------------------------


def spoil(name: str, change) -> dict[str, Tensor]:
    tensors, _ = random_int4(24, 64, 16, "zero_point", act_order=True)
    tensors[name] = change(tensors[name])
    return tensors


def put(value):
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[-1] = value
        return t

    return change


@pytest.mark.parametrize(
    "name, change, error, message",
    (
        ("qweight", lambda t: t.int(), RuntimeError, "qweight must have dtype uint8, got int32"),
        ("qweight", lambda t: t[0], ValueError, "qweight must have 2 dimensions"),
        ("qweight", lambda t: t[:20], ValueError, "N must be a multiple of 8, got 20"),
        ("qweight", lambda t: t[:, :30], ValueError, "K must be a multiple of 8, got 60"),
        ("qweight", lambda t: t[:8], ValueError, r"scales must have shape \[8, 4\], got \[24, 4\]"),
        ("scales", lambda t: t.double(), RuntimeError, "scales must have dtype .* got float64"),
        ("scales", lambda t: t[0], ValueError, "scales must have 2 dimensions"),
        ("scales", lambda t: t[:, :3], ValueError, r"scales must have shape \[N, K/G\] with K = 64, got \[24, 3\]"),
        ("scales", lambda t: t.repeat(1, 2), ValueError, "a multiple of 16 that divides K = 64, got 8"),
        ("scales", put(math.nan), ValueError, "scales must be finite"),
        ("scales", put(-math.inf), ValueError, "scales must be finite"),
        ("zeros", lambda t: t.int(), RuntimeError, "zeros must have dtype uint8, got int32"),
        ("zeros", lambda t: t[:, :2], ValueError, r"zeros must have shape \[24, 4\], got \[24, 2\]"),
        ("zeros", put(17), ValueError, "zeros must be in 0 ... 16, got 17"),
        ("zeros", lambda t: None, ValueError, "kind 'zero_point' needs zeros"),
        ("perm", lambda t: t.float(), RuntimeError, "perm must have dtype int32, got float32"),
        ("perm", lambda t: t[:30], ValueError, r"perm must have shape \[64\], got \[30\]"),
        ("perm", put(64), ValueError, "perm must be a permutation of 0 ... 63, got 64"),
        ("perm", put(-1), ValueError, "perm must be a permutation of 0 ... 63, got -1"),
        ("perm", lambda t: t % 63, ValueError, "perm must be a permutation of 0 ... 63, got 0 twice"),
        (
            "perm",
            lambda t: t % 4,
            ValueError,
            r"perm must be .*, got a g_idx: its perm is torch\.argsort\(g_idx, stable",
        ),
        (
            "perm",
            lambda t: (t // 16 * 2).clamp(max=3),
            ValueError,
            r"got a g_idx whose group 1 has 0 columns and not G = 16",
        ),
        ("perm", lambda t: (t + 3) // 17, ValueError, "got a g_idx whose group 0 has 14 columns and not G = 16"),
        ("perm", lambda t: t.tolist(), TypeError, "perm must be a tensor, got list"),
        ("zeros", lambda t: t.numpy(), TypeError, "zeros must be a tensor, got ndarray"),
        ("zeros", lambda t: t.long(), RuntimeError, "zeros must have dtype uint8, got int64"),
        ("qweight", lambda t: t.view(torch.int32), RuntimeError, "qweight must have dtype uint8, got int32"),
        ("qweight", lambda t: t.tolist(), TypeError, "qweight must be a tensor, got list"),
        ("scales", lambda t: None, TypeError, "scales must be a tensor, got NoneType"),
        ("perm", lambda t: t.to("meta"), RuntimeError, "perm must be on cpu like qweight, got meta"),
    ),
)
def test_construction_refuses(name, change, error, message):
    with pytest.raises(error, match=f"^qops.Int4Weight: .*{message}"):
        Int4Weight.from_canonical(**spoil(name, change), kind="zero_point")


def test_construction_refuses_the_rest():
    tensors, _ = random_int4(24, 64, 16, "offset")
    with pytest.raises(ValueError, match="kind must be one of symmetric, zero_point, float_zero, offset, got 'nf4'"):
        Int4Weight.from_canonical(**tensors, kind="nf4")
    with pytest.raises(ValueError, match="kind must be one of"):
        Int4Weight(64, 24, 16, kind="nf4", scale_dtype=torch.float16)
    with pytest.raises(ValueError, match="kind 'symmetric' takes no zeros"):
        Int4Weight.from_canonical(**tensors, kind="symmetric")
    tensors["zeros"][3, 1] = math.nan
    with pytest.raises(ValueError, match="zeros must be finite"):
        Int4Weight.from_canonical(**tensors, kind="float_zero")
    with pytest.raises(ValueError, match="a multiple of 16 that divides K = 64, got 48"):
        Int4Weight(64, 24, 48, scale_dtype=torch.float16)
    with pytest.raises(ValueError, match="scales must be finite"):
        Int8Weight.from_canonical(torch.zeros(8, 16, dtype=torch.int8), torch.full((8, 1), math.inf))
    with pytest.raises(RuntimeError, match=r"qops\.Int8Weight: qweight must have dtype int8, got uint8"):
        Int8Weight.from_canonical(torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 1))


def test_construction_keeps_dtypes_and_copies():
    tensors, _ = random_int4(24, 64, 16, "float_zero", act_order=True)
    half = {**tensors, "zeros": tensors["zeros"].half(), "perm": tensors["perm"].long()}
    weight = Int4Weight.from_canonical(**half, kind="float_zero")
    expected = {name: t.clone() for name, t in {**half, "perm": tensors["perm"]}.items()}
    for tensor in half.values():
        tensor.zero_()
    assert_tensors_equal(weight.canonical(), expected)


def test_packed_weights_share_no_memory_with_canonical_tensors():
    """One strip and one group per row: there the packed scales could be a view of the canonical ones."""
    for tensors, weight in (random_int4(16, 64, -1, "offset", act_order=True), random_int8(16, 64, -1)):
        before = {name: t.clone() for name, t in tensors.items()}
        canonical, state = weight.canonical(), weight.state_dict()
        for tensor in (*tensors.values(), *canonical.values(), *state.values()):
            tensor.zero_()
        assert_tensors_equal(weight.canonical(), before)


def test_canonical_of_strided_tensors():
    tensors, weight = random_int4(24, 64, 16, "offset")
    strided = {name: t.t().contiguous().t() for name, t in tensors.items()}
    assert_tensors_equal(Int4Weight.from_canonical(**strided, kind="offset").canonical(), weight.canonical())
    loose = Int4Weight.from_canonical(**strided, kind="offset", pack=False)
    assert torch.equal(loose.half().dequantize(), weight.dequantize())
    assert_tensors_equal(loose.pack().canonical(), tensors)


# Merged weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", (True, False))
def test_cat_and_split_are_inverse(pack):
    for act_order, kind in itertools.product((False, True), KINDS):
        parts = [random_int4(n, 64, 16, kind, act_order=False, seed=n, pack=pack) for n in (24, 8, 40)]
        if act_order:
            perm = torch.randperm(64).int()
            parts = [(t | {"perm": perm}, Int4Weight.from_canonical(**t, kind=kind, perm=perm)) for t, _ in parts]
        merged = Int4Weight.cat([weight for _, weight in parts])
        assert merged.is_packed and merged.out_features == 72
        assert torch.equal(merged.dequantize(), torch.cat([weight.dequantize() for _, weight in parts]))
        for (tensors, _), part in zip(parts, merged.split([24, 8, 40]), strict=True):
            assert not part.is_packed
            assert_tensors_equal(part.canonical(), tensors)
            storages = {t.untyped_storage().nbytes() for t in part.buffers()}
            assert storages == {t.nbytes for t in part.buffers()}  # no part holds on to the whole


def test_cat_and_split_refuse():
    base = random_int4(24, 64, 16, "zero_point", act_order=True)[1]
    for other in (
        random_int4(24, 80, 16, "zero_point", act_order=True)[1],
        random_int4(24, 64, 32, "zero_point", act_order=True)[1],
        random_int4(24, 64, 16, "symmetric", act_order=True)[1],
        random_int4(24, 64, 16, "zero_point", act_order=True, scale_dtype=torch.float32)[1],
        random_int4(24, 64, 16, "zero_point")[1],
        copy.deepcopy(base).to("meta"),
    ):
        with pytest.raises(ValueError, match=r"qops.Int4Weight.cat: weights must be alike"):
            Int4Weight.cat([base, other])
    with pytest.raises(ValueError, match="must share one perm"):
        Int4Weight.cat([base, random_int4(24, 64, 16, "zero_point", act_order=True, seed=1)[1]])
    with pytest.raises(ValueError, match="at least one"):
        Int4Weight.cat([])
    for sizes in ([], [24, 8], [32, -8], [16]):
        with pytest.raises(ValueError, match="sizes must add up to N = 24"):
            base.split(sizes)
    with pytest.raises(ValueError, match="N must be a multiple of 8, got 12"):
        base.split([12, 12])
