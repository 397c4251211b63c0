"""What `torch.utils.flop_counter` counts of the operators: two operations for each multiply and add of a product.

As of torch's own products, what comes before and after is not counted: quantisers, scales, bias, residual, SiLU-mul.
A product with quantised operands counts like the dense one that it stands for, so counts of a quantised model are those
of its dense twin, but for parts whose kernels torch itself has no formula for.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

_COUNTER = "torch.utils.flop_counter"
_QOPS = torch.ops.qops


def _gemm(place: int) -> Any:
    """2 M N K of x `[..., K]`, the first argument, with out_features N at a place of the arguments."""

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 2 * args[0].numel() * args[place]

    return flops


def _columns(packed: Tensor) -> int:
    """K of a packed weight."""
    return packed.shape[1] // (8 if packed.dtype == torch.uint8 else 16)


def _attention(q_rows: int, keys: Tensor) -> int:
    """Of rows of queries `[D]` with all positions, as torch counts its own attention."""
    return 4 * q_rows * keys.shape[2] * keys.shape[3]


def _decode_attention(q: Tensor, k: Tensor, *rest: Any, out_val: Any = None, **kwargs: Any) -> int:
    return _attention(q.shape[:3].numel(), k)


def _attention_block(x: Tensor, *rest: Any, out_val: Any = None, **kwargs: Any) -> int:
    keys, o = rest[17], rest[19]
    columns, (_, kv_heads, _, d) = _columns(o), keys.shape
    products = 2 * x.numel() * (columns + 2 * kv_heads * d) + 2 * x.numel() * columns
    return products + _attention(x.shape[:2].numel() * columns // d, keys)


def _mlp_block(x: Tensor, *rest: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 6 * x.numel() * _columns(rest[13])


FORMULAS = {
    _QOPS.int4_gemm: _gemm(6),
    _QOPS.int4_int8_gemm: _gemm(7),
    _QOPS.int8_gemm: _gemm(6),
    _QOPS.int8_weight_only_gemm: _gemm(6),
    _QOPS.decode_attention: _decode_attention,
    _QOPS.attention_block: _attention_block,
    _QOPS.mlp_block: _mlp_block,
}


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas as soon as somebody imports the counter.

    `import qops` does not: where Triton is installed, the counter imports it.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def then_register(module: Any) -> None:
                execute(module)
                register(module)

            loader.exec_module = then_register
        return spec


def register(counter: Any) -> None:
    """Tells the module `torch.utils.flop_counter` of the formulas."""
    for operator, formula in FORMULAS.items():
        counter.register_flop_formula(operator, get_raw=True)(formula)


if _COUNTER in sys.modules:
    register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())
