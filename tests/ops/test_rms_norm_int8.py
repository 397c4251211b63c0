from __future__ import annotations

import itertools

import pytest
import torch

import qops
from qops.testing import FLOAT_DTYPES, Guarded, assert_bitwise, random_activations, strided_rows

H_SIZES = (1, 2, 15, 16, 17, 127, 257, 576, 1025, 4096, 8200)
RULES = ("127", "compressed-tensors", "torchao")
STYLES = (("hf", 0.0), ("fp32", 0.0), ("fp32", 1.0))
EPS = 1e-5


def assert_same(got, want, what=""):
    assert len(got) == len(want)
    for a, b, name in zip(got, want, ("q", "scale", "sum"), strict=False):
        assert_bitwise(a, b, f"{what} {name}")


def unfused(x, residual, weight, eps, *, rule="127", **style):
    """The chain that the contract names, op by op."""
    z = x if residual is None else x + residual
    q, scale = qops.quantize_int8(qops.rms_norm(z, weight, eps, **style), rule)
    return (q, scale) if residual is None else (q, scale, z)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("h", H_SIZES)
def test_fused_equals_unfused(h, dtype):
    cases = itertools.product((1, 3), FLOAT_DTYPES, STYLES, RULES)
    for seed, (rows, weight_dtype, (rounding, offset), rule) in enumerate(cases, start=h):
        x, residual = (random_activations(rows, h, dtype=dtype, seed=s) for s in (seed, seed + 1))
        weight = random_activations(h, dtype=weight_dtype, seed=seed + 2, outliers=False)
        style = {"weight_offset": offset, "rounding": rounding, "rule": rule}
        what = f"{rows}x{h} {weight_dtype} {style}"
        got = qops.rms_norm_int8(x, weight, EPS, **style)
        assert_same(got, unfused(x, None, weight, EPS, **style), what)
        got = qops.add_rms_norm_int8(strided_rows(x), strided_rows(residual, 6), weight, EPS, **style)
        assert_same(got, unfused(x, residual, weight, EPS, **style), what)


