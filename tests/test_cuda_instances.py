"""Every instance of every CUDA kernel once, on one small shape: what sanitizers and the tracer look at in CI.

`--emulator-tracer` adds what it counts: that each instance has run, without a race, and what its accesses cost.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import pytest
import torch

import qops
from cuda_backend import POLICIES, Backend, assert_same, gpu, made_there
from cuda_tools import build_emulated_operators, checked
from int8_gemm_oracle import activations, by_contract, make_weight
from qops.ops.int4_gemm import int4_gemm_ref
from qops.testing import FLOAT_DTYPES, assert_accurate, assert_bitwise, random_activations, strided_rows
from random_weights import KINDS, random_int4

EMULATED = Backend(torch.ops.qops_emu, "cpu")
# One H for each shape of row.cuh.
ALIGNED = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 33024)
UNALIGNED = (100, 1030, 8195)
# (M, N, K, multiprocessors): tiles of 8, 16, 32, 64 and 128 tokens; rings of three stages and more are filled again.
INT4 = ((5, 80, 1152, 1), (13, 80, 1152, 1), (32, 144, 640, 1), (64, 144, 640, 1), (128, 144, 640, 1))
INT4_SPLIT = ((5, 32, 4608, 132), (32, 32, 576, 8))
INT8 = tuple((m, 144, 640, 1) for m in (8, 16, 32, 64, 128))
INT8_SPLIT = ((8, 144, 576, 3), (16, 32, 1024, 8), (32, 32, 2048, 3), (64, 32, 2048, 8), (128, 32, 2048, 8))


@pytest.fixture(scope="module", autouse=True)
def before(emulated) -> None:
    """What other tests have left is not counted here."""
    emulated.take_trace()


@pytest.fixture
def fifo(emulated):
    """The order of threads in which a missing synchronisation changes no result."""
    emulated.configure(1, POLICIES["fifo"], "")
    yield emulated
    emulated.configure(1, POLICIES["prio"], "")


# One call of each ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", (*ALIGNED, *UNALIGNED))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_rows(fifo, dtype, h):
    x, r = (random_activations(5 if h <= 1024 else 1, h, dtype=dtype, seed=h + i) for i in range(2))
    w = random_activations(h, dtype=dtype, seed=3, outliers=False)
    assert_same(EMULATED, "add_rms_norm", x, r, w, 1e-5)
    assert_same(EMULATED, "rms_norm_int8", x, w, 1e-5)
    assert_same(EMULATED, "quantize_int8", x)
    assert_same(EMULATED, "quantize_int8_asym", x)
    assert_same(EMULATED, "quantize_int8_static", x, torch.tensor(0.02))
    assert_same(EMULATED, "silu_mul", x, r, overload="gate_up")
    assert_same(EMULATED, "silu_mul_int8", torch.cat((x, r), dim=-1))


@pytest.mark.parametrize("d", (64, 128, 512, 1024, 2048, 4096, 8192, 12288, 24576, 6, 1030, 8198))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_heads(fifo, dtype, d):
    if d * dtype.itemsize > 48 * 1024:
        pytest.skip("a head that has no kernel")
    q, k = (random_activations(2, heads, d, dtype=dtype, seed=heads) for heads in (3, 2))
    w = random_activations(d, dtype=dtype, seed=5, outliers=False)
    cos, sin = (torch.linspace(i, 1, d).view(2, d // 2).to(dtype) for i in range(2))
    assert_same(EMULATED, "qk_norm_rotary", q, k, w, w, cos, sin, 1e-6)
    assert_same(EMULATED, "rotary", q, k, cos, sin)


@pytest.mark.parametrize("kind", ("zero_point", "offset"))
@pytest.mark.parametrize("fine", (False, True), ids=("coarse", "fine"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_int4_gemm(fifo, dtype, fine, kind):
    split = INT4_SPLIT if kind == "zero_point" and not fine else ()
    for index, (m, n, k, multiprocessors) in enumerate((*INT4, *split)):
        tensors, here = random_int4(n, k, 32 if fine else 64, kind, seed=index)
        with gpu(EMULATED):
            w = made_there(EMULATED, tensors, kind)
        fifo.configure(1, POLICIES["fifo"], "", 89, multiprocessors)
        x = random_activations(m, k, dtype=dtype, seed=index)
        weight = (w.packed, w.scales, w.zeros, None, None, n, w.group_size, KINDS.index(kind))
        y = EMULATED.ops.int4_gemm(x, *weight)
        assert_accurate(y, int4_gemm_ref(x, here), x @ here.dequantize(dtype).T, f"{here}, M = {m}")
        if m == INT4[0][0]:  # from a copy
            assert_bitwise(EMULATED.ops.int4_gemm(strided_rows(x, 1), *weight), y)


@pytest.mark.parametrize("asymmetric", (False, True), ids=("symmetric", "asymmetric"))
def test_int8_gemm(fifo, asymmetric):
    for index, (m, n, k, multiprocessors) in enumerate((*INT8, *INT8_SPLIT)):
        w, (q, scale, zero_point) = make_weight(n, k, index), activations(m, k, index)
        z = zero_point if asymmetric else None
        fifo.configure(1, POLICIES["fifo"], "", 89, multiprocessors)
        packed = EMULATED.ops.int8_pack(w.canonical()["qweight"])
        weight = (packed, w.scales, None, n, torch.bfloat16)
        y = EMULATED.ops.int8_gemm(q, scale, z, *weight)
        assert_bitwise(y, by_contract(q, scale, w, zero_point=z, out_dtype=torch.bfloat16))
        if m == INT8[0][0]:
            far = torch.zeros(m, k + 8, dtype=torch.int8)[:, 1 : k + 1].copy_(q)
            assert_bitwise(EMULATED.ops.int8_gemm(far, scale, z, *weight), y)


def test_weights(fifo):
    tensors, here = random_int4(48, 192, 64, "zero_point")
    want = [qops.int4_dequantize(here, dtype) for dtype in FLOAT_DTYPES]
    with gpu(EMULATED):
        w = made_there(EMULATED, tensors, "zero_point")
        for weights in want:
            assert_bitwise(qops.int4_dequantize(w, weights.dtype), weights)
        assert_bitwise(w.qweight, tensors["qweight"])
    qweight = make_weight(48, 192, 0).canonical()["qweight"]
    assert_bitwise(EMULATED.ops.int8_unpack(EMULATED.ops.int8_pack(qweight), 48), qweight)


# What the tracer has counted -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Requests:
    """Of all executions of one line of a kernel, by the lanes of a warp together."""

    kernel: str
    memory: str
    instruction: str
    place: str  # the line, and those that it is inlined into
    requests: int
    taken: int  # wavefronts of shared memory, or sectors of global memory
    least: int


@pytest.fixture(scope="module")
def trace(emulated, request, before) -> list[Requests]:
    if not request.config.getoption("--emulator-tracer"):
        pytest.skip("needs --emulator-tracer")
    lines = [line.split("\t") for line in emulated.take_trace()]
    return [Requests(*line[1:5], *map(int, line[5:])) for line in lines if line[0] == "requests"]


def test_dump(trace):
    for r in trace:
        if r.taken != r.least: print(r.kernel,'|',r.memory,r.instruction,r.place, r.requests, r.taken, r.least, round(r.taken/r.least,2))
