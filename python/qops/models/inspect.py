"""What a checkpoint holds and what it would become, without reading its weights.

The model is built as :func:`qops.load_model` builds it, from weights on the meta device, which have everything but
numbers. So whatever that would refuse by headers and config is refused here, in the same words.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qops import build_info, explain
from qops._native import WITHOUT_CUDA_KERNEL
from qops.formats.checkpoint import Checkpoint, Facts, QuantizedFacts, Weight
from qops.formats.folders.pretrained import require_places
from qops.formats.open import open_checkpoint
from qops.models.load import build_model
from qops.models.quantize import weight_bytes
from qops.models.replacement import input_table, is_linear, is_tied
from qops.nn import Int4Linear, Int8Linear, MergedLinear, QuantizedLinear
from qops.nn.smoothed import neutral_input
from qops.ops._checks import INT4_KINDS
from qops.weights.requirements import dtype_name
from qops.weights.state import QuantizedWeight

PREFILL_ROWS = 512
_PART_COLUMNS = (
    *("part", "count", "shape", "stored as", "becomes", "operator"),
    *("G", "kind", "act-order", "stored", "memory"),
)
_PRODUCT_COLUMNS = ("product", "count", "N x K", "operator", "M")
_FACTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "sliding_window",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Part:
    """Parameters that are alike.

    Attributes:
        names: of each, in Transformers' model.
        shape: of each.
        stored_as: in the words of the format.
        becomes: the module that has it.
        operator: that multiplies with it; "torch" where it is dense; None where nothing multiplies with it.
        group_size: None where it is dense, as of the following two.
        kinds: what the weight may be; which one of several its numbers decide.
        act_order: None also where its numbers decide.
        static_input: the tensors besides that its input is quantised with.
        why_dense: why it becomes dense though it is stored quantised; None else.
        stored_bytes: of all.
        memory_bytes: of all, once loaded; at most, where the kind is open.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    stored_as: str
    becomes: str
    operator: str | None
    group_size: int | None
    kinds: tuple[str, ...]
    act_order: bool | None
    static_input: tuple[str, ...]
    why_dense: str | None
    stored_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Product:
    """Products that are alike: those of linears as they stand in the model, merged ones once.

    Attributes:
        names: of the linears in qops' model.
        shape: (N, K).
        operator: that computes them; "torch" where the weight is dense.
        plans: how, on this CPU, by the number of rows M.
        cuda: None where a GPU has a kernel; why there is none; of dense ones None.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    operator: str
    plans: dict[int, str]
    cuda: str | None


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds, and what it would become.

    Attributes:
        path: as given.
        format: what it is, and how its weights are stored.
        architecture: Transformers' class.
        config: the sizes of the model.
        dtype: in which it would be built.
        parts: every parameter and buffer of the checkpoint.
        products: of one forward.
        not_fused: why the decoder layers would stay Transformers' own; None where they would be fused, if they are
            proven to compute the same.
        own: why a part of fused layers would, by "attention", "mlp" and "stream".
        stored_bytes: of all tensors.
        memory_bytes: of the model.
        dense_bytes: of the same model in `dtype`, not quantised.
        peak_bytes: that loading takes, about: the model and its largest layer, or table, twice more.
        cuda: what this installation has for GPUs.
    """

    path: str
    format: str
    architecture: str
    config: dict[str, Any]
    dtype: str
    parts: tuple[Part, ...]
    products: tuple[Product, ...]
    not_fused: str | None
    own: dict[str, str]
    stored_bytes: int
    memory_bytes: int
    dense_bytes: int
    peak_bytes: int
    cuda: str

    def json(self) -> str:
        """All of it."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def __str__(self) -> str:
        fused = "fused, once they are proven to compute what Transformers' own do"
        fused += "".join(f"; not their {part}: {reason}" for part, reason in self.own.items())
        open_kinds = any(len(part.kinds) > 1 for part in self.parts)
        sizes = ", ".join(f"{key} {value}" for key, value in self.config.items())
        lines = [
            f"{self.path}: {self.format}",
            f"{self.architecture} in {self.dtype}: {sizes}",
            f"decoder layers: {fused if self.not_fused is None else f'not fused: {self.not_fused}'}",
            "",
            _table(_PART_COLUMNS, map(_part_row, self.parts)),
            "",
            f"stored {_megabytes(self.stored_bytes)}, in memory {'at most ' if open_kinds else ''}"
            f"{_megabytes(self.memory_bytes)} (dense: {_megabytes(self.dense_bytes)}), peak while loading about "
            f"{_megabytes(self.peak_bytes)}",
        ]
        if open_kinds:
            lines.append("Which of two kinds a weight has its zero points decide; the larger is counted.")
        if any(part.act_order is None and part.group_size is not None for part in self.parts):
            lines.append("act-order ?: not read; linears of one input that differ in it are not merged.")
        if static := dict.fromkeys(key for part in self.parts for key in part.static_input):
            lines.append(f"{', '.join(static)}: not read; linears of one input that differ in them are not merged.")
        dense = [part for part in self.parts if part.why_dense is not None]
        lines += [f"dense: {_places(part.names)}: {part.why_dense}" for part in dense]
        lines += ["", _table((*_PRODUCT_COLUMNS, f"on this CPU, at level {build_info()['isa']}"), self._product_rows())]
        lines += ["", f"cuda: {self.cuda}"]
        lacking = [product for product in self.products if product.cuda is not None]
        lines += [f"cuda: {_places(product.names)}: {product.cuda}" for product in lacking]
        return "\n".join(lines)

    def _product_rows(self) -> list[list[str]]:
        return [row for product in self.products for row in _product_rows(product)]


def inspect_checkpoint(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    zero_add: str | None = None,
    symmetric: bool | None = None,
) -> Inspection:
    """Says what a checkpoint holds and what :func:`qops.load_model` would make of it, from headers and config.

    Args:
        path: as there.
        dtype: as there.
        zero_add: as there.
        symmetric: as there.

    Returns:
        What is known without the numbers.

    Raises:
        ImportError: as there.
        FileNotFoundError: as there.
        ValueError: as there; but what only the numbers of weights show is not found.
    """
    checkpoint = open_checkpoint(path, zero_add=zero_add, symmetric=symmetric)
    dtype = dtype or checkpoint.dtype
    headers: Any = _Headers(checkpoint, str(path))
    with warnings.catch_warnings():
        # The report says it, and nothing has been lost yet.
        warnings.filterwarnings("ignore", "qops: the decoder layers of")
        model = build_model(headers, dtype, "meta", prove=False)
    modules = _modules(model)
    order = {name: index for index, name in enumerate(modules)}
    # What is left over from older releases, and known as such, has no module.
    placed = (name for name in checkpoint.names if name.rpartition(".")[0] in order)
    names = sorted(placed, key=lambda name: (order[name.rpartition(".")[0]], name))
    facts = {name: checkpoint.describe(name) for name in names}
    stored = sorted({fact.stored_as for fact in facts.values() if fact.quantized is not None or fact.why_dense})
    config = {key: value for key in _FACTS if (value := getattr(model.config, key, None)) is not None}
    parts = _parts(model, modules, facts, dtype, checkpoint.linear)
    memory = weight_bytes(model) + sum(map(_order_bytes, facts.values()))
    return Inspection(
        path=str(path),
        format=f"{checkpoint.format}: {', '.join(stored) or 'nothing quantised'}",
        architecture=type(model).__name__,
        config=config,
        dtype=dtype_name(dtype),
        parts=parts,
        products=_products(model, dtype),
        not_fused=model.qops_fusion.not_fused,
        own=model.qops_fusion.own,
        stored_bytes=sum(fact.size_bytes for fact in facts.values()),
        memory_bytes=memory,
        dense_bytes=sum(math.prod(fact.shape) * dtype.itemsize for fact in facts.values()),
        peak_bytes=memory + 2 * _largest_unit(facts, parts),
        cuda=_cuda(),
    )


# The model without numbers -------------------------------------------------------------------------------------------


class _Headers:
    """A checkpoint, as a :class:`qops.formats.Checkpoint` whose weights and matrices are on the meta device.

    Vectors are zeros: there are few, and a model asks whether a bias is 0.
    """

    def __init__(self, checkpoint: Checkpoint, where: str):
        self._checkpoint, self._where = checkpoint, where
        self._asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def weight(self, module: str) -> Weight:
        name, linear = f"{module}.weight", self.linear(module)
        if linear is None:
            return self.tensor(name)
        self._asked.add(name)
        fact = self._checkpoint.describe(name)
        assert fact.quantized is not None
        try:
            return _without_numbers(linear, fact, fact.quantized)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{self._where}: {module}: {error}") from error

    def activations(self, module: str) -> dict[str, torch.Tensor]:
        linear: type[QuantizedLinear] = self.linear(module)
        there = {key: f"{module}.{key}" for key in linear.static_input if self.holds(f"{module}.{key}")}
        self._asked |= set(there.values())
        given = dict.fromkeys(there, torch.zeros((), dtype=torch.int8))
        columns = self._checkpoint.describe(f"{module}.weight").shape[1]
        return given | neutral_input(linear, columns, "cpu")

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._checkpoint.names:
            return self._checkpoint.tensor(name)
        self._asked.add(name)
        shape = self._checkpoint.describe(name).shape
        return torch.zeros(shape, device="meta" if len(shape) > 1 else "cpu")

    def finish(self, model: Any) -> None:
        require_places(self._where, set(self._checkpoint.names) - self._asked, model)


def _without_numbers(linear: type[QuantizedLinear], fact: Facts, quantized: QuantizedFacts) -> QuantizedWeight:
    """The largest weight that it may be, packed. Its columns are in order: the order is one of the numbers."""
    rows, columns = fact.shape
    weight_class: Any = linear.weight_class
    return weight_class(
        columns,
        rows,
        quantized.group_size,
        max(quantized.kinds, key=INT4_KINDS.index),  # in the order of what zeros take
        scale_dtype=quantized.scale_dtype,
        zero_dtype=quantized.zero_dtype,
        device="meta",
    )


# Grouping ------------------------------------------------------------------------------------------------------------


def _modules(model: nn.Module) -> dict[str, tuple[Any, str]]:
    """What stands for each module of Transformers' model, and how."""
    found: dict[str, tuple[Any, str]] = {}
    for name, module in model.named_modules():
        found.setdefault(name, (module, ""))
        if isinstance(module, MergedLinear):
            linears = module.separate if module.merged is None else [module.merged] * len(module.names)
            for part, linear in zip(module.names, linears, strict=True):
                found[f"{name.rpartition('.')[0]}.{part}"] = linear, "" if module.merged is None else "merged "
    return found


