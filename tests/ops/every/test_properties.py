"""Random valid and invalid calls of every operator: the exact result, or an error that names what is wrong.

Few calls by default; `--hypothesis-profile=thorough` makes 2,000 of each operator. CONTRIBUTING.md says how to run that
under the sanitizers, and how an operator comes into the table.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st

from qops.testing import assert_bitwise
from tests.support.properties.overloads import STRATEGIES, overloads
from tests.support.properties.property_calls import check_call
from tests.support.properties.property_draws import Sampler


@pytest.mark.parametrize("op", STRATEGIES)
@given(rng=st.randoms(use_true_random=False))
def test_random_calls(op, rng):
    # Not from st.integers, which prefers small ones: three calls of four would be valid.
    call = STRATEGIES[op](Sampler(rng.randint))
    note(str(call))
    check_call(call)


def test_every_overload_is_drawn_valid_and_invalid():
    drawn: dict[bool, set[str]] = {True: set(), False: set()}
    for op, strategy in STRATEGIES.items():
        rng = random.Random(op)
        for _ in range(200):
            call = strategy(Sampler(rng.randint))
            drawn[not call.faults].add(call.name)
    assert drawn[True] == drawn[False] == set(overloads())


def test_the_comparison_takes_any_strides():
    # Contiguous to torch, as sizes of 1 have any stride, but not to Tensor.view().
    x = torch.ones(8).as_strided((2, 1, 1), (1, 2, 4))
    assert_bitwise(x, torch.ones(2, 1, 1))