def test_rounding_before_the_scale_shows():
    """The chain without the rounding in between gives other bits: the comparison above can fail."""
    x = random_activations(64, 576, dtype=torch.bfloat16, seed=0)
    weight = random_activations(576, dtype=torch.bfloat16, seed=1, outliers=False)
    wide = qops.quantize_int8(qops.rms_norm(x.float(), weight, EPS))
    q, scale = qops.rms_norm_int8(x, weight, EPS)
    assert (q != wide[0]).any() and (scale != wide[1]).any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_accuracy_against_float64(dtype):
    x = random_activations(17, 4097, dtype=dtype, seed=0)
    weight = random_activations(4097, dtype=dtype, seed=1, outliers=False)
    q, scale = qops.rms_norm_int8(x, weight, EPS, rounding="fp32")
    z = x.double()
    exact = z / torch.sqrt(z.square().mean(-1, keepdim=True) + EPS) * weight.double()
    # Half a step of int8, and the rounding of the normalised row to the dtype.
    bound = 0.5001 * scale[:, None].double() + exact.abs() * torch.finfo(dtype).eps
    assert bool(((q.double() * scale[:, None].double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_special_rows(dtype):
    x = torch.ones(6, 40, dtype=dtype)
    x[1] = 0.0
    x[2, 39] = float("nan")
    x[3, 0] = float("inf")
    x[4] = torch.finfo(dtype).tiny / 4
    x[5, 1:] = -0.0
    for rule in RULES:
        for weight in (torch.full((40,), 2.0), torch.zeros(40), torch.full((40,), torch.finfo(torch.float32).max)):
            got = qops.rms_norm_int8(x, weight, 1e-12, rule=rule)
            assert_same(got, unfused(x, None, weight, 1e-12, rule=rule), rule)
            assert torch.isnan(got[1][2:4]).all() and bool((got[0][1:4] == 0).all())


def test_strides_and_leading_dimensions():
    base = random_activations(2, 9, 5, 48, dtype=torch.bfloat16, seed=0)
    weight = torch.ones(48)
    want = [t.view(2, 9, 5, *t.shape[1:]) for t in unfused(base.reshape(-1, 48), None, weight, EPS)]
    views = {
        "sliced": lambda t: t[:, 2:7],
        "transposed leading dimensions": lambda t: t.transpose(0, 2),
        "broadcast": lambda t: t[:1].expand(3, *t.shape[1:]),
        "one row": lambda t: t[0, 0, 0],
    }
    for name, view in views.items():
        got = qops.rms_norm_int8(view(base), weight, EPS)
        assert all(t.is_contiguous() for t in got), name
        assert_same(got, [view(t).contiguous() for t in want], name)
        got = qops.add_rms_norm_int8(view(base), torch.zeros_like(view(base)), weight, EPS)
        assert_same(got, [view(t).contiguous() for t in (*want, base)], name)
    for pad in (8, 2):
        assert_same(qops.rms_norm_int8(strided_rows(base, pad), weight, EPS), want, f"row stride, pad {pad}")


def test_offsets_beyond_32_bits(tmp_path):
    stride = 2**30 + 64  # the third row starts behind element 2^31; the file is sparse
    x = torch.from_file(str(tmp_path / "x"), shared=True, size=2 * stride + 64, dtype=torch.bfloat16)
    x = x.as_strided((3, 64), (stride, 1))
    values = random_activations(3, 64, dtype=torch.bfloat16, seed=0)
    x.copy_(values)
    weight = torch.ones(64)
    assert_same(qops.rms_norm_int8(x, weight, EPS), unfused(values, None, weight, EPS))
    assert_same(qops.add_rms_norm_int8(values, x, weight, EPS), unfused(values, values, weight, EPS))


def test_rows_do_not_depend_on_batch_or_threads(threads):
    """257 rows are shared out unevenly, and each thread normalises into a buffer of its own."""
    x, residual = random_activations(2, 257, 576, dtype=torch.bfloat16, seed=3).unbind(0)
    weight = torch.ones(576)
    for count in (1, 2, 5):
        threads(count)
        assert_same(qops.add_rms_norm_int8(x, residual, weight, EPS), unfused(x, residual, weight, EPS), f"{count}")
    want = unfused(x, None, weight, EPS)
    for row in (0, 100, 256):
        assert_same(qops.rms_norm_int8(x[row], weight, EPS), [t[row] for t in want], "row alone")


def test_empty():
    for shape in ((0, 64), (3, 0)):
        x, weight = torch.empty(shape), torch.ones(shape[1])
        for got in (qops.rms_norm_int8(x, weight, EPS), qops.add_rms_norm_int8(x, x, weight, EPS)):
            assert [t.shape for t in got] == [shape, shape[:1], shape][: len(got)]
            assert bool((got[1] == 0).all())


# --- out -------------------------------------------------------------------------------------------------------------


def test_out():
    x, residual = random_activations(2, 3, 5, 37, dtype=torch.bfloat16, seed=0).unbind(0)
    weight = torch.ones(37)
    for op, args in ((qops.rms_norm_int8, (x, weight, EPS)), (qops.add_rms_norm_int8, (x, residual, weight, EPS))):
        want = op(*args)
        walls = [Guarded(torch.full_like(t, 77)) for t in want]
        out = tuple(wall.tensor for wall in walls)
        assert op(*args, out=out) is out
        assert_same(out, want)
        for wall in walls:
            wall.check()


def test_the_sum_may_replace_the_residual(threads):
    x, residual = random_activations(2, 257, 576, dtype=torch.bfloat16, seed=0).unbind(0)
    weight = torch.ones(576)
    want = unfused(x, residual, weight, EPS)
    for count in (1, 2):
        threads(count)
        stream = residual.clone()
        out = (torch.empty_like(want[0]), torch.empty_like(want[1]), stream)
        assert_same(qops.add_rms_norm_int8(x, stream, weight, EPS, out=out), want)


def test_overlap_is_refused_and_nothing_is_written():
    memory = torch.zeros(4096, dtype=torch.uint8)
    rows = memory.view(torch.bfloat16).view(-1, 32)
    x, residual, z, weight = rows[0:2], rows[2:4], rows[4:6], rows[6]
    q, s = memory[1024:1088].view(torch.int8).view(2, 32), memory[2048:2056].view(torch.float32)
    memory[:512] = torch.arange(512)
    before = memory.clone()

    def over(t):
        return t.view(torch.int8)[..., :32].as_strided((2, 32), (32, 1))

    cases = {
        "q must lie apart from x": (over(x), s, z),
        "q must lie apart from residual": (over(residual), s, z),
        "q must lie apart from weight": (over(weight[None]), s, z),
        "q must lie apart from residual_out": (over(z), s, z),
        "scale must lie apart from q": (q, q.view(torch.float32)[0, :2], z),
        "scale must lie apart from residual_out": (q, z.view(torch.float32)[0, :2], z),
        "residual_out must lie apart from x": (q, s, x),
        "residual_out must lie apart from weight": (q, s, rows[5:7]),
        "residual_out must lie apart from residual": (q, s, rows[3:5]),
    }
    for text, out in cases.items():
        with pytest.raises(ValueError, match=rf"^qops\.add_rms_norm_int8: {text} in memory, got overlapping tensors$"):
            qops.add_rms_norm_int8(x, residual, weight, EPS, out=out)
    # The same memory in another order is not the residual itself.
    with pytest.raises(ValueError, match="residual_out must lie apart from residual"):
        qops.add_rms_norm_int8(x, residual[:1].expand(2, 32), weight, EPS, out=(q, s, residual))
    with pytest.raises(ValueError, match=r"^qops\.rms_norm_int8: q must lie apart from weight in memory"):
        qops.rms_norm_int8(x, weight, EPS, out=(over(weight[None]), s))
    assert torch.equal(memory, before)


# --- errors ----------------------------------------------------------------------------------------------------------

X = torch.ones(2, 32, dtype=torch.bfloat16)
W = torch.ones(32)
Q, S = torch.ones(2, 32, dtype=torch.int8), torch.ones(2)
ERRORS = {
    "dtype": ((X.long(), W), {}, RuntimeError, r"x must have dtype float32, float16 or bfloat16, got int64"),
    "weight dtype": ((X, W.double()), {}, RuntimeError, r"weight must have dtype float32, .* got float64"),
    "scalar": ((torch.tensor(1.0), W), {}, ValueError, r"x must have at least 1 dimension, got 0"),
    "weight shape": ((X, W[:31]), {}, ValueError, r"weight must have shape \[H\] = \[32\], got \[31\]"),
    "stride": ((X.t(), W[:2]), {}, ValueError, r"x must have stride 1 in its last dimension, got 32"),
    "rounding": ((X, W), {"rounding": "up"}, ValueError, r'rounding must be "hf" or "fp32", got "up"'),
    "offset": ((X, W), {"weight_offset": 1.0}, ValueError, r'rounding must be "fp32" with a non-zero weight_offset'),
    "rule": (
        (X, W),
        {"rule": "fast"},
        ValueError,
        r'rule must be "127", "compressed-tensors" or "torchao", got "fast"',
    ),
}


def assert_error_on_both(op, args, kwargs, error, text):
    def to(value, device):
        if isinstance(value, tuple):
            return tuple(t.to(device) for t in value)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.{op}: {text}") as caught:
            kwargs_there = {name: to(value, device) for name, value in kwargs.items()}
            getattr(qops, op)(*(to(a, device) for a in args), EPS, **kwargs_there)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_the_same_with_fake_tensors(case):
    (x, weight), kwargs, error, text = ERRORS[case]
    assert_error_on_both("rms_norm_int8", (x, weight), kwargs, error, text)
    assert_error_on_both("add_rms_norm_int8", (x, x, weight), kwargs, error, text)
    if x.dim() == 2:
        out = (torch.ones(x.shape, dtype=torch.int8), torch.ones(x.shape[0]))
        assert_error_on_both("rms_norm_int8", (x, weight), {**kwargs, "out": out}, error, text)
        out = (*out, torch.ones(x.shape, dtype=x.dtype))
        assert_error_on_both("add_rms_norm_int8", (x, x, weight), {**kwargs, "out": out}, error, text)


OUT_ERRORS = {
    "q dtype": ((Q.byte(), S, X), RuntimeError, r"q must have dtype int8, got uint8"),
    "q shape": ((Q[:, :31], S, X), ValueError, r"q must have shape \[\.\.\., K\] = \[2, 32\], got \[2, 31\]"),
    "q strides": ((Q.t().contiguous().t(), S, X), ValueError, r"q must be contiguous, got strides \[1, 2\]"),
    "scale dtype": ((Q, S.double(), X), RuntimeError, r"scale must have dtype float32, got float64"),
    "scale shape": ((Q, S[:1], X), ValueError, r"scale must have shape \[\.\.\.\] = \[2\], got \[1\]"),
    "sum dtype": ((Q, S, X.half()), RuntimeError, r"residual_out must have dtype bfloat16, got float16"),
    "sum shape": ((Q, S, X[0]), ValueError, r"residual_out must have shape \[\.\.\., H\] = \[2, 32\], got \[32\]"),
    "sum strides": ((Q, S, X.t().contiguous().t()), ValueError, r"residual_out must be contiguous, got strides"),
}


@pytest.mark.parametrize("case", OUT_ERRORS)
def test_out_errors_are_the_same_with_fake_tensors(case):
    out, error, text = OUT_ERRORS[case]
    assert_error_on_both("add_rms_norm_int8", (X, X.clone(), W), {"out": out}, error, text)
    if not case.startswith("sum"):
        assert_error_on_both("rms_norm_int8", (X, W), {"out": out[:2]}, error, text)


def test_residual_errors():
    for residual, error, text in (
        (X[:1], ValueError, r"residual must have the shape of x = \[2, 32\], got \[1, 32\]"),
        (X.float(), RuntimeError, r"residual must have the dtype of x = bfloat16, got float32"),
        (X.t().contiguous().t(), ValueError, r"residual must have stride 1 in its last dimension, got 2"),
    ):
        assert_error_on_both("add_rms_norm_int8", (X, residual, W), {}, error, text)


def test_grad_is_refused():
    with torch.inference_mode(False), torch.enable_grad():
        x, weight = torch.ones(1, 8), torch.ones(8, requires_grad=True)
        with pytest.raises(RuntimeError, match=r"qops\.rms_norm_int8: \w+ must not require grad"):
            qops.rms_norm_int8(x, weight, EPS)
        with pytest.raises(RuntimeError, match=r"qops\.add_rms_norm_int8: \w+ must not require grad"):
            qops.add_rms_norm_int8(x, x, weight, EPS)


# --- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(dtype):
    ops = torch.ops.qops
    with torch.inference_mode(False), torch.no_grad():
        x = random_activations(3, 4, 40, dtype=dtype, seed=0)[:, 1:]
        weight = torch.ones(40)
        q, s, z = (torch.empty_like(t) for t in qops.add_rms_norm_int8(x, x, weight, EPS))
        torch.library.opcheck(ops.rms_norm_int8.default, (x, weight, EPS))
        torch.library.opcheck(ops.rms_norm_int8.out, (x, weight, EPS, 1.0, "fp32"), {"q": q, "scale": s})
        torch.library.opcheck(ops.add_rms_norm_int8.default, (x, x, weight, EPS, 1.0, "fp32", "torchao"))
        out = {"q": q, "scale": s, "residual_out": z}
        torch.library.opcheck(ops.add_rms_norm_int8.out, (x, x.clone(), weight, EPS), out)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    torch._dynamo.reset()
    x, residual = random_activations(2, 3, 64, dtype=torch.bfloat16, seed=0).unbind(0)
    weight = torch.ones(64)

    def block(x, residual):
        q, scale, z = qops.add_rms_norm_int8(x, residual, weight, EPS)
        out = torch.empty_like(q), torch.empty_like(scale)
        qops.rms_norm_int8(z * 2, weight, EPS, rounding="fp32", rule="torchao", out=out)
        return q, scale + 1, z, *out, *qops.rms_norm_int8(x, weight, EPS)

    torch.use_deterministic_algorithms(False)  # inductor does not know the poisoned torch.empty
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    for rows in (3, 2):
        assert_same(compiled(x[:rows], residual[:rows]), block(x[:rows], residual[:rows]), f"{rows} rows")


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_residual_stream_reaches_the_caller(backend):
    torch._dynamo.reset()
    x, residual = random_activations(2, 3, 64, dtype=torch.bfloat16, seed=0).unbind(0)
    weight = torch.ones(64)
    want = unfused(x, residual, weight, EPS)

    def step(x, stream, q, scale):
        qops.add_rms_norm_int8(x, stream, weight, EPS, out=(q, scale, stream))

    torch.use_deterministic_algorithms(False)  # inductor does not know the poisoned torch.empty
    q, scale, stream = torch.zeros_like(want[0]), torch.zeros_like(want[1]), residual.clone()
    torch.compile(step, fullgraph=True, backend=backend)(x, stream, q, scale)
    assert_same((q, scale, stream), want)
