from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qops
from qops.nn import (
    MLP,
    Int4Int8Linear,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    Int8Rows,
    Int8WeightOnlyLinear,
    MergedLinear,
    MergingModule,
    RMSNorm,
    dense_linear,
)
from qops.testing import (
    FLOAT_DTYPES,
    assert_bitwise,
    assert_within,
    generator,
    random_activations,
    rounding_bound,
    silu_mul_bound,
    weight_only_bound,
)
from qops.weights import Int4Weight, Int8Weight
from tests.support.ops.random_weights import some_weights

K = 64


def dense(n: int, seed: int, k: int = K) -> torch.Tensor:
    return random_activations(n, k, dtype=torch.float32, seed=seed, outliers=False) / k**0.5


def int4_linear(n: int, seed: int, *, group_size: int = 32, symmetric: bool = False, bias: bool = False) -> Int4Linear:
    weight = Int4Weight.quantize(dense(n, seed), group_size, symmetric, torch.float16)
    return Int4Linear(weight, dense(1, seed + 1, n)[0] if bias else None)


def int8_linear(n: int, seed: int, *, bias: bool = False) -> Int8WeightOnlyLinear:
    weight = Int8Weight.quantize(dense(n, seed), 32, torch.float16)
    return Int8WeightOnlyLinear(weight, dense(1, seed + 1, n)[0] if bias else None)


def act_order_linear(n: int, seed: int, perm: torch.Tensor) -> Int4Linear:
    parts = Int4Weight.quantize(dense(n, seed), 32, scale_dtype=torch.float16).canonical()
    return Int4Linear(Int4Weight.from_canonical(**parts, kind="symmetric", perm=perm))


def int8_act_order_linear(n: int, seed: int, perm: torch.Tensor, *, offset: bool = True) -> Int8WeightOnlyLinear:
    parts = Int8Weight.quantize(dense(n, seed), 32, torch.float16).canonical()
    more = {"kind": "offset", "zeros": torch.randn(parts["scales"].shape, generator=generator(seed))} if offset else {}
    return Int8WeightOnlyLinear(Int8Weight.from_canonical(**parts, **more, perm=perm))


def w8a8_linear(n: int, seed: int, k: int = K) -> Int8Linear:
    return Int8Linear(Int8Weight.quantize(dense(n, seed, k)), dense(1, seed + 1, n)[0])


class Parent(MergingModule):
    """What MergedLinear needs around it."""

    def __init__(self, **parts: nn.Module):
        super().__init__()
        self.all_proj = MergedLinear(parts)
        self.other = nn.Linear(3, 2)


def exact(linear: Int4Linear | Int8WeightOnlyLinear, x: torch.Tensor) -> torch.Tensor:
    """x @ w.T + bias of the same dequantised weight, in float64."""
    y = x.double() @ linear.weight.dequantize(torch.float64).T
    return y if linear.bias is None else y + linear.bias.double()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", [int4_linear, int8_linear])
def test_linears_multiply_by_the_dequantised_weight(make, bias, dtype):
    linear = make(24, 1, bias=bias)
    x = random_activations(2, 3, K, dtype=dtype, seed=2)
    op = qops.int4_gemm if make is int4_linear else qops.int8_weight_only_gemm
    assert_bitwise(linear(x), op(x, linear.weight, linear.bias))
    bound = weight_only_bound(x, linear.weight, linear.bias)
    assert_within(linear(x), exact(linear, x), bound)


@pytest.mark.parametrize("make", [int4_linear, int8_linear])
def test_float32_output_is_not_rounded_on_the_way(make):
    linear = make(24, 1, bias=True)
    x = random_activations(3, K, dtype=torch.bfloat16, seed=2)
    wide = type(linear)(linear.weight, linear.bias, float32_output=True)
    assert_bitwise(wide(x), linear(x.float()))
    assert not torch.equal(wide(x), wide(x).bfloat16().float())


