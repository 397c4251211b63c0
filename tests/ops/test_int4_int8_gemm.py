"""int4_int8_gemm, and int4_gemm with activation="int8"."""

from __future__ import annotations

import itertools

import pytest
import torch

import qops
from qops.ops.int4_gemm import MAX_GROUP, MAX_K, int4_int8_gemm_exact, int4_int8_gemm_ref
from qops.testing import FLOAT_DTYPES, Guarded, assert_bitwise, assert_within, generator, random_activations
from tests.support.ops.contracts import int4_int8_gemm_exact as exact_of_codes
from tests.support.ops.contracts import nibbles
from tests.support.ops.random_weights import KINDS, random_int4

# (N, K, G): strips that are and are not full, one and more than a tile has; slices of 0, 1 and more units of lcm(64, G)
# columns, whose last one is whole or not.
SHAPES = (
    (24, 576, 64),
    (40, 1536, 128),
    (8, 11008, 128),
    (16, 72, -1),
    (104, 1032, -1),
    (136, 80, 16),
    (48, 672, 48),
    (72, 1056, 32),
    (24, 8, -1),
)
ROWS = (0, 1, 2, 3, 17, 50)  # tiles begin at 11
RULES = ("127", "compressed-tensors", "torchao")
SCALE, ZERO_POINT = torch.tensor(0.05), torch.tensor(-7, dtype=torch.int32)


def activations(m, k, seed):
    """q and scale: codes of the whole range, a row of each end, a scale that is negative."""
    rng = generator(seed + 100)
    q = torch.randint(-128, 128, (m, k), generator=rng, dtype=torch.int8)
    scale = torch.rand(m, generator=rng) * 0.1
    if m > 2:
        q[0], q[1], scale[2] = -128, 127, -scale[2]
    return q, scale


