"""SmoothQuant: outlier channels of activations move into the weights that read them, before both become 8-bit.

A linear computes `x @ w.T`. With a scale s for each of its K input channels it computes the same from `x / s` and
`w * s`, and nothing has to divide x while the model runs: the weight of the norm that makes x, or the rows of the
linear that does, are divided instead. :func:`qops.quantize_model` folds such scales with its argument `smoothing`;
:func:`smoothing_scales` computes them from the activation maxima that the SmoothQuant project publishes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qops.models.replacement import Norms
from qops.nn import dense_linear

__all__ = ["smoothing_scales"]

Scales = Mapping[str, Tensor] | str | os.PathLike[str]


@torch.no_grad()
def smoothing_scales(model: Any, maxima: Scales, alpha: float = 0.5) -> dict[str, Tensor]:
    """SmoothQuant's scales of all linears that read a norm: `s = max|x|^alpha / max|w|^(1 - alpha)` for each channel.

    Args:
        model: a dense Transformers model of an architecture whose layers :func:`qops.quantize_model` fuses.
        maxima: max|x| of each input channel, `[K]` by the name of the linear, as SmoothQuant's `act_scales/*.pt` have
            it; a mapping, or the path of a `.pt` or `.safetensors` file. Other linears in it are ignored.
        alpha: how much of the outliers moves into the weights: 0.5 in the paper, 0.8 to 0.9 for Llama models in
            SmoothQuant's examples.

    Returns:
        What the argument `smoothing` of :func:`qops.quantize_model` takes: float32 `[K]` by the name of the linear, the
        same for q, k and v, and for gate and up.

    Numerics:
        Float32. Both max|w|, over all linears that read the norm, and s are at least 1e-5.

    Raises:
        ValueError: another architecture or file; maxima of none of the linears that read a norm, of another shape,
            negative or not finite; alpha outside 0 ... 1.

    Source:
        `smooth_ln_fcs` of mit-han-lab/smoothquant, which rounds to the dtype of the weight in between.
    """
    caller = "qops.models.smoothing_scales"
    if not 0 <= alpha <= 1:
        raise ValueError(f"{caller}: alpha must be in 0 ... 1, got {alpha}")
    maxima, scales = _read(caller, maxima), {}
    for producer, readers in _readers(caller, model).items():
        if isinstance(model.get_submodule(producer), nn.Linear):
            continue
        linears: list[nn.Linear] = [model.get_submodule(name) for name in readers]
        named = [name for name in readers if name in maxima]
        if not named:
            raise ValueError(f"{caller}: maxima must have one of {', '.join(readers)}, got none of them")
        k = linears[0].in_features
        x = torch.stack([_vector(caller, "maxima", name, maxima[name], k) for name in named]).amax(0)
        if (x < 0).any():
            raise ValueError(f"{caller}: maxima of {', '.join(named)} must not be negative")
        w = torch.stack([linear.weight.abs().amax(0) for linear in linears]).amax(0).float().cpu()
        s = (x**alpha / w.clamp(min=1e-5) ** (1 - alpha)).clamp(min=1e-5)
        scales |= dict.fromkeys(readers, s)
    return scales


@dataclass
class Smoothing:
    """Scales to fold, checked, for each part that they change; `Smoothing()` changes nothing.

    Attributes:
        columns: linear -> [K], what its columns are multiplied with.
        rows: linear -> [N], what its rows are divided by.
        norms: norm -> its new weight [H].
        into: linear -> the part that is divided for it.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    into: dict[str, str] = field(default_factory=dict)

    def linear(self, name: str, module: nn.Linear) -> nn.Linear:
        """`module` where nothing is folded into it, else a new one, in float32 at least."""
        columns, rows = self.columns.get(name), self.rows.get(name)
        if columns is None and rows is None:
            return module
        weight, bias = module.weight, module.bias
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if columns is not None:
            weight = weight * columns.to(weight)
        if rows is not None:
            weight = weight / rows.to(weight)[:, None]
            bias = bias if bias is None else (bias / rows.to(weight)).to(bias.dtype)
        return dense_linear(weight, bias)

    def norm(self, name: str, module: Any) -> Tensor:
        """The weight of a norm."""
        weight: Tensor = module.weight
        return self.norms.get(name, weight)


