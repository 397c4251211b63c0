"""int8_gemm on CUDA: plans, packed weights, and every kernel against exact integers, bit for bit.

The emulator asks for few multiprocessors, so that small problems use every tile, whole and cut along K.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
from collections import Counter

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import qops
from qops.ops.int8_gemm import MAX_K, MAX_K_WITH_ZERO_POINT, OUT_DTYPES
from qops.testing import FLOAT_DTYPES, Guarded, assert_bitwise, generator, random_activations, strided_rows
from tests.support.cuda import cuda_tools
from tests.support.cuda.cuda_backend import POLICIES, Backend, gpu
from tests.support.ops.contracts import mix_gate_up
from tests.support.ops.int8_gemm_oracle import activations, by_contract, codes, make_weight
from tests.support.ops.random_weights import assert_tensors_equal, empty_like, random_int8
from tests.support.properties.operators.int8_gemm import int8_gemm as int8_gemm_calls
from tests.support.properties.property_calls import check_one
from tests.support.properties.property_draws import HUGE, Sampler

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
# (N, K): strips and tiles of 128 rows that are and are not full, K below, at and beyond 64, odd multiples of 8.
SHAPES = ((8, 8), (16, 64), (24, 72), (120, 136), (128, 128), (136, 200), (264, 328))
# (M, N, K) where the plan for 3 multiprocessors cuts K, and where that for one does not: one for each tile of tokens.
SPLIT = ((5, 40, 4104), (16, 136, 4104), (31, 24, 6024), (50, 40, 8200), (100, 136, 8200))
WHOLE = tuple((m, 136, 200) for m in (8, 16, 32, 64, 128))


# Of a plan for one multiprocessor: tokens spread over tiles with room for more.
RAGGED = ((129, 24, 200), (257, 24, 200), (515, 24, 72), (53, 24, 200))
# Multiprocessors, and shared memory of a block: as A100, RTX 4090, H100, RTX 5090.
GPUS = ((108, 163 << 10), (128, 99 << 10), (132, 227 << 10), (170, 99 << 10))
# (N, K) of layers of Llama 3 8B and 70B, whole and shared by 2 and 8 GPUs, and of Qwen2.5 7B.
LAYERS = (
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (10240, 8192),
    (8192, 8192),
    (8192, 28672),
    (3584, 3584),
    (3584, 18944),
    (14336, 4096),
    (1280, 8192),
    (8192, 1024),
)


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> str:
    program = tmp_path_factory.mktemp("int8") / "plan"
    root = cuda_tools.ROOT
    options = ["-std=c++20", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all", f"-I{root / 'csrc'}"]
    cuda_tools.checked("g++", *options, str(root / "tests/support/cuda/int8_plan_probe.cpp"), "-o", str(program))
    return str(program)


def plan(probe: str, m: int, n: int, k: int, multiprocessors: int, shared_bytes: int = SHARED_BYTES[90]) -> list[int]:
    """Tokens of the kernel's tile, whether K is cut, blocks, bytes of weights under way, tokens that a tile has got."""
    arguments = map(str, (m, n, k, multiprocessors, shared_bytes))
    return [int(word) for word in cuda_tools.checked(probe, "plan", *arguments).split()]


