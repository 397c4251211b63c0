"""``python -m qops info``: what this installation is, to put into a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from qops import build_info


def info() -> str:
    """Versions, build state, ISA levels and devices, one ``name: value`` a line."""
    build = build_info()
    native = "CPU kernels only"
    if build["cuda"]:
        native = f"CPU and CUDA kernels for {build['cuda_archs']} by nvcc {build['nvcc']}"
    lines = {
        "qops": build["version"],
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": f"{build['torch']} (built with {build['built_with_torch']})",
        "transformers": _version("transformers"),
        "build": f"{native}, {build['compiler']}",
        "isa": f"{build['isa']} (available: {build['isa_available']})",
        "cpu": f"{cpu_name()}, {build['threads']} threads",
    }
    for index in range(torch.cuda.device_count()):
        use = "" if build["cuda"] else " (not used: no CUDA kernels in this build)"
        lines[f"cuda:{index}"] = torch.cuda.get_device_name(index) + use
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def cpu_name() -> str:
    """As the kernel reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m qops", description="Tools of the qops package.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("info", help="print versions, build state, ISA levels and devices")
    parser.parse_args(argv)
    print(info())
    return 0


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
