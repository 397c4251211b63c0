"""What holds of linears and operators on several ranks, each of which has the whole to compare with."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import qops
from qops import nn as modules
from qops._numerics import UNIT, rounding_bound, weight_only_bound
from qops.integrations.tensor_parallel import ColumnParallel, RowParallel
from qops.testing import assert_bitwise, assert_within, generator, random_activations
from tests.support.ops.random_weights import random_int4, random_int8, random_levels

N, K = 96, 512
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def weights() -> dict[str, Any]:
    """Of every kind; N = 96 leaves half a strip to each of four ranks."""
    small = {"scale_dtype": torch.float32}
    made = {f"int4 {kind}": random_int4(N, K, 32, kind, **small)[1] for kind in qops.Int4Weight.KINDS}
    made["int4 channel"] = random_int4(N, K, -1, "symmetric")[1]
    made["int4 act-order"] = random_int4(N, K, 64, "zero_point", act_order=True)[1]
    made["int4 levels"] = random_levels(N, K, 32)[1]
    made["int8 groups"] = random_int8(N, K, 64, "offset")[1]
    made["int8 channel"] = random_int8(N, K, -1, scale_dtype=torch.float32)[1]
    made["int8 act-order"] = random_int8(N, K, 32, act_order=True)[1]
    made["int8 levels"] = random_levels(N, K, 64, bits=8)[1]
    return made


def linears(bias: torch.Tensor | None) -> dict[str, Any]:
    """Of every class, on weights of every kind that it takes."""
    made: dict[str, Any] = {}
    scale, zero = torch.tensor(0.02), torch.tensor(-7, dtype=torch.int32)
    smoothing = 1 + torch.rand(K, generator=generator(3))
    for name, weight in weights().items():
        if isinstance(weight, qops.Int4Weight):
            made[name] = modules.Int4Linear(weight, bias)
            made[f"w4a8 {name}"] = modules.Int4Int8Linear(weight, bias)
        else:
            made[f"only {name}"] = modules.Int8WeightOnlyLinear(weight, bias)
    made["smoothed"] = modules.Int4SmoothedLinear(made["int4 symmetric"].weight, bias, pre_quant_scale=smoothing)
    act_order = made["int4 act-order"].weight
    made["smoothed act-order"] = modules.Int4SmoothedLinear(act_order, bias, pre_quant_scale=smoothing)
    rows = weights()["int8 channel"]
    for kind in (
        modules.Int8Linear,
        modules.Int8CompressedTensorsLinear,
        modules.Int8TorchaoLinear,
        modules.Int8AsymmetricLinear,
        modules.Int8AsymmetricCompressedTensorsLinear,
    ):
        made[kind.scheme] = kind(rows, bias)
    for kind in (modules.Int8StaticLinear, modules.Int8StaticCompressedTensorsLinear):
        made[kind.scheme] = kind(rows, bias, input_scale=scale, input_zero_point=zero)
    made["int8_static_smoothed"] = modules.Int8StaticSmoothedLinear(
        rows, bias, input_scale=scale, pre_quant_scale=smoothing
    )
    made["dense"] = modules.dense_linear(torch.randn(N, K, generator=generator(4)), bias)
    return made


def some_bias() -> torch.Tensor:
    """Large, so that one added twice is seen in every dtype."""
    return 1000 * torch.randn(N, generator=generator(1))


def tokens(dtype: torch.dtype) -> torch.Tensor:
    return random_activations(2, 3, K, dtype=dtype, seed=2)


def part(tensor: torch.Tensor, mesh: Any) -> torch.Tensor:
    """This rank's part of the last dimension."""
    return tensor.chunk(mesh.size(), dim=-1)[mesh.get_local_rank()]


# Columns of the output -----------------------------------------------------------------------------------------------


