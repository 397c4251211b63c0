"""int8_gemm on CUDA: plans, packed weights, and every kernel against exact integers, bit for bit.

The emulator asks for few multiprocessors, so that small problems use every tile, whole and cut along K.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import cuda_tools
import qops
from cuda_backend import POLICIES, Backend, gpu
from int8_gemm_oracle import activations, by_contract, codes, make_weight
from property_calls import check_one
from property_draws import HUGE, Sampler
from property_gemm import int8_gemm as int8_gemm_calls
from qops.ops.int8_gemm import MAX_K, MAX_K_WITH_ZERO_POINT, OUT_DTYPES
from qops.testing import FLOAT_DTYPES, Guarded, assert_bitwise, generator
from random_weights import assert_tensors_equal

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
# (N, K): strips and tiles of 128 rows that are and are not full, K below, at and beyond 64, odd multiples of 8.
SHAPES = ((8, 8), (16, 64), (24, 72), (120, 136), (128, 128), (136, 200), (264, 328))
# (M, N, K) where the plan for 3 multiprocessors cuts K, and where that for one does not: one for each tile of tokens.
SPLIT = ((5, 40, 4104), (16, 136, 4104), (31, 24, 6024), (50, 40, 8200), (100, 136, 8200))
WHOLE = tuple((m, 136, 200) for m in (8, 16, 32, 64, 128))


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> str:
    program = tmp_path_factory.mktemp("int8") / "plan"
    root = cuda_tools.ROOT
    options = ["-std=c++20", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all", f"-I{root / 'csrc'}"]
    cuda_tools.checked("g++", *options, str(root / "tests/int8_plan_probe.cpp"), "-o", str(program))
    return str(program)


def packed_by_hand(qweight: Tensor) -> Tensor:
    """What the layout of csrc/int8_layout.h says."""
    n, k = qweight.shape
    padded = torch.zeros(-(-n // 16) * 16, -(-k // 64) * 64, dtype=torch.int8)
    padded[:n, :k] = qweight
    strips = padded.view(padded.shape[0] // 16, 2, 8, padded.shape[1] // 32, 2, 4, 4)  # S, half, g, block, a / 2, t
    return strips.permute(0, 3, 2, 5, 4, 1, 6).reshape(padded.shape[0] // 16, 16 * padded.shape[1])


def product(backend: Backend, q, scale, w, bias=None, *, zero_point=None, out_dtype=torch.bfloat16) -> Tensor:
    """By the operator of the backend, with a CPU's weight packed there."""
    there = [backend.on_device(t) for t in (q, scale, zero_point, bias)]
    packed = backend.ops.int8_pack(backend.on_device(w.canonical()["qweight"]))
    scales = backend.on_device(w.scales)
    return backend.ops.int8_gemm(*there[:3], packed, scales, there[3], w.out_features, out_dtype).cpu()


