"""Runs vLLM's engine on folders, in a process of its own: ``python -m tests.support.models.vllm_engine RUNS OUT``.

RUNS is a JSON list of arguments of `vllm.LLM`; OUT becomes one of what each run gave: the log-probabilities of the
prompts' tokens, and of each worker what its linears are.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
# 1 GiB of cache, and no hub.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",
}


class Inspected:
    """What vLLM's workers can do besides (`worker_extension_cls`)."""

    def linears_of_worker(self: Any) -> dict[str, dict[str, Any]]:
        """Of each linear: what computes it, its shape there, and how many bytes of weights are left beside it."""
        from vllm.model_executor.layers.linear import LinearBase

        found = {}
        for name, layer in self.model_runner.model.named_modules():
            if isinstance(layer, LinearBase):
                product = getattr(layer, "qops", None)
                found[name] = {
                    "method": type(layer.quant_method).__name__,
                    "schemes": None if product is None else [linear.scheme for linear in product.linears],
                    "outputs": None if product is None else sum(product.sizes),
                    "padding": None if product is None else product.padding,
                    "left": sum(p.nbytes for key, p in layer.named_parameters() if key not in ("bias", "weight_shape")),
                }
        return found


def environment_of(more: dict[str, str]) -> dict[str, str]:
    """Of a process that imports what this one does."""
    return {**os.environ, **ENVIRONMENT, **more, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}


def run_engine(arguments: dict[str, Any], ids: list[list[int]]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    defaults = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64, "max_logprobs": -1}
    extension = f"{Inspected.__module__}.{Inspected.__qualname__}"
    llm = LLM(**(defaults | arguments), worker_extension_cls=extension)
    asked = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": row} for row in ids], asked, use_tqdm=False)
    found = []
    for output in outputs:
        assert output.prompt_logprobs is not None
        tokens = [{int(token): value.logprob for token, value in each.items()} for each in output.prompt_logprobs[1:]]
        found.append([[each[token] for token in range(len(each))] for each in tokens])
    return {"logprobs": found, "workers": llm.collective_rpc("linears_of_worker")}


def run_engines(
    runs: list[dict[str, Any]], ids: list[list[int]], folder: Path, environment: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """What each run gave. Runs without `tensor_parallel_size` share one process; a failed one gives its error.

    Args:
        runs: arguments of `vllm.LLM`.
        ids: the prompts, of one length.
        folder: for files.
        environment: of the process, besides this one's.
    """
    asked, out = folder / "runs.json", folder / "out.json"
    asked.write_text(json.dumps({"runs": runs, "ids": ids}))
    command = [sys.executable, "-m", "tests.support.models.vllm_engine", str(asked), str(out)]
    done = subprocess.run(
        command, env=environment_of(environment or {}), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(out.read_text())


def main(asked: str, out: str) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    given = json.loads(Path(asked).read_text())
    found = []
    for arguments in given["runs"]:
        try:
            found.append(run_engine(arguments, given["ids"]))
        except Exception as error:  # whatever vLLM raises is a result
            found.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
        with contextlib.suppress(Exception):
            cleanup_dist_env_and_memory()
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
