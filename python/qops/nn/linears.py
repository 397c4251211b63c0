"""Quantised linears, and an embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qops.nn.activations import Int8Rows, frozen, in_dtype_of, with_dense_rows
from qops.nn.offload import Offloadable
from qops.ops import (
    int4_gemm,
    int8_gemm,
    int8_weight_only_gemm,
    quantize_int8,
)
from qops.weights import Int4Weight, Int8Weight


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
        return linear(in_dtype_of(x, residual), residual)
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
            residual: [..., N] in the dtype of the output, added to it; not with a `gate_up` weight.

        Returns:
            [..., N] in the dtype of x, or float32; with a `gate_up` weight its SiLU-mul, [..., N/2].
        """
        weight, bias = self._operands()
        x = x.float() if self.float32_output else x
        if not x.is_contiguous():
            x = with_dense_rows(x)
        if residual is not None and not residual.is_contiguous():
            residual = with_dense_rows(residual)
        return int4_gemm(x, weight, bias, residual=residual, silu_mul=weight.gate_up)


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
            residual: [..., N] in the dtype of the output, added to it; not with a `gate_up` weight.

        Returns:
            [..., N] in the dtype of x (of :class:`Int8Rows`: their `dtype`), or float32; with a `gate_up` weight its
            SiLU-mul, [..., N/2].
        """
        if not isinstance(x, Int8Rows):
            x = Int8Rows(*quantize_int8(x if x.is_contiguous() else with_dense_rows(x)), x.dtype)
        q, scale, dtype = x
        if not q.is_contiguous():
            q = with_dense_rows(q)
        if residual is not None and not residual.is_contiguous():
            residual = with_dense_rows(residual)
        weight, bias = self._operands()
        dtype = torch.float32 if self.float32_output else dtype
        return int8_gemm(q, scale, weight, bias, residual=residual, silu_mul=weight.gate_up, out_dtype=dtype)


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
        return int8_weight_only_gemm(x if x.is_contiguous() else with_dense_rows(x), *self._operands())


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
