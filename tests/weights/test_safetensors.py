"""`save_file(model.state_dict())`: safetensors refuses entries that share memory."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import qops
from qops.nn import Int4Linear, Int8Embedding, Int8WeightOnlyLinear, MergedLinear, MergingModule, dense_linear
from qops.testing import assert_bitwise
from tests.support.models.families import random_model
from tests.support.ops.random_weights import random_int4


def saved_and_loaded(module: torch.nn.Module, folder) -> dict[str, torch.Tensor]:
    save_file(module.state_dict(), folder / "state.safetensors")
    return load_file(folder / "state.safetensors")


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize(
    "skip", [(), ("q_proj", "k_proj", "v_proj"), ("up_proj",)], ids=["all", "attention dense", "up dense"]
)
def test_the_state_of_a_model(scheme, skip, fuse, tmp_path):
    """Merged parts that are quantised, that are dense with a bias, and that stay separate."""
    model = qops.quantize_model(random_model("llama"), scheme, skip=("lm_head", *skip), fuse=fuse)
    state = saved_and_loaded(model, tmp_path)
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert_bitwise(state[key], tensor, key)
    twin = qops.quantize_model(random_model("llama", seed=1), scheme, skip=("lm_head", *skip), fuse=fuse)
    twin.load_state_dict(state)
    for key, tensor in twin.state_dict().items():
        assert_bitwise(tensor, state[key], key)


def test_a_table_that_embedding_and_output_share(tmp_path):
    table = qops.Int8Weight.quantize(torch.randn(40, 16))
    tied = torch.nn.ModuleDict({"embedding": Int8Embedding(table), "output": Int8WeightOnlyLinear(table)})
    state = saved_and_loaded(tied, tmp_path)
    assert_bitwise(state["embedding.weight.qweight"], state["output.weight.qweight"])


def test_a_permutation_that_merged_parts_share(tmp_path):
    parts = {name: Int4Linear(random_int4(24, 80, 16, "zero_point", act_order=True)[1]) for name in ("a", "b")}
    parent = MergingModule()
    parent.both = MergedLinear(parts)
    assert parent.both.merged is not None
    state = saved_and_loaded(parent, tmp_path)
    for name, part in parts.items():
        assert_bitwise(state[f"{name}.weight.perm"], part.weight.canonical()["perm"])


def test_dense_parts_are_views_of_the_merged_weight(tmp_path):
    """Rows that do not overlap may share a storage; copies would hold a dense model twice."""
    parent = MergingModule()
    parent.both = MergedLinear({name: dense_linear(torch.randn(8, 16), torch.randn(8)) for name in ("a", "b")})
    state = parent.state_dict()
    assert state["a.weight"].data_ptr() == parent.both.merged.weight.data_ptr()
    assert state["b.weight"].untyped_storage().data_ptr() == state["a.weight"].untyped_storage().data_ptr()
    assert saved_and_loaded(parent, tmp_path).keys() == state.keys()