def by_contract(q, scale, w, bias=None, out_dtype=torch.bfloat16):
    c = w.canonical()
    args = (nibbles(c["qweight"]), c["scales"], c.get("zeros"), w.kind, c.get("perm"))
    return exact_of_codes(q, scale, *args, bias, out_dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_follow_the_contract(shape, kind):
    n, k, group_size = shape
    for seed, m in enumerate(ROWS):
        scale_dtype, out_dtype = FLOAT_DTYPES[seed % 3], FLOAT_DTYPES[seed // 2 % 3]
        _, w = random_int4(n, k, group_size, kind, scale_dtype=scale_dtype, act_order=seed % 2 == 0, seed=seed)
        q, scale = activations(m, k, seed)
        for bias in (None, torch.randn(n, generator=generator(seed)).to(FLOAT_DTYPES[-seed % 3])):
            got = qops.int4_int8_gemm(q, scale, w, bias, out_dtype=out_dtype)
            case = f"M = {m}, bias {bias is not None}"
            assert_bitwise(got, by_contract(q, scale, w, bias, out_dtype), case)
            assert_bitwise(int4_int8_gemm_exact(q, scale, w, bias, out_dtype), got, f"{case}, the reference")


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_are_packed_at_a_time(kind, threads):
    """256 are where there are tiles, whose blocks of rows and strips threads share in ranges."""
    for seed, (n, k, group_size) in enumerate(((136, 1536, 128), (200, 1056, 32), (72, 1032, -1))):
        threads(1 + 2 * (seed % 2))
        _, w = random_int4(n, k, group_size, kind, act_order=seed == 1, seed=seed)
        q, scale = activations(300, k, seed)
        got = qops.int4_int8_gemm(q, scale, w, out_dtype=torch.bfloat16)
        assert_bitwise(got, by_contract(q, scale, w), f"{n} x {k}, groups of {group_size}")


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_against_float64(kind):
    """A group costs two roundings of the total at most, after one of its sum and two of the offset."""
    for seed, (n, k, group_size) in enumerate(SHAPES):
        _, w = random_int4(n, k, group_size, kind, scale_dtype=torch.float32, seed=seed)
        q, scale = activations(17, k, seed)
        c = w.canonical()
        groups = c["scales"].shape[1]
        codes = nibbles(c["qweight"]).double().view(n, groups, -1)
        zeros, s = c.get("zeros"), c["scales"].double()[..., None]
        magnitude = (s * (codes - (zeros.double()[..., None] if kind == "zero_point" else 8))).abs()
        if kind in ("float_zero", "offset"):
            z = zeros.double()[..., None]
            magnitude = magnitude + (s * 8).abs() + (z if kind == "offset" else s * z).abs()
        sums = (q.double() * scale.double()[:, None]).abs() @ magnitude.view(n, k).T
        bound = (2 * (groups / 8 + 4) + 3 + 8 + 2) * 2.0**-24 * sums
        ref = int4_int8_gemm_ref(q, scale, w)
        assert_within(qops.int4_int8_gemm(q, scale, w, out_dtype=torch.float32), ref, bound, f"{n}x{k}")


def test_rows_do_not_depend_on_batch_position_or_threads(threads):
    for kind, group_size in (("symmetric", 64), ("zero_point", 32), ("offset", 192), ("float_zero", -1)):
        _, w = random_int4(200, 576, group_size, kind, act_order=kind == "offset")
        q, scale = activations(133, 576, 0)
        threads(1)
        together = qops.int4_int8_gemm(q, scale, w, out_dtype=torch.float32)
        for count in (2, 3):
            threads(count)
            for rows in (list(range(133)), [0], [5], [6, 5], [132, 1, 5], list(range(66)), list(range(132, -1, -1))):
                got = qops.int4_int8_gemm(q[rows], scale[rows], w, out_dtype=torch.float32)
                assert_bitwise(got, together[rows], f"{kind}, {count} threads, {rows[:4]}")


def test_one_scale_for_all_and_rows_that_lie_apart():
    _, w = random_int4(24, 64, 32, "symmetric")
    q, scale = activations(6, 64, 0)
    want = qops.int4_int8_gemm(q, scale[3].expand(6), w)
    assert_bitwise(qops.int4_int8_gemm(q, scale[3], w), want, "one scale")
    memory = torch.zeros(3, 2, 71, dtype=torch.int8)
    memory[..., 5:69] = q.view(3, 2, 64)
    far = memory[..., 5:69].transpose(0, 1)
    scales = torch.stack((scale, -scale), 1)[:, 0].view(3, 2).t()
    got = qops.int4_int8_gemm(far, scales, w)
    assert_bitwise(got, qops.int4_int8_gemm(q, scale, w).view(3, 2, 24).transpose(0, 1).contiguous())


def test_offsets_beyond_int32(tmp_path):
    stride = 2**30 + 64  # the third row starts behind byte 2^31; the file is sparse
    memory = torch.from_file(str(tmp_path / "q"), shared=True, size=2 * stride + 64, dtype=torch.int8)
    q, (values, scale) = memory.as_strided((3, 64), (stride, 1)), activations(3, 64, 0)
    q.copy_(values)
    _, w = random_int4(16, 64, 32, "offset")
    assert_bitwise(qops.int4_int8_gemm(q, scale, w), qops.int4_int8_gemm(values, scale, w))


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", (1, 20))
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_codes_in_the_largest_group(kind, m):
    """Sums of 16 * 128 a product, in a group of every length that their parts could overflow in."""
    for k in (MAX_GROUP // 8 * 8, 32768, 4096):
        codes = torch.tensor([0, 15, 0, 15, 8, 7, 0, 0], dtype=torch.uint8)
        zeros = torch.tensor([16, 0, 16, 0, 8, 7, 0, 16])[:, None]
        zeros = {"symmetric": None, "zero_point": zeros.byte()}.get(kind, 4.0 * zeros)
        qweight = (codes * 17)[:, None].repeat(1, k // 2)
        qweight[3:5, ::2] = 0xF0  # alternating signs
        w = qops.Int4Weight.from_canonical(qweight, torch.full((8, 1), 0.37), kind=kind, zeros=zeros)
        q = torch.tensor([-128, 127], dtype=torch.int8).repeat(m)[:m, None].repeat(1, k)
        scale = torch.full((m,), 0.01)
        got = qops.int4_int8_gemm(q, scale, w, out_dtype=torch.float32)
        assert_bitwise(got, by_contract(q, scale, w, out_dtype=torch.float32), f"K = {k}")


def test_a_sum_beyond_2_24_is_rounded_once():
    """To float32, before it is scaled: 3 times the sum, rounded once, is another number."""
    k = MAX_GROUP // 8 * 8
    codes, zeros = torch.zeros(8, k // 2, dtype=torch.uint8), torch.full((8, 1), 16, dtype=torch.uint8)
    codes[:, 0] = 15
    scales = torch.full((8, 1), 3.0)
    w = qops.Int4Weight.from_canonical(codes, scales, kind="zero_point", zeros=zeros, in_features=k)
    q = torch.full((1, k), -128, dtype=torch.int8)
    q[0, 0] = -119
    got = qops.int4_int8_gemm(q, torch.ones(1), w, out_dtype=torch.float32)
    total = -16 * q.long().sum() + 15 * q[0, 0].long()
    assert float((3 * total).float()) != float(total.float() * 3)
    assert_bitwise(got, (total.float() * 3).expand(1, 8).contiguous())


def test_a_bias_that_decides_a_tie():
    """3 (1 + 2^-23) and 3 (1 + 3 2^-23) lie in the middle of two float32: a bias of 2^-100 says which it is."""
    w = qops.Int4Weight.from_canonical(torch.full((8, 4), 0x99, dtype=torch.uint8), torch.ones(8, 1), kind="symmetric")
    q = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]] * 2, dtype=torch.int8)
    scale = 1 + torch.tensor([1.0, 3.0]) * 2.0**-23
    bias = torch.tensor([-(2.0**-100), 0.0, 2.0**-100, 0.0] * 2)
    want = 3 + torch.tensor([[1.0, 2.0, 2.0, 2.0], [4.0, 4.0, 5.0, 4.0]]).repeat(1, 2) * 2.0**-22
    for result in (qops.int4_int8_gemm, by_contract, int4_int8_gemm_exact):
        assert_bitwise(result(q, scale, w, bias, out_dtype=torch.float32), want, result.__name__)


def test_special_rows():
    """Zeros, NaN and infinity, as quantize_int8 gives them; nothing of a row reaches another one."""
    x = random_activations(6, 64, dtype=torch.bfloat16, seed=0)
    x[1], x[3, 5], x[4, 0] = 0, float("nan"), -float("inf")
    q, scale = qops.quantize_int8(x)
    assert scale[1] == 0 and scale[3:5].isnan().all()
    bias = torch.randn(24, generator=generator(0))
    for kind, b in itertools.product(KINDS, (None, bias)):
        _, w = random_int4(24, 64, 32, kind)
        y = qops.int4_int8_gemm(q, scale, w, b)
        assert y[3:5].isnan().all() and y[[0, 1, 2, 5]].isfinite().all()
        zeros = torch.zeros(24) if b is None else b
        assert torch.equal(y[1], zeros.bfloat16())
        for row in range(6):
            assert_bitwise(y[row : row + 1], qops.int4_int8_gemm(q[row : row + 1], scale[row : row + 1], w, b))


def test_scales_of_every_kind_go_through_the_float32_chain():
    special = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3e38, -1e-40, 1.0])
    q, _ = activations(8, 64, 0)
    tensors, _ = random_int4(24, 64, 32, "offset", scale_dtype=torch.float32)
    tensors["scales"][1:5, 0] = torch.tensor([1e-45, -3e38, -0.0, 1e38])
    w = qops.Int4Weight.from_canonical(**tensors, kind="offset")
    for dtype, bias in itertools.product(FLOAT_DTYPES, (None, torch.randn(24, generator=generator(0)))):
        got = qops.int4_int8_gemm(q, special, w, bias, out_dtype=dtype)
        assert_bitwise(got, by_contract(q, special, w, bias, dtype), f"{dtype}, bias {bias is not None}")
        assert_bitwise(int4_int8_gemm_exact(q, special, w, bias, dtype), got, f"{dtype}, the reference")


