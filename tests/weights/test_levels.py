"""Weights with scales and offsets of two levels: forms, state, copies, moves, wrong input."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import qops
from qops._layout import levels_into_strips, levels_out_of_strips, widen_levels
from qops.testing import assert_bitwise, generator
from qops.weights import Int4Weight, Int8Weight
from tests.support.ops.random_weights import assert_tensors_equal, buffers, empty_like, random_levels

FORMS = tuple(itertools.product((4, 8), ("symmetric", "offset"), (16, 32, 64, 128)))


def class_of(bits: int) -> type[Int4Weight] | type[Int8Weight]:
    return Int4Weight if bits == 4 else Int8Weight


@pytest.mark.parametrize("bits, kind, group_size", FORMS)
def test_forms(bits, kind, group_size):
    """Canonical, packed as the docstring says, and back."""
    for n, k in ((24, 256), (32, 768), (0, 256), (8, 0)):
        tensors, w = random_levels(n, k, group_size, kind, bits=bits, act_order=True, seed=n)
        assert w.has_levels and w.scale_dtype == torch.int8 and w.group_size == group_size
        assert_tensors_equal(w.canonical(), tensors)
        strips, blocks, codes = (n + 15) // 16, k // 256, 256 // group_size
        for key in {"scales", "zeros"} & tensors.keys():
            packed = getattr(w, key)
            assert packed.shape == (strips, blocks, 2 + codes, 16) and packed.is_contiguous()
            for row, block in itertools.product(range(0, n, 7), range(blocks)):
                strip, lane = divmod(row, 16)
                halves = packed[strip, block, :2].reshape(-1)[2 * lane : 2 * lane + 2]
                assert_bitwise(halves, tensors[key][row, block, :2])
                assert_bitwise(packed[strip, block, 2:, lane], tensors[key][row, block, 2:])
        assert_tensors_equal(w.unpack().canonical(), tensors)
        assert_tensors_equal(w.pack().canonical(), tensors)


def test_levels_in_strips_are_a_permutation():
    for n, blocks, codes in ((8, 1, 2), (24, 3, 8), (160, 2, 16)):
        rows = torch.randint(-128, 128, (n, blocks, 2 + codes), dtype=torch.int8, generator=generator(n))
        strips = levels_into_strips(rows)
        assert_bitwise(levels_out_of_strips(strips, n), rows)
        assert strips.count_nonzero() == rows.count_nonzero()


def test_products_of_all_codes_and_halves_are_exact():
    """Every finite float16 times every code, against float64."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    codes = torch.arange(-128, 128).to(torch.int8)
    levels = torch.cat([halves[:, None].view(torch.int8), codes.expand(len(halves), -1)], dim=1)
    want = halves.double()[:, None] * codes.double()
    assert torch.equal(widen_levels(levels[:, None]).double(), want)


@pytest.mark.parametrize("bits, kind, group_size", FORMS)
def test_widened(bits, kind, group_size):
    for packed, mixed in itertools.product((True, False), (True, False)):
        _, w = random_levels(48, 512, group_size, kind, bits=bits, act_order=True, pack=packed)
        w = w.mix_gate_up() if mixed else w
        wide = w.widened()
        assert (wide.is_packed, wide.mixed_gate_up) == (packed, mixed) and not wide.has_levels
        assert wide.canonical()["scales"].dtype == torch.float32
        assert_bitwise(wide.dequantize(), w.dequantize())
        assert wide.widened() is wide and w.has_levels
        assert not w.is_like(wide)
        with pytest.raises(ValueError, match="weights must be alike"):
            type(w).cat([w, wide])


def test_bytes():
    """4.625 bits a weight of 4 bits with offsets, 4.3125 without; of 8 bits and groups of 16 8.5625."""
    for bits, kind, group_size, want in (
        (4, "offset", 32, 4.625),
        (4, "symmetric", 32, 4.3125),
        (8, "symmetric", 16, 8.5625),
    ):
        _, w = random_levels(64, 1024, group_size, kind, bits=bits)
        assert sum(t.nbytes for t in w.buffers()) * 8 == want * 64 * 1024


