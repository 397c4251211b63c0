from __future__ import annotations

import itertools

import pytest
import torch

import qops
from qops._numerics import rms_norm_exact
from qops.ops.rms_norm import rms_norm_ref
from qops.testing import (
    FLOAT_DTYPES,
    Guarded,
    assert_bitwise,
    assert_within,
    random_activations,
    rms_norm_bound,
    strided_rows,
)

# Around the vector width (16), the partials of a warp (256) and the thread counts of the reduction tree (1024, 8192).
H_SIZES = (1, 2, 7, 8, 15, 16, 17, 64, 127, 256, 257, 576, 1024, 1025, 1536, 4096, 8191, 8192, 8200, 16384)
EPS = 1e-5


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("h", H_SIZES)
def test_bits_follow_the_contract(h, dtype):
    for seed, (rows, weight_dtype, rounding) in enumerate(
        itertools.product((1, 3), FLOAT_DTYPES, ("hf", "fp32")), start=h
    ):
        x = random_activations(rows, h, dtype=dtype, seed=seed)
        weight = random_activations(h, dtype=weight_dtype, seed=seed + 1, outliers=False)
        offset = 1.0 if rounding == "fp32" else 0.0
        got = qops.rms_norm(x, weight, EPS, weight_offset=offset, rounding=rounding)
        assert_bitwise(got, rms_norm_exact(x, weight, EPS, offset, rounding), f"{rows}x{h} {weight_dtype} {rounding}")


@pytest.mark.parametrize("rounding", ("hf", "fp32"))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("rows", (0, 1, 2, 3, 17))
def test_accuracy_against_float64(rows, dtype, rounding):
    for h in (64, 576, 4097):
        x = random_activations(rows, h, dtype=dtype, seed=h)
        weight = random_activations(h, dtype=dtype, seed=h + 1, outliers=False)
        ref, bound = rms_norm_ref(x, weight, EPS, rounding="fp32"), rms_norm_bound(x, weight, EPS, rounding=rounding)
        assert_within(qops.rms_norm(x, weight, EPS, rounding=rounding), ref, bound, f"{rows}x{h}")


def test_matches_transformers_to_one_ulp():
    x = random_activations(64, 576, dtype=torch.bfloat16, seed=0)
    weight = random_activations(576, dtype=torch.bfloat16, seed=1, outliers=False)
    variance = x.float().square().mean(-1, keepdim=True)
    hf = weight * (x.float() * torch.rsqrt(variance + EPS)).to(x.dtype)
    differing = (qops.rms_norm(x, weight, EPS) != hf).float().mean().item()
    assert differing < 1e-3  # rsqrt and another order of the sum move rstd by an ulp of float32, seldom one of bfloat16


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ("hf", "fp32"))
def test_fused_equals_unfused(dtype, rounding):
    for h in (16, 63, 576, 4096):
        x = random_activations(5, h, dtype=dtype, seed=h)
        residual = random_activations(5, h, dtype=dtype, seed=h + 1)
        weight = random_activations(h, dtype=torch.float32, seed=h + 2, outliers=False)
        y, z = qops.add_rms_norm(strided_rows(x), strided_rows(residual, 6), weight, EPS, rounding=rounding)
        assert_bitwise(z, x + residual, "sum")
        assert_bitwise(y, qops.rms_norm(x + residual, weight, EPS, rounding=rounding), "norm")


def test_strides_and_leading_dimensions():
    base = random_activations(2, 9, 5, 48, dtype=torch.bfloat16, seed=0)
    weight = torch.ones(48)
    expected = qops.rms_norm(base.reshape(-1, 48), weight, EPS).view_as(base)
    views = {
        "sliced": (base[:, 2:7], expected[:, 2:7]),
        "transposed leading dimensions": (base.transpose(0, 2), expected.transpose(0, 2)),
        "row stride": (strided_rows(base), expected),
        "broadcast": (base[:1].expand(3, -1, -1, -1), expected[:1].expand(3, -1, -1, -1)),
        "one row": (base[0, 0, 0], expected[0, 0, 0]),
        "odd offset": (strided_rows(base, 2), expected),
    }
    for name, (view, want) in views.items():
        got = qops.rms_norm(view, weight, EPS)
        assert got.is_contiguous(), name
        assert_bitwise(got, want.contiguous(), name)


