"""How calls are timed, by clocks that tell exactly how long a call takes; and whom a session asks, and how often."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import problems, run
from bench.peers import providers
from bench.problems.shared import cases, devices
from bench.problems.shared.cases import Case
from bench.problems.shared.provider import LIMIT
from bench.timing import emulated, samplers, session
from bench.timing.document import Document

FAST = samplers.Protocol(rounds=3, case_seconds=60, sample_seconds=1e-4, warm_up_seconds=1e-3, timeout_seconds=50)
SILU = Case("silu_mul", {"T": 4, "I": 64, "dtype": "bfloat16", "cache": "cold"})
ROTARY = Case("rotary", {"T": 4, "Hq": 2, "Hk": 1, "D": 32, "dtype": "bfloat16", "cache": "cold"})


# --- samplers --------------------------------------------------------------------------------------------------------


class Clock:
    """Of the host, in nanoseconds. A call takes a millisecond, and whoever looks does not take any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0, list[int]()
        monkeypatch.setattr(samplers.time, "perf_counter_ns", lambda: self.now)
        monkeypatch.setattr(samplers.time, "perf_counter", lambda: 1e-9 * self.now)

    def call(self, name: int) -> None:
        self.calls.append(name)
        self.now += 1_000_000


@pytest.mark.parametrize(("seconds", "calls"), [(0, 1), (0.0024, 2), (0.005, 5), (9, 1000)])
def test_a_sample_is_the_time_of_one_call(monkeypatch, seconds, calls):
    clock = Clock(monkeypatch)
    functions = [functools.partial(clock.call, i) for i in range(3)]
    sampler = samplers.Sampler(functions, dataclasses.replace(FAST, sample_seconds=seconds))
    assert sampler.calls == calls
    clock.calls.clear()
    assert sampler.sample() == {"us": pytest.approx(1000)}
    assert len(clock.calls) == max(1, calls // 4) + calls  # the first ones warm up, and are not timed


@pytest.mark.parametrize(("limit_us", "made"), [(900, 1), (1100, 2)])
def test_a_long_call_is_not_warmed_up(monkeypatch, limit_us, made):
    clock = Clock(monkeypatch)
    protocol = dataclasses.replace(FAST, sample_seconds=0, long_call_seconds=1e-6 * limit_us)
    sampler = samplers.Sampler([functools.partial(clock.call, 0)], protocol)
    clock.calls.clear()
    assert sampler.sample() == {"us": pytest.approx(1000)}
    assert sampler.made == len(clock.calls) == made


def test_a_sample_has_no_more_calls_than_inputs_were_built_for(monkeypatch):
    clock = Clock(monkeypatch)
    sampler = samplers.Sampler([functools.partial(clock.call, 0)], dataclasses.replace(FAST, sample_seconds=1), 8)
    assert (sampler.calls, sampler.made) == (8, 10)


@pytest.mark.parametrize("copies", [1, 13, 64, 128])
def test_copies_that_are_built_are_as_few_as_others_allow(copies):
    """Between two reads of one pass the bytes of all copies, and none comes twice in a sample."""
    for calls in (1, 2, 3, 20, 125):
        assert samplers.fewest(copies, 7, calls, between_bytes=0) == copies
        assert samplers.fewest(copies, 7, calls, between_bytes=1 << 40) == min(copies, calls)
        for between in (1, 10, 112, 5000):
            few = samplers.fewest(copies, 7, calls, between)
            assert few == copies or few // calls * (calls * 7 + between) >= copies * 7
            assert few <= calls or (few // calls - 1) * (calls * 7 + between) < copies * 7


def test_calls_rotate_through_the_inputs():
    seen: list[int] = []
    protocol = dataclasses.replace(FAST, sample_seconds=0)
    sampler = samplers.Sampler([lambda i=i: seen.append(i) for i in range(3)], protocol)
    sampler.calls = 4
    seen.clear()
    assert sampler.sample()["us"] > 0
    first = seen[0]
    assert seen == [(first + i) % 3 for i in range(1 + 4)]  # one of them to warm up


class FakeCuda:
    """What a sampler uses of torch.cuda. A replay makes the captured calls, each of which takes a millisecond."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.log, self.captured = 0.0, [], []
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = cuda.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                for name in cuda.captured:
                    cuda.call(name)

        @contextlib.contextmanager
        def capturing(graph: Graph) -> Iterator[None]:
            cuda.log.clear()
            yield
            cuda.captured = list(cuda.log)

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                pass

        fakes = {"Event": Event, "CUDAGraph": Graph, "graph": capturing, "Stream": Stream, "current_stream": Stream}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(self, name: int) -> None:
        self.log.append(name)
        self.now += 1.0


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(("copies", "in_graph"), [(1, 20), (8, 24), (30, 30)])
@pytest.mark.parametrize("replays", [1, 5])
def test_a_graph_holds_a_call_for_each_copy(monkeypatch, copies, in_graph, replays, graph):
    cuda = FakeCuda(monkeypatch)
    calls = [functools.partial(cuda.call, i) for i in range(copies)]
    protocol = dataclasses.replace(FAST, sample_seconds=1e-3 * in_graph * replays)
    sampler = samplers.CudaSampler(calls, protocol, graph=graph)
    assert cuda.captured == [i % copies for i in range(in_graph)] if graph else not cuda.captured
    assert sampler.calls == in_graph * replays
    cuda.log.clear()
    assert sampler.sample() == {"us": pytest.approx(1000)}
    assert len(cuda.log) == in_graph * (1 + replays)  # the first ones are not timed


# --- an emulated GPU -------------------------------------------------------------------------------------------------


def test_a_replay_computes_into_the_memory_of_the_capture():
    x, y = torch.arange(4.0), torch.zeros(4)
    graph = emulated.Graph()
    with emulated.capture(graph):
        z = (x * 2).view(2, 2)[1] + 1
        y.add_(x)
    assert z.tolist() == [5, 7] and y.tolist() == [0, 1, 2, 3]
    x.fill_(10)
    graph.replay()
    assert z.tolist() == [21, 21] and y.tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: bool(x[0]), lambda x: x.nonzero()])
def test_a_capture_refuses_what_the_host_reads(read):
    graph = emulated.Graph()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), emulated.capture(graph):
        read(torch.ones(3))


def test_the_device_is_the_one_that_is_named_or_there(monkeypatch):
    monkeypatch.delenv("QOPS_BENCH_DEVICE", raising=False)
    for is_there, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        assert devices.chosen() == kind
    for kind in devices.KINDS:
        monkeypatch.setenv("QOPS_BENCH_DEVICE", kind)
        assert devices.chosen() == kind
    monkeypatch.setenv("QOPS_BENCH_DEVICE", "emulated")
    assert [case.op for op in problems.OPS for case in problems.benchmarked(op)] == [*problems.OPS]
    monkeypatch.setenv("QOPS_BENCH_DEVICE", "cuda")
    gemms = {(case.axes["layer"], case.axes["M"]) for case in problems.benchmarked("int4_gemm")}
    assert gemms == {(f"llama3-8b {name}", m) for name in ("o", "down") for m in (1, 16, 256, 4096)}
    monkeypatch.setenv("QOPS_BENCH_DEVICE", "rocm")
    with pytest.raises(ValueError, match="QOPS_BENCH_DEVICE must be one of cpu, cuda, emulated, got 'rocm'"):
        devices.chosen()


@pytest.mark.parametrize("op", problems.OPS)
def test_what_an_emulator_is_asked_is_what_a_gpu_is_asked(op):
    """The axes of a tiny case are those of a GPU's cases."""
    (tiny,) = problems.cases(op, cases.EMULATED)
    assert list(tiny.axes) == list(problems.cases(op, cases.CUDA_QUICK)[0].axes)
    names = [p.name for p in providers.all(op, "cuda", providers.EAGER_MODULES)]
    plan = run.plan(run.arguments([op, "--device", "emulated"]), providers.EAGER_MODULES)
    assert [p.name for p in plan.offered[op]] == names and plan.cases == [tiny]


# --- sessions --------------------------------------------------------------------------------------------------------


class FakeWorker:
    """A process that answers, crashes or hangs, by provider and operator; ``log`` is what all were asked."""

    def __init__(self, fates: dict[tuple[str, str], str], log: list[tuple[str, str, float]]) -> None:
        self.fates, self.log, self.alive, self.op = fates, log, True, ""

    @contextlib.contextmanager
    def on(self, cpus: Any, afterwards: Any) -> Iterator[None]:
        yield

    def kill(self) -> None:
        self.alive = False

    def ask(self, method: str, timeout: float, /, **arguments: Any) -> Any:
        name = arguments.get("name", "")
        self.op = arguments.get("op", self.op)
        self.log.append((method, name, timeout))
        fate = self.fates.get((name, self.op))
        if method == "prepare" and fate is not None:
            self.alive = False
            raise session.Hang("no answer in 1 s") if fate == "hang" else session.Failure("crashed: killed by SIGSEGV")
        if method == "machine":
            return {"memory_bytes": 1000, "name": "a GPU"}
        return {"seconds": 0.001, "made": 2} if method == "prepare" else {"us": 1.0}


class Asked(session.Session):
    def __init__(self, **fates: str) -> None:
        super().__init__("cuda", [[0]], FAST)
        self.log: list[tuple[str, str, float]] = []
        planted = {("qops", op): fate for op, fate in fates.items()}
        self.started: list[FakeWorker] = []
        self.asked: list[tuple[str, str]] = []

        def start() -> FakeWorker:
            self.started.append(FakeWorker(planted, self.log))
            return self.started[-1]

        self._start = start

    def ask(self, provider: str, method: str, op: str = "", /, **arguments: Any) -> Any:
        self.asked.append((provider, method))
        return super().ask(provider, method, op, **arguments)

    def rows_of(self, case: Case) -> dict[str, dict[str, Any]]:
        offered = providers.all(case.op, "cuda", providers.EAGER_MODULES)
        return {row["provider"]: row for row in self.run(case, offered)}

    def times_prepared(self, provider: str) -> int:
        return sum(method == "prepare" and name == provider for method, name, _ in self.log)


def test_what_fails_at_an_operator_is_asked_for_the_others():
    """A crash up to three times, a hang once: each would cost its time in every case."""
    for fate, most in (("crash", 3), ("hang", 1)):
        asked = Asked(silu_mul=fate)
        for index in range(5):
            rows = asked.rows_of(SILU)
            reason = "given up" if index >= most else "crashed" if fate == "crash" else "no answer"
            assert reason in rows["qops"]["error"]
            for name in ("transformers formula", LIMIT):
                assert rows[name]["error"] is None and len(rows[name]["samples_us"]) == FAST.rounds
        assert asked.times_prepared("qops") == most
        ours = asked.rows_of(ROTARY)["qops"]
        assert ours["error"] is None and len(ours["samples_us"]) == FAST.rounds


def test_memory_is_asked_once_and_of_the_limit_whatever_happens_to_kernels():
    asked = Asked(silu_mul="crash")
    for case in (SILU, SILU, ROTARY):
        asked.rows_of(case)
    assert [who for who, method in asked.asked if method == "machine"] == [LIMIT]
    assert asked.machine["name"] == "a GPU"
    processes = {"qops", "transformers formula", LIMIT}
    assert len(asked.started) == len(processes) + 2  # ours again, twice: for the second case, and the third


class Late(Asked):
    """Past its end as soon as anything of ours is prepared."""

    def ask(self, provider: str, method: str, op: str = "", /, **arguments: Any) -> Any:
        if (provider, method) == ("qops", "prepare"):
            self.end = time.monotonic() - 1
        return super().ask(provider, method, op, **arguments)


def test_a_run_ends_in_the_middle_of_a_case(tmp_path):
    """What it had is written; nobody has hung, and nobody gets a row."""
    wanted = run.plan(run.arguments(["silu_mul", "rotary", "--device", "cuda", "--quick"]), providers.EAGER_MODULES)
    document = Document(tmp_path / "r.json", {"name": "a GPU", "kind": "cuda"}, FAST)
    late = Late()
    early = run.measure(wanted, document, {wanted.threads[0]: late})
    assert early == f"the time is up, {len(wanted.cases)} of {len(wanted.cases)} cases are left" and not document.rows
    asked = Asked()
    rest = dataclasses.replace(wanted, cases=wanted.cases[:1])
    assert run.measure(rest, document, {wanted.threads[0]: asked}) is None
    assert len(json.loads((tmp_path / "r.json").read_text())["results"]) == len(document.rows) > 0
    assert run.measure(wanted, document, {wanted.threads[0]: late}) is not None and document.rows


def test_no_request_waits_past_the_end():
    asked = Asked()
    assert asked.end == math.inf
    asked.end = time.monotonic() + 20
    asked.rows_of(SILU)
    assert all(0 < timeout <= 20 for _, _, timeout in asked.log)
    hanging = Asked(silu_mul="hang")
    hanging.end = time.monotonic() + 20
    with pytest.raises(session.TimeUp):  # it had less time than a provider has
        hanging.rows_of(SILU)
    asked.end = math.inf
    asked.log.clear()
    asked.rows_of(SILU)
    of_limit = [timeout for method, name, timeout in asked.log if (method, name) == ("prepare", LIMIT)]
    assert of_limit == [session.START_SECONDS]  # in which it is compiled
    assert sum(timeout == FAST.timeout_seconds for _, _, timeout in asked.log) == len(asked.log) - 1