def _parts(
    model: Any,
    modules: Mapping[str, tuple[Any, str]],
    facts: Mapping[str, Facts],
    dtype: torch.dtype,
    linear: Callable[[str], Any],
) -> tuple[Part, ...]:
    table = input_table(model)
    tied = model.get_output_embeddings() if is_tied(model) else None
    groups: dict[Any, list[str]] = {}
    memory: dict[str, int] = {}
    for name, fact in facts.items():
        owner, _, key = name.rpartition(".")
        module, how = modules[owner]
        becomes, operator = how + type(module).__name__, _operator(module)
        if module is table and key == "weight":
            # A table of 4-bit weights is looked up as a dense one; a tied output layer has the weight itself.
            memory[name] = weight_bytes(nn.ModuleList([module] if tied is None else [module, tied]))
            if tied is not None:
                becomes, operator = f"{becomes} and {type(tied).__name__}", _operator(tied)
        elif fact.quantized is not None:
            weight = _without_numbers(linear(owner), fact, fact.quantized)
            memory[name] = weight_bytes(weight) + _order_bytes(fact)
        else:
            memory[name] = math.prod(fact.shape) * dtype.itemsize
        groups.setdefault((becomes, operator, dataclasses.replace(fact, size_bytes=0)), []).append(name)
    parts = []
    for (becomes, operator, fact), names in groups.items():
        quantized = fact.quantized
        parts.append(
            Part(
                names=tuple(names),
                shape=fact.shape,
                stored_as=fact.stored_as,
                becomes=becomes,
                operator=operator,
                group_size=None if quantized is None else quantized.group_size,
                kinds=() if quantized is None else quantized.kinds,
                act_order=None if quantized is None else quantized.act_order,
                static_input=() if quantized is None else linear(names[0].rpartition(".")[0]).static_input,
                why_dense=fact.why_dense,
                stored_bytes=sum(facts[name].size_bytes for name in names),
                memory_bytes=sum(memory[name] for name in names),
            )
        )
    return tuple(parts)


