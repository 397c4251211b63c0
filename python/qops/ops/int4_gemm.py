"""int4_gemm: matrix product with group-quantised 4-bit weights (W4A16), and int4_int8_gemm: of 8-bit rows (W4A8)."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qops import _native as _native
from qops._layout import MAX_INT4_INT8_GROUP as MAX_GROUP
from qops._layout import MAX_INT4_INT8_K as MAX_K
from qops._layout import group_count
from qops.ops._checks import FLOAT_DTYPES as OUT_DTYPES
from qops.ops._checks import INT4_KINDS as KINDS
from qops.ops._checks import (
    RULES,
    Checker,
    Result,
    Results,
    check_bias,
    check_epilogue,
    check_packed_weight,
    check_perm,
    check_weight_only,
    check_zeros,
    derivatives_are_asked,
    fake,
    refuse_grad,
    refuse_mixed,
    require_weight,
)

if TYPE_CHECKING:
    from qops._check_cases import Run
    from qops.weights import Int4Weight


def int4_gemm(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    batch_invariant: bool = False,
    activation: str | None = None,
    rule: str = "127",
    out: Tensor | None = None,
) -> Tensor:
    """Multiplies activations with a 4-bit weight: ``y[m, n] = R(sum_k x[m, k] * w[n, k] + bias[n])``.

    The exact weight is, by ``weight.kind``, ``w = s * (q - 8)``, ``s * (q - z)`` with an integer or a float zero, or
    ``s * q + o``, with one scale ``s`` for each row and group of ``weight.group_size`` columns. Scales and offsets of
    two levels are the float32 numbers that these products are exactly.

    At most one of ``residual``, ``silu_mul`` and ``out_scale`` asks for more, which is done while y is in registers:

        residual:   R(y + residual)
        silu_mul:   qops.silu_mul(y), for a weight of gate above up
        out_scale:  qops.quantize_int8_static(y, out_scale, out_zero_point)

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``; any leading dimensions and strides, last dimension dense.
        weight: an :class:`qops.Int4Weight` ``[N, K]``, packed.
        bias: float32, float16 or bfloat16 ``[N]``, added in float32.
        residual: ``[..., N]`` in the dtype of ``x``; any strides, last dimension dense.
        silu_mul: True exactly where ``weight.mixed_gate_up`` is (:meth:`qops.Int4Weight.mix_gate_up`).
        out_scale: float32, one element, positive and finite.
        out_zero_point: int32, one element in -128 ... 127; default 0.
        batch_invariant: one canonical order of summation for every M. That is so but for 16-bit x of many rows on some
            GPUs (see below), and so with ``activation="int8"``.
        activation: ``"int8"`` rounds the rows of x to 8 bits (W4A8): faster, and another contract.
        rule: of :func:`qops.quantize_int8`, with ``activation="int8"``.
        out: the tensor to write to, contiguous, sharing no memory with the inputs, but it may be ``residual`` itself;
            default: a new one.

    Returns:
        ``[..., N]``, contiguous, in the dtype of ``x``; with ``silu_mul`` ``[..., N/2]``, with ``out_scale`` int8;
        ``out`` where it is given.

    Numerics:
        R() is one rounding to nearest even to the dtype of ``x``. On the CPU, activations are held per block of at most
        128 columns of a group as fixed-point integers and multiplied exactly with the integer codes; block sums are
        exact, then scaled and added in float32 in ascending k, in 8 contiguous slices of the blocks that are added left
        to right. A row has the same bits for every M, position, thread count and ISA level.
        With ``a_b = max|x|`` of a block, the fixed-point error of y[m, n] before R() is at most
        ``1.001 * 2^-16 sum_b a_b sum_{k in b} |w[n, k]|`` (two bytes a value), and
        ``2^-31 sum_b a_b sum_{k in b} |w[n, k]|`` for float32 and for rows whose outliers would make the first bound
        reach the rounding of the output (four bytes). NaN or infinity in a row makes all its outputs NaN.
        On a GPU, exact integers ``q - z`` (``q - 8`` but for integer zeros) multiply x on the
        tensor cores: steps of 16 columns, in ascending k, give a float32 ``part`` of each group. Then
        ``total = fma(s, part, total)``, and with float zeros or offsets
        ``total = fma(o', sum of x in the group, total)`` with ``o' = s * (8 - zf)`` or ``fma(s, 8, o)``. K is cut into
        8 contiguous slices of whole blocks of 64 columns, slice i from block ``blocks * i // 8`` on; a group that a cut
        divides has a part on either side. The totals of the slices are added left to right, then the bias. So on
        one type of GPU a row has the same bits for every M, position, grid and stream. A row of float32 is three of
        bfloat16, 8 bits each, whose results before the bias are added, the smallest first. An index of ``perm`` that is
        out of range gives NaN; NaN and infinity in x spread as in a product of matrices.
        One route rounds more, for 16-bit x of many rows on GPUs of compute capability 9.x and 10.x, unless
        ``batch_invariant``: where ``plan_weight_only_gemm`` (csrc/cuda/weight_only_config.h) expects it to be faster,
        the exact weights are rounded to float32 and to the dtype of x (:func:`qops.int4_dequantize`) and cuBLAS
        multiplies them with x, into float32 sums, as many columns at a time as 128 MB of scratch hold: not a share of
        what is free, as a call has the same bits in every run. float16 cannot hold every weight: there, each row of
        the weight is first multiplied by the power of two that takes the largest number of its scales and zeros into
        [2^14, 2^15), and its sums are divided by it. No weight overflows, and one is off by at most 2^-11 of itself
        and 2^-39 of that largest one. (While ``torch.backends.cuda.matmul.allow_fp16_accumulation`` is set, cuBLAS
        has no such product and torch raises; ``batch_invariant=True`` does not ask for one.)
        ``residual``, ``silu_mul`` and ``out_scale`` give, bit for bit, what the separate operators give: y is rounded
        to the dtype of ``x`` before each of them.
        With ``activation="int8"`` the result is, bit for bit, that of :func:`qops.int4_int8_gemm` for
        ``q, scale = qops.quantize_int8(x, rule)`` and the dtype of ``x``, whose contract holds instead of all this.

    Raises:
        ValueError: ``activation`` is neither None nor ``"int8"``; a ``rule`` without it; shapes or strides do not fit;
            ``silu_mul`` does not fit the weight; arguments that exclude each
            other; a ``perm`` index is out of range, ``out_scale`` not positive and finite, or ``out_zero_point``
            outside -128 ... 127 (on a GPU nobody looks at the three); ``out`` overlaps an input.
        RuntimeError: a dtype or device without a kernel; the weight is not packed; an input requires grad while grad
            mode is on.

    Source:
        Weight formats of GPTQ, AWQ, compressed-tensors, HQQ and GGUF; fixed-point activations are this library's own.

    Example:
        >>> w = qops.Int4Weight.quantize(torch.eye(16), group_size=16)
        >>> y = qops.int4_gemm(torch.arange(16.0)[None], w)
        >>> y.shape
        torch.Size([1, 16])
    """
    if derivatives_are_asked():
        refuse_grad("int4_gemm", x=x, bias=bias, residual=residual, out_scale=out_scale, out=out)
    in_int8 = activation is not None or rule != "127"
    if in_int8:
        _require_int8(activation, rule)
    require_weight("int4_gemm", weight, "Int4Weight")
    weight._require_packed()
    if silu_mul != weight.mixed_gate_up:
        refuse_mixed("int4_gemm", silu_mul)
    # Module.__getattr__ would take 0.6 us for each of them, as much as half the operator's own overhead.
    buffers = weight._buffers
    args: tuple[Any, ...] = (
        buffers["packed"],
        buffers["scales"],
        buffers["zeros"],
        buffers["perm"],
        bias,
        weight.out_features,
        weight.group_size,
        KINDS.index(weight.kind),
    )
    if in_int8:
        args = (x, rule, *args, residual, silu_mul, out_scale, out_zero_point)
        if out is None:
            return torch.ops.qops.int4_int8_gemm.of_floats(*args)
        torch.ops.qops.int4_int8_gemm.of_floats_out(*args, out=out)
        return out
    args = (x, *args, batch_invariant)
    op = torch.ops.qops.int4_gemm
    if silu_mul or residual is not None or out_scale is not None or out_zero_point is not None:
        args += (residual, silu_mul, out_scale, out_zero_point)
        if out is None:
            return op.fused(*args)
        op.fused_out(*args, out=out)
    else:
        if out is None:
            return op.default(*args)
        op.out(*args, out=out)
    return out


def _require_int8(activation: str | None, rule: str) -> None:
    if activation is None:
        raise ValueError(f'qops.int4_gemm: rule must be "127" without activation="int8", got "{rule}"')
    if activation != "int8":
        raise ValueError(f'qops.int4_gemm: activation must be None or "int8", got {activation!r}')


def int4_int8_gemm(
    q: Tensor,
    scale: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Multiplies 8-bit rows with a 4-bit weight: ``y[m, n] = R(scale[m] * sum_k q[m, k] * w[n, k] + bias[n])``.

    The exact weight is that of :func:`qops.int4_gemm`, and q and scale are what :func:`qops.quantize_int8`,
    :func:`qops.rms_norm_int8` and :func:`qops.silu_mul_int8` give.

    At most one of ``residual``, ``silu_mul`` and ``out_scale`` asks for more, which is done while y is in registers:

        residual:   R(y + residual)
        silu_mul:   qops.silu_mul(y), for a weight of gate above up
        out_scale:  qops.quantize_int8_static(y, out_scale, out_zero_point)

    Args:
        q: int8 ``[..., K]``; any leading dimensions and strides, last dimension dense. K is at most 1048575.
        scale: float32 ``[...]``, one per token, any strides; or ``[]``, one for all.
        weight: an :class:`qops.Int4Weight` ``[N, K]``, packed, of groups of at most 131071 columns.
        bias: float32, float16 or bfloat16 ``[N]``.
        residual: ``[..., N]`` in ``out_dtype``; any strides, last dimension dense.
        silu_mul: True exactly where ``weight.mixed_gate_up`` is (:meth:`qops.Int4Weight.mix_gate_up`).
        out_scale: float32, one element, positive and finite.
        out_zero_point: int32, one element in -128 ... 127; default 0.
        out_dtype: of y: bfloat16, float16 or float32.
        out: the tensor to write to, contiguous, sharing no memory with the inputs, but it may be ``residual`` itself;
            its dtype takes the place of ``out_dtype``, but with ``out_scale``. Default: a new one.

    Returns:
        ``y [..., N]``, contiguous, in ``out_dtype``; with ``silu_mul`` ``[..., N/2]``, with ``out_scale`` int8; ``out``
        where it is given.

    Numerics:
        The integers ``code - 8`` (``code - z`` with integer zeros, 0 ... 16) are multiplied with q, and the sum of a
        group is an exact int32. K is cut into 8 slices of whole units of ``lcm(64, G)`` columns: of U units, the last
        of which may be shorter, slice i has those from ``U * i // 8`` to ``U * (i + 1) // 8``, perhaps none. With G = K
        there is one unit. In a slice, ``total`` begins at 0, and for each group in ascending k
        ``total = fma(s, float(sum), total)``, then with float zeros or offsets
        ``total = fma(o', float(sum of the group's q), total)``, where ``o' = s * (8 - zf)`` or ``fma(s, 8, o)``. The
        totals of the slices are added left to right, and ``y = R(fma(scale[m], total, bias[n]))``, without a bias
        ``y = R(scale[m] * total)``. Each step is rounded once to float32; R() is one rounding to nearest even to
        ``out_dtype``. The same bits for every M, position, thread count, ISA level and GPU. A NaN scale makes its row
        NaN.
        ``residual``, ``silu_mul`` and ``out_scale`` give, bit for bit, what the separate operators give: y is rounded
        to ``out_dtype`` before each of them.

    Raises:
        ValueError: shapes or strides do not fit; K or the groups are larger than their bounds; ``silu_mul`` does not
            fit the weight; arguments that exclude each other; a ``perm`` index is out of range, ``out_scale`` not
            positive and finite, or ``out_zero_point`` outside -128 ... 127 (on a GPU nobody looks at the three, and
            such a ``perm`` gives NaN); ``out`` overlaps an input.
        RuntimeError: a dtype or device without a kernel; the weight is not packed; an input requires grad while grad
            mode is on.

    Source:
        W4A8 as in ONNX Runtime, OpenVINO and ggml, which round x by group; one scale a token and the order of the sums
        are this library's own.

    Example:
        >>> w = qops.Int4Weight.quantize(torch.eye(16), group_size=16)
        >>> q, scale = qops.quantize_int8(torch.arange(16.0)[None])
        >>> qops.int4_int8_gemm(q, scale, w).shape
        torch.Size([1, 16])
    """
    if derivatives_are_asked():
        refuse_grad("int4_int8_gemm", scale=scale, bias=bias, residual=residual, out_scale=out_scale, out=out)
    require_weight("int4_int8_gemm", weight, "Int4Weight")
    _check_out_dtype(out_dtype, "out_dtype must be")
    weight._require_packed()
    if silu_mul != weight.mixed_gate_up:
        refuse_mixed("int4_int8_gemm", silu_mul)
    buffers = weight._buffers
    args = (
        q,
        scale,
        buffers["packed"],
        buffers["scales"],
        buffers["zeros"],
        buffers["perm"],
        bias,
        weight.out_features,
        weight.group_size,
        KINDS.index(weight.kind),
    )
    op = torch.ops.qops.int4_int8_gemm
    if silu_mul or residual is not None or out_scale is not None or out_zero_point is not None:
        if out is None:
            return op.fused(*args, out_dtype, residual, silu_mul, out_scale, out_zero_point)
        if out_scale is None:
            out_dtype = out.dtype
            _check_out_dtype(out_dtype, "out must have dtype")
        op.fused_out(*args, out_dtype, residual, silu_mul, out_scale, out_zero_point, out=out)
    else:
        if out is None:
            return op.default(*args, out_dtype)
        op.out(*args, out=out)
    return out


def _check_out_dtype(out_dtype: torch.dtype, subject: str) -> None:
    if out_dtype not in OUT_DTYPES:
        actual = str(out_dtype).removeprefix("torch.")
        raise RuntimeError(f"qops.int4_int8_gemm: {subject} float32, float16 or bfloat16, got {actual}")


def int4_gemm_ref(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    silu_mul: bool = False,
) -> Tensor:
    """The formula of :func:`int4_gemm` in float64 over the same quantised weights, nothing rounded; float64."""
    y = x.double() @ weight.dequantize(torch.float64).T
    y = y if bias is None else y + bias.double()
    if silu_mul:
        gate, up = y.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual.double()


def int4_int8_gemm_ref(q: Tensor, scale: Tensor, weight: Int4Weight, bias: Tensor | None = None, **more: Any) -> Tensor:
    """The formula of :func:`int4_int8_gemm` in float64, nothing rounded; float64."""
    return int4_gemm_ref(q.double() * scale.double().unsqueeze(-1), weight, bias, **more)


def int4_int8_gemm_exact(
    q: Tensor, scale: Tensor, weight: Int4Weight, bias: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The contract of :func:`int4_int8_gemm`: integers in int64, float32 steps one by one."""
    from qops.weights.rounding import add_rounding_to_odd

    weight = weight.widened()

    def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        # float64 holds the product, and a sum that was rounded to odd is rounded once.
        product, c = a.double() * b.double(), c.double()
        total = product + c
        return torch.where(total.isfinite(), add_rounding_to_odd(product, c), total).float()

    tensors = {name: tensor.cpu() for name, tensor in weight.canonical().items()}
    n, k, g = weight.out_features, weight.in_features, weight.group_size
    rows = q.reshape(-1, k).long()
    rows = rows[:, tensors["perm"].long()] if "perm" in tensors else rows
    codes = torch.stack((tensors["qweight"] & 15, tensors["qweight"] >> 4), dim=-1).view(n, k).long()
    scales, zeros = tensors["scales"].float(), tensors.get("zeros")
    groups = group_count(k, g)
    units = -(-k // math.lcm(64, g)) if groups else 0
    per_unit = math.lcm(64, g) // g if groups else 1
    y = torch.zeros(len(rows), n)
    for i in range(8):
        total = torch.zeros_like(y)
        for group in range(units * i // 8 * per_unit, min(units * (i + 1) // 8 * per_unit, groups)):
            columns, s = slice(group * g, (group + 1) * g), scales[:, group]
            zero = zeros[:, group, None].long() if zeros is not None and weight.kind == "zero_point" else 8
            w = codes[:, columns] - zero
            total = fma(s, (rows[:, columns] @ w.T).float(), total)
            if zeros is not None and weight.kind != "zero_point":
                z, eight = zeros[:, group].float(), torch.tensor(8.0)
                offset = s * (eight - z) if weight.kind == "float_zero" else fma(s, eight, z)
                total = fma(offset, rows[:, columns].sum(-1, keepdim=True).float(), total)
        y = y + total
    x_scale = scale.reshape(-1, 1)
    y = x_scale * y if bias is None else fma(x_scale, y, bias.float())
    return y.to(out_dtype).view(*q.shape[:-1], n)


def cases_of_int4_gemm(run: Run) -> None:
    from qops._check_cases import ROWS, epilogues, int4_cases, int4_weight, moved
    from qops._numerics import FLOAT_DTYPES, weight_only_bound

    for w, dtype, index in int4_cases(run, FLOAT_DTYPES):
        n, k = w.out_features, w.in_features
        x = run.random(ROWS[-1], k, dtype=dtype)
        bias = run.random(n, dtype=FLOAT_DTYPES[index % 3], outliers=False) if index % 2 else None
        # On a GPU another route may be taken for many rows.
        there, more = moved(run, w), {"bias": run.there(bias), "batch_invariant": run.gpu}
        product = partial(int4_gemm, weight=there, **more)
        (y,) = run.rows(product, x)
        ref = int4_gemm_ref(x, w, bias)
        run.within(y, ref, weight_only_bound(x, w, bias, gpu=run.gpu))
        if run.gpu:
            bound = weight_only_bound(x, w, bias, gpu=True, rounded_to=dtype)
            for m in ROWS:
                run.within(product(run.there(x[:m]), batch_invariant=False), ref[:m], bound[:m])
        mixed = partial(product, weight=moved(run, w, mixed=True)) if n % 16 == 0 else None
        epilogues(run, product, mixed, y, x)
    # The least that goes through cuBLAS on an H100 and a B200.
    m, n, k, g = 1024, 256, 1024, 128
    for dtype, kind in ((torch.float16, "zero_point"), (torch.bfloat16, "offset")) if run.gpu else ():
        run.begin(dtype, f"M = {m}, N = {n}, K = {k}, G = {g}", kind)
        w, x = int4_weight(run, n, k, g, kind, torch.float16, False), run.random(m, k, dtype=dtype)
        y = int4_gemm(run.there(x), moved(run, w))
        run.keep(y)
        run.within(y, int4_gemm_ref(x, w), weight_only_bound(x, w, gpu=True, rounded_to=dtype))


def cases_of_int4_int8_gemm(run: Run) -> None:
    from qops._check_cases import ROWS, epilogues, int4_cases, moved
    from qops._numerics import FLOAT_DTYPES
    from qops.ops.quantize_int8 import quantize_int8_ref

    for w, dtype, index in int4_cases(run, FLOAT_DTYPES):
        n, k = w.out_features, w.in_features
        q, scale = run.integers(-128, 128, ROWS[-1], k, dtype=torch.int8), run.scales(ROWS[-1])
        bias = run.random(n, dtype=FLOAT_DTYPES[index % 3], outliers=False) if index % 2 else None
        product = partial(int4_int8_gemm, weight=moved(run, w), bias=run.there(bias), out_dtype=dtype)
        (y,) = run.rows(product, q, scale)
        run.same(y, int4_int8_gemm_exact(q, scale, w, bias, dtype), "the contract's operations")
        x, rule = run.random(ROWS[-1], k, dtype=dtype), RULES[index % 3]
        of_floats = partial(int4_gemm, weight=moved(run, w), bias=run.there(bias), activation="int8", rule=rule)
        want = int4_int8_gemm_exact(*quantize_int8_ref(x, rule), w, bias, dtype)
        run.same(run.rows(of_floats, x), want, "of floats: the contract's operations")
        mixed = partial(product, weight=moved(run, w, mixed=True)) if n % 16 == 0 else None
        epilogues(run, product, mixed, y, q, scale)


def _check_limits_of_int8(check: Checker, arg: str, k: int, group_size: int) -> None:
    check.require(k <= MAX_K, arg, f"have at most {MAX_K} columns", lambda: str(k))
    check.require(group_size <= MAX_GROUP, "group_size", f"be at most {MAX_GROUP}", lambda: str(group_size))


@fake("int4_gemm")
def _(
    check: Checker,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    kind: int,
    batch_invariant: bool = False,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out: Tensor | None = None,
) -> Results:
    check_weight_only(check, x, packed, scales, zeros, perm, bias, out_features, group_size, kind, bits=4)
    y = check_epilogue(check, x, out_features, x.dtype, residual, silu_mul, out_scale, out_zero_point)
    return check.results(x, Result("out", out, *y))


@fake("int4_int8_gemm")
def _(
    check: Checker,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    kind: int,
    q: Tensor | None = None,
    scale: Tensor | None = None,
    x: Tensor | None = None,
    rule: str = "127",
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out: Tensor | None = None,
) -> Results:
    if x is not None:  # `.of_floats` and `.of_floats_out`
        check_weight_only(check, x, packed, scales, zeros, perm, bias, out_features, group_size, kind, bits=4)
        _check_limits_of_int8(check, "x", x.shape[-1], group_size)
        check.one_of(rule, "rule", *RULES)
        y = check_epilogue(check, x, out_features, x.dtype, residual, silu_mul, out_scale, out_zero_point)
        return check.results(x, Result("out", out, *y))
    assert q is not None and scale is not None
    subject = "out_dtype must be"
    if out_dtype is None:  # `.out` has none
        assert out is not None
        out_dtype, subject = out.dtype, "out must have dtype"
    check.dtype(q, "q", torch.int8)
    check.dtype(scale, "scale", torch.float32)
    _check_out_dtype(out_dtype, subject)
    check.at_least_1d(q, "q")
    k = check_packed_weight(check, packed, scales, out_features, group_size, bits=4)
    check.require(q.shape[-1] == k, "q", f"have last dimension K = {k}", lambda: str(q.shape[-1]))
    _check_limits_of_int8(check, "q", k, group_size)
    check.dense_last_dim(q, "q")
    check.rows(q, "q")
    check.per_row(scale, "scale", q)
    check_bias(check, bias, out_features)
    check_zeros(check, kind, zeros, scales)
    check_perm(check, perm, k)
    y = check_epilogue(check, q, out_features, out_dtype, residual, silu_mul, out_scale, out_zero_point)
    return check.results(q, Result("out", out, *y))
