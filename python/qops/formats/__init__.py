"""Readers of quantised checkpoints: one protocol, one door, and a module for each format, imported when asked for."""

from qops.formats.checkpoint import Checkpoint
from qops.formats.open import load_tokenizer, open_checkpoint, read_checkpoint

__all__ = ["Checkpoint", "load_tokenizer", "open_checkpoint", "read_checkpoint"]
