"""Whole Llama models on qops operators: load, save, quantise, and the dense model to compare with.

A saved folder holds `config.json`, `generation_config.json` and `qops.safetensors`: the canonical tensors under
Transformers' names. Packing at load is a permutation of bytes, cheaper than reading them, so the folder stores no
packed layout and stays valid when that changes.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from qops._transformers import require_transformers
from qops.nn import Int4Linear, Int8Embedding, Int8WeightOnlyLinear, MergedLinear, RMSNorm, dense_linear, frozen
from qops.weights import Int4Weight, Int8Weight

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

Weight = Int4Weight | Int8Weight | torch.Tensor

QUANT_METHOD = "qops"
FORMAT_VERSION = 1
# Not model.safetensors: Transformers skips a quant_method it does not know and would load the rest as noise. Without
# a file of that name it stops.
TENSORS_FILE = "qops.safetensors"


class Checkpoint(Protocol):
    """What a reader offers: a config, and weight and bias of each module by its Transformers name.

    A quantised weight need not be packed yet.
    """

    config: LlamaConfig

    def weight(self, name: str) -> Weight: ...

    def bias(self, name: str) -> torch.Tensor | None: ...


def load_model(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> LlamaForCausalLM:
    """Loads a Llama-family model whose linears, norms, rotary and SiLU-mul run on qops operators.

    Quantised weights keep every stored code and scale. Dense weights, norms and biases are rounded once to `dtype`,
    which is also the dtype of the activations. No dense copy of a quantised weight is ever made, except of a 4-bit
    embedding table, which is looked up densely.

    Args:
        path: a GGUF file (Q4_0, Q4_1, Q8_0, F32, F16, BF16 tensors), or a folder written by `save_model`.
        dtype: float32, bfloat16 or float16.
        device: where the model goes.

    Returns:
        A Transformers `LlamaForCausalLM` in eval mode, frozen; `generate` works as usual. With a quantised output layer
        its logits are float32: logits near 25 are 0.125 apart in bfloat16, so rounding them makes ties that greedy
        search then decides by their index.

    Raises:
        ImportError: Transformers >= 5.17, < 6 (or, for GGUF, the gguf package) is missing.
        FileNotFoundError: nothing is at `path`.
        ValueError: the checkpoint is malformed or of a kind that is not supported.
    """
    require_transformers("qops.load_model")
    return _build(_open_checkpoint(Path(path)), dtype, device)


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model that `load_model` reads: from a GGUF file, or from a folder it was saved to."""
    require_transformers("qops.load_tokenizer")
    if Path(path).is_file():
        from qops.formats import gguf

        return gguf.load_tokenizer(path)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def save_model(model: LlamaForCausalLM, folder: str | os.PathLike[str]) -> None:
    """Writes a model made by `load_model` or `quantize_model` so that `load_model` reads it back bit for bit.

    The tokenizer is the caller's: `tokenizer.save_pretrained(folder)` into the same folder.

    Raises:
        ValueError: the model has no qops parts.
    """
    from safetensors.torch import save_file

    _require_replaced(model, "qops.save_model")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    kinds: dict[str, str] = {}
    for name, weight, bias in _modules(model):
        if isinstance(weight, torch.Tensor):
            tensors[f"{name}.weight"] = weight
        else:
            kinds[name] = f"int4 {weight.kind}" if isinstance(weight, Int4Weight) else "int8"
            tensors |= {f"{name}.weight.{key}": tensor for key, tensor in weight.canonical().items()}
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    # Parts of a merged dense linear are views of one storage, which safetensors refuses.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    config.quantization_config = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "weights": kinds}
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    # Written aside and renamed: a reader never meets half a file.
    partial = folder / f"{TENSORS_FILE}.partial"
    save_file(tensors, partial)
    os.replace(partial, folder / TENSORS_FILE)


