"""What is timed as a whole: a layer, and a model that decodes. That the peers compute it, and can be captured."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import qops
from bench import problems
from bench.peers import providers
from bench.peers.cuda import vllm_layer
from bench.problems.models.int4_decode import Int4Decode, int4_model
from bench.problems.models.int8_layer import Int8Layer
from bench.problems.shared.provider import Provider
from bench.timing import samplers
from tests.support.cuda.cuda_backend import gpu

MODELS = ("int8_layer", "int4_decode")
AXES: dict[str, int | str] = {
    **{"M": 3, "T": 5, "H": 96, "I": 64, "Hq": 3, "Hk": 1, "D": 32, "L": 3, "V": 72, "C": 9},
    **{"dtype": "bfloat16", "cache": "hot"},
}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def verify(provider: Provider, problem: Int8Layer | Int4Decode) -> samplers.Error:
    return samplers.verify(provider, problem, provider.build(problem)())


@pytest.mark.slow
@pytest.mark.parametrize("op", MODELS)
def test_every_provider_on_the_cpu_computes_it(op):
    problem = problems.make(op, AXES)
    found = providers.all(op, "cpu")
    assert [p.name for p in found][:1] == ["qops"] and len(found) >= 2
    for provider in found:
        assert verify(provider, problem).relative > 0


@pytest.mark.parametrize("op", MODELS)
def test_float32_is_a_thousand_times_closer_where_nothing_is_rounded(op):
    problem = problems.make(op, {**AXES, "dtype": "float32"})
    name = "qops" if op == "int4_decode" else "onednn F.linear"
    assert verify(next(p for p in providers.all(op, "cpu") if p.name == name), problem).relative < 2e-6


@pytest.mark.parametrize("op", MODELS)
def test_another_result_is_refused(op):
    """With every weight that it has, one after the other, ten times as large."""
    problem = problems.make(op, AXES)
    provider = providers.all(op, "cpu")[0]
    if isinstance(problem, Int8Layer):
        names = [name for name in problem.__annotations__ if name.endswith(("_norm", "_scale"))]
        wrong = [replace(problem, **{name: 10 * getattr(problem, name)}) for name in names]
        assert len(wrong) == 6
    else:
        assert isinstance(problem, Int4Decode)
        first, layer, last = problem.layers
        larger = {name: matrix._replace(scales=10 * matrix.scales) for name, matrix in layer.linears.items()}
        others = [layer._replace(linears=layer.linears | {name: matrix}) for name, matrix in larger.items()]
        wrong = [replace(problem, layers=(first, other, last)) for other in others]
        wrong += [replace(problem, layers=(first, first, last)), replace(problem, sizes=problem.sizes | {"C": 30})]
    for other in wrong:
        with pytest.raises(ValueError, match="wrong result"):
            samplers.verify(provider, problem, provider.build(other)())


def test_a_step_goes_on_from_the_token_of_the_step_before():
    problem = problems.make("int4_decode", {**AXES, "dtype": "float32"})
    assert isinstance(problem, Int4Decode)
    for provider in providers.all("int4_decode", "cpu"):
        step = provider.build(problem)
        first = step().clone()
        samplers.verify(provider, problem, first)
        samplers.verify(provider, replace(problem, ids=first.argmax(-1)), step())


def test_the_weights_are_those_of_the_problem_and_four_bits_wide():
    problem = problems.make("int4_decode", AXES)
    assert isinstance(problem, Int4Decode)
    model = int4_model(problem)
    packed = [m for m in model.modules() if isinstance(m, qops.Int4Weight)]
    assert len(packed) == 4 * 3 and all(weight.is_packed for weight in packed)
    wanted = problem.layers[2].linears["mlp.down_proj"].dense()
    assert torch.equal(model.model.layers[2].mlp.down_proj.weight.dequantize(torch.float64), wanted.float().double())


FOR_THE_HOST = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "lift_fresh")


class NothingForTheHost(TorchDispatchMode):
    """Fails where capture into a CUDA graph would: a value that the host reads, a tensor that it makes of numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().removeprefix("aten::").partition(".")[0] not in FOR_THE_HOST, func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", MODELS)
def test_a_call_can_be_captured(op):
    problem = problems.make(op, AXES)
    for provider in providers.all(op, "cpu"):
        if "compile" not in provider.name:
            call = provider.build(problem)
            call()
            with NothingForTheHost():
                call()
    for read in (lambda: torch.ones(1).item(), lambda: torch.tensor([1]), lambda: torch.ones(3).nonzero()):
        with pytest.raises(AssertionError, match="aten::"), NothingForTheHost():
            read()


def vllm_operators() -> SimpleNamespace:
    """vLLM's, as its sources describe them, on the CPU."""

    def quantize(q, x, scale, zero_point):
        q.copy_(qops.quantize_int8(x)[0])
        scale.copy_(qops.quantize_int8(x)[1][:, None])

    def add_norm(x, residual, weight, eps):
        y, z = qops.add_rms_norm(x, residual, weight, eps)
        x.copy_(y)
        residual.copy_(z)

    def norm_quantize(q, x, weight, scale, eps, upper_bound, residual):
        rows, s, z = qops.add_rms_norm_int8(x, residual, weight, eps)
        q.copy_(rows)
        scale.copy_(s[:, None])
        residual.copy_(z)

    def scaled_mm(y, a, b, a_scales, b_scales, bias):
        assert b.stride(0) == 1 and a_scales.shape == (len(a), 1) and b_scales.shape == (b.shape[1], 1)
        y.copy_((a.double() @ b.double()) * a_scales * b_scales[:, 0])

    def rotary(positions, q, k, head, cache, is_neox):
        assert is_neox and q.stride(0) == k.stride(0) > q.shape[1]
        cos, sin = cache.chunk(2, dim=-1)
        qops.rotary_(q.unflatten(1, (-1, head)), k.unflatten(1, (-1, head)), cos, sin, positions=positions)

    def silu(y, x):
        gate, up = x.chunk(2, dim=-1)
        y.copy_(F.silu(gate) * up)

    return SimpleNamespace(
        dynamic_scaled_int8_quant=quantize,
        fused_add_rms_norm=add_norm,
        rms_norm_dynamic_per_token_quant=norm_quantize,
        cutlass_scaled_mm=scaled_mm,
        rotary_embedding=rotary,
        silu_and_mul=silu,
    )


def test_a_layer_of_vllms_operators(monkeypatch):
    monkeypatch.setattr(vllm_layer, "ops", vllm_operators)
    problem = problems.make("int8_layer", AXES)
    assert [p.name for p in vllm_layer.PROVIDERS] == ["vllm", "vllm fused"]
    for provider in vllm_layer.PROVIDERS:
        assert provider.unsupported("cuda", AXES) is None
        assert provider.unsupported("cuda", AXES | {"I": 72}) == "multiples of 16 only"
        verify(provider, problem)


@pytest.mark.parametrize("op", MODELS)
def test_ours_as_a_gpu_will_run_it(op, backend):
    """In the emulator, and on a GPU where there is one."""
    with gpu(backend):
        problem = problems.make(op, AXES, backend.device)
        verify(providers.all(op, "cuda")[0], problem)
