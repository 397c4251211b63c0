"""``bench.whole_model``: runners are verified before they are timed, and one that fails costs itself alone."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import whole_model
from bench.peers.models import Runner
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


def test_importing_needs_no_peer(monkeypatch):
    for name in ("llama_cpp", "ik_llama_cpp"):
        monkeypatch.setitem(sys.modules, name, None)
    names = [runner.name for runner in whole_model.runners()]
    assert names[0] == "qops" and {"llama.cpp", "ik_llama.cpp"} < set(names) and len(set(names)) == len(names)
