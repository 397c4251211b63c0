"""Feeds mutated folders to qops.load_model and read_checkpoint: ``python -m tests.support.fuzz_folders --count 20000``

Of every format that is read, in turn. A folder either loads, and a forward of four tokens runs, or is a ValueError or
FileNotFoundError that names the path. Anything else is a failure: another exception, a crash, more than 2 GiB of
memory, more than ten seconds. Folder number i of a seed is always the same: ``--only i --keep FOLDER`` writes it.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qops.formats import read_checkpoint
from qops.models import load_model
from tests.support.formats import folders, package_folders
from tests.support.formats.folders import Written, write_as
from tests.support.fuzz_gguf import EDGES, SECONDS, TooSlow, limit_memory, within_seconds

_TOKEN = {"dynamic": True, "strategy": "token", "symmetric": True, "num_bits": 8, "type": "int"}
_STATIC = {"dynamic": False, "strategy": "tensor", "symmetric": False, "num_bits": 8, "type": "int"}
BASES: dict[str, Callable[[], Written]] = {
    "gptq": lambda: write_as(*folders.gptq(act_order=True), **_SMALL),
    "gptq 8 bits": lambda: write_as(*folders.gptq(bits=8, version=2), **_SMALL),
    "awq": lambda: write_as(*folders.awq(), **_SMALL),
    "awq gemv": lambda: write_as(*folders.awq("gemv"), **_SMALL),
    "compressed-tensors": lambda: write_as(*folders.compressed_tensors(symmetric=False), **_SMALL),
    "w8a8": lambda: write_as(*folders.compressed_tensors(bits=8, group_size=-1, packed=False, inputs=_TOKEN), **_SMALL),
    "w8a8 static": lambda: write_as(
        *folders.compressed_tensors(bits=8, group_size=-1, packed=False, inputs=_STATIC), **_SMALL
    ),
    "hqq": lambda: package_folders.hqq(4),
    "quanto": lambda: package_folders.quanto("qint4"),
    "bitsandbytes": package_folders.bitsandbytes,
    "smooth_quant": package_folders.smooth_quant,
    "modelopt": lambda: package_folders.modelopt("W4A16_AWQ"),
    "torchao": lambda: package_folders.torchao("Int8Tensor"),
}
_SMALL: dict[str, Any] = {"num_hidden_layers": 1}


@dataclass
class Files:
    """A folder in memory: JSON files as objects, safetensors files as header and data."""

    json: dict[str, Any]
    headers: dict[str, dict[str, Any]]
    data: dict[str, bytes]

    def write(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in self.json.items():
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            (folder / name).write_bytes(text)
        for name, header in self.headers.items():
            text = json.dumps(header).encode()
            (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + self.data[name])


def bases(folder: Path) -> dict[str, Files]:
    """A folder of each format, whole or in shards, each of which loads."""
    found = {}
    for index, (name, make) in enumerate(BASES.items()):
        written = make()
        written.shards = 1 + index % 2
        written.files.setdefault("generation_config.json", {"max_new_tokens": 3})
        path = written.write(folder / name.replace(" ", "-"))
        files = Files({}, {}, {})
        for file in path.iterdir():
            data = file.read_bytes()
            if file.suffix == ".json":
                files.json[file.name] = json.loads(data)
            else:
                (size,) = struct.unpack_from("<Q", data)
                files.headers[file.name] = json.loads(data[8 : 8 + size])
                files.data[file.name] = data[8 + size :]
        found[name] = files
    return found


# --- mutations -------------------------------------------------------------------------------------------------------

_ODD: tuple[Any, ...] = (None, True, False, -1, 0, 1, 3, 64, 1.5, -0.0, "", "gptq", "\udcff", "x" * 3000, [], {}, [[]])


def absurd(rng: random.Random) -> Any:
    return rng.choice((rng.choice(EDGES), rng.choice(_ODD), rng.choice(_ODD), float("nan"), float("inf"), 1e308))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in an object of JSON."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, content in list(items):
        found.append((value, key))
        found += _places(content)
    return found


def _settings_places(files: Files) -> list[tuple[Any, Any]]:
    """Those of the quantization config, wherever it stands."""
    config = files.json["config.json"]
    settings = config.get("quantization_config") or files.json.get("quanto_qmap.json")
    return _places(settings) if settings else _config_places(files)


def _config_places(files: Files) -> list[tuple[Any, Any]]:
    """All but what a model is to return, which is Transformers' own business in each forward."""
    returned = ("output_", "return_dict", "use_return_dict")
    return [place for place in _places(files.json["config.json"]) if not str(place[1]).startswith(returned)]


