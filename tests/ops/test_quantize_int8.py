from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import qops
from qops.ops.quantize_int8 import quantize_int8_asym_ref, quantize_int8_ref, quantize_int8_static_ref
from qops.testing import FLOAT_DTYPES, Guarded, assert_bitwise, generator, random_activations, strided_rows
from tests.support.formats.checkpoints import checkpoint
from tests.support.ops import quantize_oracles as oracles

RULES = ("127", "compressed-tensors", "torchao")
ASYM_RULES, STATIC_RULES = ("255", "compressed-tensors"), ("torchao", "compressed-tensors")
K_SIZES = (1, 2, 7, 15, 16, 17, 31, 33, 64, 576, 4097)
NAN, INF = float("nan"), float("inf")
HUGE_RANGE = torch.tensor([[3e38, -3e38, 1.0, 0.0], [3e38, 3e38, 1.0, 0.0]])
BARELY = torch.tensor([[3.7e-37], [3.75e-37], [7.4e-37], [7.6e-37], [1e-45], [0.0]])  # around the smallest factors


def assert_same(got, want, what=""):
    for a, b, name in zip(got, want, ("q", "scale", "zero point"), strict=False):
        assert_bitwise(a, b, f"{what} {name}")
    assert len(got) == len(want)


def rows_of(dtype, k, seed):
    """Random rows, rows next to ties and the corners, all of length k."""
    corners = oracles.special_rows(dtype)
    corners = corners.repeat(1, k // 4 + 1)[:, :k]
    return torch.cat(
        (
            random_activations(3, k, dtype=dtype, seed=seed),
            oracles.near_ties(3, k, dtype, seed),
            oracles.near_ties(3, k, dtype, seed, steps=254),
            corners,
        )
    )


# --- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_bits_follow_the_contract(dtype, rule):
    for k in K_SIZES:
        x = rows_of(dtype, k, seed=k)
        assert_same(qops.quantize_int8(x, rule), quantize_int8_ref(x, rule), f"K={k}")
    for x in (HUGE_RANGE.to(dtype), BARELY.to(dtype), oracles.inputs(dtype)):
        assert_same(qops.quantize_int8(x, rule), quantize_int8_ref(x, rule), "corners")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_rule_127_in_numpy(dtype):
    x = torch.cat((oracles.near_ties(64, 32, dtype, seed=0, steps=127), oracles.near_ties(64, 32, dtype, seed=1)))
    wide = x.float().numpy()
    a = np.abs(wide).max(-1, keepdims=True)
    assert a.dtype == np.float32
    q = np.rint(wide * (np.float32(127) / a)).astype(np.int8)
    got_q, got_scale = qops.quantize_int8(x)
    assert (got_q.numpy() == q).all() and (got_scale.numpy() == (a / np.float32(127))[:, 0]).all()
    other = np.rint(wide / (a / np.float32(127))).astype(np.int8)
    assert dtype != torch.float32 or (other != q).any(), "the data would not show a division by the scale"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_rule_127_is_within_half_a_step(dtype):
    x = random_activations(64, 577, dtype=dtype, seed=0)
    q, scale = qops.quantize_int8(x)
    error = (x.double() - q.double() * scale[:, None].double()).abs()
    assert bool((error <= scale[:, None].double() * (0.5 + 127 * 2.0**-22)).all())
    assert q.max() <= 127 and q.min() >= -127 and bool((q.abs().amax(-1) == 127).all())


@pytest.mark.parametrize("rule", ("compressed-tensors", "torchao"))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_frozen_results_of_the_packages(dtype, rule):
    table = json.loads(oracles.TABLE.read_text())
    case = next(case for case in table["cases"] if f"torch.{case['dtype']}" == str(dtype))
    x = oracles.from_bits(case["x"], dtype)
    want = torch.tensor(case[rule]["q"], dtype=torch.int8), oracles.from_bits(case[rule]["scale"], torch.float32)
    assert_same(qops.quantize_int8(x, rule), want)
    assert_same(quantize_int8_ref(x, rule), want, "reference")
    for other in set(RULES) - {rule}:
        assert not torch.equal(qops.quantize_int8(x, other)[0], want[0]), f"the table would not show rule {other}"


def package_rows(dtype):
    if dtype == torch.float32:
        bits = torch.randint(-(2**31), 2**31, (2**16, 4), generator=generator(0)).to(torch.int32)
        yield "random bits", bits.view(dtype)
        yield "ties", oracles.near_ties(2**14, 16, dtype, seed=1)
    else:
        every_value = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None]
        yield "every value beside 0", torch.cat((every_value, torch.zeros_like(every_value)), dim=-1)
        bits = torch.randint(-(2**15), 2**15, (2**16, 4), generator=generator(0)).to(torch.int16)
        yield "random bits", bits.view(dtype)
        yield "ties", oracles.near_ties(2**12, 64, dtype, seed=1)
    yield "table", oracles.inputs(dtype)
    yield "activations", random_activations(64, 4096, dtype=dtype, seed=2)


