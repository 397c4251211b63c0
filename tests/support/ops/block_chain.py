"""attention_block and mlp_block against the chain of operators that each of them stands for: the same bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qops.ops.decoder_block import ASYMMETRIC, INPUTS
from qops.testing import assert_bitwise

OPS = torch.ops.qops
CACHE = ("keys", "values")


def linear(a: dict[str, Any], name: str, n: int, x: Tensor, *, mixed: bool = False) -> Tensor:
    """x @ w.T + bias, by the arguments of a block that begin with ``name``.

    Strips of a mixed weight take 8 rows of gate, then 8 of up; its bias is in order.
    """
    packed, scales, zeros, perm, bias = (a[name + part] for part in ("", "_scales", "_zeros", "_perm", "_bias"))
    k = x.shape[-1]
    if mixed:
        bias = None if bias is None else bias.view(2, -1, 8).transpose(0, 1).reshape(-1)
        y = linear({**a, f"{name}_bias": bias}, name, n, x)
        return y.unflatten(-1, (-1, 2, 8)).transpose(-3, -2).flatten(-3)
    group_size, given = k // scales.shape[1] if k > 0 else 0, INPUTS[a[f"{name}_input"]]
    if given != "float":
        q, scale, points = quantised(x, given)
        if packed.dtype == torch.int8:
            return OPS.int8_gemm(q, scale, points, packed, scales, bias, n, x.dtype)
        weight = (packed, scales, zeros, perm, bias, n, group_size)
        return OPS.int4_int8_gemm(q, scale, *weight, a[f"{name}_kind"], x.dtype)
    given = (x, packed, scales, zeros, perm, bias, n, group_size)
    if packed.dtype == torch.int8:
        return OPS.int8_weight_only_gemm(*given)
    return OPS.int4_gemm(*given, a[f"{name}_kind"])


def quantised(x: Tensor, given: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8, scale and, of an asymmetric input, zero point of each row."""
    if INPUTS.index(given) < ASYMMETRIC:
        return *OPS.quantize_int8(x, given), None
    return OPS.quantize_int8_asym(x, given.removesuffix("-asymmetric"))


def norm(a: dict[str, Any], name: str, x: Tensor) -> Tensor:
    return OPS.rms_norm(x, a[name], a["eps"], a["weight_offset"], a["rounding"])


def end(a: dict[str, Any], y: Tensor) -> Tensor:
    """The residual, with the norm before it, if there is one."""
    x = a["x"]
    if a["post_norm"] is not None:
        y = norm(a, "post_norm", y)
    return (x.float() + y.float()).to(x.dtype)


def mlp_chain(a: dict[str, Any]) -> Tensor:
    """By the arguments of ``torch.ops.qops.mlp_block``."""
    x = a["x"]
    columns = a["down"].shape[1] // (8 if a["down"].dtype == torch.uint8 else 16)
    y = linear(a, "gate_up", 2 * columns, norm(a, "norm", x), mixed=a["mixed_gate_up"])
    return end(a, linear(a, "down", x.shape[-1], OPS.silu_mul(y)))


def attention_chain(a: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """By the arguments of ``torch.ops.qops.attention_block``: y, and keys and values as they are then."""
    x, keys, values = a["x"], a["keys"].clone(), a["values"].clone()
    (batch, t, h), (_, kv_heads, s, d) = x.shape, keys.shape
    columns = a["o"].shape[1] // (8 if a["o"].dtype == torch.uint8 else 16)
    q_heads = columns // d
    y = linear(a, "qkv", (q_heads + 2 * kv_heads) * d, norm(a, "norm", x))
    q, k, v = y.view(batch, t, q_heads + 2 * kv_heads, d).split([q_heads, kv_heads, kv_heads], 2)
    style = (a["eps"], a["weight_offset"], a["rounding"])
    q, k = (z if a[name] is None else OPS.rms_norm(z, a[name], *style) for z, name in ((q, "q_norm"), (k, "k_norm")))
    if a["cos"] is not None:
        q, k = OPS.rotary(q, k, a["cos"], a["sin"], a["positions"])
    keys[:, :, s - t :], values[:, :, s - t :] = k.transpose(1, 2), v.transpose(1, 2)
    names = ("scale", "mask", "window", "softcap", "first_position")
    y = OPS.decode_attention(q, keys, values, *(a[name] for name in names))
    return end(a, linear(a, "o", h, y.view(batch, t, columns))), keys, values


def check_mlp(a: dict[str, Any], what: object = "") -> Tensor:
    """y, which has the bits of the chain."""
    want = mlp_chain(a)
    got = OPS.mlp_block(**a)
    assert got.shape == a["x"].shape and got.is_contiguous()
    assert_bitwise(got, want, str(what))
    return got


def check_attention(a: dict[str, Any], what: object = "") -> Tensor:
    """y, the new rows of the cache, and that nothing else has changed around and before them."""
    want, keys, values = attention_chain(a)
    wholes = [whole_of(a[name]) for name in CACHE]
    expected = [whole.clone() for whole in wholes]
    for name, copy, held in zip(CACHE, expected, (keys, values), strict=True):
        cache = a[name]
        copy.as_strided(cache.shape, cache.stride(), cache.storage_offset()).copy_(held)
    got = OPS.attention_block(**a)
    assert got.shape == a["x"].shape and got.is_contiguous()
    for name, whole, copy in zip(CACHE, wholes, expected, strict=True):
        assert_bitwise(whole, copy, f"{name} of {what}")
    assert_bitwise(got, want, str(what))
    return got


def whole_of(t: Tensor) -> Tensor:
    """All elements of its storage."""
    return torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())


def fresh(a: dict[str, Any]) -> dict[str, Any]:
    """The same call on a cache of its own."""
    copies = {name: torch.empty_strided(a[name].shape, a[name].stride(), dtype=a[name].dtype) for name in CACHE}
    for name, copy in copies.items():
        copy.copy_(a[name])
    return {**a, **copies}
