"""Operators are for inference: what would lose a gradient or a tangent is an error, in each way to call an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import qops
from qops.testing import assert_bitwise
from tests.support.properties.overloads import overloads, tensor_arguments, valid_calls

OVERLOADS = overloads()
# check_layout gives and writes nothing, so nothing is lost in it.
del OVERLOADS["check_layout.default"]
X, WEIGHT = torch.linspace(-1, 1, 32).view(2, 16), torch.ones(16)


@pytest.fixture(autouse=True)
def grad():
    with torch.inference_mode(False), torch.enable_grad():
        yield


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def branch(t: Tensor) -> Tensor:
    return leaf(t) * 1


def dual(t: Tensor) -> Tensor:
    return forward_ad.make_dual(t.detach().clone(), torch.ones_like(t))


def raised(operator: Any, arguments: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as error:
        operator(**arguments)
    return str(error.value)


@pytest.mark.parametrize("name", OVERLOADS)
@pytest.mark.parametrize("change", [leaf, branch, dual])
def test_every_overload_refuses_each_float_argument(name, change):
    operator = OVERLOADS[name]
    seen: set[str] = set()
    # Some arguments are optional, or floats in some calls alone.
    for call in valid_calls(name, 40):
        for argument, tensor in call.tensors():
            if argument in seen or not tensor.is_floating_point():
                continue
            seen.add(argument)
            with forward_ad.dual_level():
                changed = {**call.arguments, argument: change(tensor)}
                what = "tangent" if change is dual else "grad"
                prefix = f"qops.{call.op}: {argument} must not "
                text = raised(operator, changed)
                assert text.startswith(prefix) and what in text, text
                mode = FakeTensorMode()
                with mode:
                    fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in changed.items()}
                if change is not dual:  # which is lost on the way to a fake tensor
                    assert raised(operator, fakes) == text
    floats = {a for call in valid_calls(name, 40) for a, t in call.tensors() if t.is_floating_point()}
    assert seen == floats <= set(tensor_arguments(operator))


def test_most_overloads_have_a_float_argument():
    """So that the test above is not empty."""
    without = [
        name
        for name in OVERLOADS
        if not any(t.is_floating_point() for call in valid_calls(name, 40) for _, t in call.tensors())
    ]
    assert without == [f"{name}.default" for name in ("int4_pack", "int4_unpack", "int8_pack", "int8_unpack")]


def test_without_grad_mode_gradients_are_not_asked_for():
    want = qops.rms_norm(X, WEIGHT, 1e-5)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_bitwise(torch.ops.qops.rms_norm(leaf(X), leaf(WEIGHT), 1e-5), want)
            assert_bitwise(qops.rms_norm(leaf(X), leaf(WEIGHT), 1e-5), want)


def test_tensors_of_inference_mode_pass_with_grad_mode_on():
    with torch.inference_mode():
        x = X.clone()
    assert_bitwise(torch.ops.qops.rms_norm(x, WEIGHT, 1e-5), qops.rms_norm(X, WEIGHT, 1e-5))


def functions() -> dict[str, Callable[[Tensor], Any]]:
    int4, int8 = qops.Int4Weight.quantize(torch.eye(16), 16), qops.Int8Weight.quantize(torch.eye(16))
    heads, table = torch.ones(2, 1, 1, 16), torch.ones(1, 8)
    q, scale = qops.quantize_int8(X)
    return {
        "int4_gemm": lambda x: qops.int4_gemm(x, int4),
        "int8_gemm": lambda x: qops.int8_gemm(q, scale, int8, residual=x, out_dtype=torch.float32),
        "int8_weight_only_gemm": lambda x: qops.int8_weight_only_gemm(x, int8),
        "quantize_int8": qops.quantize_int8,
        "quantize_int8_asym": qops.quantize_int8_asym,
        "quantize_int8_static": lambda x: qops.quantize_int8_static(x, torch.tensor(0.1)),
        "rms_norm": lambda x: qops.rms_norm(x, WEIGHT, 1e-5),
        "add_rms_norm": lambda x: qops.add_rms_norm(X, x, WEIGHT, 1e-5),
        "rms_norm_int8": lambda x: qops.rms_norm_int8(x, WEIGHT, 1e-5),
        "add_rms_norm_int8": lambda x: qops.add_rms_norm_int8(X, x, WEIGHT, 1e-5),
        "rotary": lambda x: qops.rotary(x.view(2, 1, 1, 16), heads, table, table),
        "rotary_": lambda x: qops.rotary_(heads.clone(), x.view(2, 1, 1, 16), table, table),
        "qk_norm_rotary": lambda x: qops.qk_norm_rotary(heads, heads, WEIGHT, x[0], table, table, 1e-5),
        "qk_norm_rotary_": lambda x: qops.qk_norm_rotary_(
            heads.clone(), heads.clone(), x[1], WEIGHT, table, table, 0.0
        ),
        "silu_mul": qops.silu_mul,
        "silu_mul_int8": qops.silu_mul_int8,
    }


FUNCTIONS = functions()


def test_every_function_that_takes_floats_is_here():
    # int4_dequantize takes a weight alone.
    public = {name.partition(".")[0] for name in OVERLOADS} & set(qops.__all__)
    assert public - {"int4_dequantize"} == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("grad_mode", [True, False])
def test_functions_refuse_tangents_with_and_without_grad_mode(name, grad_mode):
    """torch.no_grad() does not stop them."""
    text = rf"qops\.{name}: \w+ must not have a tangent, as qops has no forward-mode derivatives, got one"
    with torch.set_grad_enabled(grad_mode):
        with pytest.raises(RuntimeError, match=text):
            torch.func.jvp(FUNCTIONS[name], (X,), (X,))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=text):
            FUNCTIONS[name](dual(X))


def test_a_level_without_tangents_changes_nothing():
    want = qops.rms_norm(X, WEIGHT, 1e-5)
    with forward_ad.dual_level():
        assert_bitwise(qops.rms_norm(X, WEIGHT, 1e-5), want)
        assert_bitwise(torch.ops.qops.rms_norm(X, WEIGHT, 1e-5), want)
    tangent = torch.func.jvp(lambda x: x * qops.rms_norm(X, WEIGHT, 1e-5), (X,), (X,))[1]
    assert_bitwise(tangent, X * want)


def test_functions_still_compile_in_one_graph():
    compiled = torch.compile(lambda x: qops.rms_norm(x, WEIGHT, 1e-5), backend="aot_eager", fullgraph=True)
    assert_bitwise(compiled(X), qops.rms_norm(X, WEIGHT, 1e-5))