def test_float32_output_of_8_bit_activations():
    x, linear = random_activations(3, K, dtype=torch.bfloat16, seed=2), w8a8_linear(24, 1)
    q, scale = qops.quantize_int8(x)
    want = qops.int8_gemm(q, scale, linear.weight, linear.bias, out_dtype=torch.float32)
    wide = Int8Linear(linear.weight, linear.bias, float32_output=True)
    assert_bitwise(wide(x), want)
    assert_bitwise(wide(Int8Rows(q, scale, x.dtype, "127")), want)
    assert_bitwise(linear(x), want.bfloat16())
    assert not torch.equal(want, want.bfloat16().float())


def test_int4_weights_of_8_bit_activations():
    linear = int4_linear(24, 1, bias=True)
    ours = Int4Int8Linear(linear.weight, linear.bias)
    x = random_activations(3, 2, K, dtype=torch.bfloat16, seed=2)
    residual = random_activations(3, 2, 24, dtype=torch.bfloat16, seed=3)
    rows = Int8Rows(*qops.quantize_int8(x), x.dtype, "127")
    want = qops.int4_gemm(x, linear.weight, linear.bias, activation="int8")
    assert_bitwise(ours(x), want)
    assert_bitwise(ours(rows), want)
    assert_bitwise(ours(x.transpose(0, 1)), want.transpose(0, 1).contiguous())
    assert_bitwise(ours(rows, residual), want + residual)
    wide = Int4Int8Linear(linear.weight, linear.bias, float32_output=True)
    assert_bitwise(
        wide(x), qops.int4_int8_gemm(rows.q, rows.scale, linear.weight, linear.bias, out_dtype=torch.float32)
    )
    with pytest.raises(
        ValueError, match=r'Int4Int8Linear: x must be dense or Int8Rows of rule "127", got .* "torchao"'
    ):
        ours(rows._replace(rule="torchao"))
    assert MergedLinear({"a": ours, "b": linear}).merged is None
    assert type(MergedLinear({"a": ours, "b": Int4Int8Linear(linear.weight, linear.bias)}).merged) is Int4Int8Linear


@pytest.mark.parametrize("make", [int4_linear, int8_linear, w8a8_linear])
def test_merged_linears_keep_float32_output(make):
    x = random_activations(3, K, dtype=torch.bfloat16, seed=2)
    narrow = [make(24, 1), make(8, 2)]
    wide = [type(part)(part.weight, part.bias, float32_output=True) for part in narrow]
    merged = MergedLinear({"a": wide[0], "b": wide[1]})
    assert merged.merged is not None
    assert_bitwise(merged(x), torch.cat([part(x) for part in wide], -1))
    assert all(part.float32_output for part in merged.split().values())
    assert MergedLinear({"a": narrow[0], "b": wide[1]}).merged is None


def test_a_bias_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"Int4Linear: bias must have shape \[N\] = \[24\], got \[23\]"):
        Int4Linear(int4_linear(24, 1).weight, torch.zeros(23))


def test_weights_that_an_operator_does_not_take_are_refused():
    int4, int8 = int4_linear(24, 1).weight, Int8Weight.quantize(dense(32, 1))
    for linear, weight, wanted in (
        (Int4Linear, int8, "an Int4Weight, got Int8Weight"),
        (Int8Linear, int4, "an Int8Weight, got Int4Weight"),
        (Int8WeightOnlyLinear, int4, "an Int8Weight, got Int4Weight"),
        (Int8Embedding, int4, "an Int8Weight, got Int4Weight"),
        (Int4Linear, int4.dequantize(), "an Int4Weight, got Tensor"),
    ):
        with pytest.raises(TypeError, match=rf"^{linear.__name__}: weight must be {wanted}$"):
            linear(weight)
    with pytest.raises(
        ValueError, match=r"^Int8Linear: weight must have one scale per row, group_size = K = 64, got 32"
    ):
        Int8Linear(int8_linear(24, 1).weight)
    with pytest.raises(ValueError, match=r"^Int8WeightOnlyLinear: weight must have .* = False, got True"):
        Int8WeightOnlyLinear(int8.mix_gate_up())


