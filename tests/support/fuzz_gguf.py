"""Feeds mutated GGUF files to qops.load_model and load_tokenizer: ``python -m tests.support.fuzz_gguf --count 20000``

A file either loads, and a forward of four tokens runs, or is a ValueError that names the path. Anything else is a
failure: another exception, a crash, more than 2 GiB of memory, more than ten seconds. File number i of a seed is always
the same: ``--only i --keep FOLDER`` writes it.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qops.models import load_model, load_tokenizer
from tests.support.models.families import random_model
from tests.support.models.gguf_blocks import TYPES
from tests.support.models.gguf_files import HEAD_DIM, VOCAB, LlamaFile, llama_file
from tests.support.models.gguf_writer import write_gguf

K_QUANTS = tuple(kind for kind in TYPES if kind.endswith("_K"))

SECONDS = 10
MEMORY_BYTES = 2 << 30
EDGES = (0, 1, 2, 3, 7, 31, 33, 63, 64, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63)
EDGES = (*EDGES, 2**64 - 1, 2**64 - 8, 2**64 - 32)

# Types of the container, and the struct codes of the scalar ones.
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class TooSlow(BaseException):
    """Not an Exception, which a reader might take for the file's fault."""


# --- the container, as far as mutations need it ----------------------------------------------------------------------


@dataclass
class Value:
    """A metadata value. The content of an array is its contents of the type `item`, or Values, or raw bytes."""

    type: int
    content: Any
    item: int = 0


@dataclass
class Tensor:
    name: bytes
    dims: list[int]
    type: int
    offset: int


@dataclass
class Container:
    keys: list[tuple[bytes, Value]]
    tensors: list[Tensor]
    data: bytes
    version: int = 3
    magic: bytes = b"GGUF"
    # Declared instead of the true ones.
    counts: dict[str, int] = field(default_factory=dict)
    alignment: int = 32

    def write(self) -> bytes:
        tensors, keys = (self.counts.get(n, len(v)) for n, v in (("tensors", self.tensors), ("keys", self.keys)))
        out = bytearray(self.magic + struct.pack("<IQQ", self.version, tensors, keys))
        for name, value in self.keys:
            out += _text(name) + struct.pack("<I", value.type)
            _write_value(out, value)
        for t in self.tensors:
            out += _text(t.name) + struct.pack("<I", len(t.dims)) + b"".join(struct.pack("<Q", d) for d in t.dims)
            out += struct.pack("<IQ", t.type, t.offset)
        out += bytes(-len(out) % self.alignment)
        return bytes(out) + self.data


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _write_value(out: bytearray, value: Value) -> None:
    if value.type == ARRAY and isinstance(value.content, bytes):
        out += value.content
    elif value.type == ARRAY:
        out += struct.pack("<IQ", value.item, len(value.content))
        for content in value.content:
            _write_value(out, content if isinstance(content, Value) else Value(value.item, content))
    elif value.type == STRING:
        out += _text(value.content)
    elif value.type in CODES:
        out += _scalar(value.type, value.content)
    else:
        out += bytes(8)


def _scalar(kind: int, content: Any) -> bytes:
    code = CODES[kind]
    try:
        return struct.pack(f"<{code}", content)
    except (struct.error, OverflowError, TypeError):
        size = struct.calcsize(code)
        return (int(content) % (1 << 8 * size)).to_bytes(size, "little") if isinstance(content, int) else bytes(size)


