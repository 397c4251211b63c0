"""qops: ``load_model``, and Transformers' own forward and cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qops
from bench.peers.models import Runner, one_by_one


class QopsModel:
    def __init__(self, path: Path, threads: int) -> None:
        from qops.models.decoder import cache_keyword

        torch.set_num_threads(threads)
        self.model: Any = qops.load_model(path, dtype=torch.bfloat16)
        keyword = cache_keyword(type(self.model))
        assert keyword is not None
        self._keyword = keyword
        self.restart()

    def restart(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.model.config)
        self._logits = torch.empty(0)

    def feed(self, tokens: Sequence[int]) -> None:
        ids = torch.tensor([tokens])
        arguments = {self._keyword: self._cache, "use_cache": True, "logits_to_keep": 1}
        self._logits = self.model(ids, **arguments).logits

    def logits(self) -> np.ndarray:
        return self._logits[0, -1].float().numpy()


def generated(model: QopsModel, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Seconds of as many tokens as Transformers' ``generate`` chooses, the prompt's taken off."""

    def elapsed(count: int) -> float:
        start = time.perf_counter()
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        model.model.generate(torch.tensor([prompt]), **options)
        return time.perf_counter() - start

    first = elapsed(1)
    return elapsed(1 + len(tokens)) - first


RUNNERS = [
    Runner(name, QopsModel, "exact weights, bf16 between operators", ("transformers",), decode_seconds)
    for name, decode_seconds in (("qops", one_by_one), ("qops, generate", generated))
]
