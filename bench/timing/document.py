"""The JSON document of a run: where, how, and every sample. Written after each case, and continued by the next run."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import qops
from bench.problems.shared.cases import Case
from bench.problems.shared.provider import Provider, version
from bench.timing.samplers import Protocol, last_level_cache_bytes
from qops.__main__ import cpu_name

SCHEMA = "qops-bench-2"
ROOT = Path(__file__).resolve().parents[2]
# What must be equal in two parts of one document.
SAME = ("schema", "device", "protocol")
SAME_META = ("git_sha", "dirty")
TIMERS = {
    "cpu": "perf_counter_ns",
    "cuda": "CUDA events",
    "emulated": "perf_counter, of an emulator: its times say nothing",
}


class OtherRun(Exception):
    """A file that holds something else than the beginning of this run."""


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else ""


def cpus() -> list[int]:
    """That this process may use, one of each core first, then those that share a core with one before."""
    allowed = sorted(os.sched_getaffinity(0))
    first, second, cores = [], [], set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text().strip() if siblings.exists() else str(cpu)
        (second if core in cores else first).append(cpu)
        cores.add(core)
    return [*first, *second]


def slots(threads: int) -> list[list[int]]:
    """Disjoint sets of so many CPUs, the first ones first; near the same memory, or there is one set alone."""
    available, near = cpus(), set[int]()
    for node in Path("/sys/devices/system/node").glob("node*"):
        here = {int(path.name[3:]) for path in node.glob("cpu[0-9]*")}
        near |= here if available[0] in here else set()
    if near.issuperset(available[:threads]):
        available = [cpu for cpu in available if cpu in near]
    else:
        available = available[:threads]
    return [available[i : i + threads] for i in range(0, len(available) - threads + 1, threads)]


def cores() -> int:
    """Of those CPUs: what "all" threads are."""
    names = {Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus()}
    return len({path.read_text() if path.exists() else str(path) for path in names})


def cpu_device() -> dict[str, Any]:
    build = qops.build_info()
    return {
        "name": cpu_name(),
        "kind": "cpu",
        "threads": cores(),
        "isa": build["isa"],
        "last_level_cache_bytes": last_level_cache_bytes(),
    }


def query_gpu(fields: Mapping[str, str]) -> dict[str, str]:
    """Of nvidia-smi, by our names for its fields; nothing where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in run.stdout.strip().split(",")), strict=True))


def gpu_clocks() -> dict[str, float]:
    """Between two samples."""
    fields = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "power_w": "power.draw", "celsius": "temperature.gpu"}
    found = query_gpu(fields)
    return {name: float(value) for name, value in found.items() if value.replace(".", "", 1).isdigit()}


def cuda_device(machine: Mapping[str, Any], kind: str = "cuda") -> dict[str, Any]:
    """``machine`` is what a worker says about its GPU, emulated or not."""
    if kind == "emulated":
        return {"kind": kind, **machine}
    fields = {"driver": "driver_version", "power_limit_w": "power.limit", "largest_sm_mhz": "clocks.max.sm"}
    return {"kind": "cuda", **machine, **query_gpu(fields), "ecc": query_gpu({"ecc": "ecc.mode.current"}).get("ecc")}


class Document:
    """The rows of a run, in the file at ``path`` (nowhere when that is None); ``commit``: if git does not know it."""

    def __init__(self, path: Path | None, device: Mapping[str, Any], protocol: Protocol, commit: str = "") -> None:
        self.path = path
        build = qops.build_info()
        names = {"qops": build["version"], "torch": build["torch"], "python": platform.python_version()}
        self._head: dict[str, Any] = {
            "schema": SCHEMA,
            "meta": {
                "git_sha": git("rev-parse", "HEAD") or commit,
                # Results of other runs say nothing about the code.
                "dirty": bool(git("status", "--porcelain", "--", ".", ":!bench/results")),
                "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
                "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "versions": {**names, "compiler": build["compiler"]},
            },
            "device": dict(device),
            "protocol": {
                "timer": TIMERS[device["kind"]],
                "order": "a process for each provider, one sample each in turn, another one first each round",
                "inputs": inputs_text(device["kind"]),
                **asdict(protocol),
            },
        }
        self._rows: dict[str, list[dict[str, Any]]] = {}
        if path is not None and path.exists():
            self._continue(path)

    def _continue(self, path: Path) -> None:
        try:
            before = json.loads(path.read_text())
        except ValueError:
            raise OtherRun(f"{path} is not a JSON document") from None
        if not isinstance(before, dict) or before.get("schema") != SCHEMA:
            raise OtherRun(f"{path} is not of schema {SCHEMA}")
        differing = [name for name in SAME if before[name] != self._head[name]]
        differing += [name for name in SAME_META if before["meta"][name] != self._head["meta"][name]]
        versions = self._head["meta"]["versions"]
        old = before["meta"]["versions"]
        differing += [name for name in versions if old.get(name) != versions[name]]
        if differing:
            raise OtherRun(f"{path} is of another run: {', '.join(differing)} differ; name another file, or delete it")
        versions.update(old)
        for row in before["results"]:
            self._rows.setdefault(str(Case(row["op"], row["axes"])), []).append(row)

    def has(self, case: Case, names: Iterable[str]) -> bool:
        """Whether a case is done, with all of these providers."""
        return set(names) <= {row["provider"] for row in self._rows.get(str(case), ())}

    def add(self, case: Case, rows: Sequence[dict[str, Any]], offered: Sequence[Provider]) -> None:
        """The rows of a case, in place of what there was of it; writes the file."""
        self._rows[str(case)] = [{name: _rounded(value) for name, value in row.items()} for row in rows]
        timed = {row["provider"] for row in rows if row["samples_us"]}
        for name in {name for p in offered if p.name in timed for name in p.requires}:
            self._head["meta"]["versions"][name] = version(name)
        self.write()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for rows in self._rows.values() for row in rows]

    def write(self) -> None:
        """One row a line. Whoever reads meanwhile finds the document before or after."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps(self._head, indent=1)
        rows = ",\n  ".join(json.dumps(row) for row in self.rows)
        text = f'{head[:-2]},\n "results": [\n  {rows}\n ]\n}}\n'
        unfinished = self.path.with_name(f".{self.path.name}.part")
        unfinished.write_text(text)
        unfinished.replace(self.path)


def inputs_text(kind: str) -> str:
    if kind != "cpu":
        return (
            "cold: one call per copy in a CUDA graph, copies past 3 x L2, 100 MB and 8 of them; "
            "hot: the same input in each call, L2 as that leaves it; no flush"
        )
    return (
        "cold: copies past min(3 x last-level cache, caps), or, where each has to be built, fewer, between two reads "
        "of which others read the rest; hot: the same input in each call"
    )


def _rounded(value: Any) -> Any:
    """Five digits, which is more than a timer has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