def columns_are_exact(mesh: Any, folder: Path) -> None:
    for dtype in DTYPES:
        x = tokens(dtype)
        for name, whole in linears(some_bias()).items():
            whole = whole.to(dtype) if name == "dense" else whole
            wanted = whole(x)
            split, gathered = copy.deepcopy(whole), copy.deepcopy(whole)
            parallelize_module(split, mesh, ColumnParallel())
            parallelize_module(gathered, mesh, ColumnParallel(output_layouts=Replicate()))
            assert split.out_features == N // mesh.size() and wanted.abs().max() > 0
            if name != "dense":
                assert_bitwise(split(x), part(wanted, mesh), f"{name} {dtype}")
                assert_bitwise(gathered(x), wanted, f"{name} {dtype} gathered")
                rows = whole.weight.dequantize().chunk(mesh.size())[mesh.get_local_rank()]
                assert_bitwise(split.weight.dequantize(), rows, name)
            elif dtype == torch.float32:
                assert (gathered(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def columns_may_add_a_residual_and_mix_gate_and_up(mesh: Any, folder: Path) -> None:
    x, residual = tokens(torch.bfloat16), random_activations(2, 3, N, dtype=torch.bfloat16, seed=5)
    for name in ("int4 zero_point", "w4a8 int4 symmetric", "int8"):
        whole = linears(some_bias())[name]
        wanted = whole(x, residual)
        split = ColumnParallel()._apply(copy.deepcopy(whole), mesh)
        assert_bitwise(split(x, part(residual, mesh)), part(wanted, mesh), name)
        whole = copy.deepcopy(whole)
        whole.weight.mix_gate_up()
        wanted = whole(x)
        if N % (16 * mesh.size()) == 0:
            with pytest.raises(
                ValueError, match=r"output_layouts must be Shard\(-1\) where a weight mixes gate and up"
            ):
                ColumnParallel(output_layouts=Replicate())._apply(copy.deepcopy(whole), mesh)
            split = ColumnParallel()._apply(copy.deepcopy(whole), mesh)
            assert_bitwise(split(x), part(wanted, mesh), f"{name} with SiLU-mul")


# Columns of the input ------------------------------------------------------------------------------------------------


def stated_error(name: str, linear: Any, x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact result in float64, and what the docstring of RowParallel allows it to be off before the last R()."""
    bias = linear.bias
    dense = not isinstance(linear, modules.QuantizedLinear)
    if isinstance(linear, modules.Int4Int8Linear):
        q, scale = qops.quantize_int8(x)
        x = q.double() * scale.double().unsqueeze(-1)
    elif "smoothed" in name:
        x = (x * linear.pre_quant_scale).to(x.dtype)
    weight = linear.weight.double() if dense else linear.weight.dequantize(torch.float64)
    order = torch.arange(K) if dense or linear.weight.perm is None else linear.weight.perm.long()
    parts = [x[..., own].double() @ weight[:, own].T for own in order.chunk(size)]
    magnitude = torch.stack([p.abs() for p in parts]).sum(0)
    own = (
        4 * K * UNIT * (x.double().abs() @ weight.abs().T)
        if dense or x.dtype == torch.float64
        else weight_only_bound(x, linear.weight, None)
    )
    is_wide = x.dtype == torch.float64 or (x.dtype == torch.float16 and not dense)
    rounding = rounding_bound(magnitude, torch.float32 if is_wide else x.dtype)
    added = UNIT * (size + 1) * (magnitude + (0 if bias is None else bias.double().abs()))
    exact = sum(parts) + (0 if bias is None else bias.double())
    return exact, own + rounding + added


def rows_add_up(mesh: Any, folder: Path) -> None:
    for dtype in DTYPES:
        x = tokens(dtype)
        for bias in (None, some_bias()):
            for name, whole in linears(bias).items():
                whole = whole.to(dtype) if name == "dense" else whole
                row = parallelize_module(copy.deepcopy(whole), mesh, RowParallel())
                assert row.in_features == K // mesh.size()
                y, what = row(part(x, mesh)), f"{name} {dtype} bias={bias is not None}"
                if name.startswith("int8"):
                    assert_bitwise(y, whole(x), what)
                else:
                    assert_within(y, *stated_error(name, whole, x, mesh.size()), what)
                again = RowParallel(input_layouts=Replicate())._apply(copy.deepcopy(whole), mesh)
                assert_bitwise(again(x), y, f"{what} from whole x")


def rows_are_alike_on_every_rank(mesh: Any, folder: Path) -> None:
    y = RowParallel()._apply(linears(some_bias())["int4 symmetric"], mesh)(part(tokens(torch.float32), mesh))
    others = DTensor.from_local(y[None], mesh, [Shard(0)], run_check=False).full_tensor()
    for other in others:
        assert_bitwise(other, y)


def rows_with_special_values_are_those_of_one_rank(mesh: Any, folder: Path) -> None:
    """Each on one rank alone; the others have to learn of it."""
    x = tokens(torch.float32).view(-1, K).repeat(2, 1)
    x[0], x[1, 3], x[2, K - 1], x[3, 5], x[4, 7] = 0, torch.nan, -torch.inf, -torch.nan, 3e38
    x[5] = -x[5].abs()
    x[6] = x[6].abs()
    x[7] = 1e-44
    x[8] = -0.0
    for name, whole in linears(some_bias()).items():
        if name.startswith("int8"):
            wanted = whole(x)
            row = RowParallel()._apply(copy.deepcopy(whole), mesh)
            assert_bitwise(row(part(x, mesh)), wanted, name)
    assert_bitwise(row(part(x[:0], mesh)), wanted[:0])


def float32_outputs_are_not_rounded(mesh: Any, folder: Path) -> None:
    x = tokens(torch.bfloat16)
    for name in ("int4 symmetric", "int8"):
        linear = linears(some_bias())[name]
        whole = type(linear)(linear.weight, linear.bias, float32_output=True)
        wanted = whole(x)
        split = ColumnParallel()._apply(copy.deepcopy(whole), mesh)
        assert_bitwise(split(x), part(wanted, mesh), name)
        y = RowParallel()._apply(copy.deepcopy(whole), mesh)(part(x, mesh))
        assert y.dtype == torch.float32 and (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert not torch.equal(y, y.bfloat16().float())


def linears_compile(mesh: Any, folder: Path) -> None:
    x = tokens(torch.bfloat16)
    for name in ("int4 act-order", "int8"):
        row = RowParallel()._apply(linears(some_bias())[name], mesh)
        column = ColumnParallel(output_layouts=Replicate())._apply(linears(some_bias())[name], mesh)
        for linear, given in ((row, part(x, mesh)), (column, x)):
            compiled: Any = torch.compile(linear, backend="aot_eager", fullgraph=True)
            assert_bitwise(compiled(given), linear(given), name)


# DTensors and modules ------------------------------------------------------------------------------------------------


def linears_take_and_give_dtensors(mesh: Any, folder: Path) -> None:
    x = tokens(torch.float32)
    for name in ("int4 zero_point", "int4 act-order", "int8"):
        whole = linears(some_bias())[name]
        wanted = whole(x)
        column = ColumnParallel(use_local_output=False)._apply(copy.deepcopy(whole), mesh)
        row = RowParallel(use_local_output=False)._apply(copy.deepcopy(whole), mesh)
        for placement in (Replicate(), Shard(-1), Shard(0)):
            given = distribute_tensor(x, mesh, [placement])
            y = column(given)
            assert y.placements == (Shard(2),) and y.shape == wanted.shape
            assert_bitwise(y.full_tensor(), wanted, name)
            y = row(given)
            assert y.placements == (Replicate(),)
            assert (y.to_local() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def a_shard_stays_the_module_that_it_was(mesh: Any, folder: Path) -> None:
    linear, seen = linears(some_bias())["int8"], []
    handle = linear.register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape)))
    model = nn.Sequential(linear)
    parallelize_module(model, mesh, {"0": RowParallel()})
    assert model[0] is linear and isinstance(linear, modules.Int8Linear)
    x = part(tokens(torch.float32), mesh)
    y = model(x)
    assert seen == [(2, 3, N)]
    handle.remove()
    copied = copy.deepcopy(model)
    assert_bitwise(copied(x), y)
    assert copied[0].weight is not linear.weight
    with pytest.raises(TypeError, match="a shard cannot be pickled"):
        pickle.dumps(linear)
    half = model.to(torch.float64)
    assert half[0].weight.scales.dtype == torch.float32


def what_cannot_be_split_is_refused(mesh: Any, folder: Path) -> None:
    size, caller = mesh.size(), r"qops\.integrations\.tensor_parallel\."
    # 24 columns are left to a group of 48.
    k = 120 * size
    odd = modules.Int4Linear(random_int4(16 * size, k, 48, "symmetric")[1])
    with pytest.raises(
        ValueError, match=rf"RowParallel: Int4Linear: K = {k} .* G = 48 cannot be split for tp = {size}"
    ):
        RowParallel()._apply(odd, mesh)
    short = modules.Int4Linear(random_int4(24, 4 * size, -1, "symmetric")[1]) if size % 2 == 0 else None
    assert short is not None
    with pytest.raises(
        ValueError, match=rf"K = {4 * size} columns in groups of G = {4 * size} must be a multiple of 8"
    ):
        RowParallel()._apply(short, mesh)
    with pytest.raises(
        ValueError, match=rf"ColumnParallel: Int4Linear: N = 24 outputs must be a multiple of .* tp = {size}"
    ):
        ColumnParallel()._apply(short, mesh)
    assert odd.in_features == k and type(odd) is modules.Int4Linear
    ok = modules.Int4Linear(random_int4(64, 64, 16, "symmetric")[1])
    for style in (ColumnParallel, RowParallel):
        shard = style()._apply(copy.deepcopy(ok), mesh)
        for again in (ColumnParallel, RowParallel):
            with pytest.raises(ValueError, match=caller + rf"{again.__name__}: .* must be whole, got a shard, rank"):
                again()._apply(shard, mesh)
        for wrong in (nn.Conv1d(1, 1, 1), nn.Bilinear(1, 1, 1)):
            with pytest.raises(ValueError, match=r"must be a linear of qops\.nn or an nn\.Linear, got"):
                style()._apply(wrong, mesh)
        for wrong, said in ((None, "NoneType"), ("cpu", "str")):
            with pytest.raises(ValueError, match=f"mesh must be a torch.distributed DeviceMesh, got {said}"):
                style()._apply(copy.deepcopy(ok), wrong)
        plane = torch.distributed.init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "tp"))
        with pytest.raises(ValueError, match=r"mesh must have one dimension, such as mesh\['tp'\], got shape \[1, "):
            style()._apply(copy.deepcopy(ok), plane)
        assert style()._apply(copy.deepcopy(ok), plane["tp"]).ranks.share.size == size
    for style, word in ((ColumnParallel, "output_layouts"), (RowParallel, "input_layouts")):
        with pytest.raises(ValueError, match=rf"{word} must be Shard\(-1\) or Replicate\(\), got S"):
            style(**{word: Shard(0)})
    act_order = RowParallel()._apply(linears(None)["int4 act-order"], mesh)
    with pytest.raises(ValueError, match=rf"x must have last dimension K = {K}, got {K * size}"):
        act_order(tokens(torch.float32))
    rows = modules.Int8Rows(torch.zeros(1, 64, dtype=torch.int8), torch.ones(1), torch.float32, "127")
    with pytest.raises(ValueError, match="x must be dense, got Int8Rows"):
        RowParallel()._apply(linears(None)["int8"], mesh)(rows)


# Raw operators -------------------------------------------------------------------------------------------------------


def operators_split_columns_rows_and_tokens(mesh: Any, folder: Path) -> None:
    size = mesh.size()
    x, bias, n = tokens(torch.float32), some_bias()[:64], 64

    def spread(tensor: torch.Tensor | None, placement: Any) -> Any:
        return None if tensor is None else distribute_tensor(tensor, mesh, [placement])

    whole = Replicate()
    q, scale = qops.quantize_int8(x)
    cases = []
    for kind in qops.Int4Weight.KINDS:
        w = random_int4(n, K, 64, kind, scale_dtype=torch.float32)[1]
        numbers = (w.out_features, w.group_size, w.KINDS.index(kind))
        cases.append((torch.ops.qops.int4_gemm.default, (x,), w, numbers))
        cases.append((torch.ops.qops.int4_int8_gemm.default, (q, scale), w, (*numbers, torch.float32)))
    w = random_levels(n, K, 32)[1]
    cases.append((torch.ops.qops.int4_gemm.default, (x,), w, (n, 32, w.KINDS.index(w.kind))))
    w = random_int4(n, K, -1, "symmetric", scale_dtype=torch.float32)[1]
    cases.append((torch.ops.qops.int4_gemm.default, (x,), w, (n, K, 0)))
    w = random_int8(n, K, 64, "offset")[1]
    cases.append((torch.ops.qops.int8_weight_only_gemm.default, (x,), w, (n, 64)))
    for op, (first, *per_token), w, numbers in cases:
        what, is_levels = f"{op} {w.kind}", w.has_levels
        of_tokens = [spread(t, whole) for t in per_token]

        def product(xs: Any, along: Any, groups: Any, b: Any, op=op, w=w, numbers=numbers, more=of_tokens) -> Any:
            operands = (spread(w.packed, along), spread(w.scales, groups), spread(w.zeros, groups), None)
            return op(xs, *more, *operands, b, *numbers)

        wanted = op(first, *per_token, w.packed, w.scales, w.zeros, None, bias, *numbers)
        y = product(spread(first, whole), Shard(0), Shard(0), spread(bias, Shard(0)))
        assert y.placements == (Shard(2),), what
        assert_bitwise(y.full_tensor(), wanted, what)
        if is_levels and size > 2:
            continue
        bare = op(first, *per_token, w.packed, w.scales, w.zeros, None, None, *numbers)
        along = Shard(1) if w.group_size < K else whole
        y = product(spread(first, Shard(2)), Shard(1), along, None)
        assert y.placements == (Partial(),), what
        assert (y.full_tensor() - bare).abs().max() <= 1e-5 * bare.abs().max(), what
        y = product(spread(first, whole), Shard(1), along, spread(bias, whole))
        assert y.placements == (Replicate(),), what
        assert (y.to_local() - wanted).abs().max() <= 1e-5 * wanted.abs().max(), what
    y = torch.ops.qops.int4_gemm.default(
        spread(x.view(-1, K).repeat(2, 1), Shard(0)),
        *(spread(t, whole) for t in (cases[0][2].packed, cases[0][2].scales)),
        *(None, None, spread(bias, whole), *cases[0][3]),
    )
    assert y.placements == (Shard(0),)
    w8 = random_int8(n, K, -1, scale_dtype=torch.float32)[1]
    for zero_point in (None, torch.randint(-9, 9, scale.shape, dtype=torch.int32, generator=generator(6))):
        args = (spread(w8.scales, whole), spread(bias, whole), n)
        wanted = qops.int8_gemm(q, scale, w8, bias, zero_point=zero_point)
        for placement in (Shard(0), Shard(1)):
            rows = (spread(q, Shard(2)), spread(scale, whole), spread(zero_point, whole))
            y = torch.ops.qops.int8_gemm.default(*rows, spread(w8.packed, placement), *args, torch.bfloat16)
            assert_bitwise(y.full_tensor(), wanted, f"int8_gemm {placement}")
        # As DTensor has it, which hands errors of operators on.
        with pytest.raises(RuntimeError, match=r"qops\.int8_gemm: bias must be None where the output is int32"):
            torch.ops.qops.int8_gemm.default(*rows, spread(w8.packed, Shard(1)), *args, torch.int32)
        sums = torch.ops.qops.int8_gemm.default(*rows, spread(w8.packed, Shard(1)), args[0], None, n, torch.int32)
        assert sums.placements == (Partial(),)
        assert_bitwise(sums.full_tensor(), qops.int8_gemm(q, scale, w8, zero_point=zero_point, out_dtype=torch.int32))


def fused_operators_split_where_they_may(mesh: Any, folder: Path) -> None:
    n = 16 * mesh.size()
    x = tokens(torch.float32)
    w, bias = random_int4(n, K, 64, "zero_point", scale_dtype=torch.float32)[1], some_bias()[:n]
    residual = random_activations(2, 3, n, dtype=torch.float32, seed=8)
    numbers, kind = (n, 64), w.KINDS.index(w.kind)
    mixed = copy.deepcopy(w).mix_gate_up()

    def spread(tensor: Any, placement: Any = None) -> Any:
        return None if tensor is None else distribute_tensor(tensor, mesh, [placement or Replicate()])

    def operands(weight: Any, along: int) -> Any:
        return (*(spread(t, Shard(along)) for t in (weight.packed, weight.scales, weight.zeros)), None)

    op = torch.ops.qops.int4_gemm.fused
    y = op(spread(x), *operands(w, 0), spread(bias), *numbers, kind, False, spread(residual))
    assert y.placements == (Shard(2),)
    assert_bitwise(y.full_tensor(), qops.int4_gemm(x, w, bias, residual=residual))
    y = op(spread(x), *operands(w, 1), spread(bias), *numbers, kind, False, spread(residual))
    wanted = qops.int4_gemm(x, w, bias, residual=residual)
    assert y.placements == (Replicate(),) and (y.to_local() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    for b, placement in ((None, Shard(2)), (bias, Replicate())):
        y = op(spread(x), *operands(mixed, 0), spread(b), *numbers, kind, False, None, True)
        # Strips mix gate and up, and a bias does not: then nothing is split.
        assert y.placements == (placement,) and y.shape[-1] == n // 2
        assert_bitwise(y.full_tensor(), qops.int4_gemm(x, mixed, b, silu_mul=True))
    y = op(spread(x), *operands(w, 0), spread(bias), *numbers, kind, False, None, False, spread(torch.tensor(9.0)))
    assert y.placements == (Shard(2),) and y.dtype == torch.int8
    assert_bitwise(y.full_tensor(), qops.int4_gemm(x, w, bias, out_scale=torch.tensor(9.0)))
    half = op(spread(x.half()), *operands(w, 1), spread(bias), *numbers, kind)
    wanted = qops.int4_gemm(x.half().float(), w, bias)
    assert half.dtype == torch.float16 and (half.to_local() - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    y = torch.ops.qops.int4_int8_gemm.of_floats(spread(x), "127", *operands(w, 0), spread(bias), *numbers, kind)
    assert y.placements == (Shard(2),)
    assert_bitwise(y.full_tensor(), qops.int4_gemm(x, w, bias, activation="int8"))
    with pytest.raises(ValueError, match="packed must not be split along its columns: x must come in 8"):
        torch.ops.qops.int4_int8_gemm.of_floats(spread(x), "127", *operands(w, 1), spread(bias), *numbers, kind)
    with pytest.raises(ValueError, match=r"qops\.int4_gemm: out_scale cannot be asked for where packed is split"):
        op(spread(x), *operands(w, 1), None, *numbers, kind, False, None, False, spread(torch.tensor(0.1)))
    with pytest.raises(ValueError, match=r"qops\.int4_gemm: silu_mul cannot be asked for where packed is split"):
        op(spread(x), *operands(mixed, 1), None, *numbers, kind, False, None, True)


def quantisers_split_tokens(mesh: Any, folder: Path) -> None:
    x = tokens(torch.bfloat16).view(-1, K)[:4]
    for placement, expected in ((Shard(0), Shard(0)), (Shard(1), Replicate())):
        given = distribute_tensor(x, mesh, [placement])
        for op, more in ((torch.ops.qops.quantize_int8, ()), (torch.ops.qops.quantize_int8_asym, ())):
            for found, wanted in zip(op.default(given, *more), op.default(x), strict=True):
                assert found.placements == (expected,)
                assert_bitwise(found.full_tensor(), wanted, str(op))
        scale = torch.tensor(0.1)
        q = torch.ops.qops.quantize_int8_static.default(given, distribute_tensor(scale, mesh, [Replicate()]))
        assert q.placements == (placement,)
        assert_bitwise(q.full_tensor(), qops.quantize_int8_static(x, scale))


def operators_refuse_what_does_not_fit(mesh: Any, folder: Path) -> None:
    size, op = mesh.size(), torch.ops.qops.int4_gemm.default

    def call(w: Any, along: int, **other: Any) -> Any:
        x = torch.randn(2, w.in_features, generator=generator(0))
        k = {"groups": Shard(along), "n": w.out_features, "g": w.group_size, "perm": None} | other
        spread = [distribute_tensor(t, mesh, [Shard(along)]) for t in (w.packed, w.scales)]
        whole = distribute_tensor(x, mesh, [Replicate()])
        return op(whole, *spread, None, k["perm"], None, k["n"], k["g"], w.KINDS.index(w.kind))

    k = 64 * size
    coarse = random_int4(32, k, k // 2, "symmetric")[1] if size > 2 else random_int4(32, 3 * k, k, "symmetric")[1]
    name = f"K = {coarse.in_features} columns in groups of G = {coarse.group_size} must be a multiple of"
    with pytest.raises(ValueError, match=f"qops.int4_gemm: packed must not be split .*{name} .* tp = {size}"):
        call(coarse, 1)
    fine = random_int4(32, 64 * size, 64, "symmetric")[1]
    perm = distribute_tensor(torch.arange(64 * size).int(), mesh, [Replicate()])
    with pytest.raises(ValueError, match=rf"perm must be None, as K = {k} .* act-order .* tp = {size}"):
        call(fine, 1, perm=perm)
    with pytest.raises(ValueError, match="perm must be a DTensor like the others, got a Tensor"):
        call(fine, 1, perm=perm.to_local())
    with pytest.raises(ValueError, match=r"out_features must be N = 32, 16 for each strip .* got 24"):
        call(fine, 0, n=24)
    with pytest.raises(ValueError, match="group_size must be G = 64 of scales, got 32"):
        call(fine, 0, g=32)
    x, out = torch.zeros(1, k), torch.zeros(1, 32)
    spread = [distribute_tensor(t, mesh, [Replicate()]) for t in (x, fine.packed, fine.scales)]
    given = distribute_tensor(out, mesh, [Replicate()])
    with pytest.raises((NotImplementedError, RuntimeError), match=r"int4_gemm\.out"):
        torch.ops.qops.int4_gemm.out(*spread, None, None, None, 32, 64, 0, out=given)
    assert math.prod(given.shape) == 32


CHECKS = (
    columns_are_exact,
    columns_may_add_a_residual_and_mix_gate_and_up,
    rows_add_up,
    rows_are_alike_on_every_rank,
    rows_with_special_values_are_those_of_one_rank,
    float32_outputs_are_not_rounded,
    linears_compile,
    linears_take_and_give_dtensors,
    a_shard_stays_the_module_that_it_was,
    what_cannot_be_split_is_refused,
    operators_split_columns_rows_and_tokens,
    fused_operators_split_where_they_may,
    quantisers_split_tokens,
    operators_refuse_what_does_not_fit,
)
ON_FOUR = (
    columns_are_exact,
    rows_add_up,
    rows_with_special_values_are_those_of_one_rank,
    what_cannot_be_split_is_refused,
    operators_split_columns_rows_and_tokens,
    operators_refuse_what_does_not_fit,
)
