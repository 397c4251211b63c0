"""Comparisons of runs, and the statistics below them and below the tables."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import compare
from bench.reporting import stats
from bench.reporting.records import LIMIT, parse
from tests.support.bench import invented_results as invented

AXES = {"M": 1, "N": 64, "K": 64, "dtype": "bfloat16", "cache": "cold"}


def run_of(seed: int, us: float = 100.0, noise: float = 0.02, drift: float = 1.0, cases: int = 1, **device: Any) -> Any:
    """Ours, a peer and the limit, all slower by ``drift``."""
    rng, rows = random.Random(seed), []
    for m in range(1, cases + 1):
        for provider, time in (("qops", us), ("peer", 300.0), (LIMIT, 80.0)):
            times = invented.samples(rng, time * drift, noise)
            rows.append(invented.row("int4_gemm", provider, {**AXES, "M": m}, times))
    return invented.document(rows, **device)


def compared(before: Any, after: Any, relative_to: str | None = None) -> compare.Comparison:
    return compare.between_runs(parse("a", before), parse("b", after), "qops", relative_to, compare.CONFIDENCE)


def words(found: compare.Comparison) -> list[str]:
    return [ratio.words(compare.NOISE) for ratio in found.ratios]


# --- statistics ------------------------------------------------------------------------------------------------------


def test_interval_verdicts():
    assert stats.Interval(0.9, 1.1).verdict(0) == 0
    assert stats.Interval(1.01, 1.015).verdict(0) == 1 and stats.Interval(1.01, 1.015).verdict(0.02) == 0
    assert stats.Interval(0.8, 0.99).verdict(0.02) == -1 and stats.Interval(1.01, 1.2).verdict(0.02) == 1


def test_median_interval_holds_the_median_as_often_as_it_says():
    rng = random.Random(0)
    draws = [stats.median_interval([rng.lognormvariate(0, 1) for _ in range(30)], 0.95) for _ in range(2000)]
    held = sum(i.low <= 1 <= i.high for i in draws) / len(draws)
    assert 0.94 <= held < 0.99  # conservative: ranks are whole numbers
    assert stats.median_interval([1.0] * 5, 0.95) == stats.UNKNOWN
    assert stats.median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0], 0.95) == stats.Interval(1.0, 6.0)


def test_one_distribution_is_no_difference():
    """At most as often as the confidence allows, and a little for what a bootstrap of 30 samples underestimates."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        a, b = rng.normal(100, 5, (2, 30))
        interval = stats.percentile_interval(stats.bootstrap(a, b, paired=False, rng=rng, resamples=500), 0.99)
        wrong += interval.verdict(0) != 0
    assert wrong <= 8


def test_pairs_are_resampled_together():
    """A machine that is up to three times slower in some rounds: pairs see 5 %, two separate runs cannot."""
    rng = np.random.default_rng(0)
    drift = rng.uniform(1, 3, 30)
    a, b = 105 * drift * rng.normal(1, 0.01, 30), 100 * drift * rng.normal(1, 0.01, 30)
    paired, separate = (
        stats.percentile_interval(stats.bootstrap(a, b, paired=pairs, rng=np.random.default_rng(1)), 0.99)
        for pairs in (True, False)
    )
    assert paired.verdict(0.02) == 1 and 1.03 < paired.low < 1.05 < paired.high < 1.07
    assert separate.verdict(0) == 0 and separate.high / separate.low > 1.3


# --- two runs --------------------------------------------------------------------------------------------------------


def test_five_percent_are_found_and_nothing_is_no_difference():
    assert words(compared(run_of(1), run_of(2))) == ["no difference"]
    assert words(compared(run_of(1), run_of(2, 105.0))) == ["slower"]
    assert words(compared(run_of(1), run_of(2, 95.0))) == ["faster"]
    found = compared(run_of(1, noise=0.0), run_of(2, 101.0, noise=0.0))
    assert found.ratios[0].ratio == pytest.approx(1.01) and words(found) == ["no difference"]  # within the noise band
    assert found.ratios[0].words(0.001) == "slower"


def test_a_drift_of_the_machine_is_shown_and_taken_out():
    before, after = run_of(1), run_of(2, drift=1.2)
    text = "\n".join(compare.lines(compared(before, after), compare.CONFIDENCE, compare.NOISE))
    assert "control: all 2 rows" in text and "WARNING: int4_gemm: what is not ours changed too" in text
    assert words(compared(before, after, LIMIT)) == ["no difference"]
    assert words(compared(before, run_of(2, 110.0, drift=1.2), LIMIT)) == ["slower"]
    assert "WARNING" not in "\n".join(compare.lines(compared(before, run_of(3)), 0.99, compare.NOISE))


def test_mean_over_cases_is_narrower_than_a_case():
    found = compared(run_of(1, noise=0.05, cases=8), run_of(2, 102.5, noise=0.05, cases=8)).ratios
    mean = compare.mean_ratio(found, "qops", "all", 0.99)
    assert mean.interval.low > 1
    width = mean.interval.high - mean.interval.low
    assert all(width < 0.6 * (r.interval.high - r.interval.low) for r in found)


def test_few_rounds_decide_nothing():
    before, after = run_of(1), run_of(2, 200.0)
    for document in (before, after):
        for row in document["results"]:
            del row["samples_us"][4:]
    assert words(compared(before, after)) == ["too few rounds"]