def test_linears_that_do_not_fit_together_are_refused():
    def linear(k: int, n: int) -> nn.Linear:
        return nn.Linear(k, n, bias=False)

    with pytest.raises(ValueError, match=r"MergedLinear: parts must have one K, got \{'a': 64, 'b': 32\}"):
        MergedLinear({"a": linear(64, 24), "b": linear(32, 24)})
    with pytest.raises(ValueError, match=r"MergedLinear: parts must have one K, got \{\}"):
        MergedLinear({})
    wrong = r"MLP: gate and up must have the I = 40 outputs of down, got "
    with pytest.raises(ValueError, match=wrong + r"\{'gate_proj': 32, 'up_proj': 48\}"):
        MLP(linear(64, 32), linear(64, 48), linear(40, 16))
    with pytest.raises(ValueError, match=wrong + r"\{'gate_up_proj': 40\}"):
        MLP.of_merged(linear(64, 40), linear(40, 16))


@pytest.mark.parametrize("group_size", (-1, 16))
def test_weight_only_from_linear(group_size):
    source = nn.Linear(K, 24).bfloat16()
    linear = Int8WeightOnlyLinear.from_linear(source, group_size, float32_output=True)
    assert_bitwise(linear.weight.dequantize(), Int8Weight.quantize(source.weight, group_size).dequantize())
    assert linear.bias is not None and torch.equal(linear.bias, source.bias)
    assert linear.weight.scale_dtype == torch.float32 and linear.float32_output
    assert_bitwise(Int8Linear.from_linear(source).weight.dequantize(), Int8Weight.quantize(source.weight).dequantize())


def test_from_linear_quantises_the_weight():
    source = nn.Linear(K, 24)
    linear = Int4Linear.from_linear(source, group_size=16, symmetric=False)
    assert_bitwise(linear.weight.dequantize(), Int4Weight.quantize(source.weight, 16, False).dequantize())
    assert linear.bias is not None and torch.equal(linear.bias, source.bias)
    assert (linear.in_features, linear.out_features, linear.weight.group_size) == (K, 24, 16)


def test_modules_have_no_trainable_parameters():
    modules = [int4_linear(24, 1, bias=True), RMSNorm(torch.ones(8), 1e-5)]
    modules.append(Parent(a=nn.Linear(K, 8), b=nn.Linear(K, 8)).all_proj)
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_embedding_rows_are_rounded_once(dtype):
    embedding = Int8Embedding(Int8Weight.quantize(dense(40, 1), 32, torch.float16), dtype)
    ids = torch.tensor([[0, 39], [7, 7]])
    assert_bitwise(embedding(ids), embedding.weight.dequantize(dtype)[ids])
    with pytest.raises(IndexError):
        embedding(torch.tensor([40]))


def test_embedding_follows_casts_and_its_weight_does_not():
    embedding = Int8Embedding(Int8Weight.quantize(dense(40, 1), 32, torch.float16), torch.float32)
    exact = embedding.weight.dequantize()
    assert embedding.bfloat16()(torch.tensor([3])).dtype == torch.bfloat16
    assert embedding.to(torch.float32)(torch.tensor([3])).dtype == torch.float32
    assert embedding.weight.scales.dtype == torch.float16
    assert_bitwise(embedding(torch.arange(40)), exact)
    assert not any("dtype_marker" in key for key in embedding.state_dict())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_rms_norm_module_is_the_operator(dtype):
    norm = RMSNorm(dense(1, 1)[0], 1e-5)
    x, residual = (random_activations(3, K, dtype=dtype, seed=seed) for seed in (2, 3))
    assert_bitwise(norm(x), qops.rms_norm(x, norm.weight, 1e-5))
    y, z = norm.add(x, residual)
    assert_bitwise(z, x + residual)
    assert_bitwise(y, norm(x + residual))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_mlp(dtype):
    gate, up = int4_linear(96, 1), int4_linear(96, 2)
    down = Int4Linear(Int4Weight.quantize(dense(K, 3, 96), 32))
    x = random_activations(2, 3, K, dtype=dtype, seed=4, outliers=False)
    g, u = exact(gate, x), exact(up, x)
    activated = nn.functional.silu(g) * u
    errors = (weight_only_bound(x, part.weight) + rounding_bound(y, dtype) for part, y in ((gate, g), (up, u)))
    error = silu_mul_bound(g, u, dtype, gate_error=next(errors), up_error=next(errors))
    error = error + rounding_bound(activated, dtype)
    bound = error @ down.weight.dequantize(torch.float64).abs().T
    bound = bound + weight_only_bound((activated.abs() + error).to(dtype), down.weight)
    assert_within(MLP(gate, up, down)(x), exact(down, activated), bound)


