"""Random quantised weights with their canonical tensors, for the tests of weights."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from qops._layout import with_levels
from qops.testing import assert_bitwise, generator
from qops.weights import Int4Weight, Int8Weight

KINDS = Int4Weight.KINDS
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Odd multiples of 8 (half a strip of rows, half a group of columns) and sizes with several group sizes.
SHAPES = ((8, 8), (8, 24), (16, 48), (24, 80), (40, 96), (104, 240), (136, 72))


def group_sizes(k: int) -> list[int]:
    return [-1, *(g for g in range(16, k, 16) if k % g == 0)]


def random_int4(
    n, k, group_size, kind, *, scale_dtype=torch.float16, zero_dtype=torch.float32, act_order=False, seed=0, pack=True
):
    """Canonical tensors and the weight made of them; negative and zero scales, every code and zero point occur."""
    rng = generator(seed)
    groups = 1 if group_size in (-1, k) else k // group_size
    tensors = {
        "qweight": torch.randint(256, (n, k // 2), dtype=torch.uint8, generator=rng),
        "scales": torch.randn(n, groups, generator=rng).to(scale_dtype),
    }
    tensors["scales"][0, 0] = 0
    if kind == "zero_point":
        tensors["zeros"] = torch.randint(17, (n, groups), dtype=torch.uint8, generator=rng)
    elif kind != "symmetric":
        tensors["zeros"] = (4 * torch.randn(n, groups, generator=rng)).to(zero_dtype)
    if act_order:
        tensors["perm"] = torch.randperm(k, generator=rng).int()
    return tensors, Int4Weight.from_canonical(**tensors, kind=kind, pack=pack)


def random_int8(
    n,
    k,
    group_size,
    kind="symmetric",
    *,
    scale_dtype=torch.float16,
    zero_dtype=torch.float32,
    act_order=False,
    seed=0,
    pack=True,
):
    """The same of 8-bit weights."""
    rng = generator(seed)
    groups = 1 if group_size in (-1, k) else k // group_size
    tensors = {
        "qweight": torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=rng),
        "scales": torch.randn(n, groups, generator=rng).to(scale_dtype),
    }
    if kind == "offset":
        tensors["zeros"] = (64 * torch.randn(n, groups, generator=rng)).to(zero_dtype)
    if act_order:
        tensors["perm"] = torch.randperm(k, generator=rng).int()
    return tensors, Int8Weight.from_canonical(**tensors, kind=kind, pack=pack)


def random_levels(n, k, group_size, kind="offset", *, bits=4, act_order=False, seed=0, pack=True):
    """The same with scales, and offsets, of two levels: zeros of both signs and every code occur."""
    rng = generator(seed)

    def levels() -> Tensor:
        halves = torch.randn(n, k // 256, generator=rng).half()
        halves[::3, :1], halves[1::5, :1] = 0.0, -0.0
        codes = torch.randint(-128, 128, (n, k // 256, 256 // group_size), dtype=torch.int8, generator=rng)
        return with_levels(halves, codes)

    tensors = {"scales": levels(), **({"zeros": levels()} if kind == "offset" else {})}
    if bits == 4:
        tensors["qweight"] = torch.randint(256, (n, k // 2), dtype=torch.uint8, generator=rng)
    else:
        tensors["qweight"] = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=rng)
    if act_order:
        tensors["perm"] = torch.randperm(k, generator=rng).int()
    return tensors, (Int4Weight if bits == 4 else Int8Weight).from_canonical(**tensors, kind=kind, pack=pack)


def some_weights() -> list[tuple[dict[str, Tensor], Int4Weight | Int8Weight]]:
    int4 = [
        random_int4(24, 80, 16, kind, scale_dtype=dtype, zero_dtype=zeros, act_order=act_order)
        for (kind, dtype, act_order), zeros in zip(
            itertools.product(KINDS, SCALE_DTYPES, (False, True)), itertools.cycle((*SCALE_DTYPES, torch.float16))
        )
    ]
    int8 = [
        random_int8(24, 80, group_size, kind, scale_dtype=dtype, zero_dtype=dtype, act_order=act_order)
        for (group_size, kind), (dtype, act_order) in itertools.product(
            itertools.product((-1, 16), Int8Weight.KINDS), ((torch.float16, False), (torch.float32, True))
        )
    ]
    return int4 + int8


def assert_tensors_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_bitwise(got[key], tensor, key)


def buffers(weight: nn.Module) -> dict[str, Tensor]:
    return dict(weight.named_buffers())


def empty_like(weight, device=None):
    return type(weight)(**weight._config(), out_features=weight.out_features, device=device)
