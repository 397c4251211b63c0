"""Fused quantised operators for LLM inference in PyTorch."""

import logging
from importlib.metadata import PackageNotFoundError, version

from qops import ops
from qops._native import build_info, explain
from qops.models import W4A8, Int4, Int8, Int8WeightOnly, load_model, quantize_model, save_model
from qops.ops import *  # noqa: F403
from qops.weights import Int4Weight, Int8Weight

__version__: str
"""Version of the package."""
try:
    __version__ = version("qops")
except PackageNotFoundError:  # the tree is on sys.path without being installed
    __version__ = build_info()["version"]

# Without a handler Python would write warnings to stderr; the application decides.
logging.getLogger("qops").addHandler(logging.NullHandler())

__all__ = [
    "W4A8",
    "Int4",
    "Int4Weight",
    "Int8",
    "Int8Weight",
    "Int8WeightOnly",
    "__version__",
    "build_info",
    "explain",
    "load_model",
    "quantize_model",
    "save_model",
]
__all__ += ops.__all__
