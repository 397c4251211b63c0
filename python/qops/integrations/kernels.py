"""Layers for Hugging Face's `kernels`: what its `kernelize` puts in the place of a layer's forward.

`kernels` loads layers from repositories; :func:`write_repository` writes one that refers to this module::

    from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
    from qops.integrations.kernels import write_repository

    norm = LocalLayerRepository(write_repository(folder), layer_name="RMSNorm")
    with use_kernel_mapping({"RMSNorm": {"cpu": norm}}, inherit_mapping=False):
        model = kernelize(model, mode=Mode.INFERENCE, device="cpu")

Layers are stateless, as `kernels` asks for: a forward reads weights and settings of the module that it is given to.
Linears are none of them, whose weights are no parameters of nn.Linear: see :func:`qops.quantize_model`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qops.ops import rms_norm, silu_mul

__all__ = ["RMSNorm", "RMSNormFP32", "SiluAndMul", "write_repository"]


class RMSNorm(nn.Module):
    """Transformers' layer of that name: :func:`qops.rms_norm` with `rounding="hf"`.

    For inference: without a gradient of its weight or input, so under `torch.no_grad()`, or frozen.
    """

    can_torch_compile = True
    has_backward = False
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The norm.

        Args:
            hidden_states: [..., H].

        Returns:
            [..., H].
        """
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class RMSNormFP32(nn.Module):
    """The same with `rounding="fp32"`, for classes that multiply by the weight before they round: OLMo hybrid, Afmoe,
    Nemotron-H, DeepSeek V4. Transformers gives them the name "RMSNorm", too."""

    can_torch_compile = True
    has_backward = False
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The norm.

        Args:
            hidden_states: [..., H].

        Returns:
            [..., H].
        """
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, rounding="fp32")


class SiluAndMul(nn.Module):
    """The layer of that name of `kernels-community/activation`: :func:`qops.silu_mul`, rounded as it rounds, once."""

    can_torch_compile = True
    has_backward = False

    def forward(self, x: Tensor) -> Tensor:
        """`silu(gate) * up`.

        Args:
            x: [..., 2I], gate first.

        Returns:
            [..., I].
        """
        return silu_mul(x, rounding="fp32")


def write_repository(folder: str | os.PathLike[str]) -> Path:
    """Writes what `kernels.get_local_kernel` and `kernels.LocalLayerRepository` load: these layers as a kernel.

    The files hold no kernel, they import this module; so they serve every torch, for the CPU and for CUDA.

    Args:
        folder: where to; files of an earlier call are replaced.

    Returns:
        The folder.
    """
    path = Path(folder)
    for backend in ("cpu", "cuda"):
        variant = path / "build" / f"torch-{backend}"
        variant.mkdir(parents=True, exist_ok=True)
        said: dict[str, Any] = {"name": "qops", "id": f"_qops_{backend}", "version": 1, "license": "Apache-2.0"}
        said |= {"python-depends": [], "backend": {"type": backend}}
        (variant / "metadata.json").write_text(json.dumps(said, indent=2) + "\n")
        (variant / "__init__.py").write_text("from qops.integrations import kernels as layers\n")
    return path
