"""The command that is to spend a GPU's minutes: what it plans, what it records, when it stops, what a fault costs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import qops
from bench import gpu_evidence, problems, run
from bench.gpu_evidence import Stage
from bench.timing import evidence as steps
from bench.timing import once
from bench.timing.evidence import Evidence
from qops._native import WITHOUT_CUDA_KERNEL

ROOT = Path(__file__).resolve().parents[2]


def seen(tmp_path: Path, kind: str = "emulated") -> Evidence:
    device = "a GPU" if kind == "cuda" else ""
    return Evidence(tmp_path, kind, device, "a source", deadline=time.monotonic() + 60)


def test_what_has_no_kernel_for_a_gpu_is_left_out():
    assert set(gpu_evidence.WITHOUT_KERNEL) == {f"!{op}" for op in WITHOUT_CUDA_KERNEL if op in problems.OPS}
    assert set(gpu_evidence.ROW_OPS) == {"!int*", *gpu_evidence.WITHOUT_KERNEL}


@pytest.fixture
def evidence(tmp_path) -> Evidence:
    return seen(tmp_path)


@pytest.fixture
def on_a_gpu(tmp_path) -> Evidence:
    return seen(tmp_path, "cuda")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# --- a step ----------------------------------------------------------------------------------------------------------


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
    assert document["schema"] == steps.SCHEMA and len(document["steps"]) == 5
    assert "good: first\ngood: last\n" in (evidence.out / "evidence.log").read_text()
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


@pytest.mark.parametrize(
    ("found", "code"), {"passed": 0, "unavailable": 0, "timed out": 1, "failed": 1, "left out": 3}.items()
)
def test_the_exit_status_tells(evidence, found, code):
    evidence.record("s", "good", [], "passed", 1.0, "")
    evidence.record("s", "x", [], found, 1.0, "")
    assert gpu_evidence.status(evidence, ["s"]) == code
    assert gpu_evidence.status(evidence, ["another"]) == 0
    evidence.record("s", "y", [], "failed", 1.0, "")
    assert gpu_evidence.status(evidence, ["s"]) == 1


def test_a_stage_has_passed_when_all_its_steps_have_on_this_source(evidence):
    assert not evidence.passed("s")
    evidence.record("s", "a", [], "passed", 1.0, "")
    assert evidence.passed("s") and evidence.passed("s", "a") and not evidence.passed("s", "b")
    evidence.record("s", "b", [], "unavailable", 1.0, "")
    assert not evidence.passed("s") and evidence.passed("s", "a")
    evidence.record("s", "b", [], "passed", 1.0, "")  # in the place of the first
    assert evidence.passed("s") and len(evidence.steps) == 2
    evidence.source = "another source"
    assert not evidence.passed("s")


def test_what_pytest_counted_is_the_summary():
    lines = ["....\n", "= 12 passed, 3 skipped in 4.00s =\n", "\n", "Exception ignored in atexit\n"]
    assert steps.summary(lines, r"(?!)") == "12 passed, 3 skipped in 4.00s"


# --- tests -----------------------------------------------------------------------------------------------------------

# What the files of a GPU may do to their process, and what is kept of them.
FILES: dict[str, tuple[str, str, str, list[str]]] = {
    "good": ("def test_a(): pass", "passed", r"1 passed in", []),
    "wrong": ("def test_a(): assert False\ndef test_b(): pass", "failed", "1 failed, 1 passed", ["test_a"]),
    "broken": ("import a_package_that_nobody_has", "failed", "no test has run|1 error", []),
    "skipping": (
        "import pytest\npytestmark = pytest.mark.skip(reason='no CUDA kernels')\ndef test_a(): pass",
        "failed",
        "no test has run: 1 skipped",
        [],
    ),
    "nothing": ("x = 1", "failed", "no test has run", []),
    "crash": (
        "import os\ndef test_a(): assert False\ndef test_b(): os.kill(os.getpid(), 11)\ndef test_c(): pass",
        "failed",
        "0 passed, 1 failed, then exit status -11 in .*test_b",
        ["test_a", "test_b"],
    ),
    "hang": (
        "import time\ndef test_a(): assert False\ndef test_b(): pass\ndef test_c(): time.sleep(600)",
        "timed out",
        "1 passed, 1 failed, then it hangs in .*test_c",
        ["test_a", "test_c"],
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "hang" else n for n in FILES])
def test_names_of_failed_tests_are_kept_whatever_ends_their_process(evidence, tmp_path, monkeypatch, name):
    text, status, note, failed = FILES[name]
    folder = tmp_path / "tests"
    folder.mkdir()
    file = folder / f"test_{name}.py"
    file.write_text(text + "\n")
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    command = [*gpu_evidence.pytest("test"), f"tests/test_{name}.py"]
    assert evidence.run_tests("tests", name, command, limit=15 if name == "hang" else 60) == (status == "passed")
    (step,) = evidence.steps
    assert step.status == status and re.search(note, step.note), step
    assert step.failed == [f"tests/test_{name}.py::{test}" for test in failed]
    if failed:
        assert f"failed: {step.failed[0]}" in gpu_evidence.table(evidence)


def test_outcomes_are_read_through_what_a_crash_prints():
    lines = [
        "tests/test_cuda_a.py::test_x[gpu-1 2] PASSED [ 10%]\n",
        "tests/test_cuda_a.py::test_y[gpu] SKIPPED (needs PASSED) [ 20%]\n",
        "tests/test_cuda_a.py::test_z[a b] FAILED [ 30%]\n",
        "tests/test_cuda_a.py::test_crash[gpu] Fatal Python error: Segmentation fault\n",
        '  File "tests/test_cuda_a.py", line 3\n',
    ]
    found = steps.tests_of(lines)
    assert (found.passed, found.failed) == (1, ["tests/test_cuda_a.py::test_z[a b]"])
    assert found.running == "tests/test_cuda_a.py::test_crash[gpu]"
    assert steps.tests_of(lines[:2]).running == ""


def test_a_process_for_each_file_side_by_side(on_a_gpu, monkeypatch):
    ran: list[tuple[str, float]] = []

    def run_tests(self: Evidence, stage: str, name: str, command: list[str], limit: float) -> None:
        begun = time.monotonic()
        time.sleep(0.3)
        ran.append((command[-1], begun))
        assert command[-1] == name and limit > 50 and {"-v", "--tb=short", "gpu and not compile"} <= {*command}

    monkeypatch.setattr(Evidence, "run_tests", run_tests)
    on_a_gpu.record("tests", "tests/cuda/test_cuda_ops.py", [], "passed", 1.0, "")
    gpu_evidence.tests(on_a_gpu)
    assert {file for file, _ in ran} == {*gpu_evidence.cuda_tests()} - {"tests/cuda/test_cuda_ops.py"}
    assert max(at for _, at in ran) - min(at for _, at in ran) < 0.3


def test_tests_are_found_by_their_names():
    """A new operator's file tests/cuda/test_cuda_<op>.py is run without being listed; what needs no GPU is not."""
    files = gpu_evidence.cuda_tests()
    assert {f"tests/cuda/test_cuda_{name}.py" for name in ("ops", "gpu", "int4_gemm")} <= {*files}
    every = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/cuda").rglob("test_cuda_*.py"))
    command = [*gpu_evidence.pytest(gpu_evidence.GPU_TESTS), "-qq", "--collect-only", *every]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert files == sorted({line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}), done.stderr


