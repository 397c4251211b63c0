"""Checks of the fake kernels, in the words of csrc/binding/checks.h (tests compare the two)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qops import _layout
from qops._layout import STRIP_ROWS, column_step, stored_columns, strips_of

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INT4_KINDS = ("symmetric", "zero_point", "float_zero", "offset")
RULES = ("127", "compressed-tensors", "torchao")
MAX_ROW_DIMS = 4
MAX_DECODE_TOKENS = 8
MAX_FLOAT = torch.finfo(torch.float32).max
_OPTIONAL_TENSOR = torch.OptionalType(torch.TensorType.get())
F = TypeVar("F", bound="Callable[..., Results]")


def _name(value: torch.dtype | torch.layout) -> str:
    return str(value).removeprefix("torch.")


def _shape(sizes: Sequence[int]) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"


class Result(NamedTuple):
    """A result: the argument that takes it, what the caller gives for it, what it is; ``letters`` name its sizes."""

    arg: str
    given: Tensor | None
    letters: str
    sizes: Sequence[int]
    dtype: torch.dtype


Results = Tensor | tuple[Tensor, ...] | list[Tensor] | None


class Checker:
    """Raises ``qops.<op>: <argument> must <requirement>, got <actual>``.

    Args:
        op: as messages name it.
        gives: whether this overload gives its results; else it writes to what the caller gives.
    """

    def __init__(self, op: str, gives: bool) -> None:
        self.op, self.gives = op, gives

    def require(self, ok: bool | torch.SymBool, arg: str, requirement: str, actual: Callable[[], str]) -> None:
        """ValueError unless ok."""
        torch._check_value(ok, lambda: f"qops.{self.op}: {arg} must {requirement}, got {actual()}")

    def supported(self, ok: bool, arg: str, requirement: str, actual: str) -> None:
        """RuntimeError unless ok: a dtype or device without a kernel."""
        if not ok:
            raise RuntimeError(f"qops.{self.op}: {arg} must {requirement}, got {actual}")

    def tensors(self, given: Mapping[str, Tensor | None], optional: Sequence[str]) -> None:
        """All on the device of the first: the dispatcher brings a call with one tensor on meta here, whatever the
        device of the others, and lets None pass for a tensor."""
        first: Tensor | None = None
        for arg, t in given.items():
            self.supported(t is not None or arg in optional, arg, "be a tensor", "None")
            first = t if first is None else first
        for arg, t in given.items():
            if t is not None and first is not None:
                self.supported(t.device == first.device, arg, f"be on {first.device}", str(t.device))
                self.supported(t.layout == torch.strided, arg, "have layout strided", _name(t.layout))

    def float_dtype(self, t: Tensor, arg: str, or_else: str = "") -> None:
        requirement = f"have dtype float32, float16 or bfloat16{or_else}"
        self.supported(t.dtype in FLOAT_DTYPES, arg, requirement, _name(t.dtype))
        _refuse_requires_grad(self.op, arg, t)

    def dtype(self, t: Tensor, arg: str, expected: torch.dtype) -> None:
        self.supported(t.dtype == expected, arg, f"have dtype {_name(expected)}", _name(t.dtype))
        _refuse_requires_grad(self.op, arg, t)

    def same_dtype(self, t: Tensor, arg: str, other: Tensor, other_arg: str) -> None:
        requirement = f"have the dtype of {other_arg} = {_name(other.dtype)}"
        self.supported(t.dtype == other.dtype, arg, requirement, _name(t.dtype))
        _refuse_requires_grad(self.op, arg, t)

    def float32_or_same_dtype(self, t: Tensor, arg: str, other: Tensor, other_arg: str) -> None:
        requirement = f"have dtype float32 or the dtype of {other_arg} = {_name(other.dtype)}"
        self.supported(t.dtype in (torch.float32, other.dtype), arg, requirement, _name(t.dtype))
        _refuse_requires_grad(self.op, arg, t)

    def index_dtype(self, t: Tensor, arg: str) -> None:
        self.supported(t.dtype in (torch.int32, torch.int64), arg, "have dtype int32 or int64", _name(t.dtype))

    def shape(self, t: Tensor, arg: str, letters: str, expected: Sequence[int]) -> None:
        ok = t.dim() == len(expected) and all(a == b for a, b in zip(t.shape, expected, strict=True))
        self.require(ok, arg, f"have shape {letters} = {_shape(expected)}", lambda: _shape(t.shape))

    def same_shape(self, t: Tensor, arg: str, other: Tensor, other_arg: str) -> None:
        ok = t.dim() == other.dim() and all(a == b for a, b in zip(t.shape, other.shape, strict=True))
        self.require(ok, arg, f"have the shape of {other_arg} = {_shape(other.shape)}", lambda: _shape(t.shape))

    def at_least_1d(self, t: Tensor, arg: str) -> None:
        self.require(t.dim() >= 1, arg, "have at least 1 dimension", lambda: "0")

    def dense_last_dim(self, t: Tensor, arg: str) -> None:
        ok = t.stride(-1) == 1 or t.shape[-1] <= 1 or t.numel() == 0
        self.require(ok, arg, "have stride 1 in its last dimension", lambda: str(t.stride(-1)))

    def rows(self, t: Tensor, arg: str, trailing: int = 1) -> None:
        """Leading dimensions that kernels can walk: what does not merge is at most 4 dimensions."""
        if t.dim() - trailing <= MAX_ROW_DIMS or t.numel() == 0:  # the first saves guards on symbolic strides
            return
        dims: list[tuple[int, int]] = []
        for size, stride in reversed(list(zip(t.shape, t.stride(), strict=True))[: t.dim() - trailing]):
            if dims and size != 1 and stride == dims[-1][0] * dims[-1][1]:
                dims[-1] = (dims[-1][0] * size, dims[-1][1])
            elif size != 1:
                dims.append((size, stride))
        requirement = f"have at most {MAX_ROW_DIMS} leading dimensions that cannot be merged"
        self.require(len(dims) <= MAX_ROW_DIMS, arg, requirement, lambda: f"strides {_shape(t.stride())}")

    def contiguous(self, t: Tensor, arg: str) -> None:
        self.require(t.is_contiguous(), arg, "be contiguous", lambda: f"strides {_shape(t.stride())}")

    def per_row(self, t: Tensor, arg: str, other: Tensor) -> None:
        """One value for each row of ``other``, or one for all."""
        leading = other.shape[:-1]
        ok = t.dim() == 0 or (t.dim() == len(leading) and all(a == b for a, b in zip(t.shape, leading, strict=True)))
        self.require(ok, arg, f"have shape [...] = {_shape(leading)} or []", lambda: _shape(t.shape))
        self.rows(t, arg, 0)

    def rms_norm_style(self, eps: float, weight_offset: float, rounding: str) -> None:
        """What every form of rms_norm adds."""
        self.finite(eps, "eps", 0)
        self.finite(weight_offset, "weight_offset")
        self.one_of(rounding, "rounding", "hf", "fp32")
        fits, requirement = weight_offset == 0.0 or rounding != "hf", 'be "fp32" with a non-zero weight_offset'
        self.require(fits, "rounding", requirement, lambda: f'"{rounding}"')

    def new_empty(self, like: Tensor, sizes: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """A result."""
        dtype = like.dtype if dtype is None else dtype
        if all(isinstance(size, int) for size in sizes):  # not symbols
            # Sizes of 0 are left out: strides are products of the others.
            ok = math.prod(size for size in sizes if size) * dtype.itemsize < 2**63
            self.require(ok, "the result", "take fewer than 2^63 bytes", lambda: f"{_name(dtype)} {_shape(sizes)}")
        return like.new_empty(sizes, dtype=dtype)

    def results(self, like: Tensor, *results: Result) -> Results:
        """New tensors on the device of ``like``, or nothing, once what the caller gives for them is known to fit."""
        if self.gives:
            made = tuple(self.new_empty(like, result.sizes, result.dtype) for result in results)
            return made[0] if len(made) == 1 else made
        for arg, t, letters, sizes, dtype in results:
            assert t is not None  # or it would have been refused
            self.dtype(t, arg, dtype)
            self.shape(t, arg, letters, sizes)
            self.contiguous(t, arg)
        return None

    def one_of(self, value: str, arg: str, *known: str) -> None:
        *names, last = (f'"{name}"' for name in known)
        self.require(value in known, arg, f"be {', '.join(names)} or {last}", lambda: f'"{value}"')

    def finite(self, value: float, arg: str, least: float = -MAX_FLOAT) -> None:
        requirement = "be a finite float32" if least < 0 else "be a float32 that is finite and not negative"
        self.require(least <= value <= MAX_FLOAT, arg, requirement, lambda: f"{value:g}")


def fake(*ops: str) -> Callable[[F], F]:
    """Registers a function as the fake kernel of each overload of some operators.

    It is called with a checker that has looked at devices, and with the arguments by their names in the schema, as many
    as the overload has. Which memory overlaps and what tensors hold, only the kernel can see.
    """

    def register(function: F) -> F:
        for op in ops:
            packet = getattr(torch.ops.qops, op)
            for overload in packet.overloads():
                schema = getattr(packet, overload)._schema
                torch.library.register_fake(schema.name + (schema.overload_name and f".{schema.overload_name}"))(
                    partial(_call, function, op, schema)
                )
        return function

    return register


def _call(function: Callable[..., Results], op: str, schema: Any, *args: Any, **more: Any) -> Results:
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | more
    tensors = [a for a in schema.arguments if a.type.isSubtypeOf(_OPTIONAL_TENSOR)]
    optional = [a.name for a in tensors if isinstance(a.type, torch.OptionalType)]
    check = Checker(op, gives=len(schema.returns) > 0)
    check.tensors({a.name: given.get(a.name) for a in tensors}, optional)
    return function(check, **given)


def derivatives_are_asked() -> bool:
    """Whether a call has to look for tensors that want some: asking first spares it 80 ns where nobody does."""
    # Tangents go through no_grad() too. Only inside a level, which torch.func.jvp opens too, do tensors have any.
    return forward_ad._current_level >= 0 or torch.is_grad_enabled()


def refuse_grad(op: str, **tensors: Tensor | None) -> None:
    """The ops are inference-only: a silent loss of gradients or tangents would be worse than these errors."""
    if forward_ad._current_level >= 0:
        for arg, t in tensors.items():
            if isinstance(t, Tensor) and t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None:
                raise RuntimeError(
                    f"qops.{op}: {arg} must not have a tangent, as qops has no forward-mode derivatives, got one"
                )
    if torch.is_grad_enabled():
        for arg, t in tensors.items():
            if isinstance(t, Tensor):
                _refuse_requires_grad(op, arg, t)


def _refuse_requires_grad(op: str, arg: str, t: Tensor) -> None:
    if t.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"qops.{op}: {arg} must not require grad, as qops has no autograd kernels (torch.no_grad() or "
            "torch.inference_mode() around the call allows it), got requires_grad = True"
        )


def require_weight(op: str, weight: object, expected: str) -> None:
    """By name: qops.weights imports the operators."""
    name = type(weight).__name__
    if name != expected and all(base.__name__ != expected for base in type(weight).__mro__):
        raise TypeError(f"qops.{op}: weight must be a qops.{expected}, got {name}")


def require_tensor(op: str, arg: str, t: object) -> None:
    """Where a call reads a tensor, or has no other, before the dispatcher looks at it."""
    if not isinstance(t, Tensor):
        raise TypeError(f"qops.{op}: {arg} must be a tensor, got {type(t).__name__}")


def default_scale(op: str, arg: str, t: Tensor) -> float:
    """``1 / sqrt(D)`` of a tensor [..., D]."""
    require_tensor(op, arg, t)
    return max(t.shape[-1] if t.dim() else 1, 1) ** -0.5


def outputs(op: str, out: object, *names: str) -> tuple[Any, ...]:
    """The tensors of an argument ``out`` that holds several."""
    if not isinstance(out, tuple | list) or len(out) != len(names):
        actual = f"{len(out)} of them" if isinstance(out, tuple | list) else type(out).__name__
        raise TypeError(f"qops.{op}: out must be a tuple of {len(names)} tensors ({', '.join(names)}), got {actual}")
    return tuple(out)


def gate_and_up(
    op: str, first: Tensor | None, second: Tensor | None, gate_up: Tensor | None, gate: Tensor | None, up: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gate and up, or both merged and None, of a call that names some of them."""
    by_position = [t for t in (first, second) if t is not None]
    named = {name: t for name, t in (("gate_up", gate_up), ("gate", gate), ("up", up)) if t is not None}
    if (*("gate" for _ in by_position), *named) in (("gate_up",), ("gate", "up")):
        tensors = [*by_position, *named.values()]
        return tensors[0], tensors[1] if len(tensors) == 2 else None
    given = [f"{len(by_position)} by position"] if by_position else []
    actual = " and ".join([*given, *named]) or "none"
    raise TypeError(f"qops.{op}: tensors must be gate_up, or gate and up, got {actual}")


