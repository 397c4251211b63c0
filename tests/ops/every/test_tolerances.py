"""The bounds of qops.testing: every result that a contract allows passes, whatever another implementation's luck, and
faults of kernels do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qops
from qops.ops.int4_gemm import KINDS, int4_gemm_ref
from qops.ops.int8_gemm import int8_gemm_ref
from qops.ops.rms_norm import rms_norm_ref
from qops.ops.rotary import rotary_ref
from qops.ops.silu_mul import silu_mul_ref
from qops.testing import (
    FLOAT_DTYPES,
    assert_accurate,
    assert_within,
    generator,
    int8_gemm_bound,
    random_activations,
    rms_norm_bound,
    rotary_bound,
    silu_mul_bound,
    weight_only_bound,
)
from tests.support.ops.random_weights import random_int4, random_int8

K, GROUP, EPS = 576, 64, 1e-5


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_whatever_is_within_the_bound_before_it_is_rounded_passes(dtype):
    rng = generator(0)
    ref = torch.randn(200_000, generator=rng).double()
    for relative in (0.0, 1e-7, 1e-4, 1e-2):
        y = (ref * (1 + relative * torch.randn(ref.shape, generator=rng))).float()
        bound = (y.double() - ref).abs()
        assert_within(y.to(dtype), ref, bound)
        step = 4 * torch.finfo(dtype).eps * (ref.abs() + 2 * bound) + 1e-6  # two steps of R() at least
        with pytest.raises(AssertionError, match=r"200000 of 200000 elements differ, first at \(0,\)"):
            assert_within((ref + 2 * bound + step).to(dtype), ref, bound)


def test_what_is_not_finite_must_be_so_in_the_reference():
    ref, zero = torch.tensor([1.0, float("inf"), 70000.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    assert_within(ref.half(), ref, zero)
    for wrong in ([float("nan"), float("inf"), float("inf")], [1.0, float("inf"), 65504.0]):
        for check in (lambda y: assert_within(y, ref, zero), lambda y: assert_accurate(y, ref, ref)):
            with pytest.raises(AssertionError, match="1 non-finite values differ from the reference"):
                check(torch.tensor(wrong).half())
    with pytest.raises(AssertionError, match="elements differ"):  # a bound that is no number allows nothing
        assert_within(torch.ones(3), torch.ones(3).double(), torch.full((3,), float("nan"), dtype=torch.float64))
    with pytest.raises(AssertionError, match=r"shape \(2,\), expected \(3,\)"):
        assert_within(ref[:2].half(), ref, zero)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_few_elements(kind, dtype):
    """8 x 8 and 1 row: torch adds so few products exactly, or nearly, on one CPU and not on another."""
    for seed in range(50):
        _, w = random_int4(8, 8, 8, kind, scale_dtype=FLOAT_DTYPES[seed % 3], seed=seed)
        x = random_activations(1, 8, dtype=dtype, seed=seed)
        assert_within(qops.int4_gemm(x, w), int4_gemm_ref(x, w), weight_only_bound(x, w), f"seed {seed}")


def gemm_faults(x: Tensor, w: Tensor) -> dict[str, Tensor]:
    """y in float32 [M, N]; w in float64 [N, K]."""
    dropped, scaled = w.clone(), w.clone()
    dropped[:, 77] = 0
    scaled[:, GROUP : 2 * GROUP] *= 1 + 2**-6
    halves = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float16)
    for at in range(0, K, 16):  # a float16 accumulator in a tensor core
        halves += (x[:, at : at + 16].double() @ w[:, at : at + 16].T).half()
    shifted = torch.roll(x, 1, 0).double() @ w.T
    return {
        "one column left out": (x.double() @ dropped.T).float(),
        "another scale of one group": (x.double() @ scaled.T).float(),
        "float16 sums": halves.float(),
        "another row": shifted.float(),
    }


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("where", ("cpu", "gpu"))
@pytest.mark.parametrize("bits", (4, 8))
def test_faults_of_a_weight_only_product(bits, where, dtype):
    w = random_int4(64, K, GROUP, "symmetric", seed=3)[1] if bits == 4 else random_int8(64, K, GROUP, seed=3)[1]
    x = random_activations(7, K, dtype=dtype, seed=0)
    dense = w.dequantize(torch.float64)
    ref, bound = x.double() @ dense.T, weight_only_bound(x, w, gpu=where == "gpu")
    assert_within((x.float() @ dense.float().T).to(dtype), ref, bound)
    for fault, y in gemm_faults(x, dense).items():
        if fault == "float16 sums" and dtype == torch.bfloat16:
            continue  # the output's own rounding is larger
        with pytest.raises(AssertionError, match="elements differ"):
            assert_within(y.to(dtype), ref, bound)
            pytest.fail(fault)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_faults_of_int8_gemm(dtype):
    w = random_int8(64, K, -1)[1]
    q = torch.randint(-128, 128, (7, K), generator=generator(0), dtype=torch.int8)
    scale = (torch.rand(7, generator=generator(1)) + 0.5) / 100
    ref, bound = int8_gemm_ref(q, scale, w), int8_gemm_bound(q, scale, w)
    assert_within(qops.int8_gemm(q, scale, w, out_dtype=dtype), ref, bound)
    q[3, 5] = -q[3, 5]
    with pytest.raises(AssertionError, match=r"elements differ, first at \(3, "):
        assert_within(qops.int8_gemm(q, scale, w, out_dtype=dtype), ref, bound)


@pytest.mark.parametrize("rounding", ("hf", "fp32"))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_faults_of_the_row_operators(dtype, rounding):
    x, up = (random_activations(7, K, dtype=dtype, seed=seed, outliers=False) for seed in range(2))
    weight = random_activations(K, dtype=torch.float32, seed=2, outliers=False)
    ref, bound = rms_norm_ref(x, weight, EPS, rounding="fp32"), rms_norm_bound(x, weight, EPS, rounding=rounding)
    step = torch.finfo(dtype).eps
    assert_within(qops.rms_norm(x, weight, EPS, rounding=rounding), ref, bound, "rms_norm")
    with pytest.raises(AssertionError, match="elements differ"):  # an element that its sum lacks
        rstd = torch.rsqrt(x[:, 1:].double().square().sum(-1, keepdim=True) / K + EPS)
        assert_within((x.double() * rstd * weight * (1 + 2 * step)).to(dtype), ref, bound)

    ref, bound = silu_mul_ref(x, up, rounding="fp32"), silu_mul_bound(x, up, dtype, rounding=rounding)
    assert_within(qops.silu_mul(x, up, rounding=rounding), ref, bound, "silu_mul")
    with pytest.raises(AssertionError, match="elements differ"):  # GELU's usual approximation of a sigmoid
        assert_within((torch.sigmoid(1.02 * x.double()) * x.double() * up.double()).to(dtype), ref, bound)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_faults_of_rotary(dtype):
    x = random_activations(5, 2, 64, dtype=dtype, seed=0, outliers=False)
    angles = torch.arange(6)[:, None] / 1e4 ** (torch.arange(0, 64, 2) / 64)
    cos, sin = angles.cos(), angles.sin()
    ref, bound = rotary_ref(x, cos, sin), rotary_bound(x, cos, sin)
    assert_within(qops.rotary(x, x, cos, sin)[0], ref, bound)
    for fault in (rotary_ref(x, cos[1:], sin[1:]), rotary_ref(x, cos, -sin), rotary_ref(x, cos, sin, None, True)):
        with pytest.raises(AssertionError, match="elements differ"):
            assert_within(fault.to(dtype), ref, bound)
