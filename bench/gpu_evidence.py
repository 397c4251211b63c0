"""Everything that a GPU has to show, the most telling first, in the minutes that there are.

    python -m bench.gpu_evidence --out DIR                        # 15 minutes; what has passed is not run again
    python -m bench.gpu_evidence --out DIR --minutes 9
    python -m bench.gpu_evidence --out DIR --stage tests,memcheck
    python -m bench.gpu_evidence --out DIR --modules FOLDER       # _C.abi3.so and _C_cuda.abi3.so built elsewhere
    python -m bench.gpu_evidence --out DIR --stage install-peers,build,peers --peers FOLDER

    install-peers what bench.peers.collect has put into FOLDER; one folder after the other, if they come in parts
    build         installs this tree into build/gpu_evidence, without a network; or takes modules built elsewhere. If
                  that fails it tries without CUDA kernels, so that the peers can be measured
    check         `python -m qops check`: every kernel against its contract, at each level of the CPU and on the GPUs
    tests         the CUDA operators against the CPU's bits, streams, graphs, tensors past 2^31 elements; a process for
                  each file, side by side
    gemms         int4_gemm, int8_gemm and int4_int8_gemm against cuBLAS, on the four layers of a Llama 3 8B
    rows          everything that is bound by memory, at one token and at many
    decode        a decode loop of a Llama 3 8B with random 4-bit weights, and of its dense twin by cuBLAS, as CUDA
                  graphs; tokens a second are M / time; --depth N: with N layers; all 32 where there is time
    memcheck      compute-sanitizer on a part of the tests; also racecheck, initcheck and synccheck, last of all
    chain         the W8A8 chain of a decoder layer against vLLM's operators and a dense layer, eager and compiled
    peers         limits, cuBLAS and the peers alone, for all operators: nothing of ours has to work for it
    profile       ncu on int4_gemm, int8_gemm and qk_norm_rotary

A stage ends when its share of the time is over, and begins if a third of its share is left; with more than 15 minutes
the shares grow. A fault costs a test file, a provider or an operator: each has a process of its own. DIR gets
evidence.json (every step: what it was, how it ended, what failed in it), evidence.log (what the steps printed) and one
JSON document for each benchmark, all written as results come. A tool that this machine does not have is a result,
"unavailable", no failure. The exit status is 0 if all has passed, 1 if anything failed or timed out, 3 if only time was
short, 130 if interrupted.

Without a GPU this is a rehearsal: the same steps in the emulator, of each a little, and no speeds.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.timing.evidence import PEERS, ROOT, SCHEMA, SITE, Evidence, Step

USUAL_MINUTES, MOST_MINUTES = 15.0, 24 * 60
# For what comes after a stage: the table, and the machine's return.
RESERVED_SECONDS = 10.0
# Of one request to a provider: some tune a kernel for minutes at its first call.
PROVIDER_SECONDS = 30.0
# A whole model of 32 layers and its dense twin take minutes to make and to verify.
WHOLE_MODEL_SECONDS, PART_OF_THE_MODEL = 240.0, 8
# Files without a test for a GPU: they would have shown nothing. Of the others, what inductor compiles takes minutes.
WITHOUT_GPU = ("test_cuda_compile", "test_cuda_instances", "test_cuda_missing", "test_cuda_slots")
GPU_TESTS = "gpu and not compile"
REHEARSED_TESTS = "not gpu and begin_anywhere"
# A few minutes under a sanitizer: every kernel, aligned and not, with and without values past the row's end.
SANITIZED_TESTS = "gpu and (begin_anywhere or behind_a_row or heads or every_group_size or every_small_number)"
# WITHOUT_CUDA_KERNEL, which nobody can import before qops is built.
WITHOUT_KERNEL = ("!attention_block", "!decode_attention", "!mlp_block")
# The others' names begin with the type of a weight.
ROW_OPS = ("!int*", *WITHOUT_KERNEL)
# Models have stages of their own.
NOT_OF_PEERS = ("!int8_layer", "!int4_decode", *WITHOUT_KERNEL)
LAYERS = "llama3-8b qkv,llama3-8b o,llama3-8b gate_up,llama3-8b down"
PROFILED = [(op, rows) for op in ("int4_gemm", "int8_gemm") for rows in (1, 64, 4096)] + [("qk_norm_rotary", 4096)]


def not_installed(*packages: str) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


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


def install_peers(evidence: Evidence) -> None:
    if evidence.peers is not None:
        command = [sys.executable, "-m", "bench.peers.install", str(evidence.peers.resolve()), "--to", str(PEERS)]
        evidence.run("install-peers", evidence.peers.name, command)


def build(evidence: Evidence) -> None:
    evidence.steps = [step for step in evidence.steps if step.stage != "build"]  # each try has steps of its own
    evidence.has_qops = install(evidence, "")
    evidence.has_kernels = evidence.has_qops
    if evidence.has_qops and evidence.has_gpu:
        loads = "import qops; assert qops.build_info()['cuda'], 'no CUDA kernels'"
        evidence.has_kernels = evidence.run("build", "CUDA kernels", [sys.executable, "-c", loads])
    elif not evidence.has_qops:
        evidence.has_qops = install(evidence, " without CUDA")


def install(evidence: Evidence, without: str) -> bool:
    """Whether it can be imported."""
    shutil.rmtree(SITE, ignore_errors=True)
    if evidence.modules is not None:
        shutil.copytree(ROOT / "python" / "qops", SITE / "qops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        for module in [evidence.modules / f"{name}.abi3.so" for name in ("_C", *(() if without else ("_C_cuda",)))]:
            if module.is_file():
                shutil.copy(module, SITE / "qops")
    else:
        pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
        env = {"QOPS_CUDA": "OFF"} if without else {}
        if not evidence.run("build", f"pip install{without}", [*pip, "--target", str(SITE), "."], env=env):
            return False
    loads = "import qops, json; print(json.dumps(qops.build_info()))"
    return evidence.run("build", f"import{without}", [sys.executable, "-c", loads])


def check(evidence: Evidence) -> None:
    evidence.run("check", "python -m qops check", [sys.executable, "-m", "qops", "check"])


def cuda_tests() -> list[str]:
    """A new operator's file is run without being listed."""
    files = (path for path in (ROOT / "tests/cuda").rglob("test_cuda_*.py") if path.stem not in WITHOUT_GPU)
    return sorted(str(path.relative_to(ROOT)) for path in files)


