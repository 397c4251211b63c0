"""Quantised linears."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from qops.nn.activations import Int8Rows, frozen, in_dtype_of, with_dense_rows
from qops.nn.offload import Offloadable
from qops.ops import (
    int4_gemm,
    int8_gemm,
    int8_weight_only_gemm,
    quantize_int8,
    quantize_int8_asym,
    quantize_int8_static,
)
from qops.weights import Int4Weight, Int8Weight
from qops.weights.requirements import SCALE_DTYPES, dtype_name, moved, require_tensor
from qops.weights.state import QuantizedWeight

if TYPE_CHECKING:
    from typing_extensions import Self


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
    if isinstance(linear, QuantizedLinear) and linear.adds_residual:
        return linear(in_dtype_of(x, residual), residual)
    return linear(x), residual


class QuantizedLinear(Offloadable):
    """What the quantised linears share. Their forward needs a packed weight.

    What holds linears of any kind, a fused layer for one, asks the class for what it can do, and takes a class that
    says nothing for one that can do nothing more than nn.Linear.

    Args:
        weight: [N, K].
        bias: [N], added in float32.
        float32_output: return float32 whatever the activations' dtype, without rounding the sum to it.

    Raises:
        TypeError: a weight of another class.
        ValueError: a weight that the operator does not take; the bias does not have N elements.
    """

    scheme: ClassVar[str]
    """The name of the kind, in folders and reports."""
    operator: ClassVar[str]
    """What multiplies."""
    weight_class: ClassVar[type[QuantizedWeight]]
    """What the weight is one of."""
    adds_residual: ClassVar[bool] = False
    """Whether the forward takes a residual, which is added before the result is stored."""
    applies_silu_mul: ClassVar[bool] = False
    """Whether the product with a weight that mixes gate and up gives their SiLU-mul."""
    quantizes_input: ClassVar[bool] = False
    """Whether activations are rounded, too."""
    rows_rule: ClassVar[str | None] = None
    """The rule of the :class:`Int8Rows` that the input may be; None where it must be dense."""
    static_input: ClassVar[tuple[str, ...]] = ()
    """The tensors that the input is quantised with, where they are known beforehand: keywords of the constructor and
    entries of the state."""

    weight: Any
    bias: torch.Tensor | None

    def __init__(self, weight: Any, bias: torch.Tensor | None = None, *, float32_output: bool = False):
        super().__init__()
        name, wanted = type(self).__name__, self.weight_class
        if not isinstance(weight, wanted):
            article = "an" if wanted.__name__[0] in "AEIOU" else "a"
            raise TypeError(f"{name}: weight must be {article} {wanted.__name__}, got {type(weight).__name__}")
        self._require_weight(weight)
        if bias is not None and list(bias.shape) != [weight.out_features]:
            raise ValueError(f"{name}: bias must have shape [N] = [{weight.out_features}], got {list(bias.shape)}")
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.weight = weight
        self.float32_output = float32_output
        self.register_parameter("bias", None if bias is None else frozen(bias.contiguous()))
        self._be_hooked()

    def _require_weight(self, weight: Any) -> None:
        """Raises where the operator does not take the weight."""

    def around(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> Self:
        """A linear like this one with other operands.

        Args:
            weight: of the class of this one's.
            bias: [N].

        Returns:
            A linear of the same class, which quantises its input as this one does.
        """
        static = {key: tensor.to(weight.device) for key, tensor in self.activations().items()}
        return type(self)(weight, bias, float32_output=self.float32_output, **static)

    def in_stored_order(self) -> Self:
        """A linear for an x whose columns come in the order in which the weight stores them.

        Returns:
            A linear of the same class, whose weight has no ``perm``.
        """
        return self.around(self.weight.in_stored_order(), self.bias)

    def in_act_order(self, perm: torch.Tensor) -> Self:
        """A linear that gathers its x, of which this one takes `x[perm]`; inverse of `in_stored_order`.

        Args:
            perm: int32 [K].

        Returns:
            A linear of the same class, whose weight has this ``perm``.
        """
        return self.around(self.weight.in_act_order(perm), self.bias)

    def activations(self) -> dict[str, torch.Tensor]:
        """What the input is quantised with besides the weight: the tensors of `static_input` that there are, by name.

        Returns:
            {} where nothing is known beforehand.
        """
        tensors = {key: self._buffers[key] for key in self.static_input}
        return {key: tensor for key, tensor in tensors.items() if tensor is not None}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Only moves act on `static_input`: a cast would change what the activations become."""
        kept = {key: moved(tensor, fn) for key, tensor in self.activations().items()}
        super()._apply(fn, recurse)
        self._buffers.update(kept)
        return self

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight of the dense linear that this one stands for.

        Args:
            dtype: of the result; the exact weights are rounded to float32, then to it.

        Returns:
            [N, K].
        """
        return self.weight.dequantize(dtype)

    def is_like(self, other: Any) -> bool:
        """Whether both can be one linear, their weights side by side: all is the same but N and the weights' numbers.

        Args:
            other: any module.

        Returns:
            False also where they quantise one input differently.
        """
        if type(self) is not type(other) or self.float32_output != other.float32_output:
            return False
        ours, theirs = self.activations(), other.activations()
        alike = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        return alike and self.weight.is_like(other.weight)

    def _operands(self) -> Any:
        # Module.__getattr__ takes 0.5 us an attribute, at 240 reads a token in a model of 30 layers.
        bias = self._parameters.get("bias", self)
        # One that is pruned or parametrized is an attribute of another kind.
        return self._modules["weight"], self.bias if bias is self else bias

    def extra_repr(self) -> str:
        gathers = ", gathers x in act-order" if self.weight.act_order else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.weight.group_size}, bias={self.bias is not None}{gathers}"
        )


class Int4Linear(QuantizedLinear):
    """y = x @ w.T + bias with an int4 weight: :func:`qops.int4_gemm` as a module.

    Args:
        weight: a :class:`qops.Int4Weight` [N, K].
        bias: [N], added in float32.
        float32_output: return float32 whatever the activations' dtype, without rounding the sum to it.

    Raises:
        TypeError: a weight of another class.
        ValueError: the bias does not have N elements.
    """

    scheme = "int4"
    operator = "int4_gemm"
    weight_class = Int4Weight
    adds_residual = True
    applies_silu_mul = True
    weight: Int4Weight

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group_size: int = 128, symmetric: bool = True, *, float32_output: bool = False
    ) -> Self:
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
            x = with_dense_rows(x)
        if residual is not None and not residual.is_contiguous():
            residual = with_dense_rows(residual)
        return int4_gemm(x, weight, bias, residual=residual, silu_mul=weight.mixed_gate_up)


class Int8Input(QuantizedLinear):
    """What the linears share that quantise their input to 8 bits, unless it comes as :class:`Int8Rows`."""

    rule: ClassVar[str] = "127"
    """Of the quantiser."""
    rows_rule = rule
    quantizes_input = True

    def _quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(q, scale, zero_point), as :func:`qops.int8_gemm` takes them."""
        return *quantize_int8(x, self.rule), None

    def _in_int8(self, x: torch.Tensor | Int8Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The same of an input of either kind, with dense rows."""
        if not isinstance(x, Int8Rows):
            return self._quantized(x if x.is_contiguous() else with_dense_rows(x))
        if x.rule != self.rows_rule:
            wanted = "dense" if self.rows_rule is None else f'dense or Int8Rows of rule "{self.rows_rule}"'
            raise ValueError(f'{type(self).__name__}: x must be {wanted}, got Int8Rows of rule "{x.rule}"')
        return x.q if x.q.is_contiguous() else with_dense_rows(x.q), x.scale, None


class Int8Linear(Int8Input):
    """y = x @ w.T + bias with an int8 weight and int8 activations (W8A8): :func:`qops.int8_gemm` as a module.

    Activations are quantised per token (:func:`qops.quantize_int8`, rule "127") unless they come as :class:`Int8Rows`.
    Its subclasses quantise them as the producers of checkpoints do, each by a rule of its own.

    Args:
        weight: a symmetric :class:`qops.Int8Weight` [N, K] with one scale per row and no ``perm``.
        bias: [N], added in float32.
        float32_output: return float32 whatever the activations' dtype, without rounding the sum to it.

    Raises:
        TypeError: a weight of another class.
        ValueError: a weight with groups, offsets or a ``perm``; the bias does not have N elements.
    """

    scheme = "int8"
    operator = "int8_gemm"
    weight_class = Int8Weight
    adds_residual = True
    applies_silu_mul = True
    weight: Int8Weight

    def _require_weight(self, weight: Int8Weight) -> None:
        if weight.kind != "symmetric":
            raise ValueError(f"{type(self).__name__}: weight must be symmetric, got kind {weight.kind!r}")
        if weight.act_order:
            raise ValueError(f"{type(self).__name__}: weight must have act_order = False, got True")
        if weight.group_size != weight.in_features:
            raise ValueError(
                f"{type(self).__name__}: weight must have one scale per row, group_size = K = {weight.in_features}, "
                f"got {weight.group_size}"
            )

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, float32_output: bool = False, **static_input: torch.Tensor) -> Self:
        """Quantises a dense linear by round-to-nearest, one float32 scale per output channel.

        Args:
            linear: floating-point weight [N, K], N and K multiples of 8; it stays as it is. Numerics and errors are
                those of :meth:`qops.Int8Weight.quantize`.
            float32_output: as in the class.
            static_input: what else the class takes.

        Returns:
            A linear with the same bias.
        """
        weight = Int8Weight.quantize(linear.weight.detach())
        return cls(weight, linear.bias, float32_output=float32_output, **static_input)

    def forward(self, x: torch.Tensor | Int8Rows, residual: torch.Tensor | None = None) -> torch.Tensor:
        """See :func:`qops.int8_gemm`.

        Args:
            x: [..., K], any strides, dense, or 8-bit by `rows_rule`.
            residual: [..., N] in the dtype of the output, added to it; not with a weight that mixes gate and up.

        Returns:
            [..., N] in the dtype of x (of :class:`Int8Rows`: their `dtype`), or float32; with a weight that mixes
            gate and up its SiLU-mul, [..., N/2].

        Raises:
            ValueError: 8-bit rows of another rule.
        """
        q, scale, zero_point = self._in_int8(x)
        if residual is not None and not residual.is_contiguous():
            residual = with_dense_rows(residual)
        weight, bias = self._operands()
        return int8_gemm(
            q,
            scale,
            weight,
            bias,
            zero_point=zero_point,
            residual=residual,
            silu_mul=weight.mixed_gate_up,
            out_dtype=torch.float32 if self.float32_output else x.dtype,
        )


class Int8CompressedTensorsLinear(Int8Linear):
    """:class:`Int8Linear` for checkpoints of compressed-tensors whose activations are symmetric and dynamic per token:
    :func:`qops.quantize_int8`, rule "compressed-tensors".

    Args:
        weight, bias, float32_output: as there.

    Raises:
        TypeError: as there.
        ValueError: as there.
    """

    scheme = "int8_compressed_tensors"
    rule = rows_rule = "compressed-tensors"


class Int8TorchaoLinear(Int8Linear):
    """:class:`Int8Linear` for checkpoints of torchao whose activations are symmetric and dynamic per row:
    :func:`qops.quantize_int8`, rule "torchao".

    Args:
        weight, bias, float32_output: as there.

    Raises:
        TypeError: as there.
        ValueError: as there.
    """

    scheme = "int8_torchao"
    rule = rows_rule = "torchao"


class Int8AsymmetricLinear(Int8Linear):
    """:class:`Int8Linear` with a zero point per token: :func:`qops.quantize_int8_asym`. K is at most 65793.

    Args:
        weight, bias, float32_output: as there.

    Raises:
        TypeError: as there.
        ValueError: as there.
    """

    scheme = "int8_asymmetric"
    rule = "255"
    rows_rule = None

    def _quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return quantize_int8_asym(x, self.rule)


class Int8AsymmetricCompressedTensorsLinear(Int8AsymmetricLinear):
    """:class:`Int8AsymmetricLinear` for checkpoints of compressed-tensors whose activations are asymmetric and dynamic
    per token: :func:`qops.quantize_int8_asym`, rule "compressed-tensors".

    Args:
        weight, bias, float32_output: as there.

    Raises:
        TypeError: as there.
        ValueError: as there.
    """

    scheme = "int8_asymmetric_compressed_tensors"
    rule = "compressed-tensors"


class Int8StaticLinear(Int8Linear):
    """:class:`Int8Linear` with one scale for all activations, which a checkpoint holds:
    :func:`qops.quantize_int8_static`.

    Args:
        weight, bias, float32_output: as there.
        input_scale: float32, float16 or bfloat16, one element, positive and finite. It is kept in float32, whatever
            the module is cast to.
        input_zero_point: one integer in -128 .. 127, the code of zero; K is then at most 65793. None for 0.

    Raises:
        TypeError: as there.
        ValueError: as there; what the input is quantised with is of another dtype, size or range.
    """

    scheme = "int8_static"
    rule = "torchao"
    rows_rule = None
    static_input = ("input_scale", "input_zero_point")
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor | None

    def __init__(
        self,
        weight: Any,
        bias: torch.Tensor | None = None,
        *,
        float32_output: bool = False,
        input_scale: torch.Tensor,
        input_zero_point: torch.Tensor | None = None,
    ):
        super().__init__(weight, bias, float32_output=float32_output)
        name = type(self).__name__
        scale = _one_element(name, "input_scale", input_scale, SCALE_DTYPES)
        if not scale.is_meta and not 0 < scale.float().item() < math.inf:
            raise ValueError(f"{name}: input_scale must be positive and finite, got {scale.item()}")
        self.register_buffer("input_scale", scale.float())
        zero_point = None
        if input_zero_point is not None:
            zero_point = _one_element(name, "input_zero_point", input_zero_point, _ZERO_POINT_DTYPES)
            if not zero_point.is_meta and not -128 <= zero_point.item() <= 127:
                raise ValueError(f"{name}: input_zero_point must lie in -128 .. 127, got {zero_point.item()}")
            zero_point = zero_point.to(torch.int32)
        self.register_buffer("input_zero_point", zero_point)

    def _quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        scale, zero_point = self._buffers["input_scale"], self._buffers["input_zero_point"]
        assert scale is not None
        return quantize_int8_static(x, scale, zero_point, self.rule), scale, zero_point


class Int8StaticCompressedTensorsLinear(Int8StaticLinear):
    """:class:`Int8StaticLinear` for checkpoints of compressed-tensors whose activations are static per tensor:
    :func:`qops.quantize_int8_static`, rule "compressed-tensors".

    Args:
        weight, bias, float32_output: as there.
        input_scale, input_zero_point: as there.

    Raises:
        TypeError: as there.
        ValueError: as there.
    """

    scheme = "int8_static_compressed_tensors"
    rule = "compressed-tensors"


_ZERO_POINT_DTYPES = (torch.int32, torch.int8, torch.int64)


def _one_element(name: str, label: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    """The tensor as one of shape []."""
    require_tensor(name, label, tensor)
    if tensor.dtype not in dtypes:
        *most, last = map(dtype_name, dtypes)
        got = dtype_name(tensor.dtype)
        raise ValueError(f"{name}: {label} must have dtype {', '.join(most)} or {last}, got {got}")
    if tensor.numel() != 1:
        raise ValueError(f"{name}: {label} must have 1 element, got shape {list(tensor.shape)}")
    return tensor.detach().reshape(())


class Int8WeightOnlyLinear(QuantizedLinear):
    """y = x @ w.T + bias with an int8 weight and dense activations: :func:`qops.int8_weight_only_gemm` as a module.

    Args:
        weight: a :class:`qops.Int8Weight` [N, K].
        bias: [N], added in float32.
        float32_output: return float32 whatever the activations' dtype, without rounding the sum to it.

    Raises:
        TypeError: a weight of another class.
        ValueError: a weight that mixes gate and up; the bias does not have N elements.
    """

    scheme = "int8_weight_only"
    operator = "int8_weight_only_gemm"
    weight_class = Int8Weight
    weight: Int8Weight

    def _require_weight(self, weight: Int8Weight) -> None:
        if weight.mixed_gate_up:
            raise ValueError("Int8WeightOnlyLinear: weight must have mixed_gate_up = False, got True")

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group_size: int = -1, *, float32_output: bool = False
    ) -> Int8WeightOnlyLinear:
        """Quantises a dense linear by round-to-nearest, with float32 scales.

        Args:
            linear: floating-point weight [N, K], N and K multiples of 8; it stays as it is.
            group_size: as in :meth:`qops.Int8Weight.quantize`, which also tells numerics and errors.
            float32_output: as in the class.

        Returns:
            A linear with the same bias.
        """
        return cls(Int8Weight.quantize(linear.weight.detach(), group_size), linear.bias, float32_output=float32_output)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See :func:`qops.int8_weight_only_gemm`.

        Args:
            x: [..., K], any strides.

        Returns:
            [..., N] in the dtype of x, or float32.
        """
        x = x.float() if self.float32_output else x
        return int8_weight_only_gemm(x if x.is_contiguous() else with_dense_rows(x), *self._operands())


LINEARS: dict[str, type[QuantizedLinear]] = {
    linear.scheme: linear
    for linear in (
        Int4Linear,
        Int8Linear,
        Int8AsymmetricLinear,
        Int8AsymmetricCompressedTensorsLinear,
        Int8CompressedTensorsLinear,
        Int8StaticLinear,
        Int8StaticCompressedTensorsLinear,
        Int8TorchaoLinear,
        Int8WeightOnlyLinear,
    )
}
"""The quantised linears by their schemes."""


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
