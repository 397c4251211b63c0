"""What the plots of one machine's results show, as numbers: needs no matplotlib. ``bench.reporting.plots`` draws it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bench.reporting.records import LIMIT, OURS, Axes, Case, Machine, dense
from bench.reporting.stats import geometric_mean, median, quantile
from bench.reporting.tables import by_operator, groups, rows_axis, setting, shape

MAX_PEERS = 4
MAX_PANELS = 6
MAX_ROW_PANELS = 4
MAX_SHAPES = 20
T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """Points by x; ``low`` and ``high`` are p20 and p80 of the rounds."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Figure:
    """Panels with common axes.

    Attributes:
        name: kind of the figure, for its file.
        title: says what is shown; also its alternative text.
        categories: names of y = 0, 1, ..., from above; empty where y is a number.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    panels: tuple[Panel, ...]
    categories: tuple[str, ...] = ()

    @property
    def labels(self) -> list[str]:
        """Of all lines, ours first, then the limit, then the peers."""
        names = dict.fromkeys(line.label for panel in self.panels for line in panel.lines)
        return sorted(names, key=lambda name: (name != OURS, name != LIMIT))

    @property
    def digest(self) -> str:
        """Of the numbers in four digits."""

        def short(value: Any) -> Any:
            if isinstance(value, float):
                return f"{value:.4g}"
            if isinstance(value, dict):
                return {name: short(inner) for name, inner in value.items()}
            return [short(inner) for inner in value] if isinstance(value, list | tuple) else value

        return "sha256:" + hashlib.sha256(json.dumps(short(dataclasses.asdict(self))).encode()).hexdigest()


def main_setting(cases: Sequence[Case]) -> tuple[str, list[Case]]:
    """The setting that is plotted: cold caches and all threads, of those the one with most cases, else the first."""

    def rank(members: list[Case]) -> tuple[bool, int, int]:
        axes = members[0].axes
        return axes.get("cache") != "hot", int(axes.get("threads", 1)), len(members)

    found = groups(cases, setting)
    name = max(found, key=lambda name: rank(found[name]))
    return name, found[name]


def some(values: list[T], limit: int) -> list[T]:
    """All, or as many, evenly spread from the first to the last."""
    if len(values) <= limit:
        return values
    return [values[round(i * (len(values) - 1) / (limit - 1))] for i in range(limit)]


def by_rows(cases: Sequence[Case], limit: int) -> list[tuple[str, list[Case]]]:
    """(``M = 16``, the cases that have as many rows), in their order, of some numbers of rows."""
    found: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        found.setdefault(rows_axis(case.axes), []).append(case)
    return [(f"{name} = {rows}", found[name, rows]) for name, rows in some(sorted(found), limit)]


def plotted(cases: Sequence[Case]) -> list[str]:
    """Ours, the limit, the dense GEMM, and the fastest peers: relative to us, or, where peers alone were measured, to
    the limit."""
    factors: dict[str, list[float]] = {}
    below = OURS if any(case.timed(OURS) for case in cases) else LIMIT
    for case in cases:
        for peer in case.peers() if case.timed(below) else ():
            factors.setdefault(peer.provider, []).append(median(case.ratios(peer.provider, below)))
    ordered = sorted(factors, key=lambda name: (geometric_mean(factors[name]), name))
    peers = [name for name in ordered if not dense(name)][:MAX_PEERS]
    return [OURS, LIMIT, *filter(dense, ordered), *peers]


def _line(
    label: str, cases: Sequence[Case], x: Callable[[Axes], float], samples: Callable[[Case], Sequence[float]]
) -> Line:
    points = sorted((x(case.axes), samples(case)) for case in cases if case.timed(label))
    columns = [tuple(quantile(values, q) for _, values in points) for q in (0.5, 0.2, 0.8)]
    return Line(label, tuple(place for place, _ in points), *columns)


def _panel(title: str, lines: Sequence[Line]) -> Panel:
    return Panel(title, tuple(line for line in lines if line.x))


def speedup(op: str, cases: Sequence[Case]) -> Figure | None:
    """Of every provider over the dense GEMM of the vendor library, by M, a panel for each layer."""
    name, members = main_setting(cases)
    reference = next((peer.provider for case in members if (peer := case.dense())), None)
    if reference is None:
        return None

    def over_dense(label: str) -> Callable[[Case], list[float]]:
        return lambda case: case.ratios(reference, label)

    members = [case for case in members if case.timed(reference)]
    labels, panels = plotted(members), []
    layers = groups(members, shape)
    name += f"; the first {MAX_PANELS} of {len(layers)} layers" * (len(layers) > MAX_PANELS)
    for layer, alike in list(layers.items())[:MAX_PANELS]:
        lines = [_line(label, alike, lambda axes: rows_axis(axes)[1], over_dense(label)) for label in labels]
        panels.append(_panel(layer, lines))
    return Figure("speedup", f"{op}: speed-up over {reference} by M ({name})", "M", "speed-up", tuple(panels))


def share(op: str, cases: Sequence[Case]) -> Figure | None:
    """Of the limit, by shape, a panel for each of some numbers of rows."""
    name, members = main_setting(cases)
    members = [case for case in members if case.timed(LIMIT)]
    if not members:
        return None
    everything = list(dict.fromkeys(shape(case.axes) for case in members))
    shapes = some(everything, MAX_SHAPES)
    name += f"; {MAX_SHAPES} of {len(everything)} shapes" * (len(everything) > MAX_SHAPES)
    members = [case for case in members if shape(case.axes) in shapes]

    def line(label: str, cases: Sequence[Case]) -> Line:
        """Percent are x here and shapes y."""
        points = _line(label, cases, lambda axes: shapes.index(shape(axes)), lambda case: case.ratios(LIMIT, label))
        percent = tuple(100 * value for value in points.y)
        return Line(label, percent, points.x, points.x, points.x)

    labels = [label for label in plotted(members) if label != LIMIT]
    panels = [
        _panel(title, [line(label, alike) for label in labels]) for title, alike in by_rows(members, MAX_ROW_PANELS)
    ]
    title = f"{op}: share of the machine's limit by shape ({name})"
    return Figure("share", title, "% of the limit", "", tuple(panels), tuple(shapes))


def bandwidth(op: str, cases: Sequence[Case], width: str) -> Figure:
    """Bytes that have to be moved, over time, by the width of a row."""
    name, members = main_setting(cases)

    def panel(title: str, alike: Sequence[Case]) -> Panel:
        def gigabytes(label: str) -> Callable[[Case], list[float]]:
            return lambda case: [case.bytes / (1e3 * us) for us in case.rows[label].samples_us]

        lines = [_line(p, alike, lambda axes: float(axes[width]), gigabytes(p)) for p in plotted(members)]
        return _panel(title, lines)

    panels = [panel(title, alike) for title, alike in by_rows(members, MAX_PANELS)]
    return Figure("bandwidth", f"{op}: bandwidth by {width} ({name})", width, "GB/s", tuple(panels))


def figures_of_operator(op: str, cases: Sequence[Case]) -> list[Figure]:
    axes = cases[0].axes
    width = next((name for name in ("H", "I", "K") if name in axes), "")
    if "N" in axes:
        found = [speedup(op, cases), share(op, cases)]
    elif width and len({case.axes[width] for case in cases}) > 1:
        found = [bandwidth(op, cases, width)]
    else:
        found = [share(op, cases)]
    return [figure for figure in found if figure and any(panel.lines for panel in figure.panels)]


def figures_of(machine: Machine) -> dict[str, list[Figure]]:
    """By operator."""
    return {op: figures_of_operator(op, cases) for op, cases in by_operator(machine.cases).items()}
