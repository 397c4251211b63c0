"""W8A8 linears, each of which quantises its input as the producer of its checkpoint does."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch

import qops
from qops.nn import MLP, Int8Linear, Int8Rows, Int8StaticLinear, Int8WeightOnlyLinear, MergedLinear, RMSNorm
from qops.nn.linears import LINEARS
from qops.nn.mlp import MergingModule, rows_rule
from qops.testing import FLOAT_DTYPES, assert_bitwise, random_activations
from tests.support.ops import quantize_oracles as oracles

N, K = 48, 64
SCALE, ZERO_POINT = oracles.STATIC_SCALE, torch.tensor([-9], dtype=torch.int8)
CLASSES = {scheme: linear for scheme, linear in LINEARS.items() if issubclass(linear, Int8Linear)}
STATIC = {scheme: linear for scheme, linear in CLASSES.items() if linear.static_input}


def dense(n: int, seed: int, k: int = K) -> torch.Tensor:
    return random_activations(n, k, dtype=torch.float32, seed=seed, outliers=False) / k**0.5


def factors(k: int = K) -> torch.Tensor:
    """Of columns of the input."""
    return (random_activations(1, k, dtype=torch.float32, seed=11, outliers=False)[0].abs() + 0.25).half()


def linear_of(scheme: str, n: int = N, seed: int = 1, k: int = K, **changes: Any) -> Any:
    static = static_input(scheme, k) | changes
    return LINEARS[scheme](qops.Int8Weight.quantize(dense(n, seed, k)), dense(1, seed + 1, n)[0], **static)


def static_input(scheme: str, k: int = K) -> dict[str, torch.Tensor]:
    every = {"input_scale": SCALE, "input_zero_point": ZERO_POINT, "pre_quant_scale": factors(k)}
    return {key: every[key] for key in CLASSES[scheme].static_input}


def quantised(scheme: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """By the operators: the classes a second time."""
    scale, zero_point = SCALE[0], ZERO_POINT[0].int()
    return {
        "int8": lambda: (*qops.quantize_int8(x), None),
        "int8_asymmetric": lambda: qops.quantize_int8_asym(x),
        "int8_asymmetric_compressed_tensors": lambda: qops.quantize_int8_asym(x, "compressed-tensors"),
        "int8_compressed_tensors": lambda: (*qops.quantize_int8(x, "compressed-tensors"), None),
        "int8_static": lambda: (qops.quantize_int8_static(x, scale, zero_point), scale, zero_point),
        "int8_static_smoothed": lambda: quantised("int8_static", (x * factors()).to(x.dtype)),
        "int8_static_compressed_tensors": lambda: (
            qops.quantize_int8_static(x, scale, zero_point, "compressed-tensors"),
            scale,
            zero_point,
        ),
        "int8_torchao": lambda: (*qops.quantize_int8(x, "torchao"), None),
    }[scheme]()


class Parent(MergingModule):
    """What MergedLinear needs around it."""

    def __init__(self, **parts: Any):
        super().__init__()
        self.both = MergedLinear(parts)


# Forward -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("scheme", CLASSES)
def test_each_quantises_by_its_rule(scheme, dtype):
    linear = linear_of(scheme)
    x = torch.cat((oracles.near_ties(63, K, dtype, seed=3), oracles.static_inputs(dtype)[None, :K])).view(2, 32, K)
    residual = random_activations(64, N, dtype=dtype, seed=4).view(2, 32, N)
    q, scale, zero_point = quantised(scheme, x)

    def product(**more: Any) -> torch.Tensor:
        return qops.int8_gemm(q, scale, linear.weight, linear.bias, zero_point=zero_point, **more)

    assert_bitwise(linear(x), product(out_dtype=dtype))
    assert_bitwise(linear(x.mT.contiguous().mT, residual), product(out_dtype=dtype, residual=residual))
    wide = linear_of(scheme, float32_output=True)
    assert_bitwise(wide(x), product(out_dtype=torch.float32))
    for other in CLASSES:
        if other != scheme:
            assert not torch.equal(linear_of(other)(x), linear(x)), f"the data would not show {other}"


INPUTS = {
    "int8_compressed_tensors": {"strategy": "token", "dynamic": True, "symmetric": True},
    "int8_asymmetric_compressed_tensors": {"strategy": "token", "dynamic": True, "symmetric": False},
    "int8_static_compressed_tensors": {"strategy": "tensor", "dynamic": False, "symmetric": False},
}


@pytest.mark.parametrize("scheme", INPUTS)
def test_a_layer_computes_what_compressed_tensors_computes(scheme):
    """Its own runtime, which multiplies dequantised operands: in float32 the two differ by the order of sums alone."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus
    from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization

    ours = linear_of(scheme)
    theirs = torch.nn.Linear(K, N)
    weights = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
    inputs = QuantizationArgs(num_bits=8, **INPUTS[scheme])
    settings = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    initialize_module_for_quantization(theirs, settings)
    theirs.quantization_status = QuantizationStatus.COMPRESSED  # the weight is what its codes stand for
    state = {"weight": ours.weight.dequantize(), "bias": ours.bias}
    state |= {"input_scale": SCALE, "input_zero_point": ZERO_POINT} if ours.activations() else {}
    theirs.load_state_dict(state, strict=False)
    x = oracles.near_ties(64, K, torch.float32, seed=3).view(2, 32, K)
    with torch.no_grad():
        want = theirs(x)
    assert (ours(x) - want).abs().max() < 1e-5 * want.abs().max()
    others = [linear_of(other)(x) for other in INPUTS if other != scheme]
    assert all((other - want).abs().max() > 1e-3 * want.abs().max() for other in others)


