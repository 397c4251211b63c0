"""What the classmethods of weights refuse: sizes that are no integers, tensors without data, codes of another form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qops.testing import generator
from qops.weights import Int4Weight, Int8Weight
from tests.support.ops.random_weights import KINDS, random_int4


def unpacked(qweight: Tensor) -> Tensor:
    return torch.stack((qweight & 15, qweight >> 4), -1).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
def test_unpacked_codes_are_not_taken_for_twice_as_many_columns(kind):
    tensors, _ = random_int4(24, 64, 16, kind)
    tensors["qweight"] = unpacked(tensors["qweight"])
    text = r"^qops\.Int4Weight: qweight must have two codes in each byte, .*, got \[24, 64\] with every byte below 16"
    with pytest.raises(ValueError, match=text):
        Int4Weight.from_canonical(**tensors, kind=kind)
    text = r"qweight must have shape .* = \[24, 32\], two codes in a byte, where in_features is K = 64, got \[24, 64\]"
    with pytest.raises(ValueError, match=text):
        Int4Weight.from_canonical(**tensors, kind=kind, in_features=64)
    text = (
        r"qweight must have shape \[N, K/2\] = \[24, 32\], two codes in a byte, where perm has K = 64, got \[24, 64\]"
    )
    with pytest.raises(ValueError, match=text):
        Int4Weight.from_canonical(**tensors, kind=kind, perm=torch.arange(64))
    with pytest.raises(TypeError, match=r"in_features must be an integer, got 64\.0"):
        Int4Weight.from_canonical(**tensors, kind=kind, in_features=64.0)


def test_packed_codes_whose_bytes_are_all_below_16():
    """They are what in_features or a perm says they are, and what quantise makes of zeros."""
    tensors, _ = random_int4(24, 64, 16, "zero_point")
    tensors["qweight"] &= 15
    for more in ({"in_features": 64}, {"perm": torch.arange(64)}):
        weight = Int4Weight.from_canonical(**tensors, **more, kind="zero_point")
        assert weight.in_features == 64 and torch.equal(weight.canonical()["qweight"], tensors["qweight"])
    assert not Int4Weight.quantize(torch.zeros(24, 64), 16, symmetric=False).dequantize().any()
    loaded = Int4Weight(64, 24, 16, "zero_point", scale_dtype=torch.float16)
    loaded.load_state_dict(Int4Weight.from_canonical(**tensors, in_features=64, kind="zero_point").state_dict())
    assert loaded.in_features == 64


@pytest.mark.parametrize("cls", [Int4Weight, Int8Weight])
@pytest.mark.parametrize(
    "size, shown",
    ((None, "None"), ("32", "'32'"), (32.0, "32.0"), (True, "True"), ([32], r"\[32\]")),
)
def test_sizes_are_integers(cls, size, shown):
    w = torch.randn(32, 64, generator=generator(0))
    with pytest.raises(
        TypeError, match=rf"^qops\.{cls.__name__}\.quantize: group_size must be an integer, got {shown}"
    ):
        cls.quantize(w, size)
    for sizes, label in (((size, 32, 16), "in"), ((64, size, 16), "out")):
        with pytest.raises(
            TypeError, match=rf"^qops\.{cls.__name__}: {label}_features must be an integer, got {shown}"
        ):
            cls(*sizes, scale_dtype=torch.float16)
    with pytest.raises(TypeError, match=rf"^qops\.{cls.__name__}: group_size must be an integer, got {shown}"):
        cls(64, 32, size, scale_dtype=torch.float16)
    with pytest.raises(TypeError, match=rf"^qops\.{cls.__name__}\.split: sizes must be an integer, got {shown}"):
        cls.quantize(w, 32).split([24, size])


def test_an_integer_of_another_type_becomes_one():
    weight = Int4Weight.quantize(torch.randn(32, 64), torch.tensor(16))
    assert type(weight.group_size) is int and weight.group_size == 16


@pytest.mark.parametrize("cls", [Int4Weight, Int8Weight])
def test_quantize_refuses_what_holds_no_numbers(cls):
    name = rf"^qops\.{cls.__name__}\.quantize: "
    with pytest.raises(ValueError, match=name + "weight must have data, got a tensor on the meta device"):
        cls.quantize(torch.empty(32, 64, device="meta"), 16)
    with pytest.raises(TypeError, match=name + "weight must be a tensor, got list"):
        cls.quantize([[1.0]], 16)
    with pytest.raises(RuntimeError, match=name + "scales must have dtype .*, got 'float16'"):
        cls.quantize(torch.ones(32, 64), 16, scale_dtype="float16")
    with pytest.raises(RuntimeError, match="dtype must be floating point, got 'float16'"):
        cls.quantize(torch.ones(32, 64), 16).dequantize("float16")


def test_quantize_takes_a_boolean_for_symmetric():
    with pytest.raises(TypeError, match="symmetric must be True or False, got 'asymmetric'"):
        Int4Weight.quantize(torch.ones(32, 64), 16, "asymmetric")


def test_canonical_tensors_on_meta_give_a_weight_there():
    """Shapes and dtypes are checked; there are no values to check."""
    tensors, weight = random_int4(24, 64, 16, "zero_point", act_order=True)
    there = {name: t.to("meta") for name, t in tensors.items()}
    made = Int4Weight.from_canonical(**there, kind="zero_point")
    assert made.device.type == "meta" and made.is_packed and made._config() == weight._config()
    with pytest.raises(RuntimeError, match="scales must be on meta like qweight, got cpu"):
        Int4Weight.from_canonical(**{**there, "scales": tensors["scales"]}, kind="zero_point")
    with pytest.raises(ValueError, match=r"zeros must have shape \[24, 4\], got \[24, 2\]"):
        Int4Weight.from_canonical(**{**there, "zeros": there["zeros"][:, :2]}, kind="zero_point")
