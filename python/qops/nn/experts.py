"""Experts of Transformers' mixtures as linears of their own, which are quantised, read and saved like all others.

Transformers holds the experts of a layer as stacks [E, N, K] in a module of their own. Here that module becomes an
:class:`Experts` with a child for each, named by its number: views of the stacks first, quantised linears later. Router
and block stay Transformers' own.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

from qops.nn.activations import frozen
from qops.nn.linears import QuantizedLinear, dense_linear
from qops.nn.mlp import MLP, is_silu

__all__ = ["ClampedSwiGLU", "Expert", "Experts"]


class ClampedSwiGLU:
    """Of gpt-oss: ``(min(max(up, -limit), limit) + 1) * g * sigmoid(alpha * g)`` with ``g = min(gate, limit)``.

    Each step is rounded to the dtype of gate and up, as in Transformers.

    Args:
        alpha: of the sigmoid.
        limit: of both.
    """

    def __init__(self, alpha: float, limit: float) -> None:
        self.alpha, self.limit = alpha, limit

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


class Expert(nn.Module):
    """``down(act(gate(x)) * up(x))``, three linears; with a :class:`ClampedSwiGLU` ``down(act(gate(x), up(x)))``.

    Args:
        gate_proj, up_proj: linears K -> I.
        down_proj: linear I -> N.
        act: the activation.
    """

    act: Any

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.__dict__["act"] = act  # no part of each expert: Transformers' module has one for all

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The formula of the class.

        Args:
            x: [rows, K].

        Returns:
            [rows, N].
        """
        gate, up = self.gate_proj(x), self.up_proj(x)
        hidden = self.act(gate, up) if isinstance(self.act, ClampedSwiGLU) else self.act(gate) * up
        return self.down_proj(hidden)


class Experts(nn.Module):
    """The experts of a layer, in the place of Transformers' module.

    A token's result is ``R(sum over e of float32(w_e) * float32(y_e))``, added in float32 in ascending e and rounded
    once to the dtype of x: it depends neither on the other tokens nor, where an expert's linears give a row the same
    bits for every M, on how many there are. Transformers' own ways round each addition or add in the order of columns.
    An index outside 0 ... E - 1 contributes nothing.

    Args:
        experts: :class:`Expert` or :class:`qops.nn.MLP`, in their order.
    """

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)

    def __len__(self) -> int:
        return len(self._modules)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the experts that are chosen for each token.

        Args:
            hidden_states: [T, H].
            top_k_index: integers [T, k].
            top_k_weights: [T, k].

        Returns:
            [T, H] in the dtype of ``hidden_states``.

        Raises:
            RuntimeError: under `torch.export`.
        """
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "qops.nn.Experts: a mixture of experts cannot be exported: which are multiplied depends on the tokens"
            )
        sums = torch.zeros_like(hidden_states, dtype=torch.float32)
        order = torch.argsort(top_k_index.reshape(-1), stable=True)
        tokens, weights = order // top_k_index.shape[-1], top_k_weights.reshape(-1)[order].float()
        numbers, counts = torch.unique_consecutive(top_k_index.reshape(-1)[order], return_counts=True)
        end = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            start, end = end, end + count
            expert = self._modules.get(str(number))
            if expert is not None:
                rows = tokens[start:end]
                sums.index_add_(0, rows, expert(hidden_states[rows]).float() * weights[start:end, None])
        return sums.to(hidden_states.dtype)


# Expanding -----------------------------------------------------------------------------------------------------------


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model that hold stacks of experts, by name."""
    for name, module in model.named_modules():
        stacks = [module._parameters.get(key) for key in ("gate_up_proj", "down_proj")]
        if all(stack is not None and stack.dim() == 3 for stack in stacks):
            yield name, module


