"""Hugging Face's `kernels`: our layers from a local repository, by `kernelize`, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qops
from qops.integrations import kernels as ours
from qops.testing import assert_bitwise, generator
from tests.support.house.pages import run_examples
from tests.support.models.families import IDS, random_model

kernels = pytest.importorskip("kernels")
Mode = kernels.Mode
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def repository(tmp_path) -> Any:
    return ours.write_repository(tmp_path / "qops layers")


def mapped(repository: Any, *names: str, **layers: str) -> Any:
    said = {name: name for name in names} | layers
    found = {name: {"cpu": kernels.LocalLayerRepository(repository, layer_name=layer)} for name, layer in said.items()}
    return kernels.use_kernel_mapping(found, inherit_mapping=False)


@kernels.use_kernel_forward_from_hub("SiluAndMul")
class SiluAndMul(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up


@kernels.use_kernel_forward_from_hub("RMSNorm")
class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(size, generator=generator(0)), requires_grad=False)
        self.variance_epsilon = 1e-5

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


def test_a_local_kernel_has_the_layers(repository):
    for folder in (repository, ours.write_repository(repository)):
        layers = kernels.get_local_kernel(folder).layers
        assert layers.RMSNorm is ours.RMSNorm and layers.SiluAndMul is ours.SiluAndMul
    assert {path.name for path in (repository / "build").iterdir()} == {"torch-cpu", "torch-cuda"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_are_the_operators(repository, dtype):
    model = nn.ModuleDict({"norm": Norm(64), "act": SiluAndMul(), "other": Norm(64)}).to(dtype)
    x = torch.randn(3, 64, generator=generator(1)).to(dtype)
    dense = [model[name](x) for name in model]
    with mapped(repository, "RMSNorm", "SiluAndMul"):
        kernels.kernelize(model, mode=Mode.INFERENCE, device="cpu")
    assert_bitwise(model["norm"](x), qops.rms_norm(x, model["norm"].weight, 1e-5))
    assert_bitwise(model["act"](x), qops.silu_mul(x, rounding="fp32"))
    with mapped(repository, RMSNorm="RMSNormFP32"):
        kernels.kernelize(model["other"], mode=Mode.INFERENCE, device="cpu")
    assert_bitwise(model["other"](x), qops.rms_norm(x, model["norm"].weight, 1e-5, rounding="fp32"))
    for name, wanted in zip(model, dense, strict=True):
        assert torch.allclose(model[name](x), wanted, *([1e-6] * 2 if dtype == torch.float32 else [1e-2] * 2))


def test_modes(repository):
    """Compiled as well; for training `kernelize` keeps the layer's own forward, as ours has no gradient."""
    model, x = Norm(64), torch.randn(3, 64, generator=generator(1))
    own = model(x)
    with mapped(repository, "RMSNorm"):
        kernels.kernelize(model, mode=Mode.TRAINING, device="cpu")
        assert model.forward.__func__ is Norm.forward
        kernels.kernelize(model, mode=Mode.INFERENCE | Mode.TORCH_COMPILE, device="cpu")
    assert model.forward.__func__ is ours.RMSNorm.forward
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_bitwise(compiled(x), model(x))
    assert torch.allclose(model(x), own, 1e-6, 1e-6)
    model.requires_grad_(True)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="weight"):
        model(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_transformers(repository, dtype, monkeypatch):
    """By the name that Transformers gives them where it finds a release of `kernels` that it knows."""
    model = random_model("llama").to(dtype)
    monkeypatch.setattr(type(model.model.norm), "kernel_layer_name", "RMSNorm", raising=False)
    wanted = model(IDS).logits
    with mapped(repository, "RMSNorm"):
        kernels.kernelize(model, mode=Mode.INFERENCE, device="cpu")
    norms = [module for module in model.modules() if module.forward.__qualname__ == "RMSNorm.forward"]
    assert len(norms) == 7
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    found = model(IDS).logits
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    # Quantised afterwards, the norms are ours anyway: a forward of its owner's stays.
    report = qops.quantize_model(model, "int4", prove=False).quantization_report
    assert report.kept["model.norm"] == "its forward was replaced by its owner"


def test_transformers_own_config_has_no_cpu(repository):
    """What docs/kernels.md says; `kernelize` itself has one."""
    from transformers import KernelConfig
    from transformers.utils import is_kernels_available

    if not is_kernels_available():
        pytest.skip("this Transformers asks for another release of kernels")
    config = KernelConfig({"RMSNorm": {"cpu": f"{repository}:RMSNorm"}}, use_local_kernel=True)
    with pytest.raises(ValueError, match=r"devices in .* are supported, got: cpu"):
        random_model("llama").set_use_kernels(True, config)


def test_the_page():
    assert run_examples("kernels.md") > 5
