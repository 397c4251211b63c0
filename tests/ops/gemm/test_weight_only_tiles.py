"""The weight-only GEMMs at the edges of tiles of 16 rows by 64 columns: what matters to the level amx most, and holds
at every level. A row's bits are those of a call of its own, which test_int4_gemm.py and test_int8_weight_only_gemm.py
compare with the contract."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qops
from qops.testing import Guarded, assert_bitwise, random_activations, strided_rows
from tests.support.ops.random_weights import KINDS, SCALE_DTYPES, random_int4, random_int8
from tests.support.ops.walls import before_a_wall

Weight = qops.Int4Weight | qops.Int8Weight
HALVES = (torch.bfloat16, torch.float16)
# (bits, kind)
FORMS = (*((4, kind) for kind in KINDS), *((8, kind) for kind in qops.Int8Weight.KINDS))


def make_weight(n: int, k: int, group_size: int, bits: int, kind: str, **how: Any) -> Weight:
    return (random_int4 if bits == 4 else random_int8)(n, k, group_size, kind, **how)[1]


def gemm(x: Tensor, w: Weight, bias: Tensor | None = None, **how: Any) -> Tensor:
    return (
        qops.int4_gemm(x, w, bias, **how) if isinstance(w, qops.Int4Weight) else qops.int8_weight_only_gemm(x, w, bias)
    )


def activations(m: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of all kinds among others: of zeros, of the largest digits, of four digits, with NaN and infinity."""
    x = random_activations(m, k, dtype=dtype, seed=seed)
    for i, row in enumerate(range(1, m, 3)):
        place = (7 * row) % k
        if i % 6 == 0:
            x[row, place] = 1e4
        elif i % 6 == 1:
            x[row] = 0
        elif i % 6 == 2:
            x[row] = -5.0 if row % 2 else 5.0
        elif i % 6 == 3:
            x[row, place] = float("nan")
        elif i % 6 == 4:
            x[row, place] = -float("inf")
    return x