@pytest.mark.parametrize("bits, kind, group_size", FORMS)
def test_state_and_copies(bits, kind, group_size):
    tensors, w = random_levels(24, 512, group_size, kind, bits=bits, act_order=True)
    state = w.state_dict()
    for device in ("cpu", "meta"):
        loaded = empty_like(w, device)
        loaded.load_state_dict(state, assign=device == "meta")
        assert_tensors_equal(loaded.canonical(), tensors)
        assert repr(loaded) == repr(w)
    for packed in (True, False):
        (w.pack if packed else w.unpack)()
        for other in (copy.deepcopy(w), copy.copy(w), pickle.loads(pickle.dumps(w))):
            assert_tensors_equal(buffers(other), buffers(w))
    assert_tensors_equal(w.pack().to("cpu", torch.float16).half().canonical(), tensors)
    assert w.to("meta").is_packed and w.scales.dtype == torch.int8


@pytest.mark.parametrize("bits", (4, 8))
def test_a_state_of_float32_takes_the_place_of_two_levels(bits):
    """That of an older qops, and of who packed the weight for a GPU."""
    _, w = random_levels(24, 512, 32, bits=bits)
    wide = w.widened()
    for source, target in ((wide, empty_like(w)), (w, empty_like(wide))):
        target.load_state_dict(source.state_dict())
        assert_tensors_equal(target.canonical(), source.canonical())
        assert target.has_levels == source.has_levels and target.is_like(source)


