"""Prove the demo's answer: its most likely tokens are those of a dense float32 model of the same weights.

The answer came token by token through the layers and the KV cache that every other answer comes through. The dense
model is Transformers' own code and reads prompt and answer in one forward without a cache, so the two share no code
that could fail in both. Given the same tokens before, its most likely token is ours at every position exactly if its
own greedy answer is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from qops.demo.compare import largest_difference
from qops.demo.console import DemoError

# Of an answer that ends earlier the continuation counts too: a cache that is lost shows at the second token, a wrong
# position perhaps later.
LEAST_TOKENS = 64
# A row of logits has 0.2 MB with a vocabulary of 49,152, and the dense model makes as many.
MOST_TOKENS = 1024

Pick = Callable[[torch.Tensor], int]


class Limits(NamedTuple):
    """What rounding alone explains.

    Attributes:
        behind: how far the dense model's logit of our token may be below that of its own.
        difference: of any logit.
    """

    behind: float
    difference: float


# Seen with SmolLM2 over eight prompts of 64 tokens or five of 128: logits at most 1.1e-4 apart in float32; tokens at
# most 0.13 behind in bfloat16, and 2.1 with 8-bit activations, whose roundings turn over at the least difference.
# Without a KV cache a token is 8.3 behind, or more.
FLOAT32 = Limits(behind=1e-3, difference=1e-2)
HALF = Limits(behind=math.log(2), difference=math.inf)
INT8 = Limits(behind=math.log(50), difference=math.inf)


def limits_of(model: Any) -> Limits:
    """By what the model computes with, wherever it came from."""
    from qops.nn import QuantizedLinear

    if any(isinstance(module, QuantizedLinear) and module.quantizes_input for module in model.modules()):
        return INT8
    return FLOAT32 if model.dtype == torch.float32 else HALF


def recorded(pick: Pick, rows: list[torch.Tensor]) -> Pick:
    """`pick`, which also keeps the logits that it is given, of the first MOST_TOKENS."""

    def pick_and_keep(logits: torch.Tensor) -> int:
        if len(rows) < MOST_TOKENS:
            rows.append(logits)
        return pick(logits)

    return pick_and_keep


def prove(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    answer: Sequence[int],
    rows: Sequence[torch.Tensor],
    drawn: bool = False,
) -> str:
    """What was proven, in one sentence.

    Args:
        model: of qops.
        tokenizer: for the text of tokens.
        prompt_ids: what the answer follows.
        answer: its tokens, greedy unless `drawn`.
        rows: the logits [V] that each token was chosen from, as many as are to be proven.
        drawn: whether the tokens were drawn; then it is the most likely token in each place that is compared.

    Raises:
        DemoError: the answer is not that of the dense model; where they part, with the logits of both.
    """
    from qops.models import dense_model

    count = len(rows)
    ours = torch.stack(list(rows)).float()
    ids = torch.tensor([[*prompt_ids, *answer[: count - 1]]])
    with torch.inference_mode():
        dense = dense_model(model, torch.float32)(input_ids=ids, use_cache=False, logits_to_keep=count).logits[0]
    limits = limits_of(model)
    best, wanted = ours.argmax(-1), dense.argmax(-1)
    behind = (dense.gather(1, wanted[:, None]) - dense.gather(1, best[:, None]))[:, 0]
    if bool((behind > limits.behind).any()):
        place = int((behind > limits.behind).nonzero()[0])
        raise DemoError(_parting(tokenizer, place, count, ours[place], dense[place], drawn))
    difference = largest_difference(ours, dense)
    if not math.isfinite(difference) or difference > limits.difference:
        raise DemoError(
            f"the answer is not proven: its logits are {difference:.2e} from those of the dense float32 model, "
            f"more than the {limits.difference:.0e} that rounding explains"
        )
    same = int((best == wanted).sum())
    what = "drawn tokens: the most likely one in each place equals that" if drawn else "greedy tokens equal those"
    what = (
        f"Proven: {count if same == count else f'{same} of {count}'} {what} of a dense float32 model of these weights"
    )
    if same < count:
        # Rounded down, as what follows is a promise.
        share = math.floor(100 * math.exp(-float(behind.max()))) / 100
        what += f", which finds each of the others at least {share:.2f} times as likely as its own"
    return f"{what} (logits at most {difference:.1e} apart)."


def _parting(tokenizer: Any, place: int, count: int, ours: torch.Tensor, dense: torch.Tensor, drawn: bool) -> str:
    ours_best, dense_best = int(ours.argmax()), int(dense.argmax())

    def logits(index: int) -> str:
        return f"logits {ours[index]:.3f} (qops) and {dense[index]:.3f} (dense)"

    return (
        f"the answer is not that of the dense float32 model: they part at token {place + 1} of {count}, where "
        f"{'the most likely token of qops is' if drawn else 'qops says'} {tokenizer.decode([ours_best])!r}, "
        f"{logits(ours_best)}, and the dense model {tokenizer.decode([dense_best])!r}, {logits(dense_best)}"
    )
