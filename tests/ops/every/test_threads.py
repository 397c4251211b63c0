"""Eight Python threads on the same tensors and weights: every operator gives each the bits that one thread gets."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from qops.testing import assert_bitwise
from tests.support.properties.overloads import STRATEGIES, overloads, valid_calls
from tests.support.properties.property_calls import Call

THREADS, CALLS = 8, 12
OVERLOADS = overloads()


def run(call: Call) -> tuple[Tensor, ...]:
    """Through the typed function, where the caller gives no results: those are a thread's own."""
    own = {name: value.clone() if name in call.written else value for name, value in call.arguments.items()}
    if call.written:
        OVERLOADS[call.name](**own)
        return tuple(own[name] for name in call.written)
    returned: Any = OVERLOADS[call.name](**own) if call.typed is None else call.typed(own)
    return returned if isinstance(returned, tuple) else () if returned is None else (returned,)


@pytest.mark.parametrize("op", STRATEGIES)
def test_eight_threads_get_the_bits_of_one(op):
    calls = [call for name in OVERLOADS if name.partition(".")[0] == op for call in valid_calls(name, CALLS)]
    want = [run(call) for call in calls]
    errors: list[BaseException] = []
    start = threading.Barrier(THREADS)

    def work(first: int) -> None:
        try:
            start.wait()
            with torch.inference_mode():
                for index in range(len(calls)):
                    at = (first + index) % len(calls)
                    for got, expected in zip(run(calls[at]), want[at], strict=True):
                        assert_bitwise(got, expected, str(calls[at]))
        except BaseException as error:  # what a thread raises is lost
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
