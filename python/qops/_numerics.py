"""Inputs, tolerances, buffers and the contracts' bounds: what :mod:`qops.check` shares with the tests and benchmarks.

They reach it through :mod:`qops.testing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qops.ops.decode_attention import attended, decode_attention_ref
from qops.ops.int8_gemm import int8_gemm_ref
from qops.ops.rms_norm import rms_norm_ref
from qops.ops.rotary import rotary_ref
from qops.ops.silu_mul import silu_mul_ref

if TYPE_CHECKING:
    from qops.weights import Int4Weight, Int8Weight

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of activations."""
UNIT = 2.0**-24
"""The relative error of one rounding to float32."""
_BLOCK = 128  # columns whose sum is exact on the CPU


def generator(seed: int) -> torch.Generator:
    """A CPU generator.

    Args:
        seed: the same seed gives the same numbers.

    Returns:
        A generator of its own.
    """
    return torch.Generator().manual_seed(seed)


def random_activations(*shape: int, dtype: torch.dtype, seed: int, outliers: bool = True) -> Tensor:
    """Normal values, by default with outliers as in the residual stream of an LLM.

    Args:
        shape: of the result; the last dimension holds the channels.
        dtype: of the result.
        seed: the same seed gives the same numbers.
        outliers: make about one channel in 64 20 times larger.

    Returns:
        A contiguous CPU tensor.
    """
    rng = generator(seed)
    x = torch.randn(shape, generator=rng)
    if outliers and x.numel() > 0:
        channels = torch.rand(shape[-1], generator=rng) < 1 / 64
        x = torch.where(channels, 20 * x, x)
    return x.to(dtype)


def strided_rows(x: Tensor, pad: int = 8) -> Tensor:
    """The same values as a view over a NaN-filled buffer.

    Args:
        x: floating-point ``[..., K]``.
        pad: how many elements further apart the rows lie.

    Returns:
        A view of the shape and dtype of ``x``, offset by ``pad // 2`` elements.
    """
    buffer = torch.full((*x.shape[:-1], x.shape[-1] + pad), float("nan"), dtype=x.dtype)
    view = buffer[..., pad // 2 : pad // 2 + x.shape[-1]]
    view.copy_(x)
    return view


class Guarded:
    """A contiguous tensor between two walls of known bytes; :meth:`check` fails when either wall was written.

    Args:
        t: gives dtype, shape and values.

    Attributes:
        tensor: the guarded copy of it.
    """

    WALL_BYTES = 128
    """Size of each wall."""
    PATTERN = 0xA5
    """The known byte."""

    def __init__(self, t: Tensor) -> None:
        size = t.numel() * t.element_size()
        self._bytes = torch.full((size + 2 * self.WALL_BYTES,), self.PATTERN, dtype=torch.uint8)
        inner = self._bytes[self.WALL_BYTES : self.WALL_BYTES + size]
        self.tensor = inner.view(t.dtype).view(t.shape) if size else torch.empty_like(t)
        self.tensor.copy_(t)

    def check(self) -> None:
        """Fails when bytes outside the tensor were written.

        Raises:
            AssertionError: they were.
        """
        walls = torch.cat([self._bytes[: self.WALL_BYTES], self._bytes[-self.WALL_BYTES :]])
        assert bool((walls == self.PATTERN).all()), "bytes outside the tensor were written"


def assert_within(out: Tensor, ref: Tensor, bound: Tensor, what: str = "") -> None:
    """``|out - ref| <= |R(ref) - ref| + 2 bound`` element by element: the tolerance where a contract gives a bound.

    Args:
        out: the kernel's result, R(y) of a y with ``|y - ref| <= bound``.
        ref: the reference in float64.
        bound: the error before R() that the contract allows, one of the ``*_bound`` functions here; of the shape of
            ``ref``.
        what: the start of the message.

    Raises:
        AssertionError: an element is further off, or a shape or a non-finite value differs.

    Rounding y moves it no further than to R(ref), so ``|R(y) - ref| <= |R(ref) - y| + |y - ref|``, which is the rule:
    no result of such a y fails. Non-finite values must stand at the same places in ``out`` and R(ref).
    """
    rounded, finite = _rounded(out, ref, what)
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(finite, (out.double() - ref).abs(), zero)
    limit = torch.where(finite, (rounded.double() - ref).abs(), zero) + 2 * bound
    wrong = ~(error <= limit)
    if bool(wrong.any()):
        index = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {out.numel()} elements differ, first at {index}: got "
            f"{out[index].item()!r}, expected {ref[index].item()!r}, error {error[index]:.3e} > {limit[index]:.3e}"
        )


