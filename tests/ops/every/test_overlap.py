"""No operator writes into what it reads: each output against each other tensor, by the schemas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.properties.overloads import overloads, tensor_arguments, valid_calls

OVERLOADS = {name: op for name, op in overloads().items() if tensor_arguments(op, written=True)}


def laid_together(written: Tensor, other: Tensor) -> tuple[Tensor, Tensor] | None:
    """The two in one memory, `other` 8 bytes behind: nowhere the same tensor, which is allowed here and there."""
    size, other_size = (t.numel() * t.element_size() for t in (written, other))
    if size <= 8:
        return None
    memory = torch.zeros(8 + size + other_size, dtype=torch.uint8)
    first = memory[:size].view(written.dtype).view(written.shape)
    # Ones: a scale must be positive, and all else may be one.
    second = memory[8 : 8 + other_size].view(other.dtype).view(other.shape).fill_(1)
    return first, second


def test_the_list_is_not_empty():
    assert {"quantize_int8_static.out", "int4_gemm.fused_out", "rotary_.default"} <= set(OVERLOADS)


@pytest.mark.parametrize("name", OVERLOADS)
def test_each_output_must_lie_apart_from_each_other_tensor(name):
    operator = OVERLOADS[name]
    outputs, tensors = tensor_arguments(operator, written=True), tensor_arguments(operator)
    wanted = {(a, b) for a in outputs for b in tensors if a != b and not (b in outputs and b < a)}
    seen: set[tuple[str, str]] = set()
    for call in valid_calls(name, 200):
        for written, other in sorted(wanted - seen):
            a, b = call.arguments[written], call.arguments[other]
            pair = None if a is None or b is None else laid_together(a, b)
            if pair is None:
                continue
            seen.add((written, other))
            arguments = {**call.arguments, written: pair[0], other: pair[1]}
            before = [t.clone() for t in pair]
            with pytest.raises(ValueError) as error:
                operator(**arguments)
            text = str(error.value)
            texts = {
                f"qops.{call.op}: {first} must lie apart from {second} in memory, got overlapping tensors"
                for first, second in ((written, other), (other, written))
            }
            assert text in texts
            assert all(torch.equal(now, then) for now, then in zip(pair, before, strict=True))
        if seen == wanted:
            break
    assert seen == wanted
