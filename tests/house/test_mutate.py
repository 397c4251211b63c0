"""The tool that plants faults, on a project of one function; and the list of survivors that are known."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.support.mutate import KNOWN, ROOT, SELECTIONS, Project, Selection, Unusable, mutate
from tests.support.mutations import faults

SOURCE = '''\
def count(n, limit):
    """How many of n, at most 3."""
    while n > limit:
        n -= 1
    return n
'''
# Takes two from 7 twice as well as one four times.
TEST = "from sample import count\n\n\ndef test_count():\n    assert count(7, 3) == 3\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """pytest's plugins take most of its time here."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.fixture
def project(tmp_path) -> Project:
    root = tmp_path / "project"
    root.mkdir()
    (root / "sample.py").write_text(SOURCE)
    (root / "test_sample.py").write_text(TEST)
    return Project(root, (Selection("*.py", ("test_{stem}.py",)),), tmp_path / "known.json", patience=4)


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.slow
def test_what_no_test_sees_is_reported_and_the_tree_stays_as_it_is(project, capsys):
    before = files(project.root)
    assert mutate(project, ["sample.py"], 100, 1) == 1
    printed = capsys.readouterr().out
    # Without `n -= 1`, or where it counts up, the loop has no end: what takes too long is killed.
    for line in ("killed      sample.py:4\n    n -= 1\n    pass", "killed      sample.py:4\n    n -= 1\n    n += 1"):
        assert line in printed
    assert "survived    sample.py:4\n    n -= 1\n    n -= (1 + 1)\n" in printed
    assert printed.splitlines()[-1] == f"sample.py: {len(faults('sample.py', SOURCE)) - 1} killed, 1 survived"
    assert files(project.root) == before


@pytest.mark.slow
def test_known_survivors_are_no_news(project, capsys):
    (project.root / "sample.py").write_text("def count(n, limit):\n    return n + limit\n")
    (project.root / "test_sample.py").write_text(TEST.replace("(7, 3)", "(3, 0)"))
    survivor = {"file": "sample.py", "before": "return n + limit", "after": "return n - limit"}
    project.known.write_text(json.dumps({"survivors": [survivor | {"class": "hole", "reason": "for this test"}]}))
    assert mutate(project, ["sample.py"], 100, 1) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "sample.py: 1 killed, 1 hole"


@pytest.mark.slow
def test_the_count_bounds_the_faults_and_the_seed_draws_them(project, capsys):
    drawn = []
    for seed in (1, 2):
        mutate(project, ["sample.py"], 1, seed)
        drawn.append(capsys.readouterr().out)
    assert drawn[0] != drawn[1] and all(printed.count("\n") == 4 for printed in drawn)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "message"),
    (
        ("test_sample.py", "def test_count(): assert False\n", "its test fails without a fault"),
        ("test_sample.py", "def test_count(): pass\n", "its tests never read it"),
        ("test_other.py", "", "none of test_sample.py exists"),
    ),
)
@pytest.mark.slow
def test_tests_that_would_show_nothing_are_refused(project, name, text, message):
    (project.root / "test_sample.py").unlink()
    (project.root / name).write_text(text)
    with pytest.raises(Unusable, match=rf"^sample\.py: {message}"):
        mutate(project, ["sample.py"], 1, 1)


@pytest.mark.slow
def test_cpp_is_built_and_what_does_not_build_is_no_fault(tmp_path, capsys):
    source = "int twice(int a) {\n  int b = 0;\n  b += a;\n  return a + b;\n}\nint main() { return twice(2); }\n"
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/twice.cpp").write_text(source)
    program = "import subprocess\n\n\ndef test_twice():\n    assert subprocess.run('./twice').returncode == 4\n"
    (tmp_path / "tree/test_twice.py").write_text(program)
    build = ("g++", "-Werror", "-Wall", "twice.cpp", "-o", "twice")
    project = Project(tmp_path / "tree", (Selection("*.cpp", ("test_{stem}.py",), (build,)),), tmp_path / "known.json")
    assert mutate(project, ["twice.cpp"], 100, 1) == 0
    printed = capsys.readouterr().out
    assert "    b += a;\n    ;\n" in printed and "    return a + b;\n    return a - b;\n" in printed
    assert "    return a + b;\n    ;\n" not in printed  # g++ warns
    assert sorted(path.name for path in (tmp_path / "tree").iterdir()) == ["test_twice.py", "twice.cpp"]


