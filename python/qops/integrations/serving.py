"""Models of Transformers for programs without qops' Python, or without any: torch.export, AOTInductor, Triton.

The programs load the operators alone, from :func:`libraries`. What an exported model holds of a packed weight names the
layout it is in: on another kind of device, or with a build that packs otherwise, the model refuses to run.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from qops import _native
from qops.formats._transformers import require_transformers

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

__all__ = ["export_decoder", "export_logits", "libraries", "write_triton_generator", "write_triton_logits"]

require_transformers("qops.integrations.serving")

_TYPES = {
    torch.int64: "TYPE_INT64",
    torch.float32: "TYPE_FP32",
    torch.float16: "TYPE_FP16",
    torch.bfloat16: "TYPE_BF16",
}


def libraries() -> list[str]:
    """The shared libraries that register the operators, those of the CPU first.

    For ``torch.ops.load_library``, ``dlopen`` or ``LD_PRELOAD`` in programs that run exported models. They need the
    LibTorch of the program and no Python.

    Returns:
        Absolute paths.
    """
    return [str(Path(module.__file__).resolve()) for module in (_native._C, _native._C_cuda) if module is not None]


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


def export_logits(model: Any) -> ExportedProgram:
    """A causal language model without a cache: ``(input_ids [B, S] int64) -> logits [B, S, V]``.

    Args:
        model: of Transformers, as of :func:`qops.quantize_model` or :func:`qops.load_model`.

    Returns:
        The program. B and S are dynamic, both at least 1.

    Example:
        >>> import qops, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from qops.integrations.serving import export_logits
        >>> config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        ...                      num_attention_heads=4, num_key_value_heads=2)
        >>> program = export_logits(qops.quantize_model(LlamaForCausalLM(config), "int4"))
        >>> program.module()(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 96])
    """
    # Sizes of an example are not to be taken for constants: neither 1 nor alike.
    ids = torch.zeros(2, 3, dtype=torch.int64, device=model.device)
    with torch.inference_mode(False), torch.no_grad():
        return torch.export.export(_Logits(model), (ids,), dynamic_shapes=({0: Dim("batch"), 1: Dim("tokens")},))


@contextmanager
def _static_cache(model: Any) -> Iterator[None]:
    """What Transformers' exporter reads from the model's own settings."""
    config, wanted = model.generation_config, {"use_cache": True, "cache_implementation": "static"}
    before = {name: getattr(config, name) for name in wanted}
    for name, value in wanted.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def export_decoder(model: Any, *, max_cache_len: int, batch_size: int = 1) -> ExportedProgram:
    """A causal language model with its cache inside: ``(input_ids [B, S], cache_position [S]) -> logits [B, S, V]``.

    A prompt is given with positions ``0 ... S - 1``, each later token with its own; a new sequence begins again at 0.
    So one loaded program serves one batch of sequences at a time.

    Args:
        model: of Transformers, as of :func:`qops.quantize_model` or :func:`qops.load_model`.
        max_cache_len: the most positions of a sequence, prompt and new tokens; at least 2.
        batch_size: sequences.

    Returns:
        The program. S is dynamic, at least 1 and less than ``max_cache_len``.

    Raises:
        ValueError: ``max_cache_len`` or ``batch_size`` is too small.

    Source:
        ``transformers.integrations.executorch``, whose module it is that is exported.
    """
    for name, value, least in (("max_cache_len", max_cache_len, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"qops.integrations.serving.export_decoder: {name} must be at least {least}, got {value}")
    tokens = Dim("tokens", max=max_cache_len - 1)
    # strict: else the cache is a constant of the program instead of its state, and AOTInductor refuses it.
    with torch.inference_mode(False), torch.no_grad(), _static_cache(model):
        module = TorchExportableModuleForDecoderOnlyLM(model, batch_size, max_cache_len, model.device)
        return module.export(
            input_ids=torch.zeros(batch_size, min(3, max_cache_len - 1), dtype=torch.int64, device=model.device),
            cache_position=torch.arange(min(3, max_cache_len - 1), device=model.device),
            dynamic_shapes={"input_ids": {1: tokens}, "cache_position": {0: tokens}},
            strict=True,
        )


def _fields(name: str, tensors: Mapping[str, tuple[torch.dtype, list[int]]]) -> str:
    described = ",\n".join(
        f'  {{ name: "{tensor}", data_type: {_TYPES[dtype]}, dims: {dims} }}'
        for tensor, (dtype, dims) in tensors.items()
    )
    return f"{name} [\n{described}\n]\n"


def write_triton_logits(
    repository: str | os.PathLike[str], name: str, package: str | os.PathLike[str], dtype: torch.dtype
) -> Path:
    """A model of NVIDIA's Triton Inference Server that runs a package of AOTInductor, made of :func:`export_logits`.

    Its backend is ``torch_aoti``: no Python. The server needs the operators of :func:`libraries` in ``LD_PRELOAD``, and
    the release of torch that has made the package.

    Args:
        repository: of models; made where there is none.
        name: of the model there, a new folder.
        package: what ``torch._inductor.aoti_compile_and_package`` has written.
        dtype: of the logits.

    Returns:
        The model's folder: ``config.pbtxt`` and ``1/model.pt2``.

    Raises:
        FileExistsError: the folder exists.
    """
    folder = Path(repository) / name
    (folder / "1").mkdir(parents=True)
    shutil.copyfile(package, folder / "1" / "model.pt2")
    (folder / "config.pbtxt").write_text(
        f'name: "{name}"\nplatform: "torch_aoti"\nmax_batch_size: 0\n'
        + _fields("input", {"INPUT__0": (torch.int64, [-1, -1])})
        + _fields("output", {"OUTPUT__0": (dtype, [-1, -1, -1])})
    )
    return folder


def write_triton_generator(
    repository: str | os.PathLike[str], name: str, checkpoint: str | os.PathLike[str], max_new_tokens: int
) -> Path:
    """A model of NVIDIA's Triton Inference Server that generates greedily, by Triton's Python backend.

    It is :class:`qops.integrations.triton_model.TritonPythonModel`: what :func:`qops.load_model` reads, in the server's
    environment of Python, where qops and Transformers have to be installed.

    Args:
        repository: of models; made where there is none.
        name: of the model there, a new folder.
        checkpoint: a folder or GGUF file as of :func:`qops.load_model`.
        max_new_tokens: the most that a request may ask for.

    Returns:
        The model's folder: ``config.pbtxt`` and ``1/model.py``.

    Raises:
        FileExistsError: the folder exists.
        ValueError: ``max_new_tokens`` is not positive.
    """
    if max_new_tokens < 1:
        raise ValueError(
            f"qops.integrations.serving.write_triton_generator: max_new_tokens must be at least 1, got {max_new_tokens}"
        )
    folder = Path(repository) / name
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(
        'from qops.integrations.triton_model import TritonPythonModel\n\n__all__ = ["TritonPythonModel"]\n'
    )
    parameters = {"checkpoint": str(Path(checkpoint).resolve()), "max_new_tokens": str(max_new_tokens)}
    (folder / "config.pbtxt").write_text(
        f'name: "{name}"\nbackend: "python"\nmax_batch_size: 0\n'
        + _fields("input", {"input_ids": (torch.int64, [-1, -1]), "new_tokens": (torch.int64, [1])})
        + _fields("output", {"output_ids": (torch.int64, [-1, -1])})
        + "".join(
            f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}\n' for key, value in parameters.items()
        )
    )
    return folder
