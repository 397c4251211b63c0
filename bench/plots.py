"""Plots of one machine's results, as SVG for light and dark pages. What they show is computed here without
matplotlib, which ``draw`` alone needs.

All colours are of middle luminance, with a contrast of at least 3 against white and against GitHub's dark grey, and
stay apart under three kinds of colour blindness; the background is transparent. Lines also differ in marker, and carry
their names. A file holds the hash of what it shows: another version of matplotlib or of its fonts writes other bytes
for the same data, so that a check of bytes would fail where nothing is wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.records import LIMIT, OURS, Axes, Case, dense
from bench.stats import geometric_mean, median, quantile
from bench.tables import groups, rows_axis, setting, shape

INK = "#7a8088"
OUR_COLOUR = "#d4500f"
# In the order in which peers get them, fastest first.
PEERS = (("#16a466", "s"), ("#8226f8", "^"), ("#b314a0", "D"), ("#6f79f2", "v"))
MAX_PANELS = 6
MAX_ROW_PANELS = 4
MAX_TICKS = 5


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
        def short(value: Any) -> Any:
            if isinstance(value, float):
                return f"{value:.4g}"
            if isinstance(value, dict):
                return {name: short(inner) for name, inner in value.items()}
            return [short(inner) for inner in value] if isinstance(value, list | tuple) else value

        return "sha256:" + hashlib.sha256(json.dumps(short(dataclasses.asdict(self))).encode()).hexdigest()


# --- what is shown ---------------------------------------------------------------------------------------------------


def main_setting(cases: Sequence[Case]) -> tuple[str, list[Case]]:
    """The setting that is plotted: cold caches and all threads, of those the one with most cases, else the first."""

    def rank(members: list[Case]) -> tuple[bool, int, int]:
        axes = members[0].axes
        return axes.get("cache") != "hot", int(axes.get("threads", 1)), len(members)

    found = groups(cases, setting)
    name = max(found, key=lambda name: rank(found[name]))
    return name, found[name]


def plotted(cases: Sequence[Case]) -> list[str]:
    """Ours, the limit, the dense GEMM, and as many peers as there are colours, by the mean of their time over ours."""
    factors: dict[str, list[float]] = {}
    for case in cases:
        for peer in case.peers() if case.timed(OURS) else ():
            factors.setdefault(peer.provider, []).append(median(case.ratios(peer.provider, OURS)))
    ordered = sorted(factors, key=lambda name: (geometric_mean(factors[name]), name))
    peers = [name for name in ordered if not dense(name)][: len(PEERS)]
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
    for layer, alike in list(groups(members, shape).items())[:MAX_PANELS]:
        lines = [_line(label, alike, lambda axes: rows_axis(axes)[1], over_dense(label)) for label in labels]
        panels.append(_panel(layer, lines))
    return Figure("speedup", f"{op}: speed-up over {reference} by M ({name})", "M", "speed-up", tuple(panels))


def share(op: str, cases: Sequence[Case]) -> Figure | None:
    """Of the limit, by shape, a panel for each of some numbers of rows."""
    name, members = main_setting(cases)
    members = [case for case in members if case.timed(LIMIT)]
    if not members:
        return None
    shapes = list(dict.fromkeys(shape(case.axes) for case in members))
    by_rows: dict[int, list[Case]] = {}
    for case in members:
        by_rows.setdefault(rows_axis(case.axes)[1], []).append(case)
    rows = sorted(by_rows)
    if len(rows) > MAX_ROW_PANELS:
        rows = [rows[round(i * (len(rows) - 1) / (MAX_ROW_PANELS - 1))] for i in range(MAX_ROW_PANELS)]
    axis = rows_axis(members[0].axes)[0]

    def line(label: str, cases: Sequence[Case]) -> Line:
        """Percent are x here and shapes y."""
        points = _line(label, cases, lambda axes: shapes.index(shape(axes)), lambda case: case.ratios(LIMIT, label))
        percent = tuple(100 * value for value in points.y)
        return Line(label, percent, points.x, points.x, points.x)

    labels = [label for label in plotted(members) if label != LIMIT]
    panels = [_panel(f"{axis} = {r}", [line(label, by_rows[r]) for label in labels]) for r in rows]
    title = f"{op}: share of the machine's limit by shape ({name})"
    return Figure("share", title, "% of the limit", "", tuple(panels), tuple(shapes))


def bandwidth(op: str, cases: Sequence[Case], width: str) -> Figure:
    """Bytes that have to be moved, over time, by the width of a row."""
    name, members = main_setting(cases)

    def panel(title: str, alike: Sequence[Case]) -> Panel:
        def gigabytes(label: str) -> Callable[[Case], list[float]]:
            return lambda case: [case.rows[OURS].bytes / (1e3 * us) for us in case.rows[label].samples_us]

        alike = [case for case in alike if case.timed(OURS)]
        lines = [_line(p, alike, lambda axes: float(axes[width]), gigabytes(p)) for p in plotted(members)]
        return _panel(title, lines)

    by_rows = groups(members, lambda axes: " = ".join(map(str, rows_axis(axes))))
    panels = [panel(title, alike) for title, alike in list(by_rows.items())[:MAX_PANELS]]
    return Figure("bandwidth", f"{op}: bandwidth by {width} ({name})", width, "GB/s", tuple(panels))


def figures(op: str, cases: Sequence[Case]) -> list[Figure]:
    """Of one operator."""
    axes = cases[0].axes
    width = next((name for name in ("H", "I", "K") if name in axes), "")
    if "N" in axes:
        found = [speedup(op, cases), share(op, cases)]
    elif width and len({case.axes[width] for case in cases}) > 1:
        found = [bandwidth(op, cases, width)]
    else:
        found = [share(op, cases)]
    return [figure for figure in found if figure and any(panel.lines for panel in figure.panels)]


# --- how -------------------------------------------------------------------------------------------------------------

LINEAR_UP_TO = 8
LETTER = 0.075  # of the font, in inches, with something to spare
_TICKS = tuple(step * 10**power for power in range(-3, 6) for step in (1, 2, 5))
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: small files, and the viewer's fonts
    "svg.hashsalt": "qops",  # else the names of clip paths are random
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 8,
    **{name: INK for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": INK,
    "grid.linewidth": 0.3,
    "grid.linestyle": ":",
}


def _styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By label. Ours is the thickest, the limit has no markers."""
    peers = [label for label in labels if label not in (OURS, LIMIT) and not dense(label)]
    found: dict[str, dict[str, Any]] = {
        OURS: {"color": OUR_COLOUR, "marker": "o", "linewidth": 2.2, "zorder": 4},
        LIMIT: {"color": INK, "linestyle": (0, (5, 3)), "linewidth": 1.2},
        **{label: {"color": INK, "marker": "x", "linewidth": 1.2} for label in labels if dense(label)},
    }
    for label, (colour, marker) in zip(peers, PEERS, strict=False):
        found[label] = {"color": colour, "marker": marker, "linewidth": 1.2, "linestyle": (0, (3, 1))}
    return {label: {"markersize": 4, **style} for label, style in found.items()}


