"""Linears that multiply each column of their input by a factor first: what smoothing (AWQ, SmoothQuant) leaves where no
norm before a linear could take it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qops.nn.linears import LINEARS, Int4Linear, Int8StaticLinear, QuantizedLinear
from qops.weights.requirements import SCALE_DTYPES, dtype_name, require_tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class _Smoothed(QuantizedLinear):
    """Holds the factors, which no cast of the module changes."""

    pre_quant_scale: torch.Tensor

    def _hold(self, pre_quant_scale: torch.Tensor) -> None:
        name = type(self).__name__
        require_tensor(name, "pre_quant_scale", pre_quant_scale)
        if pre_quant_scale.dtype not in SCALE_DTYPES:
            raise ValueError(
                f"{name}: pre_quant_scale must have dtype float16, bfloat16 or float32, "
                f"got {dtype_name(pre_quant_scale.dtype)}"
            )
        if list(pre_quant_scale.shape) != [self.in_features]:
            raise ValueError(
                f"{name}: pre_quant_scale must have shape [K] = [{self.in_features}], got {list(pre_quant_scale.shape)}"
            )
        if not pre_quant_scale.is_meta and not bool(pre_quant_scale.isfinite().all()):
            raise ValueError(f"{name}: pre_quant_scale must be finite, got NaN or infinity")
        self.register_buffer("pre_quant_scale", pre_quant_scale.detach())

    def in_stored_order(self) -> Self:
        """As of every linear; the factors come in the order of the columns.

        Returns:
            A linear of the same class, whose weight has no ``perm``.
        """
        linear = super().in_stored_order()
        linear.pre_quant_scale = self.pre_quant_scale[self.weight.perm.long()]
        return linear

    def in_act_order(self, perm: torch.Tensor) -> Self:
        """As of every linear; the factors go where their columns come from.

        Args:
            perm: as there.

        Returns:
            A linear of the same class, whose weight has this ``perm``.
        """
        linear = super().in_act_order(perm)
        linear.pre_quant_scale = self.pre_quant_scale[perm.long().argsort()]
        return linear

    def _smooth(self, x: torch.Tensor) -> torch.Tensor:
        scale: Any = self._buffers["pre_quant_scale"]
        return (x * scale).to(x.dtype)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight of the dense linear that this one stands for: its columns are multiplied by the factors.

        Args:
            dtype: of the result; the exact products are rounded to float32, then to it.

        Returns:
            [N, K].
        """
        exact = self.weight.dequantize().double() * self._buffers["pre_quant_scale"]
        return exact.float().to(dtype)


class Int4SmoothedLinear(_Smoothed, Int4Linear):
    """:class:`Int4Linear` of ``x * pre_quant_scale``, rounded to the dtype of x: ModelOpt's AWQ.

    Args:
        weight, bias, float32_output: as there.
        pre_quant_scale: float16, bfloat16 or float32 [K], finite. Its dtype stays, whatever the module is cast to.

    Raises:
        TypeError: as there.
        ValueError: as there; `pre_quant_scale` is of another dtype or shape, or not finite.
    """

    scheme = "int4_smoothed"
    static_input = ("pre_quant_scale",)

    def __init__(
        self,
        weight: Any,
        bias: torch.Tensor | None = None,
        *,
        float32_output: bool = False,
        pre_quant_scale: torch.Tensor,
    ):
        super().__init__(weight, bias, float32_output=float32_output)
        self._hold(pre_quant_scale)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`Int4Linear`.

        Args:
            x: [..., K], any strides.
            residual: as there.

        Returns:
            As there.
        """
        return super().forward(self._smooth(x), residual)


class Int8StaticSmoothedLinear(_Smoothed, Int8StaticLinear):
    """:class:`Int8StaticLinear` of ``x * pre_quant_scale``, rounded to the dtype of x: ModelOpt's SmoothQuant.

    Args:
        weight, bias, float32_output, input_scale, input_zero_point: as there.
        pre_quant_scale: as of :class:`Int4SmoothedLinear`.

    Raises:
        TypeError: as there.
        ValueError: as there; `pre_quant_scale` is of another dtype or shape, or not finite.
    """

    scheme = "int8_static_smoothed"
    static_input = (*Int8StaticLinear.static_input, "pre_quant_scale")

    def __init__(
        self,
        weight: Any,
        bias: torch.Tensor | None = None,
        *,
        float32_output: bool = False,
        input_scale: torch.Tensor,
        input_zero_point: torch.Tensor | None = None,
        pre_quant_scale: torch.Tensor,
    ):
        super().__init__(
            weight, bias, float32_output=float32_output, input_scale=input_scale, input_zero_point=input_zero_point
        )
        self._hold(pre_quant_scale)

    def _quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return super()._quantized(self._smooth(x))


def neutral_input(kind: type[QuantizedLinear], in_features: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """The tensors of `static_input` that a class needs, all ones: for a linear whose numbers are of no interest.

    Args:
        kind: of a linear.
        in_features: K.
        device: of the tensors.

    Returns:
        Keyword arguments for the class.
    """
    sizes = {"input_scale": (), "pre_quant_scale": (in_features,)}
    return {
        key: torch.ones(size, dtype=torch.float32, device=device)
        for key, size in sizes.items()
        if key in kind.static_input
    }


# This module is imported with the package, so that a folder with these schemes is always read.
LINEARS.update({linear.scheme: linear for linear in (Int4SmoothedLinear, Int8StaticSmoothedLinear)})
