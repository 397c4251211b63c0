"""Linears over one input as one, and the MLP that has two of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qops.nn.activations import Int8Rows
from qops.nn.linears import QuantizedLinear, dense_linear, into_stream
from qops.nn.merged_state import merge_names, restore_names
from qops.nn.offload import Offloadable
from qops.ops import (
    silu_mul,
    silu_mul_int8,
)
from qops.weights.noticed import Noticed


class MergedLinear(Noticed):
    """Linears over one input as one GEMM, side by side along N, each under its own name in the state_dict.

    Parts of one type (int4 of one kind and group size, int8 of one group size that quantise the input alike, or dense;
    all or none with a bias) become one linear. Others stay separate and their outputs are concatenated: mixed
    checkpoints work, only slower.
    The parent must derive from :class:`MergingModule`, which gives the parts their names back when a state_dict is
    loaded.

    Args:
        parts: name -> linear, in output order.

    Raises:
        ValueError: there are none, or they differ in K.
    """

    def __init__(self, parts: Mapping[str, Any]):
        super().__init__()
        self.names = tuple(parts)
        linears = list(parts.values())
        columns = {name: linear.in_features for name, linear in parts.items()}
        if len(set(columns.values())) != 1:
            raise ValueError(f"MergedLinear: parts must have one K, got {columns}")
        self.sizes = [linear.out_features for linear in linears]
        self.merged = _merge(linears)
        self.separate = nn.ModuleList(linears if self.merged is None else [])
        self.register_state_dict_post_hook(restore_names)

    @property
    def rows_rule(self) -> str | None:
        """The rule of the :class:`Int8Rows` that the input may be: that of every part; None where they differ."""
        rules = {rows_rule(linear) for linear in (self.separate if self.merged is None else [self.merged])}
        return rules.pop() if len(rules) == 1 else None

    def forward(self, x: torch.Tensor | Int8Rows) -> torch.Tensor:
        """The outputs of all parts side by side.

        Args:
            x: [..., K]; 8-bit only by `rows_rule`.

        Returns:
            [..., sum of the parts' N].
        """
        merged = self.merged
        if merged is not None:
            return merged(x)
        return torch.cat([linear(x) for linear in self.separate], dim=-1)

    def split(self) -> dict[str, nn.Module]:
        """The parts as linears of their own; quantised weights are copied out and not packed, dense ones are views."""
        if self.merged is None:
            return dict(zip(self.names, self.separate, strict=True))
        linear, sizes = self.merged, self.sizes
        biases = [None] * len(sizes) if linear.bias is None else linear.bias.split(sizes)
        weights = linear.weight.split(sizes)
        parts = [
            dense_linear(weight, bias) if isinstance(weight, torch.Tensor) else linear.around(weight, bias)
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return dict(zip(self.names, parts, strict=True))

    def extra_repr(self) -> str:
        return f"{dict(zip(self.names, self.sizes, strict=True))}"


class MergingModule(Offloadable):
    """Base of modules with :class:`MergedLinear` children: loads state_dicts that name the parts."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        error_msgs = rest[-1]
        for name, child in self.named_children():
            if isinstance(child, MergedLinear):
                merge_names(child, state_dict, prefix, f"{prefix}{name}.", error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class MLP(MergingModule):
    """`down(act(gate(x)) * up(x))`, gate and up as one GEMM.

    With SiLU that GEMM applies the activation before it stores (:meth:`qops.Int4Weight.mix_gate_up`), where the
    class of the linears can. After others SiLU is :func:`qops.silu_mul`, or :func:`qops.silu_mul_int8` before a down
    that takes :class:`Int8Rows`.
    Where down has an act-order, gate and up give their outputs in that order, so that down need not gather them: the
    same bits, without a pass over memory. The state_dict is then one of reordered weights.

    Args:
        gate_proj, up_proj: linears K -> I.
        down_proj: linear I -> N.
        act: another activation than SiLU, computed by PyTorch, element by element.

    Raises:
        ValueError: K or I differ.
    """

    order: torch.Tensor
    """int32 [I], the act-order that down had; only where it had one."""

    def __init__(
        self,
        gate_proj: nn.Module,
        up_proj: nn.Module,
        down_proj: nn.Module,
        act: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        super().__init__()
        self._assemble({"gate_proj": gate_proj, "up_proj": up_proj}, down_proj, act)

    @classmethod
    def of_merged(
        cls,
        gate_up_proj: nn.Module,
        down_proj: nn.Module,
        act: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> MLP:
        """An MLP whose gate and up are one linear from the start, as Phi-3's are.

        Args:
            gate_up_proj: linear K -> 2 I, gate first. It is taken over: the strips of its weight are mixed where its
                class applies SiLU-mul, and by itself it then gives that, [..., I].
            down_proj: linear I -> N.
            act: as in the class.

        Returns:
            An MLP whose state_dict has that linear under its own name.

        Raises:
            ValueError: I differs.
        """
        mlp = cls.__new__(cls)
        super(MLP, mlp).__init__()
        mlp._assemble({"gate_up_proj": gate_up_proj}, down_proj, act)
        return mlp

    def _assemble(
        self, gate_up: dict[str, Any], down_proj: Any, act: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> None:
        sizes = {name: linear.out_features for name, linear in gate_up.items()}
        if any(len(sizes) * size != 2 * down_proj.in_features for size in sizes.values()):
            raise ValueError(f"MLP: gate and up must have the I = {down_proj.in_features} outputs of down, got {sizes}")
        self.reordered = isinstance(down_proj, QuantizedLinear) and down_proj.weight.act_order
        if self.reordered:
            self.register_buffer("order", down_proj.weight.perm, persistent=False)
            order = down_proj.weight.perm.long()
            rows = order if len(gate_up) > 1 else torch.cat((order, order + len(order)))
            gate_up = {name: _with_rows(linear, rows) for name, linear in gate_up.items()}
            down_proj = down_proj.in_stored_order()
        if len(gate_up) > 1:
            self.gate_up_proj = MergedLinear(gate_up)
            merged = self.gate_up_proj.merged
        else:
            self.gate_up_proj = merged = gate_up["gate_up_proj"]
        self.down_proj = down_proj
        self.act = act
        mixes = act is None and isinstance(merged, QuantizedLinear) and merged.applies_silu_mul
        self.activates_in_gemm = mixes and merged.out_features % 16 == 0
        if self.activates_in_gemm:
            merged.weight.mix_gate_up()
        self._be_hooked()

    def forward(self, x: torch.Tensor | Int8Rows, residual: torch.Tensor | None = None) -> Any:
        """The formula of the class.

        Args:
            x: [..., K]; 8-bit only where gate and up take it.
            residual: [..., N], what the result is to be added to.

        Returns:
            [..., N]; with a residual the sum, where down adds it before it stores, else (result, residual).
        """
        hidden: Any = self.gate_up_proj(x)
        if self.act is not None:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = self.act(gate) * up
        elif not self.activates_in_gemm:
            rule = rows_rule(self.down_proj)
            if rule is not None:
                hidden = Int8Rows(*silu_mul_int8(hidden, rule=rule), hidden.dtype, rule)
            else:
                hidden = silu_mul(hidden)
        return into_stream(self.down_proj, hidden, residual)

    def split(self) -> dict[str, nn.Module]:
        """The linears that it was made of, each as it was.

        Returns:
            name -> linear. What was merged, mixed or reordered is copied out, and not packed where it was merged.
        """
        gate_up: Any = self.gate_up_proj
        down: Any = self.down_proj
        parts: dict[str, Any] = gate_up.split() if isinstance(gate_up, MergedLinear) else {"gate_up_proj": gate_up}
        if self.reordered:
            back = self.order.long().argsort()
            rows = back if len(parts) > 1 else torch.cat((back, back + len(back)))
            parts = {name: _with_rows(linear, rows) for name, linear in parts.items()}
            down = down.in_act_order(self.order)
        elif len(parts) == 1 and self.activates_in_gemm:
            whole = parts["gate_up_proj"]
            (weight,) = whole.weight.split([whole.out_features])
            parts = {"gate_up_proj": whole.around(weight, whole.bias)}
        return {**parts, "down_proj": down}

    def extra_repr(self) -> str:
        notes = {
            "SiLU-mul in the product": self.activates_in_gemm,
            "rows of gate and up in the act-order of down": self.reordered,
        }
        return ", ".join(note for note, holds in notes.items() if holds)


def is_silu(act: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """By what it computes: Transformers and its kernel hubs have several classes for it."""
    x = torch.linspace(-8, 8, 65)
    return torch.equal(act(x), F.silu(x))


def rows_rule(linear: Any) -> str | None:
    """The rule of the :class:`Int8Rows` that the input of a linear, of any kind, may be; None: it must be dense."""
    return linear.rows_rule if isinstance(linear, (QuantizedLinear, MergedLinear)) else None


def _with_rows(linear: Any, order: torch.Tensor) -> Any:
    """A linear of the same kind whose output i is output `order[i]` of this one."""
    bias = None if linear.bias is None else linear.bias[order]
    if isinstance(linear, nn.Linear):
        return dense_linear(linear.weight[order], bias)
    return linear.around(linear.weight.with_rows(order), bias)


def _merge(linears: Sequence[Any]) -> Any:
    """One linear with the outputs of all, or None where they differ in more than N."""
    first = linears[0]
    if len({type(linear) for linear in linears}) > 1 or len({linear.bias is None for linear in linears}) > 1:
        return None
    bias = None if first.bias is None else torch.cat([linear.bias for linear in linears])
    weights = [linear.weight for linear in linears]
    if isinstance(first, nn.Linear):
        return dense_linear(torch.cat(weights), bias)
    if not all(first.is_like(linear) for linear in linears):
        return None
    return first.around(type(first.weight).cat(weights), bias)
