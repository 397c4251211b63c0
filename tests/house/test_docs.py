"""The API pages: what docs/build.py takes for an error, and the pages themselves where pdoc is installed. And the page
on the architecture.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qops
from docs import build
from tests.support.house import rules

ROOT = Path(__file__).resolve().parents[2]

GOOD = {
    "index.html": '<h1 id="qops">q</h1><a href="a/b.html#f">f</a> <a href="#qops">q</a> <a href="https://x.y">x</a>',
    "a/b.html": '<p id="f"><code><a href="#f">f()</a></code> <code>g</code> <a href="../index.html">up</a></p>',
}
ANCHORS = {"a/b.html": ["f"]}
ROLES = {"a/b.html": build.roles_in("See :func:`f`.")}
BAD = {
    "a missing name": ('id="f"', 'id="g"', "a/b.html: no anchor #f"),
    "a role without a link": ('<a href="#f">f()</a>', "f()", "a/b.html: `f()` links to nothing"),
    "a raw role": ("<code>g</code>", ":func:`g`", "a/b.html: raw :func:`g`"),
    "half a role": ("<code>g</code>", ":func:<code>g</code>", "a/b.html: raw :func:g"),
    "a page that is not there": ("../index.html", "../readme.html", "a/b.html: broken link ../readme.html"),
    "an anchor that is not there": ('"#qops"', '"#top"', "index.html: broken link #top: no such anchor"),
}


def test_good_pages():
    assert build.roles_in("See :func:`f`, :meth:`C.m`, :class:`C` and `g`.") == {"f()", "C.m()", "C"}
    assert build.violations(GOOD, ANCHORS, ROLES) == []


@pytest.mark.parametrize("case", BAD)
def test_errors_are_found(case):
    good, bad, message = BAD[case]
    pages = {path: text.replace(good, bad) for path, text in GOOD.items()}
    assert pages != GOOD
    assert message in build.violations(pages, ANCHORS, ROLES)


def test_a_missing_page():
    assert build.violations(GOOD, {"c.html": ["f"]}, {}) == ["c.html: no anchor #f"]


def test_links_between_sources_become_links_between_pages():
    plot = next((build.ROOT / "bench" / "plots").rglob("*.svg")).relative_to(build.ROOT).as_posix()
    text = f"[a](../README.md#operators) [b](speed.md) ![c](../{plot}) [d](https://x.y) [e](#f) [g](../gone.md)"
    there, images = build.linked("docs/operators.md", text)
    assert there == f"[a](index.html#operators) [b](speed.html) ![c]({plot}) [d](https://x.y) [e](#f) [g](../gone.md)"
    assert images == [plot]


@pytest.mark.parametrize("source", build.PROSE.values())
def test_what_prose_links_to_has_a_page(source):
    text, images = build.linked(source, (ROOT / source).read_text())
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    links = set(re.findall(r"\]\(([^)#\s:]+)[)#]", text))
    assert links <= {*build.PROSE, *images, *map(build.page_of, build.MODULES)}


def test_public_api():
    api = build.public_api()
    assert set(qops.__all__) <= set(api["qops"])
    # What both weights inherit is theirs; what torch or a hook of it defines is not.
    for name in ("Int4Weight", "Int8Weight"):
        assert {f"{name}.{member}" for member in ("quantize", "dequantize", "is_packed", "split")} <= set(api["qops"])
        assert not {f"{name}.{member}" for member in ("extra_repr", "to", "_config")} & set(api["qops"])
    assert "MergedLinear.split" in api["qops.nn"] and "Checkpoint.weight" in api["qops.formats"]


def test_public_names_are_grouped_by_where_they_are_defined():
    groups = {name: build.group_of(getattr(getattr(qops, name), "__module__", "qops")) for name in qops.__all__}
    assert set(groups.values()) == set(build.GROUPS)
    assert {name for name, group in groups.items() if group == "Operators"} == {*qops.ops.__all__} & {*groups}
    assert groups["Int4Weight"] == groups["Int8Weight"] == "Weights"
    assert groups["quantize_model"] == groups["load_model"] == build.group_of("qops.nn") == "Models"
    assert build.group_of("qops.opsolete") == groups["build_info"] == "Package"


def test_pages(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pdoc")
    folder = tmp_path / "pages"
    assert build.main([str(folder)]) == 0
    assert " 0 errors" in capsys.readouterr().out
    page = (folder / "qops.html").read_text()
    for attribute in ("Int4Weight.kind", "Int4Weight.group_size", "Int8Weight.group_size", "__version__"):
        assert f'id="{attribute}"' in page
    first = ("operators", "int4_gemm", "weights", "Int4Weight", "models", "load_model", "package", "__version__")
    places = [page.index(f' id="{name}"') for name in first]
    nn = (folder / "qops" / "nn.html").read_text()
    assert places == sorted(places) and 'href="../qops.html#weights"' in nn
    # A base is named where it has a page.
    assert 'class="base">qops.weights' not in page and "qops.nn.QuantizedLinear<" in nn

    # A name that no page has is an error of the command; and a folder of anything else is left alone.
    api = build.public_api()
    monkeypatch.setattr(build, "public_api", lambda: {**api, "qops": {**api["qops"], "nothing": None}})
    assert build.main([str(folder)]) == 1
    assert capsys.readouterr().err == "qops.html: no anchor #nothing\n"
    (folder / "qops.html").unlink()
    with pytest.raises(SystemExit):
        build.main([str(folder)])


def test_architecture_names_files_that_exist():
    assert rules.files_named("csrc/<op>_*.cu (`tests/a/`), python/b.py.") == {"csrc/*_*.cu", "tests/a/", "python/b.py"}
    named = rules.files_named((ROOT / "docs/architecture.md").read_text())
    assert len(named) > 30 and not [path for path in named if not any(ROOT.glob(path.rstrip("/")))]


def test_commands_of_the_compatibility_page_name_tests_that_exist():
    text = (ROOT / "docs/compatibility.md").read_text()
    commands = re.findall(r"`pytest ([^`]+)`", text)
    named = [path for command in commands for path in re.split(r" -[km] ", command)[0].split()]
    assert len(named) > 15 and not [path for path in named if not (ROOT / path).exists()]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    assert all("pytest" in shown or "not tried" in what for _, what, shown in rows)
