"""What is known of a checkpoint before it is read, against what it turns out to be."""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tqdm import tqdm

import qops
import qops.nn.linears
from qops.__main__ import main
from qops.formats import open_checkpoint
from qops.formats.folders.tensors import TensorFiles
from qops.formats.gguf.contents import Contents
from qops.models.inspect import inspect_checkpoint
from qops.models.quantize import weight_bytes
from qops.nn import QuantizedLinear
from qops.testing import assert_bitwise
from tests.support.formats import folders, package_folders
from tests.support.formats.folders import write_as
from tests.support.models.families import IDS, PARTLY, random_model
from tests.support.models.gguf_files import HIDDEN, llama_file

STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
DYNAMIC = {**STATIC, "strategy": "token", "dynamic": True}
FOLDERS = {
    "gptq": folders.gptq(),
    "gptq symmetric act-order": folders.gptq(symmetric=True, act_order=True),
    "gptq version 2": folders.gptq(version=2),
    "gptq 8 bits": folders.gptq(bits=8, symmetric=True),
    "awq": folders.awq(),
    "awq gemv": folders.awq("gemv"),
    "compressed-tensors": folders.compressed_tensors(),
    "compressed-tensors asymmetric": folders.compressed_tensors(symmetric=False),
    "compressed-tensors 8 bits": folders.compressed_tensors(bits=8, group_size=-1),
    "compressed-tensors static": folders.compressed_tensors(bits=8, group_size=-1, packed=False, inputs=STATIC),
    "compressed-tensors W8A8": folders.compressed_tensors(bits=8, group_size=-1, packed=False, inputs=DYNAMIC),
}
# Written without a package: whole folders.
PACKAGES = {
    "HQQ": lambda: package_folders.hqq(4),
    "HQQ 8 bits": lambda: package_folders.hqq(8),
    "quanto qint4": lambda: package_folders.quanto("qint4"),
    "quanto qint8": lambda: package_folders.quanto("qint8"),
    "bitsandbytes": package_folders.bitsandbytes,
    "lmdeploy": package_folders.smooth_quant,
    "ModelOpt AWQ": lambda: package_folders.modelopt("W4A16_AWQ", smoothed=True),
    "ModelOpt SmoothQuant": lambda: package_folders.modelopt("W8A8_SQ_PER_CHANNEL", smoothed=True),
    "torchao Int8Tensor": lambda: package_folders.torchao("Int8Tensor", dynamic=True),
    "torchao Int4Tensor": lambda: package_folders.torchao("Int4Tensor"),
    "torchao Intx": lambda: package_folders.torchao("IntxUnpackedToInt8Tensor"),
}
FILES = {
    "Q4_0, tied": {"weights": "Q4_0", "table": "Q4_1"},
    "Q4_1": {"weights": "Q4_1", "table": "Q4_0", "output": "Q5_0"},
    "Q5_0 and Q8_0": {"weights": "Q5_0", "overrides": {"blk.1.ffn_up": "Q8_0"}},
    "F16": {"weights": "Q4_0", "overrides": {"blk.0.attn_q": "F16"}, "table": "F16", "bias": True},
}
# In which linears of one input differ in what is not read, and so are not merged.
DIFFERENT = ("gptq symmetric act-order", "ModelOpt AWQ", "ModelOpt SmoothQuant")
CASES = [*FOLDERS, *PACKAGES, *FILES, "saved"]


def write(case: str, path: Path) -> Path:
    if case == "saved":
        scheme = {
            "lm_head": "int8_weight_only",
            "*.down_proj": "int8",
            "*.o_proj": "w4a8",
            "*": qops.Int4(16, symmetric=False),
        }
        qops.save_model(qops.quantize_model(random_model("qwen2"), scheme), path)
        return path
    if case in PACKAGES:
        return PACKAGES[case]().write(path)
    if case in FILES:
        return llama_file(**FILES[case]).write(path / "model.gguf")
    return write_as(*FOLDERS[case]).write(path)