def check_packed_weight(
    check: Checker, packed: Tensor, scales: Tensor, out_features: int, group_size: int, *, bits: int
) -> int:
    """A packed weight with scales ``[S, K / group_size, 16]``, or int8 ones of two levels; returns K."""
    per_column, step = 2 * bits, column_step(packed.device)
    check.dtype(packed, "packed", torch.uint8 if bits == 4 else torch.int8)
    two_levels = check_scale_dtype(check, scales, "scales")
    ok = out_features >= 0 and out_features % 8 == 0
    check.require(ok, "out_features", "be a multiple of 8", lambda: str(out_features))
    check.require(packed.dim() == 2, "packed", "have 2 dimensions", lambda: str(packed.dim()))
    requirement = f"hold a multiple of {step} columns of {per_column} elements a strip"
    ok = packed.shape[1] % (step * per_column) == 0
    check.require(ok, "packed", requirement, lambda: str(packed.shape[1]))
    k = packed.shape[1] // per_column
    if step > 8 and scales.dim() == 3 and scales.shape[1] > 0 and 0 < group_size <= k // scales.shape[1]:
        without_padding = group_size * scales.shape[1]
        k = without_padding if without_padding % 8 == 0 else k
    strips = strips_of(out_features)
    stored = stored_columns(k, packed.device)
    check.shape(packed, "packed", "[S, K-strip]", (strips, stored * per_column))
    ok = group_size == k or (group_size > 0 and group_size % 16 == 0 and k % group_size == 0)
    check.require(ok, "group_size", f"be K = {k} or a multiple of 16 that divides it", lambda: str(group_size))
    if two_levels:
        requirement = "be floats but for groups of 16, 32, 64 or 128 and K a multiple of 256"
        ok = group_size in _layout.LEVEL_GROUPS and k % _layout.SUPER_COLUMNS == 0
        check.require(ok, "scales", requirement, lambda: f"int8 for groups of {group_size} and K = {k}")
        letters, levels = "[S, K / 256, 2 + 256 / group_size, 16]", _layout.levels_shape(k, group_size)
        check.shape(scales, "scales", letters, (strips, *levels, STRIP_ROWS))
    else:
        groups = k // group_size if group_size else 0
        check.shape(scales, "scales", "[S, K / group_size, 16]", (strips, groups, STRIP_ROWS))
    check.contiguous(packed, "packed")
    check.contiguous(scales, "scales")
    return k


