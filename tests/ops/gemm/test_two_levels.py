"""Scales and offsets of two levels: every operator gives the bits of the same weight with float32 ones, which the other
tests compare with the contract."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import qops
from qops.ops.int4_gemm import KINDS
from qops.testing import FLOAT_DTYPES, Guarded, assert_bitwise, random_activations
from tests.support.ops.blocks import attention_arguments, mlp_arguments, of_weight
from tests.support.ops.random_weights import random_levels
from tests.support.ops.walls import before_a_wall

# Of one strip and several, half a strip, one block of 256 columns and slices that end within one.
SHAPES = ((8, 256, 16), (24, 512, 32), (40, 768, 64), (72, 1280, 128), (200, 2304, 32))
FORMS = tuple(itertools.product((4, 8), ("symmetric", "offset")))
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 33, 50)


def gemm(x: torch.Tensor, w: Any, bias: torch.Tensor | None = None, **how: Any) -> torch.Tensor:
    product = qops.int4_gemm if isinstance(w, qops.Int4Weight) else qops.int8_weight_only_gemm
    return product(x, w, bias, **how)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("bits, kind", FORMS)
def test_products_have_the_bits_of_float32_scales(bits, kind, dtype):
    for seed, (n, k, group_size) in enumerate(SHAPES):
        _, w = random_levels(n, k, group_size, kind, bits=bits, act_order=seed % 2 == 1, seed=seed)
        wide = w.widened()
        assert w.scales.dtype == torch.int8 and wide.scales.dtype == torch.float32
        bias = random_activations(n, dtype=torch.float32, seed=seed) if seed % 2 else None
        x = random_activations(ROWS[-1], k, dtype=dtype, seed=seed)
        x[2] = 0
        x[3, k // 2] = 3000.0  # a massive activation: four digits
        x[5, 7] = float("nan")
        for m in ROWS:
            assert_bitwise(gemm(x[:m], w, bias), gemm(x[:m], wide, bias), f"M = {m}, {w}")


@pytest.mark.parametrize("count", (1, 2, 3))
def test_any_number_of_threads(count, threads):
    _, w = random_levels(328, 2048, 32)
    x = random_activations(40, 2048, dtype=torch.bfloat16, seed=0)
    threads(1)
    want = qops.int4_gemm(x, w.widened())
    threads(count)
    for m in (1, 8, 40):
        assert_bitwise(qops.int4_gemm(x[:m], w), want[:m], f"M = {m}")


@pytest.mark.parametrize("kind", ("symmetric", "offset"))
def test_rows_of_8_bits(kind):
    for seed, (n, k, group_size) in enumerate(SHAPES):
        _, w = random_levels(n, k, group_size, kind, act_order=seed % 2 == 1, seed=seed)
        q, scale = qops.quantize_int8(random_activations(ROWS[-1], k, dtype=torch.bfloat16, seed=seed))
        for m in ROWS:
            want = qops.int4_int8_gemm(q[:m], scale[:m], w.widened())
            assert_bitwise(qops.int4_int8_gemm(q[:m], scale[:m], w), want, f"M = {m}, {w}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("symmetric", "offset"))
def test_weights_as_numbers(kind, dtype):
    """By the formula, not by another operator: float64 holds the product, the sum is rounded once."""
    for seed, (n, k, group_size) in enumerate(SHAPES):
        tensors, w = random_levels(n, k, group_size, kind, act_order=seed % 2 == 1, seed=seed)
        codes = torch.stack((tensors["qweight"] & 15, tensors["qweight"] >> 4), -1).view(n, -1, group_size).double()
        s, *o = (
            (t[..., :2].contiguous().view(torch.float16).double() * t[..., 2:]).flatten(1).unsqueeze(-1)
            for t in (tensors["scales"], tensors.get("zeros"))
            if t is not None
        )
        want = (s * (codes - 8) if kind == "symmetric" else s * codes + o[0]).float().view(n, k)
        if "perm" in tensors:
            want = torch.empty_like(want).index_copy_(1, tensors["perm"].long(), want)
        assert_bitwise(w.dequantize(), want)
        assert_bitwise(qops.int4_dequantize(w, dtype), want.to(dtype))
        assert_bitwise(w.widened().dequantize(), want)
        if n % 16 == 0:
            assert_bitwise(qops.int4_dequantize(w.mix_gate_up(), dtype), want.to(dtype))


@pytest.mark.parametrize("m", (1, 5, 37))
def test_epilogues(m):
    _, w = random_levels(48, 512, 32, act_order=True)
    wide = w.widened()
    x = random_activations(m, 512, dtype=torch.bfloat16, seed=m)
    residual, scale = random_activations(m, 48, dtype=torch.bfloat16, seed=m + 1), torch.tensor(3.0)
    for how in ({"residual": residual}, {"out_scale": scale}):
        assert_bitwise(gemm(x, w, **how), gemm(x, wide, **how), str(how.keys()))
    w.mix_gate_up(), wide.mix_gate_up()
    assert_bitwise(gemm(x, w, silu_mul=True), gemm(x, wide, silu_mul=True))


@pytest.mark.parametrize("bits, kind", FORMS)
@pytest.mark.parametrize("tokens", (1, 3))
def test_decoding_blocks(tokens, bits, kind):
    mlp = mlp_arguments(leading=(1, tokens), h=512, columns=256, mixed=bits == 4)
    attention = attention_arguments(t=tokens, h=512, heads=(16, 4), d=16)
    shapes = {"gate_up": (512, 512), "down": (512, 256), "qkv": (384, 512), "o": (512, 256)}
    weights = {name: random_levels(n, k, 32, kind, bits=bits)[1] for name, (n, k) in shapes.items()}
    if bits == 4:
        weights["gate_up"].mix_gate_up()
    for op, arguments, names in (
        ("mlp_block", mlp, ("gate_up", "down")),
        ("attention_block", attention, ("qkv", "o")),
    ):
        results = []
        for form in (lambda w: w, lambda w: w.widened()):
            cache = {name: t.clone() for name, t in arguments.items() if name in ("keys", "values")}
            given = arguments | cache
            for name in names:
                given |= of_weight(name, form(weights[name]), None)
            results.append((getattr(torch.ops.qops, op)(**given), *cache.values()))
        for got, want in zip(*results, strict=True):
            assert_bitwise(got, want, op)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", ("symmetric", "offset"))
def test_rows_of_a_table(kind, dtype):
    for packed, mixed in itertools.product((True, False), (True, False)):
        _, w = random_levels(48, 512, 16, kind, bits=8, act_order=True, pack=packed)
        w = w.mix_gate_up() if mixed else w
        ids = torch.tensor([[0, 47, 23], [8, 24, 47]])
        assert_bitwise(w.rows(ids, dtype), w.dequantize(dtype)[ids], f"{w}")


@pytest.mark.parametrize("bits, kind", FORMS)
@pytest.mark.parametrize("m", (1, 3, 8, 33))
def test_nothing_behind_them_is_read_and_they_may_begin_anywhere(m, bits, kind):
    _, w = random_levels(40, 512, 32, kind, bits=bits)
    x = random_activations(m, 512, dtype=torch.bfloat16, seed=0)
    want, op = gemm(x, w), torch.ops.qops.int4_gemm if bits == 4 else torch.ops.qops.int8_weight_only_gemm

    def at_an_odd_address(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    for place in (before_a_wall, at_an_odd_address):
        weight = [None if t is None else place(t) for t in (w.packed, w.scales, w.zeros)]
        out = Guarded(torch.empty_like(want))
        op.out(x, *weight, None, None, 40, 32, *([KINDS.index(kind)] if bits == 4 else []), out=out.tensor)
        assert_bitwise(out.tensor, want)
        out.check()


def arguments(device: str, **changes: Any) -> dict[str, Any]:
    _, w = random_levels(24, 512, 32)
    values = {
        "x": torch.zeros(2, 512, dtype=torch.bfloat16),
        "packed": w.packed,
        "scales": w.scales,
        "zeros": w.zeros,
        "perm": None,
        "bias": None,
        "out_features": 24,
        "group_size": 32,
        "kind": 3,
        **changes,
    }
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in values.items()}


def int8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int8)


NARROW = {"x": torch.zeros(2, 264), "packed": torch.zeros(2, 8 * 264, dtype=torch.uint8)}
ERRORS = {
    "rank": (
        {"scales": int8(2, 16, 16)},
        ValueError,
        r"scales must have shape \[S, K / 256, 2 \+ 256 / group_size, 16\]",
    ),
    "codes": ({"scales": int8(2, 2, 18, 16)}, ValueError, r"scales must .* = \[2, 2, 10, 16\], got \[2, 2, 18, 16\]"),
    "blocks": ({"scales": int8(2, 1, 10, 16)}, ValueError, r"scales must .* = \[2, 2, 10, 16\], got \[2, 1, 10, 16\]"),
    "group size": ({"group_size": 256}, ValueError, "scales must be floats but for groups of 16, 32, 64 or 128 and K"),
    "group of 264": (
        NARROW | {"group_size": 264},
        ValueError,
        "scales must be floats but .* a multiple of 256, got int8 for groups of 264 and K = 264",
    ),
    "unsigned": (
        {"scales": int8(2, 2, 10, 16).view(torch.uint8)},
        RuntimeError,
        "scales must have dtype float32, float16 or bfloat16, or int8 of two levels, got uint8",
    ),
    "K of 272": (
        NARROW | {"packed": torch.zeros(2, 8 * 272, dtype=torch.uint8), "group_size": 16, "x": torch.zeros(2, 272)},
        ValueError,
        "scales must be floats but .* a multiple of 256, got int8 for groups of 16 and K = 272",
    ),
    "strips": ({"scales": int8(1, 2, 10, 16)}, ValueError, r"scales must .* = \[2, 2, 10, 16\], got \[1, 2, 10, 16\]"),
    "strides": (
        {"scales": int8(2, 2, 16, 10).transpose(2, 3)},
        ValueError,
        "scales must be contiguous",
    ),
    "zero points": ({"kind": 1}, ValueError, r"kind must be 0 \(symmetric\) or 3 \(offset\) with int8 scales, got 1"),
    "float zeros": ({"kind": 2}, ValueError, r"kind must be 0 \(symmetric\) or 3 \(offset\) with int8 scales, got 2"),
    "other kind": ({"kind": 4}, ValueError, r"kind must be 0 \(symmetric\), 1 .*, got 4"),
    "zeros of one level": ({"zeros": torch.zeros(2, 16, 16)}, RuntimeError, "zeros must have dtype int8, got float32"),
    "zeros shape": (
        {"zeros": int8(2, 2, 18, 16)},
        ValueError,
        r"zeros must have the shape of scales = \[2, 2, 10, 16\]",
    ),
    "scales of one level": (
        {"scales": torch.zeros(2, 16, 16)},
        RuntimeError,
        "zeros must have dtype float32, float16 or bfloat16, got int8",
    ),
    "no zeros": ({"zeros": None}, ValueError, "zeros must be given for this kind, got None"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_the_same_with_fake_tensors(case):
    changes, error, text = ERRORS[case]
    messages = []
    for device in ("cpu", "meta"):
        out = torch.full((2, 24), 7, dtype=torch.bfloat16, device=device)
        for more in ({}, {"out": out}):
            op = torch.ops.qops.int4_gemm.out if more else torch.ops.qops.int4_gemm.default
            with pytest.raises(error, match=rf"^qops\.int4_gemm: {text}") as caught:
                op(**arguments(device, **changes), **more)
            messages.append(str(caught.value))
        assert device == "meta" or bool((out == 7).all())
    assert len(set(messages)) == 1


@pytest.mark.parametrize("bits", (4, 8))
def test_fake_tensors_of_a_gpu_refuse_them(bits):
    """As its kernels do: what is packed there is float32."""
    codes = torch.uint8 if bits == 4 else torch.int8
    with FakeTensorMode():
        x, packed = torch.empty(1, 256, device="cuda").half(), torch.empty(1, 512 * bits, dtype=codes, device="cuda")
        scales = torch.empty(1, 1, 10, 16, dtype=torch.int8, device="cuda")
        op, kind = (torch.ops.qops.int4_gemm, [3]) if bits == 4 else (torch.ops.qops.int8_weight_only_gemm, [])
        with pytest.raises(RuntimeError, match="scales must have dtype float32, float16 or bfloat16, got int8"):
            op(x, packed, scales, scales, None, None, 16, 32, *kind)


OF_264_COLUMNS = {
    **{"down": int8(32, 264 * 8).byte(), "gate_up": int8(33, 512 * 8).byte(), "gate_up_bias": None},
    **{"gate_up_scales": torch.zeros(33, 1, 16), "gate_up_zeros": None, "gate_up_perm": None, "gate_up_kind": 0},
}
BLOCK_ERRORS = {
    "unsigned": (
        {"down_scales": int8(32, 1, 10, 16).view(torch.uint8)},
        "down_scales must have dtype float32, float16 or bfloat16, or int8 of two levels, got uint8",
    ),
    "rank": (
        {"down_scales": int8(32, 8, 16)},
        r"down_scales must have shape \[S, K / 256, 2 \+ 256 / G, 16\]",
    ),
    "codes": (
        {"down_scales": int8(32, 1, 11, 16)},
        r"down_scales must have .* G = 16, 32, 64 or 128, got \[32, 1, 11, 16\]",
    ),
    "no codes": ({"down_scales": int8(32, 1, 2, 16)}, r"down_scales must have .* got \[32, 1, 2, 16\]"),
    "groups of 256": ({"down_scales": int8(32, 1, 3, 16)}, r"down_scales must have .* got \[32, 1, 3, 16\]"),
    "strips": ({"down_scales": int8(31, 1, 10, 16)}, r"down_scales must have .* S = 32, .* got \[31, 1, 10, 16\]"),
    "rows": ({"down_scales": int8(32, 1, 10, 15)}, r"down_scales must have .* got \[32, 1, 10, 15\]"),
    "columns": (OF_264_COLUMNS, r"down_scales must have .* K = 264, .* got \[32, 1, 10, 16\]"),
    "columns of one level": (
        OF_264_COLUMNS | {"down_scales": torch.zeros(32, 16, 16), "down_zeros": None, "down_kind": 0},
        "down_scales must have one group, or groups of a multiple of 16 columns that divides K = 264, got 16 groups",
    ),
    "blocks": ({"down_scales": int8(32, 2, 10, 16)}, r"down_scales must have .* K = 256, .* got \[32, 2, 10, 16\]"),
    "kind": ({"down_kind": 2}, r"down_kind must be 0 \(symmetric\) or 3 \(offset\) with int8 scales, got 2"),
    "zeros": ({"down_zeros": torch.zeros(32, 8, 16)}, "down_zeros must have dtype int8, got float32"),
    "zeros of others": (
        {"down_zeros": int8(32, 1, 18, 16)},
        r"down_zeros must have the shape of down_scales = \[32, 1, 10, 16\], got \[32, 1, 18, 16\]",
    ),
}


@pytest.mark.parametrize("case", BLOCK_ERRORS)
def test_errors_of_blocks(case):
    changes, text = BLOCK_ERRORS[case]
    given = mlp_arguments(h=512, columns=256) | of_weight("down", random_levels(512, 256, 32)[1], None) | changes
    messages = []
    for device in ("cpu", "meta"):
        there = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in given.items()}
        with pytest.raises((ValueError, RuntimeError), match=rf"^qops\.mlp_block: {text}") as caught:
            torch.ops.qops.mlp_block(**there)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("kind", ("symmetric", "offset"))
def test_opcheck(kind):
    with torch.inference_mode(False), torch.no_grad():
        _, w = random_levels(24, 512, 32, kind, act_order=True)
        x = random_activations(2, 3, 512, dtype=torch.bfloat16, seed=0)
        args = (x, w.packed, w.scales, w.zeros, w.perm, torch.zeros(24), 24, 32, KINDS.index(kind))
        torch.library.opcheck(torch.ops.qops.int4_gemm.default, args)


def test_compiled_products():
    torch._dynamo.reset()
    _, w = random_levels(256, 256, 32)

    def two(x: torch.Tensor) -> torch.Tensor:
        return qops.int4_gemm(qops.int4_gemm(x, w) * 1e-4, w)

    x = random_activations(3, 256, dtype=torch.bfloat16, seed=0)
    compiled = torch.compile(two, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(x), two(x))
