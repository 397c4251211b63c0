"""Proof on the spot: fused decoder layers against Transformers' own, with the weights that they will hold.

Before a model is fused, one layer of each of its kinds is put into two small copies of the model, one fused and one of
the installed Transformers' layers, both on the same qops linears. Linears are the same and rounding is that of float32,
so the two agree to about 1e-6, and whatever a release of Transformers does otherwise than the fused layers expect
shows: another keyword, another order, another cache.

Linears that round their input to 8 bits make much of little: an error of 1e-7 sends some activation to the other side
of a half, which shows in all rows behind it. So layers with such linears are run twice, with linears of the same
weights that do not round, and as they are, where only what is plainly wrong can show.

This module imports Transformers through `qops.models.decoder`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qops.models.decoder import Known, cache_keyword, fuse
from qops.models.replacement import Replace, freeze, packed, without_autocast
from qops.models.rotary_tables import RotaryTables
from qops.nn import Int4Linear, Int8WeightOnlyLinear, QuantizedLinear, RMSNorm, dense_linear, frozen
from qops.weights import Int4Weight

VOCABULARY = 64
# More than the tokens of a decoding step, for which a CPU has other operators.
PROMPT = 9
# The third begins to compute layers ahead.
STEPS = 4
PADDING = 3
WINDOW = 4


class Tolerance(NamedTuple):
    """How far rows of the two models may be apart, in the norm of their difference over that of the row.

    Attributes:
        typical: three rows in four.
        largest: every row.
    """

    typical: float
    largest: float


# Sums in another order, through attention and final norm: 3e-7 seen on SmolLM2. Where two keys of random weights tie,
# one row in 36 has been 3e-5 apart.
FLOAT32 = Tolerance(2e-5, 2e-4)
# The same error sends one activation in 100,000 to the other side of a half, and rules with a / 127.5 put the largest
# element of every row on one. Of random layers with 4096 columns 75 % of the rows have been 2e-2 apart.
INT8 = Tolerance(1e-1, 5e-1)


class Proof(NamedTuple):
    """What running fused layers has shown.

    Attributes:
        done: what was compared, with its result.
        not_fused: why the layers must not be fused; None if they may.
        made: what linears and norms of the compared layers become, by name.
    """

    done: str
    not_fused: str | None
    made: dict[str, nn.Module]


def prove_fusion(model: Any, linear: Replace, norm: Replace, kind: Callable[[str], str], known: Known) -> Proof:
    """Runs fused layers against Transformers' own; `model` stays as it is.

    Two sequences, one of them padded on the left, and one alone without mask and positions: a prompt of 9 tokens, then
    four of one token with the cache. Sliding windows are 4 wide. Once more with an attention function that computes
    nothing, which has to get the same keywords from both, one that nobody knows among them. What is not fused is the
    same on both sides: for its weights stand random numbers, and for an MLP something smaller.

    Args:
        model: dense, or without storage; its layers can be fused (`qops.models.replacement.plan_fusion`).
        linear, norm, kind: as in `qops.models.replacement.replace_parts`.
        known: the parts that are to be fused.
    """
    chosen = _one_of_each_kind(model, kind)
    layers, made = [], {}
    for index in chosen:
        layer, replaced = model.model.layers[index], {}
        for name in known.names(layer, index):
            module, full = layer.get_submodule(name), f"model.layers.{index}.{name}"
            replaced[name] = made[full] = (linear if isinstance(module, nn.Linear) else norm)(full, module)
        layers.append(replaced)
    final = made["model.norm"] = norm("model.norm", model.model.norm)
    with without_autocast():
        done, not_fused = _compare(model, known, chosen, layers, final)
    return Proof(done, not_fused, made)


def _compare(
    model: Any, known: Known, chosen: list[int], layers: list[dict[str, Any]], final: Any
) -> tuple[str, str | None]:
    """(what was compared, with its result; why the layers must not be fused, or None)"""
    if len(chosen) == 1 < len(model.model.layers):
        # What goes from layer to layer, and a cache that takes one for another, show with two.
        chosen, layers = 2 * chosen, 2 * layers
    device = final.weight.device
    # A model without storage is built on the CPU.
    device = torch.device("cpu") if device.type == "meta" else device
    linears = [part for parts in layers for part in parts.values() if isinstance(part, QuantizedLinear)]
    names = ", ".join(map(str, dict.fromkeys(chosen)))
    what = f"layer {names} of {len(model.model.layers)} in float32"
    config = _small_config(model.config, chosen)
    run = partial(_compare_copies, model, known, config, chosen, final=final, device=device)
    if not any(map(_rounds_input, linears)):
        result, not_fused = run(layers, limit=FLOAT32)
        return f"{what}: {result}", not_fused
    plain = [{name: _without_rounding(part) for name, part in parts.items()} for parts in layers]
    result, not_fused = run(plain, limit=FLOAT32)
    if not_fused is None:
        more, not_fused = run(layers, limit=INT8)
        result = more if not_fused is not None else f"{result}, {more.split()[-1]} with activations in int8"
    return f"{what}: {result}", not_fused


def _compare_copies(
    model: Any,
    known: Known,
    config: Any,
    chosen: list[int],
    layers: list[dict[str, Any]],
    *,
    final: Any,
    device: torch.device,
    limit: Tolerance,
) -> tuple[str, str | None]:
    """(the result of one comparison; why the layers must not be fused, or None)"""
    copies = partial(_Copy, model, known, config, chosen, layers, final, device)
    try:
        theirs = copies().theirs()
        wanted, keywords = _run(theirs), _handed_on(theirs)
    except Exception as error:  # whatever a release does otherwise
        return "not made", f"Transformers' own layers did not run: {type(error).__name__}: {error}"
    try:
        ours = copies().ours()
        found, others = _run(ours), _handed_on(ours)
    except Exception as error:
        return "failed", f"the fused layers did not run: {type(error).__name__}: {error}"
    if others != keywords:
        return "failed", f"their attention function gets {others}, from Transformers' layers {keywords}"
    errors = {name: (found[name].double() - rows).norm(dim=-1) / rows.norm(dim=-1) for name, rows in _wide(wanted)}
    every = torch.cat(list(errors.values()))
    # NaN is no agreement.
    typical, largest = every.quantile(0.75).item(), every.max().item()
    if typical <= limit.typical and largest <= limit.largest:
        return f"relative error {largest:.1e}", None
    where = next(name for name, error in errors.items() if not error.max().item() <= limit.typical)
    difference = (
        f"the fused layers differ from Transformers' by {largest:.1e} (75 % of the rows by up to {typical:.1e}; "
        f"allowed are {limit.largest:.0e} and {limit.typical:.0e}), first in: {where}"
    )
    return "failed", difference


def _rounds_input(part: Any) -> bool:
    return isinstance(part, QuantizedLinear) and part.quantizes_input


def _without_rounding(part: Any) -> Any:
    """A linear that rounds its input as one that does not, of the same weight; all else as it is."""
    if not _rounds_input(part):
        return part
    return (Int4Linear if isinstance(part.weight, Int4Weight) else Int8WeightOnlyLinear)(part.weight, part.bias)


def _wide(rows: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.double()) for name, tensor in rows.items()]


# What is compared ----------------------------------------------------------------------------------------------------


def _per_layer(config: Any) -> dict[str, list[Any]]:
    """The settings of a config that name one value for each layer."""
    count = config.num_hidden_layers
    return {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == count}


def _one_of_each_kind(model: Any, kind: Callable[[str], str]) -> list[int]:
    """The first layer of each kind: by what the config says of it, and by what its linears become."""
    settings, first = _per_layer(model.config), {}
    for index, layer in enumerate(model.model.layers):
        linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        said = tuple(str(values[index]) for values in settings.values())
        first.setdefault((said, tuple(kind(f"model.layers.{index}.{name}") for name in linears)), index)
    return list(first.values())


def _small_config(config: Any, chosen: list[int]) -> Any:
    small = copy.deepcopy(config)
    settings = _per_layer(config)
    small.num_hidden_layers = len(chosen)
    for name, values in settings.items():
        setattr(small, name, [values[index] for index in chosen])
    small.vocab_size = VOCABULARY
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    if getattr(small, "sliding_window", None):
        small.sliding_window = WINDOW
    small.output_hidden_states = small.output_attentions = False
    small.dtype = torch.float32
    return small


class _Same(nn.Module):
    """For an MLP that is not fused."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin()


