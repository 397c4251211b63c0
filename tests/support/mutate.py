"""Plants one fault at a time and asks whether the tests see it: `python -m tests.support.mutate FILE... --count 20`.

Works in a copy of the tree. A fault that no test sees survives; data/mutants.json holds the survivors that are known,
each equivalent to the original or a hole with its reason. Exit status: 1 with another survivor, 2 where the tests fail
without a fault or never read the file, else 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tests.support.mutations import Fault, faults

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ROOT / "tests/data/mutants.json"
LEFT_OUT = (".git", "build", "dist", "__pycache__", ".venv", ".pytest_cache", ".hypothesis", ".ruff_cache")


@dataclass(frozen=True)
class Selection:
    """What looks at files of a pattern: tests by patterns, where {stem} is the name of the file without extension."""

    pattern: str
    tests: tuple[str, ...]
    build: tuple[tuple[str, ...], ...] = ()


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/**/test_{name}.py" for name in names)


_TOOLS = "import sys, pathlib, torch; from tests.support.cuda import cuda_tools as c; "
_DEV = (
    _TOOLS + "c.checked(c.cmake(), '--preset', 'dev', '-DPython_EXECUTABLE=' + sys.executable, "
    "'-DCMAKE_MAKE_PROGRAM=' + c.ninja(), '-DQOPS_TORCH_DIR=' + str(pathlib.Path(torch.__file__).parent)); "
    "c.checked(c.cmake(), '--build', '--preset', 'dev')"
)
DEV = ((sys.executable, "-c", _DEV),)
EMULATED = ((sys.executable, "-c", _TOOLS + "c.build_emulated_operators()"),)
GEMM_ON_CUDA = _tests("cuda_int4_gemm", "cuda_int8_gemm", "cuda_int8_weight_only_gemm", "cuda_int4_weights")
# The first that fits.
SELECTIONS = (
    Selection("python/qops/models/decoder.py", _tests("proof", "generate", "hooks", "nn_inputs", "model", "families")),
    Selection("python/qops/check.py", _tests("check", "cli")),
    Selection("python/qops/models/quantize.py", _tests("quantize_plan", "families", "model", "saving")),
    Selection("python/qops/weights/*.py", _tests("weights_state", "weights", "weights_arguments")),
    Selection("python/qops/ops/*.py", _tests("{stem}", "bad_input", "properties")),
    Selection("python/qops/models/proof.py", _tests("proof")),
    Selection("python/qops/models/*.py", _tests("model", "families", "smoothing", "saving", "hooks")),
    Selection("python/qops/formats/gguf/blocks.py", _tests("gguf_blocks", "gguf_real")),
    Selection("python/qops/formats/gguf/*.py", _tests("gguf", "gguf_architectures")),
    Selection("python/qops/formats/*.py", _tests("gguf", "saving", "model")),
    Selection("python/qops/nn/*.py", _tests("nn", "nn_inputs", "safetensors", "offload")),
    Selection("python/qops/*.py", _tests("{stem}")),
    Selection(
        "csrc/binding/checks.*",
        _tests("bad_input", "overlap", "cuda_launch", "gradients", "rotary", "properties"),
        (*DEV, *EMULATED),
    ),
    Selection(
        "csrc/binding/device.h",
        _tests("quantize_int8", "threads", "cuda_launch", "cuda_ops", "cuda_int4_gemm"),
        (*DEV, *EMULATED),
    ),
    Selection("csrc/binding/plan.*", _tests("explain", "cuda_explain"), (*DEV, *EMULATED)),
    Selection("csrc/binding/*", _tests("{stem}", "properties"), DEV),
    Selection("csrc/cpu/*", _tests("{stem}", "properties"), DEV),
    Selection("csrc/cuda/weight_only_config.h", (*_tests("int4_config"), *GEMM_ON_CUDA), EMULATED),
    Selection("csrc/cuda/gpu.h", (*_tests("int4_config"), *GEMM_ON_CUDA), EMULATED),
    Selection("csrc/cuda/weight_only*", (*GEMM_ON_CUDA, *_tests("cuda_instances")), EMULATED),
    Selection("csrc/cuda/int*", (*GEMM_ON_CUDA, *_tests("cuda_instances")), EMULATED),
    Selection("csrc/cuda/launch.h", _tests("cuda_launch", "emulator", "cuda_ops"), EMULATED),
    Selection("csrc/cuda/*", _tests("cuda_ops", "cuda_alignment"), EMULATED),
    Selection("bench/problems/*", _tests("bench_run", "bench_models", "bench_timing")),
    Selection("bench/timing/*", _tests("bench_run", "bench_timing", "gpu_evidence")),
    Selection("bench/reporting/*", _tests("bench_report", "bench_compare")),
    Selection("bench/peers/*", _tests("bench_peers", "bench_models")),
    Selection("bench/gpu_evidence.py", _tests("gpu_evidence")),
    Selection("bench/*.py", _tests("bench_{stem}")),
)


class Unusable(Exception):
    """Faults of this file would show nothing."""


@dataclass
class Project:
    """A tree whose tests are run, the tests of its files, and its survivors that are known."""

    root: Path = ROOT
    selections: Sequence[Selection] = SELECTIONS
    known: Path = KNOWN
    patience: float = 60  # in seconds; five times what the tests take, if that is longer

    def selection(self, name: str) -> Selection:
        chosen = next((s for s in self.selections if fnmatch(name, s.pattern)), None)
        if chosen is None:
            raise Unusable(f"{name}: no entry of SELECTIONS fits")
        named = [test.format(stem=Path(name).stem) for test in chosen.tests]
        found = (path for test in named for path in sorted(self.root.glob(test)))
        tests = tuple(str(path.relative_to(self.root)) for path in found)
        if not tests:
            raise Unusable(f"{name}: none of {', '.join(named)} exists")
        return Selection(chosen.pattern, tests, chosen.build)

    def is_known(self, name: str, before: str, after: str) -> str | None:
        """Its class."""
        rows = json.loads(self.known.read_text())["survivors"] if self.known.exists() else []
        found = (row["class"] for row in rows if (row["file"], row["before"], row["after"]) == (name, before, after))
        return next(found, None)


def _brought(source: str, target: str) -> None:
    """Copies what differs, with a time of its own, so that a build sees how the fault of an interrupted run goes."""
    if not os.path.exists(target) or Path(source).read_bytes() != Path(target).read_bytes():
        shutil.copyfile(source, target)
        shutil.copymode(source, target)


class Copy:
    """Of a tree, where one file at a time has a fault."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.folder = folder
        ignored = shutil.ignore_patterns(*LEFT_OUT)
        shutil.copytree(project.root, folder, ignore=ignored, copy_function=_brought, symlinks=True, dirs_exist_ok=True)
        # No byte code: a fault of the same size in the same second would not be noticed.
        self.environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        path = (str(folder / "python"), str(folder), self.environment.get("PYTHONPATH", ""))
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))

    def run(self, command: Sequence[str], seconds: float | None = None) -> tuple[bool, str]:
        """Whether it succeeds, and what it printed; past its time it has failed, with everything that it started."""
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )
            try:
                succeeded = process.wait(seconds) == 0
            except subprocess.TimeoutExpired:
                succeeded = False
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output.seek(0)
            return succeeded, output.read()

    def build(self, selection: Selection) -> tuple[bool, str]:
        for command in selection.build:
            succeeded, output = self.run(command)
            if not succeeded:
                return False, output
        return True, ""

    def test(self, selection: Selection, seconds: float | None = None) -> tuple[bool, str]:
        # Not in random order: which test comes first decides how long a fault lives, and no more.
        pytest = (sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider")
        return self.run((*pytest, *selection.tests), seconds)


def outcome(copy: Copy, selection: Selection, path: Path, text: str, seconds: float) -> str:
    """`killed`, `survived` or `not built` of a file with this text, which then has its own again."""
    original = path.read_text()
    path.write_text(text)
    try:
        if not copy.build(selection)[0]:
            return "not built"
        return "survived" if copy.test(selection, seconds)[0] else "killed"
    finally:
        path.write_text(original)


def look_at(project: Project, copy: Copy, name: str, count: int, seed: int) -> int:
    """Plants faults in a file; the number of new survivors."""
    selection, path = project.selection(name), copy.folder / name
    text = path.read_text()
    for what in (copy.build, copy.test):
        start = time.monotonic()
        succeeded, output = what(selection)
        if not succeeded:
            print(output[-4000:], file=sys.stderr)
            raise Unusable(f"{name}: its {what.__name__} fails without a fault")
    seconds = max(project.patience, 5 * (time.monotonic() - start))
    broken = "raise RuntimeError\n" if name.endswith(".py") else "#error planted\n"
    if outcome(copy, selection, path, text + "\n" + broken, seconds) == "survived":
        raise Unusable(f"{name}: its tests never read it")

    drawn: list[Fault] = faults(name, text)
    random.Random(f"{seed} {name}").shuffle(drawn)
    tally = dict.fromkeys(("killed", "equivalent", "hole", "survived"), 0)
    for fault in drawn:
        if sum(tally.values()) == count:
            break
        result = outcome(copy, selection, path, fault.planted(text), seconds)
        if result == "not built":
            continue
        line, before, after = fault.lines(text)
        if result == "survived":
            result = project.is_known(name, before, after) or result
        tally[result] += 1
        print(f"{result:<10}  {name}:{line}\n    {before}\n    {after}", flush=True)
    print(f"{name}: {', '.join(f'{number} {result}' for result, number in tally.items() if number)}", flush=True)
    return tally["survived"]


def mutate(project: Project, names: Iterable[str], count: int, seed: int, work: Path | None = None) -> int:
    """The exit status."""
    with tempfile.TemporaryDirectory(prefix="mutate-") if work is None else nullcontext(str(work)) as folder:
        copy = Copy(project, Path(folder))
        survivors = sum(look_at(project, copy, name, count, seed) for name in names)
    if survivors:
        print(f"{survivors} new survivors: write a test for each, or class it in {project.known.name}", file=sys.stderr)
    return 1 if survivors else 0


def main() -> int:
    about = (__doc__ or "").partition("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.support.mutate", description=about)
    parser.add_argument("files", nargs="+", metavar="FILE", help="from the root of the tree")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=20, help="faults in each file")
    parser.add_argument(
        "--work", type=Path, help="where the copy goes and stays, with what was built; else it is deleted"
    )
    arguments = parser.parse_args()
    try:
        return mutate(Project(), arguments.files, arguments.count, arguments.seed, arguments.work)
    except Unusable as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
