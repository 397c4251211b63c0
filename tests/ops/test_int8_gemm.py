from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import qops
from qops.ops.int8_gemm import MAX_K, MAX_K_WITH_ZERO_POINT, OUT_DTYPES, int8_gemm_ref
from qops.testing import FLOAT_DTYPES, Guarded, assert_bitwise, assert_within, generator, int8_gemm_bound
from tests.support.ops.int8_gemm_oracle import activations, by_contract, codes, make_weight

# (N, K): strips that are and are not full; one to many strips, in every remainder of a tile's width; K below, at and
# beyond the 64 columns that are packed at a time, odd multiples of 8.
SHAPES = ((8, 8), (16, 64), (24, 72), (40, 200), (72, 128), (104, 56), (120, 16), (136, 1032), (200, 320), (576, 40))
ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 17, 25, 64, 65)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_follow_the_contract(shape, out_dtype):
    n, k = shape
    for seed, m in enumerate(ROWS):
        w = make_weight(n, k, seed, FLOAT_DTYPES[seed % 3])
        q, scale, zero_point = activations(m, k, seed)
        bias = torch.randn(n, generator=generator(seed)).to(FLOAT_DTYPES[seed // 2 % 3])
        biases = (None,) if out_dtype == torch.int32 else (None, bias)
        for b, z in itertools.product(biases, (None, zero_point)):
            got = qops.int8_gemm(q, scale, w, b, zero_point=z, out_dtype=out_dtype)
            want = by_contract(q, scale, w, b, zero_point=z, out_dtype=out_dtype)
            assert_bitwise(got, want, f"M = {m}, bias {b is not None}, zero_point {z is not None}")


def test_default_output_is_bfloat16():
    w, (q, scale, _) = make_weight(16, 32, 0), activations(3, 32, 0)
    assert_bitwise(qops.int8_gemm(q, scale, w), by_contract(q, scale, w, out_dtype=torch.bfloat16))


@pytest.mark.parametrize("asymmetric", (False, True), ids=("symmetric", "asymmetric"))
def test_extreme_codes_at_the_largest_k(asymmetric):
    """Every sum at or next to the ends of int32, and on the way there far beyond them in the unsigned operand."""
    k = (MAX_K_WITH_ZERO_POINT if asymmetric else MAX_K) // 8 * 8
    ends = torch.tensor([-128, 127, -127, 1], dtype=torch.int8)
    weight = ends.repeat(2)[:, None].repeat(1, k)
    weight[7, ::2] = 127  # alternating signs
    w = qops.Int8Weight.from_canonical(weight, torch.tensor(1.0))
    q = ends.repeat_interleave(2)[:, None].repeat(1, k)
    zero_point = torch.tensor([127, -128] * 4, dtype=torch.int32) if asymmetric else None
    one = torch.tensor(1.0)
    x = q.long() if zero_point is None else q.long() - zero_point[:, None]
    exact = x @ weight.long().T
    assert exact.abs().max() > 2**31 - (1 << 20) and exact.abs().max() <= 2**31
    assert exact.max() < 2**31
    for m in (1, 8):
        z = None if zero_point is None else zero_point[:m]
        got = qops.int8_gemm(q[:m], one, w, zero_point=z, out_dtype=torch.int32)
        assert_bitwise(got, exact[:m].int(), f"integers, M = {m}")
        for dtype in FLOAT_DTYPES:
            got = qops.int8_gemm(q[:m], one, w, zero_point=z, out_dtype=dtype)
            assert_bitwise(got, exact[:m].int().float().to(dtype), f"{dtype}, M = {m}")


def test_zero_points_of_any_size_wrap_around():
    w, (q, scale, _) = make_weight(24, 72, 0), activations(5, 72, 0)
    zero_point = torch.tensor([2**31 - 1, -(2**31), 2**24, -129, 1 << 20], dtype=torch.int32)
    for dtype in OUT_DTYPES:
        got = qops.int8_gemm(q, scale, w, zero_point=zero_point, out_dtype=dtype)
        assert_bitwise(got, by_contract(q, scale, w, zero_point=zero_point, out_dtype=dtype), str(dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("asymmetric", (False, True), ids=("symmetric", "asymmetric"))
def test_accuracy_against_float64(dtype, asymmetric):
    for seed, (n, k) in enumerate(SHAPES):
        w, (q, scale, zero_point) = make_weight(n, k, seed), activations(17, k, seed)
        z = zero_point if asymmetric else None
        bias = torch.randn(n, generator=generator(seed))
        ref = int8_gemm_ref(q, scale, w, bias, zero_point=z)
        got = qops.int8_gemm(q, scale, w, bias, zero_point=z, out_dtype=dtype)
        assert_within(got, ref, int8_gemm_bound(q, scale, w, bias, zero_point=z), f"{n}x{k}")


def test_integers_agree_with_torch():
    w, (q, scale, _) = make_weight(72, 128, 0), activations(33, 128, 0)
    want = torch._int_mm(q, w.canonical()["qweight"].T)
    assert_bitwise(qops.int8_gemm(q, scale, w, out_dtype=torch.int32), want)


def test_quantised_chain_is_close_to_the_float_product():
    x = torch.randn(9, 256, generator=generator(0))
    weight = torch.randn(64, 256, generator=generator(1))
    scale = x.abs().amax(-1) / 127
    q = (x / scale[:, None]).round().to(torch.int8)
    low, high = x.aminmax(dim=-1)
    step = (high - low) / 255
    zero_point = (-128 - low / step).round().int()
    shifted = (x / step[:, None] + zero_point[:, None]).round().clamp(-128, 127).to(torch.int8)
    w = qops.Int8Weight.quantize(weight)
    exact = x.double() @ weight.double().T
    for got in (
        qops.int8_gemm(q, scale, w, out_dtype=torch.float32),
        qops.int8_gemm(shifted, step, w, zero_point=zero_point, out_dtype=torch.float32),
    ):
        assert float((got - exact).norm() / exact.norm()) < 0.02


# --- what must not matter --------------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_batch_position_or_threads(threads):
    w = make_weight(200, 576, 0)
    q, scale, zero_point = activations(67, 576, 0)

    def product(rows):
        return qops.int8_gemm(q[rows], scale[rows], w, zero_point=zero_point[rows], out_dtype=torch.float32)

    threads(1)
    together = product(slice(None))
    for count in (2, 3, 8):
        threads(count)
        assert_bitwise(product(slice(None)), together, f"{count} threads")
        for rows in ([0], [5], [6, 5], [66, 1, 5], list(range(66, -1, -1))):
            assert_bitwise(product(rows), together[rows], str(rows[:4]))


@pytest.mark.parametrize("m", (200, 1023, 1024, 1025, 2100))
def test_many_rows(m, threads):
    """Beyond the rows that are packed at a time, with too few strips to occupy the threads."""
    w, (q, scale, zero_point) = make_weight(8, 64, 0), activations(m, 64, 0)
    want = by_contract(q, scale, w, zero_point=zero_point, out_dtype=torch.float32)
    for count in (1, 2, 5):
        threads(count)
        got = qops.int8_gemm(q, scale, w, zero_point=zero_point, out_dtype=torch.float32)
        assert_bitwise(got, want, f"{count} threads")


def test_threads_of_the_caller_share_a_weight():
    w, (q, scale, zero_point) = make_weight(136, 320, 0), activations(9, 320, 0)
    want = by_contract(q, scale, w, zero_point=zero_point)

    def work(_):
        with torch.inference_mode():
            return [qops.int8_gemm(q, scale, w, zero_point=zero_point) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for got in itertools.chain.from_iterable(pool.map(work, range(8))):
            assert_bitwise(got, want)


def test_one_scale_for_all():
    w, (q, scale, zero_point) = make_weight(24, 72, 0), activations(7, 72, 0)
    one_scale, one_zero = scale[3], zero_point[3]
    for s, z in itertools.product((one_scale, one_scale.expand(7)), (one_zero, one_zero.expand(7))):
        got = qops.int8_gemm(q, s, w, zero_point=z, out_dtype=torch.float32)
        want = by_contract(q, one_scale.repeat(7), w, zero_point=one_zero.repeat(7), out_dtype=torch.float32)
        assert_bitwise(got, want, f"scale {list(s.shape)}, zero_point {list(z.shape)}")


def test_one_weight_scale_for_all():
    q_w, (q, scale, _) = codes(40, 72, seed=0), activations(3, 72, 0)
    for dtype in FLOAT_DTYPES:
        one = torch.tensor(0.013, dtype=dtype)
        w = qops.Int8Weight.from_canonical(q_w, one)
        rows = qops.Int8Weight.from_canonical(q_w, one.repeat(40, 1))
        assert w.scale_dtype == dtype and w.canonical()["scales"].shape == (40, 1)
        assert_bitwise(qops.int8_gemm(q, scale, w), qops.int8_gemm(q, scale, rows), str(dtype))
    assert qops.Int8Weight.from_canonical(torch.zeros(8, 0, dtype=torch.int8), one).canonical()["scales"].shape == (
        8,
        0,
    )


def test_strides_and_leading_dimensions():
    w = make_weight(24, 64, 0)
    q = codes(2, 5, 3, 64, seed=1)
    rng = generator(2)
    scale = torch.rand(2, 5, 3, generator=rng)
    zero_point = torch.randint(-128, 128, (2, 5, 3), generator=rng, dtype=torch.int32)
    flat = by_contract(q.reshape(-1, 64), scale, w, zero_point=zero_point).view(2, 5, 3, 24)
    wide_scale = torch.stack((scale, scale + 1), -1)[..., 0]
    wide_zero = torch.stack((zero_point, zero_point + 1), 1)[:, 0]
    shifted = torch.zeros(q.numel() + 3, dtype=torch.int8)[3:].view(q.shape)
    shifted.copy_(q)
    far = torch.zeros(2, 5, 3, 71, dtype=torch.int8)[..., 5:69]
    far.copy_(q)
    one = (slice(None), slice(None), slice(0, 1))
    for name, args, want in (
        ("leading dimensions", (q, scale, zero_point), flat),
        ("rows apart", (far, scale, zero_point), flat),
        ("odd address", (shifted, scale, zero_point), flat),
        ("strided scales", (q, wide_scale, wide_zero), flat),
        ("transposed", tuple(t.transpose(0, 2) for t in (q, scale, zero_point)), flat.transpose(0, 2)),
        ("sliced", tuple(t[:, 1:4] for t in (q, scale, zero_point)), flat[:, 1:4]),
        (
            "expanded",
            (q[one].expand(-1, -1, 3, -1), scale[one].expand(-1, -1, 3), zero_point[one].expand(-1, -1, 3)),
            flat[one].expand(-1, -1, 3, -1),
        ),
        ("vector", (q[0, 0, 0], scale[0, 0, 0], zero_point[0, 0, 0]), flat[0, 0, 0]),
    ):
        got = qops.int8_gemm(args[0], args[1], w, zero_point=args[2])
        assert got.is_contiguous(), name
        assert_bitwise(got, want.contiguous(), name)


def test_offsets_beyond_int32(tmp_path):
    stride = 2**30 + 64  # the third row starts behind byte 2^31; the file is sparse
    memory = torch.from_file(str(tmp_path / "q"), shared=True, size=2 * stride + 64, dtype=torch.int8)
    q = memory.as_strided((3, 64), (stride, 1))
    values, scale, _ = activations(3, 64, 0)
    q.copy_(values)
    w = make_weight(16, 64, 0)
    assert_bitwise(qops.int8_gemm(q, scale, w), qops.int8_gemm(values, scale, w))


# --- values ----------------------------------------------------------------------------------------------------------


def test_special_scales():
    """NaN, infinities, zeros and signs go through the float32 chain; a row's scale touches no other row."""
    w, (q, scale, _) = make_weight(24, 72, 0), activations(12, 72, 0)
    clean = qops.int8_gemm(q, scale, w, out_dtype=torch.float32)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3e38, -1e-40])
    scale[2:10] = special
    q[10] = 0
    scale[11] = -scale[11]
    bias = torch.randn(24, generator=generator(0))
    bias[3] = float("nan")
    for dtype, b in itertools.product(FLOAT_DTYPES, (None, bias)):
        got = qops.int8_gemm(q, scale, w, b, out_dtype=dtype)
        assert_bitwise(got, by_contract(q, scale, w, b, out_dtype=dtype), f"{dtype}, bias {b is not None}")
    got = qops.int8_gemm(q, scale, w, out_dtype=torch.float32)
    assert got[2].isnan().all()
    assert_bitwise(got[:2], clean[:2], "rows beside special rows")
    assert_bitwise(got[11], -clean[11], "negative scale")


def test_zero_keeps_its_sign_without_a_bias():
    w = qops.Int8Weight.from_canonical(torch.ones(8, 8, dtype=torch.int8), torch.tensor(1.0))
    q, scale = torch.zeros(1, 8, dtype=torch.int8), torch.tensor([-1.0])
    assert qops.int8_gemm(q, scale, w, out_dtype=torch.float32).signbit().all()
    assert not qops.int8_gemm(q, scale, w, torch.zeros(8), out_dtype=torch.float32).signbit().any()


def test_subnormals_are_not_flushed_and_float16_overflows_to_infinity():
    w = qops.Int8Weight.from_canonical(torch.ones(8, 8, dtype=torch.int8), torch.tensor(1.0))
    q = torch.ones(3, 8, dtype=torch.int8)
    tiny = torch.tensor([2.0**-140, 2.0**-129, 2.0**-152])
    got = qops.int8_gemm(q, tiny, w, out_dtype=torch.float32)
    assert_bitwise(got, (tiny * 8)[:, None].expand(3, 8).contiguous(), "subnormal float32")
    got = qops.int8_gemm(q, tiny, w, out_dtype=torch.bfloat16)
    assert_bitwise(got, (tiny * 8).bfloat16()[:, None].expand(3, 8).contiguous(), "subnormal bfloat16")
    large = torch.tensor([8189.0, 8190.0, 2.0**-27])  # 65512 rounds to 65504; 65520 is the first that overflows
    got = qops.int8_gemm(q, large, w, out_dtype=torch.float16)
    assert got[:, 0].tolist() == [65504.0, float("inf"), 2.0**-24]


def test_one_rounding_of_scale_and_bias():
    """fma(s, t, b) where s * t alone would lose the bits that are left when b cancels the rest."""
    w = qops.Int8Weight.from_canonical(torch.full((8, 8), 127, dtype=torch.int8), torch.tensor(1.0))
    q, scale = torch.full((1, 8), 127, dtype=torch.int8), torch.tensor([1 + 2.0**-23])
    bias = torch.full((8,), -float(8 * 127 * 127))
    got = qops.int8_gemm(q, scale, w, bias, out_dtype=torch.float32)
    assert got[0, 0].item() == 8 * 127 * 127 * 2.0**-23


def test_a_bias_that_decides_a_tie():
    """3 (1 + 2^-23) and 3 (1 + 3 2^-23) lie in the middle of two float32: a bias of 2^-100 says which it is."""
    w = qops.Int8Weight.from_canonical(torch.ones(8, 8, dtype=torch.int8), torch.tensor(1.0))
    q = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]] * 2, dtype=torch.int8)
    scale = 1 + torch.tensor([1.0, 3.0]) * 2.0**-23
    bias = torch.tensor([-(2.0**-100), 0.0, 2.0**-100, 0.0] * 2)
    want = 3 + torch.tensor([[1.0, 2.0, 2.0, 2.0], [4.0, 4.0, 5.0, 4.0]]).repeat(1, 2) * 2.0**-22
    for result in (qops.int8_gemm, by_contract):
        assert_bitwise(result(q, scale, w, bias, out_dtype=torch.float32), want, result.__name__)