def check_scale_dtype(check: Checker, scales: Tensor, arg: str) -> bool:
    """Whether scales have two levels, which GPU kernels do not read."""
    on_gpu = _layout.has_gpu_layout(scales.device)
    if scales.dtype == _layout.LEVELS_DTYPE and not on_gpu:
        return True
    check.float_dtype(scales, arg, "" if on_gpu else ", or int8 of two levels")
    return False


def check_zeros(
    check: Checker, kind: int, zeros: Tensor | None, scales: Tensor, prefix: str = "", *, bits: int = 4
) -> None:
    """The kind of a weight, and the zeros that belong to it; ``prefix``: of the names of its arguments."""
    kinds, requirement = (0, 1, 2, 3), "be 0 (symmetric), 1 (zero_point), 2 (float_zero) or 3 (offset)"
    if bits == 8:
        kinds, requirement = (0, 3), "be 0 (symmetric) or 3 (offset) for a weight of 8 bits"
    check.require(kind in kinds, f"{prefix}kind", requirement, lambda: str(kind))
    two_levels = scales.dtype == _layout.LEVELS_DTYPE
    requirement = "be 0 (symmetric) or 3 (offset) with int8 scales"
    check.require(not two_levels or kind in (0, 3), f"{prefix}kind", requirement, lambda: str(kind))
    arg = f"{prefix}zeros"
    requirement = "be None for kind 0" if kind == 0 else "be given for this kind"
    check.require((zeros is None) == (kind == 0), arg, requirement, lambda: "None" if zeros is None else "a tensor")
    if zeros is None:
        return
    if two_levels:
        check.dtype(zeros, arg, _layout.LEVELS_DTYPE)
    elif kind > 1 and not _layout.has_gpu_layout(zeros.device):
        check.float_dtype(zeros, arg)
    else:
        check.dtype(zeros, arg, torch.uint8 if kind == 1 else torch.float32)
    check.same_shape(zeros, arg, scales, f"{prefix}scales")
    check.contiguous(zeros, arg)