def _read(data: bytes) -> Container:
    """A well-formed file."""
    at = 4

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(code)
        return value

    def text() -> bytes:
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at]

    def value(kind: int) -> Value:
        if kind == STRING:
            return Value(kind, text())
        if kind == ARRAY:
            item = take("I")
            return Value(kind, [value(item).content for _ in range(take("Q"))], item)
        return Value(kind, take(CODES[kind]))

    version, tensors, keys = take("I"), take("Q"), take("Q")
    found = [(text(), value(take("I"))) for _ in range(keys)]
    stored = [Tensor(text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(tensors)]
    return Container(found, stored, data[at + (-at % 32) :], version)


TOKENS = ["<pad>", "<s>", "</s>", *"abcdefgh", "ab", "abc", *(f"filler{i}" for i in range(VOCAB - 13))]


def bases(folder: Path) -> list[Container]:
    """Small files of several kinds, each of which loads."""
    files: list[LlamaFile] = [
        llama_file(),
        llama_file(1, weights="Q4_0", output="Q8_0", bias=True),
        llama_file(2, weights="Q8_0", table="Q4_0", output="F16"),
        llama_file(3, weights="F32", table="BF16"),
    ]
    tokens = {
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(TOKENS) - 3)],
        "tokenizer.chat_template": "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}",
    }
    for index, file in enumerate(files):
        if index % 2 == 0:
            file.metadata |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b", "ab c"], **tokens}
        else:
            scores = [-float(i) for i in range(len(TOKENS))]
            file.metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores, **tokens}
    import numpy as np

    files[3].tensors["rope_freqs.weight"] = ("F32", np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32), 0)
    path = folder / "base.gguf"
    return [_read(file.write(path).read_bytes()) for file in files] + [_read(data) for data in _families(path)]


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
# Small enough for a forward of many, and for K-quants as wide as one of their blocks.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FAMILIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("smollm3", "Q5_0", {"no_rope_layer_interval": 4}),
    ("qwen2", "Q5_1", {"use_sliding_window": False}),
    ("qwen3", "F16", {"head_dim": 16}),
    ("gemma", "Q8_0", {}),
    ("gemma2", "Q5_1", {"query_pre_attn_scalar": 16}),
    ("gemma3", "Q4_1", {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6, "final_logit_softcapping": 9.0}),
    (
        "phi3",
        "Q5_0",
        {"partial_rotary_factor": 0.125, "rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    ),
    *(("qwen3", kind, {"head_dim": 128, "hidden_size": 256, "intermediate_size": 256}) for kind in K_QUANTS),
)


def _families(path: Path) -> Iterator[bytes]:
    """A file of every architecture, and of every block type that those before have not."""

    def with_tokens(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
        writer.add_token_scores([-float(index) for index in range(len(TOKENS))])

    for family, kind, changes in FAMILIES:
        write_gguf(random_model(family, **(SMALL | changes)), path, kind, with_tokens)
        yield path.read_bytes()


# --- mutations -------------------------------------------------------------------------------------------------------


def copy_of(c: Container) -> Container:
    keys = [
        (name, Value(v.type, list(v.content) if isinstance(v.content, list) else v.content, v.item))
        for name, v in c.keys
    ]
    tensors = [Tensor(t.name, list(t.dims), t.type, t.offset) for t in c.tensors]
    return Container(keys, tensors, c.data, c.version)


def _absurd(rng: random.Random, depth: int = 0) -> Value:
    """Any value: numbers at the edges of their types, odd strings, arrays of arrays."""
    kind = rng.choice([*CODES, STRING, ARRAY] if depth < 3 else [*CODES, STRING])
    if kind == STRING:
        texts = (b"", b"llama", b"\xff\xfe", b"a" * 5000, b"{{", b"\xc3\xa9", b"\0", b"none", b"yarn")
        return Value(kind, rng.choice(texts))
    if kind == ARRAY:
        items = [_absurd(rng, depth + 1) for _ in range(rng.choice((0, 1, 3, 70)))]
        return Value(kind, [item for item in items if item.type == items[0].type], items[0].type if items else 4)
    if kind in (FLOAT32, 12):
        floats = (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e38, 1e-45, 0.5, 1e308 if kind == 12 else 3e38)
        return Value(kind, rng.choice(floats))
    return Value(kind, rng.choice((*EDGES, -1, -(2**31))))


def change_value(rng: random.Random, c: Container) -> None:
    index = rng.randrange(len(c.keys))
    name, old = c.keys[index]
    if old.type in CODES and rng.random() < 0.6:  # the right type
        new = _absurd(rng, 3)
        while new.type not in CODES:
            new = _absurd(rng, 3)
        c.keys[index] = (name, Value(old.type, new.content if _fits(old.type, new.content) else 0))
    else:
        c.keys[index] = (name, _absurd(rng))


def _fits(kind: int, content: Any) -> bool:
    return isinstance(content, int) or kind in (FLOAT32, 12)


def drop_key(rng: random.Random, c: Container) -> None:
    c.keys.pop(rng.randrange(len(c.keys)))


def double_key(rng: random.Random, c: Container) -> None:
    c.keys.insert(rng.randrange(len(c.keys)), rng.choice(c.keys))


def add_key(rng: random.Random, c: Container) -> None:
    names = (b"general.alignment", b"", b"\xff", b"x" * 999, b"split.count", b"tokenizer.ggml.unknown_token_id")
    names += (b"tokenizer.ggml.added_tokens", b"tokenizer.ggml.pre")
    architecture = dict(c.keys).get(b"general.architecture")
    if architecture is not None and isinstance(architecture.content, bytes):
        own = (b"attention.key_length", b"attention.scale", b"attention.sliding_window", b"expert_count", b"vocab_size")
        own += (b"attention.sliding_window_pattern", b"final_logit_softcapping", b"rope.dimension_count")
        own += (b"rope.freq_base_swa", b"rope.scaling.attn_factor", b"rope.scaling.factor", b"rope.scaling.type")
        own += (b"rope.scaling.original_context_length", b"rope.scaling.yarn_beta_fast")
        names += tuple(architecture.content + b"." + name for name in own)
    c.keys.append((rng.choice(names), _absurd(rng)))


def deep_array(rng: random.Random, c: Container) -> None:
    inner = struct.pack("<IQ", UINT32, 0)
    c.keys.append((b"a", Value(ARRAY, struct.pack("<IQ", ARRAY, 1) * rng.choice((1, 60, 1500, 9000)) + inner)))


def bend_array(rng: random.Random, c: Container) -> None:
    arrays = [value for _, value in c.keys if value.type == ARRAY and isinstance(value.content, list)]
    if not arrays:
        return
    value = rng.choice(arrays)
    how = rng.randrange(5)
    if how == 0:
        value.content = value.content[: rng.randrange(len(value.content) + 1)]
    elif how == 1:
        value.content = value.content * rng.choice((2, 20))
    elif how == 2 and value.content:
        value.content[rng.randrange(len(value.content))] = value.content[0]
    elif how == 3:
        new = _absurd(rng, 3)
        value.item, value.content = new.type, [new.content] * len(value.content)
    elif value.item == STRING and value.content:
        value.content[rng.randrange(len(value.content))] = rng.choice((b"", b"\xff", b" ", b"a" * 3000, b"a b c"))


def token_id(rng: random.Random, c: Container) -> None:
    ids = [i for i, (name, _) in enumerate(c.keys) if name.endswith(b"_token_id")]
    if ids:
        index = rng.choice(ids)
        kind = rng.choice((UINT32, INT32, UINT64, 11))
        c.keys[index] = (c.keys[index][0], Value(kind, rng.choice((*EDGES, VOCAB, VOCAB - 1, -1))))


def change_tensor(rng: random.Random, c: Container) -> None:
    t = rng.choice(c.tensors)
    how = rng.randrange(8)
    if how == 0:
        t.dims[rng.randrange(len(t.dims))] = rng.choice((*EDGES, 32, 96, 128))
    elif how == 1:
        t.dims.append(rng.choice((0, 1, 2, 2**32)))
    elif how == 2:
        t.dims.pop()
    elif how == 3:
        t.type = rng.choice((*range(42), 2**31, 2**32 - 1))
    elif how == 4:
        t.offset = rng.choice((*EDGES, t.offset + 1, t.offset + 32, len(c.data), len(c.data) - 1))
    elif how == 5:
        t.name = rng.choice((b"", b"\xff\xff", b"x" * 300, rng.choice(c.tensors).name, t.name + b"x"))
    elif how == 6:
        t.dims.reverse()
    else:
        other = rng.choice(c.tensors)
        t.dims, t.type, t.offset = list(other.dims), other.type, other.offset


def drop_tensor(rng: random.Random, c: Container) -> None:
    c.tensors.pop(rng.randrange(len(c.tensors)))


def double_tensor(rng: random.Random, c: Container) -> None:
    c.tensors.insert(rng.randrange(len(c.tensors)), rng.choice(c.tensors))


def miscount(rng: random.Random, c: Container) -> None:
    which = rng.choice(("tensors", "keys"))
    true = len(c.tensors if which == "tensors" else c.keys)
    c.counts[which] = rng.choice((*EDGES, true + 1, true - 1)) % 2**64


def change_header(rng: random.Random, c: Container) -> None:
    if rng.random() < 0.5:
        c.version = rng.choice((0, 1, 2, 4, 3 << 24, 2**32 - 1))
    else:
        c.magic = rng.choice((b"GGML", b"FUGG", bytes(4), b"gguf"))


def align(rng: random.Random, c: Container) -> None:
    value = rng.choice((0, 1, 2, 8, 33, 64, 4096, 2**31, 2**32 - 1))
    c.keys.append((b"general.alignment", Value(rng.choice((UINT32, UINT32, UINT64, STRING)), value)))
    if c.keys[-1][1].type == STRING:
        c.keys[-1] = (b"general.alignment", Value(STRING, b"32"))
    c.alignment = value if 0 < value <= 4096 and rng.random() < 0.5 else 32


def spoil_data(rng: random.Random, c: Container) -> None:
    """Weights: NaN and infinity come about."""
    data = bytearray(c.data)
    for _ in range(rng.choice((1, 5, 200))):
        data[rng.randrange(len(data))] = rng.choice((0, 0x7C, 0x7F, 0xFC, 0xFF, rng.randrange(256)))
    c.data = bytes(data)


FIELDS: tuple[tuple[Callable[[random.Random, Container], None], int], ...] = (
    (change_value, 8),
    (drop_key, 2),
    (double_key, 1),
    (add_key, 3),
    (deep_array, 1),
    (bend_array, 3),
    (token_id, 2),
    (change_tensor, 8),
    (drop_tensor, 1),
    (double_tensor, 1),
    (miscount, 2),
    (change_header, 1),
    (align, 1),
    (spoil_data, 2),
)


def cut(rng: random.Random, data: bytes, header: int) -> bytes:
    end = rng.choice((rng.randrange(24), rng.randrange(header), rng.randrange(header), rng.randrange(len(data))))
    return data[:end] + (bytes(rng.choice((0, 0, 64))))


def flip(rng: random.Random, data: bytes, header: int) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(header if rng.random() < 0.8 else len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(rng: random.Random, data: bytes, header: int) -> bytes:
    """A number somewhere in the header."""
    out = bytearray(data)
    size = rng.choice((4, 8))
    at = rng.randrange(header - size)
    out[at : at + size] = (rng.choice(EDGES) % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(out)


def mutated(containers: list[Container], seed: int, index: int) -> tuple[bytes, str]:
    """File number `index`, and what was done to it."""
    rng = random.Random(f"{seed} {index}")
    base = rng.choice(containers)
    if rng.random() < 0.7:
        c, done = copy_of(base), []
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            (change,) = rng.choices([f for f, _ in FIELDS], [n for _, n in FIELDS])
            if c.keys and c.tensors:
                change(rng, c)
                done.append(change.__name__)
        return c.write(), "+".join(done)
    data = base.write()
    change = rng.choice((cut, flip, flip, overwrite))
    return change(rng, data, len(data) - len(base.data)), change.__name__


# --- one file --------------------------------------------------------------------------------------------------------


def outcome_of(path: Path) -> str:
    """ "loads" or "refused"; what is neither raises."""
    found = []
    try:
        model = load_model(path)
    except ValueError as error:
        assert str(path) in str(error), f"load_model: the message does not name the file: {error!r}"
        found.append("model refused")
    else:
        ids = torch.arange(4).remainder(model.config.vocab_size)[None]
        with torch.inference_mode():
            logits = model(ids).logits
        assert logits.shape == (1, 4, model.config.vocab_size)
        found.append("model loads")
    try:
        tokenizer = load_tokenizer(path)
    except ValueError as error:
        assert str(path) in str(error), f"load_tokenizer: the message does not name the file: {error!r}"
        found.append("tokenizer refused")
    else:
        tokenizer("abc")
        found.append("tokenizer loads")
    return ", ".join(found)


def within_seconds(outcome_of: Callable[[Path], str], path: Path) -> str:
    """What it says, in bounded time."""

    def stop(*_: object) -> None:
        raise TooSlow(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return outcome_of(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def limited(path: Path) -> str:
    """outcome_of, in bounded time."""
    return within_seconds(outcome_of, path)


def limit_memory() -> None:
    """From here on 2 GiB more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one file")
    parser.add_argument("--keep", type=Path, help="folder for the files that fail")
    arguments = parser.parse_args()
    faulthandler.enable()
    outcomes: Counter[str] = Counter()
    failures, start = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        containers = bases(folder)
        path = folder / "mutated.gguf"
        for container in containers:  # also loads what is imported late
            path.write_bytes(container.write())
            outcome = outcome_of(path)
            assert outcome == "model loads, tokenizer loads", outcome
        limit_memory()
        numbers = range(arguments.count) if arguments.only is None else [arguments.only]
        for index in numbers:
            data, done = mutated(containers, arguments.seed, index)
            path.write_bytes(data)
            if arguments.only is not None and arguments.keep is not None:
                (arguments.keep / f"{index}.gguf").write_bytes(data)
            faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # where no signal handler runs
            try:
                outcomes[limited(path)] += 1
            except (Exception, TooSlow):
                failures += 1
                sys.stderr.write(f"file {index} ({done}):\n{traceback.format_exc()}\n")
                if arguments.keep is not None:
                    (arguments.keep / f"{index}.gguf").write_bytes(data)
            faulthandler.cancel_dump_traceback_later()
            if (index + 1) % 1000 == 0:
                sys.stderr.write(f"{index + 1} files, {time.monotonic() - start:.0f} s, {failures} failures\n")
    for outcome, count in outcomes.most_common():
        sys.stdout.write(f"{count:8} {outcome}\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(f"{failures:8} failures, {time.monotonic() - start:.0f} s, {peak:.0f} MiB at most\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