@pytest.mark.parametrize("case", CASES)
def test_what_is_described_is_what_is_read(tmp_path, case):
    path = write(case, tmp_path)
    checkpoint = open_checkpoint(path)
    size = 0
    for name in checkpoint.names:
        fact, module = checkpoint.describe(name), name.removesuffix(".weight")
        size += fact.size_bytes
        if module == name or checkpoint.linear(module) is None:
            assert fact.quantized is None and fact.shape == tuple(checkpoint.tensor(name).shape), name
            continue
        weight: Any = checkpoint.weight(module)
        assert fact.shape == (weight.out_features, weight.in_features), name
        found = fact.quantized
        assert found is not None and fact.stored_as == checkpoint.kind(module), name
        assert (found.group_size, found.scale_dtype) == (weight.group_size, weight.scale_dtype), name
        assert found.zero_dtype == weight.zero_dtype, name
        assert weight.kind in found.kinds and set(found.kinds) <= set(weight.KINDS), name
        assert found.act_order in (weight.act_order, None), name
    files = [path] if path.is_file() else path.glob("*.safetensors")
    on_disk = sum(file.stat().st_size for file in files)
    assert 0.75 * on_disk < size < on_disk


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_what_is_inspected_is_what_is_loaded(tmp_path, case, dtype):
    path = write(case, tmp_path)
    found = inspect_checkpoint(path, dtype)
    model = qops.load_model(path, dtype)
    assert (found.architecture, found.dtype) == (type(model).__name__, str(model.dtype).removeprefix("torch."))
    assert (found.not_fused, found.own) == (model.qops_fusion.not_fused, model.qops_fusion.own)
    linears = {name: part for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}
    products = {
        name: (product.operator, product.shape) for product in found.products if product.plans for name in product.names
    }
    if case in DIFFERENT:
        assert "that differ in" in str(found)
    else:
        assert products == {
            name.removesuffix(".merged"): (part.operator, (part.out_features, part.in_features))
            for name, part in linears.items()
        }
    # What its zero points or its order decide is counted at its largest.
    loaded, parts = weight_bytes(model), sum(part.memory_bytes for part in found.parts)
    is_open = case in DIFFERENT or any(
        len(part.kinds) > 1 or part.act_order is None for part in found.parts if part.kinds
    )
    assert loaded <= found.memory_bytes <= 1.2 * loaded and (is_open or found.memory_bytes == loaded)
    # Parts are parameters: what a model computes itself is none, nor the factors of inputs.
    rest = 4000 if "ModelOpt" in case else 1000
    assert found.memory_bytes - rest < parts <= found.memory_bytes < found.peak_bytes


def test_nothing_is_read(tmp_path, monkeypatch):
    paths = [write("gptq", tmp_path / "folder"), write("Q4_1", tmp_path)]
    reads: Counter[str] = Counter()
    monkeypatch.setattr(TensorFiles, "read", lambda self, name: reads.update([name]))
    monkeypatch.setattr(Contents, "rows", lambda self, name: reads.update([name]))
    for path in paths:
        inspect_checkpoint(path)
    assert not reads


