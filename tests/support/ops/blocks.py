"""Arguments of attention_block and mlp_block, by the names of their schemas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qops.ops._checks import INT4_KINDS
from qops.ops.decoder_block import ASYMMETRIC, INPUTS
from qops.testing import generator, random_activations
from qops.weights import Int4Weight, Int8Weight

Weight = Int4Weight | Int8Weight
# What a linear may be that multiplies int8: bits, kind and input; of 8 bits with one group.
INT8_PRODUCTS = [(4, kind, given) for kind in INT4_KINDS for given in INPUTS[1:ASYMMETRIC]]
INT8_PRODUCTS += [(8, "symmetric", given) for given in INPUTS[1:]]


def block_weight(
    n: int,
    k: int,
    *,
    bits: int = 4,
    kind: str = "zero_point",
    group: int = 16,
    scales: torch.dtype = torch.float32,
    act_order: bool = False,
    mixed: bool = False,
    seed: int = 0,
) -> Weight:
    """[n, k], whose products are of the size of x."""
    rng = generator(seed)
    shape = (n, k // group if k % group == 0 else 1)
    size = k**-0.5 / (4 if bits == 4 else 64)
    tensors: dict[str, Any] = {"scales": (torch.randn(shape, generator=rng) * size).to(scales)}
    if bits == 4:
        tensors["qweight"] = torch.randint(256, (n, k // 2), dtype=torch.uint8, generator=rng)
    else:
        tensors["qweight"] = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=rng)
    if kind == "zero_point":
        tensors["zeros"] = torch.randint(17, shape, dtype=torch.uint8, generator=rng)
    elif kind != "symmetric":
        zeros = torch.randn(shape, generator=rng) * (4 if kind == "float_zero" else size)
        tensors["zeros"] = zeros.to(scales)
    if act_order:
        tensors["perm"] = torch.randperm(k, generator=rng).int()
    weight = (Int4Weight if bits == 4 else Int8Weight).from_canonical(**tensors, kind=kind)
    return weight.mix_gate_up() if mixed else weight


def block_bias(n: int, dtype: torch.dtype | None, seed: int = 0) -> Tensor | None:
    return None if dtype is None else (torch.randn(n, generator=generator(seed)) / 8).to(dtype)


def of_weight(name: str, weight: Weight, bias: Tensor | None, given: str = "float") -> dict[str, Any]:
    return {
        name: weight.packed,
        f"{name}_scales": weight.scales,
        f"{name}_zeros": weight.zeros,
        f"{name}_perm": weight.perm,
        f"{name}_bias": bias,
        f"{name}_kind": INT4_KINDS.index(weight.kind),
        f"{name}_input": INPUTS.index(given),
    }


def linear_arguments(
    name: str, n: int, k: int, *, bias: torch.dtype | None = None, given: str = "float", seed: int = 0, **weight: Any
) -> dict[str, Any]:
    if given != "float" and weight.get("bits") == 8:
        weight |= {"group": k, "act_order": False}
    return of_weight(name, block_weight(n, k, seed=seed, **weight), block_bias(n, bias, seed + 1), given)


def norm_arguments(h: int, weight: torch.dtype, *, post_norm: bool, style: tuple[str, float]) -> dict[str, Any]:
    norms = [random_activations(h, dtype=weight, seed=seed, outliers=False) for seed in (1, 2)]
    return {
        "norm": norms[0],
        "post_norm": norms[1] if post_norm else None,
        "eps": 1e-5,
        "weight_offset": style[1],
        "rounding": style[0],
    }


def mlp_arguments(
    dtype: torch.dtype = torch.bfloat16,
    leading: tuple[int, ...] = (1, 1),
    h: int = 64,
    columns: int = 96,
    *,
    norm: torch.dtype | None = None,
    post_norm: bool = False,
    style: tuple[str, float] = ("hf", 0.0),
    mixed: bool = True,
    seed: int = 0,
    down: dict[str, Any] | None = None,
    **linears: Any,
) -> dict[str, Any]:
    """``linears``: of gate and up; ``down``: what differs there."""
    found = {"x": random_activations(*leading, h, dtype=dtype, seed=seed)}
    found |= norm_arguments(h, norm or dtype, post_norm=post_norm, style=style)
    found |= linear_arguments("gate_up", 2 * columns, h, mixed=mixed, seed=seed, **linears)
    found["mixed_gate_up"] = mixed
    return found | linear_arguments("down", h, columns, seed=seed + 1, **(linears | (down or {})))


def attention_arguments(
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    t: int = 1,
    past: int = 130,
    h: int = 64,
    heads: tuple[int, int] = (4, 2),
    d: int = 16,
    *,
    norm: torch.dtype | None = None,
    post_norm: bool = False,
    qk_norm: bool = False,
    style: tuple[str, float] = ("hf", 0.0),
    rotary: int | None = None,
    tables: torch.dtype | None = None,
    positions: torch.dtype | None = None,
    positions_of_all: bool = False,
    seed: int = 0,
    o: dict[str, Any] | None = None,
    how: dict[str, Any] | None = None,
    **linears: Any,
) -> dict[str, Any]:
    """A cache that is a view of a larger one, NaN around it and where the new tokens go.

    Args:
        rotary: R; None: D; 0: q and k are not rotated.
        how: scale, mask, window, softcap, first_position, where they are none of the defaults.
    """
    (q_heads, kv_heads), s, r = heads, past + t, d if rotary is None else rotary
    found = {"x": random_activations(batch, t, h, dtype=dtype, seed=seed)}
    found |= norm_arguments(h, norm or dtype, post_norm=post_norm, style=style)
    found |= linear_arguments("qkv", (q_heads + 2 * kv_heads) * d, h, seed=seed, **linears)
    for index, name in enumerate(("q_norm", "k_norm")):
        weight = random_activations(d, dtype=norm or dtype, seed=seed + index, outliers=False)
        found[name] = weight if qk_norm else None
    rows = s + 3 if positions else t
    angles = (torch.arange(rows)[:, None] + past) / 1e4 ** (torch.arange(0, max(r, 1), 2) / max(r, 1))
    for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
        found[name] = None if r == 0 else table[:, : r // 2].to(tables or torch.float32)
    found["positions"] = None
    if positions is not None and r > 0:
        shape = (batch, t) if positions_of_all else (t,)
        found["positions"] = torch.randint(0, rows, shape, generator=generator(seed)).to(positions)
    for index, name in enumerate(("keys", "values")):
        whole = torch.full((batch, kv_heads, s + 5, d), float("nan"), dtype=dtype)
        held = random_activations(batch, kv_heads, past, d, dtype=dtype, seed=seed + 5 + index, outliers=False)
        whole[:, :, 2 : past + 2] = held
        found[name] = whole[:, :, 2 : s + 2]
    found |= linear_arguments("o", h, q_heads * d, seed=seed + 1, **(linears | (o or {})))
    defaults = {"scale": d**-0.5, "mask": None, "window": 0, "softcap": 0.0, "first_position": 0}
    return found | defaults | (how or {})