@pytest.mark.parametrize("m, n, k", ((0, 16, 32), (3, 0, 32), (2, 16, 0), (0, 0, 0)))
def test_empty(m, n, k):
    strips, bias = (n + 15) // 16, torch.arange(float(n))
    scales = torch.zeros(strips, 0 if k == 0 else 1, 16)
    q, packed = torch.zeros(m, k, dtype=torch.int8), torch.zeros(strips, 8 * k, dtype=torch.uint8)
    args = (q, torch.ones(m), packed, scales, None, torch.arange(k, dtype=torch.int32))
    y = torch.ops.qops.int4_int8_gemm(*args, bias, n, k, 0, torch.float32)
    assert_bitwise(y, bias.expand(m, n).contiguous(), "bias alone")
    y = torch.ops.qops.int4_int8_gemm(*args, None, n, k, 0, torch.float32)
    assert_bitwise(y, torch.zeros(m, n), "zeros")


# --- epilogues, out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("m", (1, 3, 35))
def test_epilogues_equal_the_chain(m, dtype):
    for seed, (kind, (n, k, g)) in enumerate(itertools.product(KINDS, ((16, 64, 32), (80, 144, 48), (96, 576, 64)))):
        _, w = random_int4(n, k, g, kind, act_order=seed % 2 == 0, seed=seed)
        q, scale = activations(m, k, seed)
        bias = torch.randn(n, generator=generator(seed)) if seed % 3 else None
        y = qops.int4_int8_gemm(q, scale, w, bias, out_dtype=dtype)
        residual = random_activations(m, n, dtype=dtype, seed=seed)
        got = qops.int4_int8_gemm(q, scale, w, bias, out_dtype=dtype, residual=residual)
        assert_bitwise(got, y + residual, f"residual, {w}")
        for zero in (None, ZERO_POINT):
            static = {"out_scale": SCALE, "out_zero_point": zero}
            got = qops.int4_int8_gemm(q, scale, w, bias, out_dtype=dtype, **static)
            assert_bitwise(got, qops.quantize_int8_static(y, SCALE, zero), f"out_scale, {w}")
        w.mix_gate_up()
        got = qops.int4_int8_gemm(q, scale, w, bias, out_dtype=dtype, silu_mul=True)
        assert_bitwise(got, qops.silu_mul(y), f"silu_mul, {w}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_out(dtype):
    for m, (n, k, g) in itertools.product((0, 1, 5, 33), ((24, 96, 48), (48, 128, 128))):
        _, w = random_int4(n, k, g, "zero_point")
        q, scale = activations(m, k, m)
        more = {"out_scale": SCALE}, {"residual": random_activations(m, n, dtype=dtype, seed=0)}, {}
        for extra in more:
            want = qops.int4_int8_gemm(q, scale, w, out_dtype=dtype, **extra)
            out = Guarded(torch.full_like(want, 77))
            given = {"out_dtype": dtype} if "out_scale" in extra else {}
            assert qops.int4_int8_gemm(q, scale, w, out=out.tensor, **given, **extra) is out.tensor
            assert_bitwise(out.tensor, want, f"{m}x{n}x{k} {list(extra)}")
            out.check()


def test_a_residual_may_be_the_output():
    _, w = random_int4(48, 64, 32, "symmetric")
    q, scale = activations(5, 64, 0)
    stream = random_activations(5, 48, dtype=torch.bfloat16, seed=1)
    want = qops.int4_int8_gemm(q, scale, w, residual=stream)
    qops.int4_int8_gemm(q, scale, w, residual=stream, out=stream)
    assert_bitwise(stream, want)


def arguments(device="cpu", **changes):
    _, w = random_int4(24, 64, 32, "offset", act_order=True)
    q, scale = activations(2, 64, 0)
    tensors = {"packed": w.packed, "scales": w.scales, "zeros": w.zeros, "perm": w.perm}
    values = {"q": q, "scale": scale, **tensors, "bias": torch.zeros(24), "out_features": 24, "group_size": 32}
    values |= {"kind": 3, "out_dtype": torch.bfloat16, **changes}
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in values.items()}


