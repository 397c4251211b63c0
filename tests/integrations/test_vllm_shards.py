"""The parts of weights that the processes of vLLM hold, and their products: none of it is vLLM's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qops.integrations.vllm.shards import Product, take_columns, take_rows
from qops.nn import Int4Int8Linear, Int4Linear, Int8Linear, Int8WeightOnlyLinear
from qops.testing import assert_bitwise, generator
from qops.weights import Int8Weight
from tests.support.ops.random_weights import KINDS, random_int4, random_int8


def weights(act_order: bool = False, n: int = 24, k: int = 192, group_size: int = 64):
    for kind in KINDS:
        yield random_int4(n, k, group_size, kind, act_order=act_order)[1]
    for kind in ("symmetric", "offset"):
        yield random_int8(n, k, group_size, kind, act_order=act_order)[1]


@pytest.mark.parametrize("act_order", [False, True])
def test_rows_are_those_of_the_whole(act_order):
    rows = torch.tensor([16, 17, 18, 19, 3, 4, 5, 0])
    for weight in weights(act_order):
        part = take_rows(weight, rows)
        assert not part.is_packed and part.kind == weight.kind
        assert_bitwise(part.dequantize(), weight.dequantize()[rows])


@pytest.mark.parametrize(
    "start, stop, group_size", [(0, 192, 64), (64, 128, 64), (0, 96, 32), (96, 192, 32), (80, 176, 16)]
)
def test_columns_are_those_of_the_whole_in_groups_that_fit(start, stop, group_size):
    for weight in weights():
        part, padding = take_columns(weight, start, stop)
        assert padding == 0 and part.group_size == group_size
        assert_bitwise(part.dequantize(), weight.dequantize()[:, start:stop])


def test_a_part_of_one_group_is_one_group():
    weight = random_int4(16, 48, -1, "symmetric")[1]
    part, _ = take_columns(weight, 24, 48)
    assert part.group_size == 24
    assert_bitwise(part.dequantize(), weight.dequantize()[:, 24:])


def test_columns_in_act_order_are_padded_group_by_group():
    for weight in weights(act_order=True):
        whole, columns = weight.dequantize(), 0
        for start, stop in ((0, 96), (96, 192)):
            part, padding = take_columns(weight, start, stop)
            assert part.in_features == 96 + padding and part.group_size == 16 and 0 < padding < 3 * 16
            assert_bitwise(part.dequantize()[:, :96], whole[:, start:stop])
            columns += stop - start
        assert columns == weight.in_features


def test_groups_that_cannot_be_cut_are_refused():
    weight = random_int4(16, 96, 32, "symmetric")[1]
    with pytest.raises(ValueError, match=r"columns 0 \.\.\. 71 of K = 96 must be whole groups, .* got groups of 32"):
        take_columns(weight, 0, 72)


# Products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [Int4Linear, Int4Int8Linear])
def test_linears_that_are_alike_become_one(linear):
    parts = [linear(random_int4(n, 64, 32, "symmetric", seed=n)[1]) for n in (16, 8, 24)]
    product = Product(parts)
    assert product.sizes == [48] and len(product.linears) == 1
    x, bias = torch.randn(3, 64, generator=generator(0)), torch.randn(48, generator=generator(1))
    assert_bitwise(product(x, bias), torch.cat([part.around(part.weight, b)(x) for part, b in split(parts, bias)], -1))
    assert_bitwise(product(x), torch.cat([part(x) for part in parts], -1))


def split(parts, bias):
    return zip(parts, bias.split([part.out_features for part in parts]), strict=True)


def test_symmetric_parts_join_those_with_zero_points():
    parts = [Int4Linear(random_int4(16, 64, 32, kind)[1]) for kind in ("zero_point", "symmetric")]
    product = Product(parts)
    assert product.sizes == [32] and product.linears[0].weight.kind == "zero_point"
    assert_bitwise(product.linears[0].weight.dequantize(), torch.cat([part.weight.dequantize() for part in parts]))


def test_linears_that_differ_stay_side_by_side():
    orders = [Int4Linear(random_int4(16, 64, 32, "symmetric", act_order=True, seed=seed)[1]) for seed in (0, 1)]
    eight = [Int8WeightOnlyLinear(random_int8(8, 64, 32)[1])]
    whole = [Int8Linear(Int8Weight.quantize(torch.randn(16, 64, generator=generator(2))))]
    x, bias = torch.randn(2, 5, 64, generator=generator(3)), torch.randn(56, generator=generator(4))
    product = Product([*orders, *eight, *whole])
    assert product.sizes == [16, 16, 8, 16]
    expected = [part.around(part.weight, b)(x) for part, b in split([*orders, *eight, *whole], bias)]
    assert_bitwise(product(x, bias), torch.cat(expected, -1))


def test_the_parts_of_a_weight_in_act_order_add_up():
    weight = random_int4(24, 192, 64, "zero_point", act_order=True)[1]
    x = torch.randn(4, 192, dtype=torch.float64, generator=generator(5)).float()
    parts = []
    for start, stop in ((0, 96), (96, 192)):
        part, padding = take_columns(weight, start, stop)
        parts.append(Product([Int4Linear(part)], padding)(x[:, start:stop]))
    exact = x.double() @ weight.dequantize().double().T
    assert (sum(parts) - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_a_product_compiles():
    weight, padding = take_columns(random_int4(16, 192, 64, "symmetric", act_order=True)[1], 0, 96)
    product = Product([Int4Linear(weight)], padding)
    compiled = torch.compile(nn.Sequential(product), backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 96, generator=generator(6))
    assert_bitwise(compiled(x), product(x))
