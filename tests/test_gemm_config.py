"""The plans of int4_gemm on a GPU (csrc/cuda/gemm_config.h) and where its kernels' accesses to shared memory fall."""

from __future__ import annotations

import itertools

import pytest

import gemm_plans
from cuda_tools import checked
from gemm_plans import Plan, plans

KIB = 1024
# Multiprocessors, and KiB of shared memory that a block may have: as A100, H100 PCIe, RTX 4090, H100 SXM, RTX 5090.
GPUS = ((108, 163), (114, 227), (128, 99), (132, 227), (170, 99))
# N and K of the linears of Llama 3 8B and 70B, of Qwen2 7B, and of two shares of 70B on 8 GPUs.
LAYERS = (
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (10240, 8192),
    (8192, 8192),
    (57344, 8192),
    (8192, 28672),
    (3584, 3584),
    (4608, 3584),
    (37888, 3584),
    (3584, 18944),
    (1280, 8192),
    (7168, 8192),
)


def test_every_shape_has_a_plan_that_fits():
    sizes = (8, 24, 64, 72, 136, 1000, 4096, 28672)
    questions = [
        (m, n, k, group_size, kind, multiprocessors, shared * KIB)
        for m in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 1000, 100000)
        for n in sizes
        for k in (0, *sizes)
        for group_size in {k, 16}
        for kind in (0, 3)
        for multiprocessors, shared in ((1, 99), *GPUS)
    ]
    for question, plan in zip(questions, plans(questions), strict=True):
        m, n, _, _, kind, multiprocessors, shared_bytes = question
        strips = -(-n // 16)
        assert 2 <= plan.stages <= 8 and plan.shared_bytes <= shared_bytes, question
        assert plan.k_parts in (1, 2, 4, 8) and plan.blocks % plan.k_parts == 0, question
        assert plan.tokens in ((8, 16) if plan.decode else (32, 64, 128)), question
        assert plan.scratch_bytes == (plan.k_parts > 1) * 8 * m * strips * 16 * 4 <= 32 << 20, question
        if plan.decode:
            # All blocks run at a time, each has something to do, and a warp never takes more than it has room for.
            assert plan.blocks <= multiprocessors and plan.ranges <= strips, question
            assert m <= plan.tokens and 1 <= plan.strips <= 4, question
        else:
            assert plan.blocks == -(-m // plan.tokens) * -(-strips // 8) * plan.k_parts, question
            assert kind == 0 or plan.tokens <= 64, question


def test_time_never_falls_with_more_rows():
    """Nor does it jump by more than a wave of tiles can."""
    for multiprocessors, shared in GPUS:
        for n, k in LAYERS:
            rows = [*range(1, 300), *range(300, 5000, 37)]
            times = [p.time for p in plans([(m, n, k, 128, 0, multiprocessors, shared * KIB) for m in rows])]
            assert all(a <= b <= 2.1 * a for a, b in itertools.pairwise(times)), (n, k)


# (N, K) by GPU where the share is smaller, because by the model the second kernel of a split K costs more: layers of at
# most 13 MB, and one of 29 MB on 170 multiprocessors.
UNBALANCED = {
    (108, 163): {(6144, 4096), (4096, 4096), (3584, 3584), (4608, 3584), (1280, 8192)},
    (114, 227): {(6144, 4096), (4096, 4096), (4608, 3584), (1280, 8192)},
    (128, 99): {(3584, 3584), (4608, 3584), (1280, 8192)},
    (132, 227): {(3584, 3584), (4608, 3584), (1280, 8192)},
    (170, 99): {(6144, 4096), (4096, 4096), (3584, 3584), (4608, 3584), (7168, 8192)},
}


def balance(plan: Plan, n: int, multiprocessors: int) -> float:
    """The mean share of the weights that a multiprocessor reads, over the largest."""
    strips = -(-n // 16)
    return strips * 8 / (multiprocessors * -(-strips // plan.ranges) * (8 // plan.k_parts))


@pytest.mark.parametrize("gpu", GPUS)
def test_blocks_of_the_decode_kernel_are_balanced(gpu):
    found = plans([(1, n, k, 128, 0, gpu[0], gpu[1] * KIB) for n, k in LAYERS])
    uneven = {layer for layer, plan in zip(LAYERS, found, strict=True) if balance(plan, layer[0], gpu[0]) < 0.9}
    assert uneven == UNBALANCED[gpu]


def test_bytes_in_flight():
    """Of weights, for each multiprocessor: what covers the latency of the memory of an A100 and of an H100."""
    for (multiprocessors, shared), needed in (((108, 163), 24 * KIB), ((132, 227), 64 * KIB)):
        for n, k in ((28672, 4096), (57344, 8192), (8192, 28672)):
            for m in (1, 8, 16):
                (plan,) = plans([(m, n, k, 128, 0, multiprocessors, shared * KIB)])
                assert (plan.stages - 1) * 8 * plan.strips * 512 >= needed, (n, k, m)


def test_shared_memory_has_no_bank_conflicts():
    lines = [line.split() for line in checked(str(gemm_plans.program()), "banks").splitlines()]
    measured = {name: [float(value) for other, value in lines if other == name] for name, _ in lines}
    assert measured.pop("rows_in_order") == [8.0]  # the measure sees conflicts where there are some
    assert measured.pop("stage") == [0.0, 0.0]  # all of these patterns begin at multiples of 128 bytes
    assert set(measured) == {"codes", "ldmatrix", "x_copies", "scales", "sums"}
    for name, values in measured.items():
        assert set(values) == {1.0}, name
