"""Compares two runs: ``python -m bench.compare before.json after.json``; or the providers of one: ``... run.json``.

Ratios are after / before: above 1 is slower. Two runs share no rounds, so each is resampled by itself; what moved the
machine between them moves the ratio, which the control line shows: the ratio of everything that is not ours. With
``--relative-to limit`` each time is first divided by that provider's in the same round, which takes such drifts out.
Of one run, each provider's time is divided by ours round by round, and rounds are resampled.

A process is slower or faster than the next one of the same code, by up to a fifth where a call takes 4 us. So for small
differences make several runs of each in turn, `before-*.json --after after-*.json`: each then gives a case one sample,
its median.

Exit status: 0; 1 where --fail-above finds a case that is surely slower, or one that fails now; 2 where the runs cannot
be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.reporting import stats
from bench.reporting.records import LIMIT, OURS, Axes, Case, Document, read, together

CONFIDENCE = 0.99
NOISE = 0.02
SEED = 0


@dataclass(frozen=True)
class Ratio:
    """Of one case, or of all cases of an operator: their geometric mean."""

    op: str
    provider: str
    label: str
    ratio: float
    interval: stats.Interval
    resampled: np.ndarray

    def words(self, noise: float) -> str:
        if self.interval == stats.UNKNOWN:
            return "too few rounds"
        return ("faster", "no difference", "slower")[self.interval.verdict(noise) + 1]


def case_label(axes: Axes) -> str:
    return " ".join(f"{name}={value}" for name, value in axes.items())


def _times(case: Case, provider: str, relative_to: str | None) -> Sequence[float]:
    return case.ratios(provider, relative_to) if relative_to else case.rows[provider].samples_us


def _ratio(
    op: str, provider: str, label: str, above: Sequence[float], below: Sequence[float], paired: bool, confidence: float
) -> Ratio:
    """Each from its own generator, so that a case's interval does not depend on the others'."""
    if paired:  # an interrupted run may lack somebody's last sample
        rounds = min(len(above), len(below))
        above, below = above[:rounds], below[:rounds]
        ratio = stats.median([a / b for a, b in zip(above, below, strict=True)])
    else:
        ratio = stats.median(above) / stats.median(below)
    resampled = stats.bootstrap(above, below, paired=paired, rng=np.random.default_rng(SEED))
    enough = min(len(above), len(below)) >= stats.MIN_ROUNDS
    interval = stats.percentile_interval(resampled, confidence) if enough else stats.UNKNOWN
    return Ratio(op, provider, label, ratio, interval, resampled)


def mean_ratio(ratios: Sequence[Ratio], provider: str, label: str, confidence: float) -> Ratio:
    """The geometric mean over cases. Its interval is about the noise of these cases, not about others."""
    shuffle = np.random.default_rng(SEED)  # each case was resampled with the same seed: break that up
    logs = [shuffle.permutation(np.log(r.resampled)) for r in ratios]
    resampled = np.exp(np.mean(logs, axis=0))
    few = any(r.interval == stats.UNKNOWN for r in ratios)
    interval = stats.UNKNOWN if few else stats.percentile_interval(resampled, confidence)
    return Ratio(
        ratios[0].op, ratios[0].provider, label, stats.geometric_mean([r.ratio for r in ratios]), interval, resampled
    )


@dataclass(frozen=True)
class Comparison:
    ratios: list[Ratio]
    control: list[Ratio]  # what did not change with our code
    broken: list[str]  # had a time, and has an error now
    notes: list[str]


def between_runs(
    before: Document, after: Document, provider: str, relative_to: str | None, confidence: float
) -> Comparison:
    found = Comparison([], [], [], [])
    for key, either in {**before.cases, **after.cases}.items():
        old, new = before.cases.get(key), after.cases.get(key)
        op, label = key[0], case_label(either.axes)
        if old is None or new is None:
            found.notes.append(f"{op} {label}: in {before.name if old else after.name} alone")
            continue
        for name in {**old.rows, **new.rows}:
            sides = (old.timed(name), new.timed(name))
            ours = name == provider
            if sides == (True, True):
                if relative_to and not (old.timed(relative_to) and new.timed(relative_to)):
                    if ours:
                        found.notes.append(f"{op} {label}: {relative_to} was not measured in both runs")
                elif name != relative_to:
                    above, below = _times(new, name, relative_to), _times(old, name, relative_to)
                    target = found.ratios if ours else found.control
                    target.append(_ratio(op, name, label, above, below, False, confidence))
            elif ours and sides == (True, False):
                error = new.rows[name].error if name in new.rows else "not measured"
                found.broken.append(f"{op} {label}: {name} fails in {after.name}: {error}")
            elif any(sides):
                where = before.name if sides[0] else after.name
                found.notes.append(f"{op} {label}: {name} has times in {where} alone")
    return found


def within_run(run: Document, provider: str, confidence: float) -> Comparison:
    """Everyone against one provider."""
    found = Comparison([], [], [], [])
    for case in run.cases.values():
        label = case_label(case.axes)
        for name, row in case.rows.items():
            if row.error:
                found.notes.append(f"{case.op} {label}: {name}: {row.error}")
            elif name != provider and case.timed(provider):
                above, below = row.samples_us, case.rows[provider].samples_us
                found.ratios.append(_ratio(case.op, name, label, above, below, True, confidence))
    return found


def differences(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    return [
        f"{name}: {before.get(name)} | {after.get(name)}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]


def lines(found: Comparison, confidence: float, noise: float) -> Iterator[str]:
    rows = [("operator", "provider", "case", "ratio", f"{confidence:.0%} interval", "")]
    warnings = []
    for op, provider in dict.fromkeys((r.op, r.provider) for r in found.ratios):
        ratios = [r for r in found.ratios if (r.op, r.provider) == (op, provider)]
        means = [mean_ratio(ratios, provider, f"all {len(ratios)} cases", confidence)] if len(ratios) > 1 else []
        control = [r for r in found.control if r.op == op]
        if control:
            means.append(mean_ratio(control, "others", f"control: all {len(control)} rows", confidence))
            if means[-1].interval.verdict(noise):
                warnings.append(f"WARNING: {op}: what is not ours changed too; try --relative-to {LIMIT}")
        for r in (*ratios, *means):
            interval = "" if r.interval == stats.UNKNOWN else f"{r.interval.low:.3f} - {r.interval.high:.3f}"
            rows.append(
                (
                    r.op,
                    "" if r in means and control else r.provider,
                    r.label,
                    f"{r.ratio:.3f}",
                    interval,
                    r.words(noise),
                )
            )
    widths = [max(len(r[column]) for r in rows) for column in range(6)]
    for r in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip()
    yield from warnings
    yield from found.broken
    yield from (f"note: {note}" for note in found.notes)


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="JSON", help="one run, or two: before and after")
    parser.add_argument("--after", type=Path, nargs="+", metavar="JSON", help="runs after; the others are those before")
    parser.add_argument("--provider", default=OURS, help="whose times; default: %(default)s")
    parser.add_argument("--relative-to", metavar="PROVIDER", help=f"divide by it round by round, e.g. {LIMIT}")
    parser.add_argument("--fail-above", type=float, metavar="RATIO", help="exit 1 where the whole interval lies above")
    parser.add_argument("--confidence", type=float, default=CONFIDENCE, help="default: %(default)s")
    parser.add_argument(
        "--noise", type=float, default=NOISE, help="an interval this close to 1 is no difference; default: %(default)s"
    )
    parser.add_argument("--across-machines", action="store_true", help="different machines are no error")
    options = parser.parse_args(arguments)
    if len(options.files) > 2 and not options.after:
        parser.error("one file or two, or --after")
    runs = [read(path) for path in options.files]
    if options.after:
        runs = [together(runs), together([read(path) for path in options.after])]
    if len(runs) == 1:
        found = within_run(runs[0], options.provider, options.confidence)
    else:
        before, after = runs
        machine = differences(dict(before.machine), dict(after.machine))
        if machine and not options.across_machines:
            sys.stderr.write("different machines (--across-machines compares them all the same):\n")
            sys.stderr.writelines(f"  {line}\n" for line in machine)
            return 2
        for line in [*machine, *differences(before.protocol, after.protocol)]:
            sys.stdout.write(f"WARNING: the runs differ in {line}\n")
        found = between_runs(before, after, options.provider, options.relative_to, options.confidence)
    if not found.ratios and not found.broken:
        sys.stderr.write(f"nothing to compare: no case in which {options.provider} has times on both sides\n")
        return 2
    sys.stdout.writelines(f"{line}\n" for line in lines(found, options.confidence, options.noise))
    if options.fail_above is None:
        return 0
    slower = [r for r in found.ratios if r.interval != stats.UNKNOWN and r.interval.low > options.fail_above]
    return 1 if slower or found.broken else 0


if __name__ == "__main__":
    sys.exit(main())
