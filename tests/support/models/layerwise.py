"""A quantised model against the float64 model of the same weights, layer by layer."""

from __future__ import annotations

from typing import Any

import torch

from qops.models import dense_model
from qops.nn.experts import expand_experts
from qops.testing import assert_accurate


def exact_model(ours: Any) -> Any:
    """In float64, of the same weights."""
    exact = dense_model(ours, torch.float32).double()
    # The faster products of Transformers over experts take no float64.
    exact.config._experts_implementation = "eager"
    return exact


def of_linears(exact: Any) -> Any:
    """With experts whose linears can be hooked."""
    expand_experts(exact)
    return exact


def hidden_states(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Before the first layer and after each; the last one is normed."""
    return model(ids, output_hidden_states=True).hidden_states


def assert_layers_accurate(ours: Any, ids: torch.Tensor) -> None:
    """Weight-only models. In float32 at most 2e-5 of the largest element away, else twice as far as Transformers."""
    dtype = ours.dtype
    exact, usual = exact_model(ours), dense_model(ours, dtype)
    states = zip(*(hidden_states(model, ids) for model in (ours, exact, usual)), strict=True)
    for index, (got, want, usually) in enumerate(states):
        if dtype == torch.float32:
            torch.testing.assert_close(got.double(), want, atol=2e-5 * want.abs().max().item(), rtol=0)
        else:
            assert_accurate(got, want, usually, f"layer {index}")


def quantized_to_int8(x: torch.Tensor) -> torch.Tensor:
    """quantize_int8 and back, in the dtype of x."""
    a = x.abs().amax(-1, keepdim=True)
    return (x * (127 / a)).round() * (a / 127)


def int8_layer_errors(ours: Any, ids: torch.Tensor, quantize_activations: bool) -> torch.Tensor:
    """Relative error [layers, tokens] of each layer of a W8A8 model, given its own input.

    So an element that rounding sends to the other side of a half is counted in one layer, not in all behind it.

    Args:
        quantize_activations: whether the float64 model rounds the inputs of the int8 linears as ours does.
    """
    got = hidden_states(ours, ids)
    reference = of_linears(exact_model(ours))
    if quantize_activations:
        replaced = ours.quantization_report.replaced
        for name, module in reference.named_modules():
            if "Int8Linear" in replaced.get(name, ""):
                module.register_forward_pre_hook(lambda _, inputs: (quantized_to_int8(inputs[0]),))
    for index, layer in enumerate(reference.model.layers):
        layer.register_forward_pre_hook(lambda _, inputs, index=index: (got[index].double(), *inputs[1:]))
    want = hidden_states(reference, ids)
    return torch.stack(
        [((a - b).norm(dim=-1) / b.norm(dim=-1)).flatten() for a, b in zip(got[1:], want[1:], strict=True)]
    )


def assert_int8_layers_accurate(ours: Any, ids: torch.Tensor) -> None:
    """Most tokens meet no element on the other side of a half; without quantised activations the error is percents.

    One layer in ten may be less typical: one such element in a large activation moves, through attention, the inputs of
    all tokens behind it, and with them more elements.
    """
    errors, unquantized = (int8_layer_errors(ours, ids, quantize) for quantize in (True, False))
    typical = errors.quantile(0.75, dim=1)
    assert (typical > 1e-3).sum() <= len(typical) // 10, typical
    assert errors.max() < 0.05, errors.max(dim=1)
    assert unquantized.median(dim=1).values.min() > 3 * typical.median()