def test_a_gpu_is_not_touched_when_its_tests_are_imported():
    """On a torch without CUDA, told that it has a GPU and kernels for it: whatever asks that GPU for anything fails."""
    code = """
import torch, qops
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2
told = {**qops.build_info(), "cuda": True}
qops.build_info = lambda: told
def fail(*_, **__): raise AssertionError("a GPU is asked for something")
def to(tensor, *args, whole=torch.Tensor.to, **kwargs):
    return fail() if "cuda" in str((args, kwargs)) else whole(tensor, *args, **kwargs)
torch.Tensor.to, torch.Tensor.cuda, torch.nn.Module.to = to, fail, fail
import test_cuda_gpu
assert test_cuda_gpu.OPS
"""
    path = [str(ROOT / "tests/cuda"), *sys.path]
    done = subprocess.run(
        python(f"import sys; sys.path[:0] = {path!r}\n{code}"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- benchmarks ------------------------------------------------------------------------------------------------------


def row(provider: str, error: str | None = None) -> dict[str, Any]:
    return {"provider": provider, "op": "silu_mul", "error": error, "samples_us": [] if error else [1.0], "n": provider}


BENCHES: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "all timed": ([row("qops"), row("peer"), row("limit")], "passed", "1 cases timed, 3 rows"),
    "a peer lost": ([row("qops"), row("peer", "crashed")], "passed", "lost: peer, silu_mul: crashed"),
    "ours lost": ([row("qops"), row("qops", "wrong result")], "failed", "lost: qops, silu_mul: wrong result"),
    "not taken": ([row("qops"), row("peer", "Unsupported: too wide")], "passed", "1 cases timed, 2 rows"),
    "ours not there": ([row("peer"), row("limit")], "failed", "nothing is timed"),
    "nothing": ([], "failed", "nothing is timed: "),
}


@pytest.mark.parametrize("name", BENCHES)
def test_a_benchmark_has_passed_when_ours_is_timed(evidence, tmp_path, name):
    rows, status, note = BENCHES[name]
    file = tmp_path / "gemms.json"
    code = f"open({str(file)!r}, 'w').write({json.dumps({'results': rows})!r})"
    evidence.run_bench("gemms", python(code if rows else "pass"), file)
    (step,) = evidence.steps
    assert (step.status, note in step.note) == (status, True), step
    assert len(step.failed) == note.startswith("lost")


def test_what_was_written_before_a_benchmark_was_ended_counts(evidence, tmp_path):
    file = tmp_path / "gemms.json"
    text = json.dumps({"results": [row("qops"), row("peer", "crashed")]})
    evidence.deadline = time.monotonic() + 3
    evidence.run_bench("gemms", python(f"open({str(file)!r}, 'w').write({text!r})\nwhile True: pass"), file)
    (step,) = evidence.steps
    assert (
        step.status == "timed out"
        and step.note.startswith("1 cases timed")
        and step.failed == ["peer, silu_mul: crashed"]
    )


def test_benchmarks_are_given_what_they_need(on_a_gpu, monkeypatch):
    """Their command lines, as far as bench.run gets without a GPU: to the list of cases."""
    commands: dict[str, list[str]] = {}

    def run_bench(self: Evidence, stage: str, command: list[str], file: Path, ours: str) -> None:
        assert file.name == f"{stage}.json" == Path(command[-1]).name
        assert ours == ("" if stage == "peers" else "qops")
        commands[stage] = command

    monkeypatch.setattr(Evidence, "run_bench", run_bench)
    on_a_gpu.commit = "abc"
    plans: dict[str, run.Plan] = {}
    for stage in ("gemms", "int8-weights", "rows", "decode", "chain", "peers"):
        on_a_gpu.deadline = time.monotonic() + gpu_evidence.STAGES[stage].seconds
        gpu_evidence.STAGES[stage].run(on_a_gpu)
        command = commands[stage]
        assert command[1:3] == ["-m", "bench.run"] and command[command.index("--commit") + 1] == "abc"
        plan = plans[stage] = run.plan(run.arguments(command[3:]))
        assert plan.device == "cuda" and plan.cases and plan.budget_seconds and plan.end_seconds
        assert 0.7 < plan.budget_seconds / gpu_evidence.STAGES[stage].seconds < 0.85
        assert 0.85 < plan.end_seconds / gpu_evidence.STAGES[stage].seconds < 0.95
        assert plan.protocol.timeout_seconds == gpu_evidence.PROVIDER_SECONDS
        names = {p.name for offered in plan.offered.values() for p in offered}
        assert names and any(name.startswith("qops") for name in names) == (stage != "peers")
    gemms = {(case.axes["layer"], case.axes["M"]) for case in plans["gemms"].cases}
    layers = [f"llama3-8b {part}" for part in ("qkv", "o", "gate_up", "down")]
    assert gemms == {(layer, m) for layer in layers for m in (1, 16, 64, 256, 1024, 4096)}
    assert {p.name for p in plans["gemms"].offered["int4_gemm"]} == {"qops", "cublas F.linear"}
    assert {case.axes["T"] for case in plans["rows"].cases} == {1, 4096}
    assert {case.op for case in plans["chain"].cases} == {"int8_layer"}
    ours = {case.op for stage in ("rows", "gemms", "int8-weights") for case in plans[stage].cases}
    assert ours | {"int4_dequantize"} == {case.op for case in plans["peers"].cases}


@pytest.mark.parametrize(("seconds", "asked", "depth"), [(75, None, 8), (300, None, 32), (75, 3, 3), (300, 3, 3)])
def test_a_whole_model_decodes_where_there_is_time(on_a_gpu, monkeypatch, seconds, asked, depth):
    commands = []
    monkeypatch.setattr(Evidence, "run_bench", lambda self, stage, command, file, ours: commands.append(command))
    on_a_gpu.deadline, on_a_gpu.depth = time.monotonic() + seconds, asked
    gpu_evidence.STAGES["decode"].run(on_a_gpu)
    cases = run.plan(run.arguments(commands[0][3:])).cases
    assert {(case.op, case.axes["M"], case.axes["L"]) for case in cases} == {
        ("int4_decode", 1, depth),
        ("int4_decode", 16, depth),
    }


@pytest.mark.parametrize(("op", "rows"), gpu_evidence.PROFILED)
def test_what_is_profiled_is_a_case(op, rows):
    case = once.case_of(op, rows, "cuda")
    assert case is not None and case.op == op and rows in (case.axes.get("M"), case.axes.get("T"))


def test_an_operator_for_a_profiler(capsys):
    once.main(["silu_mul", "--rows", "1"])
    assert "silu_mul T=1 I=14336" in (text := capsys.readouterr().out) and "4 calls, error 0.0" in text
    with pytest.raises(SystemExit):
        once.main(["silu_mul", "--rows", "3"])
    assert "no case of silu_mul has 3 rows" in capsys.readouterr().err


def test_tools_of_a_gpu(on_a_gpu, evidence, monkeypatch):
    ran: list[tuple[str, str, list[str]]] = []
    monkeypatch.setattr(
        Evidence, "run", lambda self, stage, name, command, *_, **__: ran.append((stage, name, command))
    )
    on_a_gpu.record("profile", "int4_gemm, 1", [], "passed", 1.0, "")
    for stage in ("memcheck", "racecheck", "profile"):
        gpu_evidence.STAGES[stage].run(on_a_gpu)
        gpu_evidence.STAGES[stage].run(evidence)
    assert [command[:3] for _, name, command in ran if name == "compute-sanitizer"] == [
        ["compute-sanitizer", "--tool", tool] for tool in ("memcheck", "racecheck")
    ]
    profiled = [
        (name, command[command.index("bench.timing.once") + 1]) for stage, name, command in ran if stage == "profile"
    ]
    assert profiled == [(f"{op}, {rows}", op) for op, rows in gpu_evidence.PROFILED[1:]]
    assert {step.status for step in evidence.steps if step.stage != "profile" or not evidence.has_gpu} == {
        "unavailable"
    }


# --- the plan --------------------------------------------------------------------------------------------------------


class Fake:
    """Stages that take no time; each is what it is told to be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
        self.ran: list[str] = []
        self.shares: dict[str, float] = {}
        self.found = found
        stages = {name: Stage(self.stage(name), 100, needs_kernels=name not in ("build", "peers")) for name in found}
        monkeypatch.setattr(gpu_evidence, "STAGES", stages)

    def stage(self, name: str):
        def run(evidence: Evidence) -> None:
            self.ran.append(name)
            self.shares[name] = evidence.left()
            evidence.record(name, "step", [], self.found[name], 1.0, "")

        return run

    def taken(self) -> list[str]:
        taken, self.ran = self.ran, []
        return taken


def test_stages_are_resumed(tmp_path, monkeypatch, capsys):
    fake = Fake(monkeypatch, tests="passed", gemms="failed", rows="passed")
    arguments = ["--out", str(tmp_path)]
    assert gpu_evidence.main(arguments) == 1 and fake.taken() == ["tests", "gemms", "rows"]
    assert gpu_evidence.main(arguments) == 1 and fake.taken() == ["gemms"]
    assert gpu_evidence.main([*arguments, "--stage", "tests"]) == 0 and fake.taken() == []
    assert gpu_evidence.main([*arguments, "--stage", "tests", "--again"]) == 0 and fake.taken() == ["tests"]
    assert "tests: has passed" in capsys.readouterr().out
    monkeypatch.setattr(gpu_evidence, "fingerprint", lambda: "changed")
    assert gpu_evidence.main([*arguments, "--stage", "tests"]) == 0 and fake.taken() == ["tests"]
    for mistake in (["--stage", "test"], ["--minutes", "0"], ["--minutes", "nan"], ["--minutes", "inf"]):
        with pytest.raises(SystemExit):
            gpu_evidence.main([*arguments, *mistake])


def test_packages_that_are_missing_are_named_before_the_minutes_run(tmp_path, monkeypatch, capsys):
    fake = Fake(monkeypatch, build="passed", tests="passed")
    lacks = {"cmake", "hypothesis"}
    monkeypatch.setattr(gpu_evidence, "not_installed", lambda *names: [name for name in names if name in lacks])
    with pytest.raises(SystemExit):
        gpu_evidence.main(["--out", str(tmp_path), "--stage", "build"])
    assert "the stage build needs cmake: pip install cmake, or --modules FOLDER" in capsys.readouterr().err
    assert gpu_evidence.main(["--out", str(tmp_path), "--stage", "tests"]) == 0 and fake.taken() == ["tests"]
    assert "Test files that need hypothesis will fail: pip install hypothesis" in capsys.readouterr().err


def test_stages_go_by_value_while_there_is_time(on_a_gpu, monkeypatch):
    fake = Fake(monkeypatch, tests="passed", gemms="failed", rows="passed")
    seconds = 100 + gpu_evidence.RESERVED_SECONDS
    gpu_evidence.run_stages(on_a_gpu, ["tests", "gemms", "rows"], (seconds + 20) / 60)
    assert fake.taken() == ["tests", "gemms", "rows"] and fake.shares["tests"] == pytest.approx(100, abs=1)
    # A third of a share is no beginning, and says so; what is left out comes before what has failed.
    gpu_evidence.run_stages(on_a_gpu, ["tests", "gemms", "rows"], (32 + gpu_evidence.RESERVED_SECONDS) / 60, again=True)
    assert fake.taken() == [] and {step.status for step in on_a_gpu.steps if step.name == "all"} == {"left out"}
    assert gpu_evidence.status(on_a_gpu, ["rows"]) == 3
    on_a_gpu.steps = [step for step in on_a_gpu.steps if (step.stage, step.name) != ("gemms", "all")]
    gpu_evidence.run_stages(on_a_gpu, ["tests", "gemms", "rows"], 15)
    assert fake.taken() == ["tests", "rows", "gemms"]
    assert gpu_evidence.status(on_a_gpu, ["tests", "rows"]) == 0
    gpu_evidence.run_stages(on_a_gpu, ["tests"], 60, again=True)
    assert fake.shares["tests"] == pytest.approx(400, abs=1)


def test_fifteen_minutes_hold_what_matters_and_few_files():
    """With a build from source; without one, everything but the last sanitizers."""
    names = list(gpu_evidence.STAGES)
    seconds = [gpu_evidence.STAGES[name].seconds for name in names]
    available = 15 * 60 - gpu_evidence.RESERVED_SECONDS
    essential = ("build", "check", "tests", "gemms", "rows", "decode", "memcheck")
    assert sum(gpu_evidence.STAGES[name].seconds for name in essential) <= available
    assert sum(seconds[2 : names.index("racecheck")]) <= available - 30
    assert names.index("peers") < names.index("profile") < names.index("racecheck") and names[1:3] == ["build", "check"]
    documents = {"gemms", "rows", "decode", "chain", "peers"}
    assert documents < set(names) and len(documents) + 2 <= 8


def test_a_build_that_failed_leaves_the_peers(on_a_gpu, monkeypatch, tmp_path):
    """Without CUDA kernels, or built without CUDA, everything that needs none goes on."""
    for broken, peers in (("CUDA kernels", True), ("import", True), ("pip install", True), ("", False)):
        commands = []

        def run(self, stage, name, command, *_, broken=broken, env=None, commands=commands, **__) -> bool:
            good = name != broken and (bool(broken) or "import" not in name)
            commands.append((name, env or {}))
            self.record(stage, name, command, "passed" if good else "failed", 1.0, "")
            return good

        monkeypatch.setattr(Evidence, "run", run)
        monkeypatch.setattr(gpu_evidence, "SITE", tmp_path / "site")
        fake = Fake(monkeypatch, tests="passed", peers="passed")
        stages = {"build": Stage(gpu_evidence.build, 100, needs_kernels=False), **gpu_evidence.STAGES}
        monkeypatch.setattr(gpu_evidence, "STAGES", stages)
        on_a_gpu.has_qops = on_a_gpu.has_kernels = True
        gpu_evidence.run_stages(on_a_gpu, ["build", "tests", "peers"], 15, again=True)
        assert fake.taken() == (["peers"] if peers else []), broken
        assert on_a_gpu.of("tests")[0].status == "left out" and gpu_evidence.status(on_a_gpu, ["build"]) == 1
        without = [env for name, env in commands if name == "pip install without CUDA"]
        assert without == ([] if broken == "CUDA kernels" else [{"QOPS_CUDA": "OFF"}])
    # Modules built elsewhere: the second try leaves out the one that did not load.
    modules = tmp_path / "modules"
    modules.mkdir()
    for name in ("_C.abi3.so", "_C_cuda.abi3.so"):
        (modules / name).write_text("no module")
    on_a_gpu.modules = modules
    for without, there in (("", True), (" without CUDA", False)):
        gpu_evidence.install(on_a_gpu, without)
        assert (tmp_path / "site" / "qops" / "_C_cuda.abi3.so").is_file() == there
        assert (tmp_path / "site" / "qops" / "_C.abi3.so").is_file()


def test_a_build_without_cuda_kernels_is_a_failure_on_a_gpu(on_a_gpu, monkeypatch):
    """Else every test of a GPU would skip itself, and all would have passed."""
    monkeypatch.setattr(gpu_evidence, "install", lambda evidence, without: True)
    monkeypatch.setattr(steps, "SITE", Path(qops.__file__).parent.parent)
    gpu_evidence.build(on_a_gpu)
    assert on_a_gpu.has_qops and on_a_gpu.has_kernels == qops.build_info()["cuda"]
    (step,) = on_a_gpu.steps
    assert step.name == "CUDA kernels" and (step.status == "passed" or "no CUDA kernels" in step.note)


def test_the_check_is_a_step_of_its_own(evidence, monkeypatch):
    run, commands = Evidence.run, []
    monkeypatch.setattr(Evidence, "run", lambda self, *step: commands.append(step))
    gpu_evidence.STAGES["check"].run(evidence)
    ((stage, name, command),) = commands
    monkeypatch.setattr(steps, "SITE", Path(qops.__file__).parent.parent)
    some = ["--op", "check_layout", "--at", qops.build_info()["isa"]]
    assert run(evidence, stage, name, [*command, *some]) and evidence.passed("check")
    assert evidence.steps[0].note.startswith("operators: 1, failures: 0, seconds: ")
    # What a failure comes to: a result of the table, and the exit status of it all.
    fails = "import sys; from qops import check; del check.CHECKS['rotary']; from qops.__main__ import main; "
    fails += f"sys.exit(main(['check', '--op', 'rotary', '--at', '{some[-1]}']))"
    assert not run(evidence, stage, name, python(fails)) and not evidence.passed("check")
    assert re.search(r"check +python -m qops check +failed .*failures: 1", gpu_evidence.table(evidence))


def test_a_run_that_is_ended_keeps_its_results_and_ends_its_processes(tmp_path):
    """What a lease does when it is over: SIGTERM, in the middle of a step."""
    alive = tmp_path / "alive"
    child = f"import time\nwhile True: open({str(alive)!r}, 'w').write(str(time.time())); time.sleep(0.05)"
    child = f"print('last words')\n{child}"
    code = f"""
import sys
from bench import gpu_evidence, problems
from bench.gpu_evidence import Stage
def good(evidence): evidence.record("good", "step", [], "passed", 1.0, "")
def endless(evidence): evidence.run("endless", "step", [sys.executable, "-c", {child!r}])
gpu_evidence.STAGES = {{"good": Stage(good, 100), "endless": Stage(endless, 100)}}
sys.exit(gpu_evidence.main(["--out", {str(tmp_path / "out")!r}]))
"""
    path = [str(ROOT), *sys.path]
    process = subprocess.Popen(
        python(f"import sys; sys.path[:0] = {path!r}\n{code}"), stdout=subprocess.PIPE, text=True
    )
    while not alive.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in out, out
    found = json.loads((tmp_path / "out" / "evidence.json").read_text())["steps"]
    assert [(step["stage"], step["status"], step["note"]) for step in found] == [
        ("good", "passed", ""),
        ("endless", "interrupted", "last words"),
    ]
    time.sleep(0.2)
    before = alive.read_text()
    time.sleep(0.3)
    assert alive.read_text() == before


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