def why_not(module: Any) -> str | None:
    """Why a module with stacks is not one whose forward is known; None if it is."""
    name = type(module).__name__
    parameters = list(inspect.signature(module.forward).parameters)
    known = (["hidden_states", "top_k_index", "top_k_weights"], ["hidden_states", "router_indices", "routing_weights"])
    if parameters not in known:
        return f"{name} takes {', '.join(parameters)}"
    if not getattr(module, "has_gate", True):
        return f"{name} has experts without a gate"
    if getattr(module, "has_post_expert_norm", False):
        return f"{name} norms what experts give"
    odd = {key for key in module._parameters if key.removesuffix("_bias") not in ("gate_up_proj", "down_proj")}
    if odd or module._buffers:
        return f"{name} has {', '.join(sorted(odd | module._buffers.keys()))} besides its experts"
    # Of Transformers' decorator where a class has none of its own.
    gate = getattr(type(module), "_apply_gate", None)
    is_own = gate is not None and gate.__qualname__.startswith(f"{name}.")
    clamps = isinstance(getattr(module, "alpha", None), float) and isinstance(getattr(module, "limit", None), float)
    if isinstance(getattr(module, "act_fn", None), nn.Module):
        limits = [key for key in vars(module) if "limit" in key and getattr(module, key) is not None]
        if is_own or limits:
            return f"{name} has an activation of its own"
    elif not clamps:
        return f"the activation of {name} is not known"
    return None


def _expanded(module: Any) -> Experts:
    transposed, concatenated = getattr(module, "is_transposed", False), getattr(module, "is_concatenated", True)
    act = module.act_fn if "act_fn" in module._modules else ClampedSwiGLU(module.alpha, module.limit)
    gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
    biases = [module._parameters.get(f"{key}_bias") for key in ("gate_up_proj", "down_proj")]
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    half = gate_up.shape[1] // 2
    parts = (slice(0, half), slice(half, None)) if concatenated else (slice(0, None, 2), slice(1, None, 2))
    found: list[nn.Module] = []
    for number in range(gate_up.shape[0]):
        of_both = None if biases[0] is None else biases[0].detach()[number]
        of_down = None if biases[1] is None else biases[1].detach()[number]
        gate, up = (dense_linear(gate_up[number, part], None if of_both is None else of_both[part]) for part in parts)
        found.append(Expert(gate, up, dense_linear(down[number], of_down), act))
    return Experts(found)


def _small(module: Any) -> Any:
    """The same module around small random stacks in float32, wherever its own are."""
    rng = torch.Generator().manual_seed(0)
    columns, width = 32, 16
    sizes = {"gate_up_proj": (2 * width, columns), "down_proj": (columns, width)}
    small = copy.copy(module)
    small._parameters = {}
    for key, stack in module._parameters.items():
        rows, k = sizes[key.removesuffix("_bias")]
        shape = (
            (rows,) if key.endswith("_bias") else (k, rows) if getattr(module, "is_transposed", False) else (rows, k)
        )
        small._parameters[key] = frozen(0.3 * torch.randn(stack.shape[0], *shape, generator=rng, device="cpu"))
    return small


def _differs(module: Any) -> str | None:
    """Why experts one by one are not what their module computes; None if they are."""
    small = _small(module)
    ours, rng = _expanded(small), torch.Generator().manual_seed(1)
    k = min(3, len(ours))
    index = torch.stack([torch.randperm(len(ours), generator=rng, device="cpu")[:k] for _ in range(5)])
    columns = small.down_proj.shape[2 if getattr(module, "is_transposed", False) else 1]
    x, shares = (torch.randn(5, size, generator=rng, device="cpu") for size in (columns, k))
    for scale in (1.0, 30.0):  # large rows reach what clamps
        with torch.no_grad():
            theirs = type(module).forward(small, scale * x, index, shares).double()
            off = float((theirs - ours(scale * x, index, shares)).norm() / theirs.norm())
        if not off <= 1e-5:
            return f"differs by {off:.2g} from its linears one by one"
    return None


