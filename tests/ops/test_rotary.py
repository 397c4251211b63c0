from __future__ import annotations

import itertools

import pytest
import torch

import qops
from qops.ops.rotary import rotary_ref
from qops.testing import (
    FLOAT_DTYPES,
    Guarded,
    assert_bitwise,
    assert_within,
    generator,
    random_activations,
    rotary_bound,
)

# (D, R): around the vector width (16 pairs or 8), partial rotation, odd D, nothing to rotate, more than one block of
# 128 pairs.
HEAD_DIMS = ((2, 2), (7, 6), (16, 16), (18, 18), (32, 30), (64, 64), (64, 32), (80, 80), (96, 64), (128, 128), (5, 0))
HEAD_DIMS += ((320, 320), (600, 514))
FORMS = (False, True)


def tables(rows: int, r: int, dtype: torch.dtype = torch.float32, base: float = 1e4):
    angles = torch.arange(rows)[:, None] / base ** (torch.arange(0, r, 2) / max(r, 1))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def inputs(*leading: int, hq=4, hk=2, d=64, dtype=torch.bfloat16, seed=0):
    q = random_activations(*leading, hq, d, dtype=dtype, seed=seed)
    return q, random_activations(*leading, hk, d, dtype=dtype, seed=seed + 1)


def rotary_exact(x, cos, sin, positions=None, interleaved=False):
    """The contract in float32 torch operations: must agree with the kernel bit for bit."""
    positions = torch.arange(x.shape[-3]) if positions is None else positions.long()
    c, s = (table.float()[positions].unsqueeze(-2) for table in (cos, sin))
    half = cos.shape[1]
    first = torch.arange(half) * 2 if interleaved else torch.arange(half)
    second = first + (1 if interleaved else half)
    x1, x2 = x.float()[..., first], x.float()[..., second]
    y = x.clone()
    y[..., first] = (x1 * c - x2 * s).to(x.dtype)
    y[..., second] = (x2 * c + x1 * s).to(x.dtype)
    return y


def check_both(q, k, cos, sin, positions=None, interleaved=False, what=""):
    """rotary() against the contract, and rotary_() on clones with the same strides against rotary()."""
    expected = [rotary_exact(x, cos, sin, positions, interleaved) for x in (q, k)]
    got = qops.rotary(q, k, cos, sin, positions=positions, interleaved=interleaved)
    for name, y, want in zip("qk", got, expected, strict=True):
        assert y.is_contiguous(), f"{what} {name}"
        assert_bitwise(y, want.contiguous(), f"{what} {name}")
    qops.rotary_(q, k, cos, sin, positions=positions, interleaved=interleaved)
    for name, y, want in zip("qk", (q, k), expected, strict=True):
        assert_bitwise(y, want, f"{what} {name} in place")


@pytest.mark.parametrize("interleaved", FORMS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("d", "r"), HEAD_DIMS)
def test_bits_follow_the_contract(d, r, dtype, interleaved):
    for table_dtype, t, (hq, hk) in itertools.product({torch.float32, dtype}, (1, 3), ((9, 3), (1, 2))):
        q, k = (Guarded(x) for x in inputs(2, t, hq=hq, hk=hk, d=d, dtype=dtype, seed=d))
        cos, sin = tables(t + 2, r, table_dtype)
        check_both(q.tensor, k.tensor, cos, sin, None, interleaved, f"{table_dtype} T={t} heads {hq}, {hk}")
        q.check()
        k.check()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("t", (0, 1, 2, 3, 17))
