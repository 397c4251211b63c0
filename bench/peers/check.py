"""Holds the calls of the GPU adapters against the GPU peers without a GPU: ``python -m bench.peers.check SITE``.

SITE is what ``bench.peers.install`` made. Every adapter is built and called once with small tensors on the CPU. The
operators of shared objects are registered from the schemas that stand in them, so torch itself compares names, counts
and types of arguments; the functions of Python packages are compared with their source. Neither computes anything.
Where torch is the CUDA build of the target, ``--symbols`` also looks for symbols that it does not export.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import problems
from bench.peers import MODULES, libraries
from bench.peers.pins import STAGES
from bench.peers.signatures import Packages
from bench.problems.shared.provider import Provider

PACKAGES = ("humming", "gemlite", "quack", "flashinfer", "liger_kernel")
# They are not in the libraries as text: a compiler builds short strings from numbers.
NAMESPACES = {"vllm": "_C", "sgl_kernel": "sgl_kernel", "fbgemm_gpu": "fbgemm"}
H100_MULTIPROCESSORS = 132
SMALL: dict[str, int | str] = {
    **{"M": 4, "N": 256, "K": 512, "G": 128, "T": 4, "H": 256, "I": 128, "Hq": 4, "Hk": 2, "D": 64},
    **{"L": 2, "V": 64, "C": 8},
    "dtype": "bfloat16",
    "cache": "cold",
}


def cases(op: str) -> Iterator[dict[str, int | str]]:
    """Axes of an operator that take every branch of an adapter."""
    names = problems.OPERATORS[op].axes.split()
    kinds = [{"kind": kind} for kind in ("symmetric", "zero_point", "offset")] if "kind" in names else [{}]
    groups = [{}, {"G": SMALL["K"]}] if "G" in names else [{}]
    for kind in kinds:
        yield from (problems.OPERATORS[op].tiny | SMALL | kind | group for group in groups)


def schemas(library: Path) -> dict[str, str]:
    """The schemas that a shared object registers, by operator: texts between zero bytes with an arrow in them."""
    content, found = library.read_bytes(), {}
    arrow = content.find(b") -> ")
    while arrow >= 0:
        start, end = content.rfind(b"\0", 0, arrow) + 1, content.find(b"\0", arrow)
        operator = re.match(rb"([A-Za-z_]\w*)\(", content[start:end])
        if operator is not None:
            found[operator[1].decode()] = content[start:end].decode(errors="replace")
        arrow = content.find(b") -> ", end)
    return found


class Registered:
    """Stands in for ``libraries.load``: operators that return empty tensors, one for each result of their schema."""

    def __init__(self) -> None:
        self.fragments: dict[str, torch.library.Library] = {}

    def __call__(self, path: str, needs: tuple[str, ...] = ()) -> None:
        if path in self.fragments:
            return
        library = libraries.find(path)
        if library is None:
            raise FileNotFoundError(f"no {path}")
        namespace = NAMESPACES[path.split("/")[0]]
        fragment = self.fragments[path] = torch.library.Library(namespace, "FRAGMENT")
        for name, text in schemas(library).items():
            try:
                results = len(torch._C.parse_schema(f"{namespace}::{text}").returns)
            except RuntimeError:
                continue  # text that looks like a schema, or types of the library's own
            fragment.define(text)
            fragment.impl(name, lambda *args, results=results: self.result(results), "CPU")

    @staticmethod
    def result(count: int) -> Any:
        tensors = tuple(torch.empty(0) for _ in range(count))
        return None if count == 0 else tensors[0] if count == 1 else tensors


def providers() -> Iterator[Provider]:
    """Those for GPUs alone whose package is a pinned one."""
    pinned = {pin.name for stage in STAGES.values() for pin in stage.pins}
    for name in MODULES:
        for provider in importlib.import_module(name).PROVIDERS:
            if provider.devices == ("cuda",) and pinned & set(provider.requires):
                yield provider


def wrong_calls(site: Path) -> dict[str, str]:
    """What is wrong with each provider, "" where nothing is."""
    found = {}
    device = types.SimpleNamespace(multi_processor_count=H100_MULTIPROCESSORS)
    patches = (
        mock.patch.object(sys, "path", [str(site), *sys.path]),
        mock.patch.object(sys, "meta_path", [Packages(site, PACKAGES), *sys.meta_path]),
        mock.patch.object(libraries, "load", Registered()),
        mock.patch.object(torch.cuda, "get_device_properties", lambda index: device),
    )
    with patches[0], patches[1], patches[2], patches[3]:
        for provider in providers():
            key = f"{provider.name}, {provider.op}"
            found[key] = ""
            for axes in cases(provider.op):
                if provider.unsupported("cuda", axes) is None:
                    try:
                        provider.build(problems.make(provider.op, axes))()
                    except Exception as error:
                        found[key] = f"{type(error).__name__}: {error}"
    return found


def _symbols(*options: str) -> set[str]:
    lines = subprocess.run(["nm", "-D", *options], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if re.search(r" [A-Za-z] \S+$", line)}


def missing_symbols(library: Path) -> list[str]:
    """Symbols of C++ namespaces of torch, or of its C shims, that the running torch does not export."""
    of_torch = re.compile(r"_ZN?K?[A-Z]*\d*(c10|at|torch)|aoti_torch|torch_")
    exported = set()
    for path in (Path(torch.__file__).parent / "lib").glob("lib*.so"):
        if path.name.startswith(("libtorch", "libc10")):
            exported |= _symbols("--defined-only", str(path))
    return sorted(s for s in _symbols("--undefined-only", str(library)) - exported if of_torch.match(s))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers.check", description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, metavar="SITE")
    parser.add_argument("--symbols", action="store_true", help="also what the shared objects need of the running torch")
    options = parser.parse_args(arguments)
    wrong = wrong_calls(options.site)
    if options.symbols:
        for library in sorted((options.site / libraries.FOLDER).rglob("*.so")):
            wrong[f"symbols of {library.name}"] = ", ".join(missing_symbols(library))
    for name, reason in wrong.items():
        print(f"{name}: {reason or 'ok'}")
    sys.exit(any(wrong.values()))


if __name__ == "__main__":
    main()