PERM = torch.randperm(K, generator=torch.Generator().manual_seed(0)).int()

MIXTURES = {
    "int4": (lambda: [int4_linear(n, n) for n in (24, 8, 16)], True),
    "int4 with bias": (lambda: [int4_linear(n, n, bias=True) for n in (24, 8)], True),
    "int8": (lambda: [int8_linear(n, n) for n in (24, 8)], True),
    "dense": (lambda: [nn.Linear(K, n) for n in (24, 7)], True),
    "one act-order": (lambda: [act_order_linear(n, n, PERM) for n in (24, 8)], True),
    # As many rows in all as columns: the permutation must not be taken for rows.
    "act-order, N = K": (lambda: [act_order_linear(32, n, PERM) for n in (1, 2)], True),
    "two act-orders": (lambda: [act_order_linear(24, 1, PERM), act_order_linear(8, 2, PERM.flip(0))], False),
    "act-order and not": (lambda: [act_order_linear(24, 1, PERM), int4_linear(8, 2, symmetric=True)], False),
    "int8 with offsets, one act-order": (lambda: [int8_act_order_linear(n, n, PERM) for n in (24, 8)], True),
    "int8 with two act-orders": (lambda: [int8_act_order_linear(24, 1, p) for p in (PERM, PERM.flip(0))], False),
    "int8 with offsets and without": (
        lambda: [int8_act_order_linear(24, 1, PERM, offset=offset) for offset in (True, False)],
        False,
    ),
    "kinds": (lambda: [int4_linear(24, 1), int4_linear(8, 2, symmetric=True)], False),
    "group sizes": (lambda: [int4_linear(24, 1), int4_linear(8, 2, group_size=16)], False),
    "bias and none": (lambda: [int4_linear(24, 1), int4_linear(8, 2, bias=True)], False),
    "int4 and int8": (lambda: [int4_linear(24, 1), int8_linear(8, 2)], False),
    "int4 and dense": (lambda: [int4_linear(24, 1), nn.Linear(K, 8)], False),
}


PARENTS = {
    "int4": lambda n, seed: int4_linear(n, seed, bias=True),
    "int8": lambda n, seed: int8_linear(n, seed, bias=True),
    "dense": lambda n, seed: nn.Linear(K, n).requires_grad_(False),
    "act-order": lambda n, seed: act_order_linear(n, seed, torch.randperm(K, generator=generator(5))),
}


@pytest.mark.parametrize("act", [None, torch.tanh])
@pytest.mark.parametrize("up", PARENTS)
@pytest.mark.parametrize("gate", PARENTS)
def test_mlp_takes_downs_act_order_from_the_rows_of_gate_and_up(gate, up, act):
    gate, up = PARENTS[gate](96, 1), PARENTS[up](96, 2)
    weight = Int4Weight.quantize(dense(24, 3, 96), 32, False)
    perm = torch.randperm(96, generator=generator(0)).int()
    down = Int4Linear(Int4Weight.from_canonical(**weight.canonical(), kind="zero_point", perm=perm), dense(1, 4, 24)[0])
    x = random_activations(5, K, dtype=torch.float32, seed=6)
    mlp = MLP(gate, up, down, act)
    assert mlp.reordered and "act-order of down" in repr(mlp) and not mlp.down_proj.weight.act_order
    assert "gathers x" in repr(down) and "gathers x" not in repr(mlp.down_proj)
    gathered = down(act(gate(x)) * up(x) if act else qops.silu_mul(gate(x), up(x)))
    if isinstance(gate, nn.Linear) or isinstance(up, nn.Linear):  # PyTorch's sums may depend on the place of a row
        torch.testing.assert_close(mlp(x), gathered)
    else:
        assert_bitwise(mlp(x), gathered)
    assert not MLP(gate, up, mlp.down_proj, act).reordered
    assert_parts(mlp, {"gate_proj": gate, "up_proj": up, "down_proj": down})


