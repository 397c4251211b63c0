"""int8_weight_only_gemm on a GPU, in the emulator and on one: against float64, and against its own order of sums."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qops
from qops.ops.int8_weight_only_gemm import int8_weight_only_gemm_ref
from qops.testing import (
    FLOAT_DTYPES,
    assert_bitwise,
    assert_within,
    generator,
    random_activations,
    strided_rows,
    weight_only_bound,
)
from tests.support.cuda.cuda_backend import Backend, configure, gpu
from tests.support.cuda.int4_plans import DECODE, TILED, Gpu, Plan, Question, plans
from tests.support.ops.random_weights import SCALE_DTYPES, random_int8, random_levels
from tests.support.ops.weight_only_oracle import fma

DTYPES = (torch.float16, torch.bfloat16)
KINDS = qops.Int8Weight.KINDS
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # of a block, by the emulator's architecture
# Every kernel that a call can lead to, by the shape, the multiprocessors and the architecture that choose it:
# (M, N, K, multiprocessors, arch) -> (kind of plan, tokens of a tile, whether blocks share K, whether some tiles are
# whole).
PLANS = {
    (8, 200, 576, 3, 90): (DECODE, 8, False, False),
    (5, 24, 8192, 132, 90): (DECODE, 8, True, False),
    (16, 200, 576, 3, 80): (DECODE, 16, False, False),
    (13, 24, 8192, 132, 89): (DECODE, 16, True, False),
    (28, 264, 576, 1, 90): (TILED, 32, False, True),
    (17, 136, 2304, 132, 80): (TILED, 32, True, False),
    (40, 264, 576, 2, 80): (TILED, 64, False, True),
    (33, 264, 2304, 2, 90): (TILED, 64, True, True),
    (150, 264, 576, 3, 90): (TILED, 128, False, True),
}


def plan_of(m: int, n: int, k: int, group_size: int, kind: str, multiprocessors: int, arch: int) -> Plan:
    offset = 3 * KINDS.index(kind)  # among the kinds of kernels.h
    (plan,) = plans([Question(m, n, k, group_size, offset, Gpu(multiprocessors, SHARED[arch], arch), bits=8)])
    return plan


def call(backend: Backend, x: Tensor, w: qops.Int8Weight, bias: Tensor | None = None) -> Tensor:
    """The operator itself; its result on the CPU."""
    weight = (w.packed, w.scales, w.zeros, w.perm, backend.on_device(bias), w.out_features, w.group_size)
    return backend.ops.int8_weight_only_gemm(backend.on_device(x), *weight).cpu()


def there(backend: Backend, tensors: dict[str, Tensor], kind: str) -> qops.Int8Weight:
    with gpu(backend):
        return qops.Int8Weight.from_canonical(
            **{key: backend.on_device(tensor) for key, tensor in tensors.items()}, kind=kind
        )


def pair(backend: Backend, n: int, k: int, group_size: int, kind: str, **more: Any):
    """A weight on the backend, and the same one on the CPU."""
    tensors, here = random_int8(n, k, group_size, kind, **more)
    return there(backend, tensors, kind), here


def assert_right(y: Tensor, x: Tensor, w: qops.Int8Weight, bias: Tensor | None = None) -> None:
    what = f"{w} M = {x.shape[:-1].numel()} {x.dtype}"
    assert_within(y, int8_weight_only_gemm_ref(x, w, bias), weight_only_bound(x, w, bias, gpu=True), what)


# Accuracy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel(emulated, emulator, dtype, kind):
    for index, (shape, expected) in enumerate(PLANS.items()):
        m, n, k, multiprocessors, arch = shape
        if kind == "offset" and expected[1] == 128:
            continue  # has no kernel
        # Both, over dtypes; the kernel for offsets is the one for groups that end anywhere.
        group_size = 48 if (index + DTYPES.index(dtype)) % 2 == 0 and k % 48 == 0 else (64, k)[index % 2]
        w, here = pair(emulator, n, k, group_size, kind, scale_dtype=SCALE_DTYPES[index % 3], seed=index)
        plan = plan_of(m, n, k, group_size, kind, multiprocessors, arch)
        assert (plan.kind, plan.tokens, plan.is_split, plan.whole > 0) == expected, (shape, group_size)
        configure(emulated, seed=index, policy=index % 3, arch=arch, multiprocessors=multiprocessors)
        x = random_activations(m, k, dtype=dtype, seed=index)
        assert_right(call(emulator, x, w), x, here)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_code_is_exact(backend, dtype):
    """Of every place of a fragment: a row of the identity picks one column of the weight."""
    codes = torch.arange(-128, 128, dtype=torch.int8).repeat_interleave(16).view(32, 128)
    scales = torch.full((32, 1), 0.5)
    w = there(backend, {"qweight": codes, "scales": scales}, "symmetric")
    assert_bitwise(call(backend, torch.eye(128, dtype=dtype), w), (0.5 * codes.T.float()).to(dtype))
    few = torch.eye(128, dtype=dtype)[[0, 21, 42, 63, 70, 97, 127]]
    assert_bitwise(call(backend, few, w), (few.float() @ (0.5 * codes.T.float())).to(dtype))


@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 33, 64, 65, 129])
def test_adversarial_shapes(backend, m):
    """Odd multiples of 8, all group sizes, kinds and dtypes of scales in turn, with bias and permutation."""
    turns = itertools.product((8, 24, 40, 136), ((8, -1), (24, -1), (72, -1), (80, 16), (144, 48), (336, 112)))
    for index, (n, (k, group_size)) in enumerate(turns):
        if (index + m) % 4:
            continue
        pick = index // 4 + m
        kind, dtype = KINDS[pick % 2], FLOAT_DTYPES[(pick + index) % 3]
        more = {"scale_dtype": SCALE_DTYPES[pick % 3], "act_order": pick % 5 == 0, "seed": pick}
        w, here = pair(backend, n, k, group_size, kind, **more)
        x = random_activations(m, k, dtype=dtype, seed=pick)
        bias = torch.randn(n, generator=generator(pick)).to((torch.float32, dtype)[pick % 2]) if pick % 3 else None
        assert_right(call(backend, x, w, bias), x, here, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_two_levels(backend, kind):
    """Those of GGUF's Q6_K and Q5_K: a GPU's are their products, of one level, in float32."""
    for group_size in (16, 32):
        tensors, here = random_levels(40, 512, group_size, kind, bits=8)
        w = there(backend, tensors, kind)
        assert w.scales.dtype == torch.float32
        for m in (2, 34):
            x = random_activations(m, 512, dtype=torch.bfloat16, seed=m)
            assert_right(call(backend, x, w), x, here)


def test_sizes_of_zero(backend):
    for m, n, k in itertools.product((0, 2, 40), (0, 24), (0, 64)):
        tensors = {"qweight": torch.ones(n, k, dtype=torch.int8), "scales": torch.ones(n, min(k, 1))}
        bias = torch.arange(n, dtype=torch.float32)
        y = call(backend, torch.ones(m, k, dtype=torch.float16), there(backend, tensors, "symmetric"), bias)
        assert_bitwise(y, (bias + k).half().expand(m, n))


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


# The order of the sums -----------------------------------------------------------------------------------------------

# Columns of a step in the order in which a fragment of mma.m16n8k16 has them.
COLUMNS = [4 * t + half + i for half in (0, 2) for t in range(4) for i in range(2)]


def canonical(x: Tensor, tensors: dict[str, Tensor], kind: str, group_size: int) -> np.ndarray:
    """The contract on a GPU before R(), written a second time, with the emulator's mma: float32 [M, N]."""
    rows, k = x.shape
    padded = -(-k // 16) * 16
    values = np.zeros((rows, padded), np.float32)
    values[:, :k] = x.float().numpy()
    codes = np.zeros((len(tensors["qweight"]), padded), np.float32)
    codes[:, :k] = tensors["qweight"].numpy()
    scales = tensors["scales"].float().numpy()
    offsets = tensors["zeros"].float().numpy() if kind == "offset" else None
    steps, blocks = padded // 16, -(-k // 64)

    def step_sum(a: np.ndarray, step: int) -> np.ndarray:
        total = np.zeros((rows, len(a)), np.float32)
        for column in COLUMNS:
            j = 16 * step + column
            total = total + values[:, j, None] * a[None, :, j]
        return total

    y = None
    for slice_ in range(8):
        total = np.zeros((rows, len(codes)), np.float32)
        part, x_sum = np.zeros_like(total), np.zeros((rows, 1), np.float32)
        first, last = 4 * (blocks * slice_ // 8), min(4 * (blocks * (slice_ + 1) // 8), steps)
        for step in range(first, last):
            group = 16 * step // group_size
            part = part + step_sum(codes, step)
            x_sum = x_sum + step_sum(np.ones((1, padded), np.float32), step)
            if step + 1 == last or 16 * (step + 1) // group_size > group:
                total = fma(scales[None, :, group], part, total)
                if offsets is not None:
                    total = fma(offsets[None, :, group], x_sum, total)
                part, x_sum = np.zeros_like(part), np.zeros_like(x_sum)
        y = total if y is None else y + total
    return y


@pytest.mark.parametrize("kind", KINDS)
def test_sums_have_the_canonical_order(emulator, kind):
    for n, k, group_size in ((24, 1152, 128), (16, 1152, 48), (40, 1000, 1000), (16, 80, 16)):
        tensors, _ = random_int8(n, k, group_size, kind, scale_dtype=torch.float32, seed=k)
        w = there(emulator, tensors, kind)
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
        w, _ = pair(backend, n, k, group_size, KINDS[index % 2], seed=index)
        x = random_activations(130, k, dtype=DTYPES[index % 2], seed=index)
        whole = call(backend, x, w)
        for m in (1, 8, 9, 16, 17, 33, 64, 65, 129):
            assert_bitwise(call(backend, x[:m], w), whole[:m], f"M = {m}")
            assert_bitwise(call(backend, x[130 - m :], w), whole[130 - m :], f"the last {m}")


def test_rows_do_not_depend_on_the_plan(emulated, emulator):
    """Nor on how many blocks share K, tiles, stages of the rings and seeds."""
    for index, (n, k, group_size) in enumerate(((40, 4608, 64), (24, 8192, 512), (200, 576, 48))):
        w, _ = pair(emulator, n, k, group_size, KINDS[index % 2], seed=index)
        x = random_activations(40, k, dtype=DTYPES[index % 2], seed=index)
        want, seen = call(emulator, x, w), set()
        for arch, multiprocessors, m in itertools.product(SHARED, (1, 3, 132), (1, 11, 40)):
            plan = plan_of(m, n, k, group_size, KINDS[index % 2], multiprocessors, arch)
            if plan in seen:
                continue
            seen.add(plan)
            configure(emulated, seed=len(seen), policy=len(seen) % 3, arch=arch, multiprocessors=multiprocessors)
            assert_bitwise(call(emulator, x[:m], w), want[:m], str(plan))
        assert len({(plan.kind, plan.k_parts, plan.stages) for plan in seen}) >= 4


# Arguments -----------------------------------------------------------------------------------------------------------


def test_rows_that_begin_anywhere(backend):
    for dtype, m in itertools.product(FLOAT_DTYPES, (3, 40)):
        w, here = pair(backend, 40, 144, 48, "offset")
        memory = random_activations(m, 200, dtype=dtype, seed=m)
        dense = call(backend, memory[:, 8:152].clone(), w)
        assert_right(dense, memory[:, 8:152], here)
        assert_bitwise(call(backend, memory[:, 8:152], w), dense, "rows of 16 bytes' multiples")
        assert_bitwise(call(backend, strided_rows(memory[:, 8:152].clone(), 1), w), dense, "rows anywhere")
        x = memory[:, 8:152].expand(2, m, 144).transpose(0, 1)
        assert_bitwise(call(backend, x, w), dense[:, None].expand(m, 2, 40), "[M, 2, K]")


def test_permutations_and_what_they_must_not_read(backend):
    for m in (2, 40):
        w, here = pair(backend, 40, 128, 32, "offset", act_order=True)
        x = random_activations(m, 128, dtype=torch.float16, seed=m)
        assert_right(call(backend, x, w), x, here)
        for bad in (-1, 128, -(2**31), 2**31 - 1):
            perm = w.perm.clone()
            perm[5] = bad
            weight = (w.packed, w.scales, w.zeros, perm)
            y = backend.ops.int8_weight_only_gemm(backend.on_device(x), *weight, None, 40, 32)
            assert bool(y.isnan().all()), bad


def test_bias_and_outputs_that_begin_anywhere(backend):
    for m, n in itertools.product((2, 40), (24, 136)):
        w, here = pair(backend, n, 64, 64, "symmetric")
        x = random_activations(m, 64, dtype=torch.bfloat16, seed=m)
        memory = torch.randn(n + 1, generator=generator(n))
        y = call(backend, x, w, memory[1:].clone())
        assert_right(y, x, here, memory[1:])
        assert_bitwise(call(backend, x, w, memory[1:]), y, "bias")
        out = backend.on_device(torch.empty(m * n + 1, dtype=torch.bfloat16))
        weight = (w.packed, w.scales, w.zeros, w.perm, backend.on_device(memory[1:]), n, 64)
        backend.ops.int8_weight_only_gemm.out(backend.on_device(x), *weight, out=out[1:].view(m, n))
        assert_bitwise(out[1:].view(m, n).cpu(), y, "out")


# What the emulator sees ----------------------------------------------------------------------------------------------


def test_bytes_of_one_row(emulated, emulator):
    """Everything is read once: within 3 % of what packed weight, scales, offsets and x take."""
    for n, k, group_size, kind in ((64, 1024, 128, "symmetric"), (32, 2048, 32, "symmetric"), (32, 1024, 32, "offset")):
        w, _ = pair(emulator, n, k, group_size, kind)
        configure(emulated, multiprocessors=n // 32)
        before = emulated.copied_bytes()
        call(emulator, torch.ones(1, k, dtype=torch.float16), w)
        tensors = [t for t in (w.packed, w.scales, w.zeros) if t is not None]
        least = sum(t.numel() * t.element_size() for t in tensors) + 2 * k * (n // 32)  # x: once for each block
        assert least <= emulated.copied_bytes() - before <= 1.03 * least, (n, k, group_size, kind)