@pytest.mark.parametrize("m, n, k", ((0, 16, 32), (3, 0, 32), (0, 0, 0), (2, 16, 0)))
@pytest.mark.parametrize("asymmetric", (False, True), ids=("symmetric", "asymmetric"))
def test_empty(m, n, k, asymmetric):
    w = qops.Int8Weight.from_canonical(torch.zeros(n, k, dtype=torch.int8), torch.ones(n, min(k, 1)))
    q, bias = torch.zeros(m, k, dtype=torch.int8), torch.arange(float(n))
    zero_point = torch.ones(m, dtype=torch.int32) if asymmetric else None
    got = qops.int8_gemm(q, torch.ones(m), w, bias, zero_point=zero_point, out_dtype=torch.float32)
    assert_bitwise(got, bias.expand(m, n).contiguous(), "bias alone")
    got = qops.int8_gemm(q, torch.ones(m), w, zero_point=zero_point, out_dtype=torch.int32)
    assert_bitwise(got, torch.zeros(m, n, dtype=torch.int32), "zeros")
    assert qops.int8_gemm(q.view(1, m, k)[:0], torch.ones(0, m), w).shape == (0, m, n)


# --- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
def test_out(out_dtype):
    for (n, k), m in itertools.product(((24, 72), (8, 8), (136, 200)), (0, 1, 5, 18)):
        w, (q, scale, zero_point) = make_weight(n, k, m), activations(m, k, m)
        bias = None if out_dtype == torch.int32 else torch.randn(n, generator=generator(m))
        out = Guarded(torch.full((m, n), 77, dtype=out_dtype))
        assert qops.int8_gemm(q, scale, w, bias, zero_point=zero_point, out=out.tensor) is out.tensor
        out.check()
        want = by_contract(q, scale, w, bias, zero_point=zero_point, out_dtype=out_dtype)
        assert_bitwise(out.tensor, want, f"{m}x{n}")


