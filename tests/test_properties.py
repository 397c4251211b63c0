"""Random valid and invalid calls of every operator: the exact result, or an error that names what is wrong.

Few calls by default; `--hypothesis-profile=thorough` makes 2,000 of each operator.
"""

from __future__ import annotations

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from property_calls import check_call
from property_draws import Sampler
from property_gemm import GEMM_OPS
from property_rows import ROW_OPS

OPS = ROW_OPS | GEMM_OPS


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_random_calls(op, data):
    call = OPS[op](Sampler(data))
    note(str(call))
    check_call(call)