class _Copy:
    """The small copies of a model.

    Args:
        chosen: index of each layer in the model.
        layers: what its linears and norms become, by their names in it.
        final: the final norm.
    """

    def __init__(
        self,
        model: Any,
        known: Known,
        config: Any,
        chosen: list[int],
        layers: list[dict[str, Any]],
        final: Any,
        device: torch.device,
    ):
        from qops.models.load import skeleton

        self.known, self.chosen = known, chosen
        self.layers, self.final, self.device = layers, final, device
        self.decoder = skeleton(type(model.model), config, torch.float32)
        for layer, index in zip(self.decoder.layers, chosen, strict=True):
            if not known.mlps[index]:
                layer.mlp = _Same()
        # The instance in use: it may carry its owner's frequencies.
        self.rotary = copy.deepcopy(RotaryTables(model.model.rotary_emb, model.config).rotary).to(device)
        rows = torch.randn(VOCABULARY, config.hidden_size, generator=torch.Generator().manual_seed(0))
        # Small, as in trained models, so that what layers add stands out.
        self.decoder.embed_tokens.weight = frozen((0.02 * rows).to(device, torch.float32))

    def theirs(self) -> Any:
        """Of Transformers' layers."""
        for layer, parts in zip(self.decoder.layers, self.layers, strict=True):
            for name, part in parts.items():
                if isinstance(part, RMSNorm):
                    layer.get_submodule(name).weight = self._weight(part.weight)
                else:
                    layer.set_submodule(name, self._part(part))
        self.decoder.norm.weight = self._weight(self.final.weight)
        self.decoder.rotary_emb = self.rotary
        return self._ready()

    def ours(self) -> Any:
        """Of fused layers."""
        config = self.decoder.config
        for place, (index, parts) in enumerate(zip(self.chosen, self.layers, strict=True)):

            def part(name: str, parts: dict[str, Any] = parts) -> nn.Module:
                return self._part(parts[name])

            self.decoder.layers[place] = fuse(self.decoder.layers[place], part, self.known, index)
        self.decoder.norm = self._part(self.final)
        self.decoder.rotary_emb = RotaryTables(self.rotary, config) if self.known.attention else self.rotary
        return self._ready()

    def _ready(self) -> Any:
        rng = torch.Generator().manual_seed(2)
        for module in self.decoder.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    drawn = torch.randn(parameter.shape, generator=rng)
                    module._parameters[key] = self._weight(drawn / max(parameter.shape[-1], 1) ** 0.5)
        return freeze(packed(self.decoder))

    def _weight(self, tensor: torch.Tensor) -> nn.Parameter:
        return frozen(tensor.to(self.device, torch.float32))

    def _part(self, part: Any) -> nn.Module:
        """In float32, around the same quantised weight."""
        if isinstance(part, RMSNorm):
            return RMSNorm(
                self._weight(part.weight), part.eps, weight_offset=part.weight_offset, rounding=part.rounding
            )
        bias = None if part.bias is None else self._weight(part.bias)
        if isinstance(part, QuantizedLinear):
            weight = part.weight
            # One of a model on several GPUs is copied, and one that a fused MLP would mix in its place.
            if weight.device != self.device or self.known.mixes_in_place:
                weight = copy.deepcopy(weight).to(self.device)
            return part.around(weight, bias)
        return dense_linear(self._weight(part.weight), bias)


