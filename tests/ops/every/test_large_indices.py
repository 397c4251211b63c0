"""Products whose tensors pass 2^31 elements: by strides, which cost nothing, and on a GPU by sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import qops
from qops.testing import assert_bitwise, random_activations
from tests.support.cuda.cuda_backend import Backend, a_gpu, gpu, made_there
from tests.support.ops.int8_gemm_oracle import activations, make_weight
from tests.support.ops.random_weights import KINDS, random_int4

EMULATED = Backend(torch.ops.qops_emu, "cpu")


def far(values: Tensor, path: Path, more: int = 0) -> Tensor:
    """The same rows, the last of them behind element 2^31; the file is sparse."""
    m, n = values.shape
    stride = (2**31 // (m - 1) + 64) // 64 * 64 + more
    memory = torch.from_file(str(path), shared=True, size=(m - 1) * stride + n, dtype=values.dtype)
    return memory.as_strided((m, n), (stride, 1)).copy_(values)


@pytest.mark.parametrize("more", (0, 1), ids=("aligned", "copied"))
@pytest.mark.parametrize("m", (3, 40))
def test_rows_of_int4_gemm(emulated, m, more, tmp_path):
    n, k = 48, 128
    tensors, _ = random_int4(n, k, 64, "zero_point")
    with gpu(EMULATED):
        w = made_there(EMULATED, tensors, "zero_point")
    x, residual = (random_activations(m, columns, dtype=torch.bfloat16, seed=m) for columns in (k, n))
    weight = (w.packed, w.scales, w.zeros, None, None, n, 64, KINDS.index("zero_point"))
    want = EMULATED.ops.int4_gemm.fused(x, *weight, residual=residual)
    for name, rows in (
        ("x", (far(x, tmp_path / "x", more), residual)),
        ("y", (x, far(residual, tmp_path / "y", more))),
    ):
        got = EMULATED.ops.int4_gemm.fused(rows[0], *weight, residual=rows[1])
        assert_bitwise(got, want, f"{name} of {m} rows")


@pytest.mark.parametrize("more", (0, 1), ids=("aligned", "copied"))
@pytest.mark.parametrize("m", (3, 40))
def test_rows_of_int4_int8_gemm(emulated, m, more, tmp_path):
    n, k = 48, 128
    tensors, _ = random_int4(n, k, 64, "zero_point")
    with gpu(EMULATED):
        w = made_there(EMULATED, tensors, "zero_point")
    q, scale, _ = activations(m, k, 0)
    residual = random_activations(m, n, dtype=torch.bfloat16, seed=m)
    rest = (w.packed, w.scales, w.zeros, None, None, n, 64, KINDS.index("zero_point"), torch.bfloat16)
    want = EMULATED.ops.int4_int8_gemm.fused(q, scale, *rest, residual=residual)
    far_scale = far(scale[:, None], tmp_path / "s", more)[:, 0]
    for name, (a, s, r) in {
        "q": (far(q, tmp_path / "q", more), scale, residual),
        "scale": (q, far_scale, residual),
        "residual": (q, scale, far(residual, tmp_path / "y", more)),
    }.items():
        assert_bitwise(EMULATED.ops.int4_int8_gemm.fused(a, s, *rest, residual=r), want, f"{name} of {m} rows")


@pytest.mark.parametrize("more", (0, 1), ids=("aligned", "copied"))
@pytest.mark.parametrize("m", (3, 40))
def test_rows_of_int8_gemm(emulated, m, more, tmp_path):
    n, k = 48, 128
    w, (q, scale, zero_point) = make_weight(n, k, 0), activations(m, k, 0)
    packed = EMULATED.ops.int8_pack(w.canonical()["qweight"])
    residual = random_activations(m, n, dtype=torch.bfloat16, seed=m)
    rest = (packed, w.scales, None, n, torch.bfloat16)
    want = EMULATED.ops.int8_gemm.fused(q, scale, zero_point, *rest, residual=residual)
    factors = [far(t[:, None], tmp_path / f"{i}", more)[:, 0] for i, t in enumerate((scale, zero_point))]
    far_q, far_residual = far(q, tmp_path / "q", more), far(residual, tmp_path / "y", more)
    for name, (a, s, z, r) in {
        "q": (far_q, scale, zero_point, residual),
        "scale and zero_point": (q, *factors, residual),
        "residual": (q, scale, zero_point, far_residual),
    }.items():
        assert_bitwise(EMULATED.ops.int8_gemm.fused(a, s, z, *rest, residual=r), want, f"{name} of {m} rows")


def test_packed_weights_on_the_cpu():
    """Pages of zeros that are only read take no memory; the last strips hold the weight."""
    n, k = 48, 8192
    strips = 2**31 // (16 * k) + n // 16
    w, (q, scale, _) = make_weight(n, k, 0), activations(1, k, 0)
    zeros = torch.from_numpy(np.zeros((strips, 16 * k), np.int8))
    zeros[-n // 16 :] = w.packed
    scales = torch.ones(strips, 1, 16)
    scales[-n // 16 :] = w.scales
    y = torch.ops.qops.int8_gemm(q, scale, None, zeros, scales, None, 16 * strips, torch.bfloat16)
    assert_bitwise(y[:, -n:], qops.int8_gemm(q, scale, w), "int8_gemm")
    assert not y[:, :-n].any()

    _, here = random_int4(n, 2 * k, -1, "symmetric", scale_dtype=torch.float32)
    codes = torch.from_numpy(np.zeros((strips, 16 * k), np.uint8))
    codes[-n // 16 :] = here.packed
    scales[-n // 16 :] = here.scales
    x = random_activations(1, 2 * k, dtype=torch.float32, seed=0)
    y = torch.ops.qops.int4_gemm(x, codes, scales, None, None, None, 16 * strips, 2 * k, 0)
    assert_bitwise(y[:, -n:], qops.int4_gemm(x, here), "int4_gemm")


# On a GPU ------------------------------------------------------------------------------------------------------------


def test_results_on_a_gpu():
    """M N > 2^31: the last rows are those of the same rows alone, at the same place in the tensor cores' tiles."""
    there, n, k = a_gpu(), 2**14, 64
    m = 2**31 // n + 128
    tensors, _ = random_int4(n, k, 64, "symmetric")
    w4 = qops.Int4Weight.from_canonical(**tensors, kind="symmetric").to(there.device)
    w8, (q, scale, _) = make_weight(n, k, 0).to(there.device), activations(m, k, 0)
    q, scale = there.on_device(q), there.on_device(scale)
    y = qops.int8_gemm(q, scale, w8)
    for rows in (slice(0, 3), slice(m - 3, m)):
        assert_bitwise(y[rows].cpu(), qops.int8_gemm(q[rows], scale[rows], w8).cpu(), f"int8_gemm {rows}")
    x = there.on_device(random_activations(m, k, dtype=torch.float16, seed=1))
    y = qops.int4_gemm(x, w4, batch_invariant=True)
    for rows in (slice(0, 3), slice(m - 3, m)):
        assert_bitwise(y[rows].cpu(), qops.int4_gemm(x[rows], w4, batch_invariant=True).cpu(), f"int4_gemm {rows}")


