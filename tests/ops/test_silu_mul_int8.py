from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import qops
from qops.testing import FLOAT_DTYPES, Guarded, assert_bitwise, random_activations, strided_rows

RULES = ("127", "compressed-tensors", "torchao")
COLUMNS = (1, 2, 15, 16, 17, 31, 33, 576, 1536, 8200)
NAN, INF = float("nan"), float("inf")


def assert_same(got, want, what=""):
    for a, b, name in zip(got, want, ("q", "scale"), strict=True):
        assert_bitwise(a, b, f"{what} {name}")


def unfused(*halves, rounding="hf", rule="127"):
    """The chain that the contract names, op by op."""
    return qops.quantize_int8(qops.silu_mul(*halves, rounding=rounding), rule)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_fused_equals_unfused(columns, dtype):
    for seed, (rows, rounding, rule) in enumerate(itertools.product((1, 3), ("hf", "fp32"), RULES), start=columns):
        gate_up = random_activations(rows, 2 * columns, dtype=dtype, seed=seed)
        want = unfused(gate_up, rounding=rounding, rule=rule)
        what = f"{rows}x{columns} {rounding} {rule}"
        assert_same(qops.silu_mul_int8(gate_up, rounding=rounding, rule=rule), want, f"merged {what}")
        gate, up = gate_up.chunk(2, dim=-1)
        got = qops.silu_mul_int8(strided_rows(gate, 6), up, rounding=rounding, rule=rule)
        assert_same(got, want, f"apart {what}")


