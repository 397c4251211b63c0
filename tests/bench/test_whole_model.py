"""``bench.whole_model``: runners are verified before they are timed, and one that fails costs itself alone."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from bench import whole_model
from bench.peers.models import Runner, seeded
from bench.peers.models.ours import QopsModel
from tests.support.models.gguf_files import llama_file

MODULES = ("bench.peers.models.ours", __name__)


class Louder(QopsModel):
    def logits(self) -> np.ndarray:
        return 1.2 * super().logits()


def crash(path: Path, threads: int) -> QopsModel:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def refuse(path: Path, threads: int) -> QopsModel:
    raise OSError("no such library")


RUNNERS = [
    Runner("louder", Louder, "wrong", ()),
    Runner("crashes", crash, "none", ()),
    Runner("refuses", refuse, "none", ()),
    Runner("absent", refuse, "none", ("qops-is-not-this", "torch")),
]


@pytest.mark.slow
def test_who_fails_has_a_reason_and_who_computes_the_model_has_times(tmp_path):
    file = llama_file().write(tmp_path / "m.gguf")
    with torch.inference_mode():
        rows = whole_model.measure(file, 1, 2, whole_model.runners(MODULES), MODULES)
    found = {row.runner: row for row in rows}
    for name in ("qops", "qops, generate"):
        row = found.pop(name)
        assert row.reasons == {} and 0 < max(row.relative_error.values()) < 0.05
        assert {phase: len(samples) for phase, samples in row.seconds.items()} == {"decode": 2, "prefill": 2}
        assert min(*row.seconds["decode"], *row.seconds["prefill"]) > 0
        assert f"| 1 | {name} | " in whole_model.table(rows)
    louder = found["louder"]
    assert all(samples == [] for row in found.values() for samples in row.seconds.values())
    assert all(len(set(row.reasons.values())) == 1 and len(row.reasons) == 2 for row in found.values() if row != louder)
    assert {name: row.reasons["decode"] for name, row in found.items()} == {
        "louder": f"ValueError: wrong logits: error {louder.relative_error['decode']:.2g} of the largest, at most 0.1",
        "crashes": "RuntimeError: its process ended with exit code -11",
        "refuses": "OSError: no such library",
        "absent": "not installed: qops-is-not-this",
    }
    assert min(louder.relative_error.values()) > 0.15 and set(louder.reasons) == {"decode", "prefill"}
    assert "| 1 | refuses | OSError: no such library | OSError: no such library |  | none |" in whole_model.table(rows)


def test_files_of_random_weights_are_models(tmp_path):
    shape = seeded.Shape(hidden=64, columns=96, layers=2, heads=4, kv_heads=2, head_dim=16, vocabulary=72)
    file = seeded.write(tmp_path / "m.gguf", shape)
    assert file.read_bytes() == seeded.write(tmp_path / "again.gguf", shape).read_bytes()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    kinds = {
        "token_embd.weight": ("Q8_0", 64),
        "blk.1.ffn_down.weight": ("Q4_1", 96),
        "blk.0.attn_k.weight": ("Q4_1", 64),
    }
    for name, (kind, k) in kinds.items():
        values = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert tensors[name].tensor_type.name == kind and abs(values.std() * k**0.5 - 1) < 0.15, name
        assert abs(values.mean()) < 0.1 * values.std(), name
    with torch.inference_mode():
        found = whole_model.dense_logits(file)["decode"]
        model = QopsModel(file, 1)
        whole_model.feed(model, "decode")
    assert found.shape == (72,) and 0.3 < np.abs(found).max() < 10
    assert np.abs(model.logits() - found).max() < 0.05 * np.abs(found).max()


def test_importing_needs_no_peer(monkeypatch):
    for name in ("llama_cpp", "ik_llama_cpp"):
        monkeypatch.setitem(sys.modules, name, None)
    names = [runner.name for runner in whole_model.runners()]
    assert names[0] == "qops" and {"llama.cpp", "ik_llama.cpp"} < set(names) and len(set(names)) == len(names)
