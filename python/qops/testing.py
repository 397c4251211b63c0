"""Inputs, tolerances and buffers for testing kernels; used by the tests and by the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "FLOAT_DTYPES",
    "Guarded",
    "assert_accurate",
    "assert_bitwise",
    "generator",
    "random_activations",
    "strided_rows",
]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of activations."""


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


def assert_accurate(out: Tensor, ref: Tensor, baseline: Tensor, what: str = "") -> None:
    """``max|out - ref| <= 2 max|baseline - ref| + floor``, the project's tolerance for rounded results.

    Args:
        out: the kernel's result.
        ref: the reference in float64.
        baseline: the same computation by torch in the dtype of ``out``.
        what: the start of the message.

    Raises:
        AssertionError: an element is further off, or a shape or a non-finite value differs.

    The floor is the largest error that rounding ``ref`` itself to the dtype of ``out`` makes. Non-finite values must
    stand at the same places in ``out`` and ``ref``.
    """
    assert out.shape == ref.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    if out.numel() == 0:
        return
    rounded = ref.to(out.dtype)
    finite = torch.isfinite(rounded)
    assert torch.equal(torch.isfinite(out), finite), f"{what}: non-finite values differ from the reference"
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(finite, (out.double() - ref).abs(), zero)
    baseline_error = torch.where(finite, (baseline.double() - ref).abs(), zero).max()
    floor = torch.where(finite, (rounded.double() - ref).abs(), zero).max()
    limit = 2 * baseline_error + floor
    if bool(error.max() > limit):
        at = torch.unravel_index(error.argmax(), error.shape)
        index = tuple(int(i) for i in at)
        raise AssertionError(
            f"{what}: error {error.max():.3e} > {limit:.3e} (baseline {baseline_error:.3e}, floor {floor:.3e}) "
            f"at {index}: got {out[index].item()!r}, expected {ref[index].item()!r}"
        )


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