def test_out_must_not_overlap_an_input():
    """The same storage is fine, the same bytes are not; nothing is written before the check."""
    n, k, m = 64, 64, 2
    w, (q, _, _) = make_weight(n, k, 0), activations(m, k, 0)
    memory = torch.zeros(4096, dtype=torch.uint8)

    def place(at, like):
        part = memory[at : at + like.nbytes].view(like.dtype).view(like.shape)
        part.copy_(like)
        return part

    inputs = {
        "q": (0, q),
        "scale": (128, torch.ones(m)),
        "zero_point": (192, torch.ones(m, dtype=torch.int32)),
        "w_scale": (256, w.scales),
        "bias": (768, torch.ones(n)),
    }
    placed = {name: place(at, like) for name, (at, like) in inputs.items()}
    order = ("q", "scale", "zero_point", "packed", "w_scale", "bias")
    for name in ("q", "scale", "zero_point", "w_scale", "bias"):
        args = [w.packed if arg == "packed" else placed[arg] if arg == name else inputs[arg][1] for arg in order]
        at, like = inputs[name]
        before = memory.clone()
        for start in {max(0, at - 4 * m * n + 4), at, at + like.nbytes - 4}:
            out = memory[start : start + 4 * m * n].view(torch.float32).view(m, n)
            with pytest.raises(ValueError, match=f"out must lie apart from {name} in memory, got overlapping tensors"):
                torch.ops.qops.int8_gemm.out(*args, n, out=out)
        assert torch.equal(memory, before)
        out = memory[2048 : 2048 + 4 * m * n].view(torch.float32).view(m, n)
        torch.ops.qops.int8_gemm.out(*args, n, out=out)
    packed_as_out = w.packed.view(-1)[: 4 * m * n].view(torch.float32).view(m, n)
    args = [w.packed if arg == "packed" else inputs[arg][1] for arg in order]
    with pytest.raises(ValueError, match="out must lie apart from packed"):
        torch.ops.qops.int8_gemm.out(*args, n, out=packed_as_out)


