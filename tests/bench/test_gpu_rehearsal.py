"""What a GPU will be asked, with the emulator in its place: a crash, a hang and a wrong result cost only themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import problems
from bench.problems.shared.cases import EMULATED
from qops import _native
from qops._native import WITHOUT_CUDA_KERNEL
from tests.support.cuda import cuda_tools

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PLANTED = {"int4_gemm": "crash", "int8_gemm": "hang", "silu_mul": "wrong"}


def planted(*faults: str) -> dict[str, str]:
    return {**os.environ, "QOPS_PLANTED": " ".join(faults), "CUDA_VISIBLE_DEVICES": ""}


def test_the_evidence_command(tmp_path):
    """Every stage whose commands an emulator can take, with a module that was built elsewhere."""
    cuda_tools.build_emulated_operators()
    modules = tmp_path / "modules"
    modules.mkdir()
    shutil.copy(_native._C.__file__, modules)
    if (built := ROOT / "build" / "cuda-check" / "qops" / "_C_cuda.abi3.so").is_file():
        shutil.copy(built, modules)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench.gpu_evidence", "--out", str(out), "--modules", str(modules)]
    stages = ["--stage", "build,check,tests,gemms,rows,memcheck"]
    env = planted(*(f"{op}={fault}" for op, fault in PLANTED.items()))
    done = subprocess.run([*command, *stages], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    steps = {(s["stage"], s["name"]): s for s in json.loads((out / "evidence.json").read_text())["steps"]}
    assert {key: step["status"] for key, step in steps.items()} == {
        ("build", "import"): "passed",
        ("check", "python -m qops check"): "passed",
        ("tests", "tests/cuda/gemm/test_cuda_int8_weight_only_gemm.py"): "passed",
        ("tests", "tests/cuda/test_cuda_int4_gemm.py"): "failed",
        ("tests", "tests/cuda/test_cuda_int4_int8_gemm.py"): "passed",
        ("tests", "tests/cuda/test_cuda_int4_weights.py"): "passed",
        ("tests", "tests/cuda/test_cuda_int8_gemm.py"): "timed out",
        ("tests", "tests/cuda/test_cuda_ops.py"): "failed",
        ("gemms", "bench.run"): "failed",
        ("rows", "bench.run"): "failed",
        ("memcheck", "compute-sanitizer"): "unavailable",
    }
    crash, hang, wrong = (steps["tests", f"tests/cuda/test_cuda_{of}.py"] for of in ("int4_gemm", "int8_gemm", "ops"))
    assert "exit status -11 in tests/cuda/test_cuda_int4_gemm.py::" in crash["note"] and len(crash["failed"]) == 1
    assert "it hangs in tests/cuda/test_cuda_int8_gemm.py::" in hang["note"] and len(hang["failed"]) == 1
    assert wrong["failed"] and all("test_rows_that_begin_anywhere" in name for name in wrong["failed"])

    rows = [row for stage in ("gemms", "rows") for row in json.loads((out / f"{stage}.json").read_text())["results"]]
    ours = {row["op"]: row for row in rows if row["provider"] == "qops"}
    rows_ops = {op for op in problems.OPS if not op.startswith("int")} - set(WITHOUT_CUDA_KERNEL)
    assert set(ours) == {"int4_gemm", "int8_gemm", "int4_int8_gemm", *rows_ops}
    assert {op for op, row in ours.items() if row["error"]} == set(PLANTED)
    reasons = {"int4_gemm": "killed by SIGSEGV", "int8_gemm": "no answer in 30 s", "silu_mul": "wrong result"}
    for op, reason in reasons.items():
        assert reason in ours[op]["error"] and not ours[op]["samples_us"]
    for row in rows:
        assert row["provider"] == "qops" or row["samples_us"] or row["error"].startswith("Unsupported: "), row
    for stage, op in (("gemms", "int4_gemm"), ("gemms", "int8_gemm"), ("rows", "silu_mul")):
        assert any(op in name for name in steps[stage, "bench.run"]["failed"])


def of(*ops: str) -> list[str]:
    return [f"bench/bench_operators.py::bench_{op}" for op in ops]


def pytest_bench(files: list[str], env: dict[str, str], *options: str) -> tuple[int, str]:
    """On an emulated GPU: its exit status and its text."""
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", *options]
    env = {**env, "QOPS_BENCH_DEVICE": "emulated", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def benchmarks(json_file: Path, files: list[str], env: dict[str, str]) -> tuple[int, str, dict[str, set[str]]]:
    """Also the operators and their providers in pytest-benchmark's document."""
    code, text = pytest_bench(files, env, "--benchmark-only", f"--benchmark-json={json_file}")
    found: dict[str, set[str]] = {}
    for benchmark in json.loads(json_file.read_text())["benchmarks"]:
        assert benchmark["stats"]["rounds"] == 2 and benchmark["stats"]["min"] > 0
        op = benchmark["fullname"].partition("::bench_")[2].partition("[")[0]
        assert benchmark["group"].startswith(f"{op} ")
        found.setdefault(op, set()).add(benchmark["extra_info"]["provider"])
    return code, text, found


def test_the_benchmarks_of_a_gpu(tmp_path):
    """All of them: each operator in the group of its case, with cuBLAS or PyTorch, in pytest-benchmark's document."""
    code, text, found = benchmarks(tmp_path / "b.json", ["bench"], planted())
    assert code == 0 and "times of an emulator, no speeds" in text, text
    assert set(found) == set(problems.OPS)
    for op, names in found.items():
        assert "limit" in names and len(names) >= 3 - (op in WITHOUT_CUDA_KERNEL), (op, names)
        assert ("qops" in names) == (op not in WITHOUT_CUDA_KERNEL)
        has_weight = problems.OPERATORS[op].weight_bytes(problems.cases(op, EMULATED)[0].axes) > 0
        assert any(name.startswith("cublas") for name in names) == has_weight
    assert f"{len(set(WITHOUT_CUDA_KERNEL) & set(problems.OPS))} skipped" in text


def test_a_fault_costs_a_benchmark(tmp_path):
    chosen = of("silu_mul", "rotary", "int8_gemm")
    code, text, found = benchmarks(tmp_path / "b.json", chosen, planted("silu_mul=crash", "rotary=wrong"))
    assert code == 1 and "2 failed" in text and "killed by SIGSEGV" in text and "wrong result" in text, text
    assert "qops" in found["int8_gemm"] and "cublas _int_mm" in found["int8_gemm"]
    assert found["silu_mul"] == found["rotary"] == {"transformers formula", "limit"}


def test_what_is_not_timed_is_verified():
    code, text = pytest_bench(of("silu_mul", "rotary"), planted("rotary=wrong"), "--benchmark-disable")
    assert code == 1 and "1 failed, 5 passed" in text and "wrong result" in text and "no speeds" not in text, text
