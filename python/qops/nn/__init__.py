"""Modules on qops operators, without knowledge of any model library.

Every weight is a :class:`qops.Int4Weight` or :class:`qops.Int8Weight` submodule called `weight`, so a state_dict reads
`<linear>.weight.qweight`, `<linear>.weight.scales`, ... Modules are for inference: parameters are frozen.
"""

import qops.nn.flops  # noqa: F401  (tells torch's counter of operations of the operators)
from qops.nn.activations import Int8Rows, frozen
from qops.nn.embedding import Int8Embedding
from qops.nn.experts import ClampedSwiGLU, Expert, Experts
from qops.nn.int4_int8 import Int4Int8Linear
from qops.nn.linears import (
    Int4Linear,
    Int8AsymmetricCompressedTensorsLinear,
    Int8AsymmetricLinear,
    Int8CompressedTensorsLinear,
    Int8Linear,
    Int8StaticCompressedTensorsLinear,
    Int8StaticLinear,
    Int8TorchaoLinear,
    Int8WeightOnlyLinear,
    QuantizedLinear,
    dense_linear,
)
from qops.nn.mlp import MLP, MergedLinear, MergingModule
from qops.nn.norm import RMSNorm
from qops.nn.smoothed import Int4SmoothedLinear, Int8StaticSmoothedLinear

__all__ = [
    "MLP",
    "ClampedSwiGLU",
    "Expert",
    "Experts",
    "Int4Int8Linear",
    "Int4Linear",
    "Int4SmoothedLinear",
    "Int8AsymmetricCompressedTensorsLinear",
    "Int8AsymmetricLinear",
    "Int8CompressedTensorsLinear",
    "Int8Embedding",
    "Int8Linear",
    "Int8Rows",
    "Int8StaticCompressedTensorsLinear",
    "Int8StaticLinear",
    "Int8StaticSmoothedLinear",
    "Int8TorchaoLinear",
    "Int8WeightOnlyLinear",
    "MergedLinear",
    "MergingModule",
    "QuantizedLinear",
    "RMSNorm",
    "dense_linear",
    "frozen",
]
