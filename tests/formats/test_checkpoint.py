"""The protocol of checkpoints: a reader of any format and architecture is a class with these methods, and no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import qops
from qops.formats import Checkpoint, open_checkpoint
from qops.formats.checkpoint import Facts, QuantizedFacts, Weight
from qops.formats.folder import Folder
from qops.formats.gguf.file import GGUFFile
from qops.models import dense_model
from qops.models.load import build_model
from qops.nn import Int4Linear, Int8Linear, QuantizedLinear
from qops.nn.experts import expand_experts
from qops.nn.linears import LINEARS
from qops.testing import assert_bitwise
from tests.support.models.families import FAMILIES, IDS, random_model
from tests.support.models.gguf_files import llama_file

W8A8 = [linear for linear in LINEARS.values() if issubclass(linear, Int8Linear)]


class Memory:
    """A dense model whose linears are of one class, but for its heads, as a format of its own would hold it."""

    def __init__(self, model: Any, linear: type[QuantizedLinear] = Int4Linear) -> None:
        self.linear_class = linear
        self.config, self.dtype, self.fuses, self.generation_config = model.config, model.dtype, True, None
        self.config.architectures = [type(model).__name__]
        self.format, self.path = "memory", Path("memory")
        self.tensors = dict(model.state_dict())
        self.quantised = {
            name for name, module in model.named_modules() if type(module) is torch.nn.Linear and name != "lm_head"
        }
        self.asked: Counter[str] = Counter()
        self.finished = False

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def holds(self, name: str) -> bool:
        return name in self.tensors

    def describe(self, name: str) -> Facts:
        tensor = self.tensors[name]
        kind = self.kind(name.removesuffix(".weight")) if name.endswith(".weight") else "dense"
        quantized = QuantizedFacts(16, torch.float32, ("symmetric",), False) if kind == "own" else None
        return Facts(kind, tuple(tensor.shape), tensor.nbytes, quantized)

    def linear(self, module: str) -> type[QuantizedLinear] | None:
        return self.linear_class if module in self.quantised else None

    def kind(self, module: str) -> str:
        return "own" if module in self.quantised else "dense"

    def weight(self, module: str) -> Weight:
        weight = self.tensor(f"{module}.weight")
        if module not in self.quantised:
            return weight
        return qops.Int8Weight.quantize(weight) if self.linear_class in W8A8 else qops.Int4Weight.quantize(weight, 16)

    def activations(self, module: str) -> dict[str, torch.Tensor]:
        """Every layer has a scale of its own, which linears over one input share, but for v_proj of odd layers."""
        if not self.linear_class.static_input:
            return {}
        layer, own = int(module.split(".")[2]), module.endswith("v_proj")
        scale = 0.02 + 0.001 * layer + (0.003 if own and layer % 2 else 0)
        columns = self.tensors[f"{module}.weight"].shape[1]
        found = {"input_scale": torch.tensor([scale]), "input_zero_point": torch.tensor([layer], dtype=torch.int8)}
        found["pre_quant_scale"] = 1 + torch.arange(columns).half() / columns
        return {key: found[key] for key in self.linear_class.static_input}

    def tensor(self, name: str) -> torch.Tensor:
        self.asked[name] += 1
        return self.tensors[name]

    def finish(self, model: Any) -> None:
        self.finished = True


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_of_any_architecture_builds_what_quantize_model_makes(family):
    source = random_model(family)
    expand_experts(source)
    reader: Checkpoint = (memory := Memory(source))
    model = build_model(reader, torch.float32, "cpu")
    wanted = qops.quantize_model(random_model(family), qops.Int4(16))
    assert model.qops_fusion == wanted.qops_fusion
    assert_bitwise(model(IDS).logits, wanted(IDS).logits, family)
    tied = set(model.all_tied_weights_keys)
    assert memory.finished and set(memory.asked) | tied == set(memory.tensors) and set(memory.asked.values()) == {1}


def w8a8_model(linear: type[QuantizedLinear], dtype: torch.dtype = torch.float32, fuses: bool = True) -> Any:
    memory = Memory(random_model("llama"), linear)
    memory.fuses = fuses
    return build_model(memory, dtype, "cpu")


@pytest.mark.parametrize("linear", W8A8, ids=lambda linear: linear.scheme)
def test_activations_are_quantised_as_the_reader_says(linear):
    fused, apart = w8a8_model(linear), w8a8_model(linear, fuses=False)
    assert fused.qops_fusion.not_fused is None
    for index, layer in enumerate(fused.model.layers):
        static, qkv = linear.static_input, layer.self_attn.qkv_proj
        assert (qkv.merged is None) == bool(static and index % 2) and layer.mlp.gate_up_proj.merged is not None
        assert layer.input_layernorm.int8 == layer.post_attention_layernorm.int8 == linear.rows_rule
        for name, part in qkv.split().items():
            want = apart.model.layers[index].self_attn.get_submodule(name)
            assert type(part) is type(want) is linear
            assert part.activations().keys() == want.activations().keys() == set(static)
            for key, tensor in want.activations().items():
                assert_bitwise(part.activations()[key], tensor, key)
    # Each product has the same bits; what attention rounds otherwise turns a code over here and there.
    assert (fused(IDS).logits - apart(IDS).logits).abs().max() < 0.05 * apart(IDS).logits.abs().max()


@pytest.mark.parametrize("linear", W8A8, ids=lambda linear: linear.scheme)
def test_folders_keep_how_activations_are_quantised(linear, tmp_path):
    model = w8a8_model(linear, torch.bfloat16)
    want = model(IDS).logits
    qops.save_model(model, tmp_path)
    again = qops.load_model(tmp_path)
    assert_bitwise(again(IDS).logits, want)
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert_bitwise(state[name], tensor, name)
    assert not any(isinstance(part, QuantizedLinear) for part in dense_model(again).modules())


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), r"tensor model\.layers\.0\.mlp\.up_proj\.input_scale is missing"),
        (
            lambda tensors, name: tensors.update({name: tensors[name] * 0}),
            r"model\.layers\.0\.mlp\.up_proj: Int8StaticLinear: input_scale must be positive and finite, got 0\.0",
        ),
        (lambda tensors, name: tensors.update({f"{name}_2": tensors[name] + 0}), "every tensor must have a place"),
    ],
)
def test_folders_without_a_usable_scale_are_refused(change, message, tmp_path):
    qops.save_model(w8a8_model(LINEARS["int8_static"]), tmp_path)
    tensors = saved_tensors(tmp_path)
    change(tensors, "model.layers.0.mlp.up_proj.input_scale")
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        qops.load_model(tmp_path)


@pytest.mark.parametrize("fuses", [True, False])
def test_static_scales_are_offloaded_and_come_back(fuses):
    accelerate = pytest.importorskip("accelerate")
    model = w8a8_model(LINEARS["int8_static"], fuses=fuses)
    want = model(IDS).logits
    accelerate.cpu_offload(model, "cpu", offload_buffers=True)
    for _ in range(2):
        assert_bitwise(model(IDS).logits, want)


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
