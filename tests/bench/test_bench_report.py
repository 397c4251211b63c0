"""Pages, plots and docs/speed.md: what they say of invented results; the committed ones are up to date."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import report
from bench.reporting import plots, records, tables
from bench.reporting.figures import Figure, figures_of, figures_of_operator
from tests.support.bench import invented_results as invented

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="draws plots: needs matplotlib (extra `bench`)"
)


def machine(*documents: Any) -> records.Machine:
    (found,) = records.machines(records.parse(f"{i}.json", document) for i, document in enumerate(documents))
    return found


def page(document: Any) -> str:
    return tables.page(machine(document), {})


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


# --- what is committed -----------------------------------------------------------------------------------------------


def test_committed_files_are_what_the_json_gives():
    documents = report.read_all(sorted((report.BENCH / "results").glob("*.json")))
    found = report.stale(report.report(documents), report.BENCH, report.SPEED)
    assert not found, "run python -m bench.report:\n" + "\n".join(found)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    """A folder with a summary and pages; plots hold their hash alone, which needs no matplotlib."""
    (tmp_path / "speed.md").write_text(f"# Title\n\n{report.BEGIN}\nold\n\n{report.END}\nrest\n")
    expected = report.report([records.parse("a.json", invented.full())])
    for name, text in {**expected.pages, **{n: f.digest for n, f in expected.figures.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    speed = tmp_path / "speed.md"
    speed.write_text(report.with_section(speed.read_text(), expected.summary))
    yield tmp_path


def test_check_finds_a_changed_digit(site):
    expected = report.report([records.parse("a.json", invented.full())])
    assert report.stale(expected, site, site / "speed.md") == []
    assert (site / "speed.md").read_text().startswith("# Title\n") and "| `rotary` |" in (site / "speed.md").read_text()
    for name in ("RESULTS.md", "speed.md"):
        text = (site / name).read_text()
        (site / name).write_text(re.sub(r"(\d)x", lambda m: f"{9 - int(m[1])}x", text, count=1))
        assert report.stale(expected, site, site / "speed.md") == [f"{name} differs"]
        (site / name).write_text(text)


def test_check_finds_changed_json_and_files_too_many_or_missing(site):
    expected = report.report([records.parse("a.json", invented.full())])
    other = report.report([records.parse("a.json", invented.full(seed=1))])
    found = report.stale(other, site, site / "speed.md")
    assert {"RESULTS.md differs", "speed.md differs"} <= {*found}
    assert sum("shows other data" in line for line in found) == len(other.figures) > 2
    (site / "results").mkdir()
    (site / "RESULTS-gone.md").write_text(tables.index({}))
    (site / "results" / "gone.md").write_text(tables.index({}))
    (site / "plots" / "gone.svg").write_text("sha256:")
    (site / "plots" / "mine.svg").write_text("<svg/>")
    plot = next(iter(expected.figures))
    (site / plot).unlink()
    gone = ("RESULTS-gone.md", "plots/gone.svg", "results/gone.md")
    wanted = [f"{plot} is missing", *(f"{name} has no results" for name in gone)]
    assert report.stale(expected, site, None) == wanted


def test_check_command(site, capsys):
    (site / "a.json").write_text(json.dumps(invented.full()))
    arguments = [str(site / "a.json"), "--out", str(site), "--check"]
    assert report.main(arguments) == 0
    (site / "RESULTS.md").write_text("")
    assert report.main(arguments) == 1
    assert capsys.readouterr().err == "RESULTS.md differs\n"


def test_without_results(tmp_path):
    (tmp_path / "old.json").write_text('{"schema": "qops-bench-1"}')
    empty = report.report(report.read_all([tmp_path / "old.json"]))
    assert (empty.pages, empty.figures) == ({}, {}) and empty.summary == "No results are committed yet.\n"
    with pytest.raises(ValueError, match="must hold the lines"):
        report.with_section("# Title\n", "text\n")


# --- tables ----------------------------------------------------------------------------------------------------------


def test_page_says_where_we_lose():
    text = page(invented.full())
    assert "Against the fastest peer: ahead in 8, level in 4, **behind** in 4 of 16 cases." in text
    assert "Against the fastest that does not round the activations to 8 bits: ahead in 12, level in 4 of 16" in text
    (lost,) = lines_with(text, "| qkv (6144 x 4096), M 1 |", "cold")
    assert lost.split(" | ")[2:6] == ["**behind**", "onnxruntime acc4", invented.COARSE, invented.EXACT]
    assert 0.88 < float(lost.split(" | ")[6].rstrip("x")) < 0.94


def test_what_is_unclear_counts_against_us():
    """Few rounds, or wild ones."""
    axes: invented.Axes = {"M": 1, "N": 64, "K": 64, "cache": "cold"}
    few = invented.case("int4_gemm", axes, {"qops": 100.0, "cublas F.linear": 50.0}, random.Random(0))
    for row in few:
        del row["samples_us"][5:]
    times = [10.0, 1000.0, 90.0] * 10
    wild = [
        invented.row("int4_gemm", name, axes, t) for name, t in (("qops", [100.0] * 30), ("cublas F.linear", times))
    ]
    for rows in (few, wild):
        (case,) = machine(invented.document(rows)).cases
        (standing,) = tables.standings([case])
        assert standing.verdict == tables.UNCLEAR and standing.lost
        assert tables.crossover([case]) == ("1 (the smallest measured)", "nowhere")
        assert lines_with(page(invented.document(rows)), "| 64 x 64, M 1 |", "| unclear |")
        assert "Where we lose, or may:" in page(invented.document(rows))
    rows = [invented.row("int4_gemm", name, axes, t) for name, t in (("qops", [100.0] * 30), ("a", [95.0, 105.0] * 15))]
    (standing,) = tables.standings(machine(invented.document(rows)).cases)
    assert standing.verdict == tables.LEVEL and not standing.lost


def test_case_tables_hold_every_time_with_its_accuracy():
    document = invented.full()
    text = page(document)
    case = [r for r in document["results"] if r["axes"].get("M") == 64 and r["axes"]["layer"] == "qkv"][:6]
    (line,) = lines_with(text.partition("<details>")[0], "| qkv (6144 x 4096) | 64 | ahead |")
    for row in case:
        if row["provider"] != records.LIMIT:
            assert f"{tables.number(np.median(row['samples_us']))} " in line
    assert "**" in line and "**behind**" not in line
    assert lines_with(text, "*accuracy*", f"*{invented.COARSE}*", f"*{invented.EXACT}*")
    assert re.search(r"\| 1\d\d \(onednn F\.linear 2\.\d\dx\) \|$", line), "hot, beside it"
    share = float(line.split(" | ")[5].rstrip(" %"))
    assert share == pytest.approx(100 * 112 / 164, abs=1)


def test_factors_are_taken_round_by_round():
    """The machine is ten times slower in every second round: the factor does not see it."""
    rng, drift = random.Random(0), [1.0, 10.0] * 15
    rows = [
        invented.row("rotary", name, {"T": 1, "D": 64}, invented.samples(rng, us, 0.001, drift))
        for name, us in (("qops", 100.0), ("peer", 105.0))
    ]
    (standing,) = tables.standings(machine(invented.document(rows)).cases)
    assert standing.verdict == tables.AHEAD and max(standing.factors) < 1.06
    rows[0]["samples_us"].pop()  # interrupted
    (standing,) = tables.standings(machine(invented.document(rows)).cases)
    assert standing.verdict == tables.AHEAD and len(standing.factors) == 29


def test_our_own_operators_one_by_one_are_no_peer():
    text = page(invented.full())
    assert "## rms_norm\n\nAgainst the fastest peer: ahead in 6 of 6 cases." in text
    assert lines_with(text, "| qops, two operators |")


@pytest.mark.parametrize(
    ("dense", "expected"),
    [
        ({1: 3.0, 16: 2.0, 64: 0.9, 256: 0.8}, ("64", "nowhere")),
        ({1: 3.0, 16: 0.9, 64: 1.2, 256: 0.8}, ("256", "16")),
        ({1: 3.0, 16: 0.9, 64: 1.2, 256: 1.1}, ("not up to 256", "16")),
        ({1: 3.0, 16: 2.0, 64: 2.0, 256: 1.0}, ("not up to 256", "nowhere")),  # level is not faster
        ({1: 0.5, 16: 0.5}, ("1 (the smallest measured)", "nowhere")),
    ],
)
def test_crossover(dense, expected):
    rng, rows = random.Random(0), []
    for m in sorted(dense, reverse=True):
        axes: invented.Axes = {"M": m, "N": 64, "K": 64, "cache": "cold"}
        rows += invented.case("int4_gemm", axes, {"qops": 100.0, "cublas F.linear": 100.0 * dense[m]}, rng)
    assert tables.crossover(machine(invented.document(rows)).cases) == expected


def test_crossover_needs_dense():
    rows = invented.case("int4_gemm", {"M": 1, "N": 8, "K": 8}, {"qops": 1.0, "onednn _int_mm": 2.0}, random.Random(0))
    assert tables.crossover(machine(invented.document(rows)).cases) is None
    assert not records.dense("onednn qlinear") and records.dense("cublas bf16") and not records.dense("torch bf16")


def test_errors_are_listed_with_their_reason():
    def times(m: int) -> dict[str, Any]:
        return {**invented.int4_times(m), "torch int4pack": "wrong | result\nby far", "qops": 9.0 if m > 1 else "oh"}

    text = page(invented.full(times=times))
    listed = text.partition("## What did not run")[2]
    assert "| int4_gemm | openvino u4 | 8 of 16: M 1, 16 | M > 16 only |" in listed
    assert "| int4_gemm | torch int4pack | all 16 | wrong \\| result by far |" in listed
    assert "| int4_gemm | qops | 4 of 16: M 1 | oh |" in listed
    assert lines_with(text, "| qkv (6144 x 4096) | 1 |", "| fails |")
    assert "torch int4pack" not in text.partition("## What did not run")[0]
    assert "What did not run" not in page(invented.full(times=lambda m: {"qops": 1.0, "peer": 2.0}))


def test_summary_pools_all_cases():
    section = report.report([records.parse("a.json", invented.full())]).summary
    (line,) = lines_with(section, "`int4_gemm`", "| M 1 |")
    cells = line.strip("| ").split(" | ")
    assert cells[2] == f"torch int4pack ({invented.EXACT})" and cells[4] == "2 / 2"
    assert 1.75 < float(cells[3].partition("x")[0]) < 1.87
    assert cells[6].startswith("onnxruntime acc4: 0.9")  # where we lose
    (line,) = lines_with(section, "`int4_gemm`", "| M 256 |")
    assert "| 0 / 2 |" in line and "onednn F.linear" in line
    assert len(lines_with(section, "| `")) == 5


def test_later_runs_replace_whole_cases():
    first, second = invented.full(), invented.full(seed=1)
    second["results"] = [row for row in second["results"] if row["op"] == "rotary"]
    second["meta"]["utc"] = "2001-02-03T05:00:00+00:00"
    for documents in ((first, second), (second, first)):
        merged = machine(*documents)
        assert len(merged.cases) == len(machine(first).cases)
        rotary = next(case for case in merged.cases if case.op == "rotary")
        assert rotary.rows["qops"].samples_us == tuple(
            next(r for r in second["results"] if r["provider"] == "qops")["samples_us"]
        )


def test_several_machines_have_an_index():
    other = invented.full(kind="cuda", name="Invented GPU", isa="", threads=0)
    found = report.report(records.parse(f"{i}.json", d) for i, d in enumerate((invented.full(), other)))
    names = ["RESULTS.md", "results/invented-cpu-2-threads-avx2.md", "results/invented-gpu.md"]
    assert sorted(found.pages) == names
    assert all(f"]({name})" in found.pages["RESULTS.md"] for name in names[1:])
    plots_of = {name: re.findall(r"!\[.*\]\((.*)\)", found.pages[name]) for name in names[1:]}
    assert all(plots_of.values())
    assert {path.removeprefix("../") for paths in plots_of.values() for path in paths} == {*found.figures}
    assert all(path.startswith("../plots/") for paths in plots_of.values() for path in paths)
    assert "**Invented GPU**" in found.summary and "**Invented CPU, 2 threads, avx2**" in found.summary


def test_summary_counts_every_case_the_same():
    rng, rows = random.Random(0), []
    for m, peer, rounds in ((65, 150.0, 30), (66, 300.0, 7), (67, 300.0, 7)):  # slow cases get fewer rounds
        case = invented.case("int4_gemm", {"M": m, "N": 8, "K": 8}, {"qops": 100.0, "peer": peer}, rng)
        rows += [{**row, "samples_us": row["samples_us"][:rounds]} for row in case]
    section = report.report([records.parse("a.json", invented.document(rows))]).summary
    (line,) = lines_with(section, "`int4_gemm`", "| M 65 - 67 |", "| 3 / 3 |")
    assert 2.9 < float(line.split(" | ")[3].partition("x")[0]) < 3.1


def test_targets(tmp_path):
    """A dense GEMM at 4.4 times the limit, a peer at 1.25 times; ours does not matter."""
    rng, rows, coarse = random.Random(0), [], {"coarse": invented.COARSE}
    for m in (1, 8, 16):
        axes: invented.Axes = {"M": m, "N": 14336, "K": 4096, "cache": "cold"}
        us = {"qops": 500.0, "cublas F.linear": 440.0, "marlin": 125.0, "coarse": 110.0, records.LIMIT: 100.0}
        rows += invented.case("int4_gemm", axes, us, rng, coarse)
        rows += invented.case(
            "int4_gemm", {**axes, "K": 512}, {**us, "cublas F.linear": 1.0}, rng, coarse
        )  # a small layer
    gpu = invented.document(rows, kind="cuda", name="Invented GPU")
    expected = report.report([records.parse("a.json", gpu)])
    dense, sixteen, peers = (line.strip("| ").split(" | ") for line in lines_with(expected.targets, "int4_gemm"))
    assert dense[1:4] == ["M 1 - 8", "cublas F.linear", "2"] and sixteen[1] == "M 16"
    assert dense[5] == "3.20x" and float(dense[6].rstrip("x")) == pytest.approx(0.88 * 4.4, rel=0.02)
    assert dense[7] == "**3.20x**"  # the stated one
    assert peers[1:4] == ["M 1 - 16", "marlin", "6"]
    assert peers[7] == f"**{peers[6]}**" and float(peers[6].rstrip("x")) < 1.13  # the limit leaves no more
    assert report.report([records.parse("a.json", invented.document(rows))]).targets == ""  # a CPU
    assert report.stale(expected, tmp_path, None)[-1] == "TARGETS.md is missing"
    (tmp_path / "TARGETS.md").write_text(f"By hand.\n{report.BEGIN}{report.END}")
    assert report.stale(expected, tmp_path, None)[-1] == "TARGETS.md differs"
    (tmp_path / "TARGETS.md").write_text(report.with_section(f"By hand.\n{report.BEGIN}{report.END}", expected.targets))
    assert "TARGETS.md" not in " ".join(report.stale(expected, tmp_path, None))


def test_peers_alone():
    """Measured before there is anything of ours."""

    def without_ours(m: int) -> dict[str, Any]:
        return {name: us for name, us in invented.int4_times(m).items() if name != "qops"}

    document = invented.full(times=without_ours, kind="cuda", name="Invented GPU")
    document["results"] = [row for row in document["results"] if row["provider"] != "qops"]
    text = page(document)
    assert re.search(r"\| qkv \(6144 x 4096\) \| 64 \|  \|  \|  \|  \| \d+ \| \d+ \| \d+ \| \d+ \|", text)
    assert "Against the fastest" not in text and "fails" not in text
    found = report.report([records.parse("a.json", document)])
    assert [figure.name for figure in found.figures.values()] == ["speedup", "share", "bandwidth", "share"]
    assert all("torch" in " ".join(figure.labels) for figure in found.figures.values())
    assert "| int4_gemm | M 65" not in found.summary and "operator" not in found.summary and found.targets


# --- plots -----------------------------------------------------------------------------------------------------------


def figures(document: Any) -> list[Figure]:
    return [figure for found in figures_of(machine(document)).values() for figure in found]


def test_figures_of_every_kind():
    found = figures(invented.full())
    assert [figure.name for figure in found] == ["speedup", "share", "bandwidth", "share"]
    speedup, share, bandwidth, _ = found
    assert [panel.title for panel in speedup.panels] == ["qkv (6144 x 4096)", "down (4096 x 14336)"]
    lines = {line.label: line for line in speedup.panels[0].lines}
    assert lines["onednn F.linear"].y == (1.0,) * 4 and lines["qops"].x == invented.ROWS
    assert lines["qops"].y[0] == pytest.approx(340 / 101, rel=0.02) and lines["openvino u4"].x == (64, 256)
    assert lines[records.LIMIT].y[-1] == pytest.approx(356 / 208, rel=0.02)
    assert [panel.title for panel in share.panels] == ["M = 1", "M = 16", "M = 64", "M = 256"]
    ours = next(line for line in share.panels[2].lines if line.label == "qops")
    assert ours.x == pytest.approx((68.3, 68.3), abs=1) and ours.y == (0, 1)
    assert [panel.title for panel in bandwidth.panels] == ["T = 1", "T = 1024"]
    ours = bandwidth.panels[0].lines[0]
    assert ours.x == (1024, 2048, 4096) and ours.y[0] > 1.9 * ours.y[1]


def test_the_order_of_cases_decides_nothing():
    document = invented.full()
    shuffled = copy.deepcopy(document)
    shuffled["results"].sort(key=lambda row: -row["axes"].get("T", 0))
    names = [figure.digest for figure in figures(document)]
    assert sorted(names) == sorted(figure.digest for figure in figures(shuffled))


def test_digest_is_of_the_data_shown():
    first, again, other = (figures_of_operator("a", machine(invented.full(seed=s)).cases[:8])[0] for s in (0, 0, 1))
    assert first.digest == again.digest != other.digest


@needs_matplotlib
def test_plots(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(invented.full()))
    for name in ("RESULTS-gone.md", "RESULTS-mine.md"):
        (tmp_path / name).write_text(tables.index({}) if "gone" in name else "mine")
    assert report.main([str(tmp_path / "a.json"), "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.md")} == {"RESULTS.md", "RESULTS-mine.md"}
    assert report.main([str(tmp_path / "a.json"), "--out", str(tmp_path), "--check"]) == 0
    drawn = {figure.title: figure for figure in figures(invented.full())}
    files = sorted((tmp_path / "plots").rglob("*.svg"))
    assert len(files) == len(drawn)
    for file in files:
        text = file.read_text()
        root = ElementTree.fromstring(text)
        words = {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}
        figure = drawn[root.findtext("{http://www.w3.org/2000/svg}title") or ""]
        assert {*figure.labels, *(panel.title for panel in figure.panels), *figure.categories} - words <= (
            {records.LIMIT} if figure.categories else set()
        )
        assert len(text) <= 100_000 and figure.digest in text and "Matplotlib" not in text
        assert f"]({file.relative_to(tmp_path)})" in (tmp_path / "RESULTS.md").read_text()
        assert plots.draw(figure) == text


@needs_matplotlib
def test_the_largest_plot_is_small():
    rows = (1, 2, 4, 8, 16, 17, 32, 33, 64, 65, 128, 129, 256, 512, 1024, 2048, 4096, 8192)
    rng, entries = random.Random(0), []
    for i, m in itertools.product(range(10), rows):
        axes: invented.Axes = {"M": m, "N": 128 + i, "K": 4096, "layer": f"llama3-70b down {i}", "cache": "cold"}
        us = {name: rng.uniform(50, 500) for name in ("qops", "cublas F.linear", *"abcdefgh", records.LIMIT)}
        entries += invented.case("int4_gemm", axes, us, rng)
    found = figures(invented.document(entries))
    assert [figure.name for figure in found] == ["speedup", "share"]
    assert max(len(plots.draw(figure)) for figure in found) <= 100_000


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(colour: str, background: str) -> float:
    """As WCAG defines it."""
    dark, light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) + 0.05 for c in (colour, background))
    return light / dark


@needs_matplotlib
def test_plots_are_legible_on_light_and_dark():
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#eeeeee", "#ffffff") < 3
    for figure in figures(invented.full()):
        text = plots.draw(figure)
        colours = {*re.findall(r"#[0-9a-fA-F]{6}\b", text)}
        assert colours == {plots.INK, plots.OUR_COLOUR, *(c for c, _ in plots.PEERS)} & colours and len(colours) > 2
        assert not re.search(r"(fill|stroke): ?(black|white|rgb)", text)
        for element in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text"):
            assert "fill: #" in element.get("style", ""), "text without a colour is black"
        for colour in colours:
            assert min(contrast(colour, "#ffffff"), contrast(colour, "#0d1117")) >= 3


# Machado, Oliveira and Fernandes 2009, full severity, on linear RGB: protan, deutan, tritan.
BLINDNESS = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb.clip(0, 1)
    t = xyz / [0.9505, 1, 1.089]
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_stay_apart(blindness):
    """By 20 in CIELAB, where 2 can be seen; blue and purple of equal luminance do not, to a protanope."""

    def distance(a: str, b: str) -> float:
        matrix = np.array(BLINDNESS[blindness])
        return float(np.linalg.norm(lab(matrix @ linear(a)) - lab(matrix @ linear(b))))

    if blindness == "protan":
        assert distance("#1f78d1", "#a860c8") < 5
    colours = [plots.INK, plots.OUR_COLOUR, *(colour for colour, _ in plots.PEERS)]
    assert min(distance(a, b) for a, b in itertools.combinations(colours, 2)) >= 20
