"""What a fused decoder layer costs beside its kernels when it decodes: 30 layers too small for kernels to matter.

    python -m bench.layer_overhead --threads 1,2

Transformers' own ``generate`` decodes with them and, in turn, with layers that do nothing; a layer's part of the
difference is what calls, checks, the cache and regions of threads take, with a few microseconds of arithmetic.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qops
from bench.reporting.stats import median
from bench.timing import document

LAYERS = 30
PROMPT, FEW, MANY = 16, 8, 72


class Overhead(NamedTuple):
    """Microseconds a layer and token, of each round.

    Attributes:
        ours: above layers that do nothing.
        nothing: what those take, all that Transformers does for a token included.
    """

    ours: list[float]
    nothing: list[float]


def stub() -> Any:
    """A fused model whose kernels have next to nothing to do."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **sizes, **heads)).to(torch.bfloat16).eval()
    return qops.quantize_model(model, qops.Int4(group_size=32, symmetric=False))


def seconds_of_a_token(model: Any) -> float:
    """By two lengths, so that the prompt and what surrounds it cancel."""

    def generate(tokens: int) -> float:
        ids = torch.arange(PROMPT)[None]
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return time.perf_counter() - start

    few, many = (min(generate(tokens) for _ in range(3)) for tokens in (FEW, MANY))
    return (many - few) / (MANY - FEW)


def measure(model: Any, rounds: int) -> Overhead:
    """On as many threads as torch has."""
    layer = type(model.model.layers[0])
    forward, found = layer.forward, Overhead([], [])
    for _ in range(rounds):
        ours = seconds_of_a_token(model)
        layer.forward = lambda self, hidden_states, *args, **kwargs: hidden_states
        try:
            nothing = seconds_of_a_token(model)
        finally:
            layer.forward = forward
        found.ours.append(1e6 * (ours - nothing) / LAYERS)
        found.nothing.append(1e6 * nothing / LAYERS)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.layer_overhead", description=__doc__, formatter_class=form)
    parser.add_argument("--threads", default=f"1,{document.cores()}", help="numbers, with commas between")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    print("| threads | above layers that do nothing, us a layer | those, us a layer |\n|---:|---:|---:|")
    model = stub()
    for threads in dict.fromkeys(map(int, args.threads.split(","))):
        torch.set_num_threads(threads)
        cells = [f"{median(us):.1f} ({min(us):.1f} - {max(us):.1f})" for us in measure(model, args.rounds)]
        print(f"| {threads} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