def test_rows_do_not_depend_on_batch_or_threads(threads):
    x = random_activations(257, 576, dtype=torch.bfloat16, seed=3)
    weight = torch.ones(576)
    threads(1)
    one = qops.rms_norm(x, weight, EPS)
    threads(2)
    assert_bitwise(qops.rms_norm(x, weight, EPS), one, "threads")
    for row in (0, 100, 256):
        assert_bitwise(qops.rms_norm(x[row], weight, EPS), one[row], "row alone")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_special_values(dtype):
    weight = torch.full((40,), 2.0)
    x = torch.ones(6, 40, dtype=dtype)
    x[1] = 0.0
    x[2, 39] = float("nan")
    x[3, 0] = float("inf")
    x[4] = torch.finfo(dtype).tiny / 4  # subnormal: must not be flushed
    y = qops.rms_norm(x, weight, 0.0 if dtype != torch.float16 else 1e-12)
    assert torch.isnan(y[2]).all()
    assert torch.isnan(y[3, 0]) and bool((y[3, 1:] == 0).all())
    assert_bitwise(qops.rms_norm(x[1], weight, EPS), torch.zeros(40, dtype=dtype), "zero row")
    assert_bitwise(y[0], y[5], "rows beside special rows")
    if dtype == torch.float16:  # 2^-16 squared is a normal float32
        assert (y[4] > 0).all()


@pytest.mark.parametrize("rounding", ["hf", "fp32"])
@pytest.mark.parametrize("weight_dtype", FLOAT_DTYPES, ids=str)
def test_products_of_every_kind(weight_dtype, rounding):
    """Subnormal, infinite and NaN weights, whose NaNs have every payload, in every lane of two vectors."""
    rng = torch.Generator().manual_seed(11)
    x = random_activations(40, 96, dtype=torch.bfloat16, seed=11)
    x[::3] *= 1e-30
    x[1::7, ::5] = -0.0
    int_dtype = torch.int32 if weight_dtype == torch.float32 else torch.int16
    info = torch.iinfo(int_dtype)
    weight = torch.randint(info.min, info.max + 1, (96,), generator=rng).to(int_dtype)
    weight[[0, 1, 17, 34]] = torch.tensor([info.max, -1, info.max, -1], dtype=int_dtype)
    weight[5:9] = torch.tensor([1, info.min + 1, 77, info.min], dtype=int_dtype)
    weight = weight.view(weight_dtype)
    assert weight[:2].isnan().all()
    y = qops.rms_norm(x, weight, 1e-12, rounding=rounding)
    assert_bitwise(y, rms_norm_exact(x, weight, 1e-12, rounding=rounding), "any weight")


def test_empty():
    assert qops.rms_norm(torch.empty(0, 64), torch.ones(64), EPS).shape == (0, 64)
    assert qops.rms_norm(torch.empty(3, 0), torch.ones(0), EPS).shape == (3, 0)
    y, z = qops.add_rms_norm(torch.empty(0, 64), torch.empty(0, 64), torch.ones(64), EPS)
    assert y.shape == z.shape == (0, 64)


# --- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_out(dtype):
    for shape, style in (((3, 5, 37), {}), ((0, 37), {}), ((2, 0), {}), ((4, 576), {"rounding": "fp32"})):
        x, residual = (strided_rows(random_activations(*shape, dtype=dtype, seed=seed)) for seed in (0, 1))
        weight = torch.ones(shape[-1])
        wall = Guarded(torch.full(shape, 77, dtype=dtype))
        assert qops.rms_norm(x, weight, EPS, **style, out=wall.tensor) is wall.tensor
        assert_bitwise(wall.tensor, qops.rms_norm(x, weight, EPS, **style), f"{shape}")
        wall.check()
        walls = [Guarded(torch.full(shape, 77, dtype=dtype)) for _ in range(2)]
        out = (walls[0].tensor, walls[1].tensor)
        assert qops.add_rms_norm(x, residual, weight, EPS, **style, out=out) is out
        for wall, want in zip(walls, qops.add_rms_norm(x, residual, weight, EPS, **style), strict=True):
            assert_bitwise(wall.tensor, want, f"{shape} add")
            wall.check()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_out_may_be_an_input(dtype, threads):
    x, residual = random_activations(2, 257, 577, dtype=dtype, seed=0).unbind(0)
    weight = torch.ones(577)
    norm, (y, z) = qops.rms_norm(x, weight, EPS), qops.add_rms_norm(x, residual, weight, EPS)
    for count in (1, 2):
        threads(count)
        in_place = x.clone()
        assert_bitwise(qops.rms_norm(in_place, weight, EPS, out=in_place), norm, "x")
        stream = residual.clone()
        got = qops.add_rms_norm(x, stream, weight, EPS, out=(torch.empty_like(x), stream))
        assert_bitwise(got[0], y, "residual, y")
        assert_bitwise(got[1], z, "residual, z")
        in_place, stream = x.clone(), residual.clone()
        qops.add_rms_norm(in_place, stream, weight, EPS, out=(in_place, stream))
        assert_bitwise(in_place, y, "both, y")
        assert_bitwise(stream, z, "both, z")


