"""Exported models: packed weights are their constants, and they refuse to run where these would be read another way."""

from __future__ import annotations

import io
import re

import pytest
import torch
from torch import Tensor, nn

import qops
from qops.nn import Int4Linear, Int8Embedding, Int8Linear, Int8WeightOnlyLinear
from qops.ops import weight_pack
from qops.testing import assert_bitwise, generator
from qops.weights import state

USES = 5
IDS = torch.tensor([39, 0, 7])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode(False), torch.no_grad():
        yield


class Every(nn.Module):
    """Each way to use a packed weight, once."""

    def __init__(self) -> None:
        super().__init__()

        def draw(n: int, k: int) -> Tensor:
            return torch.randn(n, k, generator=generator(n + k))

        self.table = Int8Embedding(qops.Int8Weight.quantize(draw(40, 48), 16), torch.float32)
        self.first = Int4Linear(qops.Int4Weight.quantize(draw(64, 48), 16))
        self.second = Int8Linear(qops.Int8Weight.quantize(draw(32, 64)))
        self.third = Int8WeightOnlyLinear(qops.Int8Weight.quantize(draw(24, 32), 16))
        self.dense = qops.Int4Weight.quantize(draw(16, 24), -1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.third(self.second(self.first(self.table(ids)))) @ qops.int4_dequantize(self.dense, torch.float32).T


def checks(program: torch.export.ExportedProgram) -> list[str]:
    """The layouts that it names."""
    found = [node for node in program.graph.nodes if node.target is torch.ops.qops.check_layout.default]
    return [node.args[1] for node in found]


def loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    return torch.export.load(stream)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_names_the_layout_of_each_constant(strict):
    model = Every()
    program = torch.export.export(model, (IDS,), strict=strict)
    assert checks(program) == ["cpu 1"] * USES
    assert sum(name.endswith("packed") for name in program.constants) == USES
    for again in (loaded(program), loaded(program).run_decompositions(), program.run_decompositions()):
        assert checks(again) == ["cpu 1"] * USES
        assert_bitwise(again.module()(IDS), model(IDS))


@pytest.mark.parametrize("other", ["cuda 1", "cpu 2"])
@pytest.mark.parametrize("use", range(USES))
def test_another_layout_is_an_error(use, other):
    """Of another kind of device, or of another version."""
    program = loaded(torch.export.export(Every(), (IDS,)))
    node = [node for node in program.graph.nodes if node.target is torch.ops.qops.check_layout.default][use]
    node.args = (node.args[0], other)
    message = (
        f"qops.check_layout: layout must be 'cpu 1', as weights are packed on this device by this build, got '{other}'"
    )
    with pytest.raises(ValueError, match=re.escape(message) + ": export the model again"):
        loaded(program).module()(IDS)
    with pytest.raises(ValueError, match=re.escape(message)):
        loaded(program).run_decompositions()


def test_a_gpu_reads_its_own_layout_alone(backend):
    packed = torch.zeros(1, 8, dtype=torch.uint8, device=backend.device)
    backend.ops.check_layout(packed, "cuda 1")
    for other in ("cpu 1", "cuda 2"):
        with pytest.raises(ValueError, match="layout must be 'cuda 1'"):
            backend.ops.check_layout(packed, other)


@pytest.mark.slow
def test_a_compiled_artefact_refuses_another_layout(tmp_path, monkeypatch):
    """Made by a build with another layout, here by one that only says so. AOTInductor keeps the message to itself."""
    model = Int8Linear(qops.Int8Weight.quantize(torch.randn(32, 64, generator=generator(0))))
    x = torch.randn(3, 64, generator=generator(1))

    def package(name: str) -> str:
        program = torch.export.export(model, (x,))
        return torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / f"{name}.pt2"))

    assert_bitwise(torch._inductor.aoti_load_package(package("here"))(x), model(x))
    with monkeypatch.context() as patch:
        for module in (state, weight_pack):
            patch.setattr(module, "layout_of", lambda device: "cpu 7")
        there = package("there")
    with pytest.raises(RuntimeError):
        torch._inductor.aoti_load_package(there)(x)


def test_nothing_is_checked_in_calls_and_in_compiled_graphs():
    """They use the weight that is there, not a constant of long ago."""
    model, found = Every(), []

    def look(graph: torch.fx.GraphModule, inputs: object) -> object:
        found.extend(node.target for node in graph.graph.nodes)
        return graph

    assert_bitwise(torch.compile(model, backend=look, fullgraph=True)(IDS), model(IDS))
    assert torch.ops.qops.int8_gemm.default in found and torch.ops.qops.check_layout.default not in found
