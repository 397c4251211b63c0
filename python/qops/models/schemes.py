"""How linears are quantised: schemes as objects, and which linear gets which."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn

from qops.nn import Int4Int8Linear, Int4Linear, Int8Linear, Int8WeightOnlyLinear, QuantizedLinear
from qops.weights.requirements import require_int

__all__ = ["W4A8", "Int4", "Int8", "Int8WeightOnly", "Scheme"]


class Scheme:
    """What :func:`qops.quantize_model` makes of a linear. Equal settings make equal schemes.

    Attributes:
        linear: the class of linears that it makes.
    """

    linear: ClassVar[type[QuantizedLinear]]

    def _group_size(self, in_features: int) -> int:
        """Columns that share a scale, of a linear with so many; -1 for all."""
        return -1

    def _quantize(self, linear: nn.Linear, *, float32_output: bool = False) -> QuantizedLinear:
        """The linear in its place; see `from_linear` of its class."""
        raise NotImplementedError

    def __str__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        settings = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in changed)
        return f"{self.linear.scheme}({settings})" if settings else self.linear.scheme


@dataclass(frozen=True)
class Int4(Scheme):
    """4-bit weights in groups (W4A16): :class:`qops.nn.Int4Linear`.

    Args:
        group_size: columns of K that share a scale: a multiple of 16 that divides K, or -1 for one scale per row; None
            takes, linear by linear, the largest of 128, 64, 32 and 16 that divides K, and one scale per row where none
            does.
        symmetric: codes around 8, or with a zero point per group.

    Raises:
        TypeError: something else than an integer or a boolean.
    """

    linear: ClassVar[type[Int4Linear]] = Int4Linear
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        name = f"qops.{type(self).__name__}"
        if self.group_size is not None:
            require_int(name, "group_size", self.group_size)
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"{name}: symmetric must be True or False, got {self.symmetric!r}")

    def _group_size(self, in_features: int) -> int:
        if self.group_size is not None:
            return self.group_size
        return next((size for size in (128, 64, 32, 16) if in_features % size == 0), -1)

    def _quantize(self, linear: nn.Linear, *, float32_output: bool = False) -> Int4Linear:
        group_size = self._group_size(linear.in_features)
        return self.linear.from_linear(linear, group_size, self.symmetric, float32_output=float32_output)


@dataclass(frozen=True)
class W4A8(Int4):
    """4-bit weights in groups, activations quantised per token (W4A8): :class:`qops.nn.Int4Int8Linear`.

    Args:
        group_size: as of :class:`qops.Int4`.
        symmetric: as there.

    Raises:
        TypeError: as there.
    """

    linear = Int4Int8Linear


@dataclass(frozen=True)
class Int8(Scheme):
    """8-bit weights with one scale per output channel, activations quantised per token (W8A8):
    :class:`qops.nn.Int8Linear`."""

    linear = Int8Linear

    def _quantize(self, linear: nn.Linear, *, float32_output: bool = False) -> Int8Linear:
        return Int8Linear.from_linear(linear, float32_output=float32_output)


@dataclass(frozen=True)
class Int8WeightOnly(Scheme):
    """8-bit weights and dense activations (W8A16): :class:`qops.nn.Int8WeightOnlyLinear`.

    Args:
        group_size: columns of K that share a scale: a multiple of 16 that divides K, or -1 for one scale per row.

    Raises:
        TypeError: something else than an integer.
    """

    linear = Int8WeightOnlyLinear
    group_size: int = -1

    def __post_init__(self) -> None:
        require_int("qops.Int8WeightOnly", "group_size", self.group_size)

    def _group_size(self, in_features: int) -> int:
        return self.group_size

    def _quantize(self, linear: nn.Linear, *, float32_output: bool = False) -> Int8WeightOnlyLinear:
        return Int8WeightOnlyLinear.from_linear(linear, self.group_size, float32_output=float32_output)


NAMED: dict[str, Scheme] = {scheme.linear.scheme: scheme for scheme in (Int4(), W4A8(), Int8(), Int8WeightOnly())}
"""The schemes that have a name: with their default settings."""

_OR_ELSE = "a scheme such as qops.Int4(group_size=64), or a mapping of patterns to schemes"

Asked = str | Scheme | Mapping[str, str | Scheme | None]
"""How a caller says what becomes of the linears."""


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is the name of a linear, its last part, or a shell pattern of it."""
    return fnmatch.fnmatchcase(name, pattern) or name.rpartition(".")[2] == pattern


@dataclass(frozen=True)
class Choice:
    """Which linear gets which scheme.

    Attributes:
        patterns: in the order in which they are tried, each with its scheme; None leaves dense.
    """

    patterns: tuple[tuple[str, Scheme | None], ...]

    def scheme_of(self, name: str) -> Scheme | None:
        """Of the first pattern that fits; None where the linear stays dense."""
        return next((scheme for pattern, scheme in self.patterns if matches(pattern, name)), None)

    def names(self, name: str) -> bool:
        """Whether a linear gets a scheme by its name, or the last part of it, and no wider pattern."""
        fitting = next((pattern for pattern, _ in self.patterns if matches(pattern, name)), None)
        return fitting in (name, name.rpartition(".")[2]) and self.scheme_of(name) is not None

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """All, each once."""
        return tuple(dict.fromkeys(scheme for _, scheme in self.patterns if scheme is not None))

    def __str__(self) -> str:
        if [pattern for pattern, _ in self.patterns] == ["*"]:
            return str(self.patterns[0][1])
        return ", ".join(f"{pattern}: {'dense' if scheme is None else scheme}" for pattern, scheme in self.patterns)


def choose(caller: str, asked: Asked, linears: Sequence[str]) -> Choice:
    """Which of `linears` gets which scheme, or an error that says what is wrong with what was asked for."""
    if not isinstance(asked, Mapping):
        return Choice((("*", _scheme(caller, "scheme", asked)),))
    patterns = tuple(
        (str(pattern), None if scheme is None else _scheme(caller, f"scheme[{pattern!r}]", scheme))
        for pattern, scheme in asked.items()
    )
    taken: set[str] = set()
    for pattern, _ in patterns:
        fitting = {name for name in linears if matches(pattern, name)}
        if not fitting:
            raise ValueError(f"{caller}: scheme must name linears of the model, {pattern!r} names none")
        if fitting <= taken:
            raise ValueError(
                f"{caller}: scheme must have narrower patterns first, those before {pattern!r} take all that it names"
            )
        taken |= fitting
    return Choice(patterns)


def scheme_of(caller: str, asked: Any) -> Scheme:
    """The one scheme that was asked for, or an error that says what could be."""
    return _scheme(caller, "scheme", asked, "or a scheme such as qops.Int4(group_size=64)")


def _scheme(caller: str, label: str, asked: Any, or_else: str = _OR_ELSE) -> Scheme:
    if isinstance(asked, str) and asked in NAMED:
        return NAMED[asked]
    if isinstance(asked, Scheme) and type(asked) is not Scheme:
        return asked
    raise ValueError(f"{caller}: {label} must be one of {', '.join(map(repr, NAMED))}, {or_else}, got {asked!r}")
