"""The demo's model, SmolLM2-135M-Instruct, in every scheme; skipped until the demo has fetched it."""

from __future__ import annotations

import pytest
import torch

import qops
from qops.demo.artefact import Cache
from qops.demo.chat import text_ids
from qops.demo.compare import passage
from qops.models import dense_model, load_model, load_tokenizer, quantize_model
from tests.support.models.layerwise import assert_int8_layers_accurate, assert_layers_accurate


@pytest.fixture(scope="module")
def folder():
    cache = Cache()
    if not cache.prepared_is_valid(qops.__version__):
        pytest.skip("SmolLM2 is not in the cache: python -m qops.demo --no-compare")
    return cache.prepared


@pytest.fixture(scope="module")
def ids(folder):
    return torch.tensor([text_ids(load_tokenizer(folder), passage())[:48]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stored_weights_layer_by_layer(folder, ids, dtype):
    assert_layers_accurate(load_model(folder, dtype), ids)


def test_int4_layer_by_layer(folder, ids):
    # Hidden size 576 is no multiple of 128.
    model = quantize_model(dense_model(load_model(folder, torch.float32), torch.float32), "int4")
    assert model.model.layers[0].mlp.down_proj.weight.group_size == 128
    assert model.model.layers[0].self_attn.o_proj.weight.group_size == 64
    assert_layers_accurate(model, ids)


def test_int8_layer_by_layer(folder, ids):
    model = quantize_model(dense_model(load_model(folder, torch.float32), torch.float32), "int8")
    assert_int8_layers_accurate(model, ids)
