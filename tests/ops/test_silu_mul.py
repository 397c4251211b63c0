from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import qops
from qops.ops.silu_mul import silu_mul_ref
from qops.testing import (
    FLOAT_DTYPES,
    Guarded,
    assert_bitwise,
    assert_within,
    generator,
    random_activations,
    silu_mul_bound,
    strided_rows,
)

ROOT = Path(__file__).resolve().parents[2]
NAN, INF = float("nan"), float("inf")
SPECIAL = (0.0, -0.0, NAN, INF, -INF, 1e-45, -1e-45, 1e-40, -1e-40, 1e38, -1e38, 88.72283, 88.722839, 89.0, -87.33654)
SPECIAL += (float.fromhex("0x1.4cc98p+2"), float.fromhex("-0x1.0af4e2p+4"))  # the largest errors of exp and silu
SPECIAL += (-103.9, -103.97, -103.98, -104.0, -104.1, 0.34657359, -0.34657359)


def sweep() -> torch.Tensor:
    """One float in 2^12, its low bits random, so that each exponent is met 2,048 times per sign; and the range in which
    exp is neither 0 nor infinite, evenly."""
    low = torch.randint(0, 2**12, (2**20,), generator=generator(0))
    bits = (torch.arange(-(2**19), 2**19) * 2**12 + low).to(torch.int32)
    return torch.cat([bits.view(torch.float32), torch.linspace(-104, 89, 2**20), torch.tensor(SPECIAL)])


def ulp(ref: torch.Tensor) -> torch.Tensor:
    """Distance of neighbouring floats at a float64 value, never below that of the subnormals."""
    return torch.ldexp(torch.ones_like(ref), torch.clamp(torch.frexp(ref).exponent - 24, min=-149))