def test_rounding_before_the_scale_shows():
    """The chain without the rounding in between gives other bits: the comparison above can fail."""
    gate_up = random_activations(64, 2 * 576, dtype=torch.bfloat16, seed=0)
    wide = unfused(gate_up.float())
    q, scale = qops.silu_mul_int8(gate_up)
    assert (q != wide[0]).any() and (scale != wide[1]).any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_accuracy_against_float64(dtype):
    gate, up = random_activations(17, 2 * 1537, dtype=dtype, seed=0).chunk(2, dim=-1)
    q, scale = qops.silu_mul_int8(gate, up, rounding="fp32")
    exact = F.silu(gate.double()) * up.double()
    # Half a step of int8, the rounding of the product to the dtype, and silu's 2.4 ulp of float32.
    bound = 0.5001 * scale[:, None].double() + exact.abs() * (torch.finfo(dtype).eps + 2.0**-21)
    assert bool(((q.double() * scale[:, None].double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_special_rows(dtype):
    gate = torch.ones(7, 40, dtype=dtype)
    up = torch.full_like(gate, 2.0)
    gate[0, 3], up[1, 39], gate[2, 0], gate[3, 7] = NAN, INF, -INF, INF
    gate[4], up[5] = 0.0, -0.0
    for rule in RULES:
        got = qops.silu_mul_int8(gate, up, rule=rule)
        assert_same(got, unfused(gate, up, rule=rule), rule)
        assert not torch.isfinite(got[1][:4]).any() and bool((got[0][:6] == 0).all())
        assert torch.isfinite(got[1][4:]).all() and bool((got[0][6] == 127).all())


def test_strides_and_leading_dimensions():
    base = random_activations(2, 9, 5, 2 * 40, dtype=torch.bfloat16, seed=0)
    want = [t.view(2, 9, 5, *t.shape[1:]) for t in unfused(base.reshape(-1, 80))]
    views = {
        "sliced": lambda t: t[:, 2:7],
        "transposed leading dimensions": lambda t: t.transpose(0, 2),
        "broadcast": lambda t: t[:1].expand(3, *t.shape[1:]),
        "one row": lambda t: t[0, 0, 0],
    }
    for name, view in views.items():
        got = qops.silu_mul_int8(view(base))
        assert all(t.is_contiguous() for t in got), name
        assert_same(got, [view(t).contiguous() for t in want], name)
    for pad in (8, 2):
        assert_same(qops.silu_mul_int8(strided_rows(base, pad)), want, f"row stride, pad {pad}")


def test_offsets_beyond_32_bits(tmp_path):
    stride = 2**30 + 64  # the third row starts behind element 2^31; the file is sparse
    x = torch.from_file(str(tmp_path / "x"), shared=True, size=2 * stride + 64, dtype=torch.bfloat16)
    x = x.as_strided((3, 64), (stride, 1))
    values = random_activations(3, 64, dtype=torch.bfloat16, seed=0)
    x.copy_(values)
    assert_same(qops.silu_mul_int8(x), unfused(values), "merged")
    assert_same(qops.silu_mul_int8(x[:, :32], x[:, 32:]), unfused(values), "split")


def test_rows_do_not_depend_on_batch_or_threads(threads):
    """257 rows are shared out unevenly, and each thread multiplies into a buffer of its own."""
    x = random_activations(257, 2 * 320, dtype=torch.bfloat16, seed=3)
    want = unfused(x)
    for count in (1, 2, 5):
        threads(count)
        assert_same(qops.silu_mul_int8(x), want, f"{count} threads")
    for row in (0, 100, 256):
        assert_same(qops.silu_mul_int8(x[row]), [t[row] for t in want], "row alone")


def test_empty():
    for shape in ((0, 64), (3, 0)):
        for args in ((torch.empty(shape),), (torch.empty(shape),) * 2):
            q, scale = qops.silu_mul_int8(*args)
            assert q.shape == (shape[0], shape[1] // (3 - len(args))) and scale.shape == shape[:1]
            assert bool((scale == 0).all())


def test_out():
    gate_up = random_activations(3, 5, 2 * 37, dtype=torch.bfloat16, seed=0)
    want = unfused(gate_up)
    for args in ((gate_up,), gate_up.chunk(2, dim=-1)):
        walls = [Guarded(torch.full_like(t, 77)) for t in want]
        out = tuple(wall.tensor for wall in walls)
        assert qops.silu_mul_int8(*args, out=out) is out
        assert_same(out, want)
        for wall in walls:
            wall.check()


def test_overlap_is_refused_and_nothing_is_written():
    memory = torch.arange(4096, dtype=torch.uint8)
    before = memory.clone()
    gate_up = memory[:256].view(torch.bfloat16).view(2, 64)
    gate, up = gate_up.chunk(2, dim=-1)
    q, s = memory[1024:1088].view(torch.int8).view(2, 32), memory[2048:2056].view(torch.float32)
    over = memory[32:96].view(torch.int8).view(2, 32)
    over_up = memory[70:134].view(torch.int8).view(2, 32)
    cases = {
        "q must lie apart from gate_up": ((gate_up,), (over, s)),
        "scale must lie apart from gate_up": ((gate_up,), (q, memory[128:136].view(torch.float32))),
        "q must lie apart from gate": ((gate, torch.ones_like(up)), (over, s)),
        "q must lie apart from up": ((torch.ones_like(gate), up), (over_up, s)),
        "scale must lie apart from q": ((gate, up), (q, memory[1080:1088].view(torch.float32))),
    }
    for text, (args, out) in cases.items():
        with pytest.raises(ValueError, match=rf"^qops\.silu_mul_int8: {text} in memory, got overlapping tensors$"):
            qops.silu_mul_int8(*args, out=out)
    assert torch.equal(memory, before)


def test_tensors_by_name():
    gate_up = random_activations(3, 64, dtype=torch.float32, seed=0)
    gate, up = gate_up.chunk(2, dim=-1)
    want = qops.silu_mul_int8(gate_up)
    for what, args, named in (
        ("gate_up", (), {"gate_up": gate_up}),
        ("gate and up", (), {"gate": gate, "up": up}),
        ("up and gate", (), {"up": up, "gate": gate}),
        ("up", (gate,), {"up": up}),
    ):
        got = qops.silu_mul_int8(*args, **named)
        assert_same(got, want, what)


X = torch.ones(2, 32, dtype=torch.bfloat16)
WRONG_TENSORS = {
    "none": ((), {}),
    "gate": ((), {"gate": X}),
    "up": ((), {"up": X}),
    "gate_up and up": ((), {"gate_up": X, "up": X}),
    "gate_up and gate and up": ((), {"gate_up": X, "gate": X, "up": X}),
    "1 by position and gate": ((X,), {"gate": X}),
    "1 by position and gate_up": ((X,), {"gate_up": X}),
    "2 by position and up": ((X, X), {"up": X}),
}


@pytest.mark.parametrize("given", WRONG_TENSORS)
def test_other_tensors_are_refused(given):
    args, named = WRONG_TENSORS[given]
    text = rf"^qops\.silu_mul_int8: tensors must be gate_up, or gate and up, got {given}$"
    with pytest.raises(TypeError, match=text):
        qops.silu_mul_int8(*args, **named)


Q, S = torch.ones(2, 16, dtype=torch.int8), torch.ones(2)
ERRORS = {
    "dtype": ((X.long(),), {}, RuntimeError, r"gate_up must have dtype float32, float16 or bfloat16, got int64"),
    "scalar": ((torch.tensor(1.0),), {}, ValueError, r"gate_up must have at least 1 dimension, got 0"),
    "odd": ((X[:, :31],), {}, ValueError, r"gate_up must have an even last dimension 2 I, got 31"),
    "stride": ((X.t(),), {}, ValueError, r"gate_up must have stride 1 in its last dimension, got 32"),
    "rounding": ((X,), {"rounding": "up"}, ValueError, r'rounding must be "hf" or "fp32", got "up"'),
    "rule": ((X,), {"rule": 'a"'}, ValueError, r'rule must be "127", "compressed-tensors" or "torchao", got "a""'),
    "gate dtype": ((X.double(), X.double()), {}, RuntimeError, r"gate must have dtype float32, .* got float64"),
    "gate scalar": ((torch.tensor(1.0),) * 2, {}, ValueError, r"gate must have at least 1 dimension, got 0"),
    "gate stride": ((X.t(), X.t()), {}, ValueError, r"gate must have stride 1 in its last dimension, got 32"),
    "up dtype": ((X, X.float()), {}, RuntimeError, r"up must have the dtype of gate = bfloat16, got float32"),
    "up shape": ((X, X[:1]), {}, ValueError, r"up must have the shape of gate = \[2, 32\], got \[1, 32\]"),
    "up stride": ((X, X.t().contiguous().t()), {}, ValueError, r"up must have stride 1 in its last dimension, got 2"),
    "split rule": ((X, X), {"rule": ""}, ValueError, r'rule must be "127", "compressed-tensors" or "torchao", got ""'),
    "q dtype": ((X,), {"out": (Q.byte(), S)}, RuntimeError, r"q must have dtype int8, got uint8"),
    "q shape": (
        (X,),
        {"out": (Q[:, :8], S)},
        ValueError,
        r"q must have shape \[\.\.\., K\] = \[2, 16\], got \[2, 8\]",
    ),
    "split q shape": (
        (X, X),
        {"out": (Q, S)},
        ValueError,
        r"q must have shape \[\.\.\., K\] = \[2, 32\], got \[2, 16\]",
    ),
    "scale shape": ((X,), {"out": (Q, S[:1])}, ValueError, r"scale must have shape \[\.\.\.\] = \[2\], got \[1\]"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_the_same_with_fake_tensors(case):
    args, kwargs, error, text = ERRORS[case]
    messages = []
    for device in ("cpu", "meta"):
        there = dict(kwargs)
        if "out" in there:
            there["out"] = tuple(t.to(device) for t in there["out"])
        with pytest.raises(error, match=rf"^qops\.silu_mul_int8: {text}") as caught:
            qops.silu_mul_int8(*(a.to(device) for a in args), **there)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_grad_is_refused():
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, 8, requires_grad=True)
        for args in ((x,), (x, torch.ones(1, 8)), (torch.ones(1, 8), x)):
            with pytest.raises(RuntimeError, match=r"qops\.silu_mul_int8: \w+ must not require grad"):
                qops.silu_mul_int8(*args)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(dtype):
    ops = torch.ops.qops.silu_mul_int8
    with torch.inference_mode(False), torch.no_grad():
        x = random_activations(3, 4, 40, dtype=dtype, seed=0)[:, 1:]
        halves = x.chunk(2, dim=-1)
        q, s = (torch.empty_like(t) for t in qops.silu_mul_int8(x))
        torch.library.opcheck(ops.default, (x,))
        torch.library.opcheck(ops.apart, (*halves, "fp32", "torchao"))
        torch.library.opcheck(ops.out, (x,), {"q": q, "scale": s})
        torch.library.opcheck(ops.apart_out, halves, {"q": q, "scale": s})


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    torch._dynamo.reset()
    x = random_activations(3, 64, dtype=torch.bfloat16, seed=0)

    def block(x):
        q, scale = qops.silu_mul_int8(x)
        out = torch.empty_like(q), torch.empty_like(scale)
        qops.silu_mul_int8(x + 1, out=out)
        also = torch.empty_like(q), torch.empty_like(scale)
        qops.silu_mul_int8(x[:, 32:], x[:, :32], out=also)
        apart = qops.silu_mul_int8(x[:, :32], x[:, 32:] + 1, rounding="fp32", rule="compressed-tensors")
        return q, scale * 2, *out, *also, *apart

    torch.use_deterministic_algorithms(False)  # inductor does not know the poisoned torch.empty
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    for rows in (3, 2):
        for got, want in zip(compiled(x[:rows]), block(x[:rows]), strict=True):
            assert_bitwise(got, want, f"{rows} rows")