# How they are run ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _run(decoder: Any) -> dict[str, torch.Tensor]:
    """Output rows [rows, H] of each call, by its name; those of padding left out."""
    ids = torch.randint(VOCABULARY, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    # In steps of two in the second sequence: rotations tell distances alone, so a shift would not show.
    positions = (mask.cumsum(-1) - 1).clamp(min=0) * torch.tensor([[1], [2]])
    device = decoder.embed_tokens.weight.device
    ids, mask, positions = ids.to(device), mask.to(device), positions.to(device)
    keyword = cache_keyword(type(decoder))
    assert keyword is not None
    rows: dict[str, torch.Tensor] = {}
    for batch, padded in (("two sequences", True), ("one sequence", False)):
        cache, stop = None, 0
        for step in range(1 + STEPS):
            start, stop = stop, PROMPT + step
            call: dict[str, Any] = {"input_ids": ids[:, start:stop] if padded else ids[:1, start:stop]}
            if padded:
                call |= {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            out = decoder(**call, use_cache=True, **{keyword: cache})
            cache = getattr(out, keyword)
            name = f"{batch}, prompt" if step == 0 else f"{batch}, cached step {step}"
            hidden = out.last_hidden_state
            rows[name] = hidden[mask[:, start:stop].bool()] if padded else hidden.flatten(0, 1)
    return rows


@torch.no_grad()
def _handed_on(decoder: Any) -> list[dict[str, Any]]:
    """The keywords that the attention function gets in each layer."""
    calls: list[dict[str, Any]] = []

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        tensors = {name: list(found.shape) for name, found in kwargs.items() if isinstance(found, torch.Tensor)}
        calls.append({"layer_idx": module.layer_idx, **kwargs, **tensors})
        return query.transpose(1, 2), None

    name, before = f"qops_proof_{id(calls)}", decoder.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[name] = attention
    decoder.config._attn_implementation = name
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=decoder.embed_tokens.weight.device)
        decoder(input_ids=ids, use_cache=True, qops_unknown_keyword="handed on")
    finally:
        decoder.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[name]
    return calls
