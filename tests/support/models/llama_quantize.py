"""llama.cpp's own quantiser, dequantisation and forward, from ik-llama-cpp-python, where that is installed."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.support.models.families import random_model
from tests.support.models.gguf_blocks import sizes
from tests.support.models.gguf_writer import write_gguf

PACKAGE = "ik-llama-cpp-python==0.1.5"
VOCAB = 512
# Asked for by name, and in what they become on a model without rows of another length than a multiple of 256.
FILE_TYPES = {
    "Q4_0": {"Q4_0", "Q6_K"},
    "Q4_1": {"Q4_1", "Q6_K"},
    "Q5_0": {"Q5_0", "Q6_K"},
    "Q5_1": {"Q5_1", "Q6_K"},
    "Q8_0": {"Q8_0"},
    "Q2_K": {"Q2_K", "Q3_K", "Q6_K"},
    "Q3_K_S": {"Q3_K", "Q6_K"},
    "Q3_K_M": {"Q3_K", "Q4_K", "Q5_K", "Q6_K"},
    "Q3_K_L": {"Q3_K", "Q5_K", "Q6_K"},
    "Q4_K_S": {"Q4_K", "Q5_K", "Q6_K"},
    "Q4_K_M": {"Q4_K", "Q6_K"},
    "Q5_K_S": {"Q5_K", "Q6_K"},
    "Q5_K_M": {"Q5_K", "Q6_K"},
    "Q6_K": {"Q6_K"},
}


def missing() -> str | None:
    """Why nothing here works; None if it does."""
    return None if importlib.util.find_spec("ik_llama_cpp") else f"{PACKAGE} is not installed"


def _folder() -> Path:
    spec = importlib.util.find_spec("ik_llama_cpp")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def quantise(source: Path, target: Path, file_type: str, *options: str) -> Path:
    command = [str(_folder() / "bin" / "llama-quantize"), *options, str(source), str(target), file_type, "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def seeded_file(path: Path) -> Path:
    """Two layers in float32 of hidden size 512 and an MLP of 1024, with outliers."""
    model = random_model(
        "llama",
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        attention_bias=False,
        mlp_bias=False,
        vocab_size=VOCAB,
        initializer_range=0.04,
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 1 + 9 * (torch.rand(parameter.shape, generator=generator) < 0.01)

    write_gguf(model, path, "F32", with_tokens)
    return path


def with_tokens(writer: Any) -> None:
    """A vocabulary, without which llama.cpp loads nothing."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{index}" for index in range(VOCAB)])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["t 0"])


@functools.cache
def _libggml() -> Any:
    library = ctypes.CDLL(str(_folder() / "lib" / "libggml.so"))

    class Parameters(ctypes.Structure):
        _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

    # Fills its table of float16 numbers.
    library.ggml_init.argtypes, library.ggml_init.restype = [Parameters], ctypes.c_void_p
    library.ggml_free.argtypes = [ctypes.c_void_p]
    library.ggml_free(library.ggml_init(Parameters(1 << 16, None, True)))
    return library


def dequantised_by_libggml(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """float32 [N, K] of blocks uint8 [N, bytes per row]."""
    elements, size = sizes(kind)
    function = getattr(_libggml(), f"dequantize_row_{kind.replace('Q', 'q')}")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    data = np.ascontiguousarray(blocks.numpy())
    values = np.full((data.shape[0], data.shape[1] // size * elements), np.nan, np.float32)
    function(data.ctypes.data, values.ctypes.data, values.size)
    return torch.from_numpy(values)


def tensors_of(path: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Name -> (type, rows as stored)."""
    return {t.name: (t.tensor_type.name, torch.from_numpy(t.data.copy())) for t in gguf.GGUFReader(path).tensors}


def logits_by_llama(path: Path, tokens: list[int]) -> torch.Tensor:
    """float32 [T, vocabulary], one token after the other; its cache of keys and values is float16."""
    internals: Any = importlib.import_module("ik_llama_cpp._internals")
    own: Any = importlib.import_module("ik_llama_cpp.llama")
    context = internals.IkContext(internals.IkModel(str(path)), n_ctx=128, n_threads=1, flash_attn=False)
    found = []
    for position, token in enumerate(tokens):
        batch = own.make_batch_single(token, position)
        assert context.decode(batch) == 0
        own.C.llama_batch_free(batch)
        found.append(context.get_logits(-1)[:VOCAB])
    return torch.tensor(found)
