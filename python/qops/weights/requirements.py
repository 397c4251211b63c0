"""What sizes, groups and tensors of a weight have to be, and moving them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qops._layout import LEVEL_GROUPS, LEVELS_DTYPE, SUPER_COLUMNS, group_count, levels_shape

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Sizes ---------------------------------------------------------------------------------------------------------------


def require_int(name: str, label: str, value: object) -> int:
    """As an int: booleans, floats and strings are none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: {label} must be an integer, got {value!r}")
    return operator.index(value)  # pyright: ignore[reportArgumentType]


def require_multiples_of_8(name: str, out_features: int, in_features: int) -> None:
    for letter, size in (("N", out_features), ("K", in_features)):
        if size < 0 or size % 8:
            raise ValueError(f"{name}: {letter} must be a multiple of 8, got {size}")


def require_shape(name: str, shape: Sequence[int]) -> tuple[int, int]:
    """The shape that a format stores beside tensors of another one, N and K."""
    if len(shape) != 2 or not all(int(size) > 0 for size in shape):
        raise ValueError(f"{name}: shape must be [N, K], both positive, got {list(shape)}")
    return int(shape[0]), int(shape[1])


def resolve_group_size(name: str, in_features: int, group_size: int) -> int:
    group_size = require_int(name, "group_size", group_size)
    if group_size in (-1, in_features):
        return in_features
    if group_size < 16 or group_size % 16 or in_features % group_size:
        raise ValueError(
            f"{name}: group_size must be -1 or a multiple of 16 that divides K = {in_features}, got {group_size}"
        )
    return group_size


def group_size_from_scales(name: str, in_features: int, scales: Tensor) -> int:
    if scales.dtype == LEVELS_DTYPE:
        for group_size in LEVEL_GROUPS:
            if in_features % SUPER_COLUMNS == 0 and scales.shape[1:] == levels_shape(in_features, group_size):
                return group_size
        raise ValueError(
            f"{name}: int8 scales must have shape [N, K/256, 2 + 256/G] with K = {in_features}, a multiple of 256, and "
            f"G = 16, 32, 64 or 128, got {list(scales.shape)}"
        )
    groups = scales.shape[1]
    if groups == 0 and in_features == 0:
        return 0
    if groups == 0 or in_features % groups:
        raise ValueError(f"{name}: scales must have shape [N, K/G] with K = {in_features}, got {list(scales.shape)}")
    return in_features // groups


# Moving --------------------------------------------------------------------------------------------------------------


def moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``fn``, which nn.Module gives to _apply, on the tensor's bytes; the tensor itself where fn does nothing."""
    raw = tensor.reshape(-1).view(torch.uint8)
    result = fn(raw)
    if result is raw:
        return tensor
    if result.dtype != torch.uint8:  # module.type() casts integers too
        result = raw.to(result.device)
    return result.view(tensor.dtype).view(tensor.shape)


# Checks --------------------------------------------------------------------------------------------------------------


def require_tensor(name: str, label: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {label} must be a tensor, got {type(tensor).__name__}")


def require_scale_dtype(name: str, dtype: object, label: str = "scales") -> None:
    if dtype not in SCALE_DTYPES:
        raise RuntimeError(f"{name}: {label} must have dtype float16, bfloat16 or float32, got {dtype_name(dtype)}")


def require_scales(name: str, label: str, scales: object) -> None:
    """Of one level a matrix; of two, which are int8, one of rows of bytes."""
    require_tensor(name, label, scales)
    assert isinstance(scales, Tensor)
    if scales.dtype != LEVELS_DTYPE:
        require_scale_dtype(name, scales.dtype, label)
        require_matrix(name, label, scales)
    elif scales.dim() != 3:
        raise ValueError(f"{name}: int8 {label} must have 3 dimensions, got shape {list(scales.shape)}")


def require_dtype(name: str, label: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise RuntimeError(f"{name}: {label} must have dtype {dtype_name(dtype)}, got {dtype_name(tensor.dtype)}")


def require_matrix(name: str, label: str, tensor: Tensor) -> None:
    require_tensor(name, label, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name}: {label} must have 2 dimensions, got shape {list(tensor.shape)}")


def require_permutation(name: str, perm: Tensor, group_size: int) -> None:
    """Of the columns of a weight; int32 [K]."""
    k = len(perm)
    if not torch.equal(perm.sort().values, torch.arange(k, device=perm.device).int()):
        found = _instead_of_permutation(perm.tolist(), group_size)
        raise ValueError(f"{name}: perm must be a permutation of 0 ... {k - 1}, got {found}")


def _instead_of_permutation(values: list[int], group_size: int) -> str:
    outside = [value for value in values if not 0 <= value < len(values)]
    if outside:
        return str(outside[0])
    columns = [values.count(group) for group in range(group_count(len(values), group_size))]
    if sum(columns) < len(values):
        return f"{next(value for value in values if values.count(value) > 1)} twice"
    # Only a group's number stands for more than one column.
    for group, count in enumerate(columns):
        if count != group_size:
            return f"a g_idx whose group {group} has {count} columns and not G = {group_size}"
    return "a g_idx: its perm is torch.argsort(g_idx, stable=True)"


def dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else repr(dtype)
