"""GGUF files: containers, blocks, and the architectures that llama.cpp writes."""

from qops.formats.gguf.blocks import int4_weight, int8_weight
from qops.formats.gguf.tokenizer import load_tokenizer

__all__ = ["int4_weight", "int8_weight", "load_tokenizer"]
