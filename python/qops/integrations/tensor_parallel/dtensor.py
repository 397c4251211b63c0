"""DTensors in the raw operators of quantised products, `torch.ops.qops.int4_gemm` and the like.

Importing this module registers them. How operands may be split, of w [N, K] in S strips of 16 rows::

              x, q      packed    scales, zeros             bias      residual   y
    columns   whole     Shard(0)  Shard(0)                  Shard(0)  Shard(-1)  Shard(-1)
    rows      Shard(-1) Shard(1)  Shard(1), of one group    -         -          Partial()
                                  per row whole
    tokens    Shard(d)  whole     whole                     whole     Shard(d)   Shard(d)

and all of them whole. Scales and zero points of tokens follow x, but are whole where its last dimension is split. What
fits is chosen by DTensor, which brings the others there; a fused step that a split does not allow is not among them:

* columns: S must be a multiple of tp, and a product that applies SiLU-mul have no bias, as strips mix gate and up;
* rows: K / tp must be a multiple of G, and of the 8 columns (64 on a GPU) in which strips can be cut. There is no
  act-order, and none of bias, residual, SiLU-mul and 8-bit outputs, which belong behind the sum.

Where `packed` comes split by rows, the whole product is made: sums are added up, in int32 for `int8_gemm`, which then
has the bits of one rank, and in float32 for `int4_int8_gemm` and for an x of float16; bias and residual are added after
that, on every rank. A `packed` that cannot be multiplied so is refused, with K, G and tp. N must be a multiple of 16.

The operators take N and G as numbers, which differ between the whole and a part. So DTensors are led to operators in
the namespace `qops_shards` that read both off the shapes of what a rank has; those have the strategies.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from qops import _native as _native
from qops._layout import STRIP_ROWS, SUPER_COLUMNS, column_step
from qops.integrations.tensor_parallel.linears import scaled_sums

_PRODUCTS = {
    "int4_gemm": ("default", "fused"),
    "int4_int8_gemm": ("default", "fused", "of_floats"),
    "int8_gemm": ("default", "fused"),
    "int8_weight_only_gemm": ("default",),
}
_QUANTISERS = ("quantize_int8", "quantize_int8_asym", "quantize_int8_static")

# Operands by what they have for each row, column or token.
_OF_TOKENS = ("x", "q")
_PER_TOKEN = ("scale", "zero_point")
_OF_WEIGHT = ("packed", "scales", "zeros", "w_scale")
_AFTER_THE_SUM = ("bias", "residual", "out_scale", "out_zero_point")
_library = torch.library.Library("qops_shards", "DEF")


# Operators without sizes ---------------------------------------------------------------------------------------------


def _define(op: Any) -> Any:
    """The operator of what a rank has: `op` without the numbers that tell N and G."""
    names = [argument.name for argument in op._schema.arguments]
    name = op._schema.name.partition("::")[2] + ("" if op._overloadname == "default" else f"_{op._overloadname}")
    signature = re.sub(r"int (out_features|group_size)(, )?", "", str(op._schema)).partition("(")[2]
    _library.define(f"{name}({signature.replace(', )', ')')}")

    def product(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip([name for name in names if name not in ("out_features", "group_size")], args, strict=False))
        given |= kwargs
        given["out_features"] = STRIP_ROWS * given["packed"].shape[0]
        if "group_size" in names:
            x = given["x"] if "x" in given else given["q"]
            given["group_size"] = _group_size(x.shape[-1], given["scales"])
        return op(**given)

    _library.impl(name, product, "CompositeExplicitAutograd")
    return getattr(torch.ops.qops_shards, name).default


def _has_levels(scales: Any) -> bool:
    """Packed scales of two levels are [S, K / 256, 2 + 256 / G, 16]."""
    return len(scales.shape) == 4


def _group_size(k: int, scales: Any) -> int:
    if _has_levels(scales):
        return SUPER_COLUMNS // (scales.shape[2] - 2)
    return k // scales.shape[1] if scales.shape[1] else 0


# Strategies ----------------------------------------------------------------------------------------------------------


def _register(op: Any) -> None:
    names = [argument.name for argument in op._schema.arguments]

    @register_sharding(op)
    def _(*args: Any, **kwargs: Any) -> list[tuple[list[Any], list[Any]]]:
        given = {argument.name: argument.default_value for argument in op._schema.arguments}
        given |= dict(zip(names, args, strict=False)) | kwargs
        x = given["x"] if "x" in given else given["q"]
        last, size = x.ndim - 1, _mesh(given).size()
        tensors = [name for name in names if hasattr(given[name], "placements")]

        def strategy(output: Placement, **split: Placement) -> tuple[list[Any], list[Any]]:
            taken = [split.get(name, Replicate()) if name in tensors else None for name in names[: len(args)]]
            return [output], taken

        found = [strategy(Replicate())]
        for d in range(last):
            rows: Any = {name: Shard(d) for name in (*_OF_TOKENS, "residual")}
            rows |= {name: Shard(d) for name in _PER_TOKEN if name in tensors and given[name].ndim}
            found.append(strategy(Shard(d), **rows))
        strips = given["packed"].shape[0]
        if strips % size == 0 and not (given.get("silu_mul") and given.get("bias") is not None):
            columns: Any = {name: Shard(0) for name in (*_OF_WEIGHT, "bias")}
            found.append(strategy(Shard(last), **columns, residual=Shard(last)))
        if _why_not_rows(given, size) is None and _adds_up(given):
            parts: Any = {name: Shard(last) for name in _OF_TOKENS} | {"packed": Shard(1)}
            if _has_groups(given):
                parts |= {"scales": Shard(1), "zeros": Shard(1)}
            found.append(strategy(Partial(), **parts))
        return found


def _mesh(given: dict[str, Any]) -> Any:
    """Of DTensors, or of what a strategy sees of them."""
    packed = given["packed"]
    return packed.device_mesh if isinstance(packed, DTensor) else packed.mesh


def _dtype(tensor: Any) -> torch.dtype:
    return tensor.dtype if isinstance(tensor, DTensor) else tensor.tensor_meta.dtype


def _has_groups(given: dict[str, Any]) -> bool:
    return "scales" in given and given["scales"].shape[1] > 1


def _why_not_rows(given: dict[str, Any], size: int) -> str | None:
    """Why a product cannot be split by the columns of x; None where it can."""
    k = (given["x"] if "x" in given else given["q"]).shape[-1]
    scales = given.get("scales")
    g = k if scales is None else _group_size(k, scales)
    step = column_step(torch.device(_mesh(given).device_type))
    if scales is not None and _has_levels(scales):
        step = SUPER_COLUMNS
    if k % (step * size) or (_has_groups(given) and k % (g * size)):
        return f"K = {k} columns in groups of G = {g} must be a multiple of {step} tp and of G tp, got tp = {size}"
    if given.get("perm") is not None:
        return f"perm must be None, as K = {k} columns in act-order cannot be split for tp = {size}"
    if given.get("rule") is not None:
        return "x must come in 8 bits, as quantize_int8 needs whole tokens"
    return None


def _adds_up(given: dict[str, Any]) -> bool:
    """Whether the sum of what ranks give is the result: nothing is rounded away, nothing comes after it."""
    if given.get("silu_mul") or any(given.get(name) is not None for name in _AFTER_THE_SUM):
        return False
    if "w_scale" in given:
        return given["out_dtype"] == torch.int32
    if "x" in given and _dtype(given["x"]) == torch.float16:  # which may not hold a part of what it holds
        return False
    return given.get("out_dtype") in (None, torch.float32)


# Products of DTensors ------------------------------------------------------------------------------------------------


def _rule(op: Any, local: Any) -> Any:
    """What `op` does with DTensors."""
    arguments = op._schema.arguments
    caller = f"qops.{op._schema.name.partition('::')[2]}"

    def product(cls: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        given: dict[str, Any] = {argument.name: argument.default_value for argument in arguments}
        given |= dict(zip(given, args, strict=False)) | (kwargs or {})
        packed, n = given["packed"], given.pop("out_features")
        g = given.pop("group_size", None)
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
                raise ValueError(f"{caller}: {name} must be a DTensor like the others, got a Tensor")
        if n != STRIP_ROWS * packed.shape[0]:
            raise ValueError(
                f"{caller}: out_features must be N = {STRIP_ROWS * packed.shape[0]}, {STRIP_ROWS} for each strip of "
                f"packed, with DTensors, got {n}"
            )
        k = (given["x"] if "x" in given else given["q"]).shape[-1]
        if g is not None and g != _group_size(k, given["scales"]):
            raise ValueError(f"{caller}: group_size must be G = {_group_size(k, given['scales'])} of scales, got {g}")
        if not any(placement.is_shard(1) for placement in packed.placements):
            return local(**given)
        if (why := _why_not_rows(given, packed.device_mesh.size())) is not None:
            raise ValueError(f"{caller}: packed must not be split along its columns: {why}")
        return _added_up(caller, local, given)

    return product


def _added_up(caller: str, local: Any, given: dict[str, Any]) -> Any:
    """The product of a weight that is split by its columns."""
    if _adds_up(given) or given.get("out_dtype") == torch.int32:
        return local(**given)
    for name in ("out_scale", "out_zero_point", "silu_mul"):
        if given.get(name) is not None and given[name] is not False:
            raise ValueError(f"{caller}: {name} cannot be asked for where packed is split along its columns")
    asked = dict(given)
    given |= {name: None for name in ("bias", "residual") if name in given}
    if "out_dtype" in given:
        given["out_dtype"] = torch.int32 if "w_scale" in given else torch.float32
    elif given["x"].dtype == torch.float16:
        given["x"] = given["x"].float()
    mesh = given["packed"].device_mesh
    whole = [Replicate()] * mesh.ndim

    def here(tensor: Any) -> Any:
        return None if tensor is None else tensor.redistribute(mesh, whole).to_local()

    sums, bias, residual = here(local(**given)), here(asked["bias"]), here(asked.get("residual"))
    if "w_scale" in given:
        y = scaled_sums(sums, here(given["scale"]), here(given["w_scale"]), bias, asked["out_dtype"])
    else:
        y = sums.float() if bias is None else sums.float() + bias.float()
        y = y.to(asked["out_dtype"] if "out_dtype" in asked else asked["x"].dtype)
    y = y if residual is None else y + residual
    return DTensor.from_local(y, mesh, whole, run_check=False)


def _register_quantiser(op: Any) -> None:
    """Each token by itself; with one scale for all each element."""
    names = [argument.name for argument in op._schema.arguments]
    results = len(op._schema.returns)

    @register_sharding(op)
    def _(x: Any, *args: Any, **kwargs: Any) -> list[tuple[list[Any], list[Any]]]:
        given = (x, *args)
        more: list[Any] = [Replicate() if hasattr(value, "placements") else None for value in given[1:]]
        split = range(x.ndim if "scale" in names else x.ndim - 1)
        places: list[Any] = [Replicate(), *(Shard(d) for d in split)]
        return [([place] * results, [place, *more]) for place in places]


for _name, _overloads in _PRODUCTS.items():
    for _overload in _overloads:
        _op = getattr(getattr(torch.ops.qops, _name), _overload)
        _local = _define(_op)
        _register(_local)
        _suffix = "" if _overload == "default" else f".{_overload}"
        torch.library.register_torch_dispatch(f"qops::{_name}{_suffix}", DTensor, _rule(_op, _local))
for _name in _QUANTISERS:
    _register_quantiser(getattr(torch.ops.qops, _name).default)
