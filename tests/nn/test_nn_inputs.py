"""What modules take that operators refuse: any strides, as nn.Linear does, and the dtypes that autocast mixes."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import qops
from qops.nn import (
    MLP,
    Int4Int8Linear,
    Int4Linear,
    Int8Linear,
    Int8Rows,
    Int8WeightOnlyLinear,
    MergedLinear,
    RMSNorm,
    dense_linear,
)
from qops.nn.linears import into_stream
from qops.testing import assert_bitwise, random_activations
from tests.support.models.families import IDS, random_model

K, N = 64, 48


def dense(n: int, k: int, seed: int) -> torch.Tensor:
    return random_activations(n, k, dtype=torch.float32, seed=seed, outliers=False) / k**0.5


def int4(n: int = N, k: int = K, seed: int = 1) -> Int4Linear:
    return Int4Linear(qops.Int4Weight.quantize(dense(n, k, seed), 16), dense(1, n, seed + 1)[0])


def int4_int8(n: int = N, k: int = K, seed: int = 1) -> Int4Int8Linear:
    linear = int4(n, k, seed)
    return Int4Int8Linear(linear.weight, linear.bias)


def int8(n: int = N, k: int = K, seed: int = 1) -> Int8Linear:
    return Int8Linear(qops.Int8Weight.quantize(dense(n, k, seed)), dense(1, n, seed + 1)[0])


def weight_only(n: int = N, k: int = K, seed: int = 1) -> Int8WeightOnlyLinear:
    return Int8WeightOnlyLinear(qops.Int8Weight.quantize(dense(n, k, seed), 16))


MODULES = {
    "Int4Linear": int4,
    "Int4Int8Linear": int4_int8,
    "Int8Linear": int8,
    "Int8WeightOnlyLinear": weight_only,
    "RMSNorm": lambda: RMSNorm(dense(1, K, 1)[0], 1e-6),
    "RMSNorm int8": lambda: RMSNorm(dense(1, K, 1)[0], 1e-6, int8="127"),
    "MLP": lambda: MLP(int4(96), int4(96, seed=3), int4(N, 96, 5)),
    "MLP int8": lambda: MLP(int8(96), int8(96, seed=3), int8(N, 96, 5)),
    "MLP apart": lambda: MLP(int4(96), int8(96, seed=3), int8(N, 96, 5)),
    "MergedLinear": lambda: MergedLinear({"a": int4(), "b": int4(16, seed=3)}),
    "MergedLinear apart": lambda: MergedLinear({"a": int4(), "b": int8(16, seed=3), "c": dense_linear(dense(8, K, 7))}),
}
# Each gives x of shape [..., K] with other strides than a contiguous tensor.
LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second column": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
    "expanded columns": lambda x: x[..., :1].expand(x.shape),
    "expanded rows": lambda x: x[:1].expand(x.shape),
    "columns of a wider tensor": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "more dimensions than a kernel walks": lambda x: torch.zeros(4, 4, 4, 4, 4, x.shape[-1])[::2, ::2, ::2, ::2, ::2],
    "no elements": lambda x: x[:0].mT.contiguous().mT,
}


def results(result: object) -> list[torch.Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def assert_same(got: object, want: object) -> None:
    assert type(got) is type(want)
    for a, b in zip(results(got), results(want), strict=True):
        assert_bitwise(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODULES)
def test_modules_take_any_strides(name, layout):
    module = MODULES[name]()
    x = LAYOUTS[layout](random_activations(2, 5, K, dtype=torch.float32, seed=9))
    assert not x.is_contiguous() or x.numel() == 0
    assert_same(module(x), module(x.contiguous()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["Int4Linear", "Int4Int8Linear", "Int8Linear", "MLP", "MLP int8", "RMSNorm", "RMSNorm int8"]
)
def test_residuals_have_any_strides(name, layout):
    module = MODULES[name]()
    columns = K if "RMSNorm" in name else N
    residual = LAYOUTS[layout](random_activations(2, 5, columns, dtype=torch.float32, seed=8))
    x = LAYOUTS[layout](random_activations(2, 5, K, dtype=torch.float32, seed=9))
    call = module.add if isinstance(module, RMSNorm) else module
    assert_same(call(x, residual), call(x.contiguous(), residual.contiguous()))


def test_8_bit_rows_and_parameters_have_any_strides():
    q, scale = qops.quantize_int8(random_activations(6, K, dtype=torch.bfloat16, seed=3))
    module = int8()
    want = module(Int8Rows(q, scale, torch.bfloat16, "127"))
    apart = torch.stack((scale, scale), 1)[:, 0]
    assert_bitwise(module(Int8Rows(q.mT.contiguous().mT, apart, torch.bfloat16, "127")), want)
    apart = torch.stack((dense(1, N, 2)[0], dense(1, N, 2)[0]), 1)[:, 0]
    x = random_activations(3, K, dtype=torch.float32, seed=3)
    assert_bitwise(Int4Linear(int4().weight, apart)(x), int4()(x))
    norm = torch.stack((dense(1, K, 1)[0], dense(1, K, 1)[0]), 1)[:, 0]
    assert_bitwise(RMSNorm(norm, 1e-6)(x), MODULES["RMSNorm"]()(x))


def test_rows_apart_in_memory_are_not_copied(monkeypatch):
    x = random_activations(4, 2 * K, dtype=torch.float32, seed=3)[:, :K]
    seen = []
    monkeypatch.setattr("qops.nn.linears.int4_gemm", lambda x, *rest, **more: seen.append(x))
    int4()(x)
    assert seen[0] is x


@pytest.mark.parametrize("name", MODULES)
def test_any_strides_compile_in_one_graph(name):
    module = MODULES[name]()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = random_activations(2, 5, K, dtype=torch.float32, seed=9)
    assert_same(compiled(x), module(x))
    assert_same(compiled(x.mT.contiguous().mT), module(x))


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("family", ["Mamba", "FalconMamba"])
def test_models_with_transposed_activations_run(family, scheme):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=72, hidden_size=64, num_hidden_layers=2, state_size=8, initializer_range=0.2
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    quantised = qops.quantize_model(model, scheme)
    twin = qops.quantize_model(getattr(transformers, f"{family}ForCausalLM")(config).eval(), scheme)
    twin.load_state_dict(quantised.state_dict())
    # Linears that see contiguous copies alone.
    for module in twin.modules():
        if isinstance(module, (Int4Linear, Int8Linear)):
            module.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    assert_bitwise(quantised(IDS).logits, twin(IDS).logits)


# Autocast ------------------------------------------------------------------------------------------------------------


def stays_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """As attention in bfloat16 moves the logits of a small model, weights of 4 bits or not."""
    assert got.isfinite().all()
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < 0.06, float(error)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_models_run_under_autocast(family, dtype, scheme, fuse):
    model = qops.quantize_model(random_model(family, dtype=dtype), scheme, fuse=fuse)
    want = model(IDS, use_cache=False).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = model(IDS, use_cache=False, output_hidden_states=True)
        first = model(IDS[:, :-1], use_cache=True)
        last = model(IDS[:, -1:], past_key_values=first.past_key_values).logits
    stays_close(whole.logits, want)
    stays_close(last, want[:, -1:])
    if fuse:
        assert {state.dtype for state in whole.hidden_states} == {dtype}


@pytest.mark.parametrize("linear", [int4, int8, weight_only, lambda: dense_linear(dense(N, K, 1))])
@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16], ids=str)
def test_a_stream_keeps_its_dtype_under_autocast(linear, other):
    """And without it, mixed dtypes are the caller's mistake."""
    x = random_activations(3, K, dtype=torch.float32, seed=4).to(other)
    residual = random_activations(3, N, dtype=torch.float32, seed=5)
    norm = RMSNorm(torch.ones(N), 1e-6)
    module = linear()
    with torch.autocast("cpu", dtype=other):
        stream = into_stream(module, x, residual)
        if isinstance(stream, tuple):
            normed, total = norm.add(*stream)
            assert normed.dtype == total.dtype == torch.float32
            assert_bitwise(total, stream[0].float() + residual)
        else:
            assert_bitwise(stream, module(x.float(), residual))
    if not isinstance(module, (nn.Linear, Int8WeightOnlyLinear)):
        with pytest.raises(RuntimeError, match=r"residual must have dtype b?float16, got float32"):
            into_stream(module, x, residual)
    with pytest.raises(RuntimeError, match=r"residual must have the dtype of x = b?float16, got float32"):
        norm.add(random_activations(3, N, dtype=other, seed=6), residual)


@pytest.mark.parametrize("name", MODULES)
def test_modules_return_the_dtype_of_their_input_under_autocast(name):
    if name == "MergedLinear apart":
        pytest.skip("one of its parts is torch's own linear, which autocast casts")
    module = MODULES[name]()
    for dtype in (torch.float32, torch.bfloat16):
        x = random_activations(3, K, dtype=dtype, seed=4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = module(x)
        assert_same(got, module(x))
        assert (got.dtype if isinstance(got, (torch.Tensor, Int8Rows)) else None) == dtype