def quantize_model(
    model: LlamaForCausalLM,
    scheme: str = "int4",
    group_size: int = 128,
    skip: tuple[str, ...] = ("lm_head",),
    symmetric: bool = True,
) -> LlamaForCausalLM:
    """Replaces the parts of a dense Transformers Llama model by qops parts, in place, one layer at a time.

    Linears are quantised by round-to-nearest; norms, rotary and SiLU-mul change only the code that runs them.

    Args:
        model: a `LlamaForCausalLM` with floating-point weights; it is frozen and put into eval mode.
        scheme: "int4".
        group_size: columns of K that share a scale; -1 means one scale per row. It must divide each K.
        skip: linears to leave dense: names, their last parts, or shell patterns ("lm_head", "*.mlp.down_proj").
        symmetric: codes around 8, or with a zero point per group.

    Returns:
        The same model.

    Raises:
        ImportError: Transformers >= 5.17, < 6 is missing.
        ValueError: another architecture or scheme, sizes or a group size that `Int4Weight` refuses, weights that are
            not finite. The model is then unchanged.
    """
    require_transformers("qops.quantize_model")
    from qops.llama import DecoderLayer, FinalNorm, RotaryTables

    if scheme != "int4":
        raise ValueError(f"qops.quantize_model: scheme must be 'int4', got '{scheme}'")
    _require_llama(model, "qops.quantize_model")
    decoder: Any = model.model

    def skipped(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, p) or name.rpartition(".")[2] == p for p in skip)

    def replace(name: str, module: Any) -> nn.Module:
        if not isinstance(module, nn.Linear):
            return RMSNorm(module.weight, module.variance_epsilon)
        if skipped(name):
            return module
        return Int4Linear.from_linear(module, group_size, symmetric)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not skipped(name):
            _check_quantizable(name, module, group_size)
    for index, layer in enumerate(decoder.layers):
        part = _replacing(f"model.layers.{index}", layer, replace)
        decoder.layers[index] = DecoderLayer(model.config, index, part)
    decoder.norm = FinalNorm(decoder.norm.weight, decoder.norm.variance_epsilon)
    decoder.rotary_emb = RotaryTables(decoder.rotary_emb, model.config)
    if not skipped("lm_head"):
        causal: Any = model
        causal.lm_head = Int4Linear.from_linear(model.lm_head, group_size, symmetric, float32_output=True)
        model.config.tie_word_embeddings = False
    # Transformers hooks layers when hidden states are first asked for; the new ones have no hooks yet.
    decoder._output_capturing_hooks_installed = False
    return _freeze(model)


