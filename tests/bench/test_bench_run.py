"""bench.run: what is selected, in which order it is measured, and what a run keeps whatever happens to it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bench import problems, run
from bench.peers import MODULES, providers
from bench.problems.int4_gemm import Int4Gemm
from bench.problems.int8_gemm import Int8Gemm
from bench.problems.shared import cases
from bench.problems.shared.cases import Case
from bench.problems.shared.operator import SAMPLED_COLUMNS, SAMPLED_ROWS
from bench.problems.shared.provider import Provider
from bench.problems.silu_mul import SiluMul
from bench.timing import document, limits, samplers, session
from bench.timing.document import Document, OtherRun

ROOT = Path(__file__).resolve().parents[2]
FAKES = ("tests.support.bench.fake_providers",)
SMALL = Case("silu_mul", {"T": 4, "I": 64, "dtype": "bfloat16", "cache": "cold", "threads": 1})
FAST = samplers.Protocol(
    rounds=6,
    case_seconds=60,
    sample_seconds=1e-4,
    warm_up_seconds=1e-3,
    rotation_cap_copies=3,
    timeout_seconds=6.0,
)


def plan(*argv: str) -> run.Plan:
    return run.plan(run.arguments(argv), FAKES if "silu_mul" in argv else MODULES)


# --- what is computed ------------------------------------------------------------------------------------------------

AXES: dict[str, int | str] = {
    "M": 5, "N": 96, "K": 256, "G": 32, "kind": "offset", "T": 5, "H": 96, "I": 48, "Hq": 3, "Hk": 1, "D": 32,
    "L": 2, "V": 64, "C": 8, "dtype": "bfloat16", "cache": "cold",
}  # fmt: skip


def axes_of(op: str) -> dict[str, int | str]:
    return {**problems.OPERATORS[op].tiny, **AXES, **({"rule": "torchao"} if op == "quantize_int8" else {})}


def digest(seed: int) -> str:
    """Of the bits of a problem of every operator."""
    bits = hashlib.sha256()
    for op in problems.OPS:
        for value in vars(problems.make(op, axes_of(op), seed=seed)).values():
            is_matrix = isinstance(value, torch.Tensor) and value.dim() > 0
            bits.update(value.contiguous().view(torch.uint8).numpy().tobytes() if is_matrix else repr(value).encode())
    return bits.hexdigest()


def test_problems_are_the_same_in_every_process_and_differ_by_seed():
    command = [sys.executable, "-c", "import test_bench_run; print(test_bench_run.digest(1))"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    elsewhere = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert elsewhere == digest(1) != digest(2)
    first, second = (problems.make("int4_gemm", axes_of("int4_gemm"), seed=seed) for seed in (0, 1))
    assert isinstance(first, Int4Gemm) and isinstance(second, Int4Gemm)
    assert not torch.equal(first.qweight, second.qweight) and not torch.equal(first.scales, second.scales)


def test_a_file_has_the_operator_of_its_name(tmp_path, monkeypatch):
    """And is found by it, with the forms that share it."""
    (tmp_path / "invented" / "models").mkdir(parents=True)
    (tmp_path / "invented" / "models" / "__init__.py").touch()
    (tmp_path / "invented" / "__init__.py").touch()
    text = "from bench.problems.shared.operator import Operator\nOPERATORS = [*map(Operator, {})]\n"
    (tmp_path / "invented" / "twist.py").write_text(text.format(["twist", "twist_int8"]))
    (tmp_path / "invented" / "models" / "layer.py").write_text(text.format(["layer"]))
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module("invented")
    assert [operator.name for operator in problems.found(package)] == ["twist", "twist_int8", "layer"]
    (tmp_path / "invented" / "wrong.py").write_text(text.format(["right"]))
    with pytest.raises(ValueError, match=r"invented\.wrong: OPERATORS must hold the operator of that name"):
        list(problems.found(package))
    with pytest.raises(
        ValueError, match="no operator 'int5_gemm'; there are attention_block, mlp_block, decode_attention"
    ):
        problems.make("int5_gemm", AXES)


def test_weights_do_not_depend_on_the_rows():
    one, many = (problems.make("int8_gemm", {**AXES, "M": m}) for m in (1, 9))
    assert isinstance(one, Int8Gemm) and isinstance(many, Int8Gemm)
    assert torch.equal(one.codes, many.codes) and torch.equal(one.w_scale, many.w_scale)


@pytest.mark.parametrize("op", problems.OPS)
def test_bytes_are_those_of_the_tensors(op):
    """What is counted is what the operator reads and writes."""
    axes = axes_of(op)
    problem = problems.make(op, axes)
    tensors = [t for t in tree_leaves(list(vars(problem).values())) if isinstance(t, torch.Tensor)]
    outputs = next(p for p in providers.all(op, "cpu") if p.name == "qops").build(problem)()
    results = outputs if isinstance(outputs, tuple) else (outputs,)
    written = sum(t.nbytes for t in results)
    assert problems.OPERATORS[op].traffic(axes).written == written
    read = sum(t.nbytes for t in tensors)
    if op in ("quantize_int8_static", "qk_norm_rotary"):
        read -= 8 if op == "quantize_int8_static" else 2 * 32 * 2  # a scale and a zero point; two weights of a head
    if op == "int4_dequantize":
        read -= problem.x.nbytes  # which says the dtype of the result alone
    if op == "int4_decode":
        read -= (64 - 5) * 96 * 2  # of the table, a row for each sequence
    assert problems.bytes_and_flops(op, axes)[0] == read + written
    layer = 2 * (5 * 96 * 32 + 96 * 96 + 3 * 96 * 48)  # k, v; q, o; gate, up, down
    gemm = 2 * 96 * 256 if {"M", "N"} <= {*problems.OPERATORS[op].axes.split()} else 0
    attention, mlp = 2 * (5 * 96 * 32 + 96 * 96), 2 * 3 * 96 * 48
    models = {"int8_layer": layer, "int4_decode": 2 * layer, "attention_block": attention, "mlp_block": mlp}
    assert problems.OPERATORS[op].weight_bytes(axes, 16) == models.get(op, gemm)


def test_a_large_reference_is_sampled_at_the_edges():
    axes: dict[str, int | str] = {"M": 100, "N": 1000, "K": 512, "dtype": "bfloat16"}
    problem = problems.make("int8_gemm", axes)
    assert isinstance(problem, Int8Gemm)
    exact = problem.q.double() @ problem.codes.double().T * problem.w_scale.double() * problem.scale.double()[:, None]
    (expected,) = problems.reference("int8_gemm", problem)
    (taken,) = problems.sample("int8_gemm", problem, exact)
    assert expected.shape == (SAMPLED_ROWS, SAMPLED_COLUMNS)
    torch.testing.assert_close(taken, expected, rtol=1e-12, atol=1e-12)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert taken[corner] == exact[corner]


# --- how it is timed -------------------------------------------------------------------------------------------------


def test_rotation_passes_the_cache_within_the_caps():
    mib = 1 << 20

    def copies(size: int, cache: int, memory: int = 1 << 40, device: str = "cpu") -> int:
        return samplers.rotation(size, cache, samplers.Protocol(), memory, device)

    assert copies(mib, 8 * mib) == 24
    assert copies(8 * mib, 480 * mib) == 64  # half a GiB
    assert copies(mib, 480 * mib) == 128
    assert copies(mib, 8 * mib, memory=10 * mib) == 10
    assert copies(1 << 40, 8 * mib) == copies(1 << 40, 8 * mib, memory=0) == 1
    assert copies(200 * mib, 50 * mib, device="cuda") == 8
    assert copies(10 * mib, 50 * mib, device="cuda") == 15
    assert copies(10_000_000, mib, device="cuda") == 10
    assert samplers.last_level_cache_bytes() >= 1 << 16


def test_clocks_are_those_of_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert document.gpu_clocks() == {} and document.cuda_device({"name": "a GPU"})["kind"] == "cuda"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980, 2619, 350.25, [N/A]'\n")
    program.chmod(0o755)
    assert document.gpu_clocks() == {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "power_w": 350.25}


def test_copies_have_weights_of_their_own():
    built: list[Any] = []

    def build(problem: Any) -> Callable[[], Any]:
        built.append(problem)
        return functools.partial(torch.Tensor.abs, problem.codes)

    def copied(provider: Provider) -> Callable[[], Any]:
        first = problems.make(provider.op, axes_of(provider.op))
        return samplers.another(provider, axes_of(provider.op), "cpu", first, provider.build(first), 1)

    merging = Provider("a", "int8_gemm", ("cpu",), build, "exact", rebuilt=True)
    copied(merging)
    assert len(built) == 2 and not torch.equal(built[0].codes, built[1].codes)
    other = copied(dataclasses.replace(merging, rebuilt=False))
    assert isinstance(other, functools.partial) and len(built) == 3
    assert torch.equal(other.args[0], built[2].codes) and other.args[0].data_ptr() != built[2].codes.data_ptr()
    rows: list[Any] = []
    copied(Provider("a", "rms_norm", ("cpu",), lambda problem: rows.append(problem) or (lambda: problem.x), "exact"))
    norm, other = rows
    assert torch.equal(norm.x, other.x) and norm.x.data_ptr() != other.x.data_ptr()
    hidden = Provider("a", "int8_gemm", ("cpu",), lambda problem: built.append(problem) or (lambda: None), "exact")
    copied(hidden)
    assert not torch.equal(built[-2].codes, built[-1].codes)


def pointers(call: Any) -> set[int]:
    """Of all tensors among the arguments of a call, also of those inside of weights."""
    inside = [value for argument in call.args for value in getattr(argument, "__dict__", {}).values()]
    held = [*call.args, *(dict(value) if isinstance(value, dict) else value for value in inside)]
    return {leaf.data_ptr() for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor) and leaf.numel()}


@pytest.mark.parametrize("op", [op for op in problems.OPS if problems.OPERATORS[op].redrawn])
def test_what_is_copied_computes_the_same_from_other_memory(op):
    axes = problems.cases(op, cases.EMULATED)[0].axes
    for provider in providers.all(op, "cpu"):
        if provider.missing() or provider.rebuilt or provider.unsupported("cpu", axes):
            continue
        problem = problems.make(op, axes)
        call = provider.build(problem)
        assert isinstance(call, functools.partial), f"{provider.name} is built for each copy"
        other = samplers.another(provider, axes, "cpu", problem, call, 1)
        assert len(pointers(call)) >= 2 and not pointers(call) & pointers(other)
        assert all(map(torch.equal, tree_leaves(call()), tree_leaves(other())))


def test_copies_leave_memory_free(monkeypatch):
    (provider,) = offered("good")
    assert samplers.prepare(provider, SMALL.axes, "cpu", FAST, 1 << 30)[1]["rotated_inputs"] == FAST.rotation_cap_copies
    assert 0 < samplers.free_memory() < 1
    monkeypatch.setattr(samplers, "free_memory", lambda: 0.1)
    assert samplers.prepare(provider, SMALL.axes, "cpu", FAST, 1 << 30)[1]["rotated_inputs"] == 1


def test_a_dense_weight_takes_more_bytes():
    axes = axes_of("int4_gemm")
    ours, dense = (
        next(p for p in providers.all("int4_gemm", "cpu") if p.name == name) for name in ("qops", "onednn F.linear")
    )
    difference = samplers.call_bytes(dense, axes) - samplers.call_bytes(ours, axes)
    assert difference == 2 * 96 * 256 - problems.OPERATORS["int4_gemm"].weight_bytes(axes)


def test_verification_refuses_wrong_results():
    problem = problems.make("silu_mul", SMALL.axes)
    assert isinstance(problem, SiluMul)
    gate, up = problem.gate_up.double().chunk(2, dim=-1)
    exact = gate.sigmoid() * gate * up
    provider = Provider("a", "silu_mul", ("cpu",), lambda p: p, "rounded")
    error = samplers.verify(provider, problem, exact.bfloat16())
    assert 0 < error.relative < 0.005 and error.absolute > 0
    for other in (1.1 * exact, exact[1:], exact[:, 1:], (exact, exact), torch.full_like(exact, torch.nan)):
        with pytest.raises(ValueError, match="wrong result"):
            samplers.verify(provider, problem, other)
    coarse = dataclasses.replace(provider, accuracy="int8 activations per group")
    assert samplers.verify(coarse, problem, 1.05 * exact).relative > problems.largest_error(provider)


class Asked(session.Session):
    """Without processes: writes down what is asked of whom."""

    def __init__(self, failing: str | None = None) -> None:
        super().__init__("cpu", [[0]], FAST)
        self.asked: list[str] = []
        self.failing = failing

    def _prepare(self, case, rows, offered):
        return dict.fromkeys(rows, 0.001)

    def ask(self, provider, method, op="", /, **arguments):
        self.asked.append(provider)
        if provider == self.failing and len(self.asked) > 6:
            raise session.Failure("crashed: killed by SIGSEGV")
        return {"us": float(len(self.asked)), **({"peak_gflops": 1.0} if provider == "limit" else {})}


def offered(*names: str) -> list[Provider]:
    return [p for p in providers.all("silu_mul", "cpu", FAKES) if p.name in names]


def test_providers_take_turns():
    asked = Asked()
    rows = asked.run(SMALL, offered("qops", "good"))
    a, b, c = "qops", "good", "limit"
    assert asked.asked == [a, b, c, b, c, a, c, a, b] * 2
    assert [row["provider"] for row in rows] == [a, b, c]
    assert rows[0]["samples_us"] == [1.0, 6.0, 8.0, 10.0, 15.0, 17.0]
    assert rows[2]["peak_gflops"] == [1.0] * 6 and "peak_gflops" not in rows[0]


def test_a_run_accounts_for_its_time():
    asked = Asked()
    assert run.account({2: asked}) == "2 threads: preparing 0 s, measuring 0 s, releasing 0 s"
    asked.run(SMALL, offered("qops"))
    assert asked.seconds["preparing"] > 0 and 0 < asked.seconds["measuring"] < 1


def test_a_provider_that_fails_later_loses_its_row():
    asked = Asked(failing="good")
    ours, lost, limit = asked.run(SMALL, offered("qops", "good"))
    assert lost["samples_us"] == [] and "SIGSEGV" in lost["error"]
    assert len(ours["samples_us"]) == len(limit["samples_us"]) == FAST.rounds and ours["error"] is None


def test_slow_cases_have_fewer_rounds():
    protocol = samplers.Protocol()
    assert session.rounds_of([0.002] * 5, protocol) == 30
    assert session.rounds_of([0.1, 0.1], protocol) == 10
    assert session.rounds_of([10, 10], protocol) == protocol.least_rounds
    assert protocol.rounds <= 30


@pytest.fixture(scope="module")
def fates() -> dict[str, dict]:
    """The rows of a case with providers of every kind, in processes."""
    workers = session.Session("cpu", document.slots(1), FAST, FAKES)
    try:
        rows = workers.run(SMALL, providers.all("silu_mul", "cpu", FAKES))
    finally:
        workers.close()
    return {row["provider"]: row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    {
        "wrong": "wrong result: error 2 of the largest value",
        "raising": "RuntimeError: no such shape",
        "crashing": "crashed: killed by SIGSEGV: last words",
        "crashing later": "crashed: exit status 7",
        "hanging": "no answer in 6 s",
        "missing": "No module named 'a_package_that_nobody_has'",
        "unsupported": "wider than it can",
    }.items(),
)
def test_what_fails_loses_its_row_alone(fates, name, reason):
    assert reason in fates[name]["error"] and fates[name]["samples_us"] == []
    for row in (fates["qops"], fates["good"], fates["limit"]):
        assert row["error"] is None and len(row["samples_us"]) == FAST.rounds and min(row["samples_us"]) > 0
    assert fates["good"]["rotated_inputs"] == 3 and 0 < fates["good"]["rel_err"] < 0.01


@pytest.mark.slow
def test_the_limit_is_measured_in_each_round(fates):
    row = fates["limit"]
    assert row["peak_kind"] == "f32"
    for us, bandwidth, peak in zip(row["samples_us"], row["bandwidth_gbs"], row["peak_gflops"], strict=True):
        assert us == limits.lower_bound_us("silu_mul", SMALL.axes, bandwidth, peak)
        assert 0.01 < bandwidth < 1e4 and 0.1 < peak < 1e5


def test_lower_bound():
    axes = axes_of("int8_gemm")
    moved, flops = problems.bytes_and_flops("int8_gemm", axes)
    assert limits.lower_bound_us("int8_gemm", axes, 1.0, 1e9) == pytest.approx(moved * 1e-3)
    assert limits.lower_bound_us("int8_gemm", axes, 1e9, 1.0) == pytest.approx(flops * 1e-3)


@pytest.mark.parametrize("op", ["int4_gemm", "int8_gemm"])
def test_peaks_of_products(op):
    limit = limits.CpuLimit(op, axes_of(op), FAST, 1 << 20)
    assert limit.kind in ("f32", problems.OPERATORS[op].unit) and limit.sample()["peak_gflops"] > 0.1


def test_slots_are_disjoint():
    slots = document.slots(1)
    assert sorted(cpu for slot in slots for cpu in slot) == sorted(set(document.cpus()) & {c for s in slots for c in s})
    assert slots[0] == document.cpus()[:1] and 1 <= document.cores() <= len(document.cpus())
    assert document.slots(len(document.cpus())) == [document.cpus()]


# --- what is selected ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_selections(device):
    def size(*options: str) -> int:
        return len(plan("all", "--device", device, *options).cases)

    assert size("--quick") < size() < size("--full")
    assert size("--quick") <= (48 if device == "cpu" else 100)
    shown = {case.op for case in plan("all", "--device", device, "--quick").cases}
    assert shown == set(problems.OPS)
    for case in plan("all", "--device", device, "--full").cases[:2000]:
        assert problems.bytes_and_flops(case.op, case.axes)[0] > 0


def test_shapes_are_those_of_real_models_and_awkward_ones():
    sizes = set(cases.LAYERS.values())
    assert {(4096, 14336), (57344, 8192), (4608, 3584), (3584, 18944), (576, 1536), (8192, 29568)} <= sizes
    assert {n for n, _ in sizes} >= {704, 2112} and {k for _, k in sizes} >= {10944}
    found = {case.axes["M"] for case in plan("int4_gemm", "--full", "--layers", "moe expert").cases}
    assert found == {1, 2, 4, 8, 16, 17, 32, 33, 64, 65, 128, 129, 256, 512, 1024, 2048, 4096, 8192}
    for op in ("int4_gemm", "int8_weight_only_gemm"):
        for case in plan(op, "--full", "--rows", "1").cases:
            assert int(case.axes["K"]) % int(case.axes["G"]) == 0


def test_named_layers_rows_threads_and_providers():
    wanted = plan("int8_gemm", "--layers", "llama3-70b *", "--rows", "1,17", "--threads", "1", "--providers", "onednn*")
    assert {case.axes["layer"] for case in wanted.cases} >= {"llama3-70b qkv", "llama3-70b tp8 o"}
    assert {case.axes["M"] for case in wanted.cases} == {1, 17}
    assert [threads for threads, _ in wanted.steps()] == [1] * len(wanted.cases)
    assert {case.axes["threads"] for _, case in wanted.steps()} == {1}
    names = {p.name for p in wanted.offered["int8_gemm"]}
    assert names and all(name.startswith("onednn") for name in names)
    assert "missing" not in {p.name for p in plan("silu_mul").offered["silu_mul"]}
    assert [p.name for p in plan("silu_mul", "--providers", "missing").offered["silu_mul"]] == ["missing"]


@pytest.mark.parametrize(
    "argv",
    [
        ["int5_gemm"],
        ["int8_gemm", "--layers", "llama4"],
        ["int8_gemm", "--rows", "one"],
        ["int8_gemm", "--rows", "3"],
        ["silu_mul", "--providers", "nobody"],
        ["silu_mul", "--threads", "0"],
        ["all", "--device", "cuda"],
    ],
)
def test_mistakes_are_one_line(argv, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(argv, FAKES if "silu_mul" in argv else MODULES) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("bench.run: ") and captured.err.count("\n") == 1


def test_lists_need_no_device(capsys):
    assert run.main(["all", "--device", "cuda", "--list"]) == 0
    text = capsys.readouterr().out
    assert "cublas F.linear" in text and "not installed" in text and "int4_gemm layer=llama3-8b o M=4096" in text


# --- what is kept ----------------------------------------------------------------------------------------------------


class Fake:
    """A session whose samples are the number of its case; interrupted after some."""

    def __init__(self, interrupted_after: int = 1000) -> None:
        self.cases: list[Case] = []
        self.left = interrupted_after

    def run(self, case, offered):
        if len(self.cases) == self.left:
            raise KeyboardInterrupt
        self.cases.append(case)
        rows = [session.new_row(case, name, "") for name in (*(p.name for p in offered), "limit")]
        return [{**row, "samples_us": [1 / 3, 2.0]} for row in rows]


def results(path: Path | None, protocol: samplers.Protocol = FAST) -> Document:
    return Document(path, {"name": "a machine", "kind": "cpu"}, protocol)


def measured(path: Path, fake: Fake, **changes: float) -> str | None:
    wanted = dataclasses.replace(plan("silu_mul", "--providers", "qops,good"), threads=[1], **changes)
    return run.measure(wanted, results(path), {1: fake})


def test_an_interrupted_run_goes_on(tmp_path):
    path = tmp_path / "new" / "r.json"
    early = measured(path, Fake(interrupted_after=2))
    total = len(plan("silu_mul").cases)
    assert early == f"interrupted, {total - 2} of {total} cases are left"
    before = json.loads(path.read_text())["results"]
    assert len(before) == 2 * 3
    rest = Fake()
    assert measured(path, rest) is None
    assert len(rest.cases) == total - 2
    after = json.loads(path.read_text())["results"]
    assert after[: 2 * 3] == before and len(after) == 3 * total
    again = Fake()
    assert measured(path, again) is None and not again.cases


def test_the_budget_ends_a_run(tmp_path):
    fake = Fake()
    early = measured(tmp_path / "r.json", fake, budget_seconds=-1.0)
    assert early is not None and early.startswith("the time is up") and not fake.cases


def test_another_provider_measures_a_case_again(tmp_path):
    path = tmp_path / "r.json"
    document, case = results(path), SMALL
    document.add(case, Fake().run(case, offered("qops")), [])
    assert results(path).has(case, ["qops", "limit"]) and not results(path).has(case, ["qops", "good", "limit"])
    document = results(path)
    document.add(case, Fake().run(case, offered("qops", "good")), [])
    assert [row["provider"] for row in json.loads(path.read_text())["results"]] == ["qops", "good", "limit"]


def test_a_file_of_another_run_is_left_alone(tmp_path):
    path = tmp_path / "r.json"
    results(path).add(SMALL, Fake().run(SMALL, offered("qops")), [])
    results(path)
    with pytest.raises(OtherRun, match="protocol differ"):
        results(path, samplers.Protocol())
    text = path.read_text()
    path.write_text(text.replace('"git_sha": "', '"git_sha": "0'))
    with pytest.raises(OtherRun, match="git_sha differ"):
        results(path)
    for other in ("{}", "no JSON"):
        path.write_text(other)
        with pytest.raises(OtherRun):
            results(path)
        assert path.read_text() == other


def test_the_document(tmp_path):
    path = tmp_path / "r.json"
    filled = results(path)
    (ours,) = offered("qops")
    filled.add(SMALL, Fake().run(SMALL, [ours]), [dataclasses.replace(ours, requires=("numpy",))])
    found = json.loads(path.read_text())
    assert [*found] == ["schema", "meta", "device", "protocol", "results"] and found["schema"] == "qops-bench-2"
    assert {"git_sha", "dirty", "argv", "utc", "versions"} <= set(found["meta"])
    assert {"qops", "torch", "python", "compiler", "numpy"} <= set(found["meta"]["versions"])
    assert {"order", "timer", "rounds", "rotation_cap_bytes"} <= set(found["protocol"])
    row = found["results"][0]
    assert row["samples_us"] == [0.33333, 2.0] and row["axes"] == SMALL.axes and row["error"] is None
    fields = {"op", "provider", "axes", "samples_us", "bytes", "flops", "max_err", "accuracy", "rotated_inputs"}
    assert fields | {"calls_per_sample", "error"} <= set(row)
    assert path.read_text().count("\n") < 60  # a row is a line
    assert [*tmp_path.iterdir()] == [path]
    assert {"name", "kind", "threads", "isa"} <= set(document.cpu_device())


def test_the_table_takes_ratios_round_by_round():
    def row(name: str, *samples: float, error: str | None = None) -> dict:
        return {**session.new_row(SMALL, name, ""), "samples_us": list(samples), "error": error}

    # The machine is ten times slower in the second round: times vary, their ratio does not.
    rows = [row("qops", 2, 20, 2), row("slow", 30, 300, 30), row("peer", 6, 60, 6), row("limit", 1, 10, 1)]
    lines = run.table([*rows, row("lost", error="crashed")]).splitlines()
    assert lines[1].split()[-4:] == ["2", "peer", "3.00", "50%"]
    assert lines[2] == "not timed: lost: crashed (1 cases)"


def test_pytest_writes_the_same_document(tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "r.json"
    node = "bench/bench_operators.py::bench_silu_mul[silu_mul T=1 I=1536 dtype=bfloat16 cache=hot]"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", node, "--benchmark-only"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("PYTEST_XDIST_WORKER", None)  # whose benchmarks would not be timed
    done = subprocess.run(
        [*command, f"--qops-json={path}"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["results"]
    assert [row["provider"] for row in rows] == ["qops", "transformers formula", "limit"]
    assert {len(row["samples_us"]) for row in rows} == {samplers.Protocol().rounds}


def test_a_worker_is_killed_by_whoever_comes():
    """An interrupt closes the session while the thread that waits for an answer finds the process gone."""

    def kill(worker: session.WorkerProcess, gate: threading.Barrier) -> None:
        gate.wait()
        worker.kill()

    for _ in range(20):
        worker, gate = session.WorkerProcess("cpu", document.slots(1)[0], FAKES, FAST), threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            for killed in [pool.submit(kill, worker, gate) for _ in range(8)]:
                killed.result()
        assert not worker.alive


def test_interrupting_the_command_keeps_what_was_measured(tmp_path):
    """Ctrl-C in the terminal: a signal to the parent, while its workers run."""
    path = tmp_path / "r.json"
    code = f"import sys; from bench import run; sys.exit(run.main(sys.argv[1:], {FAKES!r}))"
    command = ["silu_mul", "--threads", "1", "--providers", "qops", "--rows", "1,2,4", "--out", str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not path.exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"interrupted" in err, err
    assert json.loads(path.read_text())["results"] and b"silu_mul T=1" in out
