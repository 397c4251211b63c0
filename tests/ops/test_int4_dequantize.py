from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import qops
from qops.ops.int4_dequantize import int4_dequantize_ref
from qops.testing import FLOAT_DTYPES, assert_bitwise
from tests.support.ops.random_weights import KINDS, SCALE_DTYPES, SHAPES, group_sizes, random_int4


def by_contract(w: qops.Int4Weight, dtype: torch.dtype) -> Tensor:
    """What the docstring promises: Int4Weight.dequantize(), but for a float zero's difference."""
    if w.kind != "float_zero":
        return w.dequantize(dtype)
    canonical = w.canonical()
    q = canonical["qweight"]
    groups = canonical["scales"].shape[1]
    codes = torch.stack((q & 15, q >> 4), -1).view(w.out_features, groups, w.group_size).float()
    stored = canonical["scales"].float().unsqueeze(-1) * (codes - canonical["zeros"].unsqueeze(-1))
    stored = stored.view(w.out_features, w.in_features).to(dtype)
    if "perm" not in canonical:
        return stored
    return torch.empty_like(stored).index_copy_(1, canonical["perm"].long(), stored)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_follow_the_contract(kind, dtype):
    for seed, ((n, k), scale_dtype) in enumerate(itertools.product(SHAPES, SCALE_DTYPES)):
        for group_size in group_sizes(k):
            act_order = seed % 3 == 0
            _, w = random_int4(n, k, group_size, kind, scale_dtype=scale_dtype, act_order=act_order, seed=seed)
            assert_bitwise(qops.int4_dequantize(w, dtype), by_contract(w, dtype), str(w))
            if n % 16 == 0:
                want = by_contract(w, dtype)
                assert_bitwise(qops.int4_dequantize(w.mix_gate_up(), dtype), want, str(w))


def test_a_float_zero_is_near_the_exact_weight():
    _, w = random_int4(40, 96, 32, "float_zero")
    exact = int4_dequantize_ref(w)
    largest = w.canonical()["scales"].double().abs().repeat_interleave(32, 1) * 32
    assert bool(((qops.int4_dequantize(w).double() - exact).abs() <= largest * 2.0**-23).all())
    assert not torch.equal(qops.int4_dequantize(w).double(), exact)


def test_threads_do_not_matter(threads):
    _, w = random_int4(200, 576, 64, "offset")
    threads(1)
    alone = qops.int4_dequantize(w, torch.bfloat16)
    threads(2)
    assert_bitwise(qops.int4_dequantize(w, torch.bfloat16), alone)


@pytest.mark.parametrize("n, k", ((0, 32), (16, 0), (0, 0)))
def test_empty(n, k):
    packed = torch.zeros((n + 15) // 16, 8 * k, dtype=torch.uint8)
    scales = torch.zeros((n + 15) // 16, 1 if k else 0, 16)
    assert torch.ops.qops.int4_dequantize(packed, scales, None, n, k, 0, torch.float16).shape == (n, k)


def arguments(device: str, **changes: Any) -> dict[str, Any]:
    _, w = random_int4(24, 64, 32, "zero_point")
    values: dict[str, Any] = {
        "packed": w.packed,
        "scales": w.scales,
        "zeros": w.zeros,
        "out_features": 24,
        "group_size": 32,
        "kind": 1,
        "dtype": torch.bfloat16,
        **changes,
    }
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()}


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": ({"dtype": torch.int8}, RuntimeError, "dtype must be float32, float16 or bfloat16, got int8"),
    "packed dtype": ({"packed": torch.zeros(2, 512)}, RuntimeError, "packed must have dtype uint8, got float32"),
    "packed rank": ({"packed": torch.zeros(2, dtype=torch.uint8)}, ValueError, "packed must have 2 dimensions, got 1"),
    "strips": ({"out_features": 40}, ValueError, r"packed must have shape \[S, K-strip\] = \[3, 512\], got \[2, 512\]"),
    "scales": ({"scales": torch.zeros(2, 2, 8)}, ValueError, r"scales must have shape .*, got \[2, 2, 8\]"),
    "group": ({"group_size": 24}, ValueError, "group_size must be K = 64 or a multiple of 16 that divides it, got 24"),
    "kind": ({"kind": -1}, ValueError, r"kind must be 0 \(symmetric\), .*, got -1"),
    "zeros": ({"zeros": None}, ValueError, "zeros must be given for this kind, got None"),
    "gate_up": (
        {"mixed_gate_up": True},
        ValueError,
        "out_features must be a multiple of 16, .* with mixed_gate_up, got 24",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_the_same_with_fake_tensors(case):
    changes, error, text = ERRORS[case]
    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.int4_dequantize: {text}") as caught:
            torch.ops.qops.int4_dequantize(**arguments(device, **changes))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_only_a_packed_weight():
    _, w = random_int4(16, 32, 32, "symmetric")
    with pytest.raises(TypeError, match=r"qops\.int4_dequantize: weight must be a qops\.Int4Weight, got Tensor"):
        qops.int4_dequantize(w.packed)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="pack"):
        qops.int4_dequantize(w.unpack())


@pytest.mark.parametrize("gate_up", (False, True))
def test_opcheck(gate_up):
    with torch.inference_mode(False), torch.no_grad():
        _, w = random_int4(32, 64, 32, "offset")
        args = (w.packed, w.scales, w.zeros, 32, 32, 3, torch.bfloat16, gate_up)
        torch.library.opcheck(torch.ops.qops.int4_dequantize.default, args)


def test_compile():
    torch._dynamo.reset()
    _, w = random_int4(32, 64, 32, "symmetric", act_order=True)
    compiled = torch.compile(lambda: qops.int4_dequantize(w, torch.bfloat16), fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(), qops.int4_dequantize(w, torch.bfloat16))
