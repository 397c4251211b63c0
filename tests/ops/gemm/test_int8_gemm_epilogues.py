"""What int8_gemm does with its product before it stores it: bit for bit the operators that it saves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import qops
from qops.ops.int8_gemm import int8_gemm_ref
from qops.testing import (
    FLOAT_DTYPES,
    Guarded,
    assert_bitwise,
    assert_within,
    generator,
    int8_gemm_bound,
    random_activations,
    rounding_bound,
    silu_mul_bound,
    strided_rows,
)
from tests.support.ops.int8_gemm_oracle import activations, make_weight

# N odd and even multiples of 8, one strip and several, more rows than a tile has; K below and beyond 64.
SHAPES = ((8, 16), (24, 72), (40, 200), (136, 1032))
GATE_UP = ((16, 8), (48, 72), (80, 200), (160, 136))
ROWS = (0, 1, 2, 5, 7, 13, 33)
SCALE, ZERO_POINT = torch.tensor(0.05), torch.tensor(-7, dtype=torch.int32)


def mixed_rows_of(w: qops.Int8Weight) -> qops.Int8Weight:
    return qops.Int8Weight.from_canonical(**w.canonical()).mix_gate_up()


def cases(shapes: tuple[tuple[int, int], ...]):
    """(what, weight, q, scale, bias and zero point): with and without both."""
    for seed, ((n, k), m) in enumerate(itertools.product(shapes, ROWS)):
        w = make_weight(n, k, seed, FLOAT_DTYPES[seed % 3])
        q, scale, zero_point = activations(m, k, seed)
        bias = torch.randn(n, generator=generator(seed)).to(FLOAT_DTYPES[seed // 2 % 3])
        for b, z in itertools.product((None, bias), (None, zero_point)):
            yield f"{m}x{n}x{k}, bias {b is not None}, zero_point {z is not None}", w, q, scale, b, z


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_residual(dtype):
    for what, w, q, scale, bias, zero_point in cases(SHAPES):
        residual = random_activations(len(q), w.out_features, dtype=dtype, seed=w.in_features)
        more: dict[str, Any] = {"zero_point": zero_point, "out_dtype": dtype}
        want = qops.int8_gemm(q, scale, w, bias, **more) + residual
        assert_bitwise(qops.int8_gemm(q, scale, w, bias, **more, residual=residual), want, what)
        apart = strided_rows(residual)
        assert_bitwise(qops.int8_gemm(q, scale, w, bias, **more, residual=apart), want, f"rows apart, {what}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_silu_mul(dtype):
    for what, w, q, scale, bias, zero_point in cases(GATE_UP):
        more: dict[str, Any] = {"zero_point": zero_point, "out_dtype": dtype}
        want = qops.silu_mul(qops.int8_gemm(q, scale, w, bias, **more))
        assert_bitwise(qops.int8_gemm(q, scale, mixed_rows_of(w), bias, **more, silu_mul=True), want, what)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_static_int8(dtype):
    for what, w, q, scale, bias, zero_point in cases(SHAPES):
        more: dict[str, Any] = {"zero_point": zero_point, "out_dtype": dtype}
        y = qops.int8_gemm(q, scale, w, bias, **more)
        for z in (None, ZERO_POINT):
            got = qops.int8_gemm(q, scale, w, bias, **more, out_scale=SCALE, out_zero_point=z)
            assert_bitwise(got, qops.quantize_int8_static(y, SCALE, z), what)


def test_special_values():
    """NaN, infinities and zeros of scales go through the epilogues as through the operators."""
    w, (q, scale, _) = make_weight(48, 72, 0), activations(9, 72, 0)
    scale[2:9] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3e38])
    for dtype in FLOAT_DTYPES:
        y = qops.int8_gemm(q, scale, w, out_dtype=dtype)
        more: dict[str, Any] = {"out_dtype": dtype}
        assert_bitwise(qops.int8_gemm(q, scale, w, **more, residual=y), y + y, "residual")
        assert_bitwise(qops.int8_gemm(q, scale, mixed_rows_of(w), **more, silu_mul=True), qops.silu_mul(y), "silu_mul")
        got = qops.int8_gemm(q, scale, w, **more, out_scale=SCALE)
        assert_bitwise(got, qops.quantize_int8_static(y, SCALE), "int8")
        assert bool((got[2] == 0).all())


def test_each_rounding_is_there():
    """With the sum not rounded before the residual, or gate not before silu, other bits would come out."""
    w, (q, scale, _) = make_weight(64, 144, 0), activations(33, 144, 0)
    residual = random_activations(33, 64, dtype=torch.bfloat16, seed=1)
    exact = int8_gemm_ref(q, scale, w)
    assert not torch.equal(qops.int8_gemm(q, scale, w, residual=residual), (exact + residual.double()).bfloat16())
    once = int8_gemm_ref(q, scale, w, silu_mul=True).bfloat16()
    assert not torch.equal(qops.int8_gemm(q, scale, mixed_rows_of(w), silu_mul=True), once)
    codes = qops.quantize_int8_static(qops.int8_gemm(q, scale, w, out_dtype=torch.float32), SCALE)
    assert not torch.equal(qops.int8_gemm(q, scale, w, out_scale=SCALE), codes)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_accuracy_against_float64(dtype):
    for seed, (n, k) in enumerate(GATE_UP):
        w, (q, scale, _) = make_weight(n, k, seed), activations(5, k, seed)
        residual = random_activations(5, n, dtype=dtype, seed=seed)
        y = int8_gemm_ref(q, scale, w)
        error = int8_gemm_bound(q, scale, w) + rounding_bound(y, dtype)
        ref = int8_gemm_ref(q, scale, w, residual=residual)
        got = qops.int8_gemm(q, scale, w, residual=residual, out_dtype=dtype)
        assert_within(got, ref, error + rounding_bound(ref, torch.float32), "residual")
        gate, up, gate_error, up_error = (*y.chunk(2, dim=-1), *error.chunk(2, dim=-1))
        bound = silu_mul_bound(gate, up, dtype, gate_error=gate_error, up_error=up_error)
        ref = int8_gemm_ref(q, scale, w, silu_mul=True)
        got = qops.int8_gemm(q, scale, mixed_rows_of(w), silu_mul=True, out_dtype=dtype)
        assert_within(got, ref, bound, "silu_mul")


def test_rows_do_not_depend_on_batch_or_threads(threads):
    w, (q, scale, _) = make_weight(200, 576, 0), activations(67, 576, 0)
    residual = random_activations(67, 200, dtype=torch.bfloat16, seed=1)
    threads(1)
    together = qops.int8_gemm(q, scale, w, residual=residual)
    threads(2)
    assert_bitwise(qops.int8_gemm(q, scale, w, residual=residual), together, "two threads")
    for rows in ([0], [5, 33], list(range(66, -1, -1))):
        got = qops.int8_gemm(q[rows], scale[rows], w, residual=residual[rows])
        assert_bitwise(got, together[rows], str(rows[:4]))


# --- gate and up -----------------------------------------------------------------------------------------------------


def test_a_weight_of_gate_and_up_is_the_same_weight():
    for n, k, group_size in ((32, 16, -1), (48, 64, 16), (160, 136, -1)):
        plain = qops.Int8Weight.quantize(torch.randn(n, k, generator=generator(n)), group_size)
        mixed = mixed_rows_of(plain)
        assert mixed.mixed_gate_up and not plain.mixed_gate_up and "mixed_gate_up=True" in repr(mixed)
        assert not torch.equal(mixed.packed, plain.packed)
        for name, tensor in plain.canonical().items():
            assert_bitwise(mixed.canonical()[name], tensor, name)
        assert_bitwise(mixed.dequantize(), plain.dequantize())
        ids = torch.tensor([[0, n - 1], [n // 2, n // 2 - 1], [7, 8]])
        assert_bitwise(mixed.rows(ids), plain.rows(ids), "rows")
        with pytest.raises(IndexError):
            mixed.rows(torch.tensor([n]))
        other = qops.Int8Weight(k, n, group_size, scale_dtype=torch.float32, mixed_gate_up=True)
        other.load_state_dict(plain.state_dict())
        assert_bitwise(other.packed, mixed.packed, "loaded")
        gate, _ = mixed.split([n // 2, n // 2])
        assert not gate.mixed_gate_up
    with pytest.raises(ValueError, match=r"qops\.Int8Weight: N must be a multiple of 16, for gate and up, got 24"):
        make_weight(24, 64, 0).mix_gate_up()


def test_silu_mul_has_to_fit_the_weight():
    plain, (q, scale, _) = make_weight(48, 64, 0), activations(1, 64, 0)
    with pytest.raises(
        ValueError, match=r"qops\.int8_gemm: silu_mul must be True for a weight with mixed_gate_up = True"
    ):
        qops.int8_gemm(q, scale, mixed_rows_of(plain))
    with pytest.raises(
        ValueError, match=r"qops\.int8_gemm: silu_mul must be False for a weight with mixed_gate_up = False"
    ):
        qops.int8_gemm(q, scale, plain, silu_mul=True)
    text = r"qops\.int8_weight_only_gemm: weight must have mixed_gate_up = False, got True"
    with pytest.raises(ValueError, match=text):
        qops.int8_weight_only_gemm(torch.zeros(1, 64), mixed_rows_of(plain))


# --- outputs and errors ----------------------------------------------------------------------------------------------


def epilogues(n: int, q: Tensor, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    return {
        "residual": {"residual": random_activations(*q.shape[:-1], n, dtype=dtype, seed=9)},
        "silu_mul": {"silu_mul": True},
        "out_scale": {"out_scale": SCALE, "out_zero_point": ZERO_POINT},
    }


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_out(dtype):
    plain = make_weight(48, 64, 0)
    for m in (0, 1, 5, 18):
        q, scale, _ = activations(m, 64, m)
        for name, extra in epilogues(48, q, dtype).items():
            w = mixed_rows_of(plain) if name == "silu_mul" else plain
            want = qops.int8_gemm(q, scale, w, **extra, out_dtype=dtype)
            out = Guarded(torch.full_like(want, 77))
            # Its dtype says what y is, but for int8.
            said = {"out_dtype": dtype} if name == "out_scale" else {}
            assert qops.int8_gemm(q, scale, w, **extra, **said, out=out.tensor) is out.tensor
            assert_bitwise(out.tensor, want, name)
            out.check()


def test_a_residual_may_be_the_output():
    w, (q, scale, _) = make_weight(48, 64, 0), activations(5, 64, 0)
    stream = random_activations(5, 48, dtype=torch.bfloat16, seed=1)
    want = qops.int8_gemm(q, scale, w, residual=stream)
    qops.int8_gemm(q, scale, w, residual=stream, out=stream)
    assert_bitwise(stream, want)
    memory = torch.zeros(10, 48, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"out must lie apart from residual in memory"):
        qops.int8_gemm(q, scale, w, residual=memory[:5], out=memory[1:6])
    one = torch.ones(12, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"out must lie apart from out_scale in memory"):
        qops.int8_gemm(q[:1], scale[:1], w, out_scale=one[0], out=one.view(torch.int8).view(1, 48))


def arguments(device: str, **changes: Any) -> dict[str, Any]:
    w = make_weight(48, 64, 0)
    values: dict[str, Any] = {
        "q": torch.zeros(2, 64, dtype=torch.int8),
        "scale": torch.ones(2),
        "zero_point": None,
        "packed": w.packed,
        "w_scale": w.scales,
        "bias": None,
        "out_features": 48,
        "out_dtype": torch.bfloat16,
        **changes,
    }
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()}


R = torch.zeros(2, 48, dtype=torch.bfloat16)
ODD = {"packed": torch.zeros(2, 1024, dtype=torch.int8), "w_scale": torch.ones(2, 1, 16), "out_features": 24}
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "residual dtype": ({"residual": R.float()}, RuntimeError, "residual must have dtype bfloat16, got float32"),
    "residual shape": (
        {"residual": R[:1]},
        ValueError,
        r"residual must have shape \[\.\.\., N\] = \[2, 48\], got \[1, 48\]",
    ),
    "residual stride": (
        {"residual": R.t().contiguous().t()},
        ValueError,
        "residual must have stride 1 in its last.* 2",
    ),
    "residual and silu_mul": ({"residual": R, "silu_mul": True}, ValueError, "residual must be None with .* a tensor"),
    "residual and int8": ({"residual": R, "out_scale": SCALE}, ValueError, "residual must be None with .* a tensor"),
    "silu_mul and int8": ({"silu_mul": True, "out_scale": SCALE}, ValueError, "out_scale must be None with silu_mul"),
    "odd silu_mul": ({**ODD, "silu_mul": True}, ValueError, "out_features must be a multiple of 16.*got 24"),
    "lone zero point": ({"out_zero_point": ZERO_POINT}, ValueError, "out_zero_point must be None without out_scale"),
    "scale dtype": ({"out_scale": SCALE.double()}, RuntimeError, "out_scale must have dtype float32, got float64"),
    "scale size": ({"out_scale": torch.ones(2)}, ValueError, "out_scale must have 1 element, got 2"),
    "integers and residual": (
        {"residual": R, "out_dtype": torch.int32},
        ValueError,
        "residual must be None where out_dtype is int32, got a tensor",
    ),
    "integers and silu_mul": (
        {"silu_mul": True, "out_dtype": torch.int32},
        ValueError,
        "silu_mul must be False where out_dtype is int32, got True",
    ),
    "integers and int8": (
        {"out_scale": SCALE, "out_dtype": torch.int32},
        ValueError,
        "out_scale must be None where out_dtype is int32, got a tensor",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_the_same_with_fake_tensors(case):
    changes, error, text = ERRORS[case]
    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.int8_gemm: {text}") as caught:
            torch.ops.qops.int8_gemm.fused(**arguments(device, **changes))
        messages.append(str(caught.value))
        out = torch.empty(2, 48, dtype=torch.bfloat16, device=device)
        with pytest.raises(error, match=rf"^qops\.int8_gemm: {text}"):
            torch.ops.qops.int8_gemm.fused_out(**arguments(device, **changes), out=out)
    assert messages[0] == messages[1]


def test_out_has_the_shape_and_dtype_of_the_epilogue():
    wrong = torch.empty(2, 48).bfloat16()
    for extra, error, text in (
        ({"silu_mul": True}, ValueError, r"out must have shape \[\.\.\., N / 2\] = \[2, 24\], got \[2, 48\]"),
        ({"out_scale": SCALE}, RuntimeError, "out must have dtype int8, got bfloat16"),
        ({"out_dtype": torch.float16}, RuntimeError, "out must have dtype float16, got bfloat16"),
    ):
        for device in ("cpu", "meta"):
            with pytest.raises(error, match=rf"^qops\.int8_gemm: {text}$"):
                torch.ops.qops.int8_gemm.fused_out(**arguments(device, **extra), out=wrong.to(device))


@pytest.mark.parametrize("bad", (0.0, -1.0, float("nan"), float("inf")))
def test_values_of_the_output_scale(bad):
    with pytest.raises(ValueError, match=r"^qops\.int8_gemm: out_scale must be positive and finite, got"):
        torch.ops.qops.int8_gemm.fused(**arguments("cpu", out_scale=torch.tensor(bad)))
    with pytest.raises(ValueError, match=r"^qops\.int8_gemm: out_zero_point must lie in -128 \.\. 127, got 128"):
        far = torch.tensor(128, dtype=torch.int32)
        torch.ops.qops.int8_gemm.fused(**arguments("cpu", out_scale=SCALE, out_zero_point=far))


def test_grad_is_refused():
    w, (q, scale, _) = make_weight(48, 64, 0), activations(1, 64, 0)
    refused = pytest.raises(RuntimeError, match=r"qops\.int8_gemm: residual must not require grad")
    with torch.inference_mode(False), torch.enable_grad(), refused:
        qops.int8_gemm(q, scale, w, residual=torch.ones(1, 48, dtype=torch.bfloat16, requires_grad=True))


@pytest.mark.parametrize("name", ("residual", "silu_mul", "out_scale"))
def test_opcheck(name):
    with torch.inference_mode(False), torch.no_grad():
        w = make_weight(48, 64, 0)
        q, scale = torch.ones(2, 3, 64, dtype=torch.int8), torch.rand(2, 3)
        args = (q, scale, None, w.packed, w.scales, torch.zeros(48), 48, torch.float16)
        found = epilogues(48, q, torch.float16)[name]
        extra = {key: t.clone() if isinstance(t, Tensor) else t for key, t in found.items()}
        torch.library.opcheck(torch.ops.qops.int8_gemm.fused, args, extra)
        out = torch.empty_like(torch.ops.qops.int8_gemm.fused(*args, **extra))
        torch.library.opcheck(torch.ops.qops.int8_gemm.fused_out, args, {**extra, "out": out})


def test_compile():
    torch._dynamo.reset()
    mixed, down = mixed_rows_of(make_weight(48, 64, 0)), make_weight(64, 24, 1)

    def mlp(q, scale, stream):
        hidden = qops.int8_gemm(q, scale, mixed, silu_mul=True)
        codes = qops.int8_gemm(q, scale, down_in, out_scale=SCALE)
        return qops.int8_gemm(codes, scale, down, residual=stream), hidden

    down_in = make_weight(24, 64, 2)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (3, 5):
        q, scale, _ = activations(m, 64, m)
        stream = random_activations(m, 64, dtype=torch.bfloat16, seed=m)
        for got, want in zip(compiled(q, scale, stream), mlp(q, scale, stream), strict=True):
            assert_bitwise(got, want, f"M = {m}")
