"""Everything that a GPU has to show, in stages that each end inside eight minutes.

    python -m bench.gpu_evidence --out DIR                        # all stages; those that have passed are not run again
    python -m bench.gpu_evidence --out DIR --stage tests,sanitize
    python -m bench.gpu_evidence --out DIR --modules FOLDER       # _C.abi3.so and _C_cuda.abi3.so built elsewhere
    python -m bench.gpu_evidence --out DIR --stage decode --depth 8
    python -m bench.gpu_evidence --out DIR --stage build,install-peers,peers --peers FOLDER

    build         installs this tree into build/gpu_evidence, without a network; or takes modules built elsewhere
    check         `python -m qops check`: every kernel against its contract, at each level of the CPU and on the GPUs
    install-peers what bench.peers.collect has put into FOLDER; one folder after the other, if they come in parts
    tests         the CUDA operators against the CPU's bits, streams, graphs, compilation, tensors past 2^31 elements
    sanitize      compute-sanitizer's memcheck, racecheck, initcheck and synccheck on a part of the tests
    bench-norms   bench.run on everything that is bound by memory, with every peer that is installed
    bench-gemms   the same for the products
    chain         the W8A8 chain of a decoder layer (add, norm, int8, product, ..., SiLU-mul, int8, product), against
                  vLLM's operators and a dense layer, eager and compiled
    decode        a decode loop of a Llama 3 8B with random 4-bit weights, and of its dense twin by cuBLAS, as CUDA
                  graphs; tokens a second are M / time; --depth N: with N layers, for a GPU that does not hold all 32
    peers         limits, cuBLAS and the peers alone, for all operators: nothing of ours has to work for it

DIR gets evidence.json (every step: what it was, how it ended, how long it took), evidence.log (what the steps printed)
and one JSON document for each benchmark. A tool that this machine does not have is a result, "unavailable", no failure.
Without a GPU some of the tests run in the emulator, and sanitize and the benchmarks are unavailable: so the way there
is tried.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu_evidence" / "site"
PEERS = ROOT / "build" / "gpu_evidence" / "peers"
SCHEMA = "qops-gpu-evidence-1"
STAGE_SECONDS = 460.0
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# A few minutes under a sanitizer: every kernel, aligned and not, with and without values past the row's end.
SANITIZED_TESTS = "gpu and (begin_anywhere or behind_a_row or heads or every_group_size or every_small_number)"
GEMMS = ("int4_gemm", "int8_gemm", "int4_dequantize")
ROW_OPS = (
    *("rms_norm", "add_rms_norm", "rms_norm_int8", "add_rms_norm_int8", "quantize_int8", "quantize_int8_asym"),
    *("quantize_int8_static", "rotary", "qk_norm_rotary", "silu_mul", "silu_mul_int8"),
)


@dataclass
class Step:
    """How one command ended: passed, failed, timed out, or unavailable, with the reason."""

    stage: str
    name: str
    command: list[str]
    status: str
    seconds: float
    note: str
    source: str
    utc: str


@dataclass
class Evidence:
    """What this machine has shown so far."""

    out: Path
    device: str
    source: str
    modules: Path | None = None
    peers: Path | None = None
    commit: str = ""
    depth: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    deadline: float = 0.0

    @property
    def has_gpu(self) -> bool:
        return bool(self.device)

    def passed(self, stage: str) -> bool:
        """Whether it has passed, of this source."""
        steps = [step for step in self.steps if step.stage == stage]
        return bool(steps) and all((step.status, step.source) == ("passed", self.source) for step in steps)

    def record(self, stage: str, name: str, command: Sequence[str], status: str, seconds: float, note: str) -> None:
        utc = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.steps = [step for step in self.steps if (step.stage, step.name) != (stage, name)]
        self.steps.append(Step(stage, name, list(command), status, round(seconds, 1), note, self.source, utc))
        document = {
            "schema": SCHEMA,
            "device": self.device,
            "versions": self.versions,
            "steps": list(map(asdict, self.steps)),
        }
        whole = self.out / "evidence.json.part"
        whole.write_text(json.dumps(document, indent=1) + "\n")
        whole.replace(self.out / "evidence.json")

    def run(
        self,
        stage: str,
        name: str,
        command: Sequence[str],
        limit: float = STAGE_SECONDS,
        env: Mapping[str, str] | None = None,
        unavailable: str = r"(?!)",
    ) -> bool:
        """Runs a command in the root of the tree, with what was built before the tree's own modules, and records it.

        Args:
            stage, name: of the step.
            command: ends as soon as it fails, hangs or the stage's time is over.
            limit: seconds.
            env: on top of this process's.
            unavailable: where this matches what a failed command printed, the machine lacks something.

        Returns:
            Whether it passed.
        """
        limit = max(1.0, min(limit, self.deadline - time.monotonic()))
        print(f"\n=== {stage}, {name}: at most {limit:.0f} s\n+ {' '.join(command)}", flush=True)
        start = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": f"{SITE}{os.pathsep}{PEERS}", "PYTHONUNBUFFERED": "1", **(env or {})}
        lines: list[str] = []
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except FileNotFoundError:
            self.record(stage, name, command, "unavailable", 0.0, f"{command[0]} is not installed")
            return False
        timer = signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            assert process.stdout is not None
            with (self.out / "evidence.log").open("a") as log:
                log.write(f"\n=== {stage}, {name}: {' '.join(command)}\n")
                for line in process.stdout:
                    lines.append(line)
                    log.write(line)
            status = {0: "passed"}.get(process.wait(), "failed")
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, timer)
        seconds = time.monotonic() - start
        text = "".join(lines)
        if status == "failed":
            print("".join(lines[-25:]), end="")
            status = "timed out" if seconds >= limit else "unavailable" if re.search(unavailable, text) else "failed"
        self.record(stage, name, command, status, seconds, summary(lines, unavailable))
        print(f"=== {stage}, {name}: {status} in {seconds:.0f} s", flush=True)
        return status == "passed"


def summary(lines: Sequence[str], unavailable: str) -> str:
    """The line that says it all: the reason, what pytest counted, else the last."""
    for pattern in (unavailable, r"\d+ (passed|failed|skipped).* in "):
        for line in reversed(lines):
            if re.search(pattern, line):
                return line.strip(" =\n")[:160]
    return next((line.strip()[:160] for line in reversed(lines) if line.strip()), "")


def versions(commit: str) -> dict[str, str]:
    """Of what the figures depend on, as far as this machine has it; ``commit`` where git does not know it."""
    import torch

    found = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda or ""}
    for name, command in (
        ("nvcc", ["nvcc", "--version"]),
        ("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        ("git_sha", ["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
    ):
        if shutil.which(command[0]):
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in run.stdout.splitlines() if line.strip()]
            found[name] = lines[-1].strip() if run.returncode == 0 and lines else ""
    return {**found, "git_sha": found.get("git_sha") or commit}


def fingerprint() -> str:
    """Of the sources that a build, a test or a benchmark is made of."""
    digest = hashlib.sha256()
    paths = [ROOT / name for name in ("CMakeLists.txt", "pyproject.toml", "setup.py")]
    paths += (path for folder in ("csrc", "python", "tests", "bench") for path in sorted((ROOT / folder).rglob("*")))
    for path in paths:
        if path.suffix in (".h", ".cuh", ".cu", ".cpp", ".py", ".toml", ".txt") and path.is_file():
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# --- stages ----------------------------------------------------------------------------------------------------------


def build(evidence: Evidence) -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    if evidence.modules is not None:
        modules = [evidence.modules / f"{name}.abi3.so" for name in ("_C", "_C_cuda")]
        shutil.copytree(ROOT / "python" / "qops", SITE / "qops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        for module in modules:
            if module.is_file():
                shutil.copy(module, SITE / "qops")
    else:
        pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
        if not evidence.run("build", "pip install", [*pip, "--target", str(SITE), "."]):
            return
    loads = "import qops, json; print(json.dumps(qops.build_info()))"
    if evidence.has_gpu:
        loads += "; assert qops.build_info()['cuda'], 'no CUDA kernels'"
    evidence.run("build", "import", [sys.executable, "-c", loads])


def check(evidence: Evidence) -> None:
    evidence.run("check", "python -m qops check", [sys.executable, "-m", "qops", "check"])


def install_peers(evidence: Evidence) -> None:
    if evidence.peers is not None:
        command = [sys.executable, "-m", "bench.peers.install", str(evidence.peers.resolve()), "--to", str(PEERS)]
        evidence.run("install-peers", evidence.peers.name, command)


def cuda_tests() -> list[str]:
    """A new operator's file is run without being listed."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_cuda_*.py"))