def packed_by_hand(qweight: Tensor) -> Tensor:
    """What the layout of csrc/int8_layout.h says."""
    n, k = qweight.shape
    padded = torch.zeros(-(-n // 16) * 16, -(-k // 64) * 64, dtype=torch.int8)
    padded[:n, :k] = qweight
    strips = padded.view(padded.shape[0] // 16, 2, 8, padded.shape[1] // 32, 2, 4, 4)  # S, half, g, block, a / 2, t
    return strips.permute(0, 3, 2, 5, 4, 1, 6).reshape(padded.shape[0] // 16, 16 * padded.shape[1])


def product(backend: Backend, q, scale, w, bias=None, *, zero_point=None, out_dtype=torch.bfloat16, **more) -> Tensor:
    """By the operator of the backend, with a CPU's weight packed there; `more`: of an epilogue."""
    there = [backend.on_device(t) for t in (q, scale, zero_point, bias)]
    rows = w.canonical()["qweight"]
    packed = backend.ops.int8_pack(backend.on_device(mix_gate_up(rows) if w.mixed_gate_up else rows))
    args = (*there[:3], packed, backend.on_device(w.scales), there[3], w.out_features, out_dtype)
    if more:
        return backend.ops.int8_gemm.fused(*args, **{key: backend.on_device(t) for key, t in more.items()}).cpu()
    return backend.ops.int8_gemm(*args).cpu()


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
    """In full tiles and in some that have fewer tokens than they have room for."""
    every = (8, 16, 32, 64, 128)
    for rows in (0, 8):  # epilogues take pairs of 8 rows
        assert [plan(probe, m, n + rows, k, 3)[:2] for m, n, k in SPLIT] == [[tokens, 1] for tokens in every]
        assert [plan(probe, m, n + rows, k, 1)[:2] for m, n, k in WHOLE] == [[tokens, 0] for tokens in every]
    assert [plan(probe, m, n, k, 1)[0] for m, n, k in RAGGED] == [128, 128, 128, 64]
    assert [plan(probe, m, n, k, 1)[4] for m, n, k in RAGGED] == [72, 88, 104, 56]


def test_time_has_no_cliffs(probe):
    """By the model, one token more takes at most 1.21 times as long, 1.25 times where tiles no longer fit a GPU.
    It never takes less, but for the ninth: two tiles of tokens read the weights on twice as many multiprocessors."""
    for (multiprocessors, shared), (n, k) in itertools.product(GPUS, LAYERS):
        times = cuda_tools.checked(probe, "times", *map(str, (n, k, multiprocessors, shared, 2100))).split()
        for m, (before, after) in enumerate(itertools.pairwise(map(int, times)), start=1):
            fits = -(-m // 128) * -(-n // 128) <= multiprocessors
            what = f"{n}x{k} on {multiprocessors}: M = {m} {before}, M = {m + 1} {after}"
            assert after <= (1.25 if fits else 1.21) * before, what
            assert after >= (0.7 if m == 8 else 1) * before, what


def test_few_tokens_keep_every_multiprocessor_at_work(probe):
    """K is cut where tiles are too few: 70 % of the multiprocessors, which use up the memory's bandwidth, have work, if
    there is more than 8 MiB of it. At least 64 KiB of weights are on their way to each of an A100 and an H100."""
    for (arch, multiprocessors), (n, k) in itertools.product(((80, 108), (90, 132)), LAYERS):
        for m in (1, 8, 9, 16, 17, 32, 33, 48, 64):
            _, _, blocks, under_way, _ = plan(probe, m, n, k, multiprocessors, SHARED_BYTES[arch])
            assert blocks >= 0.7 * multiprocessors or n * k <= 8 << 20, (m, n, k)
            assert under_way >= 64 << 10, (m, n, k)


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


@pytest.mark.parametrize("kind, act_order", tuple(itertools.product(qops.Int8Weight.KINDS, (False, True))))
def test_weights_of_every_kind_come_back(backend, kind, act_order):
    """Offsets stand as scales do, in the order of the rows. No kernel multiplies with them there."""
    for seed, (n, k) in enumerate(((48, 80), (16, 16), (136, 208))):
        tensors, here = random_int8(n, k, 16, kind, act_order=act_order, seed=seed)
        dense, ids = here.dequantize(), torch.tensor([[n - 1, 0], [7, n // 2]])
        with gpu(backend):
            on_device = {key: backend.on_device(t) for key, t in tensors.items()}
            there = qops.Int8Weight.from_canonical(**on_device, kind=kind)
            assert_bitwise(there.packed.cpu(), packed_by_hand(tensors["qweight"]))
            for name in ("scales", "zeros", "perm"):
                if name in tensors:
                    assert_bitwise(getattr(there, name).cpu(), getattr(here, name), name)
            loaded = empty_like(there, backend.device)
            loaded.load_state_dict(there.state_dict())
            for other in (loaded, copy.deepcopy(there), pickle.loads(pickle.dumps(there))):
                assert_tensors_equal(dict(other.named_buffers()), dict(there.named_buffers()))
            mixed = [copy.deepcopy(there).mix_gate_up()] if n % 16 == 0 else []
            for one in (there, *mixed, qops.Int8Weight.cat(there.split([8, n - 8]))):
                assert_tensors_equal({key: t.cpu() for key, t in one.canonical().items()}, tensors)
                assert_bitwise(one.dequantize().cpu(), dense)
                assert_bitwise(one.rows(backend.on_device(ids)).cpu(), dense[ids])
            if kind != "symmetric" or act_order:
                q, scale = torch.ones(2, k, dtype=torch.int8), torch.ones(2)
                with pytest.raises(ValueError, match=r"^qops\.int8_gemm: weight must (be symmetric|have act_order)"):
                    qops.int8_gemm(backend.on_device(q), backend.on_device(scale), there)
            assert_bitwise(there.unpack().pack().packed.cpu(), packed_by_hand(tensors["qweight"]))


def test_a_move_to_another_type_of_device_changes_the_layout(each):
    if each.device == "cpu":
        pytest.skip("needs two types of device")
    tensors, here = random_int8(48, 80, 16, "offset", act_order=True)
    buffers = {key: t.clone() for key, t in here.named_buffers()}
    there = here.to(each.device)
    assert_bitwise(there.packed.cpu(), packed_by_hand(tensors["qweight"]))
    assert_tensors_equal(dict(there.cpu().named_buffers()), buffers)


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
def test_bits_follow_the_contract(backend, n, k):
    for seed, m in enumerate((1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 129)):
        assert_contract(backend, m, n, k, seed)


def test_every_small_number_of_tokens(backend):
    for m in range(1, 34):
        assert_contract(backend, m, 40, 136, m, (OUT_DTYPES[m % 4],))


@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_kernel(emulated, policy, arch):
    backend = Backend(torch.ops.qops_emu, "cpu")
    for multiprocessors, shapes in ((1, (*WHOLE, *RAGGED)), (3, SPLIT)):
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


# Epilogues -----------------------------------------------------------------------------------------------------------

SCALE, ZERO_POINT = torch.tensor(0.37), torch.tensor(-5, dtype=torch.int32)


def assert_epilogue(backend: Backend, m: int, n: int, k: int, name: str, pick: int, zero: bool) -> None:
    """One of them gives the bits of the operators that it saves; dtypes, bias and strides by `pick`."""
    w, (q, scale, zero_point) = make_weight(n, k, pick, FLOAT_DTYPES[pick % 3]), activations(m, k, pick)
    dtype = FLOAT_DTYPES[pick // 2 % 3]
    bias = None if pick % 4 == 0 else torch.randn(n + 1, generator=generator(pick)).to(FLOAT_DTYPES[pick % 3])[1:]
    more = {"zero_point": zero_point if zero else None, "out_dtype": dtype}
    y = qops.int8_gemm(q, scale, w, bias, **more)
    if name == "residual":
        residual = random_activations(m, n, dtype=dtype, seed=pick)
        want, extra = y + residual, {"residual": strided_rows(residual) if pick % 2 else residual}
    elif name == "silu_mul":
        want, extra = qops.silu_mul(y), {"silu_mul": True}
        w.mix_gate_up()
    else:
        z = ZERO_POINT if pick % 2 else None
        want, extra = qops.quantize_int8_static(y, SCALE, z), {"out_scale": SCALE, "out_zero_point": z}
    got = product(backend, q, scale, w, bias, **more, **extra)
    assert_bitwise(got, want, f"{name}, {m}x{n}x{k}, {pick}, zero_point {zero}")


@pytest.mark.parametrize("name", ("residual", "silu_mul", "out_scale"))
def test_epilogues_of_every_kernel(emulated, name):
    """Of each tile, with zero points and without: one of the two where blocks share K, the other where they do not."""
    backend = Backend(torch.ops.qops_emu, "cpu")
    for multiprocessors, shapes in ((1, (*WHOLE, *RAGGED)), (3, SPLIT)):
        for index, (m, n, k) in enumerate(shapes):
            rows = 8 if name == "silu_mul" or index % 2 else 0
            emulated.configure(index, index % 3, "", tuple(SHARED_BYTES)[index % 3], multiprocessors)
            zero = (index + len(name) + multiprocessors // 2) % 2 == 0
            assert_epilogue(backend, m, n + rows, k, name, index + 3 * multiprocessors, zero)
    emulated.configure(1, POLICIES["prio"], "")


def test_epilogues_of_small_products(backend):
    for pick, (name, n, m) in enumerate(
        itertools.product(("residual", "silu_mul", "out_scale"), (16, 24, 48, 144), (1, 7, 9, 34))
    ):
        if name != "silu_mul" or n % 16 == 0:
            for k in (0, 72) if m == 7 else (72,):
                assert_epilogue(backend, m, n, k, name, pick, pick % 3 == 0)


def test_epilogues_of_special_values(backend):
    w, (q, scale, _) = make_weight(48, 72, 0), activations(9, 72, 0)
    scale[2:9] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3e38])
    mixed = qops.Int8Weight.from_canonical(**w.canonical()).mix_gate_up()
    for dtype in FLOAT_DTYPES:
        y = by_contract(q, scale, w, out_dtype=dtype)
        more = {"out_dtype": dtype}
        assert_bitwise(product(backend, q, scale, w, **more, residual=y), y + y, "residual")
        assert_bitwise(product(backend, q, scale, mixed, **more, silu_mul=True), qops.silu_mul(y), "silu_mul")
        got = product(backend, q, scale, w, **more, out_scale=SCALE)
        assert_bitwise(got, qops.quantize_int8_static(y, SCALE), "int8")


def test_outputs_of_epilogues_begin_anywhere(backend):
    """Four columns are stored at a time, or one by one; and a residual may be the output itself."""
    w, (q, scale, _) = make_weight(48, 200, 0), activations(11, 200, 0)
    for dtype in FLOAT_DTYPES:
        y = by_contract(q, scale, w, out_dtype=dtype)
        there = (
            *map(backend.on_device, (q, scale, None)),
            backend.ops.int8_pack(backend.on_device(w.canonical()["qweight"])),
        )
        rest = (backend.on_device(w.scales), None, 48, dtype)
        codes = qops.quantize_int8_static(y, SCALE)
        for extra, want in (({"residual": y}, y + y), ({"out_scale": SCALE}, codes)):
            extra = {key: backend.on_device(t) for key, t in extra.items()}
            for start in (0, 1):
                out = backend.on_device(torch.full((11 * 48 + 1,), 77, dtype=want.dtype))[start:][: 11 * 48].view(
                    11, 48
                )
                backend.ops.int8_gemm.fused_out(*there, *rest, **extra, out=out)
                assert_bitwise(out.cpu(), want, f"{dtype}, {start}")
        stream = backend.on_device(y.clone())
        backend.ops.int8_gemm.fused_out(*there, *rest, residual=stream, out=stream)
        assert_bitwise(stream.cpu(), y + y, "in place")


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


# All that kernels wait for, and all that is counted for it.
SYNCHRONISATIONS = {
    "ptx::cp_async_commit();": 2,  # before the loop and in it
    "ptx::cp_async_wait<int8::kDeepStages - 2>();": 1,
    "ptx::cp_async_wait<T::kStages - 2>();": 1,
    "__syncthreads();": 1,
    "__syncwarp();": 2,  # before and after eight tokens are read from where they are staged
    "ptx::griddepcontrol_wait();": 1,  # of the kernel that adds
}


def test_every_synchronisation_is_missed_when_it_is_gone(emulated):
    backend = Backend(torch.ops.qops_emu, "cpu")
    problems = []
    # By the architecture, two blocks on a multiprocessor or one with a deep ring; and a tile that blocks share.
    for where, m, n, k in (
        ((90, 2), 3, 136, 1096),
        ((89, 2), 3, 136, 1096),
        ((90, 2), 65, 136, 712),
        ((90, 8), 8, 32, 1024),
    ):
        w, inputs = make_weight(n, k, m), activations(m, k, m)
        problems.append((where, w, *inputs, by_contract(*inputs[:2], w, zero_point=inputs[2])))

    def is_right(seed: int, left_out: str) -> bool:
        try:
            for where, w, q, s, z, want in problems:
                emulated.configure(seed, seed % 3, left_out, *where)
                got = product(backend, q, s, w, zero_point=z)
                if not torch.equal(got.view(torch.int16), want.view(torch.int16)):
                    return False
        except RuntimeError:  # a fault
            return False
        return True

    assert is_right(2, "")
    places = [place for place in emulated.synchronisations() if place.startswith("int8_")]

    def statement(place: str) -> str:
        file, _, line = place.partition(":")
        return (cuda_tools.ROOT / "csrc/cuda" / file).read_text().splitlines()[int(line) - 1].strip()

    found = Counter(map(statement, places))
    assert found == SYNCHRONISATIONS
    for place in places:
        assert not all(is_right(seed, place) for seed in range(9)), f"{place}: nothing shows that it is there"
    emulated.configure(1, POLICIES["prio"], "")
