"""Whole language models of Transformers on qops operators: load, quantise, save, compare; linears of other models."""

from qops.formats.open import load_tokenizer
from qops.models.any_model import quantize_linears
from qops.models.load import dense_model, load_model
from qops.models.quantize import QuantizationReport, quantize_model
from qops.models.save import save_model
from qops.models.schemes import W4A8, Int4, Int8, Int8WeightOnly
from qops.models.smoothing import smoothing_scales

__all__ = [
    "W4A8",
    "Int4",
    "Int8",
    "Int8WeightOnly",
    "QuantizationReport",
    "dense_model",
    "load_model",
    "load_tokenizer",
    "quantize_linears",
    "quantize_model",
    "save_model",
    "smoothing_scales",
]
