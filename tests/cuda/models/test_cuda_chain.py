"""A quantised model on CUDA: the fused chain norm -> int8 -> GEMM -> SiLU-mul -> int8 -> GEMM, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qops
from qops.models.decoder import DecoderLayer
from qops.models.smoothing import smoothing_scales
from qops.testing import assert_bitwise
from tests.support.cuda.cuda_backend import Backend, gpu
from tests.support.models.layerwise import assert_int8_layers_accurate, hidden_states


def model_of(dtype: torch.dtype) -> LlamaForCausalLM:
    """Sizes that are no multiples of 64 and do not fill strips."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 88, "hidden_size": 72, "intermediate_size": 136, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.2, attention_bias=True, tie_word_embeddings=False)
    return LlamaForCausalLM(config).eval().to(dtype)


def on_gpu(model: Any, backend: Backend) -> Any:
    moved = copy.deepcopy(model)
    if backend.device != "cpu":
        return moved.to(backend.device)
    weights = [module for module in moved.modules() if isinstance(module, qops.Int8Weight)]
    for weight in weights:
        weight.unpack()
    with gpu(backend):
        for weight in weights:
            weight.pack()
    return moved


def smoothing_of(model: Any) -> dict[str, torch.Tensor]:
    """SmoothQuant's scales for activations of 1 to 9, a channel in eight the largest."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    maxima = {name: 1.0 + 8 * (torch.arange(model.get_submodule(name).in_features) % 8 == 3) for name in names}
    return smoothing_scales(model, maxima)


@pytest.mark.parametrize("smoothed", (False, True), ids=("plain", "smoothed"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_every_layer_of_an_int8_model_has_the_bits_of_the_cpu(backend, dtype, smoothed):
    model = model_of(dtype)
    here = qops.quantize_model(model, "int8", smoothing=smoothing_of(model) if smoothed else None, count_passes=True)
    assert all(isinstance(layer, DecoderLayer) for layer in here.model.layers)
    assert len(here.quantization_report.smoothed) == 10 * smoothed
    assert here.quantization_report.passes_after == 7 < here.quantization_report.passes_before / 2
    there = on_gpu(here, backend)
    for tokens in (1, 9, 33):
        ids = torch.arange(2 * tokens).view(2, tokens) * 7 % 88
        want = [*hidden_states(here, ids), here(ids).logits]
        with gpu(backend):
            ids = backend.on_device(ids)
            got = [*hidden_states(there, ids), there(ids).logits]
        if backend.device == "cpu":  # a GPU's attention is torch's own
            for index, (a, b) in enumerate(zip(got, want, strict=True)):
                assert_bitwise(a, b, f"{tokens} tokens, layer {index}")
    if dtype == torch.float32:
        with gpu(backend):
            assert_int8_layers_accurate(there, ids)