def assert_accurate(out: Tensor, ref: Tensor, baseline: Tensor, what: str = "") -> None:
    """``max|out - ref| <= 2 max|baseline - ref| + floor``, the tolerance for chains of operators and whole models.

    Args:
        out: the result of our kernels.
        ref: the reference in float64.
        baseline: the same computation by torch in the dtype of ``out``.
        what: the start of the message.

    Raises:
        AssertionError: an element is further off, or a shape or a non-finite value differs.

    The floor is the largest error that rounding ``ref`` itself to the dtype of ``out`` makes. Non-finite values must
    stand at the same places in ``out`` and ``ref``. How good torch happens to be at one product of a few elements is
    luck, which differs between CPUs: an operator alone has a bound of its own, and :func:`assert_within`.
    """
    rounded, finite = _rounded(out, ref, what)
    if out.numel() == 0:
        return
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(finite, (out.double() - ref).abs(), zero)
    baseline_error = torch.where(finite, (baseline.double() - ref).abs(), zero).max()
    floor = torch.where(finite, (rounded.double() - ref).abs(), zero).max()
    limit = 2 * baseline_error + floor
    if not bool(error.max() <= limit):
        at = torch.unravel_index(error.argmax(), error.shape)
        index = tuple(int(i) for i in at)
        raise AssertionError(
            f"{what}: error {error.max():.3e} > {limit:.3e} (baseline {baseline_error:.3e}, floor {floor:.3e}) "
            f"at {index}: got {out[index].item()!r}, expected {ref[index].item()!r}"
        )


def _rounded(out: Tensor, ref: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """R(ref), and where it is finite, which is where ``out`` must be."""
    assert out.shape == ref.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    rounded = ref.to(out.dtype)
    finite = torch.isfinite(rounded)
    wrong = torch.isfinite(out) != finite
    if bool(wrong.any()):
        index = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} non-finite values differ from the reference, first at {index}: "
            f"got {out[index].item()!r}, expected {ref[index].item()!r}"
        )
    return rounded, finite


def assert_bitwise(a: Tensor, b: Tensor, what: str = "") -> None:
    """Same dtype, shape and bits; NaN equals NaN whatever its payload.

    Args:
        a, b: the tensors.
        what: the start of the message.

    Raises:
        AssertionError: they differ; the message counts the elements and names the first.
    """
    assert a.dtype == b.dtype and a.shape == b.shape, (
        f"{what}: {a.dtype} {tuple(a.shape)} is not {b.dtype} {tuple(b.shape)}"
    )
    if a.is_floating_point():
        assert torch.equal(a.isnan(), b.isnan()), f"{what}: NaNs differ"
        a, b = torch.where(a.isnan(), 0, a), torch.where(b.isnan(), 0, b)
        a, b = (torch.atleast_1d(t.clone(memory_format=torch.contiguous_format)).view(torch.uint8) for t in (a, b))
    if not torch.equal(a, b):
        where = (a != b).nonzero()
        raise AssertionError(
            f"{what}: {len(where)} of {a.numel()} elements (or bytes) differ, first at {where[0].tolist()}"
        )


# Bounds of the error before R(), as the contracts' roundings add up to first order --------------------------------