def assert_parts(mlp: MLP, given: dict[str, nn.Module]) -> None:
    """`split` gives back what the MLP was made of."""
    parts = mlp.split()
    assert parts.keys() == given.keys()
    for name, linear in given.items():
        found, wanted = parts[name].state_dict(), linear.state_dict()
        assert type(parts[name]) is type(linear) and found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


GATES = {
    "int4": lambda seed: int4_linear(96, seed, bias=True),
    "w8a8": lambda seed: w8a8_linear(96, seed),
    "int8": lambda seed: int8_linear(96, seed, bias=True),
    "dense": lambda seed: dense_linear(dense(96, seed)),
}
DOWNS = {
    "int4": lambda: Int4Linear(Int4Weight.quantize(dense(24, 3, 96), 32)),
    "w8a8": lambda: w8a8_linear(24, 3, 96),
    "int8": lambda: Int8WeightOnlyLinear(Int8Weight.quantize(dense(24, 3, 96), 32)),
    "dense": lambda: dense_linear(dense(24, 3, 96)),
}


@pytest.mark.parametrize("down", DOWNS)
@pytest.mark.parametrize("gate", GATES)
def test_an_mlp_has_the_bits_of_its_parts_one_by_one(gate, down):
    make, gate_proj, up_proj, down_proj = GATES[gate], GATES[gate](1), GATES[gate](2), DOWNS[down]()
    x, residual = random_activations(5, K, dtype=torch.float32, seed=6), dense(5, 7, 24)
    want = down_proj(qops.silu_mul(gate_proj(x), up_proj(x)))
    parts = {"gate_proj": gate_proj, "up_proj": up_proj, "down_proj": down_proj}
    state = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}
    mlp = MLP(gate_proj, up_proj, down_proj)
    mixed = [module.mixed_gate_up for module in mlp.modules() if isinstance(module, (Int4Weight, Int8Weight))]
    assert any(mixed) == (gate in ("int4", "w8a8")) == ("SiLU-mul in the product" in repr(mlp))

    def same(a: torch.Tensor, b: torch.Tensor) -> None:  # PyTorch's sums may depend on what else it sums
        torch.testing.assert_close(a, b) if gate == "dense" else assert_bitwise(a, b)

    same(mlp(x), want)
    added = mlp(x, residual)
    assert isinstance(added, tuple) == (down in ("int8", "dense"))
    same(added[0] + added[1] if isinstance(added, tuple) else added, want + residual)

    # The state_dict is that of the parts, and loads into other weights.
    assert {key: tensor.tolist() for key, tensor in mlp.state_dict().items()} == {
        key: tensor.tolist() for key, tensor in state.items()
    }
    fresh = MLP(make(8), make(9), DOWNS[down]())
    fresh.load_state_dict(state)
    for twin in (fresh, copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert_bitwise(twin(x), mlp(x))


class Traffic(TorchDispatchMode):
    """Bytes of the activations that operators read and write, told from weights by their number of rows."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.bytes = rows, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in (*args, *(results if isinstance(results, tuple) else (results,))):
                if isinstance(tensor, torch.Tensor) and tensor.shape[:1] == (self.rows,):
                    self.bytes += tensor.nbytes
        return results


def test_an_mlp_neither_stores_gate_and_up_nor_reads_a_residual_twice():
    x, residual = (random_activations(5, n, dtype=torch.bfloat16, seed=n) for n in (K, 24))
    q, scale = qops.quantize_int8(x)
    for gate, down, given, read, made in (
        ("int4", "int4", x, 2 * K, 2 * 96 + 2 * 96),
        # SiLU-mul is stored, quantised and read in 8 bits with a scale.
        ("w8a8", "w8a8", Int8Rows(q, scale, x.dtype, "127"), K + 4, 2 * 96 + 2 * 96 + 2 * (96 + 4)),
    ):
        mlp = MLP(GATES[gate](1), GATES[gate](2), DOWNS[down]())
        with Traffic(5) as traffic:
            mlp(given, residual)
        assert traffic.bytes == 5 * (read + made + 2 * 24 + 2 * 24), gate


def test_rows_of_a_weight_in_another_order():
    for _, weight in some_weights():
        order = torch.randperm(weight.out_features, generator=generator(1))
        moved = weight.with_rows(order)
        assert moved.is_packed
        assert_bitwise(moved.dequantize(), weight.dequantize()[order])
        assert not copy.deepcopy(weight).unpack().with_rows(order).is_packed


@pytest.mark.parametrize("mixture", MIXTURES)
def test_merged_linears(mixture):
    make, merges = MIXTURES[mixture]
    parts = make()
    x = random_activations(3, K, dtype=torch.float32, seed=9)
    separate = torch.cat([part(x) for part in parts], -1)
    state = {f"p{i}.{key}": t for i, part in enumerate(parts) for key, t in part.state_dict().items()}
    parent = Parent(**{f"p{i}": part for i, part in enumerate(parts)})

    assert (parent.all_proj.merged is not None) == merges
    torch.testing.assert_close(parent.all_proj(x), separate, atol=1e-5, rtol=1e-5)

    # The state_dict is that of the separate linears, to the bit.
    saved = {key: t for key, t in parent.state_dict().items() if not key.startswith("other.")}
    assert saved.keys() == state.keys()
    for key in state:
        assert_bitwise(saved[key], state[key], key)

    # And it loads, nested in another module, where dense weights were zero.
    fresh = nn.Sequential(Parent(**{f"p{i}": part for i, part in enumerate(make())}))
    for parameter in fresh.parameters():
        parameter.zero_()
    result = fresh.load_state_dict({f"0.{key}": t for key, t in parent.state_dict().items()})
    assert not result.missing_keys and not result.unexpected_keys
    assert_bitwise(fresh[0].all_proj(x), parent.all_proj(x))

    for name, part in parent.all_proj.split().items():
        if isinstance(part.weight, (Int4Weight, Int8Weight)):
            part.weight.pack()
        torch.testing.assert_close(part(x), parts[int(name[1:])](x))


def merged_state() -> tuple[Parent, dict[str, torch.Tensor]]:
    parent = Parent(a=int4_linear(24, 1), b=int4_linear(8, 2))
    return parent, dict(parent.state_dict())


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (lambda s: s.pop("b.weight.scales"), r"\{a,b\}.weight.scales: present in 1 of 2 parts"),
        (lambda s: s.update({"b.weight.scales": s["b.weight.scales"].float()}), r"\{a,b\}.weight.scales: .*one dtype"),
        (lambda s: s.update({"a.weight.scales": s["b.weight.scales"]}), r"must have \[24, 8\] rows of one dtype"),
        (lambda s: s.update({"b.weight.format_version": torch.tensor(7)}), "format_version: must be the same"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith(("a.", "b."))], "Missing key"),
    ],
)
def test_merged_linears_refuse_states_that_do_not_fit(bend, message):
    parent, state = merged_state()
    bend(state)
    with pytest.raises(RuntimeError, match=message):
        parent.load_state_dict(state)


def test_merged_linears_copy_and_pickle():
    parent, _ = merged_state()
    x = random_activations(3, K, dtype=torch.float32, seed=9)
    for twin in (copy.deepcopy(parent), pickle.loads(pickle.dumps(parent))):
        assert twin.state_dict().keys() == parent.state_dict().keys()
        assert_bitwise(twin.all_proj(x), parent.all_proj(x))


def test_casting_a_model_leaves_quantised_weights_alone():
    parent, state = merged_state()
    parent.bfloat16()
    for key, tensor in parent.state_dict().items():
        if not key.startswith("other."):
            assert_bitwise(tensor, state[key], key)
    assert parent.other.weight.dtype == torch.bfloat16


def test_modules_trace():
    mlp = MLP(int4_linear(96, 1), int4_linear(96, 2), Int4Linear(Int4Weight.quantize(dense(K, 3, 96), 32)))
    model = nn.Sequential(RMSNorm(torch.ones(K), 1e-5), mlp)
    x = random_activations(3, K, dtype=torch.float32, seed=4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