def _label_panels(figure: Figure, places: Sequence[Any], columns: int, styles: dict[str, dict[str, Any]]) -> None:
    """Names stand beside the last panel of each row of them; a line that is not there is named where it is last."""
    last = {line.label: i for i, panel in enumerate(figure.panels) for line in panel.lines}
    count = len(figure.panels)
    for i, panel in enumerate(figure.panels):
        end_of_row = i % columns == columns - 1 or i == count - 1
        in_row = range(i - i % columns, min(count, i - i % columns + columns))
        _label_lines(
            places[i],
            [line for line in panel.lines if end_of_row or (last[line.label] == i and i != in_row[-1])],
            styles,
        )


def _label_lines(axes: Any, lines: Sequence[Line], styles: dict[str, dict[str, Any]]) -> None:
    """Names at the ends of lines, moved apart where they would cover one another."""
    to_axes = axes.transData + axes.transAxes.inverted()
    height = 1.25 * 7 / 72 / (axes.get_position().height * axes.figure.get_figheight())
    ends = sorted((float(to_axes.transform((line.x[-1], line.y[-1]))[1]), line.label) for line in lines)
    places = [max(y, 0.0) for y, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + height)
    excess = max(0.0, places[-1] - 1.0) if places else 0.0
    for (_, label), y in zip(ends, places, strict=True):
        axes.text(1.03, y - excess, label, transform=axes.transAxes, color=styles[label]["color"], va="center", size=7)


