"""Reads the JSON files of ``bench.run`` and sorts their rows into cases: one operator, one set of axes, all providers.

Needs neither torch nor qops.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.reporting.stats import median

SCHEMA = "qops-bench-2"
OURS = "qops"
LIMIT = "limit"
Axes = Mapping[str, "int | str"]
Key = tuple[str, tuple[tuple[str, "int | str"], ...]]


@dataclass(frozen=True)
class Row:
    """What one provider did in one case."""

    op: str
    provider: str
    axes: Axes
    samples_us: tuple[float, ...]
    bytes: int
    flops: int
    accuracy: str
    error: str | None
    bandwidth_gbs: tuple[float, ...]
    peak_gflops: tuple[float, ...]
    peak_kind: str

    @property
    def key(self) -> Key:
        return self.op, tuple(sorted(self.axes.items()))

    @property
    def median_us(self) -> float:
        return median(self.samples_us)


def row(entry: Mapping[str, Any]) -> Row:
    return Row(
        op=entry["op"],
        provider=entry["provider"],
        axes=entry["axes"],
        samples_us=tuple(entry["samples_us"]),
        bytes=entry["bytes"],
        flops=entry["flops"],
        accuracy=entry.get("accuracy") or "",
        error=entry.get("error") or (None if entry["samples_us"] else "no samples"),
        bandwidth_gbs=tuple(entry.get("bandwidth_gbs") or ()),
        peak_gflops=tuple(entry.get("peak_gflops") or ()),
        peak_kind=entry.get("peak_kind") or "",
    )


def vendor(provider: str) -> bool:
    return "cublas" in provider or "onednn" in provider


def dense(provider: str) -> bool:
    """The vendor library's GEMM of unquantised weights, which a quantised one has to beat to be worth its error."""
    return vendor(provider) and re.search(r"F\.linear|\b(bf16|fp16)\b", provider) is not None


@dataclass(frozen=True)
class Case:
    """Everything that was measured for one operator and one set of axes: rounds, in each of which all took a turn."""

    op: str
    axes: Axes
    rows: Mapping[str, Row]

    @property
    def bytes(self) -> int:
        """What has to be moved at least; the same for all."""
        return next(iter(self.rows.values())).bytes

    def timed(self, provider: str) -> bool:
        return provider in self.rows and not self.rows[provider].error

    def peers(self) -> list[Row]:
        """Fastest first, without our own operators one by one."""
        peers = [r for name, r in self.rows.items() if name != LIMIT and not name.startswith(OURS) and not r.error]
        return sorted(peers, key=lambda r: (r.median_us, r.provider))

    def dense(self) -> Row | None:
        return next((r for r in self.peers() if dense(r.provider)), None)

    def ratios(self, above: str, below: str) -> list[float]:
        """Round by round. A run that was interrupted may lack the last sample of some providers."""
        pairs = zip(self.rows[above].samples_us, self.rows[below].samples_us, strict=False)
        return [a / b for a, b in pairs]


def cases(rows: Iterable[Row]) -> dict[Key, Case]:
    """In the order of the file."""
    found: dict[Key, dict[str, Row]] = {}
    for r in rows:
        providers = found.setdefault(r.key, {})
        if r.provider in providers:
            raise ValueError(f"{r.op} {dict(r.axes)}: {r.provider} stands there twice")
        providers[r.provider] = r
    return {key: Case(key[0], next(iter(rows.values())).axes, rows) for key, rows in found.items()}


@dataclass(frozen=True)
class Document:
    """One run on one machine."""

    name: str
    meta: Mapping[str, Any]
    device: Mapping[str, Any]
    protocol: Mapping[str, Any]
    cases: Mapping[Key, Case]

    @property
    def machine(self) -> tuple[tuple[str, Any], ...]:
        """What has to be equal for times to be comparable. Clocks, drivers and temperatures differ between runs."""
        return tuple((name, self.device.get(name)) for name in ("kind", "name", "threads", "isa", "sm", "sms"))


def parse(name: str, document: Mapping[str, Any]) -> Document:
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{name}: schema {document.get('schema')!r}, not {SCHEMA!r}")
    rows = [row(entry) for entry in document["results"]]
    return Document(name, document["meta"], document["device"], document["protocol"], cases(rows))


def read(path: Path) -> Document:
    return parse(path.name, json.loads(path.read_text()))


def together(documents: Sequence[Document]) -> Document:
    """Several runs as one, of which each gives a case one sample, its median: processes differ by more than rounds."""
    first = documents[0]
    merged: dict[Key, Case] = {}
    for key, case in first.cases.items():
        rows = {}
        for name, found in case.rows.items():
            others = [document.cases[key].rows.get(name) for document in documents if key in document.cases]
            errors = [r.error if r else "not measured" for r in others if r is None or r.error]
            medians = () if errors or len(others) < len(documents) else tuple(r.median_us for r in others if r)
            error = next(iter(errors), None if medians else "not in all runs")
            rows[name] = replace(found, samples_us=medians, error=error)
        merged[key] = replace(case, rows=rows)
    return replace(first, name=", ".join(document.name for document in documents), cases=merged)


@dataclass(frozen=True)
class Machine:
    """The runs of one machine; where two of them have a case, the later one's rounds count, whole."""

    documents: tuple[Document, ...]

    @property
    def device(self) -> Mapping[str, Any]:
        return self.documents[-1].device

    @property
    def title(self) -> str:
        device = self.device
        if device["kind"] == "cuda":
            return str(device["name"])
        threads = device.get("threads")
        return f"{device['name']}, {threads} thread{'s' * (threads != 1)}, {device.get('isa', '')}".rstrip(", ")

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", self.title.lower())).strip("-")

    @property
    def cases(self) -> list[Case]:
        merged: dict[Key, Case] = {}
        for document in self.documents:
            merged |= document.cases
        return list(merged.values())


def machines(documents: Iterable[Document]) -> list[Machine]:
    """Sorted, so that the order of the command line decides nothing."""
    groups: dict[object, list[Document]] = {}
    for document in sorted(documents, key=lambda d: (d.meta["utc"], d.name)):
        groups.setdefault(document.machine, []).append(document)
    found = sorted((Machine(tuple(group)) for group in groups.values()), key=lambda m: m.slug)
    if len({machine.slug for machine in found}) < len(found):
        raise ValueError(f"two machines have one name: {', '.join(machine.slug for machine in found)}")
    return found


def share_of_limit(case: Case, provider: str) -> float | None:
    """How much of what the machine can do, median of rounds."""
    if case.timed(LIMIT) and case.timed(provider):
        return median(case.ratios(LIMIT, provider))
    return None