def tests(evidence: Evidence) -> None:
    files = cuda_tests()
    # In the emulator a few, to try the way there: pytest runs all of them anywhere.
    chosen = "gpu" if evidence.has_gpu else "not gpu and begin_anywhere"
    evidence.run(
        "tests", chosen, [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "-k", chosen, *files]
    )


def sanitize(evidence: Evidence) -> None:
    if not evidence.has_gpu:
        return evidence.record("sanitize", "compute-sanitizer", [], "unavailable", 0.0, "no GPU")
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SANITIZED_TESTS]
    for index, tool in enumerate(SANITIZERS):
        share = (evidence.deadline - time.monotonic()) / (len(SANITIZERS) - index)
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", *pytest, *cuda_tests()]
        # torch's allocator would hand out parts of large blocks, whose bounds the tool does not know.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        evidence.run(
            "sanitize", tool, command, share, env, r"Device not supported|Unable to (find|initialize)|not supported on"
        )


def bench_norms(evidence: Evidence) -> None:
    bench(evidence, "bench-norms", ROW_OPS)


def bench_gemms(evidence: Evidence) -> None:
    bench(evidence, "bench-gemms", GEMMS)


def chain(evidence: Evidence) -> None:
    bench(evidence, "chain", ("int8_layer",))


def decode(evidence: Evidence) -> None:
    depth = () if evidence.depth is None else ("--depth", str(evidence.depth))
    bench(evidence, "decode", ("int4_decode",), *depth)


