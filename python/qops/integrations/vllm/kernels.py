"""Kernels of qops for vLLM's own quantization methods. They stand behind vLLM's own kernels."""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import (
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from qops._native import without_cuda
from qops.formats.folders.words import int8_from_unsigned, unpack
from qops.integrations.vllm.shards import Product
from qops.nn import Int4Int8Linear, Int4Linear, Int8AsymmetricLinear, Int8Linear, Int8WeightOnlyLinear
from qops.ops._checks import FLOAT_DTYPES
from qops.weights import Int4Weight, Int8Weight
from qops.weights.rounding import store_nibbles

# weight type -> what multiplies, bits of a code.
_LINEARS = {
    scalar_types.uint4b8: (Int4Linear, 4),
    scalar_types.uint4: (Int4Linear, 4),
    scalar_types.uint8b128: (Int8WeightOnlyLinear, 8),
    scalar_types.uint8: (Int8WeightOnlyLinear, 8),
    scalar_types.int4: (Int4Int8Linear, 4),
}


def _no_kernel(*operators: str) -> str | None:
    """Why this platform has none."""
    if current_platform.is_cpu():
        return None
    if not current_platform.is_cuda():
        return "qops has kernels for CPUs and for CUDA"
    missing = [name for name in operators if f"qops::{name}" in without_cuda]
    return f"this build of qops has no CUDA kernel of {', '.join(missing)}" if missing else None


class QopsMPLinearKernel(MPLinearKernel):
    """4- and 8-bit weights with dense activations; signed 4-bit weights with 8-bit ones (W4A8)."""

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if c.weight_type not in _LINEARS:
            return False, f"weight type must be one of {', '.join(map(str, _LINEARS))}, got {c.weight_type}"
        operator = _LINEARS[c.weight_type][0].operator
        quantizer = ("quantize_int8",) if operator == "int4_int8_gemm" else ()
        if reason := _no_kernel(operator, *quantizer):
            return False, reason
        if c.act_type not in FLOAT_DTYPES:
            return False, f"activations must be float16, bfloat16 or float32, got {c.act_type}"
        if c.out_type not in (None, c.act_type):
            return False, f"the output must be {c.act_type}, as activations are, got {c.out_type}"
        columns, rows = c.partition_weight_shape
        if columns % 8 or rows % 8:
            return False, f"N and K must be multiples of 8, got {rows} and {columns}"
        if c.group_size != -1 and (c.group_size % 16 or columns % c.group_size):
            return False, f"group size must be a multiple of 16 that divides K = {columns}, got {c.group_size}"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        codes, scales, zeros = self._get_weight_params(layer)
        linear, bits = _LINEARS[self.config.weight_type]
        found = _rows_of(self.w_s_name, scales)
        points = None
        if self.config.zero_points:
            assert zeros is not None
            # Several along N in a word, whichever way the matrix lies.
            points = unpack(zeros.t() if zeros.output_dim == 0 else zeros.data, bits).t().contiguous()
        if self.config.weight_type == scalar_types.int4:  # one in a byte
            words = store_nibbles(codes.data + 8)
        else:
            if codes.packed_dim != codes.input_dim:
                raise ValueError(f"qops: {self.w_q_name} must hold neighbours along K in a word, got others")
            words = (codes.data if codes.input_dim == 1 else codes.t()).contiguous().view(torch.uint8)
        if bits == 8:
            weight: Any = int8_from_unsigned("qops.integrations.vllm", words, points, found, None, pack=False)
        else:
            kind = "symmetric" if points is None else "zero_point"
            columns = self.config.partition_weight_shape[0]
            weight = Int4Weight.from_canonical(words, found, kind=kind, zeros=points, in_features=columns, pack=False)
        layer.qops = Product([linear(weight)])
        given = {id(parameter) for parameter in (codes, scales, zeros)}
        for name in [name for name, parameter in layer._parameters.items() if id(parameter) in given]:
            setattr(layer, name, None)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.qops(x, bias)


def _rows_of(name: str, scales: Any) -> Tensor:
    """[N, K/G], whichever way they lie."""
    if scales.dim() != 2:
        raise ValueError(f"qops: {name} must be a matrix, got shape {list(scales.shape)}")
    return scales.data.contiguous() if scales.output_dim == 0 else scales.data.t().contiguous()


class QopsInt8ScaledMMLinearKernel(Int8ScaledMMLinearKernel):
    """W8A8 with activations that are quantised per token, by the rule of vLLM's own kernels: max|x| / 127."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        if compute_capability is not None and compute_capability < 80:
            return False, f"compute capability must be at least 80, got {compute_capability}"
        reason = _no_kernel("int8_gemm", "quantize_int8", "quantize_int8_asym")
        return reason is None, reason

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        if c.is_static_input_scheme:
            return False, "activations must be quantised per token, got a scale beforehand, which method qops takes"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        codes, scales, *_ = self._get_layer_params(layer)
        if not self.config.is_channelwise:  # one for each of the merged linears
            widths = torch.tensor(layer.logical_widths, device=scales.device)
            scales = torch.repeat_interleave(scales.data, widths)
        weight = Int8Weight.from_canonical(codes.data, scales.reshape(-1, 1).contiguous(), pack=False)
        linear = Int8Linear if self.config.input_symmetric else Int8AsymmetricLinear
        layer.qops = Product([linear(weight)])
        for name in self.layer_param_names[:2]:
            setattr(layer, name, None)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.qops(x, bias)


KERNELS: dict[type, str] = {QopsMPLinearKernel: "mp", QopsInt8ScaledMMLinearKernel: "int8"}
"""Each with its kind, in vLLM's words."""
