"""Which cases there are: the layers of real models, awkward shapes, and how many tokens; and selections of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T", int, str)

# (N, K) of the projections of a layer, merged as inference engines merge them.
LAYERS = {
    "llama3-8b qkv": (6144, 4096),
    "llama3-8b o": (4096, 4096),
    "llama3-8b gate_up": (28672, 4096),
    "llama3-8b down": (4096, 14336),
    "llama3-70b qkv": (10240, 8192),
    "llama3-70b o": (8192, 8192),
    "llama3-70b gate_up": (57344, 8192),
    "llama3-70b down": (8192, 28672),
    "qwen2.5-7b qkv": (4608, 3584),
    "qwen2.5-7b o": (3584, 3584),
    "qwen2.5-7b gate_up": (37888, 3584),
    "qwen2.5-7b down": (3584, 18944),
    "smollm2-135m qkv": (960, 576),
    "smollm2-135m o": (576, 576),
    "smollm2-135m gate_up": (3072, 576),
    "smollm2-135m down": (576, 1536),
    "smollm2-135m lm_head": (49152, 576),
    # A model over several GPUs: of 2, and of 8.
    "llama3-8b tp2 qkv": (3072, 4096),
    "llama3-8b tp2 o": (4096, 2048),
    "llama3-8b tp2 gate_up": (14336, 4096),
    "llama3-8b tp2 down": (4096, 7168),
    "llama3-70b tp8 qkv": (1280, 8192),
    "llama3-70b tp8 o": (8192, 1024),
    "llama3-70b tp8 gate_up": (7168, 8192),
    "llama3-70b tp8 down": (8192, 3584),
    # Sizes that are multiples of little.
    "deepseek-v2-lite down": (2048, 10944),
    "qwen2.5-72b down": (8192, 29568),
    "moe expert": (704, 2048),
    "deepseek-v3 qkv_a": (2112, 7168),
}
# Whole models: number and sizes of their layers, and of the vocabulary.
MODELS = {
    "smollm2-135m": {"L": 30, "H": 576, "I": 1536, "Hq": 9, "Hk": 3, "D": 64, "V": 49152},
    "llama3-8b": {"L": 32, "H": 4096, "I": 14336, "Hq": 32, "Hk": 8, "D": 128, "V": 128256},
}
# Sequences that are decoded together, and how long each is.
SEQUENCES = (1, 8, 16)
CONTEXT = 1024
# With the numbers beside powers of two, which show cliffs.
ROWS = (1, 2, 4, 8, 16, 17, 32, 33, 64, 65, 128, 129, 256, 512, 1024, 2048, 4096, 8192)
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 2048, 4096, 8192)
# SmolLM2 135M, Qwen2.5 7B, Llama 3 8B and 70B.
HIDDEN = (576, 3584, 4096, 8192)
WIDTHS = {"H": HIDDEN, "K": HIDDEN, "I": (1536, 18944, 14336, 28672)}
# Few tokens are found in the cache, where the layer before has just written them; many are not.
HOT_TOKENS = 256


@dataclass(frozen=True)
class Case:
    """An operator and what tells this computation from others of it."""

    op: str
    axes: dict[str, int | str]

    def __str__(self) -> str:
        return " ".join((self.op, *(f"{name}={value}" for name, value in self.axes.items())))

    def with_axes(self, **axes: int | str) -> Case:
        """The same, with more axes."""
        return Case(self.op, {**self.axes, **axes})


@dataclass(frozen=True)
class Selection:
    """What is run of everything; None is all of it.

    Attributes:
        layers, rows: of GEMMs, and models by their names.
        tokens: of the other operators,
        widths: and their H, I or K, or what all heads of q have.
        formats: kinds of 4-bit weight, and rules of quantisation.
        both_caches: hot and cold, else as the operator finds its input: cold weights, and hot activations if they are
            few.
        dtypes: of activations.
        depth: layers of a model that is decoded, where not its own number.
        tiny: one case that an emulator computes in a moment, instead of all others.
    """

    layers: frozenset[str] | None = None
    rows: frozenset[int] | None = None
    tokens: frozenset[int] | None = None
    widths: frozenset[int] | None = None
    formats: frozenset[str] | None = None
    both_caches: bool = True
    dtypes: tuple[str, ...] = ("bfloat16",)
    depth: int | None = None
    tiny: bool = False

    def caches_of(self, tokens: int | None) -> tuple[str, ...]:
        """Of a number of tokens that were just written; of weights where that is None."""
        if self.both_caches:
            return "cold", "hot"
        return ("cold",) if tokens is None or tokens >= HOT_TOKENS else ("hot",)


FULL = Selection(dtypes=("bfloat16", "float16"))
USUAL = frozenset({"symmetric", "127", "asym", "static"})
# 94 of its cases took 690 s on two cores, two threads, with every peer (cpu_xeon_amx.json).
CPU = Selection(
    layers=frozenset({"llama3-8b o", "smollm2-135m gate_up", "smollm2-135m down", "smollm2-135m"}),
    rows=frozenset({1, 4, 16, 64, 256}),
    tokens=frozenset({1, 64, 2048}),
    widths=frozenset({576, 4096, 1536, 14336}),
    formats=USUAL,
    both_caches=False,
)
# Two minutes.
CPU_QUICK = Selection(
    layers=frozenset({"llama3-8b o", "smollm2-135m"}),
    rows=frozenset({1, 64}),
    tokens=frozenset({1, 256}),
    widths=frozenset({4096, 14336}),
    formats=USUAL,
    both_caches=False,
)
CUDA = Selection(
    layers=frozenset(
        {
            "llama3-8b",
            "llama3-8b qkv",
            "llama3-8b o",
            "llama3-8b gate_up",
            "llama3-8b down",
            "llama3-70b tp8 gate_up",
            "llama3-70b tp8 down",
            "qwen2.5-7b down",
            "moe expert",
        }
    ),
    rows=frozenset({1, 2, 4, 8, 16, 17, 32, 64, 128, 256, 1024, 4096}),
    tokens=frozenset({1, 16, 64, 256, 1024, 4096}),
    widths=frozenset({576, 4096, 8192, 14336}),
    formats=USUAL,
)
CUDA_QUICK = Selection(
    layers=frozenset({"llama3-8b o", "llama3-8b down", "llama3-8b"}),
    rows=frozenset({1, 16, 256, 4096}),
    tokens=frozenset({1, 256, 4096}),
    widths=frozenset({4096, 14336}),
    formats=USUAL,
    both_caches=False,
)
EMULATED = Selection(tiny=True)
# More than 16 rows, which cuBLAS's int8 product wants, and no multiple of anything.
TINY: dict[str, int | str] = {
    **{"layer": "tiny", "M": 19, "T": 19, "N": 96, "K": 256, "G": 64, "dtype": "bfloat16", "cache": "cold"},
    **{"H": 128, "I": 256, "Hq": 4, "Hk": 2, "D": 32, "L": 1, "V": 64, "C": 8},
}
SELECTIONS = {
    ("cpu", "default"): CPU,
    ("cpu", "quick"): CPU_QUICK,
    ("cpu", "full"): FULL,
    ("cuda", "default"): CUDA,
    ("cuda", "quick"): CUDA_QUICK,
    ("cuda", "full"): FULL,
    ("emulated", "default"): EMULATED,
    ("emulated", "quick"): EMULATED,
    ("emulated", "full"): EMULATED,
}
# Of ``pytest bench``: as many as a few minutes hold.
BENCHMARKED = {"cpu": CPU, "cuda": CUDA_QUICK, "emulated": EMULATED}


def chosen(values: Iterable[T], wanted: frozenset[T] | None) -> list[T]:
    return [value for value in values if wanted is None or value in wanted]


def interleaved(lists: Sequence[Sequence[Case]]) -> list[Case]:
    """The first of each, then the second: a run that is cut short has something of every operator."""
    longest = max(map(len, lists), default=0)
    return [cases[i] for i in range(longest) for cases in lists if i < len(cases)]