def pytest(chosen: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-k", chosen]


def tests(evidence: Evidence) -> None:
    files, chosen, at_a_time = cuda_tests(), GPU_TESTS, len(cuda_tests())
    if not evidence.has_gpu:
        named = REHEARSED_TESTS.rpartition(" ")[2]
        files, chosen, at_a_time = [f for f in files if named in (ROOT / f).read_text()], REHEARSED_TESTS, 2
    share = evidence.left()
    if not evidence.has_gpu:  # two after two: each has the share
        evidence.deadline += (len(files) + 1) // 2 * share
    with ThreadPoolExecutor(at_a_time) as pool:
        left = [file for file in files if not evidence.passed("tests", file)]
        list(pool.map(lambda file: evidence.run_tests("tests", file, [*pytest(chosen), file], share), left))


def sanitize(tool: str) -> Callable[[Evidence], None]:
    def stage(evidence: Evidence) -> None:
        if not evidence.has_gpu:
            return evidence.record(tool, "compute-sanitizer", [], "unavailable", 0.0, "no GPU")
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99"]
        # torch's allocator would hand out parts of large blocks, whose bounds the tool does not know.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        refused = r"Device not supported|Unable to (find|initialize)|not supported on"
        evidence.run(
            tool, "compute-sanitizer", [*command, *pytest(SANITIZED_TESTS), "-x", *cuda_tests()],
            env=env, unavailable=refused,
        )  # fmt: skip

    return stage


def profile(evidence: Evidence) -> None:
    if not evidence.has_gpu:
        return evidence.record("profile", "ncu", [], "unavailable", 0.0, "no GPU")
    sections = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats")
    ncu = ["ncu", "--kernel-name-base", "demangled", "--kernel-name", "regex:qops", "--launch-count", "4"]
    ncu += [word for section in sections for word in ("--section", section)]
    for index, (op, rows) in enumerate(PROFILED):
        once = [sys.executable, "-m", "bench.timing.once", op, "--rows", str(rows), "--device", "cuda"]
        share = evidence.left() / (len(PROFILED) - index)
        refused = r"ERR_NVGPUCTRPERM|not supported|No kernels were profiled.*permission"
        if not evidence.passed("profile", f"{op}, {rows}"):
            evidence.run("profile", f"{op}, {rows}", [*ncu, *once], share, unavailable=refused)


def bench(stage: str, ops: Sequence[str], *more: str, providers: str = "") -> Callable[[Evidence], None]:
    """``more`` says which cases a GPU has; the emulator has one of each operator."""

    def run(evidence: Evidence) -> None:
        file = evidence.out / f"{stage}.json"
        command = [sys.executable, "-m", "bench.run", *ops, "--device", evidence.kind, "--quick"]
        command += ["--providers", providers] if providers else []
        command += more if evidence.has_gpu else ()
        if stage == "decode" and evidence.has_gpu and (depth := depth_of(evidence)) is not None:
            command += ["--depth", str(depth)]
        command += ["--commit", evidence.commit] if evidence.commit else []
        # It ends by itself, and reports; a case that has no time is not begun.
        left = evidence.left()
        command += ["--budget-seconds", f"{0.8 * left:.0f}", "--end-seconds", f"{0.9 * left:.0f}"]
        command += ["--timeout-seconds", f"{PROVIDER_SECONDS:.0f}"]
        evidence.run_bench(stage, [*command, "--out", str(file)], file, ours="" if stage == "peers" else "qops")

    return run


def depth_of(evidence: Evidence) -> int | None:
    """As asked, else of what there is time for; None is the whole model."""
    return evidence.depth or (PART_OF_THE_MODEL if evidence.left() < WHOLE_MODEL_SECONDS else None)


@dataclass(frozen=True)
class Stage:
    """What runs, for how many seconds of a quarter of an hour, and whether our kernels have to work.

    In a rehearsal a file that hangs costs its share; benchmarks have more, as processes take long to start there.
    """

    run: Callable[[Evidence], None]
    seconds: float
    needs_kernels: bool = True
    rehearsed_seconds: float = 240


ROWS = ("--rows", "1,16,64,256,1024,4096")
EAGER = "qops,transformers formula,torch eager"
# By value. A build from source may take what the last stages would have had.
STAGES: dict[str, Stage] = {
    "install-peers": Stage(install_peers, 30, needs_kernels=False),
    "build": Stage(build, 300, needs_kernels=False),
    "check": Stage(check, 60),
    "tests": Stage(tests, 120, rehearsed_seconds=75),
    "gemms": Stage(
        bench(
            "gemms", ("int4_gemm", "int8_gemm", "int4_int8_gemm"), "--layers", LAYERS, *ROWS, providers="qops,cublas*"
        ),
        165,
    ),
    "int8-weights": Stage(
        bench(
            "int8-weights",
            ("int8_weight_only_gemm",),
            *("--layers", LAYERS, "--rows", "1,16,64,1024"),
            providers="qops,cublas*",
        ),
        45,
    ),
    "rows": Stage(bench("rows", ROW_OPS, "--rows", "1,4096", providers=EAGER), 60),
    "decode": Stage(bench("decode", ("int4_decode",)), 75),
    "memcheck": Stage(sanitize("memcheck"), 90),
    "chain": Stage(bench("chain", ("int8_layer",)), 45),
    "peers": Stage(bench("peers", NOT_OF_PEERS, providers="!qops*"), 75, needs_kernels=False),
    "profile": Stage(profile, 75),
    "racecheck": Stage(sanitize("racecheck"), 60),
    "initcheck": Stage(sanitize("initcheck"), 60),
    "synccheck": Stage(sanitize("synccheck"), 60),
}


def run_stages(evidence: Evidence, chosen: Sequence[str], minutes: float, again: bool = False) -> None:
    """What has not been tried first, by value; then what has failed before."""
    end = time.monotonic() + 60 * minutes - RESERVED_SECONDS
    first = ("install-peers", "build")
    tried = {name for name in chosen if name not in first and evidence.of(name) and not again}
    left_out = {s.stage for s in evidence.steps if s.status == "left out"}
    for name in sorted(chosen, key=lambda name: name in tried - left_out):
        if evidence.interrupted.is_set():
            return
        stage = STAGES[name]
        kept = SITE.is_dir() if name == "build" else name != "install-peers"
        if kept and not again and evidence.passed(name):
            print(f"=== {name}: has passed", flush=True)
            continue
        seconds = stage.seconds if evidence.has_gpu else stage.rehearsed_seconds
        share = seconds * max(1.0, minutes / USUAL_MINUTES)
        left = end - time.monotonic()
        if not evidence.has_qops or (stage.needs_kernels and not evidence.has_kernels):
            evidence.record(name, "all", [], "left out", 0.0, "the build has failed")
        elif left < share / 3:
            evidence.record(name, "all", [], "left out", 0.0, f"{max(left, 0):.0f} s are left of {60 * minutes:.0f}")
        else:
            evidence.steps = [s for s in evidence.steps if (s.stage, s.status) != (name, "left out")]
            evidence.deadline = time.monotonic() + min(share, left)
            stage.run(evidence)


def status(evidence: Evidence, chosen: Sequence[str]) -> int:
    """Of the process."""
    found = {step.status for step in evidence.steps if step.stage in chosen}
    return 1 if found & {"failed", "timed out"} else 3 if "left out" in found else 0


def table(evidence: Evidence) -> str:
    rows = [("stage", "step", "result", "s", "")]
    rows += [(s.stage, s.name, s.status, f"{s.seconds:.0f}", s.note[:200]) for s in evidence.steps]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join((*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4])).rstrip() for row in rows
    ]
    lines += [f"failed: {name}" for s in evidence.steps for name in s.failed]
    return "\n".join([evidence.device if evidence.has_gpu else "no GPU: a rehearsal in the emulator", *lines])