@pytest.mark.slow
def test_a_copy_that_stays_is_brought_up_to_date(project, tmp_path):
    work = tmp_path / "work"
    mutate(project, ["sample.py"], 0, 1, work)
    before = files(work)
    (work / "sample.py").write_text("a fault of a run that was interrupted")
    mutate(project, ["sample.py"], 0, 1, work)
    after = files(work)
    assert after["test_sample.py"] == before["test_sample.py"] and after["sample.py"][0] == before["sample.py"][0]
    assert after["sample.py"][1] > before["sample.py"][1]


def edits(name: str, text: str) -> set[str]:
    return {fault.planted(text) for fault in faults(name, text)}


@pytest.mark.parametrize(
    ("line", "changed"),
    (
        ("x = f(a, b, key=1)", {"x = f(b, a, key=1)", "x = f(a, b, )", "x = f(a, b, key=(1 + 1))"}),
        ("if not a or b is None: c.d = 2.5", {"if a or b is None: c.d = 2.5", "if not a and b is None: c.d = 2.5"}),
        ("a[0] = 'x' if 1 <= b < 3 else f'{a + 1}: x'", {"a[0] = 'x_' if 1 <= b < 3 else f'{a + 1}: x'"}),
        ("for a in b: print('é', a % 2)", {"for a in b: print('é', a * 2)", "for a in b: pass"}),
        ("assert a is not None and a not in b", {"assert a is None and a not in b", "pass"}),
    ),
)
def test_python_faults(line, changed):
    text = f'def f(a: int = 3) -> "g":\n    """Not 1."""\n    {line}\n'
    made = edits("a.py", text)
    assert {text.replace(line, other) for other in changed} <= made
    for other in made:
        ast.parse(other)
        assert '-> "g":\n    """Not 1."""' in other and "a: int" in other and "{a + 1}: x" in other + "{a + 1}: x"


def test_cpp_faults():
    text = '#define A 1\n// b == 2\nvoid f() {\n  int a{};\n  g(a, 3);\n  if (a < 4 && h("5, 6")) x[i] += 7;\n}\n'
    made = edits("a.cpp", text)
    for before, after in (
        ("g(a, 3);", ";"),
        ("g(a, 3);", "g(3, a);"),
        ("3", "(3 + 1)"),
        ("<", "<="),
        ("&&", "||"),
        ("+=", "-="),
        ('if (a < 4 && h("5, 6")) x[i] += 7;', ";"),
    ):
        assert text.replace(before, after) in made, before
    assert all("#define A 1\n// b == 2\n" in other for other in made)
    assert all('"5, 6"' in other or "  ;\n}" in other for other in made)


@pytest.mark.parametrize("name", ["a.py", "a.cpp"])
def test_arguments_whose_order_means_nothing_stay(name):
    assert "g(b, a);" in edits(name, "g(a, b);")
    for text in ("x.transpose(a, b);", "y = max(a, b);"):
        assert not any("b, a" in other for other in edits(name, text)), text


def test_selections_name_what_exists():
    for selection in SELECTIONS:
        files = sorted(ROOT.glob(selection.pattern))
        assert files, selection.pattern
        for test in selection.tests:
            assert any(next(ROOT.glob(test.format(stem=path.stem)), None) for path in files), test


def test_known_survivors_are_still_in_the_sources():
    rows = json.loads(KNOWN.read_text())["survivors"]
    for row in rows:
        assert row["class"] in ("equivalent", "hole") and len(row["reason"]) > 20, row
        text = (ROOT / row["file"]).read_text()
        changes = {fault.lines(text)[1:] for fault in faults(row["file"], text)}
        assert (row["before"], row["after"]) in changes, row
