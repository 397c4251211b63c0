"""Writes tests/data/gguf_blocks.gguf anew, with ik-llama-cpp-python: ``python -m tests.support.gguf_fixture``

Eight rows of every block type, from what llama-quantize makes of a seeded file, and the SHA-256 of libggml's own
dequantisation of them.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

import gguf

from tests.support.models import llama_quantize
from tests.support.models.gguf_blocks import TYPES

PATH = Path(__file__).parents[1] / "data" / "gguf_blocks.gguf"
ROWS = 8


def main() -> int:
    if (reason := llama_quantize.missing()) is not None:
        sys.exit(f"gguf_fixture: {reason}")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        source = llama_quantize.seeded_file(Path(folder) / "f32.gguf")
        for file_type in llama_quantize.FILE_TYPES:
            path = llama_quantize.quantise(source, Path(folder) / "quantised.gguf", file_type)
            for kind, rows in llama_quantize.tensors_of(path).values():
                found.setdefault(kind, rows[:ROWS])
    writer = gguf.GGUFWriter(PATH, "blocks")
    writer.add_string("made.by", f"tests/support/gguf_fixture.py with {llama_quantize.PACKAGE}")
    for kind in TYPES:
        values = llama_quantize.dequantised_by_libggml(found[kind], kind)
        writer.add_string(f"sha256.{kind}", hashlib.sha256(values.numpy().tobytes()).hexdigest())
        writer.add_tensor(kind, found[kind].numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