def test_accuracy_against_float64(t, dtype):
    q, k = inputs(2, t, hq=9, hk=3, dtype=dtype)
    cos, sin = tables(17, 64)
    for x, y in zip((q, k), qops.rotary(q, k, cos, sin), strict=True):
        assert_within(y, rotary_ref(x, cos, sin), rotary_bound(x, cos, sin), f"T={t}")
    interleave = torch.arange(64).view(2, 32).t().flatten()
    for x, y in zip((q, k), qops.rotary(q, k, cos, sin, interleaved=True), strict=True):
        ref, bound = rotary_ref(x, cos, sin, interleaved=True), rotary_bound(x, cos, sin, interleaved=True)
        assert_within(y, ref, bound, f"T={t} interleaved")
        same = qops.rotary(x[..., interleave.argsort()], k, cos, sin)[0][..., interleave]
        assert_bitwise(y, same, "both forms agree on permuted elements")


@pytest.mark.parametrize("interleaved", FORMS)
def test_positions(interleaved):
    b, t, p = 3, 5, 40
    cos, sin = tables(p, 64)
    rng = generator(0)
    per_token = torch.randint(0, p, (b, t), generator=rng)
    choices = {
        "[T]": per_token[0],
        "[B, T]": per_token,
        "one dtype or the other": per_token.int(),
        "[T] int32": per_token[1].int(),
        "strided": torch.stack((per_token, per_token + p), dim=-1)[..., 0],
        "transposed": per_token.t().contiguous().t(),
        "expanded": per_token[:1].expand(b, t),
        "the ends": torch.tensor([0, p - 1, 0, p - 1, p - 1]),
    }
    for name, positions in choices.items():
        check_both(*inputs(b, t), cos, sin, positions, interleaved, name)
    per_token_4d = per_token.expand(2, 1, b, t)
    check_both(*inputs(2, 1, b, t), cos, sin, per_token_4d, interleaved, "more leading dimensions")
    check_both(*inputs(t), cos, sin, per_token[2], interleaved, "no batch")


def layouts():
    """Name -> function of (dtype) giving (base, q, k): views of one base or of two that must not change elsewhere."""
    b, t, hq, hk, d = 2, 5, 6, 2, 40

    def base(*shape):
        return lambda dtype: random_activations(*shape, dtype=dtype, seed=7)

    merged = base(b, t, hq + 2 * hk, d)
    per_head = base(b, t, hq, 3, d)
    return {
        "merged qkv": (merged, lambda x: x[:, :, :hq], lambda x: x[:, :, hq : hq + hk]),
        "merged, k before q": (merged, lambda x: x[:, :, hk : hk + hq], lambda x: x[:, :, :hk]),
        "merged, flat": (
            base(b, t, (hq + 2 * hk) * d),
            lambda x: x[..., : hq * d].unflatten(-1, (hq, d)),
            lambda x: x[..., hq * d : (hq + hk) * d].unflatten(-1, (hk, d)),
        ),
        "merged, heads before tokens": (
            base(b, hq + hk, t, d),
            lambda x: x[:, :hq].transpose(1, 2),
            lambda x: x[:, hq:].transpose(1, 2),
        ),
        "q, k, v of each head together": (per_head, lambda x: x[:, :, :, 0], lambda x: x[:, :, :, 1]),
        "q and k stacked": (base(3, b, t, hq, d), lambda x: x[0], lambda x: x[2]),
        "a token of a sequence": (merged, lambda x: x[:, 2:3, :hq], lambda x: x[:, 2:3, hq:-1]),
        "every second token": (merged, lambda x: x[:, ::2, :hq], lambda x: x[:, ::2, hq:-1]),
        "every second element": (merged, lambda x: x[:, :, :hq, ::2], lambda x: x[:, :, hq:-1, ::2]),
        "elements in turn": (merged, lambda x: x[..., ::2], lambda x: x[..., 1::2]),
        "last dimension not dense": (
            base(b, hq + hk, d, t),
            lambda x: x[:, :hq].permute(0, 3, 1, 2),
            lambda x: x[:, hq:].permute(0, 3, 1, 2),
        ),
        "leading dimensions that cannot be merged": (
            base(2, 3, 2, 2, t, hq + hk, d),
            lambda x: x[:, ::2, :, 1:].transpose(0, 2)[..., :hq, :],
            lambda x: x[:, ::2, :, 1:].transpose(0, 2)[..., hq:, :],
        ),
    }