def assert_contract(backend: Backend, m: int, n: int, k: int, seed: int, out_dtypes=OUT_DTYPES) -> None:
    w = make_weight(n, k, seed, FLOAT_DTYPES[seed % 3])
    q, scale, zero_point = activations(m, k, seed)
    bias = torch.randn(n, generator=generator(seed)).to(FLOAT_DTYPES[seed // 2 % 3])
    for index, out_dtype in enumerate(out_dtypes):
        b = None if out_dtype == torch.int32 or (seed + index) % 3 == 0 else bias
        z = zero_point if (seed + index) % 2 else None
        got = product(backend, q, scale, w, b, zero_point=z, out_dtype=out_dtype)
        want = by_contract(q, scale, w, b, zero_point=z, out_dtype=out_dtype)
        assert_bitwise(got, want, f"{m}x{n}x{k}, {out_dtype}, bias {b is not None}, zero_point {z is not None}")


# Plans ---------------------------------------------------------------------------------------------------------------


def test_plans_cover_every_product_once(probe):
    result = subprocess.run([probe, "check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_shapes_of_these_tests_use_every_kernel(probe):
    def plan(m: int, n: int, k: int, multiprocessors: int) -> tuple[int, bool]:
        arguments = map(str, (m, n, k, multiprocessors, SHARED_BYTES[90]))
        words = cuda_tools.checked(probe, "plan", *arguments).split()
        return int(words[0]), words[1] == "1"

    assert [plan(*shape, 3) for shape in SPLIT] == [(tokens, True) for tokens in (8, 16, 32, 64, 128)]
    assert [plan(*shape, 1) for shape in WHOLE] == [(tokens, False) for tokens in (8, 16, 32, 64, 128)]


# Packing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k", (*SHAPES, (40, 1032), (0, 64), (16, 0)), ids=str)
def test_packed_codes_stand_where_the_layout_says(each, n, k):
    qweight = codes(n, k, seed=n + k)
    stored = -(-k // 64) * 64
    packed = each.ops.int8_pack(each.on_device(qweight))
    assert packed.shape == ((n + 15) // 16, 16 * stored)
    if n and k:
        assert_bitwise(packed.cpu(), packed_by_hand(qweight))
    back = each.ops.int8_unpack(packed, n).cpu()
    assert back.shape == (n, stored)
    assert_bitwise(back[:, :k].contiguous(), qweight)
    assert not back[:, k:].any()


def test_codes_may_begin_anywhere(backend):
    memory = backend.on_device(codes(1, 2000, seed=0)[0])
    for start in range(4):
        qweight = memory[start : start + 16 * 72].view(16, 72)
        assert_bitwise(backend.ops.int8_pack(qweight).cpu(), packed_by_hand(qweight.cpu()), str(start))


def test_a_weight_lives_on_a_gpu(backend):
    for seed, (n, k) in enumerate(((24, 72), (16, 8), (136, 200))):
        here = make_weight(n, k, seed)
        tensors, dense = here.canonical(), here.dequantize()
        q, scale, zero_point = activations(3, k, seed)
        ids = torch.tensor([[n - 1, 0], [7, n // 2]])
        with gpu(backend):
            there = qops.Int8Weight.from_canonical(**{key: backend.on_device(t) for key, t in tensors.items()})
            assert_bitwise(there.packed.cpu(), packed_by_hand(tensors["qweight"]))
            assert_bitwise(there.dequantize().cpu(), dense)
            assert_bitwise(there.rows(backend.on_device(ids)).cpu(), dense[ids])
            for other in (copy.deepcopy(there), pickle.loads(pickle.dumps(there))):
                assert_tensors_equal(dict(other.named_buffers()), dict(there.named_buffers()))
            inputs = (backend.on_device(t) for t in (q, scale))
            y = qops.int8_gemm(*inputs, there, zero_point=backend.on_device(zero_point))
        assert_bitwise(y.cpu(), by_contract(q, scale, here, zero_point=zero_point))


def test_fake_tensors_have_the_layout_of_their_device():
    with FakeTensorMode():
        for device, stored in (("cpu", 72), ("cuda", 128)):
            packed = torch.ops.qops.int8_pack(torch.empty(24, 72, dtype=torch.int8, device=device))
            assert packed.shape == (2, 16 * stored)
            assert torch.ops.qops.int8_unpack(packed, 24).shape == (24, stored)
            q, scale = torch.empty(5, 72, dtype=torch.int8, device=device), torch.empty(5, device=device)
            rest = (packed, torch.empty(2, 1, 16, device=device), None, 24, torch.bfloat16)
            assert torch.ops.qops.int8_gemm(q, scale, None, *rest).shape == (5, 24)
            with pytest.raises(ValueError, match=rf"q must have last dimension K = {stored}, got 136"):
                torch.ops.qops.int8_gemm(q.new_empty(5, 136), scale, None, *rest)


# Products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k", SHAPES, ids=str)
def test_bits_follow_the_contract(each, n, k):
    for seed, m in enumerate((1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 129)):
        assert_contract(each, m, n, k, seed)


def test_every_small_number_of_tokens(backend):
    for m in range(1, 34):
        assert_contract(backend, m, 40, 136, m, (OUT_DTYPES[m % 4],))


@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_kernel(emulated, policy, arch):
    backend = Backend(torch.ops.qops_emu, "cpu")
    for multiprocessors, shapes in ((1, WHOLE), (3, SPLIT), (8, SPLIT)):
        for seed, shape in enumerate(shapes):
            emulated.configure(seed, POLICIES[policy], "", arch, multiprocessors)
            assert_contract(backend, *shape, seed + multiprocessors, OUT_DTYPES[seed % 4 :][:2])
    emulated.configure(1, POLICIES["prio"], "")


def test_the_plan_changes_no_bit(emulated):
    w, (q, scale, zero_point) = make_weight(136, 4104, 0), activations(40, 4104, 0)
    backend = Backend(torch.ops.qops_emu, "cpu")
    want = by_contract(q, scale, w, zero_point=zero_point)
    for arch, multiprocessors in itertools.product(SHARED_BYTES, (1, 2, 5, 132)):
        emulated.configure(1, POLICIES["prio"], "", arch, multiprocessors)
        got = product(backend, q, scale, w, zero_point=zero_point)
        assert_bitwise(got, want, f"sm_{arch}, {multiprocessors}")
    emulated.configure(1, POLICIES["prio"], "")


@pytest.mark.parametrize("asymmetric", (False, True), ids=("symmetric", "asymmetric"))
def test_extreme_codes_at_the_largest_k(backend, asymmetric):
    k = (MAX_K_WITH_ZERO_POINT if asymmetric else MAX_K) // 8 * 8
    ends = torch.tensor([-128, 127, -127, 1], dtype=torch.int8)
    weight = ends.repeat(2)[:, None].repeat(1, k)
    weight[7, ::2] = 127
    w = qops.Int8Weight.from_canonical(weight, torch.tensor(1.0))
    q = ends.repeat_interleave(2)[:, None].repeat(1, k)
    zero_point = torch.tensor([127, -128] * 4, dtype=torch.int32) if asymmetric else None
    x = q.long() if zero_point is None else q.long() - zero_point[:, None]
    exact = x @ weight.long().T
    assert 2**31 > exact.abs().max() > 2**31 - (1 << 20)
    got = product(backend, q, torch.tensor(1.0), w, zero_point=zero_point, out_dtype=torch.int32)
    assert_bitwise(got, exact.int())


@pytest.mark.parametrize("m", (3, 65))
def test_one_code_everywhere(backend, m):
    """-128 and -127 times themselves, 127 against -128; in a tile whose padding holds other codes."""
    for a, b, z in ((-128, -128, 127), (127, -128, -128), (-127, 127, 0), (-128, 127, 127)):
        w = qops.Int8Weight.from_canonical(torch.full((40, 200), b, dtype=torch.int8), torch.tensor(0.5))
        q, zero_point = torch.full((m, 200), a, dtype=torch.int8), torch.tensor(z, dtype=torch.int32)
        got = product(backend, q, torch.tensor(2.0), w, zero_point=zero_point, out_dtype=torch.float32)
        assert_bitwise(got, torch.full((m, 40), float((a - z) * b * 200)))


def test_zero_points_of_any_size_wrap_around(backend):
    w, (q, scale, _) = make_weight(24, 72, 0), activations(5, 72, 0)
    zero_point = torch.tensor([2**31 - 1, -(2**31), 2**24, -129, 1 << 20], dtype=torch.int32)
    for dtype in OUT_DTYPES:
        got = product(backend, q, scale, w, zero_point=zero_point, out_dtype=dtype)
        assert_bitwise(got, by_contract(q, scale, w, zero_point=zero_point, out_dtype=dtype), str(dtype))


def test_special_scales(backend):
    w, (q, scale, _) = make_weight(24, 72, 0), activations(12, 72, 0)
    scale[2:10] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3e38, -1e-40])
    q[10] = 0
    scale[11] = -scale[11]
    bias = torch.randn(24, generator=generator(0))
    bias[3] = float("nan")
    for dtype, b in itertools.product(FLOAT_DTYPES, (None, bias)):
        got = product(backend, q, scale, w, b, out_dtype=dtype)
        assert_bitwise(got, by_contract(q, scale, w, b, out_dtype=dtype), f"{dtype}, bias {b is not None}")


def test_one_scale_for_all(backend):
    w, (q, scale, zero_point) = make_weight(24, 72, 0), activations(7, 72, 0)
    for s, z in itertools.product((scale[3], scale[3].expand(7)), (zero_point[3], zero_point[3].expand(7))):
        got = product(backend, q, s, w, zero_point=z, out_dtype=torch.float32)
        want = by_contract(q, scale[3].repeat(7), w, zero_point=zero_point[3].repeat(7), out_dtype=torch.float32)
        assert_bitwise(got, want, f"scale {list(s.shape)}, zero_point {list(z.shape)}")


def test_rows_that_begin_anywhere(backend):
    """At multiples of 16 bytes they are read as they are, else from a copy."""
    w = make_weight(24, 72, 0)
    q = codes(2, 3, 72, seed=1)
    scale = torch.rand(2, 3, generator=generator(2))
    want = by_contract(q.view(-1, 72), scale, w).view(2, 3, 24)
    memory = backend.on_device(torch.zeros(2, 3, 200, dtype=torch.int8))
    here = Backend(backend.ops, "cpu")  # product() must not move a view
    for start in (0, 1, 2, 4, 8, 16, 100):
        far = memory[..., start : start + 72]
        far.copy_(q)
        packed = backend.ops.int8_pack(backend.on_device(w.canonical()["qweight"]))
        rest = (None, packed, backend.on_device(w.scales), None, 24, torch.bfloat16)
        assert_bitwise(backend.ops.int8_gemm(far, backend.on_device(scale), *rest).cpu(), want, str(start))
        turned = backend.ops.int8_gemm(far.transpose(0, 1), backend.on_device(scale).T, *rest)
        assert_bitwise(turned.cpu(), want.transpose(0, 1).contiguous(), f"transposed, {start}")
    if here.device == backend.device:
        assert_bitwise(product(here, q[0, 0], scale[0, 0], w), want[0, 0], "a vector")


def test_offsets_beyond_int32(emulated, tmp_path):
    stride = 2**30 + 64  # the third row starts behind byte 2^31; the file is sparse
    memory = torch.from_file(str(tmp_path / "q"), shared=True, size=2 * stride + 64, dtype=torch.int8)
    q = memory.as_strided((3, 64), (stride, 1))
    values, scale, _ = activations(3, 64, 0)
    q.copy_(values)
    w, backend = make_weight(16, 64, 0), Backend(torch.ops.qops_emu, "cpu")
    assert_bitwise(product(backend, q, scale, w), by_contract(values, scale, w))


@pytest.mark.parametrize("m, n, k", ((0, 16, 32), (3, 0, 32), (0, 0, 0), (2, 16, 0), (70, 136, 0)))
def test_empty(backend, m, n, k):
    w = qops.Int8Weight.from_canonical(torch.zeros(n, k, dtype=torch.int8), torch.ones(n, min(k, 1)))
    q, bias, zero_point = torch.zeros(m, k, dtype=torch.int8), torch.arange(float(n)), torch.ones(m, dtype=torch.int32)
    for z in (None, zero_point):
        got = product(backend, q, torch.ones(m), w, bias, zero_point=z, out_dtype=torch.float32)
        assert_bitwise(got, bias.expand(m, n).contiguous(), "bias alone")
        got = product(backend, q, torch.ones(m), w, zero_point=z, out_dtype=torch.int32)
        assert_bitwise(got, torch.zeros(m, n, dtype=torch.int32), "zeros")


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
def test_out(backend, out_dtype):
    for (n, k), m in itertools.product(((24, 72), (136, 200)), (1, 18, 66)):
        w, (q, scale, zero_point) = make_weight(n, k, m), activations(m, k, m)
        want = by_contract(q, scale, w, zero_point=zero_point, out_dtype=out_dtype)
        there = [backend.on_device(t) for t in (q, scale, zero_point)]
        packed = backend.ops.int8_pack(backend.on_device(w.canonical()["qweight"]))
        weight = (packed, backend.on_device(w.scales), None, n)
        out = Guarded(backend.on_device(torch.full((m, n), 77, dtype=out_dtype)))
        backend.ops.int8_gemm.out(*there, *weight, out=out.tensor)
        out.check()
        assert_bitwise(out.tensor.cpu(), want, f"{m}x{n}")
        # Not where four columns can be stored at a time.
        odd = backend.on_device(torch.full((m * n + 1,), 77, dtype=out_dtype))[1:].view(m, n)
        backend.ops.int8_gemm.out(*there, *weight, out=odd)
        assert_bitwise(odd.cpu(), want, f"{m}x{n}, one element further")


@given(data=st.data())
def test_random_valid_calls(emulated, data):
    call = int8_gemm_calls(Sampler(lambda low, high: data.draw(st.integers(low, high))))
    if call.faults or call.grad or any(t.is_meta or max(t.shape, default=0) >= HUGE for _, t in call.tensors()):
        return
    note(str(call))
    seed, policy, multiprocessors = (data.draw(st.integers(low, high)) for low, high in ((0, 1000), (0, 2), (1, 4)))
    emulated.configure(seed, policy, "", 90, multiprocessors)
    with torch.no_grad():
        expected = call.expected(call.arguments)
    n = call.arguments["out_features"]
    codes = torch.ops.qops.int8_unpack(call.arguments["packed"], n)
    call.arguments["packed"] = torch.ops.qops_emu.int8_pack(codes)
    operator = getattr(torch.ops.qops_emu.int8_gemm, call.overload)
    check_one(call, "cpu", lambda: operator(**call.arguments), expected, typed=False)


# Errors --------------------------------------------------------------------------------------------------------------


def test_errors_are_those_of_the_cpu(backend):
    def call(ops, device, *, q=(2, 64), scale=(2,), zero_point=None, packed=(1, 1024), bias=None, n=16, **changed):
        tensors = {
            "q": torch.zeros(q, dtype=torch.int8),
            "scale": torch.ones(scale),
            "zero_point": None if zero_point is None else torch.zeros(zero_point, dtype=torch.int32),
            "packed": torch.zeros(packed, dtype=torch.int8),
            "w_scale": torch.ones((packed[0], 1, 16)),
            "bias": None if bias is None else torch.zeros(bias),
        }
        tensors = {key: None if t is None else t.to(device) for key, t in tensors.items()}
        return ops.int8_gemm(*tensors.values(), n, changed.get("out_dtype", torch.bfloat16))

    large, larger = (2, MAX_K_WITH_ZERO_POINT // 64 * 64 + 64), (2, MAX_K // 64 * 64 + 64)
    for wrong in (
        {"q": (2, 128)},
        {"scale": (3,)},
        {"n": 20},
        {"bias": (8,)},
        {"bias": (16,), "out_dtype": torch.int32},
        {"out_dtype": torch.int8},
        {"q": large, "packed": (1, 16 * large[1]), "zero_point": (2,)},
        {"q": larger, "packed": (1, 16 * larger[1])},
    ):
        texts = []
        for ops, device in ((torch.ops.qops, "cpu"), (backend.ops, backend.device)):
            with pytest.raises((ValueError, RuntimeError)) as caught:
                call(ops, device, **wrong)
            texts.append(str(caught.value))
        assert texts[0] == texts[1] and texts[0].startswith("qops.int8_gemm: "), (wrong, texts)


def test_packed_bytes_must_be_aligned_and_whole(backend):
    memory = backend.on_device(torch.zeros(4096, dtype=torch.int8))
    q, scale = backend.on_device(torch.zeros(2, 64, dtype=torch.int8)), backend.on_device(torch.ones(2))
    rest = (backend.on_device(torch.ones(1, 1, 16)), None, 16, torch.bfloat16)
    with pytest.raises(ValueError, match=r"packed must begin at a multiple of 16 bytes, got an address 4 past one"):
        backend.ops.int8_gemm(q, scale, None, memory[4:1028].view(1, 1024), *rest)
    with pytest.raises(ValueError, match=r"packed must begin at a multiple of 16 bytes"):
        backend.ops.int8_unpack(memory[4:1028].view(1, 1024), 16)
    with pytest.raises(ValueError, match=r"packed must hold a multiple of 64 columns of 16 elements a strip, got 1152"):
        backend.ops.int8_gemm(q, scale, None, memory[:1152].view(1, 1152), *rest)


# The emulator notices ------------------------------------------------------------------------------------------------


def test_every_synchronisation_is_missed_when_it_is_gone(emulated):
    backend = Backend(torch.ops.qops_emu, "cpu")
    problems = []
    for m, n, k in ((3, 136, 1096), (65, 136, 712)):
        w, inputs = make_weight(n, k, m), activations(m, k, m)
        problems.append((w, *inputs, by_contract(*inputs[:2], w, zero_point=inputs[2])))

    def is_right() -> bool:
        try:
            return all(
                torch.equal(product(backend, q, s, w, zero_point=z).view(torch.int16), want.view(torch.int16))
                for w, q, s, z, want in problems
            )
        except RuntimeError:  # a fault
            return False

    emulated.configure(1, POLICIES["prio"], "", 90, 2)
    assert is_right()
    places = [place for place in emulated.synchronisations() if "int8_gemm.cu" in place]
    assert len(places) == 6, places
    for place in places:
        missed = 0
        for seed in range(9):
            emulated.configure(seed, seed % 3, place, 90, 2)
            missed += not is_right()
        emulated.configure(1, POLICIES["prio"], "")
        assert missed > 0, f"{place}: nothing shows that it is there"