@pytest.fixture(scope="module")
def exp_poly(tmp_path_factory):
    """csrc/exp_poly.h over the lanes of one ISA level, compiled alone."""

    def compiled(level: str):
        library = tmp_path_factory.mktemp("exp_poly") / f"{level}.so"
        flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
        flags += ["-DQOPS_ISA_NS=probe", f"-DQOPS_ISA_{level.upper()}=1"]
        flags += ["-march=native"] if level != "scalar" else []
        source = ROOT / "tests/support/ops/exp_poly_probe.cpp"
        subprocess.run(["c++", *flags, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).exp_poly_probe
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        function.restype = None

        def exp(x: torch.Tensor) -> torch.Tensor:
            x, y = x.contiguous(), torch.empty(x.shape)
            function(x.data_ptr(), y.data_ptr(), x.numel())
            return y

        return exp

    return {level: compiled(level) for level in {"scalar", qops.build_info()["isa"]}}


def test_exp_is_within_its_bound_and_the_same_at_every_level(exp_poly):
    x = sweep()
    y = exp_poly["scalar"](x)
    assert_bitwise(exp_poly[qops.build_info()["isa"]](x), y, "exp at this level and of scalar lanes")
    ref = torch.exp(x.double())
    finite = ref.abs() <= torch.finfo(torch.float32).max  # false for NaN
    error = ((y.double() - ref).abs() / ulp(ref))[finite]
    assert 0.9 < error.max() <= 0.91, f"{error.max():.4f} ulp at {x[finite][error.argmax()].item()!r}"
    assert_bitwise(y[~finite], ref[~finite].float(), "overflow and NaN")


def silu_mul_exact(exp, gate, up, rounding="hf"):
    """The contract in float32 torch operations: must agree with the kernel bit for bit."""
    g = gate.float()
    activation = g / (1 + exp(-g))
    if rounding == "hf":
        activation = activation.to(gate.dtype).float()
    return (activation * up.float()).to(gate.dtype)


@pytest.mark.parametrize("rounding", ("hf", "fp32"))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_bits_follow_the_contract(exp_poly, dtype, rounding):
    every_16_bit_value = torch.arange(-(2**15), 2**15).to(torch.int16)
    gate = sweep() if dtype == torch.float32 else every_16_bit_value.view(dtype)
    for seed, scale in enumerate((1.0, 1e-3, 1e4)):
        up = (scale * torch.randn(gate.shape, generator=generator(seed))).to(dtype)
        got = qops.silu_mul(gate, up, rounding=rounding)
        assert_bitwise(got, silu_mul_exact(exp_poly["scalar"], gate, up, rounding), f"up scaled by {scale}")


def test_silu_error_in_ulp():
    g = sweep()
    g = g[(g > -88.7) & (g < INF)]
    ref = silu_mul_ref(g, torch.ones_like(g), rounding="fp32")
    error = (qops.silu_mul(g, torch.ones_like(g)).double() - ref).abs() / ulp(ref)
    assert 2.3 < error.max() <= 2.4, f"{error.max():.4f} ulp at {g[error.argmax()].item()!r}"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_special_values(dtype):
    gate = torch.tensor([NAN, INF, -INF, -3e4, 3e4, 0.0, -0.0, -INF], dtype=dtype)
    up = torch.ones_like(gate)
    up[-1] = 0.0
    expected = torch.tensor([NAN, INF, NAN, -0.0, 3e4, 0.0, -0.0, NAN], dtype=dtype)
    assert_bitwise(qops.silu_mul(gate, up), expected, "special values")
    assert torch.isnan(F.silu(gate)[2]) and F.silu(gate)[3] == 0  # as PyTorch
    tiny = torch.tensor([torch.finfo(dtype).tiny / 8], dtype=dtype)
    assert_bitwise(qops.silu_mul(tiny, torch.ones_like(tiny)), tiny / 2, "subnormal")
    assert_bitwise(qops.silu_mul(torch.full_like(tiny, 20.0), tiny), 20 * tiny, "subnormal")


@pytest.mark.parametrize("rounding", ("hf", "fp32"))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("rows", (0, 1, 2, 3, 17))
def test_accuracy_against_float64(rows, dtype, rounding):
    for columns in (1, 2, 15, 16, 17, 31, 33, 576, 1536):
        gate_up = random_activations(rows, 2 * columns, dtype=dtype, seed=columns)
        gate, up = gate_up.chunk(2, dim=-1)
        ref, bound = silu_mul_ref(gate, up, rounding="fp32"), silu_mul_bound(gate, up, dtype, rounding=rounding)
        for got in (qops.silu_mul(gate_up, rounding=rounding), qops.silu_mul(gate, up, rounding=rounding)):
            assert_within(got, ref, bound, f"{rows}x{columns}")


def test_matches_transformers():
    gate, up = random_activations(64, 3072, dtype=torch.bfloat16, seed=0).chunk(2, dim=-1)
    differing = (qops.silu_mul(gate, up) != F.silu(gate) * up).float().mean().item()
    assert differing < 1e-3  # another exp moves silu by an ulp or two of float32, seldom by one of bfloat16


def test_strides_and_leading_dimensions():
    base = random_activations(2, 9, 5, 2 * 40, dtype=torch.bfloat16, seed=0)
    gate, up = base.chunk(2, dim=-1)
    expected = qops.silu_mul(gate.reshape(-1, 40), up.reshape(-1, 40)).view(2, 9, 5, 40)
    views = {
        "contiguous": (base, expected),
        "sliced": (base[:, 2:7], expected[:, 2:7]),
        "transposed leading dimensions": (base.transpose(0, 2), expected.transpose(0, 2)),
        "row stride": (strided_rows(base), expected),
        "broadcast": (base[:1].expand(3, -1, -1, -1), expected[:1].expand(3, -1, -1, -1)),
        "one row": (base[0, 0, 0], expected[0, 0, 0]),
        "odd offset": (strided_rows(base, 2), expected),
    }
    for name, (view, want) in views.items():
        got = qops.silu_mul(view)
        assert got.is_contiguous(), name
        assert_bitwise(got, want.contiguous(), name)
    got = qops.silu_mul(strided_rows(gate, 6).transpose(0, 1), up.transpose(0, 1))
    assert_bitwise(got, expected.transpose(0, 1).contiguous(), "gate and up with strides of their own")


def test_offsets_beyond_32_bits(tmp_path):
    stride = 2**30 + 64  # the third row starts behind element 2^31; the file is sparse
    x = torch.from_file(str(tmp_path / "x"), shared=True, size=2 * stride + 64, dtype=torch.bfloat16)
    x = x.as_strided((3, 64), (stride, 1))
    values = random_activations(3, 64, dtype=torch.bfloat16, seed=0)
    x.copy_(values)
    assert_bitwise(qops.silu_mul(x), qops.silu_mul(values), "merged")
    assert_bitwise(qops.silu_mul(x[:, :32], x[:, 32:]), qops.silu_mul(values), "split")


def test_elements_do_not_depend_on_batch_or_threads(threads):
    x = random_activations(257, 2 * 160, dtype=torch.bfloat16, seed=3)
    threads(1)
    one = qops.silu_mul(x)
    threads(2)
    assert_bitwise(qops.silu_mul(x), one, "threads")
    for row in (0, 100, 256):
        assert_bitwise(qops.silu_mul(x[row]), one[row], "row alone")


def test_empty():
    assert qops.silu_mul(torch.empty(0, 64)).shape == (0, 32)
    assert qops.silu_mul(torch.empty(3, 0)).shape == (3, 0)
    assert qops.silu_mul(torch.empty(0, 64), torch.empty(0, 64)).shape == (0, 64)


@pytest.mark.parametrize("rounding", ("hf", "fp32"))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_out(dtype, rounding):
    for shape in ((3, 5, 2 * 37), (0, 64), (3, 0), (2, 64)):
        x = strided_rows(random_activations(*shape, dtype=dtype, seed=0))
        want = qops.silu_mul(x, rounding=rounding)
        for args in ((x,), x.chunk(2, dim=-1)):
            wall = Guarded(torch.full(want.shape, 77, dtype=dtype))
            assert qops.silu_mul(*args, rounding=rounding, out=wall.tensor) is wall.tensor
            assert_bitwise(wall.tensor, want, f"{shape}, {len(args)} tensors")
            wall.check()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_out_may_be_gate_or_up(dtype, threads):
    gate, up = random_activations(2, 257, 163, dtype=dtype, seed=0).unbind(0)
    want = qops.silu_mul(gate, up)
    for count in (1, 2):
        threads(count)
        g, u, both = gate.clone(), up.clone(), gate.clone()
        assert_bitwise(qops.silu_mul(g, up, out=g), want, "gate")
        assert_bitwise(qops.silu_mul(gate, u, out=u), want, "up")
        assert_bitwise(qops.silu_mul(both, both, out=both), qops.silu_mul(gate, gate), "both")


def test_overlap_is_refused_and_nothing_is_written():
    memory = random_activations(16, 32, dtype=torch.bfloat16, seed=0)
    before = memory.clone()
    gate, up = memory[0:2], memory[4:6]
    merged = memory[8:12].view(2, 64)
    cases = {
        "gate": ((gate, up), memory[1:3]),
        "up": ((gate, up), memory[5:7]),
        "gate_up": ((merged,), memory[8:10]),
    }
    cases["up of other strides"] = ((gate, up[:1].expand(2, 32)), up)
    cases["gate of other strides"] = ((gate[:1].expand(2, 32), up), gate)
    cases["gate_up of one row"] = ((merged[:1],), memory[8:9])
    for name, (args, out) in cases.items():
        text = rf"^qops\.silu_mul: out must lie apart from {name.split()[0]} in memory, got overlapping tensors$"
        with pytest.raises(ValueError, match=text):
            qops.silu_mul(*args, out=out)
    assert_bitwise(memory, before, "memory")


def test_tensors_by_name():
    gate_up = random_activations(3, 64, dtype=torch.float32, seed=0)
    gate, up = gate_up.chunk(2, dim=-1)
    want = qops.silu_mul(gate_up)
    for what, args, named in (
        ("gate_up", (), {"gate_up": gate_up}),
        ("gate and up", (), {"gate": gate, "up": up}),
        ("up and gate", (), {"up": up, "gate": gate}),
        ("up", (gate,), {"up": up}),
    ):
        got = qops.silu_mul(*args, **named)
        assert_bitwise(got, want, what)


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
    text = rf"^qops\.silu_mul: tensors must be gate_up, or gate and up, got {given}$"
    with pytest.raises(TypeError, match=text):
        qops.silu_mul(*args, **named)


Y = torch.ones(2, 16, dtype=torch.bfloat16)
ERRORS = {
    "dtype": ((X.long(),), {}, RuntimeError, r"gate_up must have dtype float32, float16 or bfloat16, got int64"),
    "scalar": ((torch.tensor(1.0),), {}, ValueError, r"gate_up must have at least 1 dimension, got 0"),
    "odd": ((X[:, :31],), {}, ValueError, r"gate_up must have an even last dimension 2 I, got 31"),
    "stride": ((X.t(),), {}, ValueError, r"gate_up must have stride 1 in its last dimension, got 32"),
    "rounding": ((X,), {"rounding": "up"}, ValueError, r'rounding must be "hf" or "fp32", got "up"'),
    "gate dtype": ((X.double(), X.double()), {}, RuntimeError, r"gate must have dtype float32, .* got float64"),
    "gate scalar": ((torch.tensor(1.0),) * 2, {}, ValueError, r"gate must have at least 1 dimension, got 0"),
    "gate stride": ((X.t(), X.t()), {}, ValueError, r"gate must have stride 1 in its last dimension, got 32"),
    "up dtype": ((X, X.float()), {}, RuntimeError, r"up must have the dtype of gate = bfloat16, got float32"),
    "up shape": ((X, X[:1]), {}, ValueError, r"up must have the shape of gate = \[2, 32\], got \[1, 32\]"),
    "up stride": ((X, X.t().contiguous().t()), {}, ValueError, r"up must have stride 1 in its last dimension, got 2"),
    "split rounding": ((X, X), {"rounding": ""}, ValueError, r'rounding must be "hf" or "fp32", got ""'),
    "out dtype": ((X,), {"out": Y.float()}, RuntimeError, r"out must have dtype bfloat16, got float32"),
    "out shape": ((X,), {"out": X}, ValueError, r"out must have shape \[\.\.\., I\] = \[2, 16\], got \[2, 32\]"),
    "out strides": ((X,), {"out": Y.t().contiguous().t()}, ValueError, r"out must be contiguous, got strides \[1, 2\]"),
    "out of odd": ((X[:, :31],), {"out": Y}, ValueError, r"gate_up must have an even last dimension 2 I, got 31"),
    "split out dtype": ((X, X), {"out": X.half()}, RuntimeError, r"out must have dtype bfloat16, got float16"),
    "split out shape": (
        (X, X),
        {"out": Y},
        ValueError,
        r"out must have shape \[\.\.\., I\] = \[2, 32\], got \[2, 16\]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_the_same_with_fake_tensors(case):
    args, kwargs, error, text = ERRORS[case]
    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.silu_mul: {text}") as caught:
            there = {n: a.to(device) if isinstance(a, torch.Tensor) else a for n, a in kwargs.items()}
            qops.silu_mul(*(a.to(device) for a in args), **there)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_grad_is_refused():
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, 8, requires_grad=True)
        for args in ((x,), (x, torch.ones(1, 8)), (torch.ones(1, 8), x)):
            with pytest.raises(RuntimeError, match=r"qops\.silu_mul: \w+ must not require grad"):
                qops.silu_mul(*args)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(dtype):
    with torch.inference_mode(False), torch.no_grad():
        x = random_activations(3, 4, 40, dtype=dtype, seed=0)[:, 1:]
        torch.library.opcheck(torch.ops.qops.silu_mul.default, (x,))
        torch.library.opcheck(torch.ops.qops.silu_mul.apart, (*x.chunk(2, dim=-1), "fp32"))
        out = {"out": torch.empty(3, 3, 20, dtype=dtype)}
        torch.library.opcheck(torch.ops.qops.silu_mul.out, (x,), out)
        torch.library.opcheck(torch.ops.qops.silu_mul.apart_out, (*x.chunk(2, dim=-1), "fp32"), out)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    torch._dynamo.reset()
    x = random_activations(3, 64, dtype=torch.bfloat16, seed=0)

    def block(x):
        y = qops.silu_mul(x)
        z = qops.silu_mul(y, x[:, :32] + 1, rounding="fp32")
        out = torch.empty_like(y)
        qops.silu_mul(x * 2, out=out)
        qops.silu_mul(y, z, out=y)
        return torch.stack((y, z, out))

    torch.use_deterministic_algorithms(False)  # inductor does not know the poisoned torch.empty
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    for rows in (3, 2):
        assert_bitwise(compiled(x[:rows]), block(x[:rows]), f"{rows} rows")
