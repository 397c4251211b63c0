"""Real checkpoints, which are too large for the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def checkpoint(name: str) -> Path:
    """The folder of one of them: `checkpoint/` and what its producer's own runtime made of it. Skips without it."""
    folder = os.environ.get("QOPS_TEST_CHECKPOINTS")
    if not folder:
        pytest.skip("QOPS_TEST_CHECKPOINTS names no folder of checkpoints")
    return Path(folder) / name
