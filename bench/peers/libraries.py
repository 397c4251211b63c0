"""Shared objects that register operators of torch, taken out of their wheels: found on ``sys.path``, loaded once.

``python -m bench.peers.install`` puts them into a folder ``qops_peers`` under their path inside the wheel; an installed
package has them at that path itself. They are loaded without the package around them.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch

FOLDER = "qops_peers"


def find(path: str) -> Path | None:
    """A file by its path inside a wheel."""
    for entry in map(Path, sys.path):
        for candidate in (entry / FOLDER / path, entry / path):
            if candidate.is_file():
                return candidate
    return None


@functools.cache
def load(path: str, needs: tuple[str, ...] = ()) -> None:
    """Registers the operators of a shared object.

    Args:
        path: inside its wheel.
        needs: libraries that it links and that a machine may lack; our own folder is looked at where the system has
            none.
    """
    library = find(path)
    if library is None:
        raise FileNotFoundError(f"no {path} on PYTHONPATH; python -m bench.peers.install puts it there")
    for name in needs:
        try:
            ctypes.CDLL(name)
        except OSError:
            # Loaded under its soname, it serves whatever links it afterwards.
            ctypes.CDLL(str(library.parents[path.count("/")] / name))
    torch.ops.load_library(str(library))
