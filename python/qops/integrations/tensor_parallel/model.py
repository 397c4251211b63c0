"""Whole models of Transformers on several ranks.

What is shared out are blocks that take hidden states which are the same on all ranks, and give such: attention by its
heads, and an MLP by its intermediate columns. Linears that open a block give a part of their outputs, the one that
closes it adds up. All else stays whole on each rank, so that whatever is not known is right, if not smaller.

Fused layers stay fused: a rank has one product for its parts of q, k and v, and one for those of gate and up, which
applies SiLU-mul before it stores. Where down has an act-order, they give their outputs in that order on each rank, and
nothing has to be gathered. Residuals are added by the norm that follows, after the sum over ranks, and the block
operators, which add them inside of one call, do not run.

Layers that are Transformers' own are shared out where its plan (`base_model_tp_plan`) has the linears of a block
"colwise" and "rowwise". This module imports Transformers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qops.integrations.tensor_parallel.linears import (
    ColumnShard,
    Ranks,
    RowShard,
    require_own_forward,
    require_shardable,
    shard_inputs,
    shard_outputs,
)
from qops.integrations.tensor_parallel.shards import outputs_of, require_inputs, require_outputs
from qops.models.decoder import Attention
from qops.models.proof import Tolerance
from qops.models.replacement import is_tied, name_of, require_replaced, take_hooks
from qops.nn import MLP, MergedLinear, QuantizedLinear

CALLER = "qops.integrations.tensor_parallel.parallelize"
_log = logging.getLogger("qops")

# Products of parts are rounded apart: through the layers of a model float32 loses that much, and bfloat16 or 8-bit
# activations, which take an error of 1e-7 for a step, as much as in the proof of fused layers. With a wrong shard rows
# are about as far apart as they are long.
_FLOAT32 = Tolerance(1e-3, 1e-2)
_ROUNDED = Tolerance(1e-1, 5e-1)
_PROMPT = 9


def parallelize(model: Any, mesh: Any, *, prove: bool = True) -> Any:
    """See :func:`qops.integrations.tensor_parallel.parallelize`."""
    require_replaced(model, CALLER)
    ranks = Ranks(CALLER, mesh)
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if devices != {mesh.device_type}:
        raise ValueError(f"{CALLER}: mesh must be of the model's device, {', '.join(devices)}, got {mesh.device_type}")
    blocks = list(_blocks(model, ranks.share.size))
    if not blocks:
        raise ValueError(
            f"{CALLER}: model must have attention or MLPs of which a plan is known, got {type(model).__name__}"
        )
    for block in blocks:
        block.require()
    before = _answer(model) if prove else None
    places = tuple(f"{block.name}." for block in blocks)
    while blocks:  # each takes the whole weights of its own with it
        blocks.pop().shard(ranks)
    _shard_output_layer(model, ranks)
    if before is not None:
        _prove(model, before, ranks)
    _tell(model, places)
    return model


# Blocks --------------------------------------------------------------------------------------------------------------


class _FusedAttention:
    def __init__(self, name: str, attention: Attention, size: int):
        self.name, self.module, self.size = name, attention, size
        head = attention.head_dim
        self.sections = [head * attention.heads] + 2 * [head * attention.key_value_heads]

    def require(self) -> None:
        attention: Any = self.module
        require_own_forward(CALLER, self.name, attention)
        for what, heads in (("attention", attention.heads), ("key/value", attention.key_value_heads)):
            _require_heads(self.name, what, heads, self.size)
        _require_outputs(f"{self.name}.qkv_proj", attention.qkv_proj, self.size, self.sections)
        _require_inputs(f"{self.name}.o_proj", attention.o_proj, self.size)

    def shard(self, ranks: Ranks) -> None:
        attention: Any = self.module
        qkv = attention.qkv_proj
        if isinstance(qkv, MergedLinear):
            shards: Any = MergedLinear({name: outputs_of(part, ranks.share) for name, part in qkv.split().items()})
        else:
            shards = outputs_of(qkv, ranks.share, self.sections)
        attention.qkv_proj = take_hooks(shards, qkv).train(qkv.training)
        attention.heads //= self.size
        attention.key_value_heads //= self.size
        shard_inputs(CALLER, f"{self.name}.o_proj", attention.o_proj, ranks, splits=False)


class _FusedMlp:
    def __init__(self, name: str, owner: Any, mlp: MLP, size: int):
        self.name, self.owner, self.module, self.size = name, owner, mlp, size
        self.intermediate: int = mlp.down_proj.in_features  # type: ignore[assignment]

    def require(self) -> None:
        require_own_forward(CALLER, self.name, self.module)
        _require_outputs(f"{self.name}.gate_up_proj", self.module.gate_up_proj, self.size, 2 * [self.intermediate])
        _require_inputs(f"{self.name}.down_proj", self.module.down_proj, self.size)

    def shard(self, ranks: Ranks) -> None:
        old: Any = self.module
        gate_up, down = old.gate_up_proj, old.down_proj
        if isinstance(gate_up, MergedLinear):
            # In the act-order of down where that had one: its stored columns are then those that it reads.
            shards = {name: outputs_of(part, ranks.share) for name, part in gate_up.split().items()}
        else:
            shards = {"gate_up_proj": outputs_of(gate_up, ranks.share, 2 * [self.intermediate])}
        shard_inputs(CALLER, f"{self.name}.down_proj", down, ranks, splits=False)
        make: Any = type(old) if len(shards) == 2 else type(old).of_merged
        new = make(*shards.values(), down, old.act)
        take_hooks(new.gate_up_proj, gate_up)
        setattr(self.owner, self.name.rpartition(".")[2], take_hooks(new, old).train(old.training))


class _Planned:
    """A block of Transformers' own, by its plan."""

    def __init__(self, name: str, module: Any, styles: dict[str, str], size: int):
        self.name, self.module, self.styles, self.size = name, module, styles, size

    def require(self) -> None:
        require_own_forward(CALLER, self.name, self.module)
        head = getattr(self.module, "head_dim", None)
        for part, style in self.styles.items():
            linear: Any = self.module.get_submodule(part)
            name = f"{self.name}.{part}"
            if style == "rowwise":
                _require_inputs(name, linear, self.size)
                continue
            if isinstance(head, int):
                _require_heads(name, "its", linear.out_features // head, self.size)
            _require_outputs(name, linear, self.size, [linear.out_features])

    def shard(self, ranks: Ranks) -> None:
        for part, style in self.styles.items():
            linear, name = self.module.get_submodule(part), f"{self.name}.{part}"
            if style == "rowwise":
                shard_inputs(CALLER, name, linear, ranks, splits=False)
            else:
                shard_outputs(CALLER, name, linear, ranks, gathers=False)


def _blocks(model: Any, size: int) -> Iterator[Any]:
    """What can be shared out, in the order of the model's modules."""
    plan = getattr(model, "_tp_plan", None) or {}
    styles: dict[str, dict[str, str]] = {}
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is not None and isinstance(module, (nn.Linear, QuantizedLinear)):
            owner, _, part = name.rpartition(".")
            styles.setdefault(owner, {})[part] = style
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            yield _FusedAttention(name, module, size)
        elif isinstance(module, MLP):
            owner = model.get_submodule(name.rpartition(".")[0])
            yield _FusedMlp(name, owner, module, size)
        elif name in styles and _is_block(module, styles[name]):
            yield _Planned(name, module, styles[name], size)


def _is_block(module: nn.Module, styles: dict[str, str]) -> bool:
    """Whether its linears open and close one block, with nothing but what acts on heads or elements between them."""
    linears = {name for name, part in module.named_modules() if isinstance(part, (nn.Linear, QuantizedLinear))}
    others = [p for name, p in module.named_parameters() if name.partition(".")[0] not in linears]
    acts_on_heads = all(parameter.numel() == getattr(module, "head_dim", None) for parameter in others)
    return acts_on_heads and linears == styles.keys() and set(styles.values()) == {"colwise", "rowwise"}


def _require_heads(name: str, what: str, heads: int, size: int) -> None:
    if heads % size:
        raise ValueError(f"{CALLER}: {name}: {what} heads must be a multiple of tp = {size}, got {heads}")


def _require_outputs(name: str, linears: Any, size: int, sections: list[int]) -> None:
    """Of linears that are merged, or hold several sections side by side; nothing is copied."""
    if not isinstance(linears, MergedLinear):
        require_shardable(CALLER, name, linears)
        require_outputs(f"{CALLER}: {name}", linears, size, sections)
        return
    require_own_forward(CALLER, name, linears)
    if any(part._forward_hooks or part._forward_pre_hooks for part in linears.modules() if part is not linears):
        raise ValueError(f"{CALLER}: {name} must have no hooks on what it was merged of, which becomes another linear")
    parts = linears.separate if linears.merged is None else [linears.merged] * len(linears.names)
    for part, linear, n in zip(linears.names, parts, linears.sizes, strict=True):
        full = f"{name.rpartition('.')[0]}.{part}"
        require_shardable(CALLER, full, linear)
        require_outputs(f"{CALLER}: {full}", linear, size, [n])


def _require_inputs(name: str, linear: Any, size: int) -> None:
    require_shardable(CALLER, name, linear)
    require_inputs(f"{CALLER}: {name}", linear, size)


# Output layer --------------------------------------------------------------------------------------------------------


def _shard_output_layer(model: Any, ranks: Ranks) -> None:
    """A quantised one gives a part of the logits, which are gathered; a dense or a tied one stays whole."""
    output = model.get_output_embeddings()
    if isinstance(output, QuantizedLinear) and not is_tied(model) and output.out_features % (8 * ranks.share.size) == 0:
        shard_outputs(CALLER, name_of(model, output), output, ranks, gathers=True)


# Proof ---------------------------------------------------------------------------------------------------------------


def _answer(model: Any) -> torch.Tensor:
    """What a model makes of a few tokens, float32 [tokens, ...]."""
    table = model.get_input_embeddings()
    ids = torch.arange(1, _PROMPT + 1, device=table.weight.device) % table.num_embeddings
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False)[0][0].float()


