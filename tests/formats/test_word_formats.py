"""GPTQ, AWQ and compressed-tensors: weights from integers of one's own, against each format's written definition."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import qops
from qops import Int4Weight, Int8Weight
from qops.formats import awq, compressed_tensors, gptq
from qops.testing import assert_bitwise
from tests.support.formats import encoders

N, K = 24, 128
SCALES = (torch.float16, torch.bfloat16, torch.float32)


def numbers(
    bits: int = 4, group_size: int = 32, scale_dtype: torch.dtype = torch.float16, seed: int = 0, low: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, zero points and scales; zero points from ``low``, both ends of the range among them."""
    random, most = torch.Generator().manual_seed(seed), (1 << bits) - 1
    codes = torch.randint(0, most + 1, (N, K), generator=random, dtype=torch.uint8)
    zeros = torch.randint(low, most + 1, (N, K // group_size), generator=random, dtype=torch.uint8)
    zeros[0, 0], zeros[-1, -1] = low, most
    scales = (torch.randn(N, K // group_size, generator=random) * 0.05).to(scale_dtype)
    scales[1, 0], scales[2, 0] = 0, torch.finfo(scale_dtype).smallest_normal / 4
    return codes, zeros, scales


def exact(codes: Tensor, zeros: Tensor | int, scales: Tensor, group: Tensor | None = None) -> Tensor:
    """``s * (q - z)`` in float64, without a rounding."""
    columns, groups = codes.shape[1], scales.shape[1]
    group = torch.arange(columns) // (columns // groups) if group is None else group.long()
    zeros = zeros.double()[:, group] if isinstance(zeros, Tensor) else zeros
    return scales.double()[:, group] * (codes.double() - zeros)


def assert_holds(weight: Int4Weight | Int8Weight, wanted: Tensor) -> None:
    for dtype in (weight.scale_dtype, torch.float32):
        assert_bitwise(weight.dequantize(dtype) + 0.0, wanted.float().to(dtype) + 0.0)  # 0 * -1 is 0 here
    assert weight.is_packed


def shuffled_groups(group_size: int, seed: int = 3) -> Tensor:
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    return torch.empty(K, dtype=torch.int64).index_copy_(0, order, torch.arange(K) // group_size)


# GPTQ ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("scale_dtype", SCALES)
@pytest.mark.parametrize("group_size", [16, 32, K])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_of_4_bits(version, scale_dtype, group_size, act_order):
    codes, zeros, scales = numbers(4, group_size, scale_dtype)
    group = shuffled_groups(group_size) if act_order else torch.arange(K) // group_size
    tensors = encoders.gptq(codes, zeros, scales, group, version=version)
    weight = Int4Weight.from_gptq(**tensors, zero_add="none" if version == 2 else None)
    assert_holds(weight, exact(codes, zeros, scales, group))
    assert weight.kind == "zero_point" and weight.group_size == group_size
    assert weight.act_order == (act_order and group_size != K)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_of_8_bits(version, scale_dtype, act_order):
    codes, zeros, scales = numbers(8, 32, scale_dtype)
    group = shuffled_groups(32) if act_order else None
    tensors = encoders.gptq(codes, zeros, scales, group, bits=8, version=version)
    weight = Int8Weight.from_gptq(**tensors, zero_add="none" if version == 2 else None)
    assert_holds(weight, exact(codes, zeros, scales, group))
    assert weight.kind == "offset" and weight.act_order == act_order


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale_dtype", SCALES)
def test_gptq_that_is_symmetric_holds_no_zero_points(bits, scale_dtype):
    codes, zeros, scales = numbers(bits, 64, scale_dtype)
    zeros.fill_(1 << (bits - 1))
    read: Any = Int4Weight.from_gptq if bits == 4 else Int8Weight.from_gptq
    weight = read(**encoders.gptq(codes, zeros, scales, bits=bits))
    assert weight.kind == "symmetric" and weight.zeros is None
    assert_holds(weight, exact(codes, zeros, scales))


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_zero_points_of_0_borrow_from_their_neighbours(bits):
    """Written by words, read by words; a reading by nibbles is another one, and says so."""
    codes, zeros, scales = numbers(bits, 16, low=0)
    zeros[torch.rand(zeros.shape, generator=torch.Generator().manual_seed(1)) < 0.2] = 0
    tensors = encoders.gptq(codes, zeros, scales, bits=bits)
    read: Any = gptq.int4_weight if bits == 4 else gptq.int8_weight
    with pytest.warns(UserWarning, match=r"zero points differ between zero_add=\"word\".*which is used"):
        weight = read(**tensors)
    assert_holds(weight, exact(codes, zeros, scales))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_holds(read(**tensors, zero_add="word"), exact(codes, zeros, scales))
        by_nibble = read(**tensors, zero_add="nibble")
    assert not torch.equal(by_nibble.dequantize(), weight.dequantize())
    # As AutoGPTQ's kernels read: each by itself, modulo the range.
    stored = (tensors["qzeros"].unsqueeze(-1) >> torch.arange(0, 32, bits)).bitwise_and((1 << bits) - 1).flatten(1)
    assert_holds(by_nibble, exact(codes, ((stored + 1) % (1 << bits)).T, scales))


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_zero_points_that_say_version_2_are_asked_about(bits):
    codes, zeros, scales = numbers(bits)
    middle = 1 << (bits - 1)
    zeros.fill_(middle)
    tensors = encoders.gptq(codes, zeros, scales, bits=bits, version=2)
    read: Any = gptq.int4_weight if bits == 4 else gptq.int8_weight
    with pytest.raises(ValueError, match=rf"is {middle}: {middle + 1} if version 1 .*, {middle}, as symmetric .*none"):
        read(**tensors)
    assert_holds(read(**tensors, zero_add="none"), exact(codes, middle, scales))
    assert_holds(read(**tensors, zero_add="word"), exact(codes, middle + 1, scales))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qweight": lambda t: t.short()}, RuntimeError, "qweight must have dtype int32, got int16"),
        ({"qweight": lambda t: t[0]}, ValueError, r"qweight must have 2 dimensions"),
        ({"qzeros": lambda t: t[:-1]}, ValueError, r"qzeros must have shape \[K/G, N/8\] with K/G = 4 and N = 24"),
        ({"qzeros": lambda t: t[:, :-1]}, ValueError, "qzeros must have shape"),
        ({"scales": lambda t: t[:3]}, ValueError, r"scales must have shape \[K/G, N\] with K = 128 and N = 24"),
        ({"scales": lambda t: t[:, :-1]}, ValueError, "scales must have shape"),
        ({"scales": lambda t: t.double()}, RuntimeError, "scales must have dtype"),
        ({"scales": lambda t: t.where(t != t[0, 3], torch.nan)}, ValueError, "scales"),
        ({"g_idx": lambda t: t[:-1]}, ValueError, r"g_idx must be integers \[K\] = \[128\]"),
        ({"g_idx": lambda t: t.float()}, ValueError, "g_idx must be integers"),
        ({"g_idx": lambda t: t - 1}, ValueError, r"g_idx must be in 0 \.\.\. 3, got -1 \.\.\. 2"),
        ({"g_idx": lambda t: t + 1}, ValueError, r"g_idx must be in 0 \.\.\. 3, got 1 \.\.\. 4"),
        ({"g_idx": lambda t: t.clamp(max=2)}, ValueError, "g_idx must give each of 4 groups 32 columns, got 0 to 64"),
        ({"zero_add": lambda _: "v1"}, ValueError, 'zero_add must be "word", "nibble" or "none", got \'v1\''),
    ],
)
def test_gptq_tensors_that_do_not_fit(change, error, message):
    codes, zeros, scales = numbers()
    tensors: dict[str, Any] = encoders.gptq(codes, zeros, scales, torch.arange(K) // 32)
    ((key, changed),) = change.items()
    with pytest.raises(error, match=message):
        Int4Weight.from_gptq(**(tensors | {key: changed(tensors.get(key))}))


def test_gptq_of_8_bits_with_float32_scales_is_refused_where_no_offset_is_exact():
    codes, zeros, scales = numbers(8, 32, torch.float32)
    with pytest.raises(ValueError, match=r"scale \* \(128 - zero\) must fit in float32"):
        gptq.int8_weight(**encoders.gptq(codes, zeros, scales, bits=8))
    few = (scales * 2**14).round() / 2**14  # digits enough for the product
    assert_holds(gptq.int8_weight(**encoders.gptq(codes, zeros, few, bits=8)), exact(codes, zeros, few))


def test_groups_that_are_no_tensor():
    codes, zeros, scales = numbers()
    with pytest.raises(TypeError, match="g_idx must be a tensor, got list"):
        Int4Weight.from_gptq(**(encoders.gptq(codes, zeros, scales) | {"g_idx": [0] * K}))
    with pytest.raises(TypeError, match="weight_g_idx must be a tensor, got list"):
        tensors: Any = encoders.compressed_tensors(codes, zeros, scales) | {"weight_g_idx": [0] * K}
        Int4Weight.from_compressed_tensors(**tensors)


def test_compressed_tensors_of_integers_have_the_shape_that_is_said():
    codes, _, scales = numbers(8, K)
    with pytest.raises(ValueError, match=r"weight_shape must be \[N, K\] = \[24, 128\], as weight .* got \[99, 99\]"):
        Int8Weight.from_compressed_tensors(codes.view(torch.int8), scales, torch.tensor([99, 99]))
    with pytest.raises(RuntimeError, match="weight must have dtype int32, got uint8"):
        Int8Weight.from_compressed_tensors(codes, scales)


# AWQ -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", awq.VERSIONS)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, K])
def test_awq(version, scale_dtype, group_size):
    codes, zeros, scales = numbers(4, group_size, scale_dtype, low=0)
    scales[2, 0] = 0.25  # scaled zeros are read back from their products, which a subnormal scale does not hold
    tensors = getattr(encoders, f"awq_{version}")(codes, zeros, scales)
    weight = Int4Weight.from_awq(**tensors, version=version, group_size=group_size)
    wanted = exact(codes, zeros, scales)
    if version == "gemv_fast":  # of a scale of 0 nothing is left, and nothing is lost
        assert (scales == 0).sum() == 1
    assert_holds(weight, wanted)
    assert weight.kind == "zero_point" and weight.group_size == group_size
    if version == "gemm":
        assert_holds(Int4Weight.from_awq(**tensors), wanted)


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_awq_without_zero_points_has_to_be_called_symmetric(version):
    codes, zeros, scales = numbers()
    tensors = getattr(encoders, f"awq_{version}")(codes, zeros, scales)
    with pytest.raises(ValueError, match="qzeros are there, and symmetric is True"):
        awq.int4_weight(**tensors, version=version, group_size=32, symmetric=True)
    tensors["qzeros"] = None
    with pytest.raises(ValueError, match="qzeros are missing: symmetric=True says that each is 8"):
        awq.int4_weight(**tensors, version=version, group_size=32)
    weight = awq.int4_weight(**tensors, version=version, group_size=32, symmetric=True)
    assert weight.kind == "symmetric"
    assert_holds(weight, exact(codes, 8, scales))


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        ("gemm", {"version": lambda _: "marlin"}, "version must be one of gemm, gemv, gemv_fast, got 'marlin'"),
        ("gemm", {"scales": lambda t: t[:3]}, r"scales must have shape \[K/G, N\] with K = 128, N = 24"),
        ("gemm", {"qzeros": lambda t: t[:3]}, r"qzeros must have shape \[K/G, N/8\] = \[4, 3\]"),
        ("gemm", {"group_size": lambda _: 64}, r"N = 24, G = 64, got \[4, 24\]"),
        ("gemv", {"group_size": lambda _: None}, "group_size must be given for version gemv"),
        ("gemv", {"group_size": lambda _: 48}, "group_size must divide K = 128, got 48"),
        ("gemv", {"group_size": lambda _: 0}, "group_size must divide K = 128, got 0"),
        ("gemv", {"scales": lambda t: t[:, :3]}, r"scales must have shape \[N, 8 Z\] with N = 24 and 8 Z >= K/G = 4"),
        ("gemv", {"qzeros": lambda t: t[:-1]}, r"qzeros must have shape \[N, Z\] with N = 24"),
        ("gemv_fast", {"scales": lambda t: t[:3]}, r"scales must have shape \[8 Z, N\] with N = 24"),
        ("gemv_fast", {"qzeros": lambda t: t[:, :-1]}, r"qzeros must have shape \[8 Z, N\] with N = 24"),
        ("gemv_fast", {"qzeros": lambda t: t + 0.01}, r"qzeros must be -\(scale \* zero\) with zero in 0 \.\.\. 15"),
        ("gemv_fast", {"qweight": lambda t: t[:, :32]}, "qweight must have K, a multiple of 64, columns"),
    ],
)
def test_awq_tensors_that_do_not_fit(version, change, message):
    codes, zeros, scales = numbers()
    tensors: dict[str, Any] = getattr(encoders, f"awq_{version}")(codes, zeros, scales)
    tensors |= {"version": version, "group_size": 32}
    ((key, changed),) = change.items()
    with pytest.raises(ValueError, match=message):
        awq.int4_weight(**(tensors | {key: changed(tensors[key])}))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_awq_as_its_own_package_packs(group_size):
    reason = "autoawq is not installed, or not with what it imports"
    package = pytest.importorskip("awq.modules.linear.gemv_fast", reason=reason)
    codes, zeros, scales = numbers(4, group_size, low=0)
    ours = encoders.awq_gemv_fast(codes, zeros, scales)
    assert torch.equal(package.pack_intweight(codes.int(), interleave=4, kstride=64), ours["qweight"])
    assert package.calculate_zeros_width(K, group_size) == encoders.awq_width(K, group_size)


# compressed-tensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, K])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_compressed_tensors_packed(bits, scale_dtype, group_size, symmetric, act_order):
    codes, zeros, scales = numbers(bits, group_size, scale_dtype, low=0)
    group = shuffled_groups(group_size) if act_order else torch.full((K,), -1)
    tensors = encoders.compressed_tensors(codes, None if symmetric else zeros, scales, group, bits=bits)
    middle = 1 << (bits - 1)
    wanted = exact(codes, middle if symmetric else zeros, scales, group if act_order else None)
    if bits == 4:
        weight: Any = Int4Weight.from_compressed_tensors(**tensors)
        assert weight.kind == ("symmetric" if symmetric else "zero_point")
    else:
        weight = Int8Weight.from_compressed_tensors(tensors.pop("weight_packed"), **tensors)
        assert weight.kind == ("symmetric" if symmetric else "offset")
    assert_holds(weight, wanted)


@pytest.mark.parametrize("group_size", [32, K])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_of_integers(group_size, symmetric):
    codes, zeros, scales = numbers(8, group_size, low=0)
    signed = (codes.int() - 128).to(torch.int8)
    points = None if symmetric else (zeros.int() - 128).to(torch.int8)
    weight = Int8Weight.from_compressed_tensors(signed, scales, weight_zero_point=points)
    assert_holds(weight, exact(codes, 128 if symmetric else zeros, scales))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_compressed_tensors_of_one_scale(shape):
    codes, _, _ = numbers(8)
    scale = torch.full(shape, 0.37, dtype=torch.bfloat16)
    signed = (codes.int() - 128).to(torch.int8)
    weight = Int8Weight.from_compressed_tensors(signed, scale, weight_zero_point=torch.zeros(shape, dtype=torch.int8))
    assert weight.kind == "symmetric" and weight.group_size == K
    assert_holds(weight, exact(codes, 128, scale.reshape(1, 1).expand(N, 1)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight_packed": lambda t: t.long()}, RuntimeError, "weight_packed must have dtype int32"),
        ({"weight_scale": lambda t: t[:-1]}, ValueError, r"weight_scale must have shape \[N, K/G\] with N = 24"),
        (
            {"weight_shape": lambda t: t + 8},
            ValueError,
            r"must be \[N, K\] = \[24, 128\].*got \[32, 136\]",
        ),
        ({"weight_shape": lambda t: t[:1]}, ValueError, "weight_shape must be"),
        ({"weight_zero_point": lambda t: t[:-1]}, ValueError, r"weight_zero_point must have shape \[N/8, K/G\]"),
        ({"weight_g_idx": lambda t: t - 1}, ValueError, "g_idx must be in 0"),
    ],
)
def test_compressed_tensors_that_do_not_fit(change, error, message):
    codes, zeros, scales = numbers()
    tensors: dict[str, Any] = encoders.compressed_tensors(codes, zeros, scales, torch.arange(K) // 32)
    ((key, changed),) = change.items()
    with pytest.raises(error, match=message):
        compressed_tensors.int4_weight(**(tensors | {key: changed(tensors[key])}))


def test_compressed_tensors_as_its_own_package_packs():
    reason = "compressed-tensors is not installed"
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason=reason)
    codes, zeros, _ = numbers(low=0)
    signed = (codes.int() - 8).to(torch.int8)
    assert torch.equal(package.pack_to_int32(signed, 4), encoders.words(codes, 4, 1))
    signed = (zeros.int() - 8).to(torch.int8)
    assert torch.equal(package.pack_to_int32(signed, 4, packed_dim=0), encoders.words(zeros, 4, 0))


# All of them ---------------------------------------------------------------------------------------------------------


def test_a_product_with_each():
    codes, zeros, scales = numbers()
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(9))
    weights = [
        Int4Weight.from_gptq(**encoders.gptq(codes, zeros, scales)),
        Int4Weight.from_awq(**encoders.awq_gemm(codes, zeros, scales)),
        Int4Weight.from_compressed_tensors(**encoders.compressed_tensors(codes, zeros, scales)),
    ]
    first, *others = [qops.int4_gemm(x, weight) for weight in weights]
    for other in others:
        assert_bitwise(other, first)