def plan_smoothing(caller: str, model: Any, scales: Scales, norms: Norms) -> Smoothing:
    """What folding `scales` into a dense model means, or a ValueError that says why it cannot be."""
    scales, folded = dict(_read(caller, scales)), Smoothing()
    for producer, readers in _readers(caller, model).items():
        missing = [name for name in readers if name not in scales]
        if missing == list(readers):
            continue
        if missing:
            raise ValueError(
                f"{caller}: smoothing must name all of {', '.join(readers)}, which read {producer}, "
                f"or none, got none for {', '.join(missing)}"
            )
        module = model.get_submodule(producer)
        linears = [model.get_submodule(name) for name in readers]
        for name in (producer, *readers):
            if not _foldable(model.get_submodule(name), norms):
                kind = type(model.get_submodule(name)).__name__
                raise ValueError(f"{caller}: smoothing cannot be folded into {name}, a {kind}")
        s = [_vector(caller, "smoothing", name, scales.pop(name), linears[0].in_features) for name in readers]
        if not (s[0] > 0).all():
            raise ValueError(f"{caller}: smoothing of {readers[0]} must be positive")
        if any(not torch.equal(other, s[0]) for other in s[1:]):
            raise ValueError(f"{caller}: smoothing of {', '.join(readers)} must be equal, as all read {producer}")
        columns = s[0].to(linears[0].weight.device)
        if isinstance(module, nn.Linear):
            folded.rows[producer] = _per_row(caller, producer, readers[0], model, columns)
        else:
            folded.norms[producer], columns = _divided(caller, producer, module, columns, norms)
        folded.columns |= dict.fromkeys(readers, columns)
        folded.into |= dict.fromkeys(readers, producer)
    if scales:
        raise ValueError(
            f"{caller}: smoothing must name linears that read a norm or another linear of their layer, "
            f"got {', '.join(map(repr, scales))}"
        )
    for name in {**folded.columns, **folded.rows}:
        dense: Any = model.get_submodule(name)
        if not folded.linear(name, dense).weight.to(dense.weight.dtype).isfinite().all():
            raise ValueError(f"{caller}: smoothing must leave {name} inside the range of {dense.weight.dtype}")
    return folded


def _foldable(part: nn.Module, norms: Norms) -> bool:
    return type(part) is nn.Linear if isinstance(part, nn.Linear) else norms.style(part) is not None


def _readers(caller: str, model: Any) -> dict[str, tuple[str, ...]]:
    """Norm or linear -> the linears of which each input channel is one of its channels, times something or in a mean.

    SiLU-mul multiplies each channel of up by one of gate; attention averages each channel of v over tokens.
    """
    from qops.models.decoder import known_parts

    known = known_parts(model)
    reason = next(iter(known.own.values()), None)
    if reason is None and known.mixes_in_place:
        reason = f"the q, k and v of {type(model).__name__} are one linear"
    if reason is not None:
        raise ValueError(f"{caller}: smoothing needs to know what a linear reads: {reason}")
    found: dict[str, tuple[str, ...]] = {}
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        sandwich = hasattr(layer, "pre_feedforward_layernorm")
        before_mlp = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        found[f"{prefix}input_layernorm"] = tuple(f"{prefix}self_attn.{part}_proj" for part in "qkv")
        found[f"{prefix}{before_mlp}"] = (f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj")
        found[f"{prefix}self_attn.v_proj"] = (f"{prefix}self_attn.o_proj",)
        found[f"{prefix}mlp.up_proj"] = (f"{prefix}mlp.down_proj",)
    return found


def _divided(caller: str, name: str, norm: Any, s: Tensor, norms: Norms) -> tuple[Tensor, Tensor]:
    """(weight of the norm divided by s, what it was divided by in truth: its rounding is none of the whole)."""
    style = norms.style(norm)
    assert style is not None
    old = norm.weight.double() + style["weight_offset"]
    weight = (old / s - style["weight_offset"]).to(norm.weight.dtype)
    new = weight.double() + style["weight_offset"]
    if not weight.isfinite().all() or ((new == 0) != (old == 0)).any():
        raise ValueError(f"{caller}: smoothing must leave {name} inside the range of {norm.weight.dtype}")
    return weight, torch.where(new == 0, s.double(), old / new)


def _per_row(caller: str, producer: str, reader: str, model: Any, s: Tensor) -> Tensor:
    """s of each row of a linear. The query heads that share a key/value head read the same rows of v."""
    rows = model.get_submodule(producer).out_features
    if rows == len(s):
        return s
    heads = s.view(model.config.num_key_value_heads, -1, rows // model.config.num_key_value_heads)
    if not torch.equal(heads, heads[:, :1].expand_as(heads)):
        raise ValueError(
            f"{caller}: smoothing of {reader} must be equal over the {heads.shape[1]} query heads that read one head "
            f"of {producer}"
        )
    return heads[:, 0].flatten()


def _vector(caller: str, what: str, name: str, vector: Any, k: int) -> Tensor:
    """As float32 on the CPU."""
    if not isinstance(vector, Tensor) or list(vector.shape) != [k]:
        found = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"{caller}: {what} of {name} must be a tensor of shape [K] = [{k}], got {found}")
    vector = vector.detach().float().cpu()
    if not vector.isfinite().all():
        raise ValueError(f"{caller}: {what} of {name} must be finite, got NaN or infinity")
    return vector


def _read(caller: str, scales: Scales) -> Mapping[str, Any]:
    if isinstance(scales, Mapping):
        return scales
    path = Path(scales)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # of several kinds, by how the file is broken
        raise ValueError(f"{caller}: {path} must be a .safetensors or .pt file of tensors: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{caller}: {path} must hold a dict of tensors, got {type(found).__name__}")
    return found
