"""Every registered overload, its strategy, and valid calls of it.

The strategies of an operator stand in ``operators/<op>.py``, where they are found: each file there has ``CALLS``.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qops._native import WITHOUT_CUDA_KERNEL
from tests.support.properties.property_calls import Call
from tests.support.properties.property_draws import HUGE, Sampler, Sized, Strategy

_FILES = sorted((Path(__file__).parent / "operators").glob("*.py"))
STRATEGIES: dict[str, Strategy] = {
    op: strategy
    for file in _FILES
    for op, strategy in importlib.import_module(f"tests.support.properties.operators.{file.stem}").CALLS.items()
}


# What takes lists of the arguments of others: test_decoder_layers.py puts calls of those into lists.
OF_LISTS = ("decoder_layers", "decoder_plan")


def overloads() -> dict[str, Any]:
    """ "rms_norm.out" -> the operator, as registered; but for those of OF_LISTS."""
    names = (name.removeprefix("qops::") for name in torch._C._dispatch_get_all_op_names() if "qops::" in name)
    found = {}
    for name in sorted(names):
        op, _, overload = name.partition(".")
        if op not in OF_LISTS:
            found[f"{op}.{overload or 'default'}"] = getattr(getattr(torch.ops.qops, op), overload or "default")
    return found


def tensor_arguments(operator: Any, *, written: bool | None = None) -> list[str]:
    """Names of the tensor arguments in the schema; with `written` those that the operator writes, or does not."""
    return [
        a.name
        for a in operator._schema.arguments
        if "Tensor" in str(a.type)
        and (written is None or (a.alias_info is not None and a.alias_info.is_write) == written)
    ]


_found: defaultdict[str, list[Call]] = defaultdict(list)  # by overload, in the order in which they are drawn


def valid_calls(name: str, count: int) -> Iterator[Call]:
    """At most so many valid calls of one overload, always the same ones: on the CPU, of small tensors with elements."""
    found = _found[name]
    for index in range(count):
        while len(found) <= index:
            next(_draws(name.partition(".")[0]))
        yield found[index]


@functools.cache
def _draws(op: str) -> Iterator[None]:
    """Each step adds one to those of an overload: what is drawn for one serves the others."""
    rng = random.Random(op)
    while True:
        call = STRATEGIES[op](Sampler(rng.randint))
        if not call.faults and all(
            not t.is_meta and t.numel() > 0 and max(t.shape, default=1) < HUGE for _, t in call.tensors()
        ):
            _found[call.name].append(call)
            yield


# On a GPU weights are packed in another way, which only their own tests know.
ROW_OPS = sorted(
    op
    for op in STRATEGIES
    if op not in WITHOUT_CUDA_KERNEL and not {"packed", "qweight"} & set(tensor_arguments(overloads()[f"{op}.default"]))
)


def sized_call(name: str, rows: int, columns: int, dtype: torch.dtype, turn: int = 0, seed: int = 0) -> Call | None:
    """A valid call of one overload with so many rows and columns; None where an operator takes no such sizes."""
    for further in itertools.count(turn):
        sizes = Sized(rows, columns, dtype, further, seed)
        call = STRATEGIES[name.partition(".")[0]](sizes)
        if not sizes.asked:
            return None
        if call.name == name:
            return call


SIZED = [name for name in overloads() if name.partition(".")[0] in ROW_OPS and sized_call(name, 1, 8, torch.float32)]