def load(out: Path) -> Evidence:
    """What is there already, as far as it was seen on this device."""
    import torch

    has_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if has_gpu else ""
    evidence = Evidence(out, "cuda" if has_gpu else "emulated", device, fingerprint())
    file = out / "evidence.json"
    if file.is_file():
        document = json.loads(file.read_text())
        if document["schema"] == SCHEMA and document["device"] == device:
            evidence.steps = [Step(**step) for step in document["steps"]]
    return evidence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages that are asked for and returns the exit status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_evidence", description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets the results; kept and continued")
    parser.add_argument("--minutes", type=float, default=USUAL_MINUTES, metavar="N", help="that there are; default 15")
    parser.add_argument("--stage", default="all", help=f"all, or some of {', '.join(STAGES)}")
    parser.add_argument("--modules", type=Path, metavar="FOLDER", help="_C.abi3.so and _C_cuda.abi3.so built elsewhere")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="archives of bench.peers.collect")
    parser.add_argument("--depth", type=int, metavar="N", help="layers of the model that decodes")
    parser.add_argument("--commit", default="", metavar="SHA", help="of this tree, where it is a copy without .git")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    args = parser.parse_args(argv)
    chosen = list(STAGES) if args.stage == "all" else args.stage.split(",")
    if unknown := [stage for stage in chosen if stage not in STAGES]:
        parser.error(f"--stage: {', '.join(unknown)} is none of {', '.join(STAGES)}")
    if not 0 < args.minutes <= MOST_MINUTES:
        parser.error(f"--minutes must be above 0 and at most {MOST_MINUTES}, got {args.minutes}")
    if "build" in chosen and args.modules is None and (missing := not_installed("setuptools", "cmake", "ninja")):
        parser.error(
            f"the stage build needs {', '.join(missing)}: pip install {' '.join(missing)}, or --modules FOLDER"
        )
    if {"tests", "memcheck"} & {*chosen} and (missing := not_installed("pytest", "hypothesis", "transformers")):
        print(f"Test files that need {', '.join(missing)} will fail: pip install {' '.join(missing)}", file=sys.stderr)
    if args.modules is not None and not (args.modules / "_C.abi3.so").is_file():
        parser.error(f"--modules: {args.modules} holds no _C.abi3.so")

    args.out.mkdir(parents=True, exist_ok=True)
    evidence = load(args.out.resolve())
    evidence.modules, evidence.peers, evidence.commit = args.modules, args.peers, args.commit
    evidence.depth = args.depth
    evidence.versions = versions(args.commit)
    before = {number: signal.signal(number, lambda *_: evidence.stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run_stages(evidence, chosen, args.minutes, args.again)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"\n{table(evidence)}")
    if evidence.interrupted.is_set():
        print("interrupted; the same command goes on")
        return 130
    return status(evidence, chosen)


if __name__ == "__main__":
    sys.exit(main())