def change_settings(rng: random.Random, files: Files) -> None:
    places = _settings_places(files)
    if places:
        container, key = rng.choice(places)
        container[key] = absurd(rng)


def drop_setting(rng: random.Random, files: Files) -> None:
    places = _settings_places(files)
    if places:
        container, key = rng.choice(places)
        del container[key]


def change_config(rng: random.Random, files: Files) -> None:
    container, key = rng.choice(_config_places(files))
    old = container[key]
    container[key] = rng.choice(EDGES) if isinstance(old, int) and rng.random() < 0.5 else absurd(rng)


def drop_config(rng: random.Random, files: Files) -> None:
    container, key = rng.choice(_config_places(files))
    del container[key]


def change_other_json(rng: random.Random, files: Files) -> None:
    name = rng.choice(list(files.json))
    places = _config_places(files) if name == "config.json" else _places(files.json[name])
    if places:
        container, key = rng.choice(places)
        container[key] = rng.choice((absurd(rng), "../config.json", "/etc/passwd", "model.safetensors"))


def break_json(rng: random.Random, files: Files) -> None:
    name = rng.choice(list(files.json))
    text = json.dumps(files.json[name]).encode()
    cut = text[: rng.randrange(len(text))]
    files.json[name] = rng.choice((cut, b"", b"[" * 5000, b"null", b"[]", b"{}", b"\xff\xfe", text + b"}", b"1e999"))


def drop_file(rng: random.Random, files: Files) -> None:
    name = rng.choice([*files.json, *files.headers])
    files.json.pop(name, None)
    files.headers.pop(name, None)


def _entry(rng: random.Random, files: Files) -> tuple[str, str, dict[str, Any]]:
    file = rng.choice(list(files.headers))
    name = rng.choice([name for name in files.headers[file] if name != "__metadata__"])
    return file, name, files.headers[file][name]


def change_tensor(rng: random.Random, files: Files) -> None:
    file, name, entry = _entry(rng, files)
    header = files.headers[file]
    how = rng.randrange(7)
    if how == 0:
        entry["dtype"] = rng.choice(("F16", "BF16", "F32", "F64", "I8", "U8", "I16", "I32", "I64", "F8_E4M3", "Q9", 3))
    elif how == 1 and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice((*EDGES, -1))
    elif how == 2:
        entry["shape"] = rng.choice((entry["shape"][::-1], [1, *entry["shape"]], entry["shape"][1:], []))
    elif how == 3:
        entry["data_offsets"] = [rng.choice(EDGES), rng.choice(EDGES)]
    elif how == 4:
        _, _, other = _entry(rng, files)
        entry["shape"], entry["dtype"] = list(other["shape"]), other["dtype"]
    elif how == 5:
        header[rng.choice((name + "x", "", "x" * 999, name.rpartition(".")[0], "a..b"))] = header.pop(name)
    else:
        entry |= absurd(rng) if isinstance(absurd(rng), dict) else {"extra": 1}


def rename_key(rng: random.Random, files: Files) -> None:
    """The tensor of another kind, by its last name."""
    file, name, _ = _entry(rng, files)
    _, other, _ = _entry(rng, files)
    renamed = f"{name.rpartition('.')[0]}.{other.rpartition('.')[2]}"
    header = files.headers[file]
    header[renamed] = header.pop(name)
    index = files.json.get(folders.INDEX)
    if isinstance(index, dict) and rng.random() < 0.8:
        index["weight_map"].pop(name, None)
        index["weight_map"][renamed] = file


