"""Measure a quantised model against a dense model of the same dequantised weights: speed, bytes, accuracy.

Both models are Hugging Face causal language models and go through the same code: `model.forward` with a KV cache,
greedy, batch 1, the same thread count, no tokenisation inside the clock. Rounds alternate between the models, so that
a change in the machine's load meets both; a table shows the median with the smallest and the largest round.
"""

from __future__ import annotations

import importlib.resources
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qops.demo.console import DemoError
from qops.models.quantize import weight_bytes as weight_bytes

PASSAGE_TITLE = "the United States Declaration of Independence (1776)"
PASSAGE_TOKENS = 1024
DECODE_TOKENS = 64
PREFILL_TOKENS = 256

# Rows of logits that are widened to float64 at a time: 64 x 49152 x 8 bytes = 25 MB.
_ROWS_PER_CHUNK = 64


def passage() -> str:
    """The public-domain text on which accuracy is measured. It ships with the package."""
    return (importlib.resources.files("qops.demo") / "data" / "declaration_of_independence.txt").read_text(
        encoding="utf-8"
    )


def greedy(logits: torch.Tensor) -> int:
    """The id with the largest logit, logits [V]."""
    return int(logits.argmax())


def sampler(temperature: float, seed: int) -> Callable[[torch.Tensor], int]:
    """How to choose the next id from logits [V]: greedy at temperature 0, else drawn with a generator of its own."""
    if temperature == 0:
        return greedy
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: torch.Tensor) -> int:
        return int(torch.multinomial(torch.softmax(logits.float() / temperature, -1), 1, generator=generator))

    return draw


