"""ik_llama.cpp through ik-llama-cpp-python's binding of its C API; IK_LLAMA_CPP_LIB_PATH names another library.

The binding repeats the library's structs, so another one must be built from the same sources, those in its sdist.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.models import CAPACITY, Runner


class IkModel:
    def __init__(self, path: Path, threads: int) -> None:
        library: Any = importlib.import_module("ik_llama_cpp._internals")
        self._library = library
        self._model = library.IkModel(str(path))
        self._context = library.IkContext(self._model, n_ctx=CAPACITY, n_threads=threads, flash_attn=True)
        self._fed = 0

    def restart(self) -> None:
        self._context.kv_cache_clear()
        self._fed = 0

    def feed(self, tokens: Sequence[int]) -> None:
        batch = self._library.make_batch_range(list(tokens), pos_start=self._fed)
        code = self._context.decode(batch)
        self._library.C.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        self._fed += len(tokens)

    def logits(self) -> np.ndarray:
        return np.ctypeslib.as_array(self._context.get_logits(-1), (self._model.n_vocab,)).copy()


RUNNERS = [Runner("ik_llama.cpp", IkModel, "int8 activations per group", ("ik_llama_cpp_python",))]