def other_shape(rng: random.Random, files: Files) -> None:
    """As many elements in another shape: the container has nothing to say."""
    _, _, entry = _entry(rng, files)
    count = 1
    for extent in entry["shape"]:
        count *= extent
    divisors = [d for d in (1, 2, 3, 4, 8, 16, 32, 64) if count % d == 0]
    first = rng.choice(divisors)
    entry["shape"] = rng.choice(([first, count // first], [count // first, first], [count], [first, 1, count // first]))


def drop_tensor(rng: random.Random, files: Files) -> None:
    """With its bytes, so that the file is whole."""
    file, name, entry = _entry(rng, files)
    start, end = entry["data_offsets"]
    del files.headers[file][name]
    files.data[file] = files.data[file][:start] + files.data[file][end:]
    for other in files.headers[file].values():
        if "data_offsets" in other and other["data_offsets"][0] >= end:
            other["data_offsets"] = [offset - (end - start) for offset in other["data_offsets"]]
    index = files.json.get(folders.INDEX)
    if isinstance(index, dict):
        index["weight_map"].pop(name, None)


def spoil_data(rng: random.Random, files: Files) -> None:
    """NaN, infinities, groups out of range, zero points that nobody writes."""
    file, _, entry = _entry(rng, files)
    start, end = entry["data_offsets"]
    if end == start:
        return
    data = bytearray(files.data[file])
    if rng.random() < 0.3:
        data[start:end] = bytes([rng.choice((0, 0x7F, 0x80, 0xFF))]) * (end - start)
    for _ in range(rng.choice((1, 5, 100))):
        data[rng.randrange(start, end)] = rng.choice((0, 0x7C, 0x7F, 0xFC, 0xFF, rng.randrange(256)))
    files.data[file] = bytes(data)


def cut_data(rng: random.Random, files: Files) -> None:
    file = rng.choice(list(files.data))
    data = files.data[file]
    files.data[file] = rng.choice((data[: rng.randrange(len(data))], data + bytes(rng.choice((1, 64))), b""))


def change_metadata(rng: random.Random, files: Files) -> None:
    header = files.headers[rng.choice(list(files.headers))]
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and metadata and rng.random() < 0.8:
        key = rng.choice(list(metadata))
        metadata[key] = rng.choice(("", "{}", "[", "null", "1", "x" * 999, metadata[key][: len(metadata[key]) // 2]))
    else:
        header["__metadata__"] = absurd(rng)


CHANGES: tuple[tuple[Callable[[random.Random, Files], None], int], ...] = (
    (change_settings, 6),
    (drop_setting, 2),
    (change_config, 4),
    (drop_config, 2),
    (change_other_json, 2),
    (break_json, 1),
    (drop_file, 1),
    (change_tensor, 5),
    (rename_key, 2),
    (other_shape, 4),
    (drop_tensor, 2),
    (spoil_data, 6),
    (cut_data, 1),
    (change_metadata, 2),
)


def mutated(whole: dict[str, Files], seed: int, index: int) -> tuple[Files, str]:
    """Folder number `index`, and what was done to it."""
    rng = random.Random(f"{seed} {index}")
    name = list(whole)[index % len(whole)]
    files, done = copy.deepcopy(whole[name]), [name]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        (change,) = rng.choices([change for change, _ in CHANGES], [weight for _, weight in CHANGES])
        before = copy.deepcopy(files)
        try:
            change(rng, files)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            files = before  # what an earlier change has left is no folder that this one knows
            continue
        done.append(change.__name__)
    return files, " + ".join(done)


# --- one folder ------------------------------------------------------------------------------------------------------


def outcome_of(path: Path) -> str:
    """ "loads" or "refused"; what is neither raises."""
    found = []
    for what, read in (("weights", read_checkpoint), ("model", load_model)):
        try:
            result: Any = read(path)
        except (ValueError, FileNotFoundError) as error:
            assert str(path) in str(error), f"{what}: the message does not name the folder: {error!r}"
            found.append(f"{what} refused")
            continue
        if what == "model":
            ids = torch.arange(4).remainder(result.config.vocab_size)[None]
            with torch.inference_mode():
                logits = result(ids).logits
            assert logits.shape == (1, 4, result.config.vocab_size)
        found.append(f"{what} loads" if what == "model" else f"{what} are read")
    return ", ".join(found)


def limited(path: Path) -> str:
    """outcome_of, in bounded time; what it warns about is said by others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return within_seconds(outcome_of, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one folder")
    parser.add_argument("--keep", type=Path, help="folder for those that fail")
    arguments = parser.parse_args()
    faulthandler.enable()
    outcomes: Counter[str] = Counter()
    failures, start = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        whole = bases(Path(temporary))
        path = Path(temporary) / "mutated"
        for files in whole.values():  # also loads what is imported late
            files.write(path)
            outcome = limited(path)
            assert outcome == "weights are read, model loads", outcome
        limit_memory()
        numbers = range(arguments.count) if arguments.only is None else [arguments.only]
        for index in numbers:
            files, done = mutated(whole, arguments.seed, index)
            files.write(path)
            if arguments.only is not None and arguments.keep is not None:
                files.write(arguments.keep / str(index))
            faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # where no signal handler runs
            try:
                outcomes[limited(path)] += 1
            except (Exception, TooSlow):
                failures += 1
                sys.stderr.write(f"folder {index} ({done}):\n{traceback.format_exc()}\n")
                if arguments.keep is not None:
                    files.write(arguments.keep / str(index))
            faulthandler.cancel_dump_traceback_later()
            if (index + 1) % 1000 == 0:
                sys.stderr.write(f"{index + 1} folders, {time.monotonic() - start:.0f} s, {failures} failures\n")
    for outcome, count in outcomes.most_common():
        sys.stdout.write(f"{count:8} {outcome}\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(f"{failures:8} failures, {time.monotonic() - start:.0f} s, {peak:.0f} MiB at most\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