# --- errors ----------------------------------------------------------------------------------------------------------


def arguments(device="cpu", **changes):
    w = make_weight(24, 64, 0)
    values = {
        "q": torch.zeros(2, 64, dtype=torch.int8),
        "scale": torch.ones(2),
        "zero_point": torch.zeros(2, dtype=torch.int32),
        "packed": w.packed,
        "w_scale": w.scales,
        "bias": torch.zeros(24),
        "out_features": 24,
        "out_dtype": torch.bfloat16,
        **changes,
    }
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in values.items()}


def wide(k: int, **changes):
    """Changes that make K columns of two rows."""
    return {
        "q": torch.zeros(2, k, dtype=torch.int8),
        "packed": torch.zeros(1, 16 * k, dtype=torch.int8),
        "w_scale": torch.ones(1, 1, 16),
        "bias": None,
        "out_features": 8,
        **changes,
    }


Q = torch.zeros(2, 64, dtype=torch.int8)
ERRORS = {
    "q dtype": ({"q": torch.zeros(2, 64)}, RuntimeError, "q must have dtype int8, got float32"),
    "q unsigned": ({"q": Q.byte()}, RuntimeError, "q must have dtype int8, got uint8"),
    "q scalar": ({"q": Q[0, 0]}, ValueError, "q must have at least 1 dimension, got 0"),
    "q columns": ({"q": Q[:, :56]}, ValueError, "q must have last dimension K = 64, got 56"),
    "q stride": ({"q": torch.zeros(64, 2).char().t()}, ValueError, "q must have stride 1 in its last dimension, got 2"),
    "scale dtype": ({"scale": torch.ones(2).bfloat16()}, RuntimeError, "scale must have dtype float32, got bfloat16"),
    "scale shape": ({"scale": torch.ones(1)}, ValueError, r"scale must have shape \[...\] = \[2\] or \[\], got \[1\]"),
    "scale column": ({"scale": torch.ones(2, 1)}, ValueError, r"scale must have shape .* got \[2, 1\]"),
    "zero_point dtype": (
        {"zero_point": torch.zeros(2).char()},
        RuntimeError,
        "zero_point must have dtype int32, got int8",
    ),
    "zero_point shape": (
        {"zero_point": torch.zeros(3).int()},
        ValueError,
        r"zero_point must have shape \[...\] = \[2\] or \[\], got \[3\]",
    ),
    "packed dtype": ({"packed": torch.zeros(2, 1024).byte()}, RuntimeError, "packed must have dtype int8, got uint8"),
    "packed rank": ({"packed": torch.zeros(2, 8, 128).char()}, ValueError, "packed must have 2 dimensions, got 3"),
    "packed width": ({"packed": torch.zeros(2, 1000).char()}, ValueError, "packed must hold .* got 1000"),
    "packed strips": ({"out_features": 40}, ValueError, r"packed must have shape \[S, 16 K\] = \[3, 1024\], got"),
    "packed strides": (
        {"packed": torch.zeros(1024, 2).char().t()},
        ValueError,
        r"packed must be contiguous, got strides \[1, 2\]",
    ),
    "w_scale dtype": (
        {"w_scale": torch.ones(2, 1, 16).double()},
        RuntimeError,
        "w_scale must have dtype .* got float64",
    ),
    "groups": (
        {"w_scale": torch.ones(2, 2, 16)},
        ValueError,
        r"w_scale must have shape .* = \[2, 1, 16\], got \[2, 2,",
    ),
    "w_scale strides": (
        {"w_scale": torch.ones(16, 1, 2).permute(2, 1, 0)},
        ValueError,
        r"w_scale must be contiguous, got strides \[1, 2, 2\]",
    ),
    "out_features": ({"out_features": 20}, ValueError, "out_features must be a multiple of 8, got 20"),
    "negative": ({"out_features": -8}, ValueError, "out_features must be a multiple of 8, got -8"),
    "out_dtype": (
        {"out_dtype": torch.float64},
        RuntimeError,
        "out_dtype must be float32, float16, bfloat16 or int32, got float64",
    ),
    "bias": ({"bias": torch.zeros(25)}, ValueError, r"bias must have shape \[N\] = \[24\], got \[25\]"),
    "bias dtype": ({"bias": torch.zeros(24).int()}, RuntimeError, "bias must have dtype float32, .* got int32"),
    "bias of integers": (
        {"out_dtype": torch.int32},
        ValueError,
        "bias must be None where the output is int32, got a tensor",
    ),
    "K": (wide(MAX_K + 1, zero_point=None), ValueError, "q must have at most 131071 columns, got 131072"),
    "K with zero_point": (wide(65800), ValueError, "q must have at most 65793 columns with a zero_point, got 65800"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_the_same_with_fake_tensors(case):
    changes, error, text = ERRORS[case]
    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.int8_gemm: {text}") as caught:
            torch.ops.qops.int8_gemm(**arguments(device, **changes))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


OUT = torch.zeros(2, 24)
OUT_ERRORS = {
    "dtype": (OUT.double(), RuntimeError, "out must have dtype float32, float16, bfloat16 or int32, got float64"),
    "shape": (OUT[:1], ValueError, r"out must have shape \[..., N\] = \[2, 24\], got \[1, 24\]"),
    "rank": (OUT[None], ValueError, r"out must have shape \[..., N\] = \[2, 24\], got \[1, 2, 24\]"),
    "strides": (OUT.t().contiguous().t(), ValueError, r"out must be contiguous, got strides \[1, 2\]"),
    "integers": (OUT.int(), ValueError, "bias must be None where the output is int32, got a tensor"),
}


@pytest.mark.parametrize("case", OUT_ERRORS)
def test_errors_of_out_are_the_same_with_fake_tensors(case):
    out, error, text = OUT_ERRORS[case]
    messages = []
    for device in ("cpu", "meta"):
        args = arguments(device)
        del args["out_dtype"]
        with pytest.raises(error, match=rf"^qops\.int8_gemm: {text}") as caught:
            torch.ops.qops.int8_gemm.out(**args, out=out.to(device))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_groups_are_refused():
    w = qops.Int8Weight.from_canonical(codes(16, 64, seed=0), torch.ones(16, 2))
    text = r"^qops\.int8_gemm: weight must have one scale per row \(group_size = K = 64\), got group_size = 32$"
    with pytest.raises(ValueError, match=text):
        qops.int8_gemm(Q, torch.ones(2), w)


def test_grad_is_refused():
    w = make_weight(16, 64, 0)
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.ones(2, requires_grad=True)
        for args in ((Q, grad, w), (Q, torch.ones(2), w, torch.ones(16, requires_grad=True))):
            with pytest.raises(RuntimeError, match=r"qops\.int8_gemm: \w+ must not require grad"):
                qops.int8_gemm(*args)


def test_unpacked_weight_is_refused():
    w = make_weight(16, 64, 0).unpack()
    with pytest.raises(RuntimeError, match="pack"):
        qops.int8_gemm(Q, torch.ones(2), w)


# --- tracing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asymmetric", (False, True), ids=("symmetric", "asymmetric"))
def test_opcheck(asymmetric):
    with torch.inference_mode(False), torch.no_grad():
        w = make_weight(24, 64, 0)
        q, scale = codes(2, 3, 64, seed=0), torch.rand(2, 3)
        zero_point = torch.tensor(3, dtype=torch.int32) if asymmetric else None
        args = (q, scale, zero_point, w.packed, w.scales, torch.zeros(24), 24)
        torch.library.opcheck(torch.ops.qops.int8_gemm.default, (*args, torch.float16))
        torch.library.opcheck(torch.ops.qops.int8_gemm.out, args, {"out": torch.zeros(2, 3, 24)})


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    w = make_weight(64, 64, 0)

    def two(q, scale, zero_point):
        y = qops.int8_gemm(q, scale, w, zero_point=zero_point, out_dtype=torch.float32)
        again = (y * 10).clamp(-127, 127).round().to(torch.int8)
        out = torch.empty(q.shape[0], 64)
        torch.ops.qops.int8_gemm.out(again, scale, None, w.packed, w.scales, None, 64, out=out)
        return out + 1

    compiled = torch.compile(two, fullgraph=True, backend=backend, dynamic=True)
    for m in (3, 5):
        args = activations(m, 64, m)
        assert_bitwise(compiled(*args), two(*args), f"M = {m}")


def test_oracle_sees_a_wrong_code():
    """The bitwise test can fail: one code off by one changes the result."""
    w, (q, scale, _) = make_weight(16, 64, 0), activations(1, 64, 0)
    wrong = w.canonical()["qweight"].clone()
    wrong[3, 7] ^= 1
    other = qops.Int8Weight.from_canonical(wrong, w.canonical()["scales"])
    with pytest.raises(AssertionError):
        assert_bitwise(
            qops.int8_gemm(q, scale, other, out_dtype=torch.float32), by_contract(q, scale, w, out_dtype=torch.float32)
        )