def rounding_bound(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of R() itself, for results of about ``y``.

    Args:
        y: any shape.
        dtype: that R() rounds to.

    Returns:
        float64, the shape of ``y``.
    """
    info = torch.finfo(dtype)
    return info.eps / 2 * y.double().abs() + info.smallest_normal * info.eps / 2


def weight_only_bound(
    x: Tensor,
    weight: Int4Weight | Int8Weight,
    bias: Tensor | None = None,
    *,
    gpu: bool = False,
    rounded_to: torch.dtype | None = None,
) -> Tensor:
    """Of :func:`qops.int4_gemm` and :func:`qops.int8_weight_only_gemm`.

    Args:
        x: ``[..., K]`` on the CPU.
        weight: of the operator, anywhere.
        bias: of the operator.
        gpu: whether a GPU computes, which adds products one by one instead of exact sums of blocks.
        rounded_to: what weights are rounded to before they are multiplied, on the one route that does so.

    Returns:
        float64 ``[..., N]``: ``roundings * 2^-24 * (sum_k |x| |w| + |bias|)``, and on the CPU the error of fixed-point
        activations. |w| is ``s * |q - z|``, with float zeros and offsets ``s * |q - 8| + |o'|``, of 8-bit codes
        ``s * |q| + |o|``, as their products are added apart.
    """
    canonical = {key: tensor.cpu() for key, tensor in weight.widened().canonical().items()}
    n, k, group_size = weight.out_features, weight.in_features, weight.group_size
    scales, zeros = canonical["scales"].double(), canonical.get("zeros")
    codes = canonical["qweight"]
    is_int4 = codes.dtype == torch.uint8
    if is_int4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).view(n, k)
    origin = 8 if is_int4 else 0
    codes = codes.double().view(n, -1, group_size)
    if weight.kind == "zero_point":
        assert zeros is not None
        codes = codes - zeros.double()[..., None]
    else:
        codes = codes - origin
    magnitude = (scales[..., None] * codes).abs()
    if weight.kind in ("float_zero", "offset"):
        assert zeros is not None
        wide = zeros.double()
        offset = origin * scales + wide if weight.kind == "offset" else scales * (origin - wide)
        magnitude = magnitude + offset.abs()[..., None]
    magnitude = magnitude.view(n, k)
    x32 = x.dtype == torch.float32
    fixed_point = 2.0**-31 if x32 else 1.001 * 2.0**-16
    x = x.double().abs()
    rounding: Tensor | float = 0.0
    if rounded_to is not None:
        w = weight.dequantize().cpu().double()
        error = rounding_bound(w, rounded_to)
        if rounded_to == torch.float16:  # each row times a power of two that takes `largest` to 2^14 or more
            z = torch.full_like(scales, 8) if zeros is None else zeros.double()
            largest = scales.abs() * torch.maximum(z.abs(), (15 - z).abs())
            if weight.kind == "offset":
                largest = 15 * scales.abs() + z.abs()
            error = 2.0**-11 * w.abs() + 2.0**-39 * largest.amax(-1, keepdim=True)
        rounding = x @ error.T
    if "perm" in canonical:
        x = x[..., canonical["perm"].long()]
    sums = x @ magnitude.T + (0 if bias is None else bias.double().abs())
    if gpu:  # float32 is added in three parts: their magnitudes are a little more
        return rounding + (1.01 * (k + 34) if x32 else k + 32) * UNIT * sums
    # A block's sum is exact; scaling it takes 5 roundings, its slice one or two a block, then 8 slices and the bias,
    # and the reference's weights one more.
    starts = [at for group in range(0, k, group_size) for at in range(group, group + group_size, _BLOCK)]
    fixed = torch.zeros_like(sums)
    for start in starts:
        block = slice(start, min(start + _BLOCK, start // group_size * group_size + group_size))
        fixed += x[..., block].amax(-1, keepdim=True) * magnitude[:, block].sum(-1)
    return rounding + fixed_point * fixed + (len(starts) / 4 + 17) * UNIT * sums


def int8_gemm_bound(
    q: Tensor, scale: Tensor, weight: Int8Weight, bias: Tensor | None = None, *, zero_point: Tensor | None = None
) -> Tensor:
    """Of :func:`qops.int8_gemm`, whose sums are exact.

    Args:
        q, scale, weight, bias, zero_point: of the operator.

    Returns:
        float64 ``[..., N]``.
    """
    y = int8_gemm_ref(q, scale, weight, zero_point=zero_point).abs()
    return 3 * UNIT * (y if bias is None else y + bias.double().abs())


def rms_norm_bound(
    x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0, rounding: str = "hf"
) -> Tensor:
    """Of :func:`qops.rms_norm` from the formula in which nothing is rounded (``rounding="fp32"`` of its reference).

    Args:
        x, weight, eps, weight_offset, rounding: of the operator.

    Returns:
        float64 ``[..., H]``. A square passes through at most H / 256 + 12 additions of the tree; half of the relative
        error of the mean becomes that of ``rstd``.
    """
    y = rms_norm_ref(x, weight, eps, weight_offset=weight_offset, rounding="fp32").abs()
    bound = (x.shape[-1] / 512 + 13) * UNIT * y
    if rounding == "hf":
        scale = (weight.double() + weight_offset).abs()
        bound = bound + rounding_bound(rms_norm_ref(x, torch.ones_like(weight), eps, rounding="fp32"), x.dtype) * scale
    return bound


def silu_mul_bound(
    gate: Tensor,
    up: Tensor,
    dtype: torch.dtype,
    *,
    rounding: str = "hf",
    gate_error: Tensor | float = 0.0,
    up_error: Tensor | float = 0.0,
) -> Tensor:
    """Of :func:`qops.silu_mul` from the formula in which nothing is rounded.

    Args:
        gate, up: ``[..., I]``.
        dtype: of the operator.
        rounding: of the operator.
        gate_error, up_error: how far its arguments may be from ``gate`` and ``up``.

    Returns:
        float64 ``[..., I]``. silu is within 2.4 ulp, 0 where its value is above -3e-37, and its slope at most 1.1.
    """
    silu, up = silu_mul_ref(gate.double(), torch.ones_like(gate), rounding="fp32").abs(), up.double().abs()
    error = 1.1 * gate_error + 5 * UNIT * silu + 3e-37
    if rounding == "hf":
        error = error + rounding_bound(silu, dtype)
    return error * (up + up_error) + silu * up_error + UNIT * silu * up


def rotary_bound(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
    *,
    error: Tensor | float = 0.0,
) -> Tensor:
    """Of :func:`qops.rotary`, for one of q and k.

    Args:
        x, cos, sin, positions, interleaved: of the operator.
        error: how far its argument may be from ``x``.

    Returns:
        float64, the shape of ``x``: two roundings of ``|x1 c| + |x2 s|``.
    """

    def turned(t: Tensor) -> Tensor:
        # One of the two elements of a pair is a difference: with -|sin| the first is a sum, with |sin| the other.
        first, second = (rotary_ref(t, cos.abs(), sign * sin.abs(), positions, interleaved) for sign in (-1, 1))
        return torch.maximum(first, second)

    magnitude = x.double().abs()
    error = torch.zeros_like(magnitude) + error
    return 2 * UNIT * turned(magnitude + error) + turned(error)


def decode_attention_bound(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Of :func:`qops.decode_attention`, all of whose numbers are finite.

    Args:
        q, k, v, scale, mask, window, softcap: of the operator.

    Returns:
        float64 ``[B, T, Hq, D]``. A weight p = exp(s - m) has the relative error e of its score and of exp, so that
        ``|y' - y| <= sum(p e |v - y|) / (sum(p) - sum(p e))``; and the sums of p v and of p are rounded.
    """
    batch, tokens, q_heads, d = q.shape
    group, s = q_heads // k.shape[1], k.shape[2]
    factor: float = d**-0.5 if scale is None else scale
    y = decode_attention_ref(q, k, v, factor, mask=mask, window=window, softcap=softcap)
    allowed = attended(tokens, s, mask, window, batch)
    bound = torch.zeros_like(y)
    for b in range(batch):
        for t in range(tokens):
            rows = allowed[b, t]
            if not rows.any():
                continue
            keys, values = (x[b, :, rows].double().repeat_interleave(group, dim=0) for x in (k, v))
            heads, result = q[b, t].double()[:, None], y[b, t][:, None]
            scores = factor * (heads @ keys.transpose(1, 2))
            # The sum over D, 4 additions of lanes, scale and its own rounding.
            error = (d / 16 + 7) * UNIT * abs(factor) * (heads.abs() @ keys.abs().transpose(1, 2))
            if softcap:
                scores, error = softcap * torch.tanh(scores / softcap), error + 8 * UNIT * softcap
            behind = scores.amax(-1, keepdim=True) - scores
            # Two differences, whose roundings add up to that of `behind`, and exp twice.
            error = torch.expm1(error + UNIT * behind + 4 * UNIT)
            p = torch.softmax(scores, dim=-1)
            wrong = (p * error).sum(-1, keepdim=True)
            off = (p * error) @ (values - result).abs() / (1 - wrong)
            chunks = s / 128 + 2
            rounded = (128 + chunks) * (p @ values.abs()) + (16 + chunks) * result.abs()
            largest = values.abs().amax()
            bound[b, t] = torch.where(wrong < 1, off + UNIT * rounded + s * 4e-38 * largest, 2 * largest)[:, 0]
    return bound


# Contracts in float32 operations of torch, bit for bit ----------------------------------------------------------------


def rms_norm_exact(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0, rounding: str = "hf") -> Tensor:
    """The contract of rms_norm."""
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype)
    variance = _tree_sum_of_squares(x) / x.shape[-1] + eps
    # Through float64, where rounding twice is harmless: torch.sqrt of float32 goes to MKL and misses the last bit.
    rstd = 1.0 / torch.sqrt(variance.double()).float()
    normed = x.float() * rstd[..., None]
    if rounding == "hf":
        return (normed.to(x.dtype).float() * weight.float()).to(x.dtype)
    return (normed * (weight.float() + weight_offset)).to(x.dtype)