def test_overlap_is_refused_and_nothing_is_written():
    memory = random_activations(16, 32, dtype=torch.bfloat16, seed=0)
    before = memory.clone()
    x, residual, y, z, weight = memory[0:2], memory[2:4], memory[4:6], memory[6:8], memory[8]
    cases = {
        "residual_out must lie apart from y": (memory[5:7], memory[6:8]),
        "y must lie apart from x": (memory[1:3], z),
        "y must lie apart from residual": (residual, z),
        "y must lie apart from weight": (memory[8:10], z),
        "residual_out must lie apart from x": (y, x),
        "residual_out must lie apart from weight": (y, memory[7:9]),
        "residual_out must lie apart from residual": (memory[10:12], memory[3:5]),
    }
    for text, out in cases.items():
        with pytest.raises(ValueError, match=rf"^qops\.add_rms_norm: {text} in memory, got overlapping tensors$"):
            qops.add_rms_norm(x, residual, weight, EPS, out=out)
    for other, out in (("x", memory[1:3]), ("weight", memory[7:9])):
        with pytest.raises(ValueError, match=rf"^qops\.rms_norm: out must lie apart from {other} in memory"):
            qops.rms_norm(x, weight, EPS, out=out)
    # The same memory in another order is not the input itself.
    with pytest.raises(ValueError, match=r"^qops\.rms_norm: out must lie apart from x in memory"):
        qops.rms_norm(x[:1].expand(2, 32), weight, EPS, out=x)
    with pytest.raises(ValueError, match=r"^qops\.add_rms_norm: residual_out must lie apart from residual in memory"):
        qops.add_rms_norm(x, residual[:1].expand(2, 32), weight, EPS, out=(y, residual))
    assert_bitwise(memory, before, "memory")


# --- errors ----------------------------------------------------------------------------------------------------------

