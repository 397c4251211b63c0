"""int4_int8_gemm on CUDA: the bits of the CPU, of every kernel, kind, group size, epilogue and cut of K.

The CPU's bits are the contract's (tests/ops/test_int4_int8_gemm.py).
"""

from __future__ import annotations

import collections
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor

import qops
from qops.ops.int4_gemm import MAX_GROUP
from qops.testing import (
    FLOAT_DTYPES,
    Guarded,
    assert_bitwise,
    generator,
    random_activations,
)
from tests.support.cuda import cuda_tools
from tests.support.cuda.cuda_backend import Backend, configure, gpu, made_there
from tests.support.cuda.int4_plans import Gpu, Plan, Question, int8_plans
from tests.support.ops.random_weights import KINDS, random_int4
from tests.support.properties.operators.int4_int8_gemm import int4_int8_gemm as int4_int8_gemm_calls
from tests.support.properties.property_calls import check_one
from tests.support.properties.property_draws import HUGE, Sampler

KIB = 1024
SHARED = {80: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB}  # of a block, by the emulator's architecture
# Every way that a call can take, by what chooses it: (M, N, K, multiprocessors, arch) -> (tokens of the kernel, whether
# blocks share K, whether some tiles are whole).
PLANS = {
    (3, 136, 576, 1, 90): (16, False, True),
    (3, 24, 2304, 3, 89): (16, True, False),
    (20, 24, 576, 1, 89): (32, False, True),
    (20, 24, 2304, 3, 80): (32, True, False),
    (64, 24, 576, 1, 90): (64, False, True),
    (40, 24, 2304, 3, 89): (64, True, False),
    (20, 264, 2304, 2, 89): (64, True, True),
    (150, 24, 576, 2, 80): (128, False, True),
    (150, 24, 2304, 8, 90): (128, True, False),
    (150, 136, 2304, 3, 80): (128, True, True),
}
SCALE, ZERO_POINT = torch.tensor([0.37]), torch.tensor([-5], dtype=torch.int32)


def plan_of(m: int, n: int, k: int, group_size: int, kind: str, multiprocessors: int, arch: int) -> Plan:
    gpu = Gpu(multiprocessors, SHARED[arch], arch)
    (plan,) = int8_plans([Question(m, n, k, group_size, KINDS.index(kind), gpu)])
    return plan