@pytest.mark.parametrize("m", (1, 40))
def test_packed_weights_on_a_gpu(m):
    there, k = a_gpu(), 8192
    n = 2**31 // k + 48
    tail, (q, scale, _) = make_weight(48, k, 0), activations(m, k, 0)
    qweight = torch.zeros(n, k, dtype=torch.int8, device=there.device)
    qweight[-48:] = there.on_device(tail.canonical()["qweight"])
    packed = there.ops.int8_pack(qweight)
    scales = torch.ones(n // 16, 1, 16, device=there.device)
    scales[-3:] = there.on_device(tail.scales)
    q, scale = there.on_device(q), there.on_device(scale)
    y = there.ops.int8_gemm(q, scale, None, packed, scales, None, n, torch.bfloat16)
    assert_bitwise(y[:, -48:].cpu(), qops.int8_gemm(q, scale, tail.to(there.device)).cpu(), "int8_gemm")
    assert not y[:, :-48].any()
    assert_bitwise(there.ops.int8_unpack(packed, n)[-48:].cpu(), qweight[-48:].cpu(), "int8_pack")

    tensors, _ = random_int4(48, 2 * k, -1, "symmetric", scale_dtype=torch.float32)
    qweight = torch.zeros(n, k, dtype=torch.uint8, device=there.device)
    qweight[-48:] = there.on_device(tensors["qweight"])
    packed = there.ops.int4_pack(qweight)
    w = qops.Int4Weight.from_canonical(**tensors, kind="symmetric").to(there.device)
    scales[-3:] = w.scales
    x = there.on_device(random_activations(m, 2 * k, dtype=torch.float16, seed=0))
    y = there.ops.int4_gemm(x, packed, scales, None, None, None, n, 2 * k, 0)
    assert_bitwise(y[:, -48:].cpu(), qops.int4_gemm(x, w).cpu(), "int4_gemm")
    assert_bitwise(there.ops.int4_unpack(packed, n)[-48:].cpu(), qweight[-48:].cpu(), "int4_pack")
