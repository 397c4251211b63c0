"""int4_gemm on a GPU, in the emulator and on one: against float64, and against its own order of sums bit by bit."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import qops
from qops.ops.int4_gemm import int4_gemm_ref
from qops.testing import (
    FLOAT_DTYPES,
    assert_bitwise,
    assert_within,
    generator,
    random_activations,
    strided_rows,
    weight_only_bound,
)
from tests.support.cuda.cuda_backend import POLICIES, Backend, configure, gpu, made_there
from tests.support.cuda.int4_plans import DECODE, DENSE, TILED, Gpu, Plan, Question, plans
from tests.support.ops.random_weights import KINDS, SCALE_DTYPES, random_int4
from tests.support.ops.weight_only_oracle import fma

DTYPES = (torch.float16, torch.bfloat16)
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # of a block, by the emulator's architecture
# Every kernel that a call can lead to, by the shape, the multiprocessors and the architecture that choose it:
# (M, N, K, multiprocessors, arch) -> (kind of plan, tokens of a tile, whether blocks share K, whether some tiles are
# whole).
PLANS = {
    (8, 200, 576, 3, 90): (DECODE, 8, False, False),
    (5, 24, 16128, 132, 90): (DECODE, 8, True, False),
    (16, 200, 576, 3, 80): (DECODE, 16, False, False),
    (13, 24, 16128, 132, 80): (DECODE, 16, True, False),
    (24, 200, 576, 3, 90): (DECODE, 24, False, False),
    (17, 24, 4608, 132, 80): (DECODE, 24, True, False),
    (28, 264, 576, 1, 90): (TILED, 32, False, True),
    (27, 136, 2304, 132, 89): (TILED, 32, True, False),
    (40, 264, 576, 2, 80): (TILED, 64, False, True),
    (33, 264, 2304, 2, 90): (TILED, 64, True, True),
    (33, 136, 4608, 8, 80): (TILED, 64, True, False),
    (150, 264, 576, 3, 90): (TILED, 128, False, True),
}


def plan_of(
    m: int, n: int, k: int, group_size: int, kind: str, multiprocessors: int, arch: int, may_round: bool = False
) -> Plan:
    gpu = Gpu(multiprocessors, SHARED[arch], arch)
    (plan,) = plans([Question(m, n, k, group_size, KINDS.index(kind), gpu, may_round)])
    return plan


def call(backend: Backend, x: Tensor, w: qops.Int4Weight, bias: Tensor | None = None, **more: Any) -> Tensor:
    """The operator itself; its result on the CPU."""
    weight = (w.packed, w.scales, w.zeros, w.perm)
    arguments = map(backend.on_device, (bias, w.out_features, w.group_size, KINDS.index(w.kind)))
    more = {name: backend.on_device(value) for name, value in more.items()}
    return backend.ops.int4_gemm(backend.on_device(x), *weight, *arguments, **more).cpu()


def pair(backend: Backend, n: int, k: int, group_size: int, kind: str, **more: Any):
    """A weight on the backend, and the same one on the CPU."""
    tensors, here = random_int4(n, k, group_size, kind, **more)
    with gpu(backend):
        return made_there(backend, tensors, kind), here


def assert_right(y: Tensor, x: Tensor, w: qops.Int4Weight, bias: Tensor | None = None, **route: torch.dtype) -> None:
    bound = weight_only_bound(x, w, bias, gpu=True, **route)
    assert_within(y, int4_gemm_ref(x, w, bias), bound, f"{w} M = {x.shape[:-1].numel()} {x.dtype}")


# Accuracy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel(emulated, emulator, dtype, kind):
    for index, (shape, expected) in enumerate(PLANS.items()):
        m, n, k, multiprocessors, arch = shape
        if kind in ("float_zero", "offset") and expected[1] == 128:
            continue  # has no kernel
        # Both, over kinds and dtypes, but for the kernel that has no fine groups.
        is_fine = expected[1] != 24 and (index + KINDS.index(kind) + DTYPES.index(dtype)) % 2 == 0
        group_size = 48 if is_fine else (64, 192, k)[index % 3]
        w, here = pair(emulator, n, k, group_size, kind, scale_dtype=SCALE_DTYPES[index % 3], seed=index)
        plan = plan_of(m, n, k, group_size, kind, multiprocessors, arch)
        assert (plan.kind, plan.tokens, plan.is_split, plan.whole > 0) == expected, (shape, group_size)
        configure(emulated, seed=index, policy=index % 3, arch=arch, multiprocessors=multiprocessors)
        x = random_activations(m, k, dtype=dtype, seed=index)
        assert_right(call(emulator, x, w, batch_invariant=True), x, here)


def assert_rounded_weight(y: Tensor, x: Tensor, w: qops.Int4Weight, bias: Tensor | None) -> None:
    """One rounding away from the product with the weight that int4_dequantize gives on a CPU."""
    weight = (w.packed, w.scales, w.zeros, w.out_features, w.group_size, KINDS.index(w.kind))
    if x.dtype == torch.bfloat16:
        rounded = torch.ops.qops.int4_dequantize(*weight, torch.bfloat16).float()
    else:
        exact = torch.ops.qops.int4_dequantize(*weight, torch.float32)
        factors = 2 ** (14 - torch.frexp(exact.abs().amax(1, keepdim=True))[1])
        rounded = (exact * factors).half().float() / factors
    exact = (x if w.perm is None else x[:, w.perm.long()]).float() @ rounded.T
    exact = exact if bias is None else exact + bias
    one_rounding, order_of_sums = torch.finfo(x.dtype).eps * exact.abs(), 1e-6 * float(exact.abs().max())
    assert bool(((y.float() - exact).abs() <= one_rounding + order_of_sums).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_through_cublas(emulated, emulator, dtype, kind):
    """Weights are rounded to the dtype of x; what comes after the product is the same."""
    configure(emulated, multiprocessors=1)
    shapes = ((300, 144, 576, 64), (300, 48, 336, 112))
    for index, ((m, n, k, group_size), scale_dtype) in enumerate(itertools.product(shapes, SCALE_DTYPES)):
        plan = plan_of(m, n, k, group_size, kind, 1, 90, may_round=True)
        assert (plan.kind, plan.strips, plan.rows) == (DENSE, n // 16, m)
        w, here = pair(emulator, n, k, group_size, kind, act_order=index % 2 == 0, scale_dtype=scale_dtype, seed=n)
        wide = random_activations(m, k + 24, dtype=dtype, seed=index)
        x = wide[:, 8 : k + 8].clone()
        bias = torch.randn(n, generator=generator(1))
        y = call(emulator, x, w, bias)
        assert_rounded_weight(y, x, here, bias)
        assert_right(y, x, here, bias, rounded_to=dtype)
        assert_bitwise(call(emulator, wide[:, 8 : k + 8], w, bias), y, "columns of a wider tensor")
        if index % 3:
            continue
        residual = random_activations(m, n, dtype=dtype, seed=5)
        assert_bitwise(call(emulator, x, w, bias, residual=residual), y + residual, "residual")
        scale = torch.tensor([0.37])
        assert_bitwise(call(emulator, x, w, bias, out_scale=scale), qops.quantize_int8_static(y, scale), "int8")
        with gpu(emulator):
            mixed = w.mix_gate_up()
        assert_bitwise(call(emulator, x, mixed, bias, silu_mul=True), qops.silu_mul(y), "silu_mul")
        # Rows of several strides have none that cuBLAS could take.
        twice = torch.stack((x, x)).transpose(0, 1)
        assert_bitwise(call(emulator, twice, mixed, bias, silu_mul=True)[:, 1], qops.silu_mul(y), "[M, 2, K]")


def test_more_rows_than_scratch_holds(emulated, emulator):
    """Some strips and some rows are multiplied at a time: 128 MB of scratch hold neither all sums nor all weights."""
    configure(emulated, multiprocessors=1, policy=POLICIES["fifo"])
    m, n, k, group_size, kind = 264_000, 144, 256, 128, "offset"
    plan = plan_of(m, n, k, group_size, kind, 1, 90, may_round=True)
    assert (plan.kind, plan.strips, plan.rows) == (DENSE, 8, 132_000)
    w, here = pair(emulator, n, k, group_size, kind, scale_dtype=torch.bfloat16, seed=n)
    x = random_activations(m, k + 16, dtype=torch.bfloat16, seed=1)[:, 8 : k + 8]
    assert_rounded_weight(call(emulator, x, w), x, here, None)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_float16_cannot_hold_through_cublas(emulated, emulator, kind):
    """Rows of weights of 1e-30 and of 1e30, from tiny to large in one row, of zeros, and of no numbers."""
    configure(emulated, multiprocessors=1)
    m, n, k, group_size = 300, 144, 576, 64
    assert plan_of(m, n, k, group_size, kind, 1, 90, may_round=True).kind == DENSE
    tensors, _ = random_int4(n, k, group_size, kind, scale_dtype=torch.float32, seed=3)
    scales = tensors["scales"]
    # No sums of about 65504: they may become infinity, or not.
    sizes = torch.cat((torch.logspace(-30, -4, n // 2), torch.logspace(16, 30, n // 2)))[:, None].repeat(1, k // 64)
    sizes[::3] = torch.logspace(-14, -2, k // group_size)
    sizes[5] = 0
    tensors["scales"] = scales * sizes
    if kind == "offset":
        tensors["zeros"] = tensors["zeros"] * sizes
    with gpu(emulator):
        w = made_there(emulator, tensors, kind)
    here = qops.Int4Weight.from_canonical(**tensors, kind=kind)
    x = random_activations(m, k, dtype=torch.float16, seed=1)
    bound = weight_only_bound(x, here, gpu=True, rounded_to=torch.float16)
    assert_within(call(emulator, x, w), int4_gemm_ref(x, here), bound)
    for bad in (float("nan"), float("inf")):
        w.scales[0, 2, 14] = bad  # of row 7
        y = call(emulator, x, w)
        assert not y[:, 7].isfinite().any() and y[:, :7].isfinite().all()


def test_batch_invariant_has_a_plan_of_its_own(emulated, emulator):
    """Of two calls that differ in it alone, one after the other in both orders."""
    configure(emulated, multiprocessors=1)
    m, n, k = 300, 144, 576
    w, _ = pair(emulator, n, k, 64, "symmetric")
    x = random_activations(m, k, dtype=torch.bfloat16, seed=1)
    few = call(emulator, x[:7], w)
    for order in ((False, True), (True, False)):
        by_flag = {flag: call(emulator, x, w, batch_invariant=flag) for flag in order}
        assert_bitwise(by_flag[True][:7], few, f"{order}")
        assert not torch.equal(by_flag[False], by_flag[True])


def test_what_keeps_cublas_away(emulated, emulator):
    """batch_invariant and GPUs without wgmma: a row then has one result for every M."""
    m, n, k = 300, 144, 576
    w, _ = pair(emulator, n, k, 64, "symmetric")
    for dtype, arch, more in (
        (torch.bfloat16, 90, {"batch_invariant": True}),
        (torch.float16, 90, {"batch_invariant": True}),
        (torch.float16, 80, {}),
        (torch.bfloat16, 80, {}),
    ):
        configure(emulated, multiprocessors=1, arch=arch)
        x = random_activations(m, k, dtype=dtype, seed=1)
        y = call(emulator, x, w, **more)
        assert_bitwise(call(emulator, x[:7], w, **more), y[:7], f"{dtype} {arch} {more}")
    configure(emulated, multiprocessors=1)
    assert not torch.equal(call(emulator, x, w), y)


@pytest.mark.parametrize("m", [*range(1, 34), 64, 65, 129])
def test_adversarial_shapes(backend, m):
    """Odd multiples of 8, all group sizes, kinds and dtypes of scales in turn, with bias and permutation."""
    turns = itertools.product((8, 24, 40, 136), ((8, -1), (24, -1), (72, -1), (80, 16), (144, 48), (336, 112)))
    for index, (n, (k, group_size)) in enumerate(turns):
        if (index + m) % 4:
            continue
        pick = index // 4 + m
        kind, dtype = KINDS[pick % 4], FLOAT_DTYPES[(pick + index) % 3]
        more = {"scale_dtype": SCALE_DTYPES[pick % 3], "act_order": pick % 5 == 0, "seed": pick}
        w, here = pair(backend, n, k, group_size, kind, **more)
        x = random_activations(m, k, dtype=dtype, seed=pick)
        bias = torch.randn(n, generator=generator(pick)).to((torch.float32, dtype)[pick % 2]) if pick % 3 else None
        assert_right(call(backend, x, w, bias), x, here, bias)


def test_every_group_size(each):
    for k in (256, 240, 1024):
        for index, group_size in enumerate(g for g in range(16, k + 1, 16) if k % g == 0):
            w, here = pair(each, 40, k, group_size, KINDS[index % 4], seed=index)
            for m in (3, 33):
                x = random_activations(m, k, dtype=DTYPES[index % 2], seed=index)
                assert_right(call(each, x, w), x, here)


def test_sizes_of_zero(backend):
    for m, n, k in itertools.product((0, 2, 40), (0, 24), (0, 64)):
        codes = torch.zeros(n, k // 2, dtype=torch.uint8)
        tensors = {"qweight": codes, "scales": torch.ones(n, min(k, 1))}
        bias = torch.arange(n, dtype=torch.float32)
        with gpu(backend):
            y = call(backend, torch.ones(m, k, dtype=torch.float16), made_there(backend, tensors, "symmetric"), bias)
        assert_bitwise(y, (bias - 8 * k).half().expand(m, n))


def test_values_that_are_not_finite(backend):
    w, _ = pair(backend, 40, 128, 64, "symmetric")
    for m in (4, 40):
        x = torch.randn(m, 128, generator=generator(1)).half()
        clean = call(backend, x, w)
        x[1, 7], x[2, 100] = float("nan"), float("inf")
        y = call(backend, x, w)
        assert bool(y[1:3].isfinite().logical_not().any(dim=-1).all())
        assert_bitwise(y[3:], clean[3:])
        assert_bitwise(y[0], clean[0])


def test_products_past_half_of_fp16(backend):
    """Sums and scaled weights that float16 cannot hold, of an output that it can."""
    tensors, _ = random_int4(16, 128, 128, "symmetric", scale_dtype=torch.float32)
    tensors["qweight"].fill_(0xFF)  # 7
    tensors["scales"].fill_(1e5)
    x = torch.full((2, 128), 60000.0, dtype=torch.float16)
    x[:, 64:] = -60000.0
    x[1, 0] = 60000.0 - 32
    with gpu(backend):
        y = call(backend, x, made_there(backend, tensors, "symmetric"))
    assert bool((y[0] == 0).all()) and bool(y[1].isinf().all())


# The order of the sums -----------------------------------------------------------------------------------------------


def canonical(x: Tensor, tensors: dict[str, Tensor], kind: str, group_size: int) -> np.ndarray:
    """The contract of int4_gemm on a GPU before R(), written a second time, with the emulator's mma: float32 [M, N]."""
    values = x.float().numpy()
    rows, k = values.shape
    qweight = tensors["qweight"].numpy()
    codes = np.stack((qweight & 15, qweight >> 4), axis=-1).reshape(len(qweight), k).astype(np.float32)
    scales = tensors["scales"].float().numpy()
    zeros = tensors["zeros"].float().numpy() if "zeros" in tensors else None
    steps, blocks = -(-k // 16), -(-k // 64)

    def step_sum(a: np.ndarray, step: int) -> np.ndarray:
        """Sum over 16 columns, in ascending k: [M, rows of a]."""
        total = np.zeros((rows, len(a)), np.float32)
        for j in range(16 * step, min(16 * step + 16, k)):
            total = total + values[:, j, None] * a[None, :, j]
        return total

    y = None
    for slice_ in range(8):
        total = np.zeros((rows, len(codes)), np.float32)
        part, x_sum = np.zeros_like(total), np.zeros((rows, 1), np.float32)
        first, last = 4 * (blocks * slice_ // 8), min(4 * (blocks * (slice_ + 1) // 8), steps)
        for step in range(first, last):
            group = 16 * step // group_size
            zero = zeros[:, group, None] if kind == "zero_point" else np.float32(8)
            part = part + step_sum(codes - zero, step)
            x_sum = x_sum + step_sum(np.ones((1, k), np.float32), step)
            if step + 1 == last or 16 * (step + 1) // group_size > group:
                s = scales[None, :, group]
                total = fma(s, part, total)
                if kind == "offset":
                    total = fma(fma(s, 8, zeros[None, :, group]), x_sum, total)
                elif kind == "float_zero":
                    total = fma(s * (np.float32(8) - zeros[None, :, group]), x_sum, total)
                part, x_sum = np.zeros_like(part), np.zeros_like(x_sum)
        y = total if y is None else y + total
    return y


@pytest.mark.parametrize("kind", KINDS)
def test_sums_have_the_canonical_order(emulator, kind):
    for n, k, group_size in ((24, 1152, 128), (16, 1152, 48), (40, 1000, 1000), (16, 80, 16)):
        tensors, _ = random_int4(n, k, group_size, kind, scale_dtype=torch.float32, seed=k)
        with gpu(emulator):
            w = made_there(emulator, tensors, kind)
        for m in (3, 20):
            x = random_activations(m, k, dtype=torch.bfloat16, seed=m)
            want = torch.from_numpy(canonical(x, tensors, kind, group_size))
            assert_bitwise(call(emulator, x, w), want.bfloat16(), f"{kind} {n} {k} {group_size}")
            # 16 bits of a sum hide its last roundings, which are all that is left of a difference.
            for row in (0, m - 1):
                left = call(emulator, x, w, -want[row])[row]
                assert bool((left == 0).all()), f"{kind} {n} {k} {group_size}, row {row} of {m}: {left}"


def test_rows_do_not_depend_on_the_batch(backend):
    """One row has the same bits for every M and at every place in it."""
    for index, (n, k, group_size) in enumerate(((88, 1024, 128), (136, 720, 48), (24, 576, 576))):
        w, _ = pair(backend, n, k, group_size, KINDS[index + 1], seed=index)
        x = random_activations(130, k, dtype=DTYPES[index % 2], seed=index)
        whole = call(backend, x, w)
        for m in (1, 2, 8, 9, 16, 17, 24, 25, 33, 64, 65, 129):
            assert_bitwise(call(backend, x[:m], w), whole[:m], f"M = {m}")
            assert_bitwise(call(backend, x[130 - m :], w), whole[130 - m :], f"the last {m}")


def test_rows_do_not_depend_on_the_plan(emulated, emulator):
    """Nor on how many blocks share K, tiles, stages of the rings and seeds."""
    for index, (n, k, group_size) in enumerate(((40, 4608, 64), (24, 16384, 512), (200, 576, 48))):
        w, _ = pair(emulator, n, k, group_size, KINDS[index], seed=index)
        x = random_activations(40, k, dtype=DTYPES[index % 2], seed=index)
        want, seen = call(emulator, x, w, batch_invariant=True), set()
        for arch, multiprocessors, m in itertools.product(SHARED, (1, 3, 132), (1, 11, 40)):
            plan = plan_of(m, n, k, group_size, KINDS[index], multiprocessors, arch)
            if plan in seen:
                continue
            seen.add(plan)
            configure(emulated, seed=len(seen), policy=len(seen) % 3, arch=arch, multiprocessors=multiprocessors)
            assert_bitwise(call(emulator, x[:m], w, batch_invariant=True), want[:m], str(plan))
        assert len({(plan.kind, plan.k_parts, plan.strips, plan.stages) for plan in seen}) >= 4


# Arguments -----------------------------------------------------------------------------------------------------------


def test_rows_that_begin_anywhere(backend):
    for dtype, m in itertools.product(FLOAT_DTYPES, (3, 40)):
        w, here = pair(backend, 40, 144, 48, "offset")
        memory = random_activations(m, 200, dtype=dtype, seed=m)
        dense = call(backend, memory[:, 8:152].clone(), w)
        assert_right(dense, memory[:, 8:152], here)
        assert_bitwise(call(backend, memory[:, 8:152], w), dense, "rows of 16 bytes' multiples")
        assert_bitwise(call(backend, strided_rows(memory[:, 8:152].clone(), 1), w), dense, "rows anywhere")
        shifted = torch.cat((memory.new_zeros(m, 3), memory[:, 8:152]), dim=-1)[:, 3:]
        assert_bitwise(call(backend, shifted, w), dense, "three elements on")
        x = memory[:, 8:152].expand(2, m, 144).transpose(0, 1)
        assert_bitwise(call(backend, x, w), dense[:, None].expand(m, 2, 40), "[M, 2, K]")


def test_permutations_and_what_they_must_not_read(backend):
    for m in (2, 40):
        w, here = pair(backend, 40, 128, 32, "zero_point", act_order=True)
        x = random_activations(m, 128, dtype=torch.float16, seed=m)
        assert_right(call(backend, x, w), x, here)
        for bad in (-1, 128, -(2**31), 2**31 - 1):
            perm = w.perm.clone()
            perm[5] = bad
            weight = (w.packed, w.scales, w.zeros, perm)
            y = backend.ops.int4_gemm(backend.on_device(x), *weight, None, 40, 32, 1)
            assert bool(y.isnan().all()), bad


def test_bias_and_outputs_that_begin_anywhere(backend):
    for m, n in itertools.product((2, 40), (24, 136)):
        w, here = pair(backend, n, 64, 64, "symmetric")
        x = random_activations(m, 64, dtype=torch.bfloat16, seed=m)
        for bias_dtype in (torch.float32, torch.float16, torch.bfloat16):
            memory = torch.randn(n + 1, generator=generator(n)).to(bias_dtype)
            y = call(backend, x, w, memory[:n].clone())
            assert_right(y, x, here, memory[:n])
            shifted = torch.cat((memory[:1], memory[:n]))[1:]
            assert_bitwise(call(backend, x, w, shifted), y, "bias")
        out = backend.on_device(torch.empty(m * n + 1, dtype=torch.bfloat16))
        weight = (w.packed, w.scales, w.zeros, w.perm, backend.on_device(memory[:n]), n, 64, 0)
        backend.ops.int4_gemm.out(backend.on_device(x), *weight, out=out[1:].view(m, n))
        assert_bitwise(out[1:].view(m, n).cpu(), y, "out")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_epilogues_round_where_the_operators_do(backend, dtype):
    """Each equals the chain of operators bit for bit, in both kernels and behind a split K."""
    for m, n, k in ((3, 48, 128), (40, 144, 128), (2, 32, 16384), (20, 144, 4608)):
        w, _ = pair(backend, n, k, 64, "zero_point")
        x = random_activations(m, k, dtype=dtype, seed=m)
        bias = torch.randn(n, generator=generator(1))
        y = call(backend, x, w, bias)
        residual = random_activations(m, 2 * n, dtype=dtype, seed=5)[:, 3 : n + 3]
        assert_bitwise(call(backend, x, w, bias, residual=residual), y + residual, "residual")
        dense = residual.clone()
        assert_bitwise(call(backend, x, w, bias, residual=dense), y + dense, "dense residual")
        scale, zero = torch.tensor([0.37]), torch.tensor([-5], dtype=torch.int32)
        want = qops.quantize_int8_static(y, scale, zero)
        assert_bitwise(call(backend, x, w, bias, out_scale=scale, out_zero_point=zero), want, "int8")
        with gpu(backend):
            mixed = w.mix_gate_up()
        assert_bitwise(call(backend, x, mixed, bias, silu_mul=True), qops.silu_mul(y), "silu_mul")
        bias = torch.cat((bias[:1], bias))[1:]
        assert_bitwise(call(backend, x, mixed, bias, silu_mul=True), qops.silu_mul(y), "silu_mul, bias anywhere")


def call_raw(ops: Any, device: str, op: str, k: int, n: int) -> None:
    """A call with a weight of 16 rows that is packed for 128 columns."""
    scales = torch.ones(1, 1, 16, device=device)
    if op == "int8_gemm":
        packed = ops.int8_pack(torch.zeros(16, 128, dtype=torch.int8, device=device))
        q = torch.zeros(3, k, dtype=torch.int8, device=device)
        ops.int8_gemm(q, torch.ones(3, device=device), None, packed, scales, None, n, torch.float32)
        return
    packed = ops.int4_pack(torch.zeros(16, 64, dtype=torch.uint8, device=device))
    if op == "int4_int8_gemm":
        q, scale = torch.zeros(3, k, dtype=torch.int8, device=device), torch.ones(3, device=device)
        ops.int4_int8_gemm(q, scale, packed, scales, None, None, None, n, k, 0, torch.float32)
    elif op == "int4_gemm":
        x = torch.ones(3, k, dtype=torch.float16, device=device)
        ops.int4_gemm(x, packed, scales, None, None, None, n, k, 0)
    else:
        ops.int4_dequantize(packed, scales, None, n, k, 0, torch.float32)


@pytest.mark.parametrize("op", ["int4_gemm", "int4_int8_gemm", "int4_dequantize", "int8_gemm"])
def test_sizes_are_multiples_of_8_for_raw_callers_too(backend, op):
    """K = 100 of a weight that is packed for 128: an error, the same one of the CPU, of a GPU and of fake tensors."""

    def text(*where: Any) -> str:
        with pytest.raises(ValueError) as caught:
            call_raw(*where)
        return str(caught.value)

    for k, n in ((100, 16), (124, 16), (128, 12), (128, -8)):
        texts = {text(torch.ops.qops, "cpu", op, k, n), text(backend.ops, backend.device, op, k, n)}
        with FakeTensorMode():
            texts |= {text(torch.ops.qops, device, op, k, n) for device in ("cpu", "cuda")}
        assert len(texts) == 1 and texts.pop().startswith(f"qops.{op}: "), (k, n)
    for k in (72, 120, 128):  # fit what is packed
        call_raw(backend.ops, backend.device, op, k, 16)


# float32 -------------------------------------------------------------------------------------------------------------


def test_all_bits_of_float32_count(backend):
    """The identity picks every x out: three parts of it are the whole, also where bfloat16 would round to infinity."""
    codes = torch.eye(64, dtype=torch.uint8) + 8
    w = {"qweight": codes[:, ::2] | codes[:, 1::2] << 4, "scales": torch.ones(64, 1)}
    with gpu(backend):
        identity = made_there(backend, w, "symmetric")
    x = torch.randint(2**32, (40, 64), generator=generator(1)).sub(2**31).int().view(torch.float32)
    x = x.where(x.abs() > 2.0**-100, 1.0)  # whose last bits bfloat16 has
    x[0, :4] = torch.tensor([3.4028235e38, -3.4028235e38, 0.0, -0.0])
    x[1:3, 5] = torch.tensor([float("inf"), float("nan")])
    for m in (3, 40):
        y = call(backend, x[:m], identity)
        finite = x[:m].isfinite().all(dim=-1)
        assert torch.equal(y[finite], x[:m][finite])
        assert bool(y[1, 5].isinf()) and not bool(y[~finite].isfinite().any())  # elsewhere 0 times what is not finite


def test_rows_of_float32_do_not_depend_on_the_batch(emulated, emulator):
    """Nor on how many of them scratch holds."""
    m, n, k = 701, 4096, 64
    problem = f"m={m}\nn={n}\nk={k}\ngroup_size={k}\ndtype=float32\nkind=zero_point"
    said = dict(word.split("=") for word in emulated.explain("int4_gemm", problem).split(" -> ")[1].split())
    assert (said["rows"], said["parts_of_x"]) == ("351", "3")  # the second time 350
    w, here = pair(emulator, n, k, k, "zero_point", act_order=True)
    x = random_activations(m, k, dtype=torch.float32, seed=1)
    bias = torch.randn(n, generator=generator(1))
    few = call(emulator, x[-5:], w, bias)
    assert_right(few, x[-5:], here, bias)
    configure(emulated, policy=POLICIES["fifo"], multiprocessors=8)
    y = call(emulator, x, w, bias)
    assert_bitwise(y[-5:], few)
    assert_right(y[345:355], x[345:355], here, bias)


# What the emulator sees ----------------------------------------------------------------------------------------------


def test_bytes_of_one_row(emulated, emulator):
    """Everything is read once: within 3 % of what packed weight, scales, zeros and x take."""
    for n, k, group_size, kind in (
        (128, 1024, 128, "symmetric"),
        (64, 2048, 64, "zero_point"),
        (64, 1024, 32, "offset"),
    ):
        w, _ = pair(emulator, n, k, group_size, kind)
        configure(emulated, multiprocessors=n // 64)
        before = emulated.copied_bytes()
        call(emulator, torch.ones(1, k, dtype=torch.float16), w)
        tensors = [t for t in (w.packed, w.scales, w.zeros) if t is not None]
        least = sum(t.numel() * t.element_size() for t in tensors) + 2 * k * (n // 64)  # x: once for each block
        assert least <= emulated.copied_bytes() - before <= 1.03 * least, (n, k, group_size, kind)


def test_every_synchronisation_is_missed_when_it_is_gone(emulated, emulator):
    weights = {
        (n, k): pair(emulator, n, k, 64, "zero_point")[0]
        for n, k in ((16, 1024), (32, 1024), (48, 1024), (64, 1024), (200, 1024), (200, 64), (24, 16384), (136, 4608))
    }
    calls = (  # M, N, K, multiprocessors, arch: one and several passes over strips, split K, tiles
        *((3, n, 1024, 1, 89) for n in (16, 32, 48, 64)),
        (12, 64, 1024, 1, 89),
        (3, 48, 1024, 1, 80),
        (3, 48, 1024, 1, 90),
        (3, 200, 1024, 1, 90),
        (12, 200, 1024, 1, 90),
        (5, 24, 16384, 132, 90),
        (13, 24, 16384, 132, 80),
        (40, 200, 1024, 1, 90),
        (40, 200, 64, 1, 90),  # slices of no columns
        (20, 136, 4608, 132, 90),
    )
    stages = {plan_of(m, n, k, 64, "zero_point", sms, arch).stages for m, n, k, sms, arch in calls}
    assert stages == {2, 3, 4, 6, 8, 10}, stages  # each waits at a place of its own

    def run(seed: int, left_out: str) -> list[Tensor]:
        results = []
        for m, n, k, multiprocessors, arch in calls:
            emulated.configure(seed, seed % 3, left_out, arch, multiprocessors)
            results.append(call(emulator, random_activations(m, k, dtype=torch.float16, seed=m), weights[n, k]))
        return results

    want = run(1, "")
    places = [place for place in emulated.synchronisations() if place.startswith(("int4_gemm", "weight_only"))]
    files = collections.Counter(place.partition(":")[0] for place in places)
    # Waits for copies of 6 rings, the commits of two places; barriers of warps and blocks; the second kernel's wait.
    wanted = {
        "int4_gemm.cu": 1,
        "weight_only_decode.cuh": 8,
        "weight_only_fragment.cuh": 6,
        "weight_only_tiled.cuh": 4,
    }
    assert files == wanted, places
    print("each of these is missed when it is gone:", *places, sep="\n  ")
    for place in places:
        for seed in range(12):
            try:
                got = run(seed, place)
            except RuntimeError:  # a fault
                break
            if any(not torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(got, want, strict=True)):
                break
        else:
            pytest.fail(f"{place}: nothing shows that it is there")