def _tree_sum_of_squares(z: Tensor) -> Tensor:
    """The reduction that rms_norm promises, element by element in float32, independent of the kernel's code."""
    z = z.float()
    h = z.shape[-1]
    threads = 32 if h <= 1024 else 128 if h <= 8192 else 512
    lanes = 8 * threads
    padded = torch.nn.functional.pad(z * z, (0, -h % lanes)).view(*z.shape[:-1], -1, lanes)
    partials = padded[..., 0, :]
    for i in range(1, padded.shape[-2]):
        partials = partials + padded[..., i, :]

    def halve(t: Tensor) -> Tensor:
        while t.shape[-1] > 1:
            t = t[..., : t.shape[-1] // 2] + t[..., t.shape[-1] // 2 :]
        return t[..., 0]

    per_thread = halve(partials.view(*z.shape[:-1], threads, 8))
    per_warp = halve(per_thread.view(*z.shape[:-1], threads // 32, 32))
    return halve(per_warp)


def rotary_exact(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
    """The contract of rotary for one of q and k."""
    if positions is None:
        positions = torch.arange(x.shape[-3])
    c, s = (table.float()[positions.long()].unsqueeze(-2) for table in (cos, sin))
    r = 2 * cos.shape[1]
    wide = x.float()
    x1, x2 = (wide[..., 0:r:2], wide[..., 1:r:2]) if interleaved else (wide[..., : r // 2], wide[..., r // 2 : r])
    y1, y2 = x1 * c - x2 * s, x2 * c + x1 * s
    rotated = torch.stack((y1, y2), dim=-1).flatten(-2) if interleaved else torch.cat((y1, y2), dim=-1)
    return torch.cat((rotated.to(x.dtype), x[..., r:]), dim=-1)