def expand_experts(
    model: nn.Module, prove: bool = True, only: Callable[[str], bool] = lambda name: True
) -> dict[str, nn.Module]:
    """Puts :class:`Experts` of views in the place of every stack of experts whose forward is known, and agrees.

    Args:
        model: of Transformers, on any device.
        prove: whether one of each kind is run against Transformers' own module first, around small stacks.
        only: those of these names.

    Returns:
        What stood there, by name: `model.set_submodule` of it undoes this.
    """
    before: dict[str, nn.Module] = {}
    proven: dict[Any, str | None] = {}
    found: list[tuple[str, Any]] = [(name, module) for name, module in experts_of(model) if only(name)]
    for name, module in found:
        reason = why_not(module)
        if reason is None:
            settings = sorted(
                (key, value) for key, value in vars(module).items() if isinstance(value, (int, float, str))
            )
            act = type(getattr(module, "act_fn", None))
            kind = (type(module), act, tuple(settings))
            if prove and kind not in proven:
                proven[kind] = _differs(module)
            reason = proven.get(kind)
        if reason is not None:
            warnings.warn(f"qops: {name} stays Transformers' own and dense: {reason}", stacklevel=3)
            continue
        before[name] = module
        model.set_submodule(name, _expanded(module))
    return before


def collapse_experts(model: nn.Module, stacks: dict[str, nn.Module]) -> None:
    """Undoes :func:`expand_experts` with what the linears hold now.

    Args:
        model: whose experts are dense linears.
        stacks: what :func:`expand_experts` has given for it; takes their weights.
    """
    for name, module in stacks.items():
        experts: Any = model.get_submodule(name)
        both = [[expert.gate_proj, expert.up_proj] for expert in experts.children()]
        tensors = {
            "gate_up_proj": [_side_by_side(module, [linear.weight for linear in pair]) for pair in both],
            "down_proj": [expert.down_proj.weight for expert in experts.children()],
        }
        if getattr(module, "is_transposed", False):
            tensors = {key: [tensor.T for tensor in each] for key, each in tensors.items()}
        if "gate_up_proj_bias" in module._parameters:
            tensors["gate_up_proj_bias"] = [_side_by_side(module, [linear.bias for linear in pair]) for pair in both]
            tensors["down_proj_bias"] = [expert.down_proj.bias for expert in experts.children()]
        for key, each in tensors.items():
            setattr(module, key, frozen(torch.stack(each)))
        model.set_submodule(name, module)


def _side_by_side(module: Any, gate_up: list[torch.Tensor]) -> torch.Tensor:
    """Rows of gate and up as the stack has them."""
    if getattr(module, "is_concatenated", True):
        return torch.cat(gate_up)
    return torch.stack(gate_up, dim=1).flatten(0, 1)


def names_of_experts(model: nn.Module) -> set[str]:
    """Of the modules that :func:`expand_experts` has put into a model."""
    return {name for name, module in model.named_modules() if isinstance(module, Experts)}


def merge_experts(module: nn.Module) -> None:
    """Gate and up of each quantised expert become one product, with SiLU-mul where that is the activation."""
    for part in list(module.modules()):
        if not isinstance(part, Experts):
            continue
        for number, expert in list(part._modules.items()):
            if isinstance(expert, Expert) and isinstance(expert.gate_proj, QuantizedLinear):
                part._modules[number] = _merged(expert)


def separate_experts(module: nn.Module) -> None:
    """Undoes :func:`merge_experts`; weights that were merged are copied out and not packed."""
    for part in list(module.modules()):
        if isinstance(part, Experts):
            for number, expert in list(part._modules.items()):
                if isinstance(expert, MLP):
                    linears, act = expert.split(), cast(Any, expert.act) or nn.SiLU()
                    gate, up, down = (linears[name] for name in _NAMES)
                    part._modules[number] = Expert(gate, up, down, act)


_NAMES = ("gate_proj", "up_proj", "down_proj")


class ClampedMLP(MLP):
    """:class:`qops.nn.MLP` with a :class:`ClampedSwiGLU` of gate and up."""

    def forward(self, x: Any, residual: torch.Tensor | None = None) -> Any:
        """See :class:`Expert`.

        Args:
            x: [rows, K].
            residual: None.

        Returns:
            [rows, N].
        """
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        act: Any = self.act
        return self.down_proj(act(gate, up))


def _merged(expert: Expert) -> nn.Module:
    act: Any = expert.act
    kind: Any = ClampedMLP if isinstance(act, ClampedSwiGLU) else MLP
    is_plain = not isinstance(act, ClampedSwiGLU) and is_silu(act)
    return kind(expert.gate_proj, expert.up_proj, expert.down_proj, None if is_plain else act)
