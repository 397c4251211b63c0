"""The protocol of checkpoints: a reader of any format and architecture is a class with these methods, and no more."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import qops
from qops.formats import Checkpoint, open_checkpoint
from qops.formats.checkpoint import Weight
from qops.formats.folder import Folder
from qops.formats.gguf import GGUFFile
from qops.models.load import build_model
from qops.nn import Int4Linear, QuantizedLinear
from qops.testing import assert_bitwise
from tests.support.models.families import FAMILIES, IDS, random_model
from tests.support.models.gguf_files import llama_file


class Memory:
    """A dense model whose linears are 4-bit, but for its heads, as a format of its own would hold it."""

    def __init__(self, model: Any) -> None:
        self.config, self.dtype, self.fuses, self.generation_config = model.config, model.dtype, True, None
        self.config.architectures = [type(model).__name__]
        self.tensors = dict(model.state_dict())
        self.quantised = {
            name for name, module in model.named_modules() if type(module) is torch.nn.Linear and name != "lm_head"
        }
        self.asked: Counter[str] = Counter()
        self.finished = False

    def holds(self, name: str) -> bool:
        return name in self.tensors

    def linear(self, module: str) -> type[QuantizedLinear] | None:
        return Int4Linear if module in self.quantised else None

    def kind(self, module: str) -> str:
        return "own" if module in self.quantised else "dense"

    def weight(self, module: str) -> Weight:
        weight = self.tensor(f"{module}.weight")
        return qops.Int4Weight.quantize(weight, 16) if module in self.quantised else weight

    def tensor(self, name: str) -> torch.Tensor:
        self.asked[name] += 1
        return self.tensors[name]

    def finish(self, model: Any) -> None:
        self.finished = True


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_of_any_architecture_builds_what_quantize_model_makes(family):
    reader: Checkpoint = (memory := Memory(random_model(family)))
    model = build_model(reader, torch.float32, "cpu")
    wanted = qops.quantize_model(random_model(family), qops.Int4(16))
    assert model.qops_fusion == wanted.qops_fusion
    assert_bitwise(model(IDS).logits, wanted(IDS).logits, family)
    tied = set(model.all_tied_weights_keys)
    assert memory.finished and set(memory.asked) | tied == set(memory.tensors) and set(memory.asked.values()) == {1}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("linear", r"q_proj\.weight must be dense, as the checkpoint says, got Int4Weight"),
        ("weight", r"q_proj\.weight must be that of an Int4Linear, as the checkpoint says, got Tensor"),
    ],
)
def test_a_reader_that_contradicts_itself_is_told(method, message):
    reader = Memory(random_model("llama"))
    setattr(reader, method, lambda module: None if method == "linear" else reader.tensor(f"{module}.weight"))
    with pytest.raises(ValueError, match=message):
        build_model(reader, torch.float32, "cpu")


def test_the_door_knows_what_lies_there(tmp_path):
    qops.save_model(qops.quantize_model(random_model("llama")), tmp_path / "folder")
    path = llama_file().write(tmp_path / "m.gguf")
    assert isinstance(open_checkpoint(tmp_path / "folder"), Folder) and isinstance(open_checkpoint(path), GGUFFile)
    with pytest.raises(FileNotFoundError, match="no such GGUF file or model folder"):
        open_checkpoint(tmp_path / "nothing")
