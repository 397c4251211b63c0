"""What docs/calibration.md tells: llm-compressor and GPTQModel calibrate and write, `load_model` runs it exactly.

On a CPU and on a tiny random model, each in an environment that has the package.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

import qops
from qops.models import dense_model
from qops.nn import Int8CompressedTensorsLinear, QuantizedLinear
from qops.testing import assert_bitwise
from tests.support.house.pages import python_blocks
from tests.support.models.families import IDS, VOCAB, random_model

SAMPLES = torch.randint(3, VOCAB, (16, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def with_gradients():
    """As users have it."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def needs(package: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is missing")


def dense(folder: Path) -> str:
    """A model and, as both packages ask for one, a tokenizer."""
    random_model("llama", intermediate_size=128).half().save_pretrained(folder)
    words = tokenizers.models.WordLevel({f"word{number}": number for number in range(VOCAB)}, unk_token="word0")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), pad_token="word0")
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(recipe: int, tmp_path: Path) -> Path:
    """A script of the page, with its names bound to something small."""
    source, out = dense(tmp_path / "dense"), tmp_path / "out"
    names: dict[str, Any] = {"dense": source, "folder": str(out), "samples": SAMPLES.tolist()}
    exec(compile(python_blocks("calibration.md")[recipe], "calibration.md", "exec"), names)
    return out


@needs("llmcompressor")
@pytest.mark.parametrize(("recipe", "operator"), [(0, "int4_gemm"), (1, "int8_gemm")])
def test_llm_compressor(tmp_path, recipe, operator):
    folder = run(recipe, tmp_path)
    model = qops.load_model(folder)
    linears = {name: part for name, part in dense_names(model) if part.operator == operator}
    assert len(linears) == 21
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.CompressedTensorsConfig(run_compressed=False), dtype=torch.float16
    )
    twin = dense_model(model, torch.float16)
    for name in linears:
        assert_bitwise(twin.get_submodule(name).weight, theirs.get_submodule(name).weight, name)
    if operator == "int8_gemm":
        assert all(isinstance(part, Int8CompressedTensorsLinear) for part in linears.values())


@needs("gptqmodel")
def test_gptqmodel(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # as the page says
    monkeypatch.chdir(tmp_path)  # it writes a log where it stands
    folder = run(2, tmp_path)
    from gptqmodel import BACKEND, GPTQModel

    model = qops.load_model(folder)
    theirs = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    twin = dense_model(model, torch.float16)
    names = [name for name, _ in dense_names(model)]
    assert len(names) == 21
    for name in names:
        weight = theirs.get_submodule(name).dequantize_weight().T
        assert_bitwise(twin.get_submodule(name).weight, weight.contiguous().half(), name)
    with torch.no_grad():
        found, wanted = model(IDS).logits, theirs(IDS).logits
    assert (found - wanted).abs().max() <= 0.05 * wanted.abs().max()


def dense_names(model: Any) -> list[tuple[str, QuantizedLinear]]:
    """Quantised linears by the names that they have in the dense model."""
    from qops.models.replacement import entries

    return [(name.removesuffix(".weight"), owner) for name, _, owner in entries(model) if owner is not None]