def peers(evidence: Evidence) -> None:
    bench(evidence, "peers", (*GEMMS, *ROW_OPS), "--providers", "!qops")


def bench(evidence: Evidence, stage: str, ops: Sequence[str], *more: str) -> None:
    if not evidence.has_gpu:
        return evidence.record(stage, "bench.run", [], "unavailable", 0.0, "no GPU")
    budget = evidence.deadline - time.monotonic() - 40  # the case that has begun, and its report
    command = [sys.executable, "-m", "bench.run", *ops, "--device", "cuda", "--budget-seconds", f"{budget:.0f}", *more]
    command += ["--commit", evidence.commit] if evidence.commit else []
    evidence.run(stage, "bench.run", [*command, "--out", str(evidence.out / f"{stage}.json")])


STAGES: dict[str, Callable[[Evidence], None]] = {
    "build": build,
    "check": check,
    "install-peers": install_peers,
    "tests": tests,
    "sanitize": sanitize,
    "bench-norms": bench_norms,
    "bench-gemms": bench_gemms,
    "chain": chain,
    "decode": decode,
    "peers": peers,
}


def table(evidence: Evidence) -> str:
    rows = [("stage", "step", "result", "s", "")]
    rows += [(s.stage, s.name, s.status, f"{s.seconds:.0f}", s.note) for s in evidence.steps]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join((*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4])).rstrip() for row in rows
    ]
    return "\n".join([evidence.device or "no GPU: the emulator stands in for it", *lines])


def load(out: Path) -> Evidence:
    """What is there already, as far as it was seen on this device."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    evidence = Evidence(out, device, fingerprint())
    file = out / "evidence.json"
    if file.is_file():
        document = json.loads(file.read_text())
        if document["schema"] == SCHEMA and document["device"] == device:
            evidence.steps = [Step(**step) for step in document["steps"]]
    return evidence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages that are asked for and returns the exit code: 1 where anything failed."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_evidence", description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets the results; kept and continued")
    parser.add_argument("--stage", default="all", help=f"all, or some of {', '.join(STAGES)}")
    parser.add_argument("--modules", type=Path, metavar="FOLDER", help="_C.abi3.so and _C_cuda.abi3.so built elsewhere")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="archives of bench.peers.collect")
    parser.add_argument("--depth", type=int, metavar="N", help="layers of the model that decodes; default: all 32")
    parser.add_argument("--commit", default="", metavar="SHA", help="of this tree, where it is a copy without .git")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    args = parser.parse_args(argv)
    chosen = list(STAGES) if args.stage == "all" else args.stage.split(",")
    if unknown := [stage for stage in chosen if stage not in STAGES]:
        parser.error(f"--stage: {', '.join(unknown)} is none of {', '.join(STAGES)}")
    if args.modules is not None and not (args.modules / "_C.abi3.so").is_file():
        parser.error(f"--modules: {args.modules} holds no _C.abi3.so")

    args.out.mkdir(parents=True, exist_ok=True)
    evidence = load(args.out.resolve())
    evidence.modules, evidence.peers, evidence.commit = args.modules, args.peers, args.commit
    evidence.depth = args.depth
    evidence.versions = versions(args.commit)
    for stage in chosen:
        kept = SITE.is_dir() if stage == "build" else stage != "install-peers"
        if kept and evidence.passed(stage) and not args.again:
            print(f"=== {stage}: has passed", flush=True)
            continue
        evidence.deadline = time.monotonic() + STAGE_SECONDS
        STAGES[stage](evidence)
        if stage == "build" and not evidence.passed(stage):
            break
    print(f"\n{table(evidence)}")
    return int(any(step.status in ("failed", "timed out") for step in evidence.steps if step.stage in chosen))


if __name__ == "__main__":
    sys.exit(main())