@pytest.mark.parametrize("rule", ("compressed-tensors", "torchao"))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_bits_of_the_package(dtype, rule):
    pytest.importorskip(rule.replace("-", "_"), reason=f"{rule} is not installed")
    oracle = {"compressed-tensors": oracles.compressed_tensors, "torchao": oracles.torchao}[rule]
    for what, x in package_rows(dtype):
        assert_same(qops.quantize_int8(x, rule), oracle(x), what)


def test_real_activations_of_a_checkpoint():
    path = checkpoint("ct_w8a8_int_dyn_token_sym") / "ref_layer_io.safetensors"
    tensors = pytest.importorskip("safetensors.torch").load_file(str(path))
    layers = {name.removesuffix(".x_q") for name in tensors if name.endswith(".x_q")}
    assert len(layers) == 4
    for layer in layers:
        q, scale = qops.quantize_int8(tensors[f"{layer}.x"], "compressed-tensors")
        assert_bitwise(q, tensors[f"{layer}.x_q"], layer)
        assert_bitwise(scale, tensors[f"{layer}.x_scale"][..., 0].float(), layer)


# --- asymmetric and static -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ASYM_RULES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_asym_bits_follow_the_contract(dtype, rule):
    for k in K_SIZES:
        x = rows_of(dtype, k, seed=k)
        for what, t in (("both signs", x), ("positive", x.abs()), ("negative", -x.abs())):
            assert_same(qops.quantize_int8_asym(t, rule), quantize_int8_asym_ref(t, rule), f"K={k} {what}")
    for x in (HUGE_RANGE.to(dtype), BARELY.to(dtype), -BARELY.to(dtype), oracles.near_ties(64, 8, dtype, 0, steps=255)):
        assert_same(qops.quantize_int8_asym(x, rule), quantize_int8_asym_ref(x, rule), "corners")
    for what, x in package_rows(dtype):
        assert_same(qops.quantize_int8_asym(x, rule), quantize_int8_asym_ref(x, rule), what)


