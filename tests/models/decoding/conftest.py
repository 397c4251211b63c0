"""Fused models for loops over their layers."""

from __future__ import annotations

import copy

import pytest
import torch

from qops import quantize_model
from tests.support.models.block_runs import LAYERS
from tests.support.models.families import random_model


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3"])
def model(request):
    with torch.inference_mode(False), torch.no_grad():
        found = quantize_model(random_model(request.param, dtype=torch.bfloat16, num_hidden_layers=LAYERS))
    found.family = request.param
    return found


@pytest.fixture
def made(model):
    """A model that a test may change."""
    with torch.inference_mode(False), torch.no_grad():
        return copy.deepcopy(model)


@pytest.fixture(params=["inference_mode", "no_grad"])
def mode(request):
    with torch.inference_mode(False), getattr(torch, request.param)():
        yield request.param