def wide(k, group_size):
    q = torch.zeros(2, 1, dtype=torch.int8).expand(2, k)
    packed, scales = torch.zeros(2, 8 * k, dtype=torch.uint8), torch.zeros(2, k // group_size, 16)
    none = {"zeros": None, "perm": None, "kind": 0}
    return {"q": q, "packed": packed, "scales": scales, "group_size": group_size, **none}


ERRORS = {
    "q dtype": ({"q": torch.zeros(2, 64)}, RuntimeError, "q must have dtype int8, got float32"),
    "q columns": ({"q": torch.zeros(2, 56).char()}, ValueError, "q must have last dimension K = 64, got 56"),
    "q strides": ({"q": torch.zeros(64, 2).char().t()}, ValueError, "q must have stride 1 in its last dim.*, got 2"),
    "scale dtype": ({"scale": torch.ones(2).half()}, RuntimeError, "scale must have dtype float32, got float16"),
    "scale": ({"scale": torch.ones(3)}, ValueError, r"scale must have shape \[\.\.\.\] = \[2\] or \[\], got \[3\]"),
    "out_dtype": ({"out_dtype": torch.int32}, RuntimeError, "out_dtype must be float32, float16 or bf.*, got int32"),
    "packed": ({"packed": torch.zeros(2, 512).char()}, RuntimeError, "packed must have dtype uint8, got int8"),
    "scales": ({"scales": torch.zeros(2, 1, 16)}, ValueError, r"scales must have shape .* = \[2, 2, 16\], got"),
    "zeros": ({"zeros": None}, ValueError, "zeros must be given for this kind, got None"),
    "kind": ({"kind": 4}, ValueError, r"kind must be 0 \(symmetric\), .*, got 4"),
    "perm": ({"perm": torch.arange(56).int()}, ValueError, r"perm must have shape \[K\] = \[64\], got \[56\]"),
    "out_features": ({"out_features": 20}, ValueError, "out_features must be a multiple of 8, got 20"),
    "group_size": ({"group_size": 40}, ValueError, "group_size must be K = 64 or a multiple of 16 .*, got 40"),
    "bias": ({"bias": torch.zeros(25)}, ValueError, r"bias must have shape \[N\] = \[24\], got \[25\]"),
    "K": (wide(MAX_K + 1, 128), ValueError, "q must have at most 1048575 columns, got 1048576"),
    "group": (wide(MAX_GROUP + 1, MAX_GROUP + 1), ValueError, "group_size must be at most 131071, got 131072"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_the_same_with_fake_tensors(case):
    changes, error, text = ERRORS[case]
    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.int4_int8_gemm: {text}") as caught:
            torch.ops.qops.int4_int8_gemm(**arguments(device, **changes))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_the_largest_k_of_small_groups():
    k = MAX_K // 128 * 128
    qweight = torch.randint(256, (8, k // 2), generator=generator(0), dtype=torch.uint8)
    w = qops.Int4Weight.from_canonical(qweight, torch.full((8, k // 128), 0.01), kind="symmetric")
    q, scale = activations(1, k, 0)
    got = qops.int4_int8_gemm(q, scale, w, out_dtype=torch.float32)
    assert_bitwise(got, by_contract(q, scale, w, out_dtype=torch.float32))


@pytest.mark.parametrize("index", (-1, 64, 2**31 - 1, -(2**31)))
def test_perm_out_of_range(index):
    args = arguments()
    args["perm"] = args["perm"].clone()
    args["perm"][63] = index
    out = torch.full((2, 24), 77, dtype=torch.bfloat16)
    text = rf"^qops\.int4_int8_gemm: perm must hold indices in 0 \.\. 63, got {index}$"
    with pytest.raises(ValueError, match=text):
        torch.ops.qops.int4_int8_gemm(**args)
    del args["out_dtype"]
    with pytest.raises(ValueError, match=text):
        torch.ops.qops.int4_int8_gemm.out(**args, out=out)
    assert (out == 77).all()


def test_out_must_not_overlap_an_input():
    args = arguments()
    del args["out_dtype"]
    args["scales"], args["bias"] = args["scales"].bfloat16(), args["bias"].bfloat16()
    for name in ("q", "scale", "packed", "scales", "zeros", "perm", "bias"):
        memory = torch.zeros(4096, dtype=torch.uint8)
        there = args[name].contiguous().view(-1).view(torch.uint8)
        inside = memory[1024 : 1024 + len(there)].view(args[name].dtype).view(args[name].shape)
        memory[1024 : 1024 + len(there)] = there
        before = memory.clone()
        out = memory[1024 - 94 : 1024 + 2].view(torch.bfloat16).view(2, 24)
        text = rf"^qops\.int4_int8_gemm: out must lie apart from {name} in memory, got overlapping tensors$"
        with pytest.raises(ValueError, match=text):
            torch.ops.qops.int4_int8_gemm.out(**{**args, name: inside}, out=out)
        assert_bitwise(memory, before, name)


# --- the compiler, and int4_gemm -------------------------------------------------------------------------------------


def test_opcheck():
    op = torch.ops.qops.int4_int8_gemm
    with torch.inference_mode(False), torch.no_grad():
        for kind in KINDS:
            _, w = random_int4(48, 64, 32, kind, act_order=kind == "offset")
            q, scale = activations(6, 64, 0)
            args = (q.view(2, 3, 64), scale.view(2, 3), w.packed, w.scales, w.zeros, w.perm, torch.zeros(48), 48, 32)
            args = (*args, KINDS.index(kind))
            y = torch.empty(2, 3, 48, dtype=torch.bfloat16)
            torch.library.opcheck(op.default, (*args, y.dtype))
            torch.library.opcheck(op.out, args, {"out": y.clone()})
            for extra in ((torch.ones_like(y), False, None, None), (None, False, SCALE.clone(), ZERO_POINT.clone())):
                out = torch.empty_like(y, dtype=y.dtype if extra[2] is None else torch.int8)
                torch.library.opcheck(op.fused, (*args, y.dtype, *extra))
                torch.library.opcheck(op.fused_out, (*args, y.dtype, *extra), {"out": out})


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    _, w = random_int4(64, 64, 32, "offset", act_order=True)

    def two(x):
        y = qops.int4_gemm(torch.relu(qops.int4_gemm(x, w, activation="int8")), w, residual=x, activation="int8")
        return y + qops.int4_int8_gemm(*qops.quantize_int8(y), w)

    compiled = torch.compile(two, fullgraph=True, backend=backend, dynamic=True)
    for m in (3, 5):
        x = random_activations(m, 64, dtype=torch.bfloat16, seed=m)
        assert_bitwise(compiled(x), two(x), f"M = {m}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_int4_gemm_of_int8_activations(dtype, rule):
    for kind, m in itertools.product(KINDS, (0, 1, 17)):
        _, w = random_int4(48, 96, 48, kind, act_order=m == 17)
        x = random_activations(m, 96, dtype=dtype, seed=m)
        bias, residual = torch.randn(48, generator=generator(m)), random_activations(m, 48, dtype=dtype, seed=1)
        q, scale = qops.quantize_int8(x, rule)
        for more in ({}, {"bias": bias}, {"residual": residual}, {"out_scale": SCALE, "out_zero_point": ZERO_POINT}):
            want = qops.int4_int8_gemm(q, scale, w, out_dtype=dtype, **more)
            assert_bitwise(qops.int4_gemm(x, w, activation="int8", rule=rule, **more), want, f"{kind} {list(more)}")
            out = torch.empty_like(want)
            assert qops.int4_gemm(x, w, activation="int8", rule=rule, out=out, **more) is out
            assert_bitwise(out, want, f"out, {kind} {list(more)}")
        w.mix_gate_up()
        want = qops.int4_int8_gemm(q, scale, w, out_dtype=dtype, silu_mul=True)
        assert_bitwise(qops.int4_gemm(x, w, activation="int8", rule=rule, silu_mul=True), want, kind)


def test_int8_activations_are_asked_for():
    _, w = random_int4(16, 32, 32, "symmetric")
    x = torch.ones(1, 32)
    with pytest.raises(ValueError, match=r"int4_gemm: activation must be None or \"int8\", got 'int4'"):
        qops.int4_gemm(x, w, activation="int4")
    with pytest.raises(ValueError, match=r'int4_gemm: rule must be "127" without activation="int8", got "torchao"'):
        qops.int4_gemm(x, w, rule="torchao")
    with pytest.raises(ValueError, match=r'int4_int8_gemm: rule must be "127", .* got "128"'):
        qops.int4_gemm(x, w, activation="int8", rule="128")


def test_grad_is_refused():
    _, w = random_int4(16, 32, 32, "symmetric")
    q, scale = activations(1, 32, 0)
    with torch.inference_mode(False), torch.enable_grad():
        with pytest.raises(RuntimeError, match=r"qops\.int4_int8_gemm: scale must not require grad"):
            qops.int4_int8_gemm(q, scale.clone().requires_grad_(), w)
        with pytest.raises(RuntimeError, match=r"qops\.int4_gemm: x must not require grad"):
            qops.int4_gemm(torch.ones(1, 32, requires_grad=True), w, activation="int8")


def test_weights_of_another_kind_are_refused():
    q, scale = activations(1, 16, 0)
    with pytest.raises(TypeError, match=r"int4_int8_gemm: weight must be a qops\.Int4Weight, got Int8Weight"):
        qops.int4_int8_gemm(q, scale, qops.Int8Weight.quantize(torch.eye(16)))
    _, w = random_int4(16, 16, 16, "symmetric")
    with pytest.raises(ValueError, match=r"int4_int8_gemm: silu_mul must be False for a weight with mixed_gate_up"):
        qops.int4_int8_gemm(q, scale, w, silu_mul=True)