def _operator(module: nn.Module) -> str | None:
    return module.operator if isinstance(module, QuantizedLinear) else "torch" if is_linear(module) else None


def _order_bytes(fact: Facts) -> int:
    """Those of the order of the columns, which the weight without numbers does not have."""
    return 4 * fact.shape[1] if fact.quantized is not None and fact.quantized.act_order is not False else 0


def _largest_unit(facts: Mapping[str, Facts], parts: Iterable[Part]) -> int:
    """Bytes of the largest layer, or of what stands in none, stored or in memory."""
    stored: Counter[str] = Counter()
    memory: Counter[str] = Counter()
    for part in parts:
        for name in part.names:
            layer = re.match(r".*?\.\d+\.", name)
            unit = name if layer is None else layer[0]
            stored[unit] += facts[name].size_bytes
            memory[unit] += part.memory_bytes // len(part.names)
    return max((*stored.values(), *memory.values()), default=0)


def _products(model: Any, dtype: torch.dtype) -> tuple[Product, ...]:
    groups: dict[Any, list[str]] = {}
    for name, module in model.named_modules():
        if (operator := _operator(module)) is None:
            continue
        problem = _problem(module, dtype) if isinstance(module, QuantizedLinear) else {}
        shape = (module.out_features, module.in_features)
        groups.setdefault((operator, shape, tuple(problem.items())), []).append(name.removesuffix(".merged"))
    products = []
    for (operator, shape, problem), names in groups.items():
        plans, cuda = {}, None
        if operator != "torch":
            sizes = dict(zip("nk", shape, strict=True))
            plans = {
                m: explain(operator, device="cpu", m=m, **sizes, **dict(problem)).partition(" -> ")[2]
                for m in (1, PREFILL_ROWS)
            }
            cuda = _why_not_on_cuda(operator, dict(problem))
        products.append(Product(tuple(names), shape, operator, plans, cuda))
    return tuple(products)