def _draw_lines(figure: Figure, panel: Panel, axes: Any, styles: dict[str, dict[str, Any]]) -> None:
    for line in panel.lines:
        style = styles[line.label]
        axes.plot(line.x, line.y, **{**style, "marker": ""} if dense(line.label) else style)
        if line.label == OURS:
            axes.fill_between(line.x, line.low, line.high, color=OUR_COLOUR, alpha=0.2, linewidth=0)
    places = sorted({x for line in panel.lines for x in line.x})
    axes.set_xscale("log", base=2)
    ticks = [x for x in places if int(x).bit_count() == 1] or places
    ticks = ticks[:: -(-len(ticks) // MAX_TICKS)]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.xaxis.minorticks_off()


def _scale(axes: Any) -> None:
    """From zero, or logarithmic where smaller values could not be told apart; ticks are plain numbers."""
    values = [y for line in axes.figure.axes for drawn in line.lines for y in drawn.get_ydata()]
    if max(values) < LINEAR_UP_TO * min(values):
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.minorticks_off()


def _draw_categories(figure: Figure, panel: Panel, axes: Any, styles: dict[str, dict[str, Any]]) -> None:
    for line in panel.lines:
        axes.plot(line.x, line.y, **{**styles[line.label], "linestyle": "none"})
    axes.axvline(100, **styles[LIMIT])
    axes.set_yticks(range(len(figure.categories)), figure.categories)
    axes.set_ylim(len(figure.categories) - 0.5, -0.5)


def _legend(canvas: Any, figure: Figure, styles: dict[str, dict[str, Any]]) -> float:
    """Dots have no ends to put names at: names stand above the panels. Returns the height that they take, in inches."""
    from matplotlib.lines import Line2D

    needed = sum(LETTER * len(name) + 0.5 for name in figure.labels)
    rows = math.ceil(needed / canvas.get_figwidth())
    columns = math.ceil(len(figure.labels) / rows)
    handles = [Line2D([], [], **{**styles[name], "linestyle": "none"}, label=name) for name in figure.labels]
    legend = canvas.legend(handles=handles, loc="upper center", ncols=columns, frameon=False, handletextpad=0.2)
    for text, name in zip(legend.get_texts(), figure.labels, strict=True):
        text.set_color(styles[name]["color"])
    return 0.1 + 0.2 * rows


def _height(figure: Figure) -> float:
    """Of a panel, in inches."""
    return 0.5 + 0.22 * len(figure.categories) if figure.categories else 2.3


def draw(figure: Figure) -> str:
    """The SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    styles, count = _styles(figure.labels), len(figure.panels)
    columns = min(MAX_ROW_PANELS if figure.categories else 3, count)
    lines = -(-count // columns)
    # Pages are about nine inches wide; what is wider is shrunk with its text.
    names = LETTER * max(map(len, figure.categories or figure.labels))
    size = (names + 0.5 + columns * min(3.2, (8.2 - names) / columns), 0.7 + lines * _height(figure))
    with matplotlib.rc_context(_SETTINGS):
        canvas, grid = pyplot.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
        places = list(grid.flat)
        for axes, panel in zip(places, figure.panels, strict=False):
            axes.set_title(panel.title, size=8)
            axes.grid(True)
            (_draw_categories if figure.categories else _draw_lines)(figure, panel, axes, styles)
        for axes in places[count:]:
            axes.set_visible(False)
        for i, axes in enumerate(places[:count]):
            if i + columns >= count:
                axes.set_xlabel(figure.x_label)
                axes.tick_params(labelbottom=True)
            if i % columns == 0:
                axes.set_ylabel(figure.y_label)
        if figure.categories:
            places[0].set_xlim(left=0)
            canvas.tight_layout(rect=(0, 0, 1, 1 - _legend(canvas, figure, styles) / size[1]))
        else:
            _scale(places[0])
            canvas.tight_layout(rect=(0, 0, 1 - names / size[0], 1))
            _label_panels(figure, places, columns, styles)
        buffer = io.StringIO()
        metadata = {"Title": figure.title, "Description": figure.digest, "Date": None, "Creator": None}
        canvas.savefig(buffer, format="svg", transparent=True, metadata=metadata)
        pyplot.close(canvas)
    return _compact(buffer.getvalue())


def _compact(svg: str) -> str:
    """A third of the bytes: no indentation, tenths of a point, short names of markers, common styles as classes."""
    text = re.sub(r"\s*\n\s*", "\n", svg)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(?<=\d\.\d)\d+", "", tag[0]), text)
    for i, marker in enumerate(dict.fromkeys(re.findall(r'"#(m[0-9a-f]{10})"', text))):
        text = text.replace(marker, f"m{i}")
    styles = Counter(re.findall(r'<use [^>]*style="([^"]*)"', text))
    names = {style: f"c{i}" for i, style in enumerate(sorted(styles))}
    text = re.sub(r'(<use [^>]*)style="([^"]*)"', lambda match: f'{match[1]}class="{names[match[2]]}"', text)
    rules = "".join(f".{name}{{{style}}}\n" for style, name in names.items())
    return text.replace('<style type="text/css">', f'<style type="text/css">{rules}', 1)