@pytest.mark.parametrize("bits", (4, 8))
def test_a_refused_state_changes_nothing(bits):
    tensors, w = random_levels(24, 512, 32, bits=bits)
    wide = w.widened()
    before = w.scale_dtype, w.zero_dtype
    state = {**wide.state_dict(), "offsets": torch.full((24, 16), torch.inf)}
    with pytest.raises(RuntimeError, match="zeros must be finite"):
        w.load_state_dict(state)
    assert (w.scale_dtype, w.zero_dtype) == before
    assert_tensors_equal(w.canonical(), tensors)
    for change, message in (
        ({"scales": tensors["scales"][:, :1]}, r"scales must have shape \[24, 2, 10\], got \[24, 1, 10\]"),
        ({"scales": tensors["scales"].half()}, "scales must have dtype int8, got float16"),
        ({"offsets": wide.canonical()["zeros"]}, "zeros must have dtype int8, got float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            w.load_state_dict({**w.state_dict(), **change})
        assert_tensors_equal(w.canonical(), tensors)
    # Groups or kinds that have no two levels do not take them.
    other = class_of(bits)(512, 24, 256, "offset", scale_dtype=torch.float32)
    with pytest.raises(RuntimeError, match="int8 scales must be of groups of 16, 32, 64 or 128"):
        other.load_state_dict(w.state_dict())
    assert other.scale_dtype == torch.float32


@pytest.mark.parametrize("bits", (4, 8))
def test_parts(bits):
    tensors, w = random_levels(48, 512, 32, bits=bits)
    parts = w.split([16, 32])
    assert all(part.has_levels for part in parts)
    assert_tensors_equal(type(w).cat(parts).canonical(), tensors)
    order = torch.randperm(48, generator=generator(0))
    assert_bitwise(w.with_rows(order).dequantize(), w.dequantize()[order])
    assert_bitwise(w.in_stored_order().dequantize(), w.dequantize())


def int8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int8)


INFINITE = torch.tensor([0x00, 0x7C, *[1] * 8]).to(torch.int8).repeat(24, 2, 1)
ERRORS = (
    ({"scales": int8(24, 20)}, ValueError, r"int8 scales must have 3 dimensions, got shape \[24, 20\]"),
    ({"scales": int8(24, 2, 11)}, ValueError, r"int8 scales must have shape \[N, K/256, 2 \+ 256/G\] with K = 512"),
    ({"scales": int8(24, 3, 10)}, ValueError, r"int8 scales must have shape .*, got \[24, 3, 10\]"),
    ({"scales": int8(24, 2, 3)}, ValueError, r"int8 scales must have shape .*, got \[24, 2, 3\]"),
    ({"scales": int8(16, 2, 10)}, ValueError, r"scales must have shape \[24, 2, 10\], got \[16, 2, 10\]"),
    ({"scales": INFINITE}, ValueError, "scales must be finite, got NaN or infinity"),
    ({"zeros": INFINITE}, ValueError, "zeros must be finite, got NaN or infinity"),
    ({"zeros": torch.zeros(24, 16)}, RuntimeError, "zeros must have dtype int8, got float32"),
    ({"zeros": int8(24, 2, 18)}, ValueError, r"zeros must have shape \[24, 2, 10\], got \[24, 2, 18\]"),
    ({"scales": torch.zeros(24, 16)}, RuntimeError, "zeros must have dtype float16, bfloat16 or float32, got int8"),
)


@pytest.mark.parametrize("changes, error, message", ERRORS)
@pytest.mark.parametrize("bits", (4, 8))
def test_wrong_tensors_are_refused(bits, changes, error, message):
    tensors, _ = random_levels(24, 512, 32, bits=bits)
    with pytest.raises(error, match=rf"qops\.Int{bits}Weight: {message}"):
        class_of(bits).from_canonical(**{**tensors, **changes}, kind="offset")


def test_wrong_configurations_are_refused():
    tensors, _ = random_levels(24, 512, 32)
    for kind in ("zero_point", "float_zero"):
        with pytest.raises(ValueError, match=f"int8 scales must be of kind symmetric or offset, got '{kind}'"):
            Int4Weight.from_canonical(**tensors, kind=kind)
    for k, group_size in ((264, 264), (512, 256), (512, -1), (1536, 48), (384, 32)):
        with pytest.raises(
            ValueError, match="int8 scales must be of groups of 16, 32, 64 or 128 and a K that is a mult"
        ):
            Int4Weight(k, 16, group_size, scale_dtype=torch.int8)
    codes, levels = torch.full((8, 192), 136, dtype=torch.uint8), int8(8, 1, 10)
    with pytest.raises(ValueError, match=r"int8 scales must have shape .* with K = 384, a multiple of 256, and G"):
        Int4Weight.from_canonical(codes, levels, kind="symmetric")
    with pytest.raises(RuntimeError, match="zeros must have dtype float16, bfloat16 or float32, got int8"):
        Int4Weight(512, 16, 32, "offset", scale_dtype=torch.float32, zero_dtype=torch.int8)
    with pytest.raises(RuntimeError, match="scales must have dtype float16, bfloat16 or float32, got uint8"):
        Int4Weight(512, 16, 32, scale_dtype=torch.uint8)


def test_int8_products_of_8_bit_rows_refuse_them():
    """They take one scale a row."""
    _, w = random_levels(16, 256, 128, "symmetric", bits=8)
    q, scale = qops.quantize_int8(torch.ones(1, 256))
    with pytest.raises((ValueError, RuntimeError), match=r"qops\.int8_gemm: weight|qops\.int8_gemm: w_scale"):
        qops.int8_gemm(q, scale, w)


def test_a_linear_holds_and_saves_them():
    tensors, w = random_levels(24, 512, 32)
    linear = qops.nn.Int4Linear(w)
    model = nn.Sequential(linear)
    other = nn.Sequential(qops.nn.Int4Linear(empty_like(w)))
    other.load_state_dict(model.state_dict())
    assert_tensors_equal(other[0].weight.canonical(), tensors)
    x = torch.randn(3, 512, generator=generator(0))
    assert_bitwise(other(x), qops.int4_gemm(x, w))