@pytest.mark.parametrize("rule", ASYM_RULES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_asym_sees_single_values_wherever_they_stand(dtype, rule):
    """Of rows in whole blocks and of their ends: the only negative or positive value, NaN of either sign, zeros."""
    negative_nan = torch.tensor(-1, dtype=torch.int32).view(torch.float32).item()
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for k, places in ((32, (0, 17, 31)), (700, (0, 31, 255, 256, 511, 512, 543, 544, 699))):
        for others in (0.0, -0.0, 0.75, -0.75):
            for value in (3.0, -3.0, tiny, -tiny, 0.0, -0.0, NAN, negative_nan, INF, -INF):
                x = torch.full((len(places), k), others, dtype=dtype)
                x[range(len(places)), places] = torch.tensor(value, dtype=torch.float32).to(dtype)
                what = f"K={k} {value} among {others}"
                assert_same(qops.quantize_int8_asym(x, rule), quantize_int8_asym_ref(x, rule), what)


def test_asym_rounds_the_quotient_of_symmetric_rows():
    """low / scale is 127.5 within a rounding where the range is symmetric, and half of all such rows need the very
    quotient: low * (1 / scale) gives one zero point in five another value."""
    top = torch.rand(2**12, generator=generator(0)) + 0.5
    x = torch.stack((top, -top, top / 3, torch.zeros_like(top)), 1)
    q, scale, zero_point = qops.quantize_int8_asym(x)
    assert_same((q, scale, zero_point), quantize_int8_asym_ref(x))
    want = -128 - (-top.double() / scale.double()).float().round().int()
    assert torch.equal(zero_point, want)
    reciprocal = -128 - (-top * (1.0 / scale)).round().int()
    assert not torch.equal(zero_point, reciprocal)


def test_asym_frozen_results_of_torchao():
    case = json.loads(oracles.TABLE.read_text())["torchao_asym"]
    want = torch.tensor(case["q"], dtype=torch.int8), oracles.from_bits(case["scale"], torch.float32)
    want += (torch.tensor(case["zero_point"], dtype=torch.int32),)
    assert_same(qops.quantize_int8_asym(oracles.from_bits(case["x"], torch.float32)), want)


def test_asym_bits_of_torchao():
    pytest.importorskip("torchao", reason="torchao is not installed")
    for seed, steps in enumerate((255, 127.5, 100)):
        x = oracles.near_ties(2**12, 64, torch.float32, seed, steps) * (1 - 0.1 * torch.rand(2**12, 1))
        for t in (x, x.abs(), -x.abs()):
            assert_same(qops.quantize_int8_asym(t), oracles.torchao_asym(t))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_frozen_asymmetric_and_static_results_of_compressed_tensors(dtype):
    table = json.loads(oracles.TABLE.read_text())
    case = next(case for case in table["cases"] if f"torch.{case['dtype']}" == str(dtype))
    found = case["compressed-tensors asym"]
    x, want = oracles.from_bits(found["x"], dtype), [torch.tensor(found["q"], dtype=torch.int8)]
    want += [oracles.from_bits(found["scale"], torch.float32), torch.tensor(found["zero_point"], dtype=torch.int32)]
    finite = want[1].isfinite()
    for results in (qops.quantize_int8_asym(x, "compressed-tensors"), quantize_int8_asym_ref(x, "compressed-tensors")):
        assert_bitwise(results[1], want[1])
        assert_same([part[finite] for part in results], [part[finite] for part in want])
    assert not torch.equal(qops.quantize_int8_asym(x)[0][finite], want[0][finite]), "the table would not show rule 255"
    x, codes = oracles.static_inputs(dtype), torch.tensor(case["compressed-tensors static"], dtype=torch.int8)
    known = oracles.STATIC_SCALE, oracles.STATIC_ZERO_POINT
    assert_bitwise(qops.quantize_int8_static(x, *known, "compressed-tensors"), codes)
    assert_bitwise(quantize_int8_static_ref(x, *known, "compressed-tensors"), codes)
    assert not torch.equal(qops.quantize_int8_static(x, *known), codes), "the table would not show torchao's rule"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_asym_bits_of_compressed_tensors(dtype):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    rows = [*package_rows(dtype), ("steps of 255", oracles.near_ties(2**12, 64, dtype, seed=1, steps=255))]
    shifted = torch.randn(2048, 64, generator=generator(3)) + torch.linspace(-4, 4, 2048)[:, None]
    rows += [("shifted", shifted.to(dtype))]
    for what, x in rows:
        for t in (x, x.abs(), -x.abs()):
            got, want = qops.quantize_int8_asym(t, "compressed-tensors"), oracles.compressed_tensors_asym(t)
            assert_bitwise(got[1], want[1], what)
            finite = want[1].isfinite()
            assert_same([part[finite] for part in got], [part[finite] for part in want], what)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_asym_rows_of_compressed_tensors_without_a_finite_scale(dtype):
    most = torch.finfo(dtype).max
    x = torch.tensor([[NAN, 1, -2], [INF, 1, -2], [1, -INF, INF], [INF, NAN, 1], [most, -most, 1]], dtype=dtype)
    q, scale, zero_point = qops.quantize_int8_asym(x, "compressed-tensors")
    assert not q.any() and not zero_point.any()
    assert_bitwise(scale, torch.tensor([NAN, INF, INF, NAN, INF]))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_asym_rows_of_compressed_tensors_without_a_scale(dtype):
    """Where the scale is 0 in the dtype, low / scale is a division by 0."""
    tiny, eps = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, torch.finfo(dtype).eps
    x = torch.tensor([[0.0, -0.0, 0.0], [tiny, 2 * tiny, 0.0], [tiny, -tiny, 0.0], [-tiny, -2 * tiny, 0.0]]).to(dtype)
    q, scale, zero_point = qops.quantize_int8_asym(x, "compressed-tensors")
    assert scale.tolist() == [eps] * 4 and zero_point.tolist() == [0, 0, 127, 127]
    assert q.tolist() == [[0] * 3, [0] * 3, [127] * 3, [127] * 3]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_asym_is_within_a_step_and_keeps_zero(dtype):
    x = random_activations(64, 577, dtype=dtype, seed=0)
    x[:, ::5] = 0.0
    x[32:] = x[32:].abs()
    q, scale, zero_point = qops.quantize_int8_asym(x)
    back = (q.double() - zero_point[:, None].double()) * scale[:, None].double()
    assert bool((back[x == 0] == 0).all())
    assert bool((zero_point[32:] == -128).all()) and bool((zero_point[:32] > -128).all())
    # Half a step, and where the zero point was rounded the other way, up to one at the end of the range.
    assert bool(((x.double() - back).abs() <= scale[:, None].double() * (1 + 2.0**-14)).all())


@pytest.mark.parametrize("rule", STATIC_RULES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_static_bits_follow_the_contract(dtype, rule):
    for k in (1, 17, 576):
        x = rows_of(dtype, k, seed=k)
        for scale in (1.0, 0.037, 2.0**-126, 1e-42, 3e38):
            for zero_point in (None, 0, -128, 127, 5):
                s, z = (
                    torch.tensor(scale),
                    None if zero_point is None else torch.tensor([zero_point], dtype=torch.int32),
                )
                got, want = qops.quantize_int8_static(x, s, z, rule), quantize_int8_static_ref(x, s, z, rule)
                assert_bitwise(got, want, f"K={k} scale={scale} zero point={zero_point}")


@pytest.mark.parametrize("rule", STATIC_RULES)
def test_static_special_values(rule):
    x = torch.tensor([NAN, INF, -INF, 1e38, -1e38, 0.5, 1.5, 2.5, -0.5, 0.0])
    want = [0, 127, -128, 127, -128, 0, 2, 2, 0, 0]
    assert qops.quantize_int8_static(x, torch.tensor(1.0), rule=rule).tolist() == want
    # The zero point moves the ties of compressed-tensors: 7.5 is 8, 8.5 is 8.
    want = [7, 127, -128, 127, -128, *((7, 9, 9, 7) if rule == "torchao" else (8, 8, 10, 6)), 7]
    assert qops.quantize_int8_static(x, torch.ones(1), torch.tensor([7], dtype=torch.int32), rule).tolist() == want


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_static_repeats_asym(dtype):
    x = random_activations(9, 577, dtype=dtype, seed=0)
    for asym, static in zip(ASYM_RULES, STATIC_RULES, strict=True):
        for row, q, scale, zero_point in zip(x, *qops.quantize_int8_asym(x, asym), strict=True):
            assert_bitwise(qops.quantize_int8_static(row, scale, zero_point, static), q)


def test_static_bits_of_torchao():
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization.quant_primitives import quantize_affine

    scale, zero_point = torch.tensor([0.0173]), torch.tensor([-3], dtype=torch.int32)
    for dtype in FLOAT_DTYPES:
        x = random_activations(64, 577, dtype=dtype, seed=0)
        for z in (torch.zeros_like(zero_point), zero_point):
            want = quantize_affine(x, x.shape, scale.view(1, 1), z.view(1, 1), torch.int8, -128, 127)
            assert_bitwise(qops.quantize_int8_static(x, scale, z), want)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_static_bits_of_compressed_tensors(dtype):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    for what, x in package_rows(dtype):
        x = x.nan_to_num(1.0, INF, -INF)
        for scale in (oracles.STATIC_SCALE, torch.tensor([1.0]), torch.tensor([2.0**-14])):
            for zero_point in (None, oracles.STATIC_ZERO_POINT, torch.tensor([127]), torch.tensor([-128])):
                want = oracles.compressed_tensors_static(x, scale, zero_point)
                z = None if zero_point is None else zero_point.int()
                assert_bitwise(qops.quantize_int8_static(x, scale, z, "compressed-tensors"), want, what)


@pytest.mark.parametrize("scale", (0.0, -1.0, NAN, INF, -0.0))
def test_static_refuses_scales_without_meaning(scale):
    with pytest.raises(ValueError, match=r"^qops\.quantize_int8_static: scale must be positive and finite, got"):
        qops.quantize_int8_static(torch.ones(3), torch.tensor(scale))


@pytest.mark.parametrize("zero_point", (128, -129, 2**31 - 1))
def test_static_refuses_zero_points_out_of_range(zero_point):
    text = rf"^qops\.quantize_int8_static: zero_point must lie in -128 \.\. 127, got {zero_point}$"
    with pytest.raises(ValueError, match=text):
        qops.quantize_int8_static(torch.ones(3), torch.ones(1), torch.tensor(zero_point, dtype=torch.int32))


# --- memory ----------------------------------------------------------------------------------------------------------

SCALE = torch.tensor(0.04)
ZERO_POINT = torch.tensor(3, dtype=torch.int32)
CALLS = {
    "127": lambda x, **out: qops.quantize_int8(x, **out),
    "compressed-tensors": lambda x, **out: qops.quantize_int8(x, "compressed-tensors", **out),
    "torchao": lambda x, **out: qops.quantize_int8(x, "torchao", **out),
    "asym": lambda x, **out: qops.quantize_int8_asym(x, **out),
    "asym, ct": lambda x, **out: qops.quantize_int8_asym(x, "compressed-tensors", **out),
    "static": lambda x, **out: qops.quantize_int8_static(x, SCALE, ZERO_POINT, **out),
    "static, ct": lambda x, **out: qops.quantize_int8_static(x, SCALE, ZERO_POINT, "compressed-tensors", **out),
}


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("call", CALLS)
def test_strides_and_leading_dimensions(call):
    quantize = CALLS[call]
    base = random_activations(2, 9, 5, 48, dtype=torch.bfloat16, seed=0)
    want = [t.view(2, 9, 5, *t.shape[1:]) for t in as_tuple(quantize(base.reshape(-1, 48)))]
    views = {
        "sliced": lambda t: t[:, 2:7],
        "transposed leading dimensions": lambda t: t.transpose(0, 2),
        "broadcast": lambda t: t[:1].expand(3, *t.shape[1:]),
        "one row": lambda t: t[0, 0, 0],
        "rows that are not contiguous": lambda t: t[::1, ::2],
    }
    for name, view in views.items():
        got = as_tuple(quantize(view(base)))
        assert all(t.is_contiguous() for t in got), name
        assert_same(got, [view(t).contiguous() for t in want], name)
    for pad in (8, 2):
        assert_same(as_tuple(quantize(strided_rows(base, pad))), want, f"row stride, pad {pad}")


@pytest.mark.parametrize("call", CALLS)
def test_out(call):
    x = random_activations(3, 5, 37, dtype=torch.bfloat16, seed=0)
    want = as_tuple(CALLS[call](x))
    walls = [Guarded(torch.full_like(t, 77)) for t in want]
    out = tuple(wall.tensor for wall in walls) if len(walls) > 1 else walls[0].tensor
    assert CALLS[call](strided_rows(x), out=out) is out
    assert_same(as_tuple(out), want)
    for wall in walls:
        wall.check()


@pytest.mark.parametrize("call", CALLS)
def test_offsets_beyond_32_bits(call, tmp_path):
    stride = 2**30 + 64  # the third row starts behind element 2^31; the file is sparse
    x = torch.from_file(str(tmp_path / "x"), shared=True, size=2 * stride + 64, dtype=torch.bfloat16)
    x = x.as_strided((3, 64), (stride, 1))
    values = random_activations(3, 64, dtype=torch.bfloat16, seed=0)
    x.copy_(values)
    assert_same(as_tuple(CALLS[call](x)), as_tuple(CALLS[call](values)))


@pytest.mark.parametrize("call", CALLS)
def test_rows_do_not_depend_on_batch_or_threads(call, threads):
    quantize = CALLS[call]
    x = random_activations(257, 576, dtype=torch.bfloat16, seed=3)
    threads(1)
    one = as_tuple(quantize(x))
    threads(2)
    assert_same(as_tuple(quantize(x)), one, "threads")
    for row in (0, 100, 256):
        assert_same(as_tuple(quantize(x[row])), [t[row] for t in one], "row alone")


@pytest.mark.parametrize("call", CALLS)
def test_empty(call):
    for shape in ((0, 64), (3, 0), (0,), (2, 0, 4)):
        got = as_tuple(CALLS[call](torch.empty(shape)))
        assert got[0].shape == shape
        assert all(t.shape == shape[:-1] for t in got[1:])


def test_an_empty_row_is_a_zero_row():
    for rule in RULES:
        assert_bitwise(qops.quantize_int8(torch.empty(3, 0), rule)[1], qops.quantize_int8(torch.zeros(3, 1), rule)[1])
    for rule in ASYM_RULES:
        empty, zeros = (qops.quantize_int8_asym(torch.zeros(2, k), rule) for k in (0, 1))
        assert_same(empty[1:], zeros[1:])
        assert zeros[0].tolist() == [[0], [0]] and zeros[2].tolist() == [0, 0]
    assert qops.quantize_int8_asym(torch.empty(2, 0))[1].tolist() == [0.0, 0.0]


def test_more_empty_rows_than_could_be_visited():
    assert qops.quantize_int8_static(torch.empty(2**62, 0), SCALE).shape == (2**62, 0)


# --- errors ----------------------------------------------------------------------------------------------------------

X = torch.ones(2, 32, dtype=torch.bfloat16)
Q, S, Z = torch.ones(2, 32, dtype=torch.int8), torch.ones(2), torch.ones(2, dtype=torch.int32)
INPUT_ERRORS = {
    "dtype": (X.long(), RuntimeError, r"x must have dtype float32, float16 or bfloat16, got int64"),
    "float64": (X.double(), RuntimeError, r"x must have dtype float32, float16 or bfloat16, got float64"),
    "scalar": (torch.tensor(1.0), ValueError, r"x must have at least 1 dimension, got 0"),
    "stride": (X.t(), ValueError, r"x must have stride 1 in its last dimension, got 32"),
}
OPS = {"quantize_int8": CALLS["127"], "quantize_int8_asym": CALLS["asym"], "quantize_int8_static": None}


def assert_error_on_both(op, call, tensors, error, text):
    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.{op}: {text}$") as caught:
            call(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("case", INPUT_ERRORS)
def test_input_errors_are_the_same_with_fake_tensors(case):
    x, error, text = INPUT_ERRORS[case]
    assert_error_on_both("quantize_int8", qops.quantize_int8, (x,), error, text)
    assert_error_on_both("quantize_int8_asym", qops.quantize_int8_asym, (x,), error, text)
    assert_error_on_both("quantize_int8_static", qops.quantize_int8_static, (x, SCALE), error, text)


def test_rule_error():
    text = r'rule must be "127", "compressed-tensors" or "torchao", got "128"'
    assert_error_on_both("quantize_int8", qops.quantize_int8, (X, "128"), ValueError, text)
    call = lambda x, q, s: qops.quantize_int8(x, "128", out=(q, s))  # noqa: E731
    assert_error_on_both("quantize_int8", call, (X, Q, S), ValueError, text)


STATIC_ERRORS = {
    "scale dtype": ((X, SCALE.double()), RuntimeError, r"scale must have dtype float32, got float64"),
    "scale size": ((X, S), ValueError, r"scale must have 1 element, got 2"),
    "no scale": ((X, S[:0]), ValueError, r"scale must have 1 element, got 0"),
    "zero point dtype": (
        (X, SCALE, ZERO_POINT.to(torch.int8)),
        RuntimeError,
        r"zero_point must have dtype int32, got int8",
    ),
    "zero point size": ((X, SCALE, Z), ValueError, r"zero_point must have 1 element, got 2"),
}


@pytest.mark.parametrize("case", STATIC_ERRORS)
def test_static_errors_are_the_same_with_fake_tensors(case):
    args, error, text = STATIC_ERRORS[case]
    assert_error_on_both("quantize_int8_static", qops.quantize_int8_static, args, error, text)


OUT_ERRORS = {
    "q dtype": ((Q.to(torch.uint8), S, Z), RuntimeError, r"q must have dtype int8, got uint8"),
    "q shape": ((Q[:1], S, Z), ValueError, r"q must have shape \[\.\.\., K\] = \[2, 32\], got \[1, 32\]"),
    "q strides": (
        (Q.t().contiguous().t(), S, Z),
        ValueError,
        r"q must be contiguous, got strides \[1, 2\]",
    ),
    "scale dtype": ((Q, S.half(), Z), RuntimeError, r"scale must have dtype float32, got float16"),
    "scale shape": ((Q, S[:, None], Z), ValueError, r"scale must have shape \[\.\.\.\] = \[2\], got \[2, 1\]"),
    "zero point dtype": ((Q, S, Z.long()), RuntimeError, r"zero_point must have dtype int32, got int64"),
    "zero point shape": ((Q, S, Z[:1]), ValueError, r"zero_point must have shape \[\.\.\.\] = \[2\], got \[1\]"),
}


@pytest.mark.parametrize("case", OUT_ERRORS)
def test_out_errors_are_the_same_with_fake_tensors(case):
    (q, s, z), error, text = OUT_ERRORS[case]
    dynamic = lambda x, q, s: qops.quantize_int8(x, out=(q, s))  # noqa: E731
    asym = lambda x, q, s, z: qops.quantize_int8_asym(x, out=(q, s, z))  # noqa: E731
    static = lambda x, s, q: qops.quantize_int8_static(x, s, out=q)  # noqa: E731
    assert_error_on_both("quantize_int8_asym", asym, (X, q, s, z), error, text)
    if "zero" not in case:
        assert_error_on_both("quantize_int8", dynamic, (X, q, s), error, text)
    if case.startswith("q "):
        assert_error_on_both("quantize_int8_static", static, (X, SCALE, q), error, text)


def test_overlap_is_refused_and_nothing_is_written():
    memory = torch.arange(4096, dtype=torch.uint8)
    before = memory.clone()
    x = memory[:128].view(torch.bfloat16).view(2, 32)
    over_x, apart = memory[64:128].view(torch.int8).view(2, 32), memory[1024:1088].view(torch.int8).view(2, 32)
    s, z = memory[2048:2056].view(torch.float32), memory[2056:2064].view(torch.int32)
    s_over_q = memory[1080:1088].view(torch.float32)
    z_over_s = memory[2052:2060].view(torch.int32)
    cases = {
        "q must lie apart from x": lambda: qops.quantize_int8(x, out=(over_x, s)),
        "q must lie apart from x in": lambda: qops.quantize_int8_static(x, SCALE, out=over_x),
        "q must lie apart from x in memory": lambda: qops.quantize_int8_asym(x, out=(over_x, s, z)),
        "scale must lie apart from q": lambda: qops.quantize_int8(x, out=(apart, s_over_q)),
        "scale must lie apart from x": lambda: qops.quantize_int8(x, out=(apart, memory[:8].view(torch.float32))),
        "zero_point must lie apart from scale": lambda: qops.quantize_int8_asym(x, out=(apart, s, z_over_s)),
    }
    for text, call in cases.items():
        with pytest.raises(ValueError, match=text):
            call()
    assert torch.equal(memory, before)
    assert_same(qops.quantize_int8(x, out=(apart, s)), qops.quantize_int8(x), "apart")


def test_grad_is_refused():
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, 8, requires_grad=True)
        calls = {"quantize_int8": (x,), "quantize_int8_asym": (x,), "quantize_int8_static": (x, SCALE)}
        for op, args in calls.items():
            with pytest.raises(RuntimeError, match=rf"qops\.{op}: \w+ must not require grad"):
                getattr(qops, op)(*args)


# --- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(dtype):
    ops = torch.ops.qops
    with torch.inference_mode(False), torch.no_grad():
        x = random_activations(3, 4, 40, dtype=dtype, seed=0)[:, 1:]
        q, s, z = (torch.empty_like(t) for t in qops.quantize_int8_asym(x))
        torch.library.opcheck(ops.quantize_int8.default, (x, "torchao"))
        torch.library.opcheck(ops.quantize_int8.out, (x,), {"q": q, "scale": s})
        torch.library.opcheck(ops.quantize_int8_asym.default, (x,))
        torch.library.opcheck(ops.quantize_int8_asym.out, (x,), {"q": q, "scale": s, "zero_point": z})
        scale, zero_point = SCALE.clone(), ZERO_POINT.clone()
        torch.library.opcheck(ops.quantize_int8_static.default, (x, scale))
        torch.library.opcheck(ops.quantize_int8_static.out, (x, scale, zero_point), {"q": q})


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    torch._dynamo.reset()
    x = random_activations(3, 64, dtype=torch.bfloat16, seed=0)

    def block(x):
        q, scale = qops.quantize_int8(x + 1, "compressed-tensors")
        out = torch.empty_like(q), torch.empty_like(scale)
        qops.quantize_int8(x, out=out)
        asym = qops.quantize_int8_asym(x * 2)
        static = qops.quantize_int8_static(x, SCALE, ZERO_POINT)
        return q, scale * 2, *out, *asym, static + 1

    torch.use_deterministic_algorithms(False)  # inductor does not know the poisoned torch.empty
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    for rows in (3, 2):
        for got, want in zip(compiled(x[:rows]), block(x[:rows]), strict=True):
            assert_bitwise(got, want, f"{rows} rows")


def test_compiled_out_reaches_the_caller():
    torch._dynamo.reset()
    x = random_activations(5, 64, dtype=torch.bfloat16, seed=0)
    want = qops.quantize_int8(x)
    out = tuple(torch.zeros_like(t) for t in want)
    torch.compile(lambda x, out: qops.quantize_int8(x, out=out), fullgraph=True, backend="aot_eager")(x, out)
    assert_same(out, want)
