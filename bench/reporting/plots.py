"""Draws figures as SVG for light and dark pages, with matplotlib.

All colours are of middle luminance, with a contrast of at least 3 against white and against GitHub's dark grey, and
stay apart under three kinds of colour blindness; the background is transparent. Lines also differ in marker, and carry
their names. A file holds the hash of what it shows: another version of matplotlib or of its fonts writes other bytes
for the same data, so that a check of bytes would fail where nothing is wrong.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from bench.reporting.figures import MAX_ROW_PANELS, Figure, Line, Panel
from bench.reporting.records import LIMIT, OURS, dense

INK = "#7a8088"
OUR_COLOUR = "#d4500f"
# In the order in which peers get them, fastest first.
PEERS = (("#16a466", "s"), ("#8226f8", "^"), ("#b314a0", "D"), ("#6f79f2", "v"))
MAX_TICKS = 5
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
    axes.set_xscale("log", base=2)
    ticks: list[float] = []
    for x in sorted({x for line in panel.lines for x in line.x}):
        if not ticks or x >= 1.5 * ticks[-1]:
            ticks.append(x)
    ticks = ticks[:: -(-len(ticks) // MAX_TICKS)]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.xaxis.minorticks_off()


def _scale(panels: Sequence[Panel], axes: Any) -> None:
    """From zero, or logarithmic where smaller values could not be told apart; ticks are plain numbers."""
    values = [y for panel in panels for line in panel.lines for y in line.y]
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
    from matplotlib.figure import Figure as Canvas

    styles, count = _styles(figure.labels), len(figure.panels)
    own = figure.name == "bandwidth"  # few rows stay far below many, for everyone: a scale for each panel
    columns = min(MAX_ROW_PANELS if figure.categories else 3, count)
    lines = -(-count // columns)
    # Pages are about nine inches wide; what is wider is shrunk with its text.
    names = LETTER * max(map(len, figure.categories or figure.labels))
    size = (names + 0.5 + columns * min(3.2, (8.2 - names) / columns), 0.7 + lines * _height(figure))
    with matplotlib.rc_context(_SETTINGS):
        canvas = Canvas(figsize=size)
        places = list(canvas.subplots(lines, columns, sharex=True, sharey=not own, squeeze=False).flat)
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
            for panel, axes in zip(figure.panels, places, strict=False):
                _scale([panel] if own else figure.panels, axes)
            canvas.tight_layout(rect=(0, 0, 1 - names / size[0], 1))
            _label_panels(figure, places, columns, styles)
        buffer = io.StringIO()
        metadata = {"Title": figure.title, "Description": figure.digest, "Date": None, "Creator": None}
        canvas.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _compact(buffer.getvalue())


def _compact(svg: str) -> str:
    """A third of the bytes: no indentation, tenths of a point, short names of markers, common styles as classes."""
    text = re.sub(r"\s*\n\s*", "\n", svg)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(?<=\d\.\d)\d+", "", tag[0]), text)
    for i, marker in enumerate(dict.fromkeys(re.findall(r'"#(m[0-9a-f]{10})"', text))):
        text = text.replace(marker, f"m{i}")
    styles = {*re.findall(r'<use [^>]*style="([^"]*)"', text)}
    names = {style: f"c{i}" for i, style in enumerate(sorted(styles))}
    text = re.sub(r'(<use [^>]*)style="([^"]*)"', lambda match: f'{match[1]}class="{names[match[2]]}"', text)
    rules = "".join(f".{name}{{{style}}}\n" for style, name in names.items())
    return text.replace('<style type="text/css">', f'<style type="text/css">{rules}', 1)