def row_by_row(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([f(x[i : i + 1]) for i in range(len(x))])


@pytest.mark.parametrize("bits, kind", FORMS)
def test_edges_of_tiles(bits, kind):
    """Groups of every multiple of 16 up to two blocks and of K alone, N and M around strips, chunks and tiles."""
    groups = [(16 * i, 48 * i) for i in range(1, 17)] + [(k, k) for k in (8, 24, 136, 264)]
    for seed, (group_size, k) in enumerate(groups):
        n = (8, 16, 24, 32, 40, 72)[seed % 6]
        how = {"scale_dtype": SCALE_DTYPES[seed % 3], "act_order": seed % 4 == 1}
        w = make_weight(n, k, group_size, bits, kind, **how)
        x = activations(50, k, HALVES[seed % 2], seed)
        bias = random_activations(n, dtype=torch.float32, seed=seed) if seed % 2 else None
        want = row_by_row(functools.partial(gemm, w=w, bias=bias), x)
        # Each with every group, in every other form.
        for m in ((2, 4, 7, 9, 11, 16, 31, 33), (3, 5, 8, 12, 17, 32, 50))[(seed // 4 + FORMS.index((bits, kind))) % 2]:
            assert_bitwise(gemm(x[:m], w, bias), want[:m], f"M = {m}, N = {n}, K = {k}, G = {group_size}")


@pytest.mark.parametrize("bits, kind", FORMS)
def test_slices_and_passes(bits, kind):
    """From fewer blocks than slices to several passes a slice."""
    for turn, blocks in enumerate((1, 2, 3, 7, 8, 9, 12, 17, 24, 31, 40, 80), start=FORMS.index((bits, kind))):
        group_size = (16, 128)[turn % 2]
        k = blocks * group_size
        w = make_weight(40, k, group_size, bits, kind)
        x = activations(20, k, torch.bfloat16, blocks)
        want = row_by_row(functools.partial(gemm, w=w), x)
        for m in (4, 7, 20):
            assert_bitwise(gemm(x[:m], w), want[:m], f"M = {m}, {blocks} blocks of {group_size}")


@pytest.mark.parametrize("bits", (4, 8))
def test_many_rows_of_many_columns(bits, threads):
    """More rows than are packed at a time, few strips for many threads, enough of them to fetch codes ahead; few rows
    of as many columns, and one tile of them, which meets more blocks at a time."""
    many = ((200, 4096, 150, 128), (24, 16384, 70, 128), (16, 512, 300, 128), (104, 2560, 200, 32))
    few = ((1000, 4096, 7, 128), (88, 16384, 4, 128), (56, 16384, 16, 128), (40, 6400, 13, 32), (40, 2400, 15, 16))
    for n, k, m, group_size in (*many, *few):
        w = make_weight(n, k, group_size, bits, "offset")
        x = activations(m, k, torch.bfloat16, 0)
        threads(1)
        want = row_by_row(functools.partial(gemm, w=w), x)
        for count in (1, 2, 3):
            threads(count)
            assert_bitwise(gemm(x, w), want, f"{n} x {k}, groups of {group_size}, {count} threads")


def test_rows_of_four_digits_alone():
    w = make_weight(48, 256, 64, 4, "zero_point")
    x = random_activations(40, 256, dtype=torch.bfloat16, seed=0)
    x[:, 5] = 1e4
    assert_bitwise(gemm(x, w), row_by_row(functools.partial(gemm, w=w), x))


@pytest.mark.parametrize("m", (6, 37))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_epilogues(dtype, m):
    scale, zero_point = torch.tensor(0.05), torch.tensor(-7, dtype=torch.int32)
    for seed, (kind, n) in enumerate(itertools.product(KINDS, (16, 48, 80, 144))):
        w = make_weight(n, 144, 48, 4, kind, act_order=seed % 3 == 0)
        bias = random_activations(n, dtype=dtype, seed=seed) if seed % 2 else None
        x = activations(m, 144, dtype, seed)
        x[::3] = random_activations((m + 2) // 3, 144, dtype=dtype, seed=seed + 1)  # int8 of NaN is not defined
        x[5, 7] = 3000.0
        x = x.nan_to_num(0, 0, 0)
        y = gemm(x, w, bias)
        residual = random_activations(m, n, dtype=dtype, seed=seed + 2)
        assert_bitwise(gemm(x, w, bias, residual=strided_rows(residual)), y + residual, f"residual, {w}")
        out = Guarded(residual.clone())
        gemm(x, w, bias, residual=out.tensor, out=out.tensor)
        assert_bitwise(out.tensor, y + residual, f"in place, {w}")
        out.check()
        for z in (None, zero_point):
            got = gemm(x, w, bias, out_scale=scale, out_zero_point=z)
            assert_bitwise(got, qops.quantize_int8_static(y, scale, z), f"int8, {w}")
        w.mix_gate_up()
        assert_bitwise(gemm(x, w, bias, silu_mul=True), qops.silu_mul(y), f"silu_mul, {w}")


def test_nothing_behind_the_operands_is_read():
    sizes = ((16, 16, 16), (24, 48, 48), (40, 144, 144), (64, 128, 64), (24, 192, 96))
    for (n, k, group_size), m, (bits, kind) in itertools.product(sizes, (4, 8, 12, 17, 50), FORMS):
        w = make_weight(n, k, group_size, bits, kind, act_order=True)
        x = activations(m, k, torch.bfloat16, m)
        tensors = (x, w.packed, w.scales, w.zeros, w.perm)
        args = [None if t is None else before_a_wall(t) for t in tensors]
        if isinstance(w, qops.Int4Weight):
            got = torch.ops.qops.int4_gemm(*args, None, n, w.group_size, KINDS.index(kind))
        else:
            got = torch.ops.qops.int8_weight_only_gemm(*args, None, n, w.group_size)
        assert_bitwise(got, gemm(x, w), f"M = {m}, {w}")


def test_perm_out_of_range():
    w = make_weight(32, 64, 32, 4, "symmetric", act_order=True)
    perm = w.perm.clone()
    perm[63] = 64
    out = torch.full((20, 32), 77, dtype=torch.bfloat16)
    args = (torch.zeros(20, 64, dtype=torch.bfloat16), w.packed, w.scales, None, perm, None, 32, 32, 0)
    with pytest.raises(ValueError, match=r"^qops\.int4_gemm: perm must hold indices in 0 \.\. 63"):
        torch.ops.qops.int4_gemm.out(*args, out=out)
    assert bool((out == 77).all())


def test_products_of_torch_in_between_change_nothing(threads):
    """oneDNN configures the tiles of the threads for itself, and so do we."""
    w = make_weight(80, 192, 64, 4, "symmetric")
    x = random_activations(49, 192, dtype=torch.bfloat16, seed=0)
    dense = w.dequantize(torch.bfloat16)
    for count in (1, 2):
        threads(count)
        theirs, ours = x @ dense.T, gemm(x, w)
        for m in (49, 16, 5, 49):
            assert_bitwise(gemm(x[:m], w), ours[:m], f"M = {m}")
            assert_bitwise(x @ dense.T, theirs, f"bfloat16 after M = {m}")