@pytest.mark.parametrize("scheme", CLASSES)
def test_rows_of_another_rule_are_refused(scheme):
    linear, x = linear_of(scheme), random_activations(3, K, dtype=torch.bfloat16, seed=3)
    for rule in ("127", "compressed-tensors", "torchao"):
        rows = Int8Rows(*qops.quantize_int8(x, rule), x.dtype, rule)
        if rule == linear.rows_rule:
            assert_bitwise(linear(rows), linear(x))
            continue
        wanted = f'dense or Int8Rows of rule "{linear.rows_rule}"' if linear.rows_rule else "dense"
        with pytest.raises(
            ValueError, match=rf'^{type(linear).__name__}: x must be {wanted}, got Int8Rows of rule "{rule}"$'
        ):
            linear(rows)


@pytest.mark.parametrize("scheme", CLASSES)
def test_weights_that_the_product_does_not_take_are_refused_by_the_name_of_the_class(scheme):
    codes, name = torch.zeros(N, K, dtype=torch.int8), CLASSES[scheme].__name__
    for message, weight in {
        "weight must have one scale per row, group_size = K = 64, got 32": {"scales": torch.ones(N, 2)},
        "weight must be symmetric, got kind 'offset'": {"kind": "offset", "zeros": torch.ones(N, 1)},
        "weight must have act_order = False, got True": {"perm": torch.arange(K).flip(0).int()},
    }.items():
        given: Any = {"scales": torch.ones(N, 1), **weight}
        with pytest.raises(ValueError, match=f"^{name}: {message}$"):
            CLASSES[scheme](qops.Int8Weight.from_canonical(codes, **given), **static_input(scheme))


def test_rows_are_handed_over_where_they_can_be():
    rules = {scheme: linear.rows_rule for scheme, linear in CLASSES.items() if linear.rows_rule}
    assert rules == {"int8": "127", "int8_compressed_tensors": "compressed-tensors", "int8_torchao": "torchao"}
    assert all(linear.quantizes_input for linear in CLASSES.values())
    assert [scheme for scheme in LINEARS if LINEARS[scheme].quantizes_input and scheme not in CLASSES] == ["w4a8"]


@pytest.mark.parametrize("scheme", CLASSES)
def test_an_mlp_quantises_by_the_rule_of_what_reads(scheme):
    x = random_activations(5, K, dtype=torch.bfloat16, seed=3)
    gate, up, down = linear_of(scheme, 96, 1), linear_of(scheme, 96, 3), linear_of(scheme, N, 5, 96)
    want = down(qops.silu_mul(gate(x), up(x)))
    mixed = MLP(*(copy.deepcopy(linear) for linear in (gate, up, down)))
    assert mixed.activates_in_gemm and rows_rule(mixed.gate_up_proj) == gate.rows_rule
    assert_bitwise(mixed(x), want)
    # Products that apply no SiLU leave it, and the quantisation, to one pass.
    weight_only = [Int8WeightOnlyLinear(linear.weight, linear.bias) for linear in (gate, up)]
    want = down(qops.silu_mul(*(linear(x) for linear in weight_only)))
    assert_bitwise(MLP(*weight_only, down)(x), want)


# Several over one input ----------------------------------------------------------------------------------------------


def test_only_what_quantises_alike_is_merged():
    x = random_activations(5, K, dtype=torch.bfloat16, seed=3)
    for one, other in itertools.combinations_with_replacement(CLASSES, 2):
        parts = {"a": linear_of(one, seed=1), "b": linear_of(other, seed=3)}
        merged = MergedLinear(parts)
        assert (merged.merged is not None) == (one == other)
        assert merged.rows_rule == (CLASSES[one].rows_rule if one == other else None)
        assert_bitwise(merged(x), torch.cat([part(x) for part in parts.values()], -1))


@pytest.mark.parametrize(
    "changes",
    [{"input_scale": SCALE * 2}, {"input_zero_point": ZERO_POINT + 1}, {"input_zero_point": None}],
    ids=["scale", "zero point", "none"],
)
@pytest.mark.parametrize("scheme", STATIC)
def test_static_linears_that_differ_stay_apart(scheme, changes):
    x = random_activations(5, K, dtype=torch.bfloat16, seed=3)
    parts = {"a": linear_of(scheme, seed=1), "b": linear_of(scheme, seed=3, **changes)}
    merged = MergedLinear(parts)
    assert merged.merged is None
    assert_bitwise(merged(x), torch.cat([part(x) for part in parts.values()], -1))


