"""Operators are for inference: what would lose a gradient or a tangent is an error, in each way to call an operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import qops
from qops.testing import assert_bitwise
from tests.support.properties.overloads import overloads, tensor_arguments, valid_calls
from tests.support.properties.property_calls import Call

OVERLOADS = overloads()
# check_layout gives and writes nothing, so nothing is lost in it.
del OVERLOADS["check_layout.default"]
# What the public functions take out of a weight.
WEIGHTS = ("packed", "scales", "zeros", "w_scale")
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


# int4_dequantize takes a weight alone.
FUNCTIONS = sorted({name.partition(".")[0] for name in OVERLOADS} & set(qops.__all__) - {"int4_dequantize"})


def typed_calls(op: str) -> Iterator[tuple[Call, str]]:
    """A call of the public function for each of its float arguments, with the argument."""
    seen: set[str] = set()
    for call in valid_calls(f"{op}.default", 40):
        for argument, tensor in call.tensors():
            if call.typed is None or argument in seen or argument.endswith(WEIGHTS) or not tensor.is_floating_point():
                continue
            seen.add(argument)
            yield call, argument


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("grad_mode", [True, False])
def test_functions_refuse_tangents_with_and_without_grad_mode(name, grad_mode):
    """torch.no_grad() does not stop them."""
    text = rf"qops\.{name}: \w+ must not have a tangent, as qops has no forward-mode derivatives, got one"
    calls = list(typed_calls(name))
    assert calls
    with torch.set_grad_enabled(grad_mode):
        for call, argument in calls:

            def function(t: Tensor, call: Call = call, argument: str = argument) -> object:
                assert call.typed is not None
                return call.typed({**call.arguments, argument: t})

            t = call.arguments[argument].clone()
            with pytest.raises(RuntimeError, match=text):
                torch.func.jvp(function, (t,), (torch.ones_like(t),))
            with forward_ad.dual_level(), pytest.raises(RuntimeError, match=text):
                function(dual(t))


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
