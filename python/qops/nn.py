"""Modules on qops operators, without knowledge of any model library.

Every weight is a :class:`qops.Int4Weight` or :class:`qops.Int8Weight` submodule called `weight`, so a state_dict reads
`<linear>.weight.qweight`, `<linear>.weight.scales`, ... Modules are for inference: parameters are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from qops._hooks import Noticed
from qops._merged_state import merge_names, restore_names
from qops._offload import Offloadable
from qops.ops import (
    add_rms_norm,
    add_rms_norm_int8,
    int4_gemm,
    int8_gemm,
    int8_weight_only_gemm,
    quantize_int8,
    rms_norm,
    rms_norm_int8,
    silu_mul,
    silu_mul_int8,
)
from qops.ops._checks import MAX_ROW_DIMS
from qops.weights import Int4Weight, Int8Weight

__all__ = [
    "MLP",
    "Int4Linear",
    "Int8Embedding",
    "Int8Linear",
    "Int8Rows",
    "Int8WeightOnlyLinear",
    "MergedLinear",
    "MergingModule",
    "RMSNorm",
    "dense_linear",
    "frozen",
]


class Int8Rows(NamedTuple):
    """Activations in 8 bits, as a norm or SiLU-mul hands them to an :class:`Int8Linear`.

    Attributes:
        q: int8 [..., K].
        scale: float32 [...], one per token.
        dtype: what they were quantised from, and what the linear returns.
    """

    q: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter that follows `.to(dtype)` and never requires grad.

    Args:
        tensor: any; it is detached, not copied.

    Returns:
        A parameter around the same memory.
    """
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    """Modules take any strides, as nn.Linear does, operators those of rows. For an x that is not contiguous, which it
    takes a caller 40 ns to ask."""
    return x if x.stride(-1) == 1 and x.dim() <= 1 + MAX_ROW_DIMS else x.contiguous()


def _in_dtype_of(x: Any, residual: torch.Tensor) -> Any:
    """Autocast has torch's own operators, attention among them, return its dtype. What they give goes on in the dtype
    of the residual stream, that of the model."""
    if x.dtype is residual.dtype or not torch.is_autocast_enabled(residual.device.type):
        return x
    return x._replace(dtype=residual.dtype) if isinstance(x, Int8Rows) else x.to(residual.dtype)


def into_stream(linear: Any, x: Any, residual: torch.Tensor | None) -> Any:
    """A linear at the end of a branch, in as few passes over memory as it allows.

    Args:
        linear: any.
        x: its input.
        residual: what the branch is added to, in the dtype and shape of the output.

    Returns:
        Without a residual the output; with one the sum, where the linear adds it before it stores, else (output,
        residual). The bits are those of an addition after the linear.
    """
    if residual is None:
        return linear(x)
    if isinstance(linear, (Int4Linear, Int8Linear)):
        return linear(_in_dtype_of(x, residual), residual)
    return linear(x), residual


class _QuantizedLinear(Offloadable):
    """What the quantised linears share. Their forward needs a packed weight.

    Args:
        weight: [N, K].
        bias: [N], added in float32.
        float32_output: return float32 whatever the activations' dtype, without rounding the sum to it.
    """

    weight: Int4Weight | Int8Weight
    bias: torch.Tensor | None

    def __init__(
        self, weight: Int4Weight | Int8Weight, bias: torch.Tensor | None = None, *, float32_output: bool = False
    ):
        super().__init__()
        if bias is not None and list(bias.shape) != [weight.out_features]:
            raise ValueError(
                f"{type(self).__name__}: bias must have shape [N] = [{weight.out_features}], got {list(bias.shape)}"
            )
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.weight = weight
        self.float32_output = float32_output
        self.register_parameter("bias", None if bias is None else frozen(bias.contiguous()))
        self._be_hooked()

    def _operands(self) -> Any:
        # Module.__getattr__ takes 0.5 us an attribute, at 240 reads a token in a model of 30 layers.
        return self._modules["weight"], self._parameters["bias"]

    def extra_repr(self) -> str:
        gathers = ", gathers x in act-order" if getattr(self.weight, "act_order", False) else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.weight.group_size}, bias={self.bias is not None}{gathers}"
        )