def check_perm(check: Checker, perm: Tensor | None, k: int, prefix: str = "") -> None:
    """The order in which columns are stored."""
    if perm is not None:
        check.dtype(perm, f"{prefix}perm", torch.int32)
        check.shape(perm, f"{prefix}perm", "[K]", (k,))
        check.contiguous(perm, f"{prefix}perm")


def check_bias(check: Checker, bias: Tensor | None, n: int, prefix: str = "") -> None:
    if bias is not None:
        check.float_dtype(bias, f"{prefix}bias")
        check.shape(bias, f"{prefix}bias", "[N]", (n,))
        check.dense_last_dim(bias, f"{prefix}bias")


def check_weight_only(
    check: Checker,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    kind: int,
    *,
    bits: int,
) -> None:
    """The arguments that int4_gemm and int8_weight_only_gemm share."""
    check.float_dtype(x, "x")
    check.at_least_1d(x, "x")
    k = check_packed_weight(check, packed, scales, out_features, group_size, bits=bits)
    check.require(x.shape[-1] == k, "x", f"have last dimension K = {k}", lambda: str(x.shape[-1]))
    check.dense_last_dim(x, "x")
    check_bias(check, bias, out_features)
    check.rows(x, "x")
    check_zeros(check, kind, zeros, scales)
    check_perm(check, perm, k)