@pytest.mark.parametrize("scheme", STATIC)
def test_merged_static_linears_have_the_state_of_their_parts(scheme):
    parts = {"a": linear_of(scheme, seed=1), "b": linear_of(scheme, seed=3)}
    parent = Parent(**parts)
    state = parent.state_dict()
    for name, part in parts.items():
        for key, tensor in part.state_dict().items():
            assert_bitwise(state[f"{name}.{key}"], tensor, key)
        for key, tensor in parent.both.split()[name].activations().items():
            assert_bitwise(tensor, part.activations()[key], key)
    other = Parent(**{name: linear_of(scheme, seed=7, input_scale=SCALE * 3) for name in parts})
    other.load_state_dict(state)
    x = random_activations(5, K, dtype=torch.bfloat16, seed=3)
    assert_bitwise(other.both(x), parent.both(x))
    state["b.input_scale"] = state["b.input_scale"] * 2
    with pytest.raises(RuntimeError, match=r"\{a,b\}\.input_scale: must be the same in every part"):
        other.load_state_dict(state)


# What static linears hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", STATIC)
def test_no_cast_changes_how_the_input_is_quantised(scheme):
    linear = linear_of(scheme)
    want = {"input_scale": SCALE[0], "input_zero_point": ZERO_POINT[0].int()}
    if "pre_quant_scale" in STATIC[scheme].static_input:
        want["pre_quant_scale"] = factors()
    casts = (torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double, lambda m: m.type(torch.float16))
    copies = (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.around(m.weight, m.bias))
    for change in (*casts, *copies):
        changed = change(linear_of(scheme))
        assert changed.activations().keys() == want.keys()
        for key, tensor in want.items():
            assert_bitwise(changed.activations()[key], tensor, key)
            assert_bitwise(changed.state_dict()[key], tensor, key)
    assert linear.half().bias.dtype == torch.float16
    meta = linear_of(scheme).to("meta")
    assert meta.input_scale.is_meta and meta.input_scale.dtype == torch.float32


@pytest.mark.parametrize("scheme", STATIC)
def test_the_stored_scale_has_any_float_dtype(scheme):
    for dtype in FLOAT_DTYPES:
        found = linear_of(scheme, input_scale=SCALE.to(dtype).view(1, 1)).input_scale
        assert_bitwise(found, SCALE.to(dtype).float().view(()))
    assert "input_zero_point" not in linear_of(scheme, input_zero_point=None).state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_scale": torch.tensor(0.0)}, "input_scale must be positive and finite, got 0.0"),
        ({"input_scale": torch.tensor(float("nan"))}, "input_scale must be positive and finite, got nan"),
        ({"input_scale": torch.tensor(float("inf"))}, "input_scale must be positive and finite, got inf"),
        ({"input_scale": torch.ones(2)}, r"input_scale must have 1 element, got shape \[2\]"),
        (
            {"input_scale": torch.ones(1, dtype=torch.int32)},
            "input_scale must have dtype float16, bfloat16 or float32, got int32",
        ),
        ({"input_zero_point": torch.tensor(128)}, r"input_zero_point must lie in -128 \.\. 127, got 128"),
        (
            {"input_zero_point": torch.zeros(3, dtype=torch.int8)},
            r"input_zero_point must have 1 element, got shape \[3\]",
        ),
        (
            {"input_zero_point": torch.zeros(1)},
            "input_zero_point must have dtype int32, int8 or int64, got float32",
        ),
    ],
)
@pytest.mark.parametrize("scheme", STATIC)
def test_what_does_not_fit_is_refused(scheme, changes, message):
    with pytest.raises(ValueError, match=rf"^{STATIC[scheme].__name__}: {message}$"):
        linear_of(scheme, **changes)
    with pytest.raises(TypeError, match="input_scale must be a tensor, got float"):
        linear_of(scheme, input_scale=0.5)


def test_the_norm_gives_rows_of_the_rule_it_was_told():
    x = random_activations(4, K, dtype=torch.bfloat16, seed=3)
    weight = dense(1, 1)[0].bfloat16()
    for rule in ("127", "compressed-tensors", "torchao"):
        norm = RMSNorm(weight, 1e-6, int8=rule)
        rows = norm(x)
        q, scale = qops.rms_norm_int8(x, weight, 1e-6, rule=rule)
        assert rows.rule == rule and rows.dtype == x.dtype
        assert_bitwise(rows.q, q)
        assert_bitwise(rows.scale, scale)
        added, total = norm.add(x, x)
        assert added.rule == rule
        assert_bitwise(added.q, qops.rms_norm_int8(total, weight, 1e-6, rule=rule)[0])


def test_a_dense_linear_quantised_here():
    source = torch.nn.Linear(K, N)
    found = Int8StaticLinear.from_linear(source, input_scale=SCALE)
    assert_bitwise(found.weight.dequantize(), qops.Int8Weight.quantize(source.weight).dequantize())
    assert_bitwise(found.input_scale, SCALE[0])
