"""llama.cpp through llama-cpp-python's binding of its C API; LLAMA_CPP_LIB_PATH names a folder with other libraries.

By default it repacks weights for AMX where the CPU has it. Built by GCC 12 that form ends with SIGSEGV at the first
product: the compiler's ``_tile_loadconfig`` names 8 of the 64 bytes that it reads, so the stores of the others are
removed. ``bench/peers/README.md`` has the line that it lacks. The form without extra buffers reads weights as they are.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.models import CAPACITY, Runner


class LlamaModel:
    def __init__(self, repacks: bool, path: Path, threads: int) -> None:
        # Its C functions get their types from a decorator.
        library: Any = importlib.import_module("llama_cpp")
        library.llama_backend_init()
        parameters = library.llama_model_default_params()
        parameters.use_extra_bufts = repacks
        self._model = library.llama_model_load_from_file(str(path).encode(), parameters)
        options = library.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = CAPACITY
        options.n_threads = options.n_threads_batch = threads
        self._context = self._model and library.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot open {path}")
        self._width = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._library = library

    def restart(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def feed(self, tokens: Sequence[int]) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if code := self._library.llama_decode(self._context, self._library.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError(f"llama_decode returned {code}")
        # A call may return before its results are there.
        self._library.llama_synchronize(self._context)

    def logits(self) -> np.ndarray:
        found = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(found, (self._width,)).copy()


RUNNERS = [
    Runner(name, functools.partial(LlamaModel, repacks), "int8 activations per group", ("llama_cpp_python",))
    for name, repacks in (("llama.cpp", True), ("llama.cpp, no extra buffers", False))
]
