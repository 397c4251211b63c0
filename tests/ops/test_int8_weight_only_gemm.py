from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import qops
from qops.ops.int8_weight_only_gemm import int8_weight_only_gemm_ref
from qops.testing import (
    FLOAT_DTYPES,
    Guarded,
    assert_bitwise,
    assert_within,
    generator,
    random_activations,
    strided_rows,
    weight_only_bound,
)
from tests.support.ops.weight_only_oracle import blocks_of, gemm_row

SHAPES = ((8, 32, 32), (24, 96, 32), (16, 1032, 1032), (72, 576, 32), (40, 272, 272), (8, 8, 8), (32, 768, 256))


FORMS = tuple(itertools.product(qops.Int8Weight.KINDS, (False, True)))


def make_weight(
    n, k, group_size, seed, scale_dtype=torch.float16, kind="symmetric", act_order=False
) -> qops.Int8Weight:
    zero_dtype = FLOAT_DTYPES[(seed + 1) % 3]  # another one than test_bits_follow_the_contract() gives to scales
    rng = generator(seed)
    q = torch.randint(-128, 128, (n, k), generator=rng, dtype=torch.int8)
    q[0], q[1] = -128, 127  # rows of extreme codes
    return qops.Int8Weight.from_canonical(
        q,
        (torch.rand(n, k // group_size, generator=rng) * 1e-3).to(scale_dtype),
        kind=kind,
        zeros=(torch.randn(n, k // group_size, generator=rng) * 0.05).to(zero_dtype) if kind == "offset" else None,
        perm=torch.randperm(k, generator=rng) if act_order else None,
    )


def by_contract(x: torch.Tensor, w: qops.Int8Weight, bias=None) -> torch.Tensor:
    canonical = w.canonical()
    codes, scales = canonical["qweight"].long().numpy(), canonical["scales"].float().numpy()
    zeros = canonical["zeros"].float().numpy() if "zeros" in canonical else None
    rows = x[:, w.perm.long()] if w.act_order else x
    y = [gemm_row(row, codes, scales, zeros, w.kind, w.group_size, bias, 0) for row in rows]
    return torch.stack(y).to(x.dtype)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("kind, act_order", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_follow_the_contract(shape, kind, act_order, dtype):
    n, k, group_size = shape
    for seed, scale_dtype in enumerate(FLOAT_DTYPES):
        w = make_weight(n, k, group_size, seed, scale_dtype, kind, act_order)
        x = random_activations(7, k, dtype=dtype, seed=seed)
        x[1] = 0
        x[2, k // 2] = 3000.0  # a massive activation: four digits
        x[3] = 5.0  # every digit at its maximum, against codes of -128 and 127
        x[4] = -5.0
        bias = torch.randn(n, generator=generator(seed)) if seed else None
        assert_bitwise(qops.int8_weight_only_gemm(x, w, bias), by_contract(x, w, bias), str(scale_dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("m", (1, 2, 3, 4, 5, 17))
def test_accuracy_against_float64(m, dtype):
    for seed, ((n, k, group_size), (kind, act_order)) in enumerate(itertools.product(SHAPES, FORMS)):
        w = make_weight(n, k, group_size, seed, torch.float16, kind, act_order)
        x = random_activations(m, k, dtype=dtype, seed=seed)
        ref = int8_weight_only_gemm_ref(x, w)
        assert_within(qops.int8_weight_only_gemm(x, w), ref, weight_only_bound(x, w), f"{n}x{k} g{group_size}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("kind", qops.Int8Weight.KINDS)
def test_componentwise_bound_with_planted_outliers(kind, dtype):
    """The fixed point errs by x alone, so that its bound has the sum of product and offset, not of their sizes."""
    for seed, outlier in enumerate((1.0, 30.0, 1e3, 3e4)):
        n, k, group_size = 64, 512, 256
        w = make_weight(n, k, group_size, seed, torch.float16, kind)
        x = random_activations(2, k, dtype=torch.float32, seed=seed, outliers=False).to(dtype)
        x[0, 77] = x[1, 300] = outlier
        exact = int8_weight_only_gemm_ref(x, w)
        error = (qops.int8_weight_only_gemm(x, w).double() - exact).abs()
        weight = w.dequantize(torch.float64).abs()
        limit = torch.zeros_like(exact)
        for _, begin, size in blocks_of(k, group_size):
            block = x[:, begin : begin + size].double().abs()
            limit += block.amax(-1, keepdim=True) * weight[:, begin : begin + size].sum(-1)
        fixed = (2.0**-31 if dtype == torch.float32 else 1.001 * 2.0**-16) * limit
        rounding = exact.abs() * torch.finfo(dtype).eps / 2
        canonical = w.canonical()
        magnitude = canonical["scales"].double().repeat_interleave(group_size, 1) * canonical["qweight"].double().abs()
        if kind == "offset":
            magnitude += canonical["zeros"].double().abs().repeat_interleave(group_size, 1)
        magnitude = x.double().abs() @ magnitude.T
        assert bool((error <= fixed + rounding + 8 * 2.0**-24 * magnitude).all()), f"{outlier}"


@pytest.mark.parametrize("kind, act_order", FORMS)
def test_rows_do_not_depend_on_batch_position_or_threads(kind, act_order, threads):
    w = make_weight(200, 576, 32, 0, torch.float16, kind, act_order)
    x = random_activations(35, 576, dtype=torch.bfloat16, seed=0)
    x[5, 3] = 1e4
    threads(1)
    together = qops.int8_weight_only_gemm(x, w)
    threads(2)
    assert_bitwise(qops.int8_weight_only_gemm(x, w), together, "two threads")
    for rows in ([0], [5], [34, 1, 5]):
        assert_bitwise(qops.int8_weight_only_gemm(x[rows], w), together[rows], str(rows))
    assert_bitwise(qops.int8_weight_only_gemm(strided_rows(x), w), together, "row stride")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("kind, act_order", FORMS)
def test_special_values(kind, act_order, dtype):
    w = make_weight(16, 64, 32, 0, torch.float16, kind, act_order)
    x = random_activations(4, 64, dtype=dtype, seed=0, outliers=False)
    clean = qops.int8_weight_only_gemm(x, w)
    x[1, 3], x[2, 4] = float("nan"), -float("inf")
    y = qops.int8_weight_only_gemm(x, w)
    assert y[1:3].isnan().all()
    assert_bitwise(y[[0, 3]], clean[[0, 3]], "rows beside special rows")


@pytest.mark.parametrize("m, n, k", ((0, 16, 32), (3, 0, 32), (2, 16, 0)))
def test_empty(m, n, k):
    strips = (n + 15) // 16
    packed = torch.zeros(strips, 16 * k, dtype=torch.int8)
    scales = torch.zeros(strips, 0 if k == 0 else 1, 16)
    bias = torch.arange(float(n))
    perm = torch.arange(k, dtype=torch.int32)
    for zeros, order in itertools.product((None, torch.ones_like(scales)), (None, perm)):
        y = torch.ops.qops.int8_weight_only_gemm(torch.zeros(m, k), packed, scales, zeros, order, bias, n, k)
        assert_bitwise(y, bias.expand(m, n).contiguous(), "bias alone")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_out(dtype):
    for m, (n, k, group_size) in itertools.product((0, 1, 5), ((24, 96, 48), (40, 128, 128))):
        w = make_weight(n, k, group_size, m)
        x = random_activations(m, k, dtype=dtype, seed=m)
        bias = torch.randn(n, generator=generator(m))
        out = Guarded(torch.full((m, n), 77, dtype=dtype))
        assert qops.int8_weight_only_gemm(x, w, bias, out=out.tensor) is out.tensor
        assert_bitwise(out.tensor, qops.int8_weight_only_gemm(x, w, bias), f"{m}x{n}x{k}")
        out.check()


def test_out_must_not_overlap_an_input():
    args = arguments()
    args["scales"], args["bias"] = args["scales"].bfloat16(), args["bias"].bfloat16()
    for name in ("x", "packed", "scales", "zeros", "perm", "bias"):
        memory = torch.zeros(4096, dtype=torch.uint8)
        there = args[name].contiguous().view(-1).view(torch.uint8)
        inside = memory[1024 : 1024 + len(there)].view(args[name].dtype).view(args[name].shape)
        memory[1024 : 1024 + len(there)] = there
        before = memory.clone()
        out = memory[1024 - 94 : 1024 + 2].view(torch.bfloat16).view(2, 24)
        text = rf"^qops\.int8_weight_only_gemm: out must lie apart from {name} in memory, got overlapping tensors$"
        with pytest.raises(ValueError, match=text):
            torch.ops.qops.int8_weight_only_gemm.out(**{**args, name: inside}, out=out)
        assert_bitwise(memory, before, name)


def arguments(device="cpu", **changes):
    w = make_weight(24, 64, 32, 0, torch.float16, "offset", act_order=True)
    values = {
        "x": torch.zeros(2, 64, dtype=torch.bfloat16),
        "packed": w.packed,
        "scales": w.scales,
        "zeros": w.zeros,
        "perm": w.perm,
        "bias": torch.zeros(24),
        "out_features": 24,
        "group_size": 32,
        **changes,
    }
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in values.items()}


ERRORS = {
    "x dtype": ({"x": torch.zeros(2, 64).double()}, RuntimeError, "x must have dtype float32, .* got float64"),
    "x columns": ({"x": torch.zeros(2, 56)}, ValueError, "x must have last dimension K = 64, got 56"),
    "packed dtype": ({"packed": torch.zeros(2, 1024).byte()}, RuntimeError, "packed must have dtype int8, got uint8"),
    "packed width": ({"packed": torch.zeros(2, 1000, dtype=torch.int8)}, ValueError, "packed must hold .* got 1000"),
    "scales": ({"scales": torch.zeros(2, 1, 16)}, ValueError, r"scales must have shape .* = \[2, 2, 16\], got"),
    "zeros dtype": (
        {"zeros": torch.zeros(2, 2, 16).byte()},
        RuntimeError,
        "zeros must have dtype float32, float16 or bfloat16, got uint8",
    ),
    "zeros": ({"zeros": torch.zeros(2, 1, 16)}, ValueError, r"zeros must have .* = \[2, 2, 16\], got \[2, 1, 16\]"),
    "zeros strides": ({"zeros": torch.zeros(2, 16, 2).mT}, ValueError, "zeros must be contiguous, got strides"),
    "perm dtype": ({"perm": torch.arange(64)}, RuntimeError, "perm must have dtype int32, got int64"),
    "perm": ({"perm": torch.arange(56).int()}, ValueError, r"perm must have shape \[K\] = \[64\], got \[56\]"),
    "out_features": ({"out_features": 20}, ValueError, "out_features must be a multiple of 8, got 20"),
    "group_size": ({"group_size": 40}, ValueError, "group_size must be K = 64 or a multiple of 16 .*, got 40"),
    "bias": ({"bias": torch.zeros(25)}, ValueError, r"bias must have shape \[N\] = \[24\], got \[25\]"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_the_same_with_fake_tensors(case):
    changes, error, text = ERRORS[case]
    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.int8_weight_only_gemm: {text}") as caught:
            torch.ops.qops.int8_weight_only_gemm(**arguments(device, **changes))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("index", (-1, 64, 2**31 - 1, -(2**31)))
def test_perm_out_of_range(index):
    args = arguments()
    args["perm"] = args["perm"].clone()
    args["perm"][63] = index
    out = torch.full((2, 24), 77, dtype=torch.bfloat16)
    text = rf"^qops\.int8_weight_only_gemm: perm must hold indices in 0 \.\. 63, got {index}$"
    with pytest.raises(ValueError, match=text):
        torch.ops.qops.int8_weight_only_gemm(**args)
    with pytest.raises(ValueError, match=text):
        torch.ops.qops.int8_weight_only_gemm.out(**args, out=out)
    assert (out == 77).all()


OUT = torch.zeros(2, 24, dtype=torch.bfloat16)
OUT_ERRORS = {
    "dtype": (OUT.float(), RuntimeError, "out must have dtype bfloat16, got float32"),
    "columns": (OUT[:, :16], ValueError, r"out must have shape \[\.\.\., N\] = \[2, 24\], got \[2, 16\]"),
    "strides": (OUT.t().contiguous().t(), ValueError, r"out must be contiguous, got strides \[1, 2\]"),
}


@pytest.mark.parametrize("case", OUT_ERRORS)
def test_out_errors_are_the_same_with_fake_tensors(case):
    out, error, text = OUT_ERRORS[case]
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.int8_weight_only_gemm: {text}$"):
            torch.ops.qops.int8_weight_only_gemm.out(**arguments(device), out=out.to(device))


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_the_out_form(case):
    changes, error, text = ERRORS[case]
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.int8_weight_only_gemm: {text}"):
            torch.ops.qops.int8_weight_only_gemm.out(**arguments(device, **changes), out=OUT.to(device))


def test_grad_is_refused():
    w = make_weight(16, 32, 32, 0)
    refused = pytest.raises(RuntimeError, match=r"qops\.int8_weight_only_gemm: \w+ must not require grad")
    with torch.inference_mode(False), torch.enable_grad(), refused:
        qops.int8_weight_only_gemm(torch.ones(1, 32, requires_grad=True), w)


def test_opcheck():
    with torch.inference_mode(False), torch.no_grad():
        for kind, act_order in FORMS:
            w = make_weight(24, 64, 32, 0, torch.float16, kind, act_order)
            x = random_activations(2, 3, 64, dtype=torch.bfloat16, seed=0)
            args = (x, w.packed, w.scales, w.zeros, w.perm, torch.zeros(24), 24, 32)
            torch.library.opcheck(torch.ops.qops.int8_weight_only_gemm.default, args)
            out = {"out": torch.empty(2, 3, 24, dtype=torch.bfloat16)}
            torch.library.opcheck(torch.ops.qops.int8_weight_only_gemm.out, args, out)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    w = make_weight(64, 64, 32, 0, torch.float16, "offset", act_order=True)

    def two(x):
        y = qops.int8_weight_only_gemm(F.relu(qops.int8_weight_only_gemm(x, w)), w)
        out = torch.empty_like(y)
        qops.int8_weight_only_gemm(y + 1, w, out=out)
        return y + out

    compiled = torch.compile(two, fullgraph=True, backend=backend, dynamic=True)
    for m in (3, 5):
        x = random_activations(m, 64, dtype=torch.bfloat16, seed=m)
        assert_bitwise(compiled(x), two(x), f"M = {m}")


def test_matches_int4_gemm_where_codes_agree():
    """Both kernels on codes -8 .. 7: different operands and corrections, the same integers, the same constants."""
    q = torch.randint(-8, 8, (32, 128), generator=generator(0), dtype=torch.int8)
    scales = torch.rand(32, 4, generator=generator(1))
    nibbles = (q + 8).to(torch.uint8)
    nibbles = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    perm = torch.randperm(128, generator=generator(2))
    zeros = torch.randint(-64, 64, (32, 4), generator=generator(3)) / 8
    scales = (scales * 64).ceil() / 64  # of few bits, so that o + 8 s is exact
    for act_order, offset in itertools.product((False, True), (False, True)):
        more = {"perm": perm} if act_order else {}
        w4 = {"kind": "offset", "zeros": zeros - 8 * scales} if offset else {"kind": "symmetric"}
        w8 = {"kind": "offset", "zeros": zeros} if offset else {}
        w4 = qops.Int4Weight.from_canonical(nibbles, scales, **w4, **more, in_features=128)
        w8 = qops.Int8Weight.from_canonical(q, scales, **w8, **more)
        assert torch.equal(w4.dequantize(), w8.dequantize())
        for dtype, m in itertools.product(FLOAT_DTYPES, (1, 6)):
            x = random_activations(m, 128, dtype=dtype, seed=m)
            assert_bitwise(qops.int8_weight_only_gemm(x, w8), qops.int4_gemm(x, w4), f"{dtype} M = {m}")