def activations(m: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """q and scale: codes of the whole range, a row of each end, a scale that is negative."""
    rng = generator(seed + 100)
    q = torch.randint(-128, 128, (m, k), generator=rng, dtype=torch.int8)
    scale = torch.rand(m, generator=rng) * 0.1
    if m > 2:
        q[0], q[1], scale[2] = -128, 127, -scale[2]
    return q, scale


def pair(backend: Backend, n: int, k: int, group_size: int, kind: str, **more: Any):
    """A weight on the backend, and the same one on the CPU."""
    tensors, here = random_int4(n, k, group_size, kind, **more)
    with gpu(backend):
        return made_there(backend, tensors, kind), here


def call(backend: Backend, q: Tensor, scale: Tensor, w: qops.Int4Weight, bias: Tensor | None = None, **more) -> Tensor:
    """The operator itself; its result on the CPU."""
    there = [backend.on_device(t) for t in (q, scale)]
    weight = (w.packed, w.scales, w.zeros, w.perm, backend.on_device(bias))
    sizes = (w.out_features, w.group_size, KINDS.index(w.kind), more.pop("out_dtype", torch.bfloat16))
    operator = backend.ops.int4_int8_gemm
    if more:
        more = {name: backend.on_device(value) for name, value in more.items()}
        return operator.fused(*there, *weight, *sizes, **more).cpu()
    return operator(*there, *weight, *sizes).cpu()


# Products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel(emulated, emulator, kind):
    for index, (shape, expected) in enumerate(PLANS.items()):
        m, n, k, multiprocessors, arch = shape
        for group_size in (48, (64, 192, 576)[index % 3]):
            pick = index + KINDS.index(kind)
            more = {"scale_dtype": FLOAT_DTYPES[pick % 3], "act_order": pick % 4 == 0, "seed": index}
            w, here = pair(emulator, n, k, group_size, kind, **more)
            plan = plan_of(m, n, k, group_size, kind, multiprocessors, arch)
            assert (plan.tokens, plan.is_split, plan.whole > 0) == expected, (shape, group_size)
            configure(emulated, seed=index, policy=index % 3, arch=arch, multiprocessors=multiprocessors)
            q, scale = activations(m, k, index)
            bias = torch.randn(n, generator=generator(1)).to(FLOAT_DTYPES[pick % 3]) if pick % 2 else None
            out_dtype = FLOAT_DTYPES[index % 3]
            got = call(emulator, q, scale, w, bias, out_dtype=out_dtype)
            want = qops.int4_int8_gemm(q, scale, here, bias, out_dtype=out_dtype)
            assert_bitwise(got, want, f"{shape}, {here}, {out_dtype}")


@pytest.mark.parametrize("kind", KINDS)
def test_one_group_may_be_cut_anywhere(emulated, emulator, kind):
    """Its sum is an integer: where one block has not got all of it, integers are handed on."""
    for index, (m, k) in enumerate(((3, 2056), (20, 4608), (40, 256), (100, 2056))):
        w, here = pair(emulator, 40, k, -1, kind, scale_dtype=FLOAT_DTYPES[index % 3], seed=index)
        q, scale = activations(m, k, index)
        want = qops.int4_int8_gemm(q, scale, here)
        seen = set()
        for multiprocessors in (1, 8, 132):
            plan = plan_of(m, 40, k, k, kind, multiprocessors, 90)
            seen.add(plan.k_parts)
            configure(emulated, seed=index, policy=index % 3, multiprocessors=multiprocessors)
            assert_bitwise(call(emulator, q, scale, w), want, str(plan))
        assert (max(seen) > 1) == (kind in ("symmetric", "zero_point") and k > 256), (m, k, seen)


@pytest.mark.parametrize("m", [*range(1, 34), 64, 65, 129])
def test_adversarial_shapes(backend, m):
    """Odd multiples of 8, all group sizes, kinds and dtypes in turn, with bias and permutation."""
    turns = itertools.product(
        (8, 24, 40, 136), ((8, -1), (24, -1), (72, -1), (80, 16), (144, 48), (336, 112), (704, 32))
    )
    for index, (n, (k, group_size)) in enumerate(turns):
        if (index + m) % 4:
            continue
        pick = index // 4 + m
        more = {"scale_dtype": FLOAT_DTYPES[pick % 3], "act_order": pick % 5 == 0, "seed": pick}
        w, here = pair(backend, n, k, group_size, KINDS[pick % 4], **more)
        q, scale = activations(m, k, pick)
        bias = torch.randn(n, generator=generator(pick)).to(FLOAT_DTYPES[pick % 3]) if pick % 3 else None
        out_dtype = FLOAT_DTYPES[pick // 2 % 3]
        want = qops.int4_int8_gemm(q, scale, here, bias, out_dtype=out_dtype)
        assert_bitwise(call(backend, q, scale, w, bias, out_dtype=out_dtype), want, f"M = {m}, {here}")


def test_every_group_size(backend):
    """Those up to 256 are floats above a number where their sums begin, larger ones are converted."""
    for k in (256, 240, 1024):
        for index, group_size in enumerate(g for g in range(16, k + 1, 16) if k % g == 0):
            w, here = pair(backend, 40, k, group_size, KINDS[index % 4], seed=index)
            for m in (3, 40):
                q, scale = activations(m, k, index)
                assert_bitwise(call(backend, q, scale, w), qops.int4_int8_gemm(q, scale, here), f"{here}, M = {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_codes_in_groups_of_every_length(backend, kind):
    """Sums of 16 * 128 a product, at the ends of what the ways to a float32 hold."""
    for group_size, k in (
        (16, 64),
        (128, 256),
        (240, 480),
        (256, 512),
        (272, 544),
        (4096, 4096),
        (-1, MAX_GROUP // 8 * 8),
    ):
        groups = 1 if group_size < 0 else k // group_size
        codes = torch.tensor([0, 15, 0, 15, 8, 7, 0, 0], dtype=torch.uint8)
        zeros = torch.tensor([16, 0, 16, 0, 8, 7, 0, 16])[:, None].repeat(1, groups)
        zeros = {"symmetric": None, "zero_point": zeros.byte()}.get(kind, 4.0 * zeros)
        qweight = (codes * 17)[:, None].repeat(1, k // 2)
        qweight[3:5, ::2] = 0xF0  # alternating signs
        tensors = {"qweight": qweight, "scales": torch.full((8, groups), 0.37)}
        tensors |= {} if zeros is None else {"zeros": zeros}
        here = qops.Int4Weight.from_canonical(**tensors, kind=kind, in_features=k)
        with gpu(backend):
            w = made_there(backend, tensors, kind)
        q = torch.tensor([-128, 127], dtype=torch.int8)[:, None].repeat(1, k)
        scale = torch.tensor([0.01, 0.02])
        got = call(backend, q, scale, w, out_dtype=torch.float32)
        assert_bitwise(got, qops.int4_int8_gemm(q, scale, here, out_dtype=torch.float32), f"{here}")


def test_special_scales(backend):
    """Of rows and of groups: NaN, infinite, zero, the least that there are."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3e38, -1e-40])
    bias = torch.randn(24, generator=generator(0))
    bias[3] = float("nan")
    for kind, group_size in itertools.product(KINDS, (16, 32, 64)):
        tensors, _ = random_int4(24, 80 if group_size == 16 else 64, group_size, kind, scale_dtype=torch.float32)
        tensors["scales"][1:7, 0] = torch.tensor([1e-45, -3e38, -0.0, 1e38, 3e-39, -1e-40])
        tensors["scales"][8:10, -1] = torch.tensor([3e38, 1e-45])
        here = qops.Int4Weight.from_canonical(**tensors, kind=kind)
        with gpu(backend):
            w = made_there(backend, tensors, kind)
        q, _ = activations(8, here.in_features, 0)
        for dtype, b in itertools.product(FLOAT_DTYPES, (None, bias)):
            got = call(backend, q, special, w, b, out_dtype=dtype)
            want = qops.int4_int8_gemm(q, special, here, b, out_dtype=dtype)
            assert_bitwise(got, want, f"{dtype}, {here}, bias {b is not None}")


def test_sizes_of_zero(backend):
    for m, n, k in itertools.product((0, 2, 70), (0, 24), (0, 64)):
        tensors = {"qweight": torch.zeros(n, k // 2, dtype=torch.uint8), "scales": torch.ones(n, min(k, 1))}
        bias = torch.arange(n, dtype=torch.float32)
        with gpu(backend):
            w = made_there(backend, tensors, "symmetric")
        q = torch.ones(m, k, dtype=torch.int8)
        got = call(backend, q, torch.ones(m), w, bias, out_dtype=torch.float32)
        assert_bitwise(got, (bias - 8 * k).expand(m, n).contiguous(), f"{m}x{n}x{k}")


def test_rows_do_not_depend_on_the_plan(emulated, emulator):
    """Nor on their number and place, how many blocks share K, stages of the rings and seeds."""
    for index, (n, k, group_size) in enumerate(((40, 4608, 64), (24, 4096, 512), (200, 576, 48), (72, 2048, -1))):
        w, here = pair(emulator, n, k, group_size, KINDS[index], seed=index)
        q, scale = activations(130, k, index)
        want, seen = qops.int4_int8_gemm(q, scale, here), set()
        for arch, multiprocessors, m in itertools.product(SHARED, (1, 3, 132), (1, 11, 40, 130)):
            plan = plan_of(m, n, k, w.group_size, KINDS[index], multiprocessors, arch)
            if plan in seen:
                continue
            seen.add(plan)
            configure(emulated, seed=len(seen), policy=len(seen) % 3, arch=arch, multiprocessors=multiprocessors)
            assert_bitwise(call(emulator, q[130 - m :], scale[130 - m :], w), want[130 - m :], str(plan))
        assert len({(plan.tokens, plan.k_parts, plan.stages) for plan in seen}) >= 6


@given(data=st.data())
def test_random_valid_calls(emulated, data):
    drawn = int4_int8_gemm_calls(Sampler(lambda low, high: data.draw(st.integers(low, high))))
    if drawn.faults or drawn.grad or any(t.is_meta or max(t.shape, default=0) >= HUGE for _, t in drawn.tensors()):
        return
    note(str(drawn))
    a = drawn.arguments
    seed, policy, multiprocessors = (data.draw(st.integers(low, high)) for low, high in ((0, 1000), (0, 2), (1, 4)))
    emulated.configure(seed, policy, "", 90, multiprocessors)
    with torch.no_grad():
        expected = drawn.expected(a)
    strips, n = a["packed"].shape[0], a["out_features"]
    # Whole strips, so that rows of padding stay what they are.
    codes = torch.ops.qops.int4_unpack(a["packed"], 16 * strips)
    a["packed"] = torch.ops.qops_emu.int4_pack(codes[:n].contiguous())
    order = torch.arange(16).view(2, 8).T.flatten()  # rows of a lane side by side
    a["scales"] = a["scales"][..., order].contiguous()
    if a["zeros"] is not None:
        a["zeros"] = a["zeros"][..., order].contiguous()
        a["zeros"] = a["zeros"] if a["kind"] == 1 else a["zeros"].float()
    operator = getattr(torch.ops.qops_emu.int4_int8_gemm, drawn.overload)
    check_one(drawn, "cpu", lambda: operator(**a), expected, typed=False)


# Arguments -----------------------------------------------------------------------------------------------------------


def test_rows_that_begin_anywhere(backend):
    """At multiples of 16 bytes they are read as they are, else from a copy."""
    for m in (3, 40, 70):
        w, here = pair(backend, 40, 144, 48, "offset")
        memory, scale = activations(m, 200, m)
        want = qops.int4_int8_gemm(memory[:, 16:160].clone(), scale, here)
        there = Backend(backend.ops, "cpu") if backend.device == "cpu" else backend
        assert_bitwise(call(there, memory[:, 16:160].clone(), scale, w), want, "dense")
        for start in (16, 1, 2, 8):
            shifted = torch.zeros(m, 400, dtype=torch.int8)[:, start : start + 144].copy_(memory[:, 16:160])
            assert_bitwise(call(there, shifted, scale, w), want, f"{start} bytes on")
        q = memory[:, 16:160].expand(2, m, 144).transpose(0, 1)
        got = call(there, q, scale[:, None].expand(m, 2), w)
        assert_bitwise(got, want[:, None].expand(m, 2, 40).contiguous(), "[M, 2, K]")


def test_one_scale_for_all_and_scales_that_lie_apart(backend):
    w, here = pair(backend, 24, 72, -1, "zero_point", act_order=True)
    q, scale = activations(7, 72, 0)
    want = qops.int4_int8_gemm(q, scale[3].expand(7), here)
    for one in (scale[3], scale[3].expand(7)):
        assert_bitwise(call(backend, q, one, w), want, str(list(one.shape)))
    apart = torch.stack((scale, -scale), 1)[:, 0]
    assert_bitwise(call(backend, q, apart, w), qops.int4_int8_gemm(q, scale, here), "apart")


def test_permutations_and_what_they_must_not_read(backend):
    """An index out of range is seen when it is too late for an error: the rows' scales take NaN."""
    for m in (2, 40):
        w, here = pair(backend, 40, 128, 32, "zero_point", act_order=True)
        q, scale = activations(m, 128, m)
        assert_bitwise(call(backend, q, scale, w), qops.int4_int8_gemm(q, scale, here))
        for bad in (-1, 128, -(2**31), 2**31 - 1):
            perm = w.perm.clone()
            perm[5] = bad
            weight = (w.packed, w.scales, w.zeros, perm)
            there = [backend.on_device(t) for t in (q, scale)]
            y = backend.ops.int4_int8_gemm(*there, *weight, None, 40, 32, 1, torch.float16)
            assert bool(y.isnan().all()), bad


def test_offsets_beyond_int32(emulator, tmp_path):
    stride = 2**30 + 64  # the third row starts behind byte 2^31; the file is sparse
    memory = torch.from_file(str(tmp_path / "q"), shared=True, size=2 * stride + 64, dtype=torch.int8)
    q, (values, scale) = memory.as_strided((3, 64), (stride, 1)), activations(3, 64, 0)
    q.copy_(values)
    w, here = pair(emulator, 16, 64, 32, "offset")
    assert_bitwise(call(emulator, q, scale, w), qops.int4_int8_gemm(values, scale, here))


@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES, ids=str)
def test_outputs_and_biases_that_begin_anywhere(backend, out_dtype):
    for m, n in itertools.product((2, 20, 66), (24, 136)):
        w, here = pair(backend, n, 64, 64, "symmetric")
        q, scale = activations(m, 64, m)
        memory = torch.randn(n + 1, generator=generator(n)).to(out_dtype)
        want = qops.int4_int8_gemm(q, scale, here, memory[1:], out_dtype=out_dtype)
        weight = (w.packed, w.scales, w.zeros, w.perm, backend.on_device(memory)[1:], n, 64, 0)
        there = [backend.on_device(t) for t in (q, scale)]
        out = Guarded(backend.on_device(torch.full((m, n), 77, dtype=out_dtype)))
        backend.ops.int4_int8_gemm.out(*there, *weight, out=out.tensor)
        out.check()
        assert_bitwise(out.tensor.cpu(), want, f"{m}x{n}")
        odd = backend.on_device(torch.full((m * n + 1,), 77, dtype=out_dtype))[1:].view(m, n)
        backend.ops.int4_int8_gemm.out(*there, *weight, out=odd)
        assert_bitwise(odd.cpu(), want, f"{m}x{n}, one element further")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_epilogues_round_where_the_operators_do(emulated, backend, dtype):
    """Each equals the chain of operators bit for bit, in every kernel and behind a split K."""
    shapes = [*PLANS, (3, 64, 128, 132, 90), (2, 32, 4608, 132, 90)]
    for index, (m, n, k, multiprocessors, arch) in enumerate(shapes):
        n = -(-n // 16) * 16
        if backend.device == "cpu":
            configure(emulated, seed=index, policy=index % 3, arch=arch, multiprocessors=multiprocessors)
        w, here = pair(backend, n, k, (64, 32, k)[index % 3], KINDS[index % 4], seed=index)
        q, scale = activations(m, k, index)
        bias = torch.randn(n + 1, generator=generator(1))[1:] if index % 3 else None
        more = {"out_dtype": dtype}
        y = qops.int4_int8_gemm(q, scale, here, bias, **more)
        residual = random_activations(m, 2 * n, dtype=dtype, seed=5)[:, 3 : n + 3]
        assert_bitwise(call(backend, q, scale, w, bias, **more, residual=residual), y + residual, "residual")
        dense = residual.clone()
        assert_bitwise(call(backend, q, scale, w, bias, **more, residual=dense), y + dense, "dense residual")
        static = {"out_scale": SCALE, "out_zero_point": ZERO_POINT if index % 2 else None}
        want = qops.quantize_int8_static(y, SCALE, static["out_zero_point"])
        assert_bitwise(call(backend, q, scale, w, bias, **more, **static), want, "int8")
        with gpu(backend):
            mixed = w.mix_gate_up()
        assert_bitwise(call(backend, q, scale, mixed, bias, **more, silu_mul=True), qops.silu_mul(y), "silu_mul")
    if backend.device == "cpu":
        configure(emulated)


def test_a_residual_may_be_the_output(backend):
    w, here = pair(backend, 48, 200, -1, "symmetric")
    q, scale = activations(11, 200, 0)
    y = qops.int4_int8_gemm(q, scale, here)
    there = [backend.on_device(t) for t in (q, scale)]
    stream = backend.on_device(y.clone())
    weight = (w.packed, w.scales, w.zeros, w.perm, None, 48, 200, 0, torch.bfloat16)
    backend.ops.int4_int8_gemm.fused_out(*there, *weight, residual=stream, out=stream)
    assert_bitwise(stream.cpu(), y + y)


def test_float_rows_become_int8_on_the_way(backend):
    """int4_gemm(activation="int8"), from float32 too, which int4_gemm itself does not take on a GPU."""
    w, here = pair(backend, 40, 160, 32, "zero_point")
    for dtype, rule, m in itertools.product(FLOAT_DTYPES, ("127", "torchao"), (3, 33)):
        x = random_activations(m, 160, dtype=dtype, seed=m)
        with gpu(backend):
            got = qops.int4_gemm(backend.on_device(x), w, activation="int8", rule=rule).cpu()
        assert_bitwise(got, qops.int4_gemm(x, here, activation="int8", rule=rule), f"{dtype} {rule} {m}")


# What the emulator sees ----------------------------------------------------------------------------------------------


def test_bytes_of_one_row(emulated, emulator):
    """Everything is read once: within 3 % of what packed weight, scales, zeros and x take."""
    for n, k, group_size, kind in (
        (128, 1024, 128, "symmetric"),
        (128, 2048, 64, "zero_point"),
        (128, 1024, 32, "offset"),
    ):
        w, _ = pair(emulator, n, k, group_size, kind)
        configure(emulated, multiprocessors=1)
        before = emulated.copied_bytes()
        call(emulator, *activations(1, k, 0), w)
        tensors = [t for t in (w.packed, w.scales, w.zeros) if t is not None]
        least = sum(t.numel() * t.element_size() for t in tensors) + k
        # Of eight tokens that a warp copies, those that there are not are the last one once more.
        assert least <= emulated.copied_bytes() - before <= 1.03 * least + 7 * k, (n, k, group_size, kind)


# Between the copies of a stage and what reads them; between slices or tiles and what becomes of their sums, before and
# behind.
SYNCHRONISATIONS = {
    "ptx::cp_async_commit();": 1,
    "__syncthreads();": 5,
    "ptx::griddepcontrol_wait();": 1,
}


def test_every_synchronisation_is_missed_when_it_is_gone(emulated, emulator):
    problems = []
    calls = (
        (3, 136, 1024, 64, 1, 90),
        (20, 304, 1024, 64, 1, 89),
        (40, 136, 2304, 64, 132, 80),
        (100, 24, 4608, 64, 8, 90),
        (70, 304, 128, 64, 1, 90),  # slices of no columns, of whole tiles and of shared ones
        (20, 24, 4608, 1536, 3, 80),
    )
    for index, (m, n, k, group_size, multiprocessors, arch) in enumerate(calls):
        w, here = pair(emulator, n, k, group_size, "offset", seed=index)
        inputs = activations(m, k, index)
        problems.append((multiprocessors, arch, w, *inputs, qops.int4_int8_gemm(*inputs, here)))
    w, here = pair(emulator, 40, 4096, 64, "symmetric", act_order=True)
    w.perm[-1] = -1  # found by the last threads of a row
    inputs = activations(3, 4096, 9)
    problems.append((1, 90, w, *inputs, torch.full((3, 40), float("nan")).bfloat16()))

    def is_right(seed: int, left_out: str) -> bool:
        try:
            for multiprocessors, arch, w, q, scale, want in problems:
                emulated.configure(seed, seed % 3, left_out, arch, multiprocessors)
                got = call(emulator, q, scale, w)
                if not torch.equal(got.nan_to_num(7), want.nan_to_num(7)):
                    return False
        except RuntimeError:  # a fault
            return False
        return True

    assert is_right(2, "")
    places = [place for place in emulated.synchronisations() if place.startswith("int4_int8_")]

    def statement(place: str) -> str:
        file, _, line = place.partition(":")
        return (cuda_tools.ROOT / "csrc/cuda" / file).read_text().splitlines()[int(line) - 1].partition("//")[0].strip()

    assert collections.Counter(map(statement, places)) == SYNCHRONISATIONS
    for place in places:
        assert not all(is_right(seed, place) for seed in range(9)), f"{place}: nothing shows that it is there"
