"""int8_gemm at the edges of its tiles: what matters to the level amx most, and holds at every level."""

from __future__ import annotations

import itertools

import pytest
import torch

import qops
from qops.testing import assert_bitwise
from tests.support.ops.int8_gemm_oracle import activations, by_contract, make_weight
from tests.support.ops.walls import before_a_wall


@pytest.mark.parametrize("n", (8, 16, 24, 32, 40, 48, 64, 72, 104))
def test_edges_of_tiles(n):
    """M and K around tiles of 16 rows by 64 columns and pairs of them, N around chunks of four strips: all pairs."""
    for k in range(8, 208, 8):
        w, (q, scale, zero_point) = make_weight(n, k, k), activations(49, k, k)
        integers = [by_contract(q, scale, w, zero_point=z, out_dtype=torch.int32) for z in (None, zero_point)]
        floats = by_contract(q, scale, w, zero_point=zero_point)
        for m in range(1 + (k + n) // 8 % 4, 50, 4):
            args, z = (q[:m], scale[:m], w), zero_point[:m]
            assert_bitwise(qops.int8_gemm(*args, out_dtype=torch.int32), integers[0][:m], f"M = {m}, K = {k}")
            got = qops.int8_gemm(*args, zero_point=z, out_dtype=torch.int32)
            assert_bitwise(got, integers[1][:m], f"M = {m}, K = {k}, zero_point")
            assert_bitwise(qops.int8_gemm(*args, zero_point=z), floats[:m], f"M = {m}, K = {k}, bfloat16")


@pytest.mark.parametrize("shape", ((48, 4104), (200, 1544), (24, 16392)), ids=str)
def test_many_rows_of_many_columns(shape, threads):
    """More rows than are packed at a time, and enough of them to fetch weights ahead."""
    n, k = shape
    w, (q, scale, zero_point) = make_weight(n, k, 0), activations(273, k, 0)
    for z in (None, zero_point):
        want = by_contract(q, scale, w, zero_point=z)
        for count in (1, 2, 3):
            threads(count)
            assert_bitwise(qops.int8_gemm(q, scale, w, zero_point=z), want, f"{count} threads")


def test_nothing_behind_the_operands_is_read():
    for (n, k), m in itertools.product(((16, 8), (48, 72), (40, 120), (64, 128), (24, 200)), (1, 6, 13, 17, 32, 50)):
        w, (q, scale, zero_point) = make_weight(n, k, m), activations(m, k, m)
        want = by_contract(q, scale, w, zero_point=zero_point)
        args = [before_a_wall(t) for t in (q, scale, zero_point, w.packed, w.scales)]
        got = torch.ops.qops.int8_gemm(*args, None, n, torch.bfloat16)
        assert_bitwise(got, want, f"M = {m}, N = {n}, K = {k}")


def test_products_of_torch_in_between_change_nothing(threads):
    """oneDNN configures the tiles of the threads for itself, and so do we."""
    w, (q, scale, zero_point) = make_weight(80, 200, 0), activations(49, 200, 0)
    w_codes = w.canonical()["qweight"]
    x, dense = q.bfloat16(), w_codes.T.bfloat16()
    for count in (1, 2):
        threads(count)
        int_mm, float_mm = torch._int_mm(q, w_codes.T), x @ dense
        for m in (49, 7, 32, 49):
            args, z = (q[:m], scale[:m], w), zero_point[:m]
            want = by_contract(*args, zero_point=z)
            assert_bitwise(qops.int8_gemm(*args, zero_point=z), want, f"M = {m}")
            assert_bitwise(torch._int_mm(q, w_codes.T), int_mm, f"_int_mm after M = {m}")
            assert_bitwise(qops.int8_gemm(*args, zero_point=z), want, f"M = {m} after _int_mm")
            assert_bitwise(x @ dense, float_mm, f"bfloat16 after M = {m}")
            assert_bitwise(qops.int8_gemm(*args, out_dtype=torch.int32), int_mm[:m], f"M = {m} after bfloat16")
