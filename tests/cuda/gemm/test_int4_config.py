"""The plans of int4_gemm, int8_weight_only_gemm and int4_int8_gemm on a GPU (csrc/cuda/weight_only_config.h,
csrc/cuda/int4_int8_config.h) and where the first two's accesses to shared memory fall."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from bench.problems.shared.cases import LAYERS as LINEARS
from tests.cuda.sass.machine import machine_of
from tests.support.cuda import int4_plans
from tests.support.cuda.cuda_tools import ROOT, checked
from tests.support.cuda.int4_plans import DECODE, DENSE, TILED, Gpu, Plan, Question, int8_plans, plans, searches

KIB = 1024
# An A100, H100 PCIe, RTX 4090, H100 SXM, RTX 5090.
GPUS = (
    Gpu(108, 163 * KIB, 80),
    Gpu(114, 227 * KIB, 90),
    Gpu(128, 99 * KIB, 89),
    Gpu(132, 227 * KIB, 90),
    Gpu(170, 99 * KIB, 120),
)
A100, H100 = GPUS[0], GPUS[3]
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
        Question(m, n, k, group_size, kind, gpu, may_round)
        for m in (1, 8, 9, 16, 17, 24, 25, 32, 33, 64, 65, 128, 129, 1000, 100000)
        for n in sizes
        for k in (0, *sizes)
        for group_size in {k, 16}
        for kind, may_round in ((0, False), (3, True))
        for gpu in (Gpu(1, 99 * KIB, 89), *GPUS)
    ]
    for question, plan in zip(questions, plans(questions), strict=True):
        m, n, k, _, kind, gpu, may_round, _ = question
        strips = -(-n // 16)
        assert plan.scratch_bytes <= (128 if plan.kind == DENSE else 32) << 20, question
        if plan.kind == DENSE:
            assert may_round and gpu.arch == 90 and m > 24 and k > 0, question
            assert 1 <= plan.strips <= strips and 1 <= plan.rows <= m, question
            assert plan.scratch_bytes == plan.strips * 16 * (2 * k + 4 * plan.rows + 4), question
            assert plan.rows == m or plan.strips <= 8, question
            continue
        assert 2 <= plan.stages <= 10 and plan.k_parts in (1, 2, 4, 8), question
        if plan.kind == DECODE:
            # All blocks run at a time, each has something to do, and a warp never takes more than it has room for.
            assert plan.blocks <= gpu.multiprocessors and plan.blocks == plan.ranges * plan.k_parts, question
            assert plan.ranges <= strips and m <= plan.tokens <= 24 and plan.strips in (2, 4), question
            # The waits of the kernel know these; all of x of a slice, or a ring beside that of the codes.
            assert plan.stages in (2, 3, 4, 6, 8, 10), question
            blocks = -(-k // 64)
            assert plan.x_stages == (-(-blocks // 8) if plan.keeps_x else plan.stages), question
            assert plan.shared_bytes <= gpu.shared_bytes, question
            assert plan.scratch_bytes == (plan.k_parts > 1) * 8 * m * strips * 16 * 4, question
        else:
            resident = 2 if plan.tokens == 32 and kind == 0 else 1
            assert resident * (plan.shared_bytes + KIB) <= gpu.shared_bytes + KIB, question
            assert plan.tokens in ((32, 64) if kind == 3 else (32, 64, 128)) and plan.live % 8 == 0, question
            # The last tile has some tokens, too.
            assert (plan.token_tiles - 1) * plan.live < m <= plan.token_tiles * plan.live, question
            assert plan.live <= plan.tokens and plan.row_tiles == -(-strips // 8), question
            shared = plan.token_tiles * plan.row_tiles - plan.whole
            assert shared >= 0 and (plan.k_parts > 1 or shared == 0), question
            assert plan.blocks == min(resident * gpu.multiprocessors, plan.whole + shared * plan.k_parts), question
            assert plan.scratch_bytes == (plan.k_parts > 1) * 8 * shared * plan.live * 128 * 4, question


def test_every_shape_of_int8_weights_has_a_plan_that_fits():
    sizes = (8, 24, 64, 72, 136, 1000, 4096, 28672)
    questions = [
        Question(m, n, k, group_size, kind, gpu, may_round=True, bits=8)
        for m in (1, 8, 9, 16, 17, 24, 33, 64, 65, 128, 129, 1000, 100000)
        for n in sizes
        for k in (0, *sizes)
        for group_size in {k, 16}
        for kind in (0, 3)
        for gpu in (Gpu(1, 99 * KIB, 89), *GPUS)
    ]
    for question, plan in zip(questions, plans(questions), strict=True):
        m, n, k, _, kind, gpu, *_ = question
        strips = -(-n // 16)
        assert plan.scratch_bytes <= 32 << 20 and plan.stages in (2, 3, 4, 6, 8, 10), question
        if plan.kind == DECODE:
            assert plan.blocks == plan.ranges * plan.k_parts <= gpu.multiprocessors, question
            assert plan.ranges <= strips and m <= plan.tokens <= 16 and plan.strips == 2, question
            blocks = -(-k // 64)
            assert plan.x_stages == (-(-blocks // 8) if plan.keeps_x else plan.stages), question
            assert plan.shared_bytes <= gpu.shared_bytes, question
        else:
            assert plan.kind == TILED and plan.tokens in ((32, 64) if kind == 3 else (32, 64, 128)), question
            resident = 2 if plan.tokens == 32 and kind == 0 else 1
            assert resident * (plan.shared_bytes + KIB) <= gpu.shared_bytes + KIB, question
            assert (plan.token_tiles - 1) * plan.live < m <= plan.token_tiles * plan.live, question


def test_every_shape_of_int4_int8_gemm_has_a_plan_that_fits():
    """And slices of K that are the contract's, which int4_plans.cpp looks at."""
    sizes = (8, 24, 64, 72, 136, 1000, 4096, 28672)
    questions = [
        Question(m, n, k, group_size, kind, gpu)
        for m in (1, 8, 9, 16, 17, 24, 25, 32, 33, 64, 65, 128, 129, 1000, 100000)
        for n in sizes
        for k in (0, *sizes, 4608)
        for group_size in {k, 16, 64, 128, 192, 1536}
        for kind in (0, 1, 3)
        for gpu in (Gpu(1, 99 * KIB, 89), *GPUS)
        if k == group_size or (k > 0 and k % group_size == 0)
    ]
    for question, plan in zip(questions, int8_plans(questions), strict=True):
        m, n, _, _, _, gpu, *_ = question
        strips = -(-n // 16)
        assert plan.kind == TILED and plan.tokens in (16, 32, 64, 128), question
        assert plan.tokens // 2 < plan.live <= plan.tokens or plan.live == 8, question
        assert 2 <= plan.stages <= 10 and (plan.stages > 2 or plan.tokens < 128), question
        resident = 2 if plan.tokens <= 32 or (plan.tokens == 64 and gpu.arch >= 90) else 1
        assert resident * (plan.shared_bytes + KIB) <= gpu.shared_bytes + KIB, question
        assert (plan.token_tiles - 1) * plan.live < m <= plan.token_tiles * plan.live, question
        assert plan.live % 8 == 0 and plan.row_tiles == -(-strips // 8) and plan.k_parts in (1, 2, 4, 8), question
        shared = plan.token_tiles * plan.row_tiles - plan.whole
        assert shared >= 0 and (plan.k_parts > 1 or shared == 0), question
        assert plan.blocks == min(resident * gpu.multiprocessors, plan.whole + shared * plan.k_parts), question
        assert plan.scratch_bytes == (plan.k_parts > 1) * 8 * shared * plan.live * 128 * 4 <= 32 << 20, question


def test_scratch_of_cublas_is_bounded_for_every_m():
    """And no row is multiplied alone: where some are at a time, they fill a GPU."""
    sizes = [
        (m, k) for m in (17, 4096, 60_000, 300_000, 10**6, 10**9) for k in (8, 4096, 28672, 122_000, 500_000, 10**6)
    ]
    found = plans(Question(m, 4096, k, k, 0, H100, True) for m, k in sizes)
    for (m, k), plan in zip(sizes, found, strict=True):
        assert plan.scratch_bytes <= 128 << 20, (m, k)
        if plan.kind == DENSE:
            assert min(m, 4096) <= plan.rows <= m, (m, k)
    dense = {size for size, plan in zip(sizes, found, strict=True) if plan.kind == DENSE}
    assert {(m, 4096) for m in (4096, 60_000, 300_000, 10**6, 10**9)} <= dense
    assert not [size for size in dense if size[1] > 500_000]


def test_passes_through_cublas_are_few():
    for (n, k), m in itertools.product(LAYERS, (2048, 4096, 8192)):
        (plan,) = plans([Question(m, n, k, 128, 0, H100, True)])
        assert plan.kind == DENSE and plan.rows == m, (n, k, m)
        assert -(-n // (16 * plan.strips)) <= 1 + n * (2 * k + 4 * m) // (100 << 20), (n, k, m)


def test_a_model_finds_all_its_plans_again():
    """The layers of a model, in decoding and in prefill, in turns: each plan is searched for once."""
    models: dict[str, list[tuple[int, int]]] = {}
    for name, shape in LINEARS.items():
        models.setdefault(name.rpartition(" ")[0], []).append(shape)
    assert len(models) >= 6 and max(map(len, models.values())) >= 5
    for (model, layers), rows in itertools.product(models.items(), itertools.product((1, 4, 16), (64, 512, 4096))):
        calls = [
            Question(m, n, k, 128 if k % 128 == 0 else k, 0, H100, True) for m in rows for n, k in dict.fromkeys(layers)
        ]
        assert searches(calls * 3)[-1] == len(calls), (model, rows)


def test_a_plan_that_may_round_is_not_found_for_a_call_that_may_not():
    """int4_plans.cpp holds each plan of the cache against a new one."""
    calls = [Question(4096, 4096, 4096, 128, 0, H100, may_round) for may_round in (True, False)]
    assert [plan.kind for plan in plans(calls * 2)] == [DENSE, TILED] * 2
    assert searches(calls * 2) == [1, 2, 2, 2]


def test_time_never_falls_with_more_rows():
    """Nor does it jump where one more row takes another tile, but for where the decode kernel ends: the tiled one
    issues twice as many instructions for as many codes, as each of its warps reads and multiplies all tokens."""
    for gpu, (n, k), may_round in itertools.product(GPUS, LAYERS, (False, True)):
        rows = range(1, 1100)
        times = [p.time for p in plans([Question(m, n, k, 128, 0, gpu, may_round) for m in rows])]
        for m, (a, b) in enumerate(itertools.pairwise(times), 1):
            assert a <= b <= {24: 2.2, 64: 2, 128: 1.8}.get(m, 1.55) * a, (gpu, n, k, m, a, b)


def test_time_of_int8_weights_never_falls_with_more_rows():
    for gpu, (n, k) in itertools.product(GPUS, LAYERS):
        times = [p.time for p in plans([Question(m, n, k, 32, 0, gpu, bits=8) for m in range(1, 600)])]
        for m, (a, b) in enumerate(itertools.pairwise(times), 1):
            assert a <= b <= {16: 2, 64: 2, 128: 1.9}.get(m, 1.55) * a, (gpu, n, k, m, a, b)


def test_time_of_int4_int8_gemm_never_falls_with_more_rows():
    for gpu, (n, k) in itertools.product(GPUS, LAYERS):
        times = [p.time for p in int8_plans([Question(m, n, k, 128, 0, gpu) for m in range(1, 1100)])]
        for m, (a, b) in enumerate(itertools.pairwise(times), 1):
            assert a <= b <= (2 if m in (32, 64, 128) else 1.6) * a, (gpu, n, k, m, a, b)


def test_the_crossover_to_cublas():
    """From some M on, but for rows that fill the tiles of our kernel just so, on GPUs where cuBLAS has instructions of
    its own, and only if weights may be rounded.

    The numbers are those of a model that no measurement has fitted yet.
    """
    rows = (25, *range(32, 4097, 32))
    for gpu, layer in itertools.product(GPUS, LAYERS):
        kinds = [p.kind for p in plans([Question(m, *layer, 128, 0, gpu, True) for m in rows])]
        first = kinds.index(DENSE) if DENSE in kinds else len(kinds)
        last = max(m for m, kind in zip(rows, kinds, strict=True) if kind == TILED)
        assert set(kinds) <= {TILED, DENSE} and (first == len(kinds) or last < 2.5 * rows[first]), (gpu, layer)
        assert (first < len(kinds)) == (gpu.arch == 90), (gpu, layer)
        if gpu == H100:
            assert 96 <= rows[first] <= 1024, (layer, rows[first])
        assert DENSE not in {p.kind for p in plans([Question(m, *layer, 128, 0, gpu) for m in rows])}


def test_the_model_has_the_instructions_of_the_machine_code():
    """Those of bfloat16 with groups of whole blocks on sm_90a, within 10 %; tests/data/cuda_slots.json has them all."""
    text, int8_text = ((ROOT / f"csrc/cuda/{name}_config.h").read_text() for name in ("weight_only", "int4_int8"))
    slots = json.loads((ROOT / "tests/data/cuda_slots.json").read_text())["slots"]

    def constants(name: str, text: str = text) -> list[int]:
        found = re.search(rf"\b{name}(?:\[\d\])* = ([^;a-zA-Z]*\d}}*)[;,]", text)
        assert found is not None, name
        return [int(number) for number in re.findall(r"\d+", found[1])]

    def counted(kernel: str, sizes: str) -> float:
        return slots[f"{kernel}<bf16, {sizes}, false, false>"]["90a"]

    decode = dict(zip(("1, 4", "1, 2", "2, 4", "2, 2", "3, 4", "3, 2"), constants("kDecodeSlots"), strict=True))
    (base,), (few, many) = constants("kTiledSlots"), constants("kTiledSlotsOfEight")
    tiled = {"32": base + 4 * few, "64": base + 8 * few, "128": base + 16 * many}
    int8_decode = dict(zip(("1", "2"), constants("kDecodeSlotsOfInt8"), strict=True))
    (base,), (few, many) = constants("kTiledSlotsOfInt8"), constants("kTiledSlotsOfEightOfInt8")
    int8_tiled = {"32": base + 4 * few, "64": base + 8 * few, "128": base + 16 * many}
    for kernel, modelled in (
        ("decode_kernel", decode),
        ("tiled_kernel", tiled),
        ("int8_decode_kernel", int8_decode),
        ("int8_tiled_kernel", int8_tiled),
    ):
        for sizes, instructions in modelled.items():
            assert abs(instructions / counted(kernel, sizes) - 1) <= 0.1, (kernel, sizes)
    bases, of_eights = (constants(name, int8_text) for name in ("kSlots", "kSlotsOfEight"))
    for tokens, many in ((16, 0), (32, 0), (64, 1), (128, 1)):
        instructions = slots[f"int4_int8_gemm_kernel<{tokens}, false>"]["90a"]
        assert abs((bases[many] + of_eights[many] * tokens // 8) / instructions - 1) <= 0.1, tokens


# (N, K) by multiprocessors where the share is smaller, because by the model the second kernel of a split K costs more,
# or because a warp issues as many instructions for some strips as for one or two more. (Where weights take longer to
# come than to multiply, on 128 and 170 multiprocessors, they are shared out.)
UNBALANCED = {
    108: {(6144, 4096), (4096, 4096), (3584, 3584), (4608, 3584), (4096, 14336)},
    114: {(6144, 4096), (4096, 4096), (4608, 3584)},
    128: set(),
    132: {(3584, 3584), (4608, 3584), (3584, 18944)},
    170: {(4608, 3584)},
}


def balance(plan: Plan, n: int, multiprocessors: int) -> float:
    """The mean share of the weights that a multiprocessor reads, over the largest."""
    strips = -(-n // 16)
    if plan.kind == TILED:
        shared = (plan.token_tiles * plan.row_tiles - plan.whole) * plan.k_parts
        largest = -(-plan.whole // multiprocessors) + -(-shared // multiprocessors) / plan.k_parts
        return strips / (8 * multiprocessors * largest)
    return strips * 8 / (multiprocessors * -(-strips // plan.ranges) * (8 // plan.k_parts))


def test_the_model_has_the_bandwidths_of_the_stopwatch():
    """Those of L2 where something is known of it, and those of memory, of which the stopwatch takes nine tenths."""
    text = (ROOT / "csrc/cuda/gpu.h").read_text()
    (a100, h100) = re.findall(r"gpu\.arch == (?:80|90) \? (\d+)", text)
    for arch, l2 in (("80", a100), ("90", h100)):
        assert int(l2) == int(machine_of(arch).l2), arch
        (dram,) = re.findall(rf"case {arch}: return (\d+);", text)
        assert abs(int(dram) * 0.9 / machine_of(arch).dram - 1) < 0.05, arch


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: str(gpu.multiprocessors))
def test_a_row_is_computed_in_balanced_shares(gpu):
    found = plans([Question(1, n, k, 128, 0, gpu) for n, k in LAYERS])
    shares = {layer: balance(plan, layer[0], gpu[0]) for layer, plan in zip(LAYERS, found, strict=True)}
    assert {layer for layer, share in shares.items() if share < 0.9} == UNBALANCED[gpu.multiprocessors]


# (N, K, M) with fewer bytes of weights under way, in KiB, by multiprocessors: too few strips for them, or 24 rows of x
# beside them.
FEW_UNDER_WAY = {
    108: {(1280, 8192, m): 20 for m in (16, 24, 25, 32)},
    132: {
        **{(n, k, 24): 40 for n, k in LAYERS},
        **{(1280, 8192, m): 36 for m in (16, 24, 25, 32)},
        **{(n, k, 16): 56 for n in (3584, 4096, 10240, 28672) for k in (3584, 4096, 8192, 14336, 18944)},
    },
}


def test_bytes_in_flight_and_of_x():
    """What is under way on a multiprocessor covers the latency of the memory of an A100 and of an H100. And x comes
    from L2 in no more bytes than codes from memory, or in half as many more for 24 rows, and up to twice as many of
    these where a warp of the decode kernel has few strips."""
    for gpu, needed in ((A100, 24), (H100, 64)):
        for (n, k), m in itertools.product(LAYERS, (1, 8, 16, 24, 25, 32)):
            (plan,) = plans([Question(m, n, k, 128, 0, gpu)])
            if plan.kind == DECODE:
                under_way = (plan.stages - 1) * 8 * plan.strips * 512
                most = (1 if m <= 16 else 1.5) * (2 if plan.strips < 4 else 1)
                assert 128 * m <= 512 * plan.strips * most, (gpu, n, k, m)
            else:
                under_way = (plan.stages - 1) * 8 * 512 * -(-plan.blocks // gpu.multiprocessors)
                assert 128 * min(m, plan.live) <= 8 * 512, (gpu, n, k, m)
            least = FEW_UNDER_WAY[gpu.multiprocessors].get((n, k, m), needed)
            assert under_way >= least * KIB, (gpu, n, k, m, under_way)


def test_shared_memory_has_no_bank_conflicts():
    lines = [line.split() for line in checked(str(int4_plans.program()), "banks").splitlines()]
    measured = {name: [float(value) for other, value in lines if other == name] for name, _ in lines}
    assert measured.pop("rows_in_order") == [8.0]  # the measure sees conflicts where there are some
    assert measured.pop("stage") == [0.0] * 4  # all of these patterns begin at multiples of 128 bytes
    assert set(measured) == {"codes", "ldmatrix", "x_beside_int8", "x_copies", "scales", "sums"}
    for name, values in measured.items():
        assert set(values) == {1.0}, name
