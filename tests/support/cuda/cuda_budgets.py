"""What data/cuda_budgets.json allows each kernel."""

from __future__ import annotations

import json
import re

from tests.support.cuda.cuda_tools import ROOT

BUDGETS = ROOT / "tests/data/cuda_budgets.json"
KERNELS: dict[str, dict[str, int]] = json.loads(BUDGETS.read_text())["kernels"]


def budget(shape: str) -> dict[str, int]:
    """A kernel on rows that has none of its own has that of the norms."""
    kernel, _, rows = shape.partition(" ")
    return KERNELS[shape if shape in KERNELS or kernel == "norm_kernel" else f"norm_kernel {rows}"]


def shape_of(instance: str) -> str:
    """The key of a kernel's budget; instance: its name, demangled."""
    (kernel,) = re.findall(r"::(\w+)[<(]", instance)[:1]
    shape = re.search(r"RowShape<(\d+), (\d+), (true|false)>", instance)
    if shape:
        return f"{kernel} {' '.join(shape.groups())}"
    tile = re.search(rf"{kernel}<(?:[a-z_]\w*, )?(\d[\w, ]*)>", instance)
    return f"{kernel} {tile.group(1).replace(',', '')}" if tile else kernel
