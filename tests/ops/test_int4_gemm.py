from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import qops
from qops.ops.int4_gemm import KINDS, int4_gemm_ref
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

# (N, K, group size): full strips and others, 1 to 5 strips, groups of one to many blocks, K odd multiples of 8.
SHAPES = (
    (8, 16, 16),
    (16, 64, 32),
    (24, 96, 48),
    (40, 128, 128),
    (72, 288, 144),
    (64, 576, 64),
    (56, 576, 576),
    (16, 1032, 1032),
    (80, 768, 256),
    (8, 8, 8),
)


def make_weight(n, k, group_size, kind, seed, scale_dtype=torch.float16, act_order=False) -> qops.Int4Weight:
    zero_dtype = FLOAT_DTYPES[seed % 3]
    rng = generator(seed)
    groups = (n, k // group_size)
    scales = (torch.rand(groups, generator=rng) * 0.02 + 1e-3).to(scale_dtype)
    zeros = {
        "symmetric": None,
        "zero_point": torch.randint(0, 17, groups, generator=rng, dtype=torch.uint8),
        "float_zero": (torch.rand(groups, generator=rng) * 15).to(zero_dtype),
        "offset": (torch.randn(groups, generator=rng) * 0.1).to(zero_dtype),
    }[kind]
    return qops.Int4Weight.from_canonical(
        torch.randint(0, 256, (n, k // 2), generator=rng, dtype=torch.uint8),
        scales,
        kind=kind,
        zeros=zeros,
        perm=torch.randperm(k, generator=rng).int() if act_order else None,
    )


def by_contract(x: torch.Tensor, w: qops.Int4Weight, bias=None) -> torch.Tensor:
    """What the docstring promises, bit for bit."""
    canonical = w.canonical()
    q = canonical["qweight"]
    codes = torch.stack((q & 15, q >> 4), -1).view(w.out_features, w.in_features).long().numpy()
    if w.kind != "zero_point":
        codes = codes - 8
    scales = canonical["scales"].float().numpy()
    zeros = canonical["zeros"].float().numpy() if "zeros" in canonical else None
    rows = x.reshape(-1, w.in_features)
    if "perm" in canonical:
        rows = rows[:, canonical["perm"].long()]
    y = [gemm_row(row, codes, scales, zeros, w.kind, w.group_size, bias, 8) for row in rows]
    return torch.stack(y).to(x.dtype).view(*x.shape[:-1], w.out_features)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("float_zero", "offset"))
@pytest.mark.parametrize("seed", (1, 2))
def test_narrow_zeros_give_the_bits_of_the_same_numbers_in_float32(seed, kind, dtype):
    for n, k, group_size in ((40, 1056, 32), (72, 288, 144), (80, 768, 256)):
        w = make_weight(n, k, group_size, kind, seed)
        assert w.zeros.dtype == FLOAT_DTYPES[seed] != torch.float32
        canonical = w.canonical()
        wide = qops.Int4Weight.from_canonical(**{**canonical, "zeros": canonical["zeros"].float()}, kind=kind)
        assert_bitwise(w.dequantize(), wide.dequantize())
        assert_bitwise(qops.int4_dequantize(w, dtype), qops.int4_dequantize(wide, dtype))
        for m in (1, 3, 8, 40):
            x = random_activations(m, k, dtype=dtype, seed=m)
            assert_bitwise(qops.int4_gemm(x, w), qops.int4_gemm(x, wide), f"{w} {m}")
            q, scale = qops.quantize_int8(x)
            assert_bitwise(qops.int4_int8_gemm(q, scale, w), qops.int4_int8_gemm(q, scale, wide), f"{w} {m}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_follow_the_contract(shape, dtype):
    n, k, group_size = shape
    # Every kind with and without act-order, every scale dtype with every kind over the shapes.
    for seed, (act_order, kind) in enumerate(itertools.product((False, True), KINDS), start=n + k):
        scale_dtype = FLOAT_DTYPES[seed % 3]
        w = make_weight(n, k, group_size, kind, seed, scale_dtype, act_order)
        x = random_activations(6, k, dtype=dtype, seed=seed)
        x[1] = 0
        x[2, k // 2] = 3000.0  # a massive activation: four digits
        bias = torch.randn(n, generator=generator(seed)).to(FLOAT_DTYPES[seed % 3]) if seed % 2 else None
        assert_bitwise(qops.int4_gemm(x, w, bias), by_contract(x, w, bias), f"{kind} {scale_dtype} {act_order}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("m", (1, 2, 3, 4, 5, 17, 33))
def test_accuracy_against_float64(m, dtype):
    for seed, ((n, k, group_size), kind) in enumerate(itertools.product(SHAPES, KINDS)):
        w = make_weight(n, k, group_size, kind, seed, act_order=seed % 3 == 0)
        x = random_activations(m, k, dtype=dtype, seed=seed)
        bound = weight_only_bound(x, w)
        assert_within(qops.int4_gemm(x, w), int4_gemm_ref(x, w), bound, f"{n}x{k} g{group_size} {kind}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_componentwise_bound_with_planted_outliers(dtype):
    """The documented fixed-point bound, output by output; float32 output separates it from R()."""
    for seed, (outlier, kind) in enumerate(itertools.product((1.0, 30.0, 1e3, 3e4), KINDS)):
        n, k, group_size = 64, 512, 128
        w = make_weight(n, k, group_size, kind, seed)
        x = random_activations(3, k, dtype=torch.float32, seed=seed, outliers=False).to(dtype)
        x[:, 77] = outlier
        x[1, 300] = -outlier
        exact = int4_gemm_ref(x, w)
        error = (qops.int4_gemm(x, w).double() - exact).abs()
        weight = w.dequantize(torch.float64).abs()
        limit = torch.zeros_like(exact)
        for _, begin, size in blocks_of(k, group_size):
            block = x[:, begin : begin + size].double().abs()
            limit += block.amax(-1, keepdim=True) * weight[:, begin : begin + size].sum(-1)
        magnitude = x.double().abs() @ weight.T
        fixed = {torch.float32: 2.0**-31}.get(dtype, 1.001 * 2.0**-16) * limit
        rounding = exact.abs() * torch.finfo(dtype).eps / 2
        assert bool((error <= fixed + rounding + 8 * 2.0**-24 * magnitude).all()), f"{outlier} {kind}"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_massive_activation_does_not_blur_the_rest(dtype):
    """Weights of zero at the outlier: what is left of y must be as exact as without it."""
    k = 128
    q = torch.randint(0, 16, (64, k), generator=generator(0), dtype=torch.uint8)
    q[:, 5] = 8
    w = qops.Int4Weight.from_canonical(q[:, ::2] | q[:, 1::2] << 4, torch.full((64, 1), 0.01), kind="symmetric")
    x = random_activations(1, k, dtype=dtype, seed=1, outliers=False)
    quiet = x.clone()
    quiet[0, 5] = 0
    x[0, 5] = 20000.0
    ref = int4_gemm_ref(quiet, w)
    assert_within(qops.int4_gemm(x, w), ref, weight_only_bound(quiet, w), "outlier on a zero weight")


def test_rows_do_not_depend_on_batch_position_or_threads(threads):
    w = make_weight(200, 576, 64, "offset", 0)
    x = random_activations(67, 576, dtype=torch.bfloat16, seed=0)
    x[5, 3] = 1e4
    x[6, 3] = 1e4
    threads(1)
    together = qops.int4_gemm(x, w)
    threads(2)
    assert_bitwise(qops.int4_gemm(x, w), together, "two threads")
    assert_bitwise(qops.int4_gemm(x, w, batch_invariant=True), together, "batch_invariant")
    for rows in ([0], [5], [6, 5], [66, 1, 5], list(range(66, -1, -1))):
        assert_bitwise(qops.int4_gemm(x[rows], w), together[rows], str(rows[:4]))


def test_strides_and_leading_dimensions():
    w = make_weight(24, 64, 32, "zero_point", 0)
    x = random_activations(2, 5, 3, 64, dtype=torch.float16, seed=0)
    flat = qops.int4_gemm(x.reshape(-1, 64), w).view(2, 5, 3, 24)
    for name, view, want in (
        ("leading dimensions", x, flat),
        ("rows apart", strided_rows(x), flat),
        ("odd offset", strided_rows(x, 2), flat),
        ("transposed", x.transpose(0, 2), flat.transpose(0, 2)),
        ("sliced", x[:, 1:4], flat[:, 1:4]),
        ("expanded", x[:, :, :1].expand(-1, -1, 3, -1), flat[:, :, :1].expand(-1, -1, 3, -1)),
        ("vector", x[0, 0, 0], flat[0, 0, 0]),
    ):
        assert_bitwise(qops.int4_gemm(view, w), want.contiguous(), name)


def test_act_order_is_a_gather_of_x():
    w = make_weight(32, 128, 32, "symmetric", 4, act_order=True)
    x = random_activations(3, 128, dtype=torch.bfloat16, seed=0)
    canonical = w.canonical()
    plain = qops.Int4Weight.from_canonical(canonical["qweight"], canonical["scales"], kind="symmetric")
    assert_bitwise(qops.int4_gemm(x, w), qops.int4_gemm(x[:, canonical["perm"].long()], plain))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_special_values(dtype):
    w = make_weight(16, 64, 32, "symmetric", 0, torch.float32)
    x = random_activations(8, 64, dtype=dtype, seed=0, outliers=False)
    clean = qops.int4_gemm(x, w)
    x[1, 3], x[2, 4], x[3, 5] = float("nan"), float("inf"), -float("inf")
    x[4] = 0
    x[5] = torch.finfo(dtype).tiny / 2
    x[6] = torch.finfo(dtype).max / 128
    y = qops.int4_gemm(x, w)
    assert y[1:4].isnan().all()
    assert_bitwise(y[4], torch.zeros(16, dtype=dtype), "zero row")
    for row in (0, 7):
        assert_bitwise(y[row], clean[row], "rows beside special rows")
    assert_within(y[4:7], int4_gemm_ref(x[4:7], w), weight_only_bound(x[4:7], w), "extreme magnitudes")


def test_subnormal_activations_are_not_flushed():
    w = make_weight(16, 32, 32, "symmetric", 0, torch.float32)
    x = torch.full((1, 32), 2.0**-140)
    ref = int4_gemm_ref(x * 2.0**100, w) * 2.0**-100
    y = qops.int4_gemm(x, w).double()
    assert bool((y != 0).any()) and bool(((y - ref).abs() <= 32 * 2.0**-149).all())


@pytest.mark.parametrize("exponent", range(-124, -92, 2))
def test_tiny_float32_blocks_keep_their_bound(exponent):
    """Where the step of a block, 2^-30 of its largest value, nears or passes 2^-126, the least normal number, and with
    it the factor that makes integers of the values; weights of 2^50 keep the outputs normal."""
    w = make_weight(16, 256, 32, "symmetric", 0, torch.float32)
    tensors = w.canonical()
    w = qops.Int4Weight.from_canonical(tensors["qweight"], tensors["scales"] * 2.0**50, kind="symmetric")
    x = random_activations(3, 256, dtype=torch.float32, seed=1, outliers=False)
    x = x / x.abs().max() * 1.5 * 2.0**exponent
    dense, exact = w.dequantize(torch.float64), int4_gemm_ref(x, w)
    largest = x.double().view(3, -1, 32).abs().amax(-1, keepdim=True).expand(3, -1, 32).flatten(1)
    bound = 1.001 * 2.0**-31 * largest @ dense.abs().T + 40 * 2.0**-24 * x.double().abs() @ dense.abs().T
    error = (qops.int4_gemm(x, w).double() - exact).abs()
    assert bool((error <= bound).all()), float((error / bound).max())


@pytest.mark.parametrize("m, n, k", ((0, 16, 32), (3, 0, 32), (0, 0, 0), (2, 16, 0)))
def test_empty(m, n, k):
    strips = (n + 15) // 16
    packed = torch.zeros(strips, 8 * k, dtype=torch.uint8)
    scales = torch.zeros(strips, 0 if k == 0 else 1, 16)
    bias = torch.arange(float(n))
    y = torch.ops.qops.int4_gemm(torch.zeros(m, k), packed, scales, None, None, bias, n, k, 0)
    assert_bitwise(y, bias.expand(m, n).contiguous(), "bias alone")


def test_offsets_beyond_int32():
    """Rows 2^31 elements apart: the pages between them are never touched."""
    k, gap = 32, 2**31
    torch.use_deterministic_algorithms(False)  # filling 4 GiB with NaN is not the point here
    base = torch.empty(gap + k, dtype=torch.float16)
    x = base.as_strided((2, k), (gap, 1))
    values = random_activations(2, k, dtype=torch.float16, seed=0)
    x.copy_(values)
    w = make_weight(16, k, 32, "symmetric", 0)
    assert_bitwise(qops.int4_gemm(x, w), qops.int4_gemm(values, w))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_out(dtype):
    for m, (n, k, group_size), kind in itertools.product((0, 1, 5), ((24, 96, 48), (40, 128, 128)), KINDS):
        w = make_weight(n, k, group_size, kind, m, act_order=kind == "symmetric")
        x = strided_rows(random_activations(m, k, dtype=dtype, seed=m))
        bias = torch.randn(n, generator=generator(m))
        out = Guarded(torch.full((m, n), 77, dtype=dtype))
        assert qops.int4_gemm(x, w, bias, out=out.tensor) is out.tensor
        assert_bitwise(out.tensor, qops.int4_gemm(x, w, bias), f"{m}x{n}x{k} {kind}")
        out.check()


def test_out_must_not_overlap_an_input():
    args = arguments()
    args["x"] = random_activations(2, 64, dtype=torch.bfloat16, seed=0)
    args["scales"], args["bias"] = args["scales"].bfloat16(), args["bias"].bfloat16()
    for name in ("x", "packed", "scales", "zeros", "perm", "bias"):
        memory = torch.zeros(4096, dtype=torch.uint8)
        there = args[name].contiguous().view(-1).view(torch.uint8)
        memory[1024 : 1024 + len(there)] = there
        inside = memory[1024 : 1024 + len(there)].view(args[name].dtype).view(args[name].shape)
        before = memory.clone()
        for start in (1024 - 2 * 24 * 2 + 2, 1024 + len(there) - 2):
            out = memory[start : start + 2 * 24 * 2].view(torch.bfloat16).view(2, 24)
            text = rf"^qops\.int4_gemm: out must lie apart from {name} in memory, got overlapping tensors$"
            with pytest.raises(ValueError, match=text):
                torch.ops.qops.int4_gemm.out(**{**args, name: inside}, out=out)
        assert_bitwise(memory, before, name)
        beside = memory[1024 - 2 * 24 * 2 : 1024].view(torch.bfloat16).view(2, 24)
        torch.ops.qops.int4_gemm.out(**{**args, name: inside}, out=beside)
        assert_bitwise(beside, torch.ops.qops.int4_gemm(**args), f"beside {name}")


def arguments(device="cpu", **changes):
    w = make_weight(24, 64, 32, "zero_point", 0, act_order=True)
    values = {
        "x": torch.zeros(2, 64, dtype=torch.bfloat16),
        "packed": w.packed,
        "scales": w.scales,
        "zeros": w.zeros,
        "perm": w.perm,
        "bias": torch.zeros(24),
        "out_features": 24,
        "group_size": 32,
        "kind": 1,
        **changes,
    }
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in values.items()}


ERRORS = {
    "x dtype": ({"x": torch.zeros(2, 64, dtype=torch.int32)}, RuntimeError, "x must have dtype float32, .* got int32"),
    "x scalar": ({"x": torch.zeros(())}, ValueError, "x must have at least 1 dimension, got 0"),
    "x columns": ({"x": torch.zeros(2, 72)}, ValueError, "x must have last dimension K = 64, got 72"),
    "x stride": ({"x": torch.zeros(64, 2).t()}, ValueError, "x must have stride 1 in its last dimension, got 2"),
    "packed dtype": ({"packed": torch.zeros(2, 512)}, RuntimeError, "packed must have dtype uint8, got float32"),
    "packed rank": (
        {"packed": torch.zeros(2, 8, 64, dtype=torch.uint8)},
        ValueError,
        "packed must have 2 dim.*, got 3",
    ),
    "packed width": (
        {"packed": torch.zeros(2, 500, dtype=torch.uint8)},
        ValueError,
        "packed must hold a mult.*got 500",
    ),
    "packed strips": ({"out_features": 40}, ValueError, r"packed must have shape \[S, K-strip\] = \[3, 512\], got"),
    "scales": (
        {"scales": torch.zeros(2, 2, 8)},
        ValueError,
        r"scales must have shape .* = \[2, 2, 16\], got \[2, 2, 8\]",
    ),
    "scales dtype": ({"scales": torch.zeros(2, 2, 16).double()}, RuntimeError, "scales must have dtype .* got float64"),
    "out_features": ({"out_features": 25}, ValueError, "out_features must be a multiple of 8, got 25"),
    "negative": ({"out_features": -8}, ValueError, "out_features must be a multiple of 8, got -8"),
    "group of 24": ({"group_size": 24}, ValueError, "group_size must be K = 64 or a multiple of 16 .*, got 24"),
    "group of 0": ({"group_size": 0}, ValueError, "group_size must be K = 64 or a multiple of 16 .*, got 0"),
    "kind": ({"kind": 4}, ValueError, r"kind must be 0 \(symmetric\), .*, got 4"),
    "zeros missing": ({"zeros": None}, ValueError, "zeros must be given for this kind, got None"),
    "zeros extra": ({"kind": 0}, ValueError, "zeros must be None for kind 0, got a tensor"),
    "zeros dtype": ({"kind": 2}, RuntimeError, "zeros must have dtype float32, float16 or bfloat16, got uint8"),
    "perm": (
        {"perm": torch.zeros(63, dtype=torch.int32)},
        ValueError,
        r"perm must have shape \[K\] = \[64\], got \[63\]",
    ),
    "perm dtype": ({"perm": torch.zeros(64)}, RuntimeError, "perm must have dtype int32, got float32"),
    "bias": ({"bias": torch.zeros(32)}, ValueError, r"bias must have shape \[N\] = \[24\], got \[32\]"),
    "bias dtype": ({"bias": torch.zeros(24).long()}, RuntimeError, "bias must have dtype float32, .* got int64"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_the_same_with_fake_tensors(case):
    changes, error, text = ERRORS[case]
    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.int4_gemm: {text}") as caught:
            torch.ops.qops.int4_gemm(**arguments(device, **changes))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_the_out_form(case):
    changes, error, text = ERRORS[case]
    for device in ("cpu", "meta"):
        out = torch.empty(2, 24, dtype=torch.bfloat16, device=device)
        with pytest.raises(error, match=rf"^qops\.int4_gemm: {text}"):
            torch.ops.qops.int4_gemm.out(**arguments(device, **changes), out=out)


OUT = torch.zeros(2, 24, dtype=torch.bfloat16)
OUT_ERRORS = {
    "dtype": (OUT.float(), RuntimeError, "out must have dtype bfloat16, got float32"),
    "columns": (OUT[:, :16], ValueError, r"out must have shape \[\.\.\., N\] = \[2, 24\], got \[2, 16\]"),
    "rank": (OUT[None], ValueError, r"out must have shape \[\.\.\., N\] = \[2, 24\], got \[1, 2, 24\]"),
    "strides": (OUT.t().contiguous().t(), ValueError, r"out must be contiguous, got strides \[1, 2\]"),
}


@pytest.mark.parametrize("case", OUT_ERRORS)
def test_out_errors_are_the_same_with_fake_tensors(case):
    out, error, text = OUT_ERRORS[case]
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.int4_gemm: {text}$"):
            torch.ops.qops.int4_gemm.out(**arguments(device), out=out.to(device))


@pytest.mark.parametrize("bad", (-1, 64, 2**31 - 1))
def test_perm_out_of_range(bad):
    perm = torch.arange(64, dtype=torch.int32)
    perm[63] = bad
    with pytest.raises(ValueError, match=r"perm must hold indices in 0 \.\. 63"):
        torch.ops.qops.int4_gemm(**arguments(perm=perm))
    out = torch.full((2, 24), 77, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"perm must hold indices in 0 \.\. 63"):
        torch.ops.qops.int4_gemm.out(**arguments(perm=perm), out=out)
    assert bool((out == 77).all())


def test_grad_is_refused():
    w = make_weight(16, 32, 32, "symmetric", 0)
    refused = pytest.raises(RuntimeError, match=r"qops\.int4_gemm: \w+ must not require grad")
    with torch.inference_mode(False), torch.enable_grad(), refused:
        qops.int4_gemm(torch.ones(1, 32, requires_grad=True), w)


def test_unpacked_weight_is_refused():
    w = make_weight(16, 32, 32, "symmetric", 0).unpack()
    with pytest.raises(RuntimeError, match="pack"):
        qops.int4_gemm(torch.ones(1, 32), w)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    with torch.inference_mode(False), torch.no_grad():
        w = make_weight(24, 64, 32, kind, 0, act_order=True)
        x = random_activations(2, 3, 64, dtype=torch.bfloat16, seed=0)
        args = (x, w.packed, w.scales, w.zeros, w.perm, torch.zeros(24), 24, 32, KINDS.index(kind))
        torch.library.opcheck(torch.ops.qops.int4_gemm.default, args)
        out = {"out": torch.empty(2, 3, 24, dtype=torch.bfloat16)}
        torch.library.opcheck(torch.ops.qops.int4_gemm.out, args, out)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    w = make_weight(64, 64, 32, "offset", 0)

    def two(x):
        y = qops.int4_gemm(F.relu(qops.int4_gemm(x, w)), w)
        out = torch.empty_like(y)
        qops.int4_gemm(y + 1, w, out=out)
        return y + out

    compiled = torch.compile(two, fullgraph=True, backend=backend, dynamic=True)
    for m in (3, 5):
        x = random_activations(m, 64, dtype=torch.bfloat16, seed=m)
        assert_bitwise(compiled(x), two(x), f"M = {m}")


def test_oracle_sees_a_wrong_code():
    """The bitwise test can fail: one code off by one changes the result."""
    w = make_weight(16, 64, 32, "symmetric", 0)
    x = random_activations(1, 64, dtype=torch.float32, seed=0)
    wrong = w.canonical()["qweight"].clone()
    wrong[3, 7] ^= 1
    other = qops.Int4Weight.from_canonical(wrong, w.canonical()["scales"], kind="symmetric")
    with pytest.raises(AssertionError):
        assert_bitwise(qops.int4_gemm(x, other), by_contract(x, w))
    assert not np.array_equal(by_contract(x, other).numpy(), by_contract(x, w).numpy())
