"""attention_block and mlp_block: the halves of a decoder layer for a few new tokens, each as one operator.

decoder_layers is both of several layers in one call; fused models alone use it (`qops.models.blocks`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qops import _native as _native
from qops._layout import MAX_INT4_INT8_GROUP, MAX_INT4_INT8_K, MAX_INT8_K, MAX_INT8_K_WITH_ZERO_POINT
from qops.ops._checks import INT4_KINDS as KINDS
from qops.ops._checks import (
    Checker,
    Results,
    check_attention,
    check_block_linear,
    check_positions,
    columns_of,
    default_scale,
    derivatives_are_asked,
    fake,
    refuse_grad,
)

if TYPE_CHECKING:
    from qops._check_cases import Run
    from qops.weights import Int4Weight, Int8Weight

    Weight = Int4Weight | Int8Weight
    Linear = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int, int]


# What a linear multiplies: floats, int8 by a rule of quantize_int8, int8 by a rule of quantize_int8_asym.
INPUTS = ("float", "127", "compressed-tensors", "torchao", "255", "compressed-tensors-asymmetric")
ASYMMETRIC = INPUTS.index("255")
_WEIGHTS = frozenset(("Int4Weight", "Int8Weight"))


def linear_arguments(
    op: str, arg: str, weight: Weight, bias: Tensor | None, given: str, *, may_be_mixed: bool = False
) -> Linear:
    """A weight, its bias and input as the operators take them: packed, scales, zeros, perm, bias, kind, input."""
    if _WEIGHTS.isdisjoint(base.__name__ for base in type(weight).__mro__):  # qops.weights imports the operators
        actual = type(weight).__name__
        raise TypeError(f"qops.{op}: {arg} must be a qops.Int4Weight or a qops.Int8Weight, got {actual}")
    if weight.mixed_gate_up and not may_be_mixed:
        raise ValueError(f"qops.{op}: {arg} must have mixed_gate_up = False, got True")
    weight._require_packed()
    buffers = weight._buffers
    packed, scales = buffers["packed"], buffers["scales"]
    assert packed is not None
    assert scales is not None
    has_8_bits = packed.dtype is torch.int8
    if given not in INPUTS or not (has_8_bits or given in INPUTS[:ASYMMETRIC]):
        *names, last = map(repr, INPUTS if has_8_bits else INPUTS[:ASYMMETRIC])
        what = "" if has_8_bits else " for a weight of 4 bits"
        raise ValueError(f"qops.{op}: {arg}_input must be {', '.join(names)} or {last}{what}, got {given!r}")
    if has_8_bits and given != "float" and weight.kind != "symmetric":
        requirement = f"have kind 'symmetric' with {arg}_input = {given!r}"
        raise ValueError(f"qops.{op}: {arg} must {requirement}, got {weight.kind!r}")
    return packed, scales, buffers["zeros"], buffers["perm"], bias, KINDS.index(weight.kind), INPUTS.index(given)


def mlp_block(
    x: Tensor,
    norm: Tensor,
    eps: float,
    gate_up: Weight,
    down: Weight,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_input: str = "float",
    down_input: str = "float",
    post_norm: Tensor | None = None,
    weight_offset: float = 0.0,
    rounding: str = "hf",
) -> Tensor:
    """The MLP of a decoder layer with its norm and residual: ``x + down(silu(gate) * up)``.

    For the few tokens of a decoding step on a CPU: one call and one parallel region instead of three or more.

    Args:
        x: float32, float16 or bfloat16 ``[..., H]``; any leading dimensions and strides, last dimension dense.
        norm: ``[H]``, of the :func:`qops.rms_norm` before gate and up.
        eps: of the norms.
        gate_up: :class:`qops.Int4Weight` or :class:`qops.Int8Weight` ``[2 I, H]``, packed, gate above up; mixed
            (:meth:`qops.Int4Weight.mix_gate_up`) or not.
        down: the same ``[H, I]``.
        gate_up_bias: float32, float16 or bfloat16 ``[2 I]``, added in float32.
        down_bias: the same ``[H]``.
        gate_up_input, down_input: what they multiply: "float", activations as they are, or int8, quantised per token by
            a rule of :func:`qops.quantize_int8` ("127", "compressed-tensors", "torchao") or, with weights of 8 bits,
            of :func:`qops.quantize_int8_asym` ("255", "compressed-tensors-asymmetric"). A weight of 8 bits then is
            symmetric, with one scale per row and no ``perm``.
        post_norm: ``[H]``, of a norm of what ``down`` gives, before the residual is added (Gemma 2 and 3).
        weight_offset, rounding: of the norms, as in :func:`qops.rms_norm`.

    Returns:
        A new tensor of the shape and dtype of ``x``, contiguous.

    Numerics:
        Bit for bit the chain of operators that it stands for: ``rms_norm``, :func:`qops.int4_gemm` (of 8 bits
        :func:`qops.int8_weight_only_gemm`; of int8, quantised first, :func:`qops.int4_int8_gemm` and
        :func:`qops.int8_gemm`), ``silu_mul`` (rounding "hf"), the second product, ``rms_norm`` with ``post_norm``, and
        the sum with ``x``, each rounded to the dtype of ``x``. The same bits for every number of rows, thread count and
        ISA level.

    Raises:
        ValueError: shapes or strides do not fit; ``down`` is mixed; a weight has no product with such an input; an
            index of a weight's ``perm`` is out of range.
        TypeError: ``gate_up`` or ``down`` is no weight.
        RuntimeError: a dtype or device without a kernel; a weight is not packed; an input requires grad while grad mode
            is on.

    Source:
        The layers of Llama, Mistral, Qwen, Phi-3, SmolLM and Gemma in Hugging Face Transformers.

    Example:
        >>> gate_up, down = (qops.Int4Weight.quantize(torch.eye(n, k), 16) for n, k in ((64, 32), (32, 32)))
        >>> qops.mlp_block(torch.ones(1, 32), torch.ones(32), 1e-6, gate_up, down).shape
        torch.Size([1, 32])
    """
    if derivatives_are_asked():
        refuse_grad("mlp_block", x=x, norm=norm, gate_up_bias=gate_up_bias, down_bias=down_bias, post_norm=post_norm)
    return torch.ops.qops.mlp_block.default(
        x,
        norm,
        post_norm,
        eps,
        weight_offset,
        rounding,
        *linear_arguments("mlp_block", "gate_up", gate_up, gate_up_bias, gate_up_input, may_be_mixed=True),
        gate_up.mixed_gate_up,
        *linear_arguments("mlp_block", "down", down, down_bias, down_input),
    )


def attention_block(
    x: Tensor,
    norm: Tensor,
    eps: float,
    qkv: Weight,
    o: Weight,
    keys: Tensor,
    values: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    qkv_bias: Tensor | None = None,
    o_bias: Tensor | None = None,
    qkv_input: str = "float",
    o_input: str = "float",
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    post_norm: Tensor | None = None,
    weight_offset: float = 0.0,
    rounding: str = "hf",
    scale: float | None = None,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    first_position: int = 0,
) -> Tensor:
    """The attention of a decoder layer with its norm, cache and residual, for up to 8 new tokens of each sequence.

    ``q, k, v = qkv(rms_norm(x))``; q and k are normed by head and rotated where asked; k and v become the last T rows
    of ``keys`` and ``values``; then ``x + o(decode_attention(q, keys, values))``. On a CPU: one call and one parallel
    region instead of five or more.

    Args:
        x: float32, float16 or bfloat16 ``[B, T, H]``, T at most 8; any strides, last dimension dense.
        norm: ``[H]``, of the :func:`qops.rms_norm` before q, k and v.
        eps: of the norms.
        qkv: :class:`qops.Int4Weight` or :class:`qops.Int8Weight` ``[(Hq + 2 Hkv) D, H]``, packed: q above k above v.
        o: the same ``[H, Hq D]``.
        keys, values: ``[B, Hkv, S, D]`` in the dtype of ``x``, a view into a larger cache, say; last dimension dense.
            Rows 0 ... S - T - 1 are read, the last T are written.
        cos, sin: ``[rows, R / 2]``, R at most D, float32 or in the dtype of ``x``, as in :func:`qops.rotary`; None: q
            and k are not rotated.
        positions: int32 or int64 ``[T]`` or ``[B, T]``, rows of ``cos``; None: token t has row t.
        qkv_bias, o_bias: float32, float16 or bfloat16, added in float32.
        qkv_input, o_input: what they multiply, as in :func:`qops.mlp_block`.
        q_norm, k_norm: ``[D]``, of norms over each head; None: none.
        post_norm: ``[H]``, of a norm of what ``o`` gives, before the residual is added (Gemma 2 and 3).
        weight_offset, rounding: of the norms, as in :func:`qops.rms_norm`.
        scale, mask, window, softcap, first_position: as in :func:`qops.decode_attention`.

    Returns:
        A new tensor of the shape and dtype of ``x``, contiguous.

    Numerics:
        Bit for bit the chain of operators that it stands for: ``rms_norm``, the product (as in
        :func:`qops.mlp_block`), ``rotary`` or ``qk_norm_rotary``, :func:`qops.decode_attention`, the second product,
        ``rms_norm`` with ``post_norm``, and the sum with ``x``, each rounded to the dtype of ``x``. The same bits for
        every number of tokens and sequences, thread count and ISA level.

    Raises:
        ValueError: shapes or strides do not fit; a weight is mixed, or has no product with such an input; memory that
            is written overlaps another argument; a position or an index of a weight's ``perm`` is out of range.
        TypeError: ``qkv`` or ``o`` is no weight, ``keys`` no tensor.
        RuntimeError: a dtype or device without a kernel; a weight is not packed; an input requires grad while grad mode
            is on.

    Source:
        The layers of Llama, Mistral, Qwen, Phi-3, SmolLM and Gemma in Hugging Face Transformers.

    Example:
        >>> qkv, o = (qops.Int4Weight.quantize(torch.ones(n, k), 16) for n, k in ((96, 32), (32, 32)))
        >>> keys, values = torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16)
        >>> qops.attention_block(torch.ones(1, 1, 32), torch.ones(32), 1e-6, qkv, o, keys, values).shape
        torch.Size([1, 1, 32])
        >>> keys[0, 0].count_nonzero(-1)
        tensor([ 0,  0,  0,  0, 16])
    """
    if derivatives_are_asked():
        refuse_grad(
            "attention_block",
            x=x,
            norm=norm,
            keys=keys,
            values=values,
            cos=cos,
            sin=sin,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            q_norm=q_norm,
            k_norm=k_norm,
            post_norm=post_norm,
        )
    return torch.ops.qops.attention_block.default(
        x,
        norm,
        post_norm,
        eps,
        weight_offset,
        rounding,
        *linear_arguments("attention_block", "qkv", qkv, qkv_bias, qkv_input),
        q_norm,
        k_norm,
        cos,
        sin,
        positions,
        keys,
        values,
        *linear_arguments("attention_block", "o", o, o_bias, o_input),
        default_scale("attention_block", "keys", keys) if scale is None else scale,
        mask,
        0 if window is None else window,
        0.0 if softcap is None else softcap,
        first_position,
    )


def cases_of_mlp_block(run: Run) -> None:
    from qops._check_cases import blocks, mlp_chain, moved

    h, columns = 80, 48
    for dtype, style, weight, given in blocks(run):
        gate_up, down = (moved(run, weight(*shape)) for shape in ((2 * columns, h), (h, columns)))
        norm, post_norm = (run.there(run.random(h, dtype=dtype, outliers=False)) for _ in range(2))
        biases = [run.there(run.random(n, dtype=torch.float32, outliers=False)) for n in (2 * columns, h)]
        x = run.random(130, h, dtype=dtype)

        named = {"gate_up_bias": biases[0], "down_bias": biases[1], **style}
        named |= {"gate_up_input": given, "down_input": given}
        for last in (None, post_norm):
            plain = partial(mlp_block, norm=norm, gate_up=gate_up, down=down, post_norm=last, **named)
            y = run.rows(plain, x, out=False)[0]
            want = mlp_chain(run.there(x), norm, last, (gate_up, down), biases, style, given)
            run.same(y, want, "the chain of operators")
        mixed = moved(run, gate_up, mixed=True)
        run.same(plain(run.there(x), gate_up=mixed), y, "gate and up mixed")


def cases_of_attention_block(run: Run) -> None:
    from qops._check_cases import block_product, blocks, moved
    from qops.ops import decode_attention, qk_norm_rotary, rms_norm, rotary

    (q_heads, kv_heads, d), h = (6, 2, 24), 80
    for index, (dtype, style, weight, given) in enumerate(blocks(run)):
        batch, t, past = ((1, 1, 300), (3, 2, 5), (2, 8, 130))[index % 3]
        qkv, o = (moved(run, weight(*shape)) for shape in (((q_heads + 2 * kv_heads) * d, h), (h, q_heads * d)))
        norm, post_norm = (run.there(run.random(h, dtype=dtype, outliers=False)) for _ in range(2))
        heads = [run.there(run.random(d, dtype=dtype, outliers=False)) for _ in range(2)]
        x = run.there(run.random(batch, t, h, dtype=dtype))
        angles = torch.arange(past + t)[:, None] / 1e4 ** (torch.arange(0, d, 2) / d)
        tables = [run.there(table) for table in (angles.cos(), angles.sin())]
        positions = run.there(run.integers(0, past + t, batch, t, dtype=torch.int64))
        held = [run.there(run.random(batch, kv_heads, past, d, dtype=dtype, outliers=False)) for _ in range(2)]
        mask = run.there(run.integers(0, 3, batch, 1, t, past + t, dtype=torch.int64) > 0)
        forms: tuple[dict[str, Any], ...] = ({}, {"window": 7, "softcap": 5.0, "first_position": 100}, {"mask": mask})
        for normed, how in itertools.product((False, True), forms):
            keys, values = (torch.nn.functional.pad(cache, (0, 0, 0, t + 3), value=7) for cache in held)
            kept = [keys.clone(), values.clone()]
            y = attention_block(
                x,
                norm,
                qkv=qkv,
                o=o,
                keys=keys[:, :, : past + t],
                values=values[:, :, : past + t],
                cos=tables[0],
                sin=tables[1],
                positions=positions,
                qkv_input=given,
                o_input=given,
                q_norm=heads[0] if normed else None,
                k_norm=heads[1] if normed else None,
                post_norm=post_norm if normed else None,
                **style,
                **how,
            )
            run.keep(y, keys, values)
            q, k, v = (
                block_product(rms_norm(x, norm, **style), qkv, None, given)
                .view(batch, t, -1, d)
                .split((q_heads, kv_heads, kv_heads), 2)
            )
            at = {"cos": tables[0], "sin": tables[1], "positions": positions}
            q, k = qk_norm_rotary(q, k, *heads, **at, **style) if normed else rotary(q, k, **at)
            for cache, new in zip(kept, (k, v), strict=True):
                cache[:, :, past : past + t] = new.transpose(1, 2)
            run.same((keys, values), tuple(kept), "the cache")
            attended = decode_attention(q, kept[0][:, :, : past + t], kept[1][:, :, : past + t], **how)
            want = block_product(attended.view(batch, t, -1), o, None, given)
            want = x + (rms_norm(want, post_norm, **style) if normed else want)
            run.same(y, want, "the chain of operators")


def cases_of_decoder_layers(run: Run) -> None:
    from qops._check_cases import blocks, layer_parts

    (q_heads, kv_heads, d), h, columns, past = (6, 2, 24), 80, 48, 130
    shapes = {"qkv": ((q_heads + 2 * kv_heads) * d, h), "o": (h, q_heads * d)}
    shapes |= {"gate_up": (2 * columns, h), "down": (h, columns)}
    norms = {"norm": h, "post_norm": h, "q_norm": d, "k_norm": d, "mlp_norm": h, "mlp_post_norm": h}
    attention, ops = PARTS[: PARTS.index("mlp_norm")], torch.ops.qops
    for index, (dtype, style, weight, given_to) in enumerate(blocks(run)):
        batch, t = ((1, 1), (2, 3), (1, 8))[index % 3]
        x = run.there(run.random(batch, t, h, dtype=dtype))
        angles = torch.arange(past + t)[:, None] / 1e4 ** (torch.arange(0, d, 2) / d)
        cos, sin = (run.there(table) for table in (angles.cos(), angles.sin()))
        parts = [layer_parts(run, dtype, norms, shapes, weight, given_to) for _ in range(3)]
        keys, values = (
            [run.there(run.random(batch, kv_heads, past + t, d, dtype=dtype, outliers=False)) for _ in parts]
            for _ in range(2)
        )
        kept = [(k.clone(), v.clone()) for k, v in zip(keys, values, strict=True)]
        weights = [part[name] for part in parts for name in PARTS]
        window = {"window": 7, "first_position": 100}
        numbers = [parts[0][name] for name in _NUMBERS] + [1, 1, *window.values(), 0]  # mixed, rotated
        scale, given = d**-0.5, {"cos": cos, "sin": sin, "positions": None}
        given_once = {"weights": weights, "settings": 3 * numbers, **style, "scale": scale}
        caches = {"keys": [k.clone() for k, _ in kept], "values": [v.clone() for _, v in kept]}
        y = ops.decoder_layers.default(x, **given_once, **given, keys=keys, values=values)
        plan, first = ops.decoder_plan.default(**given_once), 3 * [window["first_position"]]
        planned = ops.decoder_layers.planned(x, plan=plan, first_positions=first, **given, **caches)
        run.keep(*y, *keys, *values)
        run.same(tuple(planned), tuple(y), "layers by their lists")
        for found, part, (k, v) in zip(y, parts, kept, strict=True):
            of = {name: part[name] for name in (*attention, *_NUMBERS[:4])}
            x = ops.attention_block.default(x, **of, **style, **given, keys=k, values=v, scale=scale, **window)
            of = {name: part[name] for name in part if name.startswith(("gate_up", "down"))}
            of |= {"norm": part["mlp_norm"], "post_norm": part["mlp_post_norm"], "mixed_gate_up": True}
            x = ops.mlp_block.default(x, **of, **style)
            run.same(found, x, "the blocks of a layer")
        run.same((*keys, *values), tuple(cache for kind in zip(*kept, strict=True) for cache in kind), "the caches")


cases_of_decoder_plan = cases_of_decoder_layers


def _check_norms(
    check: Checker,
    x: Tensor,
    norm: Tensor,
    post_norm: Tensor | None,
    eps: float,
    weight_offset: float,
    rounding: str,
    args: tuple[str, str] = ("norm", "post_norm"),
) -> None:
    check.float_dtype(x, "x")
    check.at_least_1d(x, "x")
    h = x.shape[-1]
    fits = h > 0 and h % 8 == 0
    check.require(fits, "x", "have a last dimension H that is a positive multiple of 8", lambda: str(h))
    check.dense_last_dim(x, "x")
    check.rows(x, "x")
    check.rms_norm_style(eps, weight_offset, rounding)
    for arg, weight in zip(args, (norm, post_norm), strict=True):
        if weight is not None:
            check.float_dtype(weight, arg)
            check.shape(weight, arg, "[H]", (h,))
            check.dense_last_dim(weight, arg)


def _check_linear(check: Checker, arg: str, operands: Any, given: int, n: int, k: int) -> None:
    """packed, scales, zeros, perm, bias and kind of a linear [N, K], and what it multiplies."""
    check_block_linear(check, arg, *operands, n=n, k=k)
    packed, scales, _, perm, _, kind = operands
    has_8_bits = packed.dtype == torch.int8
    groups = scales.shape[1] * (1 if scales.dim() == 3 else scales.shape[2] - 2)  # two levels have theirs inside
    known = INPUTS if has_8_bits else INPUTS[:ASYMMETRIC]
    *numbers, last = (f"{index} ({name})" for index, name in enumerate(known))
    requirement = f"be {', '.join(numbers)} or {last}" + ("" if has_8_bits else " for a weight of 4 bits")
    check.require(0 <= given < len(known), f"{arg}_input", requirement, lambda: str(given))
    if given == 0:
        return
    what = " for an input of int8"
    if not has_8_bits:
        check.require(k <= MAX_INT4_INT8_K, arg, f"have at most {MAX_INT4_INT8_K} columns{what}", lambda: str(k))
        group_size, requirement = k // max(groups, 1), f"have groups of at most {MAX_INT4_INT8_GROUP} columns{what}"
        check.require(group_size <= MAX_INT4_INT8_GROUP, f"{arg}_scales", requirement, lambda: str(group_size))
        return
    both = " for a weight of 8 bits and an input of int8"
    check.require(kind == 0, f"{arg}_kind", f"be 0 (symmetric){both}", lambda: str(kind))
    check.require(groups <= 1, f"{arg}_scales", f"have one group{both}", lambda: f"{groups} groups")
    check.require(perm is None, f"{arg}_perm", f"be None{both}", lambda: "a tensor")
    most, points = (MAX_INT8_K, "") if given < ASYMMETRIC else (MAX_INT8_K_WITH_ZERO_POINT, " with zero points")
    check.require(k <= most, arg, f"have at most {most} columns{what}{points}", lambda: str(k))


@fake("mlp_block")
def _mlp_block(
    check: Checker,
    x: Tensor,
    norm: Tensor,
    post_norm: Tensor | None,
    eps: float,
    weight_offset: float,
    rounding: str,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    gate_up_zeros: Tensor | None,
    gate_up_perm: Tensor | None,
    gate_up_bias: Tensor | None,
    gate_up_kind: int,
    gate_up_input: int,
    mixed_gate_up: bool,
    down: Tensor,
    down_scales: Tensor,
    down_zeros: Tensor | None,
    down_perm: Tensor | None,
    down_bias: Tensor | None,
    down_kind: int,
    down_input: int,
    norms: tuple[str, str] = ("norm", "post_norm"),
) -> Results:
    _check_norms(check, x, norm, post_norm, eps, weight_offset, rounding, norms)
    h, columns = x.shape[-1], columns_of(check, down, "down")
    first = (gate_up, gate_up_scales, gate_up_zeros, gate_up_perm, gate_up_bias, gate_up_kind)
    last = (down, down_scales, down_zeros, down_perm, down_bias, down_kind)
    _check_linear(check, "gate_up", first, gate_up_input, 2 * columns, h)
    _check_linear(check, "down", last, down_input, h, columns)
    return check.new_empty(x, x.shape)


@fake("attention_block")
def _attention_block(
    check: Checker,
    x: Tensor,
    norm: Tensor,
    post_norm: Tensor | None,
    eps: float,
    weight_offset: float,
    rounding: str,
    qkv: Tensor,
    qkv_scales: Tensor,
    qkv_zeros: Tensor | None,
    qkv_perm: Tensor | None,
    qkv_bias: Tensor | None,
    qkv_kind: int,
    qkv_input: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    keys: Tensor,
    values: Tensor,
    o: Tensor,
    o_scales: Tensor,
    o_zeros: Tensor | None,
    o_perm: Tensor | None,
    o_bias: Tensor | None,
    o_kind: int,
    o_input: int,
    scale: float,
    mask: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    first_position: int = 0,
) -> Results:
    _check_norms(check, x, norm, post_norm, eps, weight_offset, rounding)
    check.require(x.dim() == 3, "x", "have 3 dimensions [B, T, H]", lambda: str(x.dim()))
    for arg, cache in (("keys", keys), ("values", values)):
        check.same_dtype(cache, arg, x, "x")
        check.require(cache.dim() == 4, arg, "have 4 dimensions [B, Hkv, S, D]", lambda cache=cache: str(cache.dim()))
        check.dense_last_dim(cache, arg)
    (batch, t, h), (kv_heads, d), columns = x.shape, (keys.shape[1], keys.shape[3]), columns_of(check, o, "o")
    requirement = f"have shape [B, Hkv, S, D] with a D that divides the columns of o = {columns}"
    fits = d > 0 and kv_heads > 0 and columns > 0 and columns % d == 0
    check.require(fits, "keys", requirement, lambda: str(list(keys.shape)))
    q_heads = columns // d
    tokens = (batch, t, q_heads, d)
    cache = {"keys": keys, "values": values}
    check_attention(check, tokens, ("x", "o"), cache, scale, mask, window, softcap, first_position)
    for arg, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check.float_dtype(weight, arg)
            check.shape(weight, arg, "[D]", (d,))
            check.dense_last_dim(weight, arg)
    _check_rotary(check, x, cos, sin, positions, d)
    n = (q_heads + 2 * kv_heads) * d
    _check_linear(check, "qkv", (qkv, qkv_scales, qkv_zeros, qkv_perm, qkv_bias, qkv_kind), qkv_input, n, h)
    _check_linear(check, "o", (o, o_scales, o_zeros, o_perm, o_bias, o_kind), o_input, h, columns)
    return check.new_empty(x, x.shape)


# What a layer is made of, and its numbers, in the order of the lists that `decoder_layers` takes.
PARTS = (
    *("norm", "post_norm", "qkv", "qkv_scales", "qkv_zeros", "qkv_perm", "qkv_bias", "q_norm", "k_norm"),
    *("o", "o_scales", "o_zeros", "o_perm", "o_bias", "mlp_norm", "mlp_post_norm"),
    *("gate_up", "gate_up_scales", "gate_up_zeros", "gate_up_perm", "gate_up_bias"),
    *("down", "down_scales", "down_zeros", "down_perm", "down_bias"),
)
_LINEARS = ("qkv", "o", "gate_up", "down")
_NUMBERS = tuple(f"{name}_{of}" for name in _LINEARS for of in ("kind", "input"))
SETTINGS = (*_NUMBERS, "mixed_gate_up", "rotates", "window", "first_position", "number")  # that errors give a layer
_TABLES = ("cos", "sin", "positions")
_ATTENTION_PARTS = PARTS.index("mlp_norm")
_NEEDED = ("norm", "qkv", "qkv_scales", "o", "o_scales", "mlp_norm", "gate_up", "gate_up_scales", "down", "down_scales")


@fake("decoder_layers")
def _(check: Checker, x: Tensor, *, keys: Any, values: Any, mask: Tensor | None = None, **given: Any) -> Results:
    layers = len(keys)
    _check_counts(check, layers, values=(values, 1))
    if "plan" in given:  # of which a fake tensor knows nothing
        _check_counts(check, layers, first_positions=(given["first_positions"], 1))
        return [check.new_empty(x, x.shape) for _ in keys]
    _check_counts(check, layers, weights=(given["weights"], len(PARTS)), settings=(given["settings"], len(SETTINGS)))
    style = {name: given[name] for name in ("eps", "weight_offset", "rounding")}
    for index in range(layers):
        part: dict[str, Any] = dict(zip(PARTS, given["weights"][index * len(PARTS) :], strict=False))
        number = dict(zip(SETTINGS, given["settings"][index * len(SETTINGS) :], strict=False))
        cache = {"keys": keys[index], "values": values[index]}
        of_layer = Checker(f"decoder_layers: layer {number['number']}", gives=True)
        of_layer.tensors({"x": x, **part, **cache}, [name for name in PARTS if name not in _NEEDED])
        of_attention = {name: part[name] for name in PARTS[:_ATTENTION_PARTS]}
        of_attention |= {name: given[name] if number["rotates"] else None for name in _TABLES}
        of_attention |= {name: number[name] for name in (*_NUMBERS[:4], "window", "first_position")}
        _attention_block(of_layer, x, scale=given["scale"], mask=mask, **of_attention, **cache, **style)
        norm, post_norm, *names = PARTS[_ATTENTION_PARTS:]
        of_mlp = {name: part[name] for name in names} | {"norm": part[norm], "post_norm": part[post_norm]}
        of_mlp |= {name: number[name] for name in (*_NUMBERS[4:], "mixed_gate_up")}
        _mlp_block(of_layer, x, norms=(norm, post_norm), **of_mlp, **style)
    return [check.new_empty(x, x.shape) for _ in keys]


@fake("decoder_plan")
def _(check: Checker, weights: Any, settings: Any, **_: Any) -> Results:
    layers = len(settings) // len(SETTINGS)
    check.require(layers > 0, "settings", "hold those of a layer", lambda: str(len(settings)))
    _check_counts(check, layers, settings=(settings, len(SETTINGS)), weights=(weights, len(PARTS)))
    check.tensors({"norm": weights[0]}, [])
    return weights[0].new_empty(16, dtype=torch.uint8)


def _check_counts(check: Checker, layers: int, **lists: tuple[Sequence[Any], int]) -> None:
    for arg, (found, each) in lists.items():
        requirement = f"hold {each} for each of {layers} layers"
        check.require(len(found) == layers * each, arg, requirement, lambda found=found: str(len(found)))


def _check_rotary(
    check: Checker, x: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, d: int
) -> None:
    requirement = "be None without cos" if cos is None else "be given with cos"
    check.require((cos is None) == (sin is None), "sin", requirement, lambda: "None" if sin is None else "a tensor")
    if cos is None or sin is None:
        check.require(positions is None, "positions", "be None without cos", lambda: "a tensor")
        return
    check.float32_or_same_dtype(cos, "cos", x, "x")
    check.same_dtype(sin, "sin", cos, "cos")
    fits = cos.dim() == 2 and cos.shape[1] <= d // 2
    requirement = f"have shape [positions, R / 2] with R <= D = {d}"
    check.require(fits, "cos", requirement, lambda: str(list(cos.shape)))
    check.same_shape(sin, "sin", cos, "cos")
    check_positions(check, positions, cos, x.shape[:2])
