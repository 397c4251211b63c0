"""Every registered overload, and valid calls of it whose arguments a test then changes one at a time."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.support.properties.property_calls import Call
from tests.support.properties.property_draws import HUGE, Sampler
from tests.support.properties.property_gemm import GEMM_OPS
from tests.support.properties.property_rows import ROW_OPS
from tests.support.properties.property_weights import WEIGHT_OPS

STRATEGIES: dict[str, Callable[[Sampler], Call]] = ROW_OPS | GEMM_OPS | WEIGHT_OPS


def overloads() -> dict[str, Any]:
    """ "rms_norm.out" -> the operator, as registered."""
    names = (name.removeprefix("qops::") for name in torch._C._dispatch_get_all_op_names() if "qops::" in name)
    found = {}
    for name in sorted(names):
        op, _, overload = name.partition(".")
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


@functools.cache
def valid_calls(name: str, count: int) -> list[Call]:
    """As many valid calls of one overload, on the CPU and of small tensors with elements."""
    return list(itertools.islice(_valid_calls(name), count))


def _valid_calls(name: str) -> Iterator[Call]:
    rng = random.Random(name)
    op = name.partition(".")[0]
    while True:
        call = STRATEGIES[op](Sampler(rng.randint))
        fits = all(not t.is_meta and t.numel() > 0 and max(t.shape, default=1) < HUGE for _, t in call.tensors())
        if fits and not call.faults and f"{call.op}.{call.overload}" == name:
            yield call
