"""What torch's counter of operations counts of ours: as much as of the dense linears that they stand for."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import qops
from qops.models import dense_model
from qops.nn import dense_linear
from qops.nn.flops import FORMULAS
from tests.support.models.families import IDS, random_model

SCHEMES: dict[str, Any] = {
    "int4": qops.Int4(),
    "w4a8": qops.W4A8(),
    "int8": qops.Int8(),
    "int8_weight_only": qops.Int8WeightOnly(),
}


def counted(function: Any, *args: Any) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (64,), (0, 64)])
@pytest.mark.parametrize("n", [96, 24])  # of which the second is padded in memory
def test_a_linear_counts_like_the_dense_one(scheme, shape, n):
    linear = nn.Linear(64, n)
    quantised, x = SCHEMES[scheme]._quantize(linear), torch.randn(shape)
    dense = counted(dense_linear(linear.weight), x)
    operator = f"qops.{quantised.operator}"
    assert counted(quantised, x).get(operator, 0) == sum(dense.values()) == 2 * x.numel() * n


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_overload(scheme):
    """What a product does besides, before it stores, does not count."""
    quantised: Any = SCHEMES[scheme]._quantize(nn.Linear(64, 96))
    operator, x = getattr(qops, quantised.operator), [torch.randn(5, 64)]
    out, residual = {"out": torch.empty(5, 96)}, {"residual": torch.zeros(5, 96)}
    calls = [{}, out, residual, residual | out] if quantised.adds_residual else [{}, out]
    if quantised.quantizes_input:
        x = [*qops.quantize_int8(x[0])]
        calls = [call if "out" in call else call | {"out_dtype": torch.float32} for call in calls]
    for call in calls:
        assert counted(lambda call=call: operator(*x, quantised.weight, **call)) == {
            f"qops.{quantised.operator}": 2 * 5 * 64 * 96
        }, call
    if scheme == "w4a8":
        found = counted(lambda: qops.int4_gemm(torch.randn(5, 64), quantised.weight, activation="int8"))
        assert found == {"qops.int4_int8_gemm": 2 * 5 * 64 * 96}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("fuse", [False, True])
def test_a_model_counts_like_its_dense_twin(scheme, fuse):
    """Fused or not: hooks, of which the counter sets some, make decoder layers run their parts one by one."""
    model = qops.quantize_model(random_model("llama"), scheme, fuse=fuse, prove=False)
    found, dense = counted(model, IDS), counted(dense_model(model), IDS)
    for counts in (found, dense):  # tables of rotary embedding: releases of Transformers and fused models differ
        counts.pop("aten.bmm", None)
    assert any(operator.startswith("qops.int") for operator in found)
    assert sum(found.values()) == sum(dense.values()) and set(dense) <= {"aten.mm", "aten.addmm"}


class Calls(TorchDispatchMode):
    """What is called of the operators that have formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (formula := FORMULAS.get(func._overloadpacket)) is not None:
            self.found.append((func.name(), formula(*args)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_block_operators_count_like_their_parts(scheme, family):
    model = qops.quantize_model(random_model(family), scheme, prove=False)
    cache: Any = transformers.DynamicCache(config=model.config)
    model(IDS[:, :7], past_key_values=cache, use_cache=True)
    again = copy.deepcopy(cache)
    parts = counted(lambda: model(IDS[:, 7:8], past_key_values=again, use_cache=True))
    with Calls() as calls:
        model(IDS[:, 7:8], past_key_values=cache, use_cache=True)
    assert {"qops::attention_block", "qops::mlp_block"} <= {name for name, _ in calls.found}
    assert sum(count for _, count in calls.found) == sum(
        count for operator, count in parts.items() if operator.startswith("qops.")
    )
    assert parts["qops.decode_attention"] == 4 * 3 * 2 * 4 * 8 * (24 if family == "qwen3" else 16)


@pytest.mark.parametrize("first", ["qops", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first):
    """The counter imports Triton where there is one; `import qops` does not wait for that."""
    code = f"""
import sys
sys.path[:0] = {[str(Path(qops.__file__).parent.parent), *sys.path]!r}
import torch, {first}
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} != "qops")
import qops
from torch.utils.flop_counter import FlopCounterMode
assert all(type(finder).__module__ != "qops.nn.flops" for finder in sys.meta_path)
with FlopCounterMode(display=False) as counter:
    qops.int4_gemm(torch.zeros(2, 16), qops.Int4Weight.quantize(torch.ones(8, 16), 16))
assert counter.get_total_flops() == 2 * 2 * 8 * 16
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
