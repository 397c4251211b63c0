"""What int4_gemm does with its product before it stores it: bit for bit the operators that it saves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import qops
from qops.ops.int4_gemm import int4_gemm_ref
from qops.testing import (
    FLOAT_DTYPES,
    Guarded,
    assert_bitwise,
    assert_within,
    random_activations,
    rounding_bound,
    silu_mul_bound,
    strided_rows,
    weight_only_bound,
)
from tests.support.ops.random_weights import KINDS, group_sizes, random_int4

# N odd and even multiples of 8, one strip and several, more rows than a tile has.
SHAPES = ((8, 16), (24, 48), (64, 144), (80, 256))
GATE_UP = ((16, 16), (48, 64), (80, 144), (160, 80))
SCALE, ZERO_POINT = torch.tensor(0.05), torch.tensor(-7, dtype=torch.int32)


def cases(shapes: tuple[tuple[int, int], ...]) -> list[tuple[int, qops.Int4Weight, Tensor | None]]:
    """(seed, weight, bias): every kind, every group size, with act-order and a bias or without."""
    found = []
    for seed, ((n, k), kind) in enumerate(itertools.product(shapes, KINDS)):
        sizes = group_sizes(k)
        act_order, scale_dtype = seed % 3 == 0, FLOAT_DTYPES[seed % 3]
        _, w = random_int4(n, k, sizes[seed % len(sizes)], kind, scale_dtype=scale_dtype, act_order=act_order)
        bias = random_activations(n, dtype=FLOAT_DTYPES[seed % 2], seed=seed) if seed % 2 else None
        found.append((seed, w, bias))
    return found


def activations(m: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    x = random_activations(m, k, dtype=dtype, seed=seed)
    x[m // 2, k // 3] = 3000.0  # a massive activation: four digits
    return x


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("m", (1, 3, 7))
def test_residual(m, dtype):
    for seed, w, bias in cases(SHAPES):
        x = activations(m, w.in_features, dtype, seed)
        residual = random_activations(m, w.out_features, dtype=dtype, seed=seed + 1)
        want = qops.int4_gemm(x, w, bias) + residual
        assert_bitwise(qops.int4_gemm(x, w, bias, residual=residual), want, str(w))
        assert_bitwise(qops.int4_gemm(x, w, bias, residual=strided_rows(residual)), want, f"rows apart, {w}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("m", (1, 3, 7))
def test_silu_mul(m, dtype):
    for seed, w, bias in cases(GATE_UP):
        x = activations(m, w.in_features, dtype, seed)
        want = qops.silu_mul(qops.int4_gemm(x, w, bias))
        w.mix_gate_up()
        assert_bitwise(qops.int4_gemm(x, w, bias, silu_mul=True), want, str(w))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("m", (1, 3, 7))
def test_static_int8(m, dtype):
    for seed, w, bias in cases(SHAPES):
        x = activations(m, w.in_features, dtype, seed)
        for zero_point in (None, ZERO_POINT):
            want = qops.quantize_int8_static(qops.int4_gemm(x, w, bias), SCALE, zero_point)
            got = qops.int4_gemm(x, w, bias, out_scale=SCALE, out_zero_point=zero_point)
            assert_bitwise(got, want, f"{w} {zero_point}")


def test_values_that_are_not_finite():
    _, w = random_int4(32, 64, 32, "symmetric", scale_dtype=torch.float32)
    mixed = qops.Int4Weight.from_canonical(**w.canonical(), kind=w.kind).mix_gate_up()
    for dtype in FLOAT_DTYPES:
        x = random_activations(4, 64, dtype=dtype, seed=0)
        x[0, 3], x[1, 4] = float("nan"), float("inf")
        x[2] = torch.finfo(dtype).max
        y = qops.int4_gemm(x, w)
        assert_bitwise(qops.int4_gemm(x, w, residual=y), y + y, "residual")
        assert_bitwise(qops.int4_gemm(x, mixed, silu_mul=True), qops.silu_mul(y), "silu_mul")
        assert_bitwise(qops.int4_gemm(x, w, out_scale=SCALE), qops.quantize_int8_static(y, SCALE), "int8")
        assert bool((qops.int4_gemm(x, w, out_scale=SCALE)[:2] == 0).all())


def test_each_rounding_is_there():
    """With the sum not rounded before the residual, or gate not before silu, other bits would come out."""
    _, w = random_int4(64, 144, 48, "zero_point")
    x = random_activations(33, 144, dtype=torch.bfloat16, seed=0)
    exact = int4_gemm_ref(x, w)
    residual = random_activations(33, 64, dtype=torch.bfloat16, seed=1)
    once = (exact + residual.double()).bfloat16()
    assert not torch.equal(qops.int4_gemm(x, w, residual=residual), once)
    w.mix_gate_up()
    assert not torch.equal(qops.int4_gemm(x, w, silu_mul=True), int4_gemm_ref(x, w, silu_mul=True).bfloat16())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_accuracy_against_float64(dtype):
    for seed, w, bias in cases(GATE_UP):
        x = random_activations(5, w.in_features, dtype=dtype, seed=seed)
        residual = random_activations(5, w.out_features, dtype=dtype, seed=seed + 1)
        y = int4_gemm_ref(x, w, bias)
        error = weight_only_bound(x, w, bias) + rounding_bound(y, dtype)
        ref = int4_gemm_ref(x, w, bias, residual=residual)
        bound = error + rounding_bound(ref, torch.float32)
        assert_within(qops.int4_gemm(x, w, bias, residual=residual), ref, bound, "residual")
        gate, up, gate_error, up_error = (*y.chunk(2, dim=-1), *error.chunk(2, dim=-1))
        bound = silu_mul_bound(gate, up, dtype, gate_error=gate_error, up_error=up_error)
        ref = int4_gemm_ref(x, w, bias, silu_mul=True)
        w.mix_gate_up()
        assert_within(qops.int4_gemm(x, w, bias, silu_mul=True), ref, bound, "silu_mul")


def test_rows_do_not_depend_on_batch_or_threads(threads):
    _, w = random_int4(200, 576, 64, "offset")
    x, r = activations(67, 576, torch.bfloat16, 0), random_activations(67, 200, dtype=torch.bfloat16, seed=1)
    threads(1)
    together = qops.int4_gemm(x, w, residual=r)
    threads(2)
    assert_bitwise(qops.int4_gemm(x, w, residual=r, batch_invariant=True), together, "two threads")
    for rows in ([0], [5, 33], list(range(66, -1, -1))):
        assert_bitwise(qops.int4_gemm(x[rows], w, residual=r[rows]), together[rows], str(rows[:4]))


def epilogues(n: int, x: Tensor) -> dict[str, dict[str, Any]]:
    residual = random_activations(*x.shape[:-1], n, dtype=x.dtype, seed=9)
    return {
        "residual": {"residual": residual},
        "silu_mul": {"silu_mul": True},
        "out_scale": {"out_scale": SCALE, "out_zero_point": ZERO_POINT},
    }


def weights() -> tuple[qops.Int4Weight, qops.Int4Weight]:
    _, w = random_int4(48, 64, 32, "zero_point", act_order=True)
    return w, qops.Int4Weight.from_canonical(**w.canonical(), kind=w.kind).mix_gate_up()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_out(dtype):
    plain, mixed = weights()
    for m in (0, 1, 5):
        x = strided_rows(random_activations(m, 64, dtype=dtype, seed=m))
        for name, extra in epilogues(48, x).items():
            w = mixed if name == "silu_mul" else plain
            want = qops.int4_gemm(x, w, **extra)
            out = Guarded(torch.full_like(want, 77))
            assert qops.int4_gemm(x, w, **extra, out=out.tensor) is out.tensor
            assert_bitwise(out.tensor, want, name)
            out.check()


def test_a_residual_may_be_the_output():
    w, _ = weights()
    x = random_activations(5, 64, dtype=torch.bfloat16, seed=0)
    stream = random_activations(5, 48, dtype=torch.bfloat16, seed=1)
    want = qops.int4_gemm(x, w, residual=stream)
    qops.int4_gemm(x, w, residual=stream, out=stream)
    assert_bitwise(stream, want)
    memory = torch.zeros(10, 48, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"out must lie apart from residual in memory"):
        qops.int4_gemm(x, w, residual=memory[:5], out=memory[1:6])
    scale = torch.ones(12, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"out must lie apart from out_scale in memory"):
        qops.int4_gemm(x[:1], w, out_scale=scale[0], out=scale.view(torch.int8).view(1, 48))


def arguments(device: str, **changes: Any) -> dict[str, Any]:
    w, _ = weights()
    values: dict[str, Any] = {
        "x": torch.zeros(2, 64, dtype=torch.bfloat16),
        "packed": w.packed,
        "scales": w.scales,
        "zeros": w.zeros,
        "perm": w.perm,
        "bias": None,
        "out_features": 48,
        "group_size": 32,
        "kind": 1,
        **changes,
    }
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()}


R = torch.zeros(2, 48, dtype=torch.bfloat16)
ODD = random_int4(24, 64, 32, "zero_point", act_order=True)[1]
ODD_WEIGHT = {"packed": ODD.packed, "scales": ODD.scales, "zeros": ODD.zeros, "out_features": 24}
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "residual dtype": (
        {"residual": R.float()},
        RuntimeError,
        "residual must have dtype bfloat16, got float32",
    ),
    "residual shape": (
        {"residual": R[:1]},
        ValueError,
        r"residual must have shape \[\.\.\., N\] = \[2, 48\], got \[1, 48\]",
    ),
    "residual stride": (
        {"residual": R.t().contiguous().t()},
        ValueError,
        "residual must have stride 1 in its last.*got 2",
    ),
    "residual and silu_mul": (
        {"residual": R, "silu_mul": True},
        ValueError,
        "residual must be None with .*got a tensor",
    ),
    "residual and int8": ({"residual": R, "out_scale": SCALE}, ValueError, "residual must be None with .*got a tensor"),
    "silu_mul and int8": (
        {"silu_mul": True, "out_scale": SCALE},
        ValueError,
        "out_scale must be None with silu_mul, got",
    ),
    "odd silu_mul": ({**ODD_WEIGHT, "silu_mul": True}, ValueError, "out_features must be a multiple of 16.*got 24"),
    "lone zero point": (
        {"out_zero_point": ZERO_POINT},
        ValueError,
        "out_zero_point must be None without out_scale, got",
    ),
    "scale dtype": ({"out_scale": SCALE.double()}, RuntimeError, "out_scale must have dtype float32, got float64"),
    "scale size": ({"out_scale": torch.ones(2)}, ValueError, "out_scale must have 1 element, got 2"),
    "zero point": (
        {"out_scale": SCALE, "out_zero_point": ZERO_POINT.long()},
        RuntimeError,
        "out_zero_point must have dtype int32, got int64",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_the_same_with_fake_tensors(case):
    changes, error, text = ERRORS[case]
    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.int4_gemm: {text}") as caught:
            torch.ops.qops.int4_gemm.fused(**arguments(device, **changes))
        messages.append(str(caught.value))
        out = torch.empty(2, 48, dtype=torch.bfloat16, device=device)
        with pytest.raises(error, match=rf"^qops\.int4_gemm: {text}"):
            torch.ops.qops.int4_gemm.fused_out(**arguments(device, **changes), out=out)
    assert messages[0] == messages[1]


def test_out_has_the_shape_and_dtype_of_the_epilogue():
    wrong = torch.empty(2, 48)
    for extra, error, text in (
        ({"silu_mul": True}, ValueError, r"out must have shape \[\.\.\., N / 2\] = \[2, 24\], got \[2, 48\]"),
        ({"out_scale": SCALE}, RuntimeError, "out must have dtype int8, got bfloat16"),
    ):
        for device in ("cpu", "meta"):
            with pytest.raises(error, match=rf"^qops\.int4_gemm: {text}$"):
                torch.ops.qops.int4_gemm.fused_out(**arguments(device, **extra), out=wrong.bfloat16().to(device))


@pytest.mark.parametrize("bad", (0.0, -1.0, float("nan"), float("inf")))
def test_values_of_the_output_scale(bad):
    with pytest.raises(ValueError, match=r"^qops\.int4_gemm: out_scale must be positive and finite, got"):
        torch.ops.qops.int4_gemm.fused(**arguments("cpu", out_scale=torch.tensor(bad)))
    with pytest.raises(ValueError, match=r"^qops\.int4_gemm: out_zero_point must lie in -128 \.\. 127, got 128"):
        far = torch.tensor(128, dtype=torch.int32)
        torch.ops.qops.int4_gemm.fused(**arguments("cpu", out_scale=SCALE, out_zero_point=far))


def test_silu_mul_has_to_fit_the_weight():
    plain, mixed = weights()
    x = torch.zeros(1, 64)
    with pytest.raises(
        ValueError, match=r"qops\.int4_gemm: silu_mul must be True for a weight with mixed_gate_up = True"
    ):
        qops.int4_gemm(x, mixed)
    with pytest.raises(
        ValueError, match=r"qops\.int4_gemm: silu_mul must be False for a weight with mixed_gate_up = False"
    ):
        qops.int4_gemm(x, plain, silu_mul=True)


def test_grad_is_refused():
    w, _ = weights()
    refused = pytest.raises(RuntimeError, match=r"qops\.int4_gemm: residual must not require grad")
    with torch.inference_mode(False), torch.enable_grad(), refused:
        qops.int4_gemm(torch.ones(1, 64), w, residual=torch.ones(1, 48, requires_grad=True))


@pytest.mark.parametrize("name", ("residual", "silu_mul", "out_scale"))
def test_opcheck(name):
    with torch.inference_mode(False), torch.no_grad():
        plain, mixed = weights()
        w = mixed if name == "silu_mul" else plain
        x = random_activations(2, 3, 64, dtype=torch.bfloat16, seed=0)
        args = (x, w.packed, w.scales, w.zeros, w.perm, torch.zeros(48), 48, 32, 1, False)
        extra = {key: t.clone() if isinstance(t, Tensor) else t for key, t in epilogues(48, x)[name].items()}
        torch.library.opcheck(torch.ops.qops.int4_gemm.fused, args, extra)
        out = torch.empty_like(torch.ops.qops.int4_gemm.fused(*args, **extra))
        torch.library.opcheck(torch.ops.qops.int4_gemm.fused_out, args, {**extra, "out": out})


def test_compile():
    torch._dynamo.reset()
    plain, mixed = weights()
    _, down = random_int4(64, 24, 24, "symmetric")

    def mlp(x):
        hidden = qops.int4_gemm(x, mixed, silu_mul=True)
        y = qops.int4_gemm(hidden, down, residual=x)
        return y, qops.int4_gemm(y, plain, out_scale=SCALE)

    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (3, 5):
        x = random_activations(m, 64, dtype=torch.bfloat16, seed=m)
        for got, want in zip(compiled(x), mlp(x), strict=True):
            assert_bitwise(got, want, f"M = {m}")