def dense_model(model: LlamaForCausalLM, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """The plain Transformers model with the same weights, dequantised: what the qops model is compared with.

    Args:
        model: made by `load_model` or `quantize_model`; it stays as it is.
        dtype: of weights and activations; each exact weight is rounded to float32, then to `dtype`.
    """
    _require_replaced(model, "qops.dense_model")
    state: dict[str, torch.Tensor] = {}
    for name, weight, bias in _modules(model):
        if isinstance(weight, torch.Tensor):
            state[f"{name}.weight"] = weight.detach().to(dtype, copy=True)
        else:
            state[f"{name}.weight"] = weight.dequantize(dtype)
        if bias is not None:
            state[f"{name}.bias"] = bias.detach().to(dtype, copy=True)
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    dense = _skeleton(model.config, dtype)
    dense.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        dense.lm_head.weight = dense.model.embed_tokens.weight
    # The instance in use, not a new one from the config: it may carry its owner's frequencies.
    dense.model.rotary_emb = copy.deepcopy(model.model.rotary_emb.rotary)
    dense.generation_config = copy.deepcopy(model.generation_config)
    return _freeze(dense)


def _build(checkpoint: Checkpoint, dtype: torch.dtype, device: str | torch.device) -> LlamaForCausalLM:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from qops.llama import DecoderLayer, FinalNorm, RotaryTables

    model = _skeleton(checkpoint.config, dtype)
    config = model.config
    decoder: Any = model.model

    def fetch(name: str, module: Any) -> Weight:
        weight = checkpoint.weight(name)
        if isinstance(weight, torch.Tensor):
            weight = weight.to(dtype)
            found = list(weight.shape)
        else:
            found = [weight.out_features, weight.in_features]
        wanted = list(module.weight.shape)
        if found != wanted:
            raise ValueError(f"{name}.weight must have shape {wanted}, got {found}")
        return weight

    def linear(weight: Weight, bias: torch.Tensor | None = None, *, logits: bool = False) -> nn.Module:
        bias = None if bias is None else bias.to(dtype)
        if isinstance(weight, Int4Weight):
            return Int4Linear(weight, bias, float32_output=logits)
        if isinstance(weight, Int8Weight):
            return Int8WeightOnlyLinear(weight, bias, float32_output=logits)
        return dense_linear(weight, bias)

    def replace(name: str, module: Any) -> nn.Module:
        weight = fetch(name, module)
        if isinstance(module, nn.Linear):
            return linear(weight, checkpoint.bias(name))
        assert isinstance(weight, torch.Tensor)
        return RMSNorm(weight, config.rms_norm_eps)

    table = fetch("model.embed_tokens", decoder.embed_tokens)
    if isinstance(table, Int8Weight):
        decoder.embed_tokens = Int8Embedding(table, dtype)
    else:
        rows = table.dequantize(dtype) if isinstance(table, Int4Weight) else table
        decoder.embed_tokens.weight = frozen(rows)
    for index, layer in enumerate(decoder.layers):
        part = _replacing(f"model.layers.{index}", layer, replace)
        decoder.layers[index] = _packed(DecoderLayer(config, index, part))
    norm = fetch("model.norm", decoder.norm)
    assert isinstance(norm, torch.Tensor)
    decoder.norm = FinalNorm(norm, config.rms_norm_eps)
    decoder.rotary_emb = RotaryTables(LlamaRotaryEmbedding(config), config)
    output = table if config.tie_word_embeddings else fetch("lm_head", model.lm_head)
    model.lm_head = linear(output, logits=True)
    if output is table and isinstance(table, torch.Tensor):
        model.lm_head.weight = decoder.embed_tokens.weight
    return _freeze(_packed(model)).to(device)


def _skeleton(config: LlamaConfig, dtype: torch.dtype) -> Any:
    """The model without storage: every part is about to be replaced."""
    from transformers import LlamaForCausalLM

    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    config = copy.deepcopy(config)
    config.dtype = dtype
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def _freeze(model: Any) -> Any:
    return model.eval().requires_grad_(False)


def _packed(module: Any) -> Any:
    """`module` with its weights packed. Readers hand them over canonical, so that merged ones are packed only once."""
    for part in module.modules():
        if isinstance(part, (Int4Weight, Int8Weight)):
            part.pack()
    return module


def _replacing(prefix: str, layer: nn.Module, replace: Callable[[str, Any], nn.Module]) -> Callable[[str], nn.Module]:
    """The `part` argument of a decoder layer: replaces the modules of `layer` as they are asked for."""
    return lambda name: replace(f"{prefix}.{name}", layer.get_submodule(name))


def _modules(model: Any) -> Iterator[tuple[str, Any, torch.Tensor | None]]:
    """(name, weight, bias) of each module as Transformers names it; a tied output layer is left out."""
    for name, module in model.named_modules():
        if isinstance(module, MergedLinear):
            parent = name.rpartition(".")[0]
            part: str
            linear: Any
            for part, linear in module.split().items():
                yield f"{parent}.{part}", linear.weight, linear.bias
        elif isinstance(module, (Int4Linear, Int8WeightOnlyLinear, nn.Linear)):
            inside_merged = ".merged" in name or ".separate." in name
            tied = name == "lm_head" and model.config.tie_word_embeddings
            if not inside_merged and not tied:
                yield name, module.weight, module.bias
        elif isinstance(module, nn.Embedding) and model.config.tie_word_embeddings:
            # The output layer holds a 4-bit table exactly; the dense one beside it is rounded.
            yield name, model.lm_head.weight, None
        elif isinstance(module, (Int8Embedding, nn.Embedding, RMSNorm)):
            yield name, module.weight, None


def _require_llama(model: Any, caller: str) -> None:
    from transformers import LlamaForCausalLM

    from qops.llama import DecoderLayer

    if type(model) is not LlamaForCausalLM:
        raise ValueError(f"{caller}: model must be a transformers LlamaForCausalLM, got {type(model).__name__}")
    if any(isinstance(layer, DecoderLayer) for layer in model.model.layers):
        raise ValueError(f"{caller}: the model's layers are qops layers already")
    if model.config.hidden_act != "silu":
        raise ValueError(f"{caller}: config.hidden_act must be 'silu', got '{model.config.hidden_act}'")


def _require_replaced(model: Any, caller: str) -> None:
    require_transformers(caller)
    from qops.llama import DecoderLayer

    layers = getattr(getattr(model, "model", None), "layers", ())
    if not any(isinstance(layer, DecoderLayer) for layer in layers):
        raise ValueError(f"{caller}: model must come from qops.load_model or qops.quantize_model")


def _check_quantizable(name: str, linear: nn.Linear, group_size: int) -> None:
    """Raises what quantising would raise, before any layer is replaced."""
    try:
        Int4Weight(linear.in_features, linear.out_features, group_size, scale_dtype=torch.float32, device="meta")
    except ValueError as error:
        raise ValueError(f"qops.quantize_model: {name}: {error}") from error
    if not linear.weight.isfinite().all():
        raise ValueError(f"qops.quantize_model: {name}: weight must be finite, got NaN or infinity")


def _open_checkpoint(path: Path) -> Checkpoint:
    if path.is_file():
        from qops.formats.gguf import GGUFFile

        return GGUFFile(path)
    if path.is_dir():
        return _Folder(path)
    raise FileNotFoundError(f"{path}: no such GGUF file or model folder")


class _Folder:
    """A folder written by `save_model`."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open
        from transformers import LlamaConfig

        self.folder = folder
        settings = self._read_settings()
        self.config = LlamaConfig.from_pretrained(folder)
        del self.config.__dict__["quantization_config"]
        self._kinds: dict[str, str] = settings["weights"]
        path = folder / TENSORS_FILE
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
        self._names = set(self._file.keys())

    def _read_settings(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a readable config: {error}") from error
        if not isinstance(config, dict) or not isinstance(config.get("quantization_config", {}), (dict, type(None))):
            raise ValueError(f"{path}: not a model's config")
        settings = config.get("quantization_config") or {}
        method = settings.get("quant_method")
        if config.get("model_type") != "llama" or method != QUANT_METHOD:
            raise ValueError(
                f"{path}: must be a llama model saved by qops.save_model, "
                f"got model_type '{config.get('model_type')}', quant_method '{method}'"
            )
        if settings.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path}: format_version must be {FORMAT_VERSION}, got {settings.get('format_version')}")
        kinds = settings.get("weights")
        if not isinstance(kinds, dict) or not all(isinstance(kind, str) for kind in kinds.values()):
            raise ValueError(f"{path}: weights must map names to kinds, got {kinds!r}")
        return settings

    def weight(self, name: str) -> Weight:
        kind = self._kinds.get(name)
        if kind is None:
            return self._tensor(f"{name}.weight")
        tensors = {
            key: self._tensor(f"{name}.weight.{key}")
            for key in ("qweight", "scales", "zeros", "perm")
            if key in ("qweight", "scales") or f"{name}.weight.{key}" in self._names
        }
        family, _, zero = kind.partition(" ")
        try:
            if family == "int4":
                return Int4Weight.from_canonical(**tensors, kind=zero, pack=False)
            if family == "int8":
                return Int8Weight.from_canonical(**tensors, pack=False)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{self.folder}: {name}.weight: {error}") from error
        raise ValueError(f"{self.folder}: {name}.weight has unknown kind '{kind}'")

    def bias(self, name: str) -> torch.Tensor | None:
        return self._tensor(f"{name}.bias") if f"{name}.bias" in self._names else None

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise ValueError(f"{self.folder / TENSORS_FILE}: tensor {name} is missing")
        return self._file.get_tensor(name)