class Int4Linear(_QuantizedLinear):
    """y = x @ w.T + bias with an int4 weight: :func:`qops.int4_gemm` as a module.

    Args:
        weight: a :class:`qops.Int4Weight` [N, K].
        bias: [N], added in float32.
        float32_output: return float32 whatever the activations' dtype, without rounding the sum to it.

    Raises:
        ValueError: the bias does not have N elements.
    """

    weight: Int4Weight

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group_size: int = 128, symmetric: bool = True, *, float32_output: bool = False
    ) -> Int4Linear:
        """Quantises a dense linear by round-to-nearest; the scales take the weight's dtype.

        Args:
            linear: floating-point weight [N, K], N and K multiples of 8; it stays as it is.
            group_size: as in :meth:`qops.Int4Weight.quantize`, which also tells numerics and errors.
            symmetric: as there.
            float32_output: as in the class.

        Returns:
            A linear with the same bias.
        """
        weight = Int4Weight.quantize(linear.weight.detach(), group_size, symmetric)
        return cls(weight, linear.bias, float32_output=float32_output)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """See :func:`qops.int4_gemm`.

        Args:
            x: [..., K], any strides.
            residual: [..., N] in the dtype of the output, added to it; not with a weight that mixes gate and up.

        Returns:
            [..., N] in the dtype of x, or float32; with a weight that mixes gate and up its SiLU-mul, [..., N/2].
        """
        weight, bias = self._operands()
        x = x.float() if self.float32_output else x
        if not x.is_contiguous():
            x = _with_dense_rows(x)
        if residual is not None and not residual.is_contiguous():
            residual = _with_dense_rows(residual)
        return int4_gemm(x, weight, bias, residual=residual, silu_mul=weight.mixed_gate_up)


class Int8Linear(_QuantizedLinear):
    """y = x @ w.T + bias with an int8 weight and int8 activations (W8A8): :func:`qops.int8_gemm` as a module.

    Activations are quantised per token (:func:`qops.quantize_int8`, rule "127") unless they come as :class:`Int8Rows`.

    Args:
        weight: a :class:`qops.Int8Weight` [N, K] with one scale per row.
        bias: [N], added in float32.
        float32_output: return float32 whatever the activations' dtype, without rounding the sum to it.

    Raises:
        ValueError: the bias does not have N elements.
    """

    weight: Int8Weight

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, float32_output: bool = False) -> Int8Linear:
        """Quantises a dense linear by round-to-nearest, one float32 scale per output channel.

        Args:
            linear: floating-point weight [N, K], N and K multiples of 8; it stays as it is. Numerics and errors are
                those of :meth:`qops.Int8Weight.quantize`.
            float32_output: as in the class.

        Returns:
            A linear with the same bias.
        """
        weight = Int8Weight.quantize(linear.weight.detach(), scale_dtype=torch.float32)
        return cls(weight, linear.bias, float32_output=float32_output)

    def forward(self, x: torch.Tensor | Int8Rows, residual: torch.Tensor | None = None) -> torch.Tensor:
        """See :func:`qops.int8_gemm`.

        Args:
            x: [..., K], dense or 8-bit, any strides.
            residual: [..., N] in the dtype of the output, added to it; not with a weight that mixes gate and up.

        Returns:
            [..., N] in the dtype of x (of :class:`Int8Rows`: their `dtype`), or float32; with a weight that mixes
            gate and up its SiLU-mul, [..., N/2].
        """
        if not isinstance(x, Int8Rows):
            x = Int8Rows(*quantize_int8(x if x.is_contiguous() else _with_dense_rows(x)), x.dtype)
        q, scale, dtype = x
        if not q.is_contiguous():
            q = _with_dense_rows(q)
        if residual is not None and not residual.is_contiguous():
            residual = _with_dense_rows(residual)
        weight, bias = self._operands()
        dtype = torch.float32 if self.float32_output else dtype
        return int8_gemm(q, scale, weight, bias, residual=residual, silu_mul=weight.mixed_gate_up, out_dtype=dtype)


