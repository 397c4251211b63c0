"""``python -m qops info``: what this installation is, to put into a bug report; ``check`` proves its kernels;
``inspect`` tells what a checkpoint holds. The script ``qops`` does the same."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from qops import build_info, check

_DTYPES = ("float32", "bfloat16", "float16")


def info() -> str:
    """Versions, build state, ISA levels and devices, one ``name: value`` a line."""
    build = build_info()
    native = "CPU kernels only"
    if build["cuda"]:
        native = f"CPU and CUDA kernels for {build['cuda_archs']} by nvcc {build['nvcc']}"
    if build["cuda_reason"]:
        native += f" ({build['cuda_reason']})"
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
        why = check.why_unused(index)
        lines[f"cuda:{index}"] = torch.cuda.get_device_name(index) + (f" (not used: {why})" if why else "")
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
    program = "qops" if Path(sys.argv[0]).name == "qops" else "python -m qops"
    parser = argparse.ArgumentParser(prog=program, description="Tools of the qops package.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("info", help="print versions, build state, ISA levels and devices")
    checked = commands.add_parser("check", help="prove every kernel on this machine, at each ISA level and on each GPU")
    checked.add_argument("--op", metavar="OPERATOR", help="this one alone")
    checked.add_argument("--at", metavar="PLACE", help="one ISA level or GPU alone, e.g. avx2 or cuda:0")
    checked.add_argument("--seed", type=_seed, default=0, help="of the inputs; default 0")
    checked.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    inspected = commands.add_parser("inspect", help="print what a checkpoint holds and becomes, without loading it")
    inspected.add_argument("path", metavar="PATH", help="a GGUF file, a folder, or a repository of the hub")
    inspected.add_argument("--dtype", choices=_DTYPES, help="of the model; default: the checkpoint's own")
    inspected.add_argument("--zero-add", choices=("word", "nibble", "none"), help="as load_model's zero_add, of GPTQ")
    inspected.add_argument(
        "--symmetric", action="store_true", default=None, help="as load_model's symmetric, of AWQ without qzeros"
    )
    inspected.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if args.command == "info":
        print(info())
        return 0
    if args.command == "inspect":
        return _inspect(args)
    for option, value, known in (("--op", args.op, check.operators()), ("--at", args.at, check.places())):
        if value is not None and value not in known:
            checked.error(f"{option} must be one of {', '.join(known)}, got {value}")
    build = build_info()
    machine = f"qops {build['version']}, torch {build['torch']}, {cpu_name()}, {build['threads']} threads"
    return check.run(partial(print, flush=True), machine, info(), args.op, args.at, args.seed, args.json)


def _inspect(args: argparse.Namespace) -> int:
    from qops.models.inspect import inspect_checkpoint

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    try:
        found = inspect_checkpoint(args.path, dtype, zero_add=args.zero_add, symmetric=args.symmetric)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"qops inspect: {error}", file=sys.stderr)
        return 1
    try:
        print(found.json() if args.json else found, flush=True)
    except BrokenPipeError:  # who reads has seen enough; what Python flushes when it ends goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _seed(text: str) -> int:
    # 100,000 times as much, for the cases of a seed, is what torch.Generator.manual_seed takes.
    if not 0 <= (value := int(text)) < 2**46:
        raise argparse.ArgumentTypeError(f"must be 0 ... 2**46 - 1, got {value}")
    return value


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