@pytest.mark.parametrize("family", [*PARTLY, "qwen3"])
def test_other_families(tmp_path, family):
    path = write_as(*folders.compressed_tensors(group_size=16), family).write(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = inspect_checkpoint(path)
    model = qops.load_model(path)
    assert (found.not_fused, found.own) == (model.qops_fusion.not_fused, model.qops_fusion.own)
    assert found.memory_bytes == weight_bytes(model)


# Refusals ------------------------------------------------------------------------------------------------------------


def drop(written):
    del written.tensors["model.layers.1.mlp.up_proj.qweight"]


def drop_norm(written):
    del written.tensors["model.layers.1.input_layernorm.weight"]


def add(written):
    written.tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(3)


def misshape(written):
    written.config["intermediate_size"] = 128


def misname(written):
    written.config["quantization_config"]["quant_method"] = "other"


def be_dense(written):
    del written.config["quantization_config"]


def have_small_groups(written):
    other = write_as(*folders.awq(group_size=8))
    written.config, written.tensors = other.config, other.tensors


@pytest.mark.parametrize("bend", [drop, drop_norm, add, misshape, misname, be_dense, have_small_groups])
def test_what_load_model_refuses_is_refused_in_its_words(tmp_path, capsys, bend):
    written = write_as(*folders.gptq())
    bend(written)
    path = written.write(tmp_path)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        qops.load_model(path)
    with pytest.raises(type(caught.value)) as found:
        inspect_checkpoint(path)
    assert str(found.value) == str(caught.value)
    assert main(["inspect", str(path)]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"qops inspect: {caught.value}\n")


# The command line ----------------------------------------------------------------------------------------------------


def test_the_text(tmp_path, capsys):
    file = llama_file(weights="Q4_1", table="Q8_0", output="Q4_0", overrides={"blk.0.ffn_down": "Q5_0"})
    file.tensors["token_embd.weight"] = ("Q8_0", np.zeros((75, HIDDEN), np.float32), 0)
    file.tensors["output.weight"] = ("Q4_0", np.ones((75, HIDDEN), np.float32), 0)
    path = file.write(tmp_path / "model.gguf")
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: GGUF: Q4_0, Q4_1, Q5_0, Q8_0"
    assert lines[1].startswith("LlamaForCausalLM in bfloat16: num_hidden_layers 2, hidden_size 64,")
    assert lines[2] == "decoder layers: fused, once they are proven to compute what Transformers' own do"
    rows = {line.split("  ")[0]: line.split() for line in reversed(lines)}
    gate_up = "gate_proj, up_proj 4 96 x 64 Q4_1 merged Int4Linear int4_gemm 32 offset no 0.0 MB 0.0 MB"
    assert rows["gate_proj, up_proj"] == gate_up.split()
    down = [
        "down_proj 1 64 x 96 Q4_1 Int4Linear int4_gemm",
        "down_proj 1 64 x 96 Q5_0 Int8WeightOnlyLinear int8_weight",
    ]
    assert all(any(" ".join(line.split()).startswith(want) for line in lines) for want in down)
    assert "dense: model.embed_tokens: N = 75 is no multiple of 8" in lines
    assert "dense: lm_head: N = 75 is no multiple of 8" in lines
    plan = rows["gate_up_proj"]
    assert plan[1:7] == ["2", "192", "x", "64", "int4_gemm", "1"] and plan[7].startswith("kernel=")
    assert not any("has no CUDA kernel" in line for line in lines)


def test_json_and_options(tmp_path, capsys):
    path = str(write_as(*folders.gptq(symmetric=True)).write(tmp_path / "gptq"))
    assert main(["inspect", path, "--json", "--zero-add", "none"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"].endswith("GPTQ version 2, 4 bit") and found["config"]["hidden_size"] == 64
    part = next(part for part in found["parts"] if "model.layers.2.mlp.down_proj.weight" in part["names"])
    assert (part["shape"], part["group_size"], part["kinds"]) == ([64, 96], 32, ["symmetric", "zero_point"])
    assert set(found["products"][0]["plans"]) == {"1", "512"}
    path = str(write_as(*folders.awq(symmetric=True)).write(tmp_path / "awq"))
    assert main(["inspect", path]) == 1 and "symmetric=True says so" in capsys.readouterr().err
    assert main(["inspect", path, "--symmetric"]) == 0 and "zero_point" not in capsys.readouterr().out
    assert main(["inspect", path, "--zero-add", "word"]) == 1
    assert main(["inspect", str(tmp_path / "none")]) == 1 and "no such GGUF file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "--zero-add", "one"], ["a", "--dtype", "int8"]], ids=str)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["inspect", *arguments])
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("usage: python -m qops")


# Devices -------------------------------------------------------------------------------------------------------------


def without_kernel(monkeypatch, operator: str) -> None:
    def refuse(x: torch.Tensor, *args: object, **kwargs: object) -> None:
        raise RuntimeError(f"qops.{operator}: x must be on a CPU, as qops has no CUDA kernel of this operator")

    monkeypatch.setattr(qops.nn.linears, operator, refuse)


@pytest.mark.parametrize("case", ["compressed-tensors 8 bits", "Q5_0 and Q8_0"])
def test_a_linear_without_a_kernel_is_named_before_anything_is_read(tmp_path, monkeypatch, case):
    path = write(case, tmp_path)
    without_kernel(monkeypatch, "int8_weight_only_gemm")
    for reader, read in ((TensorFiles, "read"), (Contents, "rows")):
        monkeypatch.setattr(reader, read, lambda self, name: pytest.fail(f"{name} was read"))
    more = 20 if "8 bits" in case else 13
    named = rf"qops\.load_model: model\.layers\.0\.self_attn\.q_proj and {more} more linears"
    with pytest.raises(RuntimeError, match=rf"^{named}: no int8_weight_only_gemm on cpu: .* no CUDA kernel"):
        qops.load_model(path)


def test_an_output_layer_without_a_kernel_is_named(tmp_path, monkeypatch):
    """It computes in float32, for which there may be none where there is one for the others."""
    product = qops.nn.linears.int4_gemm

    def in_16_bits(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.dtype == torch.float32:
            raise RuntimeError("qops.int4_gemm: x must have dtype float16 or bfloat16 on a GPU, got float32")
        return product(x, *args, **kwargs)

    monkeypatch.setattr(qops.nn.linears, "int4_gemm", in_16_bits)
    path = llama_file(weights="Q4_1", table="Q4_1").write(tmp_path / "tied.gguf")
    with pytest.raises(RuntimeError, match=r"^qops\.load_model: lm_head: no int4_gemm on cpu: .* got float32"):
        qops.load_model(path)
    path = llama_file(weights="Q4_1", table="Q4_1", output="F16").write(tmp_path / "dense.gguf")
    assert qops.load_model(path, torch.float16, prove=False).dtype == torch.float16
    with pytest.raises(RuntimeError, match=r"q_proj and 13 more linears: no int4_gemm on cpu"):
        qops.load_model(path, torch.float32)
    model = random_model("llama", tie_word_embeddings=False)
    with pytest.raises(RuntimeError, match=r"^qops\.quantize_model: lm_head: no int4_gemm on cpu"):
        qops.quantize_model(model, {"lm_head": qops.Int4(16)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_named(tmp_path):
    path = write("awq", tmp_path)
    with pytest.raises(RuntimeError, match=r"q_proj and 20 more linears: no int4_gemm on cuda: "):
        qops.load_model(path, device="cuda")


# Progress ------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("case", CASES)
def test_progress_ends_where_everything_is_read(tmp_path, monkeypatch, case):
    path, moved = write(case, tmp_path), []
    wanted = qops.load_model(path)
    monkeypatch.setattr(tqdm, "update", lambda self, count: moved.append((count, self.total)))
    model = qops.load_model(path, progress=True)
    assert_bitwise(model(IDS).logits, wanted(IDS).logits)
    counts, totals = zip(*moved, strict=True)
    # What a model computes itself and static scales of inputs are not counted.
    assert len(set(totals)) == 1 and sum(counts) == totals[0] > 0 and len(counts) > 10


def test_progress_is_shown_of_large_checkpoints_on_terminals(tmp_path, monkeypatch):
    path = write("awq", tmp_path)

    def shown(large: int, stream: io.StringIO, **more: Any) -> str:
        monkeypatch.setattr("qops.models.load._LARGE", large)
        monkeypatch.setattr(sys, "stderr", stream)
        qops.load_model(path, **more)
        return stream.getvalue()

    assert "qops: reading" in shown(1, Terminal())
    assert "qops: reading" in shown(10**9, io.StringIO(), progress=True)
    assert shown(1, io.StringIO()) == shown(10**9, Terminal()) == shown(1, Terminal(), progress=False) == ""
