"""The command that is to spend a GPU's minutes: what it records, when it stops, what it does not do twice."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
from bench import gpu_evidence, run
from bench.gpu_evidence import Evidence

import qops


@pytest.fixture
def evidence(tmp_path) -> Evidence:
    return Evidence(tmp_path, "", "a source", deadline=time.monotonic() + 60)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_how_a_step_ends(evidence):
    assert evidence.run("s", "good", python("print('first'); print('last')"))
    assert not evidence.run("s", "bad", python("print('so'); raise SystemExit(3)"))
    assert not evidence.run("s", "hangs", python("import time; print('here', flush=True); time.sleep(60)"), limit=1)
    assert not evidence.run("s", "missing", ["no-such-tool", "x"])
    assert not evidence.run(
        "s", "refused", python("print('Device not supported'); exit(1)"), unavailable="not supported"
    )
    found = {step.name: (step.status, step.note) for step in evidence.steps}
    assert found == {
        "good": ("passed", "last"),
        "bad": ("failed", "so"),
        "hangs": ("timed out", "here"),
        "missing": ("unavailable", "no-such-tool is not installed"),
        "refused": ("unavailable", "Device not supported"),
    }
    assert next(step.seconds for step in evidence.steps if step.name == "hangs") < 30
    document = json.loads((evidence.out / "evidence.json").read_text())
    assert document["schema"] == gpu_evidence.SCHEMA and len(document["steps"]) == 5
    assert "first\nlast\n" in (evidence.out / "evidence.log").read_text()
    text = gpu_evidence.table(evidence)
    assert "timed out" in text and text.startswith("no GPU")


def test_a_hanging_step_leaves_no_process_behind(evidence):
    file = evidence.out / "alive"
    child = f"import time\nwhile True: open({str(file)!r}, 'w').write(str(time.time())); time.sleep(0.05)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    evidence.run("s", "hangs", python(code), limit=2)
    time.sleep(0.2)
    before = file.read_text()
    time.sleep(0.3)
    assert file.read_text() == before


def test_a_stage_has_passed_when_all_its_steps_have_on_this_source(evidence):
    assert not evidence.passed("s")
    evidence.record("s", "a", [], "passed", 1.0, "")
    assert evidence.passed("s")
    evidence.record("s", "b", [], "unavailable", 1.0, "")
    assert not evidence.passed("s")
    evidence.record("s", "b", [], "passed", 1.0, "")  # in the place of the first
    assert evidence.passed("s") and len(evidence.steps) == 2
    evidence.source = "another source"
    assert not evidence.passed("s")


def test_what_pytest_counted_is_the_summary():
    lines = ["....\n", "= 12 passed, 3 skipped in 4.00s =\n", "\n", "Exception ignored in atexit\n"]
    assert gpu_evidence.summary(lines, r"(?!)") == "12 passed, 3 skipped in 4.00s"


def test_stages_are_resumed(tmp_path, monkeypatch, capsys):
    ran = []

    def stage(name: str, status: str):
        def run(evidence: Evidence) -> None:
            ran.append(name)
            evidence.record(name, "step", [], status, 1.0, "")

        return run

    monkeypatch.setattr(
        gpu_evidence, "STAGES", {"tests": stage("tests", "passed"), "sanitize": stage("sanitize", "failed")}
    )
    arguments = ["--out", str(tmp_path)]
    assert gpu_evidence.main(arguments) == 1 and ran == ["tests", "sanitize"]
    assert gpu_evidence.main(arguments) == 1 and ran == ["tests", "sanitize", "sanitize"]
    assert gpu_evidence.main([*arguments, "--stage", "tests"]) == 0 and ran[3:] == []
    assert gpu_evidence.main([*arguments, "--stage", "tests", "--again"]) == 0 and ran[3:] == ["tests"]
    assert "tests: has passed" in capsys.readouterr().out
    monkeypatch.setattr(gpu_evidence, "fingerprint", lambda: "changed")
    assert gpu_evidence.main([*arguments, "--stage", "tests"]) == 0 and ran[4:] == ["tests"]
    with pytest.raises(SystemExit):
        gpu_evidence.main([*arguments, "--stage", "test"])


def test_nothing_runs_on_a_build_that_failed(tmp_path, monkeypatch):
    ran = []
    stages = {
        "build": lambda evidence: evidence.record("build", "pip install", [], "failed", 1.0, ""),
        "tests": lambda evidence: ran.append("tests"),
    }
    monkeypatch.setattr(gpu_evidence, "STAGES", stages)
    assert gpu_evidence.main(["--out", str(tmp_path)]) == 1 and not ran


def test_the_check_comes_first_after_the_build(evidence, monkeypatch):
    assert list(gpu_evidence.STAGES)[:2] == ["build", "check"]
    run, commands = Evidence.run, []
    monkeypatch.setattr(Evidence, "run", lambda self, *step: commands.append(step))
    gpu_evidence.STAGES["check"](evidence)
    ((stage, name, command),) = commands
    monkeypatch.setattr(gpu_evidence, "SITE", Path(qops.__file__).parent.parent)
    some = ["--op", "check_layout", "--at", qops.build_info()["isa"]]
    assert run(evidence, stage, name, [*command, *some]) and evidence.passed("check")
    assert evidence.steps[0].note.startswith("operators: 1, failures: 0, seconds: ")
    # What a failure comes to: a result of the table, and the exit status of it all.
    fails = "import sys; from qops import check; del check.CHECKS['rotary']; from qops.__main__ import main; "
    fails += f"sys.exit(main(['check', '--op', 'rotary', '--at', '{some[-1]}']))"
    assert not run(evidence, stage, name, python(fails)) and not evidence.passed("check")
    assert re.search(r"check +python -m qops check +failed .*failures: 1", gpu_evidence.table(evidence))


def test_benchmarks_are_given_what_they_need(evidence, monkeypatch):
    """Their command lines, as far as bench.run gets without a GPU: to the list of cases."""
    commands = []
    monkeypatch.setattr(Evidence, "run", lambda self, stage, name, command: commands.append(command))
    evidence.device, evidence.commit = "a GPU", "abc"
    evidence.deadline = time.monotonic() + gpu_evidence.STAGE_SECONDS
    stages = ("bench-norms", "bench-gemms", "chain", "decode", "peers")
    for stage in stages:
        gpu_evidence.STAGES[stage](evidence)
    assert [Path(command[-1]).name for command in commands] == [f"{stage}.json" for stage in stages]
    for command in commands:
        assert command[1:3] == ["-m", "bench.run"] and command[-4:-2] == ["--commit", "abc"]
        args = run.arguments(command[3:])
        plan = run.plan(args)
        assert plan.device == "cuda" and plan.cases and 60 < plan.budget_seconds < 480
        names = {p.name for offered in plan.offered.values() for p in offered}
        assert ("qops" in names) == ("!qops" not in command) and names
    assert {case.op for case in run.plan(run.arguments(commands[2][3:])).cases} == {"int8_layer"}
    evidence.depth = 3
    gpu_evidence.STAGES["decode"](evidence)
    sizes = [
        {(case.op, case.axes["M"], case.axes["L"]) for case in run.plan(run.arguments(command[3:])).cases}
        for command in (commands[3], commands[-1])
    ]
    assert sizes == [{("int4_decode", m, depth) for m in (1, 8, 16)} for depth in (32, 3)]
    evidence.device = ""
    for stage in stages:
        gpu_evidence.STAGES[stage](evidence)
    assert len(commands) == 6 and {step.status for step in evidence.steps} == {"unavailable"}
    assert {step.stage for step in evidence.steps} == set(stages)


def test_every_stage_ends_within_eight_minutes_and_there_are_few_files():
    """evidence.json and evidence.log, and a document for each benchmark: eight at most."""
    assert gpu_evidence.STAGE_SECONDS < 480
    documents = set(gpu_evidence.STAGES) - {"build", "check", "install-peers", "tests", "sanitize"}
    assert len(documents) + 2 <= 8


def test_tests_are_found_by_their_names():
    """A new operator's file tests/test_cuda_<op>.py is run without being listed."""
    assert {"tests/test_cuda_ops.py", "tests/test_cuda_gpu.py", "tests/test_cuda_int4_gemm.py"} <= {
        *gpu_evidence.cuda_tests()
    }


def test_a_change_of_the_build_is_another_source(tmp_path, monkeypatch):
    """So that what has passed before it is run again."""
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml"):
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(gpu_evidence, "ROOT", tmp_path)
    found = {gpu_evidence.fingerprint()}
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml"):
        (tmp_path / name).write_text("after")
        found.add(gpu_evidence.fingerprint())
    assert len(found) == 4


def test_the_commit_is_recorded_where_git_does_not_know_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_evidence, "ROOT", tmp_path)
    assert gpu_evidence.versions("abc")["git_sha"] == "abc"