def _problem(linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, Any]:
    """What the plan of a product depends on besides its sizes, in the words of :func:`qops.explain`."""
    dtype = torch.float32 if linear.float32_output else dtype
    epilogue = "silu_mul" if linear.weight.mixed_gate_up else "none"
    if isinstance(linear, Int8Linear):
        return {"out_dtype": dtype, "epilogue": epilogue}
    what = "out_dtype" if linear.quantizes_input else "dtype"
    problem: dict[str, Any] = {"group_size": linear.weight.group_size, what: dtype}
    if isinstance(linear, Int4Linear):
        return problem | {"kind": linear.weight.kind, "epilogue": epilogue}
    return problem | {"zeros": linear.weight.kind != "symmetric"}


def _why_not_on_cuda(operator: str, problem: Mapping[str, Any]) -> str | None:
    """Of qops, wherever it is installed; what this installation lacks is another question."""
    if operator in WITHOUT_CUDA_KERNEL:
        return f"qops has no CUDA kernel of {operator}"
    return None


def _cuda() -> str:
    build = build_info()
    if not build["cuda"]:
        return f"none of the kernels are in this installation ({build['cuda_reason']})"
    return f"kernels for {build['cuda_archs']}, {torch.cuda.device_count()} GPUs in this machine"


# Text ----------------------------------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [columns, *rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)
    return "\n".join(lines)


def _places(names: Iterable[str]) -> str:
    """Their last parts, each once; the whole name of what stands in no layer."""
    short = []
    for name in names:
        in_layer = re.fullmatch(r".*?\.\d+\.(.*)", name)
        module = name.removesuffix(".weight") if in_layer is None else in_layer[1].removesuffix(".weight")
        short.append(module if in_layer is None else re.sub(r"^(self_attn|mlp)\.", "", module))
    (*found,) = dict.fromkeys(short)
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _extents(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _part_row(part: Part) -> list[str]:
    kind = " or ".join(part.kinds)
    order = "" if part.group_size is None else {None: "?", True: "yes", False: "no"}[part.act_order]
    return [
        _places(part.names),
        str(len(part.names)),
        _extents(part.shape),
        part.stored_as,
        part.becomes,
        "" if part.operator is None else part.operator,
        "" if part.group_size is None else str(part.group_size),
        kind,
        order,
        _megabytes(part.stored_bytes),
        _megabytes(part.memory_bytes),
    ]


def _product_rows(product: Product) -> list[list[str]]:
    first = [_places(product.names), str(len(product.names)), _extents(product.shape), product.operator]
    rows = [["", "", "", "", str(m), plan] for m, plan in product.plans.items()] or [[""] * 6]
    rows[0][:4] = first
    return rows
