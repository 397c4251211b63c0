"""How a GGUF file says what is done to positions, as Transformers' `rope_parameters`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from qops.formats.gguf.contents import Contents

if TYPE_CHECKING:
    from qops.formats.gguf.architectures import Sizes


def rope(contents: Contents, sizes: Sizes, base: float | None) -> dict[str, Any]:
    """Of one frequency for all layers.

    Args:
        contents: of the file.
        sizes: of the model.
        base: of the frequencies where the file does not say it; None where it has to.

    Returns:
        `rope_parameters` of Transformers.
    """
    theta = {"rope_theta": contents.key(".rope.freq_base", float, base)}
    scaling = contents.key(".rope.scaling.type", str, "none")
    divisors = contents.divisors("rope_freqs.weight", sizes.head_dim // 2)
    if divisors is not None and scaling != "none":
        raise contents.error(
            f"tensor rope_freqs.weight together with {contents.full_key('.rope.scaling.type')} is not supported"
        )
    if divisors is not None:
        return _divided(contents, sizes, divisors, theta)
    if scaling == "none":
        return {"rope_type": "default", **theta}
    if scaling == "linear":
        return {"rope_type": "linear", "factor": contents.key(".rope.scaling.factor", float), **theta}
    if scaling == "yarn":
        return _yarn(contents, theta)
    raise contents.error(
        f"key {contents.full_key('.rope.scaling.type')} must be 'none', 'linear' or 'yarn', got '{scaling}'"
    )


def _yarn(contents: Contents, theta: dict[str, Any]) -> dict[str, Any]:
    found = {
        "rope_type": "yarn",
        "factor": contents.key(".rope.scaling.factor", float),
        "original_max_position_embeddings": contents.key(".rope.scaling.original_context_length", int),
    }
    for key in ("beta_fast", "beta_slow"):
        if contents.has_key(f".rope.scaling.yarn_{key}"):
            found[key] = contents.key(f".rope.scaling.yarn_{key}", float)
    return found | theta


def _divided(contents: Contents, sizes: Sizes, divisors: list[float], theta: dict[str, Any]) -> dict[str, Any]:
    """Files of Llama 3 carry one divisor for each frequency instead of the formula behind it.

    Where they are, bit for bit, those of a factor and the other parameters that all of Llama 3.1 to 3.3 have, these are
    Transformers' own. Else its longrope with equal short and long factors divides by exactly these numbers.
    """
    llama3 = {
        "rope_type": "llama3",
        "factor": max(divisors),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        **theta,
    }
    if torch.equal(llama3_divisors(llama3, sizes.head_dim), torch.tensor(divisors, dtype=torch.float32)):
        return llama3
    return {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": sizes.context,
        **theta,
    }


def llama3_divisors(parameters: dict[str, Any], head_dim: int) -> torch.Tensor:
    """What llama.cpp's converter makes of them, in its order of float32 operations."""
    frequencies = 1.0 / parameters["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    factor, low, high = (parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = parameters["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    divisors = 1 / ((1 - smooth) / factor + smooth)
    divisors[wavelengths < original / high] = 1
    divisors[wavelengths > original / low] = factor
    return divisors


def rope_of_two_kinds_of_layers(contents: Contents, sizes: Sizes, base: float | None) -> dict[str, Any]:
    """Gemma 3: layers with a sliding window have a base of their own, and no scaling."""
    return {
        "full_attention": rope(contents, sizes, base),
        # llama.cpp's default and Transformers' own, which files from before the key mean.
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": contents.key(".rope.freq_base_swa", float, 10000.0),
        },
    }


def rope_with_factors(contents: Contents, sizes: Sizes, base: float | None) -> dict[str, Any]:
    """Phi-3: of a part of each head, with factors for long contexts and for others in tensors."""
    dimensions = contents.key(".rope.dimension_count", int, sizes.head_dim)
    part = dimensions / sizes.head_dim
    if dimensions % 2 or part > 1 or int(sizes.head_dim * part) != dimensions:
        raise contents.error(
            f"key {contents.full_key('.rope.dimension_count')} must be even and at most the head dimension "
            f"{sizes.head_dim}, got {dimensions}"
        )
    found = {"rope_theta": contents.key(".rope.freq_base", float, base), "partial_rotary_factor": part}
    factors = {kind: contents.divisors(f"rope_factors_{kind}.weight", dimensions // 2) for kind in ("short", "long")}
    wanted = "none" if None in factors.values() else "longrope"
    scaling = contents.key(".rope.scaling.type", str, wanted)
    if len({divisors is None for divisors in factors.values()}) != 1 or scaling != wanted:
        raise contents.error(
            "tensors rope_factors_short.weight and rope_factors_long.weight must be there together, and with "
            f"{contents.full_key('.rope.scaling.type')} 'longrope' if it is there, got '{scaling}' and "
            f"{', '.join(kind for kind, divisors in factors.items() if divisors is not None) or 'neither'}"
        )
    original = contents.key(".rope.scaling.original_context_length", int, sizes.context)
    if wanted == "none":
        return {"rope_type": "default", **found}
    stored = contents.key(".rope.scaling.attn_factor", float)
    longer = sizes.context / original
    formula = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 and original > 1 else 1.0
    # The file rounds to float32 what Transformers computes in float64.
    if stored != torch.tensor(formula, dtype=torch.float32).item():
        found["attention_factor"] = stored
    return {
        "rope_type": "longrope",
        **{f"{kind}_factor": divisors for kind, divisors in factors.items()},
        "original_max_position_embeddings": original,
        **found,
    }