X = torch.ones(2, 32, dtype=torch.bfloat16)
W = torch.ones(32)
ERRORS = {
    "dtype": ((X.long(), W), {}, RuntimeError, r"x must have dtype float32, float16 or bfloat16, got int64"),
    "weight dtype": ((X, W.double()), {}, RuntimeError, r"weight must have dtype float32, .* got float64"),
    "scalar": ((torch.tensor(1.0), W), {}, ValueError, r"x must have at least 1 dimension, got 0"),
    "weight shape": ((X, W[:31]), {}, ValueError, r"weight must have shape \[H\] = \[32\], got \[31\]"),
    "weight rank": ((X, W[None]), {}, ValueError, r"weight must have shape \[H\] = \[32\], got \[1, 32\]"),
    "stride": ((X.t(), W[:2]), {}, ValueError, r"x must have stride 1 in its last dimension, got 32"),
    "rounding": ((X, W), {"rounding": "up"}, ValueError, r'rounding must be "hf" or "fp32", got "up"'),
    "offset": ((X, W), {"weight_offset": 1.0}, ValueError, r'rounding must be "fp32" with a non-zero weight_offset'),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("op", ("rms_norm", "add_rms_norm"))
def test_errors_are_the_same_with_fake_tensors(op, case):
    args, kwargs, error, text = ERRORS[case]
    if op == "add_rms_norm":
        args = (args[0], args[0], args[1])
    call = getattr(qops, op)
    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.{op}: {text}") as caught:
            call(*(a.to(device) for a in args), EPS, **kwargs)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


OUT_ERRORS = {
    "dtype": (X.half(), RuntimeError, r"{} must have dtype bfloat16, got float16"),
    "shape": (X[0], ValueError, r"{} must have shape \[\.\.\., H\] = \[2, 32\], got \[32\]"),
    "rows": (X[:1], ValueError, r"{} must have shape \[\.\.\., H\] = \[2, 32\], got \[1, 32\]"),
    "strides": (X.t().contiguous().t(), ValueError, r"{} must be contiguous, got strides \[1, 2\]"),
}


@pytest.mark.parametrize("case", OUT_ERRORS)
def test_out_errors_are_the_same_with_fake_tensors(case):
    bad, error, text = OUT_ERRORS[case]
    calls = {
        "rms_norm: out": lambda x, w, bad, _: qops.rms_norm(x, w, EPS, out=bad),
        "add_rms_norm: y": lambda x, w, bad, fine: qops.add_rms_norm(x, x, w, EPS, out=(bad, fine)),
        "add_rms_norm: residual_out": lambda x, w, bad, fine: qops.add_rms_norm(x, x, w, EPS, out=(fine, bad)),
    }
    for arg, call in calls.items():
        messages = []
        for device in ("cpu", "meta"):
            with pytest.raises(error, match=rf"^qops\.{text.format(arg)}$") as caught:
                call(*(t.to(device) for t in (X, W, bad, X.clone())))
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_residual_errors():
    for device in ("cpu", "meta"):
        x, w = X.to(device), W.to(device)
        with pytest.raises(ValueError, match=r"residual must have the shape of x = \[2, 32\], got \[1, 32\]"):
            qops.add_rms_norm(x, x[:1], w, EPS)
        with pytest.raises(RuntimeError, match=r"residual must have the dtype of x = bfloat16, got float32"):
            qops.add_rms_norm(x, x.float(), w, EPS)


def test_grad_is_refused():
    with torch.inference_mode(False), torch.enable_grad():
        weight = torch.ones(8, requires_grad=True)
        with pytest.raises(RuntimeError, match=r"qops\.rms_norm: \w+ must not require grad"):
            qops.rms_norm(torch.ones(1, 8), weight, EPS)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(dtype):
    with torch.inference_mode(False), torch.no_grad():
        x = random_activations(3, 4, 40, dtype=dtype, seed=0)[:, 1:]
        weight = torch.ones(40)
        torch.library.opcheck(torch.ops.qops.rms_norm.default, (x, weight, EPS))
        torch.library.opcheck(torch.ops.qops.add_rms_norm.default, (x, x, weight, EPS, 1.0, "fp32"))
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.library.opcheck(torch.ops.qops.rms_norm.out, (x, weight, EPS, 1.0, "fp32"), {"out": out})
        out = {"y": out, "residual_out": torch.empty_like(out)}
        torch.library.opcheck(torch.ops.qops.add_rms_norm.out, (x, x.clone(), weight, EPS), out)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    torch._dynamo.reset()
    x, residual = random_activations(2, 3, 64, dtype=torch.bfloat16, seed=0).unbind(0)
    weight = torch.ones(64)

    def block(x, residual):
        y, z = qops.add_rms_norm(x, residual, weight, EPS)
        norm, stream, last = qops.rms_norm(y, weight, EPS), z.clone(), torch.empty_like(y)
        qops.add_rms_norm(norm, stream, weight, EPS, out=(last, stream))
        qops.rms_norm(y, weight, EPS, rounding="fp32", out=norm)
        return torch.stack((norm + z, last, stream))

    torch.use_deterministic_algorithms(False)  # inductor does not know the poisoned torch.empty
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    for rows in (3, 2):
        assert_bitwise(compiled(x[:rows], residual[:rows]), block(x[:rows], residual[:rows]), f"{rows} rows")


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_residual_stream_reaches_the_caller(backend):
    torch._dynamo.reset()
    x, residual = random_activations(2, 3, 64, dtype=torch.bfloat16, seed=0).unbind(0)
    weight = torch.ones(64)
    want = qops.add_rms_norm(x, residual, weight, EPS)

    def step(x, stream, y):
        qops.add_rms_norm(x, stream, weight, EPS, out=(y, stream))

    torch.use_deterministic_algorithms(False)  # inductor does not know the poisoned torch.empty
    y, stream = torch.zeros_like(x), residual.clone()
    torch.compile(step, fullgraph=True, backend=backend)(x, stream, y)
    assert_bitwise(y, want[0], "y")
    assert_bitwise(stream, want[1], "residual")