def check_rms_norm(check: Checker, x: Tensor, weight: Tensor, eps: float, weight_offset: float, rounding: str) -> None:
    """What all forms of rms_norm take."""
    check.float_dtype(x, "x")
    check.float_dtype(weight, "weight")
    check.at_least_1d(x, "x")
    check.shape(weight, "weight", "[H]", (x.shape[-1],))
    check.dense_last_dim(x, "x")
    check.dense_last_dim(weight, "weight")
    check.rms_norm_style(eps, weight_offset, rounding)
    check.rows(x, "x")


def check_second(check: Checker, t: Tensor, arg: str, first: Tensor, first_arg: str) -> None:
    """A tensor that goes with the first element by element, with strides of its own."""
    check.same_dtype(t, arg, first, first_arg)
    check.same_shape(t, arg, first, first_arg)
    check.dense_last_dim(t, arg)
    check.rows(t, arg)


def check_rotary(check: Checker, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Results:
    """What all forms of rotary take and give."""
    check.float_dtype(q, "q")
    check.same_dtype(k, "k", q, "q")
    check.float32_or_same_dtype(cos, "cos", q, "q")
    check.same_dtype(sin, "sin", cos, "cos")
    check.require(q.dim() >= 3, "q", "have at least 3 dimensions [T, H, D]", lambda: str(q.dim()))
    heads = q.dim() - 2
    fits = k.dim() == q.dim() and all(k.shape[d] == q.shape[d] for d in range(q.dim()) if d != heads)
    requirement = f"have the shape of q = {list(q.shape)} but for the number of heads"
    check.require(fits, "k", requirement, lambda: str(list(k.shape)))
    check.require(cos.dim() == 2, "cos", "have 2 dimensions [positions, R / 2]", lambda: str(cos.dim()))
    half, columns = q.shape[-1] // 2, cos.shape[1]
    check.require(columns <= half, "cos", f"have at most D / 2 = {half} columns", lambda: str(columns))
    check.same_shape(sin, "sin", cos, "cos")
    check.rows(q, "q", 2)
    check.rows(k, "k", 2)
    check_positions(check, positions, cos, q.shape[:-2])
    return (check.new_empty(q, q.shape), check.new_empty(k, k.shape)) if check.gives else None


def check_attention(
    check: Checker,
    tokens: tuple[int, ...],
    args: tuple[str, str],
    cache: Mapping[str, Tensor],
    scale: float,
    mask: Tensor | None,
    window: int,
    softcap: float,
    first_position: int,
) -> None:
    """Attention of new tokens, B T Hq D of them, over a cache [B, Hkv, S, D] of keys and values by their names.

    ``args``: what T and what Hq are read from.
    """
    (k_arg, k), (v_arg, v) = cache.items()
    batch, t, q_heads, d = tokens
    kv_heads, s = k.shape[1:3]
    check.require(t <= MAX_DECODE_TOKENS, args[0], "have at most 8 tokens T", lambda: str(t))
    requirement = f"have shape [B, Hkv, S, D] with B = {batch}, D = {d}"
    check.require(k.shape[0] == batch and k.shape[3] == d, k_arg, requirement, lambda: _shape(k.shape))
    fits = q_heads == 0 if kv_heads == 0 else q_heads % kv_heads == 0
    check.require(fits, args[1], f"have a multiple of Hkv = {kv_heads} heads", lambda: str(q_heads))
    check.require(s >= t, k_arg, f"have at least T = {t} rows", lambda: str(s))
    check.same_shape(v, v_arg, k, k_arg)
    check.dense_last_dim(k, k_arg)
    check.dense_last_dim(v, v_arg)
    if mask is not None:
        check.dtype(mask, "mask", torch.bool)
        check.require(mask.dim() == 4, "mask", "have 4 dimensions [B or 1, 1, T or 1, S]", lambda: str(mask.dim()))
        sizes = mask.shape
        fits = (sizes[0] == batch or sizes[0] == 1) and sizes[1] == 1 and (sizes[2] == t or sizes[2] == 1)
        requirement = f"have shape [B or 1, 1, T or 1, S] = [{batch} or 1, 1, {t} or 1, {s}]"
        check.require(fits and sizes[3] == s, "mask", requirement, lambda: _shape(sizes))
    check.finite(scale, "scale")
    check.require(0 <= window <= 2**62, "window", "lie in 0 .. 2^62", lambda: str(window))
    check.require(mask is None or window == 0, "window", "be 0 with a mask", lambda: str(window))
    check.finite(softcap, "softcap", 0)
    check.require(0 <= first_position <= 2**62, "first_position", "lie in 0 .. 2^62", lambda: str(first_position))


def check_positions(check: Checker, positions: Tensor | None, cos: Tensor, leading: Sequence[int]) -> None:
    """Of tokens ``[..., T]``, which have rows of ``cos``."""
    t = leading[-1]
    if positions is None:
        requirement = f"have at least T = {t} rows without positions"
        return check.require(cos.shape[0] >= t, "cos", requirement, lambda: str(cos.shape[0]))
    check.index_dtype(positions, "positions")
    requirement = f"have shape [T] = [{t}] or [..., T] = {_shape(leading)}"
    fits = list(positions.shape) in ([t], list(leading))
    check.require(fits, "positions", requirement, lambda: _shape(positions.shape))
    check.rows(positions, "positions", 0)


def columns_of(check: Checker, packed: Tensor, arg: str) -> int:
    """K of a packed weight of 4 or 8 bits, by its own shape."""
    check.supported(packed.dtype in (torch.uint8, torch.int8), arg, "have dtype uint8 or int8", _name(packed.dtype))
    check.require(packed.dim() == 2, arg, "have 2 dimensions", lambda: str(packed.dim()))
    elements = 8 if packed.dtype == torch.uint8 else 16
    requirement = f"hold a multiple of 8 columns of {elements} elements a strip"
    check.require(packed.shape[1] % (8 * elements) == 0, arg, requirement, lambda: str(packed.shape[1]))
    return packed.shape[1] // elements


def check_block_linear(
    check: Checker,
    arg: str,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    kind: int,
    n: int,
    k: int,
) -> None:
    """A linear [N, K] of a block of operators; ``arg`` is the first part of the names of its arguments."""
    columns, strips = columns_of(check, packed, arg), strips_of(n)
    actual = f"{packed.shape[0]} strips of {columns} columns"
    fits = packed.shape[0] == strips and columns == k
    check.require(fits, arg, f"hold a weight [N, K] = [{n}, {k}]", lambda: actual)
    if check_scale_dtype(check, scales, f"{arg}_scales"):
        shapes = [(strips, *_layout.levels_shape(k, g), STRIP_ROWS) for g in _layout.LEVEL_GROUPS]
        sizes = f"S = {strips}, K = {k}, G = 16, 32, 64 or 128"
        requirement = f"have shape [S, K / 256, 2 + 256 / G, 16] with {sizes}"
        fits = k % _layout.SUPER_COLUMNS == 0 and tuple(scales.shape) in shapes
        check.require(fits, f"{arg}_scales", requirement, lambda: _shape(scales.shape))
    else:
        fits = scales.dim() == 3 and scales.shape[0] == strips and scales.shape[2] == STRIP_ROWS
        requirement = f"have shape [S, K / group_size, 16] with S = {strips}"
        check.require(fits, f"{arg}_scales", requirement, lambda: _shape(scales.shape))
        groups = scales.shape[1]
        fits = k == 0 if groups == 0 else k % groups == 0 and (groups == 1 or (k // groups) % 16 == 0)
        requirement = f"have one group, or groups of a multiple of 16 columns that divides K = {k}"
        check.require(fits, f"{arg}_scales", requirement, lambda: f"{groups} groups")
    check.contiguous(packed, arg)
    check.contiguous(scales, f"{arg}_scales")
    check_zeros(check, kind, zeros, scales, f"{arg}_", bits=8 if packed.dtype == torch.int8 else 4)
    check_perm(check, perm, k, f"{arg}_")
    check_bias(check, bias, n, f"{arg}_")


def check_silu_mul(
    check: Checker, gate_up: Tensor | None, gate: Tensor | None, up: Tensor | None, rounding: str
) -> tuple[Tensor, tuple[int, ...]]:
    """Gate and up, merged or apart; returns one of them, and the sizes of the product."""
    arg, rows = ("gate", gate) if gate_up is None else ("gate_up", gate_up)
    assert rows is not None  # or it would have been refused
    check.float_dtype(rows, arg)
    check.at_least_1d(rows, arg)
    check.dense_last_dim(rows, arg)
    columns = rows.shape[-1]
    if up is not None:
        check_second(check, up, "up", rows, arg)
    else:
        check.require(columns % 2 == 0, arg, "have an even last dimension 2 I", lambda: str(columns))
    check.one_of(rounding, "rounding", "hf", "fp32")
    check.rows(rows, arg)
    return rows, (*rows.shape[:-1], columns if up is not None else columns // 2)


def check_static_scale(check: Checker, **tensors: Tensor | None) -> None:
    """One float32 scale and, after it, one int32 zero point for a whole tensor, by the names of their arguments."""
    for (arg, t), dtype in zip(tensors.items(), (torch.float32, torch.int32), strict=True):
        if t is not None:
            check.dtype(t, arg, dtype)
            check.require(t.numel() == 1, arg, "have 1 element", lambda t=t: str(t.numel()))


def check_epilogue(
    check: Checker,
    x: Tensor,
    out_features: int,
    dtype: torch.dtype,
    residual: Tensor | None,
    silu_mul: bool,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> tuple[str, tuple[int, ...], torch.dtype]:
    """What becomes of the product of a matrix product, of this dtype; the letters, sizes and dtype of the result."""
    letters, columns = "[..., N]", out_features
    if residual is not None:
        alone = not silu_mul and out_scale is None
        check.require(alone, "residual", "be None with silu_mul or out_scale", lambda: "a tensor")
        check.dtype(residual, "residual", dtype)
        check.shape(residual, "residual", "[..., N]", (*x.shape[:-1], out_features))
        check.dense_last_dim(residual, "residual")
        check.rows(residual, "residual")
    if silu_mul:
        requirement = "be a multiple of 16, for gate and up, with silu_mul"
        check.require(out_features % 16 == 0, "out_features", requirement, lambda: str(out_features))
        check.require(out_scale is None, "out_scale", "be None with silu_mul", lambda: "a tensor")
        letters, columns = "[..., N / 2]", out_features // 2
    fits = out_scale is not None or out_zero_point is None
    check.require(fits, "out_zero_point", "be None without out_scale", lambda: "a tensor")
    if out_scale is not None:
        check_static_scale(check, out_scale=out_scale, out_zero_point=out_zero_point)
        dtype = torch.int8
    return letters, (*x.shape[:-1], columns), dtype


def refuse_mixed(op: str, silu_mul: bool) -> NoReturn:
    """silu_mul and the rows of the weight differ."""
    requirement = f"be {not silu_mul} for a weight with mixed_gate_up = {not silu_mul}"
    raise ValueError(f"qops.{op}: silu_mul must {requirement}, got {silu_mul}")


def int8_results(x: Tensor, k: int, q: Tensor | None, scale: Tensor | None) -> tuple[Result, Result]:
    """The results of the ops that emit per-token int8."""
    rows = Result("q", q, "[..., K]", (*x.shape[:-1], k), torch.int8)
    return rows, Result("scale", scale, "[...]", x.shape[:-1], torch.float32)