def _prove(model: Any, before: torch.Tensor, ranks: Ranks) -> None:
    """Raises, on every rank, where any of them gets something else than before."""
    after = _answer(model)
    errors = (after - before).norm(dim=-1) / before.norm(dim=-1)
    typical, largest = errors.quantile(0.75).item(), errors.max().item()
    rounds = any(isinstance(module, QuantizedLinear) and module.quantizes_input for module in model.modules())
    limit = _FLOAT32 if model.dtype == torch.float32 and not rounds else _ROUNDED
    agrees = typical <= limit.typical and largest <= limit.largest  # NaN is no agreement
    failed = torch.tensor([0.0 if agrees else 1.0], device=after.device)
    dist.all_reduce(failed, dist.ReduceOp.MAX, group=ranks.group)
    if failed.item():
        raise RuntimeError(
            f"{CALLER}: {type(model).__name__} gives something else on tp = {ranks.share.size} ranks than before: rows "
            f"are {largest:.1e} apart on rank {ranks.share.rank} (allowed are {limit.largest:.0e}); all ranks must "
            "hold the same model"
        )
    _log.info("%s: rows of logits are up to %.1e apart from those of one rank", CALLER, largest)


def _tell(model: Any, places: tuple[str, ...]) -> None:
    """Says which quantised linears are whole on each rank: those outside of the places."""
    whole = [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
        and not name.startswith(places)
        and not isinstance(module, (ColumnShard, RowShard))
    ]
    if whole:
        _log.warning("%s: whole on each rank: %s", CALLER, ", ".join(whole))
