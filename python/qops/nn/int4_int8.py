"""The linear of 4-bit weights whose input is rounded to 8 bits."""

from __future__ import annotations

import torch

from qops.nn.activations import Int8Rows, with_dense_rows
from qops.nn.linears import LINEARS, Int4Linear, Int8Input
from qops.ops import int4_int8_gemm


class Int4Int8Linear(Int8Input, Int4Linear):
    """y = x @ w.T + bias with an int4 weight and int8 activations (W4A8): :func:`qops.int4_int8_gemm` as a module.

    Activations are quantised per token (:func:`qops.quantize_int8`, rule "127") unless they come as :class:`Int8Rows`.

    Args:
        weight: a :class:`qops.Int4Weight` [N, K].
        bias: [N], added in float32.
        float32_output: return float32 whatever the activations' dtype, without rounding the sum to it.

    Raises:
        TypeError: a weight of another class.
        ValueError: the bias does not have N elements.
    """

    scheme = "w4a8"
    operator = "int4_int8_gemm"

    def forward(self, x: torch.Tensor | Int8Rows, residual: torch.Tensor | None = None) -> torch.Tensor:
        """See :func:`qops.int4_int8_gemm`.

        Args:
            x: [..., K], any strides, dense, or 8-bit by `rows_rule`.
            residual: [..., N] in the dtype of the output, added to it; not with a weight that mixes gate and up.

        Returns:
            [..., N] in the dtype of x (of :class:`Int8Rows`: their `dtype`), or float32; with a weight that mixes
            gate and up its SiLU-mul, [..., N/2].

        Raises:
            ValueError: 8-bit rows of another rule.
        """
        q, scale, _ = self._in_int8(x)
        if residual is not None and not residual.is_contiguous():
            residual = with_dense_rows(residual)
        weight, bias = self._operands()
        return int4_int8_gemm(
            q,
            scale,
            weight,
            bias,
            residual=residual,
            silu_mul=weight.mixed_gate_up,
            out_dtype=torch.float32 if self.float32_output else x.dtype,
        )


LINEARS[Int4Int8Linear.scheme] = Int4Int8Linear