def test_rows_of_one_run_alone_and_errors():
    before, after = run_of(1, cases=2), run_of(2, cases=3)
    ours = [row for row in after["results"] if row["provider"] == "qops"]
    ours[0].update(samples_us=[], error="it crashed")
    after["results"] = [r for r in after["results"] if not (r["provider"] == "peer" and r["axes"]["M"] == 2)]
    found = compared(before, after)
    assert [r.label for r in found.ratios] == [compare.case_label({**AXES, "M": 2})]
    assert len(found.broken) == 1 and "M=1" in found.broken[0] and "it crashed" in found.broken[0]
    notes = "\n".join(found.notes)
    assert "M=2" in notes and "peer has times in a alone" in notes
    assert "M=3" in notes and "in b alone" in notes


# --- the command -----------------------------------------------------------------------------------------------------


def command(folder: Path, *documents: Any, options: tuple[str, ...] = ()) -> int:
    paths = []
    for i, document in enumerate(documents):
        paths.append(folder / f"{i}.json")
        paths[-1].write_text(json.dumps(document))
    return compare.main([*map(str, paths), *options])


def test_exit_status(tmp_path, capsys):
    before, same, slower = run_of(1), run_of(2), run_of(2, 110.0)
    assert command(tmp_path, before, slower) == 0
    assert command(tmp_path, before, same, options=("--fail-above", "1.05")) == 0
    assert command(tmp_path, before, slower, options=("--fail-above", "1.05")) == 1
    assert command(tmp_path, before, slower, options=("--fail-above", "1.2")) == 0
    broken = run_of(2)
    broken["results"][0].update(samples_us=[], error="it crashed")
    assert command(tmp_path, before, broken, options=("--fail-above", "1.05")) == 1
    assert "it crashed" in capsys.readouterr().out
    assert command(tmp_path, before, same, options=("--provider", "nobody")) == 2


def test_other_machines_are_refused(tmp_path, capsys):
    before, other = run_of(1), run_of(2, name="Another CPU")
    assert command(tmp_path, before, other) == 2
    assert "name: Invented CPU | Another CPU" in capsys.readouterr().err
    assert command(tmp_path, before, other, options=("--across-machines",)) == 0
    assert "WARNING: the runs differ in name" in capsys.readouterr().out
    assert command(tmp_path, before, run_of(2, threads=1)) == 2


def test_another_protocol_is_a_warning(tmp_path, capsys):
    other = run_of(2)
    other["protocol"]["rounds"] = 7
    assert command(tmp_path, run_of(1), other) == 0
    assert "WARNING: the runs differ in rounds: 30 | 7" in capsys.readouterr().out


def test_one_run_compares_its_providers_in_pairs(tmp_path, capsys):
    assert command(tmp_path, run_of(1)) == 0
    peer, limit = (line for line in capsys.readouterr().out.splitlines() if "cache=cold" in line)
    assert "peer" in peer and peer.endswith("slower") and LIMIT in limit and limit.endswith("faster")
    # Rounds that differ by 30 % do not hide 3 %.
    drifting = invented.case("rotary", {"T": 1, "D": 64}, {"qops": 100.0, "peer": 103.0}, random.Random(0))
    assert command(tmp_path, invented.document(drifting), options=("--noise", "0")) == 0
    assert capsys.readouterr().out.rstrip().endswith("slower")


def test_another_schema_is_refused():
    with pytest.raises(ValueError, match="qops-bench-1"):
        parse("a.json", {"schema": "qops-bench-1"})
    twice = run_of(1)
    twice["results"].append(twice["results"][0])
    with pytest.raises(ValueError, match="qops stands there twice"):
        parse("a.json", twice)


# --- several runs of each --------------------------------------------------------------------------------------------


def written(folder: Path, name: str, runs: list[Any]) -> list[str]:
    paths = [folder / f"{name}-{index}.json" for index in range(len(runs))]
    for path, run in zip(paths, runs, strict=True):
        path.write_text(json.dumps(run))
    return list(map(str, paths))


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "no difference"), (1.3, "slower")])
def test_runs_in_turn_are_samples(tmp_path, capsys, factor, verdict):
    """Processes of one code that differ by a tenth: two of them are sure of a difference that seven do not see."""
    rng = random.Random(0)
    drifts = [rng.uniform(0.95, 1.05) for _ in range(14)]
    before = written(tmp_path, "before", [run_of(i, 100 * drifts[i]) for i in range(7)])
    after = written(tmp_path, "after", [run_of(7 + i, 100 * factor * drifts[7 + i]) for i in range(7)])
    assert compare.main([*before, "--after", *after, "--noise", "0.05"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("int4_gemm"))
    assert line.endswith(verdict)


def test_a_case_that_one_run_lacks_has_no_times(tmp_path, capsys):
    runs = [run_of(i, cases=2) for i in range(6)]
    lacking = run_of(9)
    before, after = written(tmp_path, "before", runs), written(tmp_path, "after", [*runs[:5], lacking])
    assert compare.main([*before, "--after", *after]) == 0
    out = capsys.readouterr().out
    assert "M=2" in out and "not in all runs" in out


def test_more_than_two_files_need_the_option(tmp_path, capsys):
    paths = written(tmp_path, "run", [run_of(i) for i in range(3)])
    with pytest.raises(SystemExit):
        compare.main(paths)
    assert "one file or two, or --after" in capsys.readouterr().err