def generate(model: Any, ids: Sequence[int], pick: Callable[[torch.Tensor], int] = greedy) -> Iterator[int]:
    """Endless token ids that follow `ids`: one forward over the prompt, then one forward a token with a KV cache."""
    from transformers import DynamicCache

    from qops.models.decoder import cache_keyword

    keyword = cache_keyword(type(model))
    if keyword is None:
        raise DemoError(f"{type(model).__name__} takes no KV cache by a name that the demo knows")
    with torch.inference_mode():
        cache = {keyword: DynamicCache(config=model.config)}
        step = torch.tensor([list(ids)])
    while True:
        # Entered anew for each token: inference mode must not stay on in the caller between two of them.
        with torch.inference_mode():
            logits = model(input_ids=step, **cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            token = pick(logits)
            step = torch.tensor([[token]])
        yield token


def decode_rate(model: Any, ids: Sequence[int], tokens: int = DECODE_TOKENS) -> float:
    """Tokens per second of `tokens` decode steps behind the prompt. The prompt's own forward is outside the clock."""
    stream = generate(model, ids)
    next(stream)
    start = time.perf_counter()
    for _ in range(tokens):
        next(stream)
    return tokens / (time.perf_counter() - start)


def prefill_rate(model: Any, ids: Sequence[int]) -> float:
    """Prompt tokens per second of one forward that fills a KV cache and gives the first new token."""
    start = time.perf_counter()
    next(generate(model, ids))
    return len(ids) / (time.perf_counter() - start)


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and largest of its samples."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(statistics.median(samples), min(samples), max(samples))

    def text(self, digits: int, unit: str = "") -> str:
        return f"{self.median:,.{digits}f}{unit} ({self.low:,.{digits}f}-{self.high:,.{digits}f})"


@dataclass(frozen=True)
class Race:
    """One quantity of both models over interleaved rounds. `ratio` is of ours to dense, taken within each round."""

    ours: Spread
    dense: Spread
    ratio: Spread


def interleave(ours: Callable[[], float], dense: Callable[[], float], rounds: int) -> Race:
    """Call both `rounds` times after one unrecorded call each; who goes first alternates."""
    ours()
    dense()
    samples: list[tuple[float, float]] = []
    for index in range(rounds):
        if index % 2:
            second, first = dense(), ours()
        else:
            first, second = ours(), dense()
        samples.append((first, second))
    return Race(
        Spread.of([a for a, _ in samples]),
        Spread.of([b for _, b in samples]),
        Spread.of([a / b for a, b in samples]),
    )


def passage_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits [T, V] of one forward over the T ids, without a cache."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def perplexity(logits: torch.Tensor, ids: Sequence[int]) -> float:
    """exp of the mean negative log likelihood of ids[1:] under logits[:-1], in float64."""
    targets = torch.tensor(list(ids[1:]))
    total = 0.0
    for rows, target in zip(logits[:-1].split(_ROWS_PER_CHUNK), targets.split(_ROWS_PER_CHUNK), strict=True):
        total += torch.nn.functional.cross_entropy(rows.double(), target, reduction="sum").item()
    return math.exp(total / len(targets))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| of two logit tensors [T, V]. NaN where either holds one: a broken model must not look exact."""
    chunks = zip(a.split(_ROWS_PER_CHUNK), b.split(_ROWS_PER_CHUNK), strict=True)
    return float(torch.stack([(x.double() - y.double()).abs().max() for x, y in chunks]).max())


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over one passage of `tokens` tokens; everything relative to the dense float32 model of these weights.

    `flips_*` count positions whose most likely token differs from the dense float32 model's when the model runs in
    the half-precision dtype under test; None when that dtype is float32.
    """

    tokens: int
    max_difference: float
    agreeing: int
    perplexity_ours: float
    perplexity_dense: float
    flips_ours: int | None
    flips_dense: int | None


def accuracy(
    ids: Sequence[int],
    ours_fp32: Callable[[], Any],
    dense_fp32: Callable[[], Any],
    half_top: tuple[torch.Tensor, torch.Tensor] | None,
) -> Accuracy:
    """Compare float32 logits over `ids`.

    The models come as functions and are dropped after their forward, so that one float32 model exists at a time.
    half_top: the most likely ids [T] of ours and dense in half precision.
    """
    ours = passage_logits(ours_fp32(), ids)
    dense = passage_logits(dense_fp32(), ids)
    top = dense.argmax(-1)
    flips = None if half_top is None else tuple(int((half != top).sum()) for half in half_top)
    return Accuracy(
        tokens=len(ids),
        max_difference=largest_difference(ours, dense),
        agreeing=int((ours.argmax(-1) == top).sum()),
        perplexity_ours=perplexity(ours, ids),
        perplexity_dense=perplexity(dense, ids),
        flips_ours=flips[0] if flips else None,
        flips_dense=flips[1] if flips else None,
    )


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns under a header and a rule, as plain text that reads the same in a terminal and a log."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def speed_table(dtype: str, decode: Race, prefill: Race, prefill_tokens: int, bytes_: tuple[int, int]) -> str:
    """The speed half of the report. bytes_: weight bytes of ours and dense."""
    ours_bytes, dense_bytes = bytes_

    def row(name: str, race: Race) -> list[str]:
        return [name, race.ours.text(1), race.dense.text(1), race.ratio.text(2, "x")]

    return render_table(
        ["median (min-max)", f"qops {dtype}", f"dense {dtype}", "qops / dense"],
        [
            row("decode, tokens/s", decode),
            row(f"prefill of {prefill_tokens}, tokens/s", prefill),
            [
                "weights, MB",
                f"{ours_bytes / 1e6:,.1f}",
                f"{dense_bytes / 1e6:,.1f}",
                f"{ours_bytes / dense_bytes:.2f}x",
            ],
        ],
    )


def accuracy_table(dtype: str, result: Accuracy) -> str:
    """The accuracy half of the report."""

    def share(count: int) -> str:
        # Rounded down: one disagreement in 100,000 must not read as 100.00 %.
        return f"{count} of {result.tokens} ({math.floor(1e4 * count / result.tokens) / 100:.2f} %)"

    rows = [
        ["perplexity", f"{result.perplexity_ours:.4f}", f"{result.perplexity_dense:.4f}"],
        ["same top-1 token as dense fp32", share(result.agreeing), "(reference)"],
        ["max logit difference", f"{result.max_difference:.2e}", "(reference)"],
    ]
    if result.flips_ours is not None and result.flips_dense is not None:
        rows.append([f"{dtype} flips the top-1 token", share(result.flips_ours), share(result.flips_dense)])
    return render_table(["measure", "qops", "dense"], rows)
