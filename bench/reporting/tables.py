"""Markdown tables of one machine's results. Text alone: no plots, nothing random, the same bytes everywhere.

A factor is a peer's time divided by ours, round by round: above 1 we are ahead. A case is ahead or behind when the 95 %
interval of the factor's median leaves 1 and the band of 2 % around it; else it is level, or, when that interval is
wide, unclear. What is unclear counts against us where a page tells what we lose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.reporting.records import LIMIT, OURS, Axes, Case, Machine, Row, share_of_limit
from bench.reporting.stats import median, median_interval, quantile

CONFIDENCE = 0.95
NOISE = 0.02
# Axes that say how large the problem is; the others (dtype, group size, cache, threads) make a table of their own.
ROWS = ("M", "T")
SHAPE = ("layer", "N", "K", "H", "I", "Hq", "Hk", "D", "L", "V", "C")
AHEAD, LEVEL, UNCLEAR, BEHIND = "ahead", "level", "unclear", "**behind**"
WIDE = 0.1
LARGE_BYTES = 4 << 20  # what a call moves where the bandwidth of memory can be seen; less is start-up
WORST = 12  # lost cases listed before the tables; the tables have all of them

# The summary's ranges of M, one line each: decoding is M <= 8. What works on tokens matters in prefill.
DECODE, BATCH, PREFILL = (1, 8), (9, 64), (65, 1 << 30)

HOW_TO_READ = """\
Times are medians in microseconds. In brackets: how many times longer than qops a peer takes, taken round by round;
above 1 qops is ahead. The fastest peer is bold. *Level*: the 95 % interval of that factor holds 1, or is within 2 % of
it; *unclear*: it holds 1 and is wide, or there were too few rounds for one. *Of the limit*: what the slower of memory
and arithmetic would take at the speeds measured in the same round, divided by what qops takes.""".splitlines()
HOW_TO_READ_THE_SUMMARY = """\
How many times longer the fastest peer takes than qops, over all rounds of all cases of a line, every case counting the
same (weights and activations out of the caches, all threads); in how many cases qops is ahead beyond noise; and its
share of what the machine's memory and arithmetic allow, measured in the same rounds. All cases and peers, and where
qops loses:""".splitlines()


# --- text ------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits, never an exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def factor(value: float) -> str:
    return f"{value:.2f}x" if value < 9.995 else f"{value:.1f}x"


def spread(samples: Sequence[float], text: Callable[[float], str]) -> str:
    return f"{text(quantile(samples, 0.2))} - {text(quantile(samples, 0.8))}"


def pooled(samples: Iterable[Sequence[float]]) -> list[float]:
    """Twenty quantiles of each, so that a case with more rounds does not count for more."""
    return [quantile(values, (i + 0.5) / 20) for values in samples for i in range(20)]


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Iterator[str]:
    """The first ``left`` columns hold words, the others numbers."""
    yield f"| {' | '.join(header)} |"
    yield f"|{'|'.join('---' if column < left else '---:' for column in range(len(header)))}|"
    for row in rows:
        yield f"| {' | '.join(map(cell, row))} |"


# --- cases -----------------------------------------------------------------------------------------------------------


def rows_axis(axes: Axes) -> tuple[str, int]:
    name = next((name for name in ROWS if name in axes), "N")  # a dequantised weight has N rows
    return name, int(axes[name])


def shape(axes: Axes) -> str:
    """What is left of the size without the number of rows: a layer, or the width of a row."""
    if "N" in axes and "K" in axes:
        size = f"{axes['N']} x {axes['K']}"
        return f"{axes['layer']} ({size})" if "layer" in axes else size
    return ", ".join(f"{name} {axes[name]}" for name in SHAPE if name in axes)


def setting(axes: Axes) -> str:
    """The axes that are no size: ``bfloat16, G 128, symmetric, cold, 2 threads``."""
    words = []
    for name, value in axes.items():
        if name == "threads":
            words.append(f"{value} thread{'s' * (value != 1)}")
        elif name not in (*ROWS, *SHAPE):
            words.append(str(value) if name in ("dtype", "kind", "cache") else f"{name} {value}")
    return ", ".join(words)


def groups(cases: Iterable[Case], key: Callable[[Axes], str]) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(key(case.axes), []).append(case)
    return found


def by_operator(cases: Iterable[Case]) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.op, []).append(case)
    return found


def coarser(case: Case, peer: Row) -> bool:
    """Whether the peer buys its time with accuracy: it rounds activations to 8 bits, which we do not in this case."""
    own = case.rows[OURS].accuracy if OURS in case.rows else ""
    return "int8 activations" in peer.accuracy and "int8 activations" not in own


@dataclass(frozen=True)
class Standing:
    """How we stand against one peer in one case."""

    case: Case
    peer: Row

    @property
    def factors(self) -> list[float]:
        return self.case.ratios(self.peer.provider, OURS)

    @property
    def verdict(self) -> str:
        interval = median_interval(self.factors, CONFIDENCE)
        if sign := interval.verdict(NOISE):
            return AHEAD if sign > 0 else BEHIND
        return LEVEL if interval.low >= 1 / (1 + WIDE) and interval.high <= 1 + WIDE else UNCLEAR

    @property
    def lost(self) -> bool:
        return self.verdict == BEHIND or (self.verdict == UNCLEAR and median(self.factors) < 1)


def standing(case: Case, *, same_accuracy: bool = False) -> Standing | None:
    """Against the fastest peer, round by round; None where we or all peers have no time."""
    if not case.timed(OURS):
        return None
    peers = [Standing(case, p) for p in case.peers() if not (same_accuracy and coarser(case, p))]
    return min(peers, key=lambda s: median(s.factors), default=None)


def standings(cases: Iterable[Case], *, same_accuracy: bool = False) -> list[Standing]:
    found = (standing(case, same_accuracy=same_accuracy) for case in cases)
    return [s for s in found if s]


def tally(found: Sequence[Standing]) -> str:
    counts = Counter(s.verdict for s in found)
    parts = [f"{verdict} in {counts[verdict]}" for verdict in (AHEAD, LEVEL, UNCLEAR, BEHIND) if counts[verdict]]
    return f"{', '.join(parts)} of {len(found)} cases"


# --- the page of a machine -------------------------------------------------------------------------------------------


def lost_cases(found: Sequence[Standing]) -> Iterator[str]:
    lost = sorted((s for s in found if s.lost), key=lambda s: median(s.factors))
    if not lost:
        return
    more = f", the worst {WORST} of {len(lost)}" if len(lost) > WORST else ""
    unclear = ", or may" * any(s.verdict == UNCLEAR for s in lost)
    yield f"Where we lose{unclear}{more}:"
    yield ""
    header = ("case", "", "", "faster peer", "its accuracy", "ours", "factor", "p20 - p80")
    yield from table(
        header,
        (
            (
                f"{shape(s.case.axes)}, {' '.join(map(str, rows_axis(s.case.axes)))}",
                setting(s.case.axes),
                s.verdict,
                s.peer.provider,
                s.peer.accuracy,
                s.case.rows[OURS].accuracy,
                factor(median(s.factors)),
                spread(s.factors, factor),
            )
            for s in lost[:WORST]
        ),
        left=6,
    )
    yield ""


def crossover(cases: Sequence[Case]) -> tuple[str, str] | None:
    """Of cases that differ in M alone: (from which M on dense is faster, where below that); None without dense."""
    against = [
        (rows_axis(case.axes)[1], Standing(case, peer)) for case in cases if (peer := case.dense()) and case.timed(OURS)
    ]
    faster = {rows: s.lost for rows, s in sorted(against, key=lambda pair: pair[0])}
    if not faster:
        return None
    start: int | None = None
    for rows in reversed(faster):
        if not faster[rows]:
            break
        start = rows
    largest = max(faster)
    if start is None:
        above = f"not up to {largest}"
    else:
        below = [rows for rows in faster if rows < start]
        above = f"{start}" if below else f"{start} (the smallest measured)"
    islands = [str(rows) for rows in faster if faster[rows] and (start is None or rows < start)]
    return above, ", ".join(islands) or "nowhere"


def crossovers(cases: Sequence[Case]) -> Iterator[str]:
    rows = []
    for name, alike in groups(cases, setting).items():
        for layer, members in groups(alike, shape).items():
            found = crossover(members)
            if found:
                peers = {peer.provider for case in members if (peer := case.dense())}
                rows.append((layer, name, ", ".join(sorted(peers)), *found))
    if rows:
        yield "From which M on the dense GEMM of the vendor library is faster, and where it is below that:"
        yield ""
        yield from table(("layer", "", "dense", "from M", "also at"), rows, left=5)
        yield ""


def case_table(cases: Sequence[Case], hot: Mapping[object, Case]) -> Iterator[str]:
    """Cases of one setting: a line each, a column a peer, with time and factor; ``hot``: what may stand beside them."""
    name = rows_axis(cases[0].axes)[0]
    order = {layer: i for i, layer in enumerate(dict.fromkeys(shape(case.axes) for case in cases))}
    lines = sorted(cases, key=lambda case: (order[shape(case.axes)], rows_axis(case.axes)[1]))
    peers = list(dict.fromkeys(p for case in cases for p in case.rows if p not in (OURS, LIMIT) and case.timed(p)))
    accuracy = {p: next(case.rows[p].accuracy for case in cases if case.timed(p)) for p in peers}
    ours = next((case.rows[OURS].accuracy for case in cases if OURS in case.rows), "")

    def line(case: Case) -> Iterator[str]:
        yield shape(case.axes)
        yield str(rows_axis(case.axes)[1])
        found = standing(case)
        yield found.verdict if found else ""
        yield number(case.rows[OURS].median_us) if case.timed(OURS) else "fails" if OURS in case.rows else ""
        yield spread(case.rows[OURS].samples_us, number) if case.timed(OURS) else ""
        yield percent(share_of_limit(case, OURS))
        for peer in peers:
            if not case.timed(peer):
                yield ""
                continue
            text = number(case.rows[peer].median_us)
            ratio = f" ({factor(median(case.ratios(peer, OURS)))})" if case.timed(OURS) else ""
            yield f"**{text}{ratio}**" if found and found.peer.provider == peer else f"{text}{ratio}"
        if beside:
            yield hot_cell(hot.get(without_cache(case.axes)))

    beside = ["hot: qops us (fastest peer)"] if any(without_cache(case.axes) in hot for case in cases) else []
    header = ("shape", name, "against the fastest peer", "qops us", "p20 - p80", "of the limit", *peers, *beside)
    classes = ["*accuracy*", "", "", f"*{ours}*", "", "", *(f"*{accuracy[peer]}*" for peer in peers)]
    classes += [""] * len(beside)
    yield from table(header, [classes, *(list(line(case)) for case in lines)])
    yield ""


def without_cache(axes: Axes) -> object:
    return tuple(sorted((name, value) for name, value in axes.items() if name != "cache"))


def hot_cell(case: Case | None) -> str:
    if case is None or not case.timed(OURS):
        return ""
    found = standing(case)
    peer = f" ({found.peer.provider} {factor(median(found.factors))})" if found else ""
    return f"{number(case.rows[OURS].median_us)}{peer}"


def limits(cases: Sequence[Case]) -> Iterator[str]:
    """What the machine itself did while the cases ran."""
    bandwidth: dict[str, list[float]] = {}
    peaks: dict[str, list[float]] = {}
    for case in cases:
        if case.timed(LIMIT):
            row = case.rows[LIMIT]
            threads = setting({name: value for name, value in case.axes.items() if name == "threads"})
            if row.bytes >= LARGE_BYTES:
                where = f"bandwidth, {case.axes.get('cache', '')}, {threads}".strip(", ")
                bandwidth.setdefault(where, []).extend(row.bandwidth_gbs)
            peaks.setdefault(f"{row.peak_kind} peak, {threads}".strip(", "), []).extend(row.peak_gflops)
    rows = [(name, "GB/s", number(median(v)), spread(v, number)) for name, v in bandwidth.items() if v]
    rows += [(name, "Gop/s", number(median(v)), spread(v, number)) for name, v in peaks.items() if v]
    if rows:
        yield "Limits, measured in every round, beside what they limit:"
        yield ""
        yield from table(("limit", "unit", "median", "p20 - p80"), rows, left=2)
        yield ""


def failures(cases: Sequence[Case]) -> Iterator[str]:
    """Who could not run what, and why."""
    reasons: dict[tuple[str, str, str], list[Axes]] = {}
    for case in cases:
        for row in case.rows.values():
            if row.error:
                reasons.setdefault((case.op, row.provider, row.error), []).append(case.axes)
    if not reasons:
        return
    total = Counter(case.op for case in cases)
    yield "## What did not run"
    yield ""

    def where(op: str, axes: list[Axes]) -> str:
        if len(axes) == total[op]:
            return f"all {len(axes)}"
        rows = sorted({rows_axis(a)[1] for a in axes})
        return f"{len(axes)} of {total[op]}: {rows_axis(axes[0])[0]} {', '.join(map(str, rows))}"

    rows = ((op, provider, where(op, axes), reason) for (op, provider, reason), axes in reasons.items())
    yield from table(("operator", "provider", "cases", "reason"), rows, left=4)
    yield ""


def runs(machine: Machine) -> Iterator[str]:
    for document in machine.documents:
        meta = document.meta
        versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
        state = f"commit {meta['git_sha'][:12]}{', with changes' * bool(meta['dirty'])}"
        yield f"- `bench/results/{document.name}`: {meta['utc'][:10]}, {state}"
        yield f"  - versions: {versions}"
        protocol = "; ".join(f"{name} {value}" for name, value in document.protocol.items())
        yield f"  - protocol: {protocol}"
    device = {k: v for k, v in machine.device.items() if k != "name"}
    yield f"- device: {', '.join(f'{name} {value}' for name, value in device.items())}"
    yield ""


def operator_section(op: str, cases: Sequence[Case], plots: Mapping[str, str]) -> Iterator[str]:
    yield f"## {op}"
    yield ""
    everyone, alike = standings(cases), standings(cases, same_accuracy=True)
    if everyone:
        yield f"Against the fastest peer: {tally(everyone)}."
        if any(a.peer.provider != b.peer.provider for a, b in zip(everyone, alike, strict=False)) or (
            len(everyone) != len(alike)
        ):
            yield f"Against the fastest that does not round the activations to 8 bits: {tally(alike)}."
        yield ""
        yield from lost_cases(everyone)
    for title, path in plots.items():
        yield f"![{title}]({path})"
        yield ""
    yield from crossovers(cases)
    hot = {without_cache(case.axes): case for case in cases if case.axes.get("cache") == "hot"}
    for name, members in groups(cases, setting).items():
        # Weights that stay in the cache are for those who wonder; they stand beside the others, and whole below.
        folded = "N" in members[0].axes and members[0].axes.get("cache") == "hot"
        yield f"<details><summary>{name}</summary>" if folded else f"**{name}**"
        yield ""
        yield from case_table(members, {} if members[0].axes.get("cache") == "hot" else hot)
        if folded:
            yield "</details>"
            yield ""


def page(machine: Machine, plots: Mapping[str, Mapping[str, str]]) -> str:
    """``plots``: operator -> title -> path from the page."""
    cases = machine.cases
    lines = [
        f"# Results: {machine.title}",
        "",
        "Generated by `python -m bench.report bench/results/*.json`; do not edit.",
        "",
        *runs(machine),
        *HOW_TO_READ,
        "",
        *limits(cases),
    ]
    for op, members in by_operator(cases).items():
        lines += operator_section(op, members, plots.get(op, {}))
    lines += failures(cases)
    return "\n".join(lines).rstrip() + "\n"


def index(pages: Mapping[str, str]) -> str:
    """``pages``: title -> path from the index."""
    links = [f"- [{title}]({path})" for title, path in pages.items()]
    return "\n".join(("# Results", "", "Generated by `python -m bench.report`; one page a machine:", "", *links)) + "\n"


# --- the summary -----------------------------------------------------------------------------------------------------


def _names(names: Iterable[str]) -> str:
    """In the order of how often they come."""
    counts = Counter(names)
    return ", ".join(sorted(counts, key=lambda name: (-counts[name], name)))


def _factors(found: Sequence[Standing]) -> str:
    factors = pooled(s.factors for s in found)
    return f"{factor(median(factors))} ({spread(factors, factor)})"


def ranges(axes: Axes) -> tuple[tuple[int, int], ...]:
    return (DECODE, BATCH, PREFILL) if "M" in axes else (PREFILL,)


def summary_rows(cases: Sequence[Case]) -> Iterator[tuple[str, ...]]:
    """Cold caches, all threads; GEMMs first. Nothing is picked: all cases of a line count, and count the same."""
    threads = max((int(case.axes.get("threads", 1)) for case in cases), default=1)
    cold = [c for c in cases if c.axes.get("cache") != "hot" and int(c.axes.get("threads", 1)) == threads]
    operators = by_operator(cold).items()
    for op, alike in sorted(operators, key=lambda found: (not {"M", "N"} <= {*found[1][0].axes}, found[0])):
        for low, high in ranges(alike[0].axes):
            members = [c for c in alike if low <= rows_axis(c.axes)[1] <= high]
            best = standings(members, same_accuracy=True)
            if not best:
                continue
            axis = rows_axis(members[0].axes)[0]
            present = sorted({rows_axis(s.case.axes)[1] for s in best})
            shares = [share for s in best if (share := share_of_limit(s.case, OURS)) is not None]
            coarse = [s for s in standings(members) if coarser(s.case, s.peer)]
            yield (
                f"`{op}`",
                f"{axis} {present[0]}" + (f" - {present[-1]}" if len(present) > 1 else ""),
                _names(f"{s.peer.provider} ({s.peer.accuracy})" for s in best),
                _factors(best),
                f"{sum(s.verdict == AHEAD for s in best)} / {len(best)}",
                percent(median(shares)) if shares else "",
                f"{_names(s.peer.provider for s in coarse)}: {_factors(coarse)}" if coarse else "",
            )


def summary(machine: Machine) -> Iterator[str]:
    rows = list(summary_rows(machine.cases))
    if not rows:  # peers alone were measured
        return
    coarse = any(row[-1] for row in rows)
    header = ["operator", "rows", "fastest peer", "factor (p20 - p80)", "ahead in", "of the limit"]
    header += ["fastest with int8 activations"] if coarse else []
    yield f"**{machine.title}**:"
    yield ""
    yield from table(header, (row if coarse else row[:-1] for row in rows), left=3)
    yield ""


def summary_section(pages: Mapping[str, Machine]) -> str:
    """``pages``: path of a machine's page from the root -> machine."""
    if not pages:
        return "No results are committed yet.\n"
    lines = [
        *HOW_TO_READ_THE_SUMMARY,
        f"{', '.join(f'`{path}`' for path in pages)}.",
        "",
    ]
    for machine in pages.values():
        lines += summary(machine)
    return "\n".join(lines).rstrip() + "\n"
