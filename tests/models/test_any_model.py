"""`quantize_linears`: the linears of a model that qops knows nothing of."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import qops
from qops.models import quantize_linears
from qops.nn import Int4Linear, Int8Linear, Int8WeightOnlyLinear, QuantizedLinear
from qops.testing import assert_bitwise


class Own(nn.Module):
    """A model with linears of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.again = self.first
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(64, 2, 96, batch_first=True) for _ in range(2)])
        self.narrow = nn.Linear(96, 12)
        self.read = nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.first(x) + self.again(x)) + (x @ self.read.weight.t()).sum()


def test_what_is_replaced_and_what_is_said_of_the_rest():
    torch.manual_seed(0)
    model, x = Own(), torch.randn(3, 64)
    seen, freed = [], weakref.ref(model.first.weight)
    model.first.register_forward_hook(lambda *_: seen.append(1))
    dense = qops.Int4()._quantize(model.first)
    wanted = model.narrow(2 * dense(x)) + (x @ model.read.weight.t()).sum()
    del dense
    assert quantize_linears(model, {"first": "int4", "*": "int8"}) is model
    gc.collect()
    assert type(model.first) is Int4Linear and model.again is model.first and freed() is None
    assert_bitwise(model(x), wanted)
    assert seen == [1, 1] and not model.training
    report = model.quantization_report
    assert report.replaced == {"first": "Int4Linear (group size 64)"}
    assert report.kept["narrow"] == "N = 12 must be a multiple of 8"
    assert report.kept["read"] == "Own reads its weight itself"
    assert report.kept["blocks.0.linear1"] == "TransformerEncoderLayer reads its weight itself"
    assert report.kept["blocks.1.self_attn.out_proj"] == "MultiheadAttention reads its weight itself"
    assert report.kept["scale"] == "a parameter of Own, which is no linear"
    covered = {*report.replaced, *report.kept}
    names = (name for name, _ in Own().named_parameters())
    assert all(name in covered or name.rpartition(".")[0] in covered for name in names)
    assert report.bytes_after < report.bytes_before and "left dense: narrow" in str(report)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="model has qops parts already"):
        quantize_linears(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["int4", "w4a8", "int8", "int8_weight_only"])
def test_each_scheme(scheme, dtype):
    model, x = nn.Sequential(nn.Linear(64, 96), nn.ReLU()).to(dtype), torch.randn(3, 64).to(dtype)
    wanted = quantize_linears(nn.ModuleList([nn.Linear(64, 96)]), scheme)[0]
    quantize_linears(model, scheme)
    assert type(model[0]) is type(wanted) and model(x).dtype == dtype


def test_a_name_asks_for_a_linear_that_somebody_reads():
    model = Own()
    quantize_linears(model, {"read": qops.Int8WeightOnly(32), "first": None})
    assert type(model.read) is Int8WeightOnlyLinear and model.quantization_report.kept["first"].startswith("its scheme")
    model = Own()
    quantize_linears(model, {"blocks.0.linear1": "int8"})
    found = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert found == ["blocks.0.linear1"] and type(model.blocks[0].linear1) is Int8Linear


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "scheme": ({"scheme": "int3"}, "scheme must be one of 'int4'"),
    "pattern": ({"scheme": {"nothing": "int4"}}, "scheme must name linears of the model, 'nothing' names none"),
    "skip": ({"skip": ("nothing",)}, "skip must name linears of the model"),
    "string": ({"skip": "first"}, "skip must be a tuple of names, got the string 'first'"),
    "group size": ({"scheme": qops.Int4(48)}, "quantize_linears: first: group_size must be -1 or a multiple of 16"),
    "nothing left": ({"skip": ("first",)}, "Own has none: skipped; .*N = 12 must be a multiple of 8"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_leave_the_model_as_it_was(case):
    arguments, message = ERRORS[case]
    model = Own()
    with pytest.raises(ValueError, match=f"qops.models.quantize_linears: .*{message}|{message}"):
        quantize_linears(model, **arguments)
    assert model.training and not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_other_errors():
    model: Any = Own()
    model.first.weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="quantize_linears: first: weight must be finite"):
        quantize_linears(model)
    with pytest.raises(ValueError, match="first: weight must have data, got a tensor on the meta device"):
        quantize_linears(Own().to("meta"))
    for other in (nn.Linear(16, 16), "a model"):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module that has linears"):
            quantize_linears(other)
    with pytest.raises(ValueError, match="ReLU has none: it has no linears"):
        quantize_linears(nn.ReLU())