class Int8WeightOnlyLinear(_QuantizedLinear):
    """y = x @ w.T + bias with an int8 weight and dense activations: :func:`qops.int8_weight_only_gemm` as a module.

    Args:
        weight: a :class:`qops.Int8Weight` [N, K].
        bias: [N], added in float32.
        float32_output: return float32 whatever the activations' dtype, without rounding the sum to it.

    Raises:
        ValueError: the bias does not have N elements.
    """

    weight: Int8Weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See :func:`qops.int8_weight_only_gemm`.

        Args:
            x: [..., K], any strides.

        Returns:
            [..., N] in the dtype of x, or float32.
        """
        x = x.float() if self.float32_output else x
        return int8_weight_only_gemm(x if x.is_contiguous() else _with_dense_rows(x), *self._operands())


class Int8Embedding(Offloadable):
    """Rows of an int8 weight, dequantised when looked up.

    The exact row is rounded once to the module's dtype, which follows `.to(dtype)`. A tied output linear holds the
    very same :class:`qops.Int8Weight` object, so the table exists once.

    Args:
        weight: [vocabulary, hidden].
        dtype: of the looked-up rows.
    """

    dtype_marker: torch.Tensor

    def __init__(self, weight: Int8Weight, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.num_embeddings = weight.out_features
        self.embedding_dim = weight.in_features
        self.weight = weight
        # Weights never change dtype, so nothing else here could follow `.to(dtype)`.
        self.register_buffer("dtype_marker", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """See :meth:`qops.Int8Weight.rows`.

        Args:
            ids: int32 or int64 [...].

        Returns:
            [..., hidden].
        """
        return self.weight.rows(ids, self.dtype_marker.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype_marker.dtype}"


class RMSNorm(Noticed):
    """:func:`qops.rms_norm`, or with a residual :func:`qops.add_rms_norm`, as a module.

    With `int8` they are :func:`qops.rms_norm_int8` and :func:`qops.add_rms_norm_int8`, rule "127".

    Args:
        weight: [H].
        eps: added to the mean of squares.
        weight_offset: added to the weight; 1 in Gemma.
        rounding: "hf" or "fp32", see :func:`qops.rms_norm`.
        int8: return :class:`Int8Rows` instead of a tensor, for an :class:`Int8Linear` that follows.
    """

    def __init__(
        self, weight: torch.Tensor, eps: float, *, weight_offset: float = 0.0, rounding: str = "hf", int8: bool = False
    ):
        super().__init__()
        self.weight = frozen(weight.contiguous())
        self.eps = eps
        self.weight_offset = weight_offset
        self.rounding = rounding
        self.int8 = int8

    def forward(self, x: torch.Tensor) -> Any:
        """The norm of x.

        Args:
            x: float32, float16 or bfloat16 [..., H], any strides.

        Returns:
            [..., H] in the dtype of x, or :class:`Int8Rows`.
        """
        style: Any = {"weight_offset": self.weight_offset, "rounding": self.rounding}
        if not x.is_contiguous():
            x = _with_dense_rows(x)
        if self.int8:
            return Int8Rows(*rms_norm_int8(x, self.weight, self.eps, **style), x.dtype)
        return rms_norm(x, self.weight, self.eps, **style)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """The norm of a sum, and the sum.

        Args:
            x: float32, float16 or bfloat16 [..., H], any strides.
            residual: same dtype and shape; under autocast x is cast to its dtype.

        Returns:
            (norm of x + residual, x + residual); the norm is an :class:`Int8Rows` with `int8`.
        """
        style: Any = {"weight_offset": self.weight_offset, "rounding": self.rounding}
        x = _in_dtype_of(x, residual)
        if not x.is_contiguous():
            x = _with_dense_rows(x)
        if not residual.is_contiguous():
            residual = _with_dense_rows(residual)
        if self.int8:
            q, scale, total = add_rms_norm_int8(x, residual, self.weight, self.eps, **style)
            return Int8Rows(q, scale, x.dtype), total
        return add_rms_norm(x, residual, self.weight, self.eps, **style)

    def extra_repr(self) -> str:
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return f"{list(self.weight.shape)}, eps={self.eps}{offset}, rounding={self.rounding}, int8={self.int8}"


class MergedLinear(nn.Module):
    """Linears over one input as one GEMM, side by side along N, each under its own name in the state_dict.

    Parts of one type (int4 of one kind and group size, int8 of one group size, or dense; all or none with a bias)
    become one linear. Others stay separate and their outputs are concatenated: mixed checkpoints work, only slower.
    The parent must derive from :class:`MergingModule`, which gives the parts their names back when a state_dict is
    loaded.

    Args:
        parts: name -> linear, in output order.
    """

    def __init__(self, parts: Mapping[str, Any]):
        super().__init__()
        self.names = tuple(parts)
        linears = list(parts.values())
        self.sizes = [linear.out_features for linear in linears]
        self.merged = _merge(linears)
        self.separate = nn.ModuleList(linears if self.merged is None else [])
        self.register_state_dict_post_hook(restore_names)

    @property
    def takes_int8(self) -> bool:
        """Whether every part is an :class:`Int8Linear`, so that the input may be :class:`Int8Rows`."""
        linears = self.separate if self.merged is None else [self.merged]
        return all(isinstance(linear, Int8Linear) for linear in linears)

    def forward(self, x: torch.Tensor | Int8Rows) -> torch.Tensor:
        """The outputs of all parts side by side.

        Args:
            x: [..., K]; 8-bit only where `takes_int8`.

        Returns:
            [..., sum of the parts' N].
        """
        merged = self.merged
        if merged is not None:
            return merged(x)
        return torch.cat([linear(x) for linear in self.separate], dim=-1)

    def split(self) -> dict[str, nn.Module]:
        """The parts as linears of their own; quantised weights are copied out, dense ones are views."""
        if self.merged is None:
            return dict(zip(self.names, self.separate, strict=True))
        linear, sizes = self.merged, self.sizes
        biases = [None] * len(sizes) if linear.bias is None else linear.bias.split(sizes)
        weights = linear.weight.split(sizes)
        parts = [
            dense_linear(weight, bias)
            if isinstance(weight, torch.Tensor)
            else type(linear)(weight, bias, float32_output=linear.float32_output)
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return dict(zip(self.names, parts, strict=True))

    def extra_repr(self) -> str:
        return f"{dict(zip(self.names, self.sizes, strict=True))}"


class MergingModule(Offloadable):
    """Base of modules with :class:`MergedLinear` children: loads state_dicts that name the parts."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        error_msgs = rest[-1]
        for name, child in self.named_children():
            if isinstance(child, MergedLinear):
                merge_names(child, state_dict, prefix, f"{prefix}{name}.", error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class MLP(MergingModule):
    """`down(act(gate(x)) * up(x))`, gate and up as one GEMM.

    With SiLU that GEMM, of :class:`Int4Linear` or :class:`Int8Linear`, applies the activation before it stores
    (:meth:`qops.Int4Weight.mix_gate_up`). After other linears SiLU is :func:`qops.silu_mul`, before an
    :class:`Int8Linear` :func:`qops.silu_mul_int8`.
    Where down has an act-order, gate and up give their outputs in that order, so that down need not gather them: the
    same bits, without a pass over memory. The state_dict is then one of reordered weights.

    Args:
        gate_proj, up_proj: linears K -> I.
        down_proj: linear I -> N.
        act: another activation than SiLU, computed by PyTorch, element by element.
    """

    def __init__(
        self,
        gate_proj: nn.Module,
        up_proj: nn.Module,
        down_proj: nn.Module,
        act: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        super().__init__()
        self.reordered = isinstance(down_proj, Int4Linear) and down_proj.weight.act_order
        if self.reordered:
            assert isinstance(down_proj, Int4Linear)
            weight = down_proj.weight
            tensors = weight.canonical()
            order = tensors.pop("perm").long()
            gate_proj, up_proj = _with_rows(gate_proj, order), _with_rows(up_proj, order)
            # Its stored columns are in the order of x now.
            weight = Int4Weight.from_canonical(
                **tensors, kind=weight.kind, in_features=weight.in_features, pack=weight.is_packed
            )
            down_proj = Int4Linear(weight, down_proj.bias, float32_output=down_proj.float32_output)
        self.gate_up_proj = MergedLinear({"gate_proj": gate_proj, "up_proj": up_proj})
        self.down_proj = down_proj
        self.act = act
        merged = self.gate_up_proj.merged
        self.activates_in_gemm = act is None and isinstance(merged, (Int4Linear, Int8Linear))
        if self.activates_in_gemm:
            merged.weight.mix_gate_up()
        self._be_hooked()

    def forward(self, x: torch.Tensor | Int8Rows, residual: torch.Tensor | None = None) -> Any:
        """The formula of the class.

        Args:
            x: [..., K]; 8-bit only where gate and up are :class:`Int8Linear`.
            residual: [..., N], what the result is to be added to.

        Returns:
            [..., N]; with a residual the sum, where down adds it before it stores, else (result, residual).
        """
        hidden: Any = self.gate_up_proj(x)
        if self.act is not None:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = self.act(gate) * up
        elif not self.activates_in_gemm:
            if isinstance(self.down_proj, Int8Linear):
                hidden = Int8Rows(*silu_mul_int8(hidden), hidden.dtype)
            else:
                hidden = silu_mul(hidden)
        return into_stream(self.down_proj, hidden, residual)

    def extra_repr(self) -> str:
        notes = {
            "SiLU-mul in the product": self.activates_in_gemm,
            "rows of gate and up in the act-order of down": self.reordered,
        }
        return ", ".join(note for note, holds in notes.items() if holds)


def dense_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A frozen nn.Linear around a dense weight, without a copy.

    Args:
        weight: [N, K].
        bias: [N].

    Returns:
        y = x @ w.T + bias, computed by PyTorch.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = frozen(weight)
    if bias is not None:
        linear.bias = frozen(bias)
    return linear


def _with_rows(linear: Any, order: torch.Tensor) -> Any:
    """A linear of the same kind whose output i is output `order[i]` of this one."""
    bias = None if linear.bias is None else linear.bias[order]
    if isinstance(linear, nn.Linear):
        return dense_linear(linear.weight[order], bias)
    return type(linear)(linear.weight.with_rows(order), bias, float32_output=linear.float32_output)


def _merge(linears: Sequence[Any]) -> Any:
    """One linear with the outputs of all, or None where they differ in more than N."""
    first = linears[0]
    if len({type(linear) for linear in linears}) > 1 or len({linear.bias is None for linear in linears}) > 1:
        return None
    bias = None if first.bias is None else torch.cat([linear.bias for linear in linears])
    weights = [linear.weight for linear in linears]
    if isinstance(first, nn.Linear):
        return dense_linear(torch.cat(weights), bias)
    if len({(_layout(linear.weight), linear.float32_output) for linear in linears}) > 1:
        return None
    if isinstance(first, Int4Linear) and first.weight.act_order:
        perms = [weight.perm for weight in weights]
        if any(not torch.equal(perm, perms[0]) for perm in perms[1:]):
            return None
    return type(first)(type(first.weight).cat(weights), bias, float32_output=first.float32_output)


def _layout(weight: Int4Weight | Int8Weight) -> tuple[Any, ...]:
    zero = (weight.kind, weight.act_order) if isinstance(weight, Int4Weight) else ()
    return (weight.in_features, weight.group_size, weight.scale_dtype, weight.device, *zero)
