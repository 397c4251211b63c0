"""Each tensor of a call to a CUDA operator alone one element off, or with rows or columns further apart, gives the bits
that it gives where everything lies at multiples of 16 bytes. A GPU faults on a vector access that is not aligned; x86
forgives it, so without one the sanitized emulator is what notices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from qops.testing import FLOAT_DTYPES, assert_bitwise, generator, random_activations
from tests.support.cuda.cuda_backend import Backend, gpu, made_there
from tests.support.ops.int8_gemm_oracle import activations, make_weight
from tests.support.ops.random_weights import KINDS, random_int4
from tests.support.properties.overloads import SIZED, overloads, sized_call, tensor_arguments

H = 1024
LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "aligned": lambda shape, **more: torch.zeros(shape, **more),
    "one element off": lambda shape, **more: torch.zeros(shape.numel() + 1, **more)[1:].view(shape),
    "rows apart": lambda shape, **more: torch.zeros(*shape[:-1], shape[-1] + 1, **more)[..., :-1],
    "tokens apart": lambda shape, **more: torch.zeros(shape[0], shape[1:].numel() + 1, **more)[:, :-1].unflatten(
        1, shape[1:]
    ),
    "columns apart": lambda shape, **more: torch.zeros(*shape, 2, **more)[..., 0],
}
ROWS = ("one element off", "rows apart")
HEADS = (*ROWS, "tokens apart", "columns apart")
TABLES = (*ROWS, "columns apart")


@dataclass(frozen=True)
class Call:
    """`outputs` are results that the caller gives, or what changes; `layouts` what is tried, if not one off."""

    op: str
    overload: str
    arguments: dict[str, Any]
    outputs: dict[str, Tensor]
    layouts: dict[str, tuple[str, ...]]

    def results(self, backend: Backend, name: str = "", layout: str = "aligned") -> list[Tensor]:
        """With tensor `name` laid out so, and all others aligned."""

        def placed(key: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            make = LAYOUTS[layout if key == name else "aligned"]
            return make(value.shape, dtype=value.dtype, device=backend.device).copy_(value)

        everything = {key: placed(key, value) for key, value in (self.arguments | self.outputs).items()}
        got = getattr(getattr(backend.ops, self.op), self.overload)(**everything)
        assert got is None
        return [everything[key].cpu() for key in self.outputs]

    def check(self, backend: Backend) -> None:
        want = self.results(backend)
        for name, value in (self.arguments | self.outputs).items():
            if not isinstance(value, Tensor) or value.dim() == 0 or name == "packed":  # which has to be aligned
                continue
            for layout in self.layouts.get(name, ("one element off",)):
                for got, expected in zip(self.results(backend, name, layout), want, strict=True):
                    assert_bitwise(got, expected, f"{self.op}: {name} {layout}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in SIZED if tensor_arguments(overloads()[name], written=True)])
def test_rows(backend, name, dtype):
    drawn = sized_call(name, 3, H, dtype)
    assert drawn is not None
    given = dict(drawn.tensors())
    outputs = {key: given[key] for key in drawn.written}
    arguments = {key: value for key, value in drawn.arguments.items() if key not in outputs}
    rows = [key for key, t in given.items() if t.dim() == 2 and key not in outputs]
    Call(drawn.op, drawn.overload, arguments, outputs, dict.fromkeys(rows, ROWS)).check(backend)


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "neighbours"))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("op", ("rotary_", "qk_norm_rotary_"))
def test_heads(backend, op, dtype, interleaved):
    d, pairs = 80, 32  # the last elements of a head do not turn
    q, k = (random_activations(4, heads, d, dtype=dtype, seed=heads) for heads in (3, 2))
    weights = {f"{name}_weight": torch.rand(d, generator=generator(2)).to(dtype) for name in "qk"}
    for table in dict.fromkeys((torch.float32, dtype)):
        tables = {name: torch.randn(4, pairs, generator=generator(1)).to(table) for name in ("cos", "sin")}
        more = {**weights, "eps": 1e-6} if op.startswith("qk") else {}
        arguments = {**more, **tables, "interleaved": interleaved}
        layouts = dict.fromkeys("qk", HEADS) | dict.fromkeys(("cos", "sin"), TABLES)
        Call(op, "default", arguments, {"q": q, "k": k}, layouts).check(backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", (3, 40))
def test_int4_gemm(backend, m, kind):
    n, k = 48, 128
    tensors, _ = random_int4(n, k, 64, kind, scale_dtype=torch.float16)
    with gpu(backend):
        w = made_there(backend, tensors, kind)
    x, residual = (random_activations(m, columns, dtype=torch.bfloat16, seed=m) for columns in (k, n))
    weight = {"packed": w.packed, "scales": w.scales, "zeros": w.zeros, "perm": None, "bias": torch.arange(n) / 7}
    sizes = {"out_features": n, "group_size": 64, "kind": KINDS.index(kind)}
    arguments = {"x": x, **weight, **sizes, "residual": residual}
    # Scales and zeros have no kernel that reads them elsewhere: those of a weight are aligned.
    layouts = {"x": ROWS, "residual": ROWS, "scales": (), "zeros": ()}
    Call("int4_gemm", "fused_out", arguments, {"out": torch.zeros_like(residual)}, layouts).check(backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", (3, 40))
def test_int4_int8_gemm(backend, m, kind):
    n, k = 48, 128
    tensors, _ = random_int4(n, k, 32, kind, scale_dtype=torch.float16)
    with gpu(backend):
        w = made_there(backend, tensors, kind)
    q, scale, _ = activations(m, k, 0)
    residual = random_activations(m, n, dtype=torch.bfloat16, seed=m)
    weight = {"packed": w.packed, "scales": w.scales, "zeros": w.zeros, "perm": None, "bias": torch.arange(n) / 7}
    sizes = {"out_features": n, "group_size": 32, "kind": KINDS.index(kind), "out_dtype": torch.bfloat16}
    arguments = {"q": q, "scale": scale, **weight, **sizes, "residual": residual}
    layouts = {"q": ROWS, "residual": ROWS, "scales": (), "zeros": ()}  # as those of int4_gemm
    Call("int4_int8_gemm", "fused_out", arguments, {"out": torch.zeros_like(residual)}, layouts).check(backend)


@pytest.mark.parametrize("m", (3, 40))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_int8_gemm(backend, dtype, m):
    n, k = 48, 128
    w, (q, scale, zero_point) = make_weight(n, k, 0), activations(m, k, 0)
    packed = backend.ops.int8_pack(backend.on_device(w.canonical()["qweight"]))
    residual = random_activations(m, n, dtype=dtype, seed=m)
    weight = {"packed": packed, "w_scale": w.scales, "bias": torch.arange(n) / 7, "out_features": n}
    arguments = {"q": q, "scale": scale, "zero_point": zero_point, **weight, "out_dtype": dtype, "residual": residual}
    layouts = {"q": ROWS, "residual": ROWS}
    Call("int8_gemm", "fused_out", arguments, {"out": torch.zeros_like(residual)}, layouts).check(backend)