LAYOUTS = layouts()


@pytest.mark.parametrize("interleaved", FORMS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_strides(name, dtype, interleaved):
    make, q_of, k_of = LAYOUTS[name]
    base = make(dtype)
    before = base.clone()
    cos, sin = tables(9, 12)
    check_both(q_of(base), k_of(base), cos, sin, None, interleaved, name)
    q_of(base).copy_(q_of(before))
    k_of(base).copy_(k_of(before))
    assert_bitwise(base, before, "elements outside q and k")


@pytest.mark.parametrize("d", (64, 256))
@pytest.mark.parametrize("interleaved", FORMS)
def test_strides_of_the_tables(interleaved, d):
    cos, sin = tables(7, d)
    choices = {
        "Hugging Face's duplicated form": (
            torch.cat((cos, cos), -1)[:, : d // 2],
            torch.cat((sin, sin), -1)[:, : d // 2],
        ),
        "columns not dense": (cos.t().contiguous().t(), torch.stack((sin, cos), -1)[..., 0]),
        "one cache of both": torch.cat((cos, sin), -1).chunk(2, dim=-1),
        "one row for all": (cos[3:4].expand(7, d // 2), sin[3:4].expand(7, d // 2)),
    }
    for name, (c, s) in choices.items():
        check_both(*inputs(2, 5, d=d), c, s, None, interleaved, name)


def test_broadcast_inputs_of_the_functional_form():
    q, k = inputs(1, 5, hq=1)
    cos, sin = tables(5, 64)
    q_out, k_out = qops.rotary(q.expand(3, 5, 4, 64), k.expand(3, 5, 2, 64), cos, sin)
    want_q, want_k = qops.rotary(q, k, cos, sin)
    assert_bitwise(q_out, want_q.expand(3, 5, 4, 64).contiguous(), "q")
    assert_bitwise(k_out, want_k.expand(3, 5, 2, 64).contiguous(), "k")


@pytest.mark.parametrize("axis", ("token", "head", "element", "table", "position"))
def test_offsets_beyond_32_bits(axis, tmp_path):
    huge = 2**30 + 64  # offsets behind element 2^31 from the third index on; the file is sparse

    def far(values, dim):
        """The same values with stride `huge` in one dimension and the others dense."""
        strides = [0] * values.dim()
        dense = 1
        for d in reversed(range(values.dim())):
            strides[d] = huge if d == dim else dense
            dense *= 1 if d == dim else values.shape[d]
        size = (values.shape[dim] - 1) * huge + dense
        path = str(tmp_path / f"{values.data_ptr()}")
        view = torch.from_file(path, shared=True, size=size, dtype=values.dtype).as_strided(values.shape, strides)
        return view.copy_(values)

    q, k = inputs(3, hq=3, hk=3, d=16)
    cos, sin = tables(3, 4, torch.bfloat16)
    positions = torch.tensor([2, 0, 1], dtype=torch.int32)
    want = qops.rotary(q, k, cos, sin, positions=positions)
    dim = {"token": 0, "head": 1, "element": 2}
    if axis in dim:
        if axis == "element":
            q, k = q[..., :4], k[..., :4]
            want = qops.rotary(q, k, cos, sin, positions=positions)
        q, k = far(q, dim[axis]), far(k, dim[axis])
    elif axis == "table":
        cos, sin = far(cos, 0), far(sin, 0)
    else:
        positions = far(positions, 0)
    for got, expected in zip(qops.rotary(q, k, cos, sin, positions=positions), want, strict=True):
        assert_bitwise(got, expected, axis)
    qops.rotary_(q, k, cos, sin, positions=positions)
    for got, expected in zip((q, k), want, strict=True):
        assert_bitwise(got, expected, f"{axis} in place")


@pytest.mark.parametrize("op", ("rotary", "rotary_"))
@pytest.mark.parametrize("first_bad", (150, 199))
@pytest.mark.parametrize("bad", (40, -1, 2**31 - 1, -(2**31), 2**40, -(2**40)))
def test_positions_out_of_range(op, bad, first_bad):
    q, k = inputs(3, 200)
    before = q.clone(), k.clone()
    cos, sin = tables(40, 64)
    # Good ones that turn the heads, so that a write would show: position 0 leaves them as they are.
    positions = 1 + torch.arange(3 * 200).view(3, 200) % 39
    positions[2, first_bad:] = bad
    dtypes = (torch.int64, torch.int32) if abs(bad) < 2**40 else (torch.int64,)
    for dtype in dtypes:
        text = rf"^qops\.{op}: positions must lie in \[0, 40\), the rows of cos, got {bad}$"
        with pytest.raises(ValueError, match=text):
            getattr(qops, op)(q, k, cos, sin, positions=positions.to(dtype))
        assert_bitwise(q, before[0], "q")
        assert_bitwise(k, before[1], "k")


def overlapping():
    x = torch.zeros(4, 6, 16, dtype=torch.bfloat16)
    other = torch.zeros_like(x)
    windows = x.flatten().as_strided((4, 3, 16), (32, 8, 1))
    tables16 = x.flatten()[:32].view(4, 8)
    return {
        "q expanded over heads": (x[:, :1].expand(4, 6, 16), other, "q"),
        "q expanded over tokens": (x[:1].expand(4, 6, 16), other, "q"),
        "q expanded over elements": (x[..., :1].expand(4, 6, 16), other, "q"),
        "k expanded": (x, other[:1].expand(4, 6, 16), "k"),
        "windows": (windows, other, "q"),
        "a head of the next token": (x.flatten().as_strided((4, 3, 16), (32, 16, 1)), other, "q"),
        "the same": (x, x, "k and q"),
        "one head shared": (x[:, :4], x[:, 3:], "k and q"),
        "one element shared": (x[..., :9], x[..., 7:], "k and q"),
        "shifted by a token": (x[:3, :4], x[1:, 2:], "k and q"),
        "other strides": (x, x.transpose(0, 1)[:4, :, :].transpose(0, 1)[:, :1], "k and q"),
        "cos": (x, other, "cos and q", tables16, torch.zeros(4, 8, dtype=x.dtype)),
        "sin": (other, x, "sin and k", torch.zeros(4, 8, dtype=x.dtype), tables16),
        "positions": (x, other, "positions and q", *tables(4, 16), x.flatten()[:16].view(torch.int64)),
    }


@pytest.mark.parametrize("name", overlapping())
def test_in_place_on_overlapping_memory_is_refused(name):
    q, k, which, *rest = overlapping()[name]
    cos, sin, *given = rest or tables(4, q.shape[-1] // 2 * 2)
    positions = given[0] if given else None
    arg, _, other = which.partition(" and ")
    text = rf"{arg} must lie apart from {other} in memory" if other else rf"{arg} must hold every element once"
    with pytest.raises(ValueError, match=rf"^qops\.rotary_: {text}"):
        qops.rotary_(q, k, cos, sin, positions=positions)
    for y, x in zip(qops.rotary(q, k, cos, sin, positions=positions), (q, k), strict=True):
        assert_bitwise(y, rotary_exact(x, cos, sin, positions).contiguous(), "the functional form only reads")


def test_tokens_do_not_depend_on_batch_or_threads(threads):
    q, k = inputs(257, hq=9, hk=3)
    cos, sin = tables(257, 64)
    threads(1)
    one = qops.rotary(q, k, cos, sin)
    threads(2)
    for got, want in zip(qops.rotary(q, k, cos, sin), one, strict=True):
        assert_bitwise(got, want, "threads")
    for t in (0, 100, 256):
        alone = qops.rotary(q[t : t + 1], k[t : t + 1], cos, sin, positions=torch.tensor([t]))
        for got, want in zip(alone, one, strict=True):
            assert_bitwise(got[0], want[t], "token alone")


@pytest.mark.parametrize("interleaved", FORMS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_special_values(dtype, interleaved):
    finfo = torch.finfo(dtype)
    positive = torch.tensor([0.0, 1.0, float("inf"), float("nan"), finfo.max, finfo.tiny / 4], dtype=dtype)
    values = torch.cat((positive, -positive))
    x = torch.cartesian_prod(values, values)  # every pair
    x = x.flatten() if interleaved else x.t().flatten()
    q = x.view(1, 1, -1).repeat(6, 1, 1)
    angles = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8], [0.6, -0.8], [float("nan"), 0.0]])
    cos, sin = (angles[:, i : i + 1].expand(6, 144) for i in (0, 1))
    check_both(q, q.clone(), cos, sin, None, interleaved, "special values")


def test_empty():
    for shape_q, shape_k, r in (
        ((0, 2, 8), (0, 1, 8), 8),
        ((3, 0, 5, 2, 8), (3, 0, 5, 1, 8), 8),
        ((5, 0, 8), (5, 0, 8), 8),
        ((5, 2, 8), (5, 0, 8), 8),
        ((5, 2, 8), (5, 1, 8), 0),
        ((5, 2, 0), (5, 1, 0), 0),
    ):
        q, k = torch.randn(shape_q), torch.randn(shape_k)
        for positions in (None, torch.zeros(shape_q[:-2], dtype=torch.int32)):
            check_both(q, k, *tables(5, r), positions, what=f"{shape_q} R={r}")
    no_rows = torch.empty(0, 4)
    assert qops.rotary(torch.empty(0, 2, 8), torch.empty(0, 1, 8), no_rows, no_rows)[0].shape == (0, 2, 8)


Q, K = inputs(2, 5)
COS, SIN = tables(8, 64)
P = torch.zeros(5, dtype=torch.int64)
ERRORS = {
    "q dtype": ((Q.long(), K, COS, SIN), RuntimeError, r"q must have dtype float32, float16 or bfloat16, got int64"),
    "k dtype": ((Q, K.float(), COS, SIN), RuntimeError, r"k must have the dtype of q = bfloat16, got float32"),
    "cos dtype": (
        (Q, K, COS.half(), SIN.half()),
        RuntimeError,
        r"cos must have dtype float32 or the dtype of q = bfloat16, got float16",
    ),
    "sin dtype": ((Q, K, COS, SIN.bfloat16()), RuntimeError, r"sin must have the dtype of cos = float32, got bfloat16"),
    "q rank": ((Q[0, 0], K[0, 0], COS, SIN), ValueError, r"q must have at least 3 dimensions \[T, H, D\], got 2"),
    "k rank": (
        (Q, K[0], COS, SIN),
        ValueError,
        r"k must have the shape of q = \[2, 5, 4, 64\] but for the number of heads, got \[5, 2, 64\]",
    ),
    "k tokens": (
        (Q, K[:, :4], COS, SIN),
        ValueError,
        r"k must have the shape of q = \[2, 5, 4, 64\] but for the number of heads, got \[2, 4, 2, 64\]",
    ),
    "k elements": ((Q, K[..., :62], COS, SIN), ValueError, r"k must have the shape of q = .* got \[2, 5, 2, 62\]"),
    "cos rank": ((Q, K, COS[None], SIN), ValueError, r"cos must have 2 dimensions \[positions, R / 2\], got 3"),
    "cos columns": (
        (Q, K, *tables(8, 66)),
        ValueError,
        r"cos must have at most D / 2 = 32 columns, got 33",
    ),
    "sin shape": ((Q, K, COS, SIN[:7]), ValueError, r"sin must have the shape of cos = \[8, 32\], got \[7, 32\]"),
    "cos rows": ((Q, K, COS[:4], SIN[:4]), ValueError, r"cos must have at least T = 5 rows without positions, got 4"),
    "positions dtype": (
        (Q, K, COS, SIN, P.float()),
        RuntimeError,
        r"positions must have dtype int32 or int64, got float32",
    ),
    "positions shape": (
        (Q, K, COS, SIN, P[:4]),
        ValueError,
        r"positions must have shape \[T\] = \[5\] or \[\.\.\., T\] = \[2, 5\], got \[4\]",
    ),
    "positions rank": (
        (Q, K, COS, SIN, P[None]),
        ValueError,
        r"positions must have shape \[T\] = \[5\] or \[\.\.\., T\] = \[2, 5\], got \[1, 5\]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("op", ("rotary", "rotary_"))
def test_errors_are_the_same_with_fake_tensors(op, case):
    args, error, text = ERRORS[case]
    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.{op}: {text}$") as caught:
            q, k, cos, sin, *positions = (a.to(device) for a in args)
            getattr(qops, op)(q, k, cos, sin, positions=positions[0] if positions else None)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("op", ("rotary", "rotary_"))
def test_positions_have_to_be_named(op):
    with pytest.raises(TypeError, match="takes 4 positional arguments but 5 were given"):
        getattr(qops, op)(Q, K, COS, SIN, P)


def test_too_many_leading_dimensions():
    x = torch.zeros(4, 4, 4, 4, 4, 1, 2)[::2, ::2, ::2, ::2, ::2]
    with pytest.raises(ValueError, match=r"q must have at most 4 leading dimensions that cannot be merged"):
        qops.rotary(x, x, *tables(2, 2))


def test_grad_is_refused():
    with torch.inference_mode(False), torch.enable_grad():
        q, k = inputs(5, dtype=torch.float32)
        for op in (qops.rotary, qops.rotary_):
            with pytest.raises(RuntimeError, match=rf"qops\.{op.__name__}: \w+ must not require grad"):
                op(q, k.clone().requires_grad_(), *tables(5, 64))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(dtype):
    with torch.inference_mode(False), torch.no_grad():
        q, k = inputs(2, 5, dtype=dtype)
        cos, sin = tables(8, 32, dtype)
        positions = torch.tensor([3, 0, 7, 1, 1])
        for op in (torch.ops.qops.rotary.default, torch.ops.qops.rotary_.default):
            torch.library.opcheck(op, (q.clone(), k.clone(), cos, sin))
            torch.library.opcheck(op, (q.clone(), k.clone(), cos, sin, positions, True))
            torch.library.opcheck(op, (q[:, :, 1:].clone(), k.transpose(0, 1).contiguous().transpose(0, 1), cos, sin))


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    torch._dynamo.reset()
    cos, sin = tables(8, 64)

    def block(qkv, positions):
        qkv = qkv + 1
        q, k, v = qkv.split((4, 2, 2), dim=-2)
        q_out, k_out = qops.rotary(q, k, cos, sin, positions=positions)
        qops.rotary_(q, k, cos, sin, positions=positions, interleaved=True)
        return q_out, k_out, q.clone(), k.clone(), v + 1, qkv

    torch.use_deterministic_algorithms(False)  # inductor does not know the poisoned torch.empty
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    for t in (5, 3):
        qkv = random_activations(2, t, 8, 64, dtype=torch.bfloat16, seed=t)
        positions = torch.arange(t) + 2
        for got, want in zip(compiled(qkv, positions), block(qkv, positions), strict=True):
            assert_bitwise(got, want, f"T={t}")


def test_compiled_in_place_reaches_the_caller():
    torch._dynamo.reset()
    cos, sin = tables(8, 64)
    compiled = torch.compile(qops.rotary_, fullgraph=True, backend="aot_eager")
    qkv = random_activations(5, 8, 64, dtype=torch.bfloat16, seed=0)
    want = qkv.clone()
    qops.rotary_(want[:, :4], want[:, 4:6], cos, sin)
    compiled(qkv[:, :4], qkv[:, 4:6], cos, sin)
    assert_bitwise(qkv, want, "slices of one tensor")
