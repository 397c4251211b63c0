from __future__ import annotations

import itertools

import pytest
import torch

import qops
from qops.ops.qk_norm_rotary import qk_norm_rotary_ref
from qops.ops.rms_norm import rms_norm_ref
from qops.testing import (
    FLOAT_DTYPES,
    Guarded,
    assert_bitwise,
    assert_within,
    generator,
    random_activations,
    rms_norm_bound,
    rotary_bound,
    rounding_bound,
    strided_rows,
)

# (D, R): around the vector width (16 pairs or 8), partial rotation, odd D, nothing to rotate, more than one block of
# 128 pairs, more than one round of the norm's 256 partials.
HEAD_DIMS = ((1, 0), (2, 2), (7, 6), (8, 8), (16, 16), (18, 18), (33, 30), (64, 64), (64, 32), (80, 80), (96, 64))
HEAD_DIMS += ((127, 126), (128, 128), (256, 256), (257, 64), (320, 320), (512, 512), (600, 514), (5, 0))
FORMS = (False, True)
STYLES = (("hf", 0.0), ("fp32", 0.0), ("fp32", 1.0))
EPS = 1e-6


def tables(rows: int, r: int, dtype: torch.dtype = torch.float32):
    angles = torch.arange(rows)[:, None] / 1e4 ** (torch.arange(0, r, 2) / max(r, 1))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def inputs(*leading: int, hq=4, hk=2, d=64, dtype=torch.bfloat16, seed=0):
    q = random_activations(*leading, hq, d, dtype=dtype, seed=seed)
    return q, random_activations(*leading, hk, d, dtype=dtype, seed=seed + 1)


def weights(d: int, q_dtype=torch.bfloat16, k_dtype=None, seed=9):
    return (
        random_activations(d, dtype=dtype, seed=seed + i, outliers=False)
        for i, dtype in enumerate((q_dtype, k_dtype or q_dtype))
    )


def unfused(q, k, q_weight, k_weight, cos, sin, eps, *, positions=None, interleaved=False, **style):
    """The chain that the contract names, op by op."""
    normed = (qops.rms_norm(x.contiguous(), w, eps, **style) for x, w in ((q, q_weight), (k, k_weight)))
    return qops.rotary(*normed, cos, sin, positions=positions, interleaved=interleaved)


def check_both(q, k, *args, what="", **style):
    """qk_norm_rotary() against the chain, and qk_norm_rotary_() on q and k themselves, whatever their strides."""
    want = unfused(q, k, *args, **style)
    got = qops.qk_norm_rotary(q, k, *args, **style)
    for name, a, b in zip("qk", got, want, strict=True):
        assert a.is_contiguous(), f"{what} {name}"
        assert_bitwise(a, b, f"{what} {name}")
    qops.qk_norm_rotary_(q, k, *args, **style)
    for name, a, b in zip("qk", (q, k), want, strict=True):
        assert_bitwise(a, b, f"{what} {name} in place")


@pytest.mark.parametrize("interleaved", FORMS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("d", "r"), HEAD_DIMS)
def test_fused_equals_unfused(d, r, dtype, interleaved):
    cases = itertools.product({torch.float32, dtype}, STYLES, FLOAT_DTYPES, (1, 3))
    for seed, (table_dtype, (rounding, offset), weight_dtype, t) in enumerate(cases, start=d):
        q, k = (Guarded(x) for x in inputs(2, t, hq=3, hk=2, d=d, dtype=dtype, seed=seed))
        style = {"rounding": rounding, "weight_offset": offset}
        args = (*weights(d, weight_dtype, dtype, seed), *tables(t + 2, r, table_dtype), EPS)
        check_both(
            q.tensor,
            k.tensor,
            *args,
            interleaved=interleaved,
            **style,
            what=f"{table_dtype} {weight_dtype} {style} T={t}",
        )
        q.check()
        k.check()


def test_rounding_between_the_two_shows():
    """The chain without the rounding in between gives other bits: the comparison above can fail."""
    q, k = inputs(64)
    args = (*weights(64), *tables(64, 64), EPS)
    wide = unfused(q.float(), k.float(), *args)
    for got, want in zip(qops.qk_norm_rotary(q, k, *args), wide, strict=True):
        assert bool((got != want.bfloat16()).any())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("t", (0, 1, 2, 3, 17))
def test_accuracy_against_float64(t, dtype):
    for d, offset in itertools.product((64, 96, 128), (0.0, 1.0)):
        style = {"rounding": "fp32" if offset else "hf", "weight_offset": offset}
        q, k = inputs(2, t, hq=9, hk=3, d=d, dtype=dtype, seed=d)
        q_weight, k_weight = weights(d, dtype)
        cos, sin = tables(17, d)
        got = qops.qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, EPS, **style)
        turn = torch.arange(d).view(2, -1).t().flatten()
        args = (q_weight[turn], k_weight[turn], cos, sin, EPS)
        turned = qops.qk_norm_rotary(q[..., turn], k[..., turn], *args, interleaved=True, **style)
        for x, w, y, z in zip((q, k), (q_weight, k_weight), got, turned, strict=True):
            normed = rms_norm_ref(x, w, EPS, weight_offset=offset, rounding="fp32")
            error = rms_norm_bound(x, w, EPS, **style) + rounding_bound(normed, dtype)
            bound = rotary_bound(normed, cos, sin, error=error)
            ref = qk_norm_rotary_ref(x, w, cos, sin, EPS, weight_offset=offset)
            assert_within(y, ref, bound, f"T={t} D={d} {style}")
            ref = qk_norm_rotary_ref(x[..., turn], w[turn], cos, sin, EPS, None, True, weight_offset=offset)
            assert_within(z, ref, bound[..., turn], f"T={t} D={d} {style} interleaved")


def test_matches_transformers():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    q, k = inputs(2, 33, hq=8, d=128)
    cos, sin = tables(33, 128)
    doubled = [torch.cat((table, table), -1).bfloat16()[None] for table in (cos, sin)]
    halves = [table[0, :, :64] for table in doubled]
    q_weight, k_weight = weights(128)
    for module, style in ((Qwen3RMSNorm, {}), (Gemma3RMSNorm, {"rounding": "fp32", "weight_offset": 1.0})):
        norms = [module(128, eps=EPS).bfloat16() for _ in range(2)]
        for norm, weight in zip(norms, (q_weight, k_weight), strict=True):
            norm.load_state_dict({"weight": weight})
        normed = (norm(x).transpose(1, 2) for norm, x in zip(norms, (q, k), strict=True))
        want = apply_rotary_pos_emb(*normed, *doubled)
        got = qops.qk_norm_rotary(q, k, q_weight, k_weight, *halves, EPS, **style)
        for a, b in zip(got, want, strict=True):
            # Transformers rounds both products to bfloat16 before it adds them.
            error = (a.float() - b.transpose(1, 2).float()).abs()
            assert bool((error <= 2**-6 * b.abs().max()).all())


@pytest.mark.parametrize("interleaved", FORMS)
def test_positions(interleaved):
    b, t, p = 3, 5, 40
    cos, sin = tables(p, 64)
    per_token = torch.randint(0, p, (b, t), generator=generator(0))
    choices = {
        "[T]": per_token[0],
        "[B, T]": per_token,
        "int32": per_token.int(),
        "strided": torch.stack((per_token, per_token + p), dim=-1)[..., 0],
        "expanded": per_token[:1].expand(b, t),
        "the ends": torch.tensor([0, p - 1, 0, p - 1, p - 1]),
    }
    for name, positions in choices.items():
        check_both(*inputs(b, t), *weights(64), cos, sin, EPS, positions=positions, interleaved=interleaved, what=name)


def layouts():
    """Name -> function of (dtype) giving (base, q, k): views of one base that must not change elsewhere."""
    b, t, hq, hk, d = 2, 5, 6, 2, 40

    def base(*shape):
        return lambda dtype: random_activations(*shape, dtype=dtype, seed=7)

    merged = base(b, t, hq + 2 * hk, d)
    return {
        "merged qkv": (merged, lambda x: x[:, :, :hq], lambda x: x[:, :, hq : hq + hk]),
        "output of a qkv GEMM": (
            base(b, t, (hq + 2 * hk) * d),
            lambda x: x[..., : hq * d].unflatten(-1, (hq, d)),
            lambda x: x[..., hq * d : (hq + hk) * d].unflatten(-1, (hk, d)),
        ),
        "heads before tokens": (
            base(b, hq + hk, t, d),
            lambda x: x[:, :hq].transpose(1, 2),
            lambda x: x[:, hq:].transpose(1, 2),
        ),
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
    q, k = q_of(base), k_of(base)
    args = (*weights(q.shape[-1], dtype), *tables(9, 12), EPS)
    check_both(q, k, *args, interleaved=interleaved, what=name)
    q.copy_(q_of(before))
    k.copy_(k_of(before))
    assert_bitwise(base, before, "elements outside q and k")


def test_strides_of_the_tables_and_weights():
    cos, sin = tables(7, 64)
    args = list(weights(64))
    args[0] = strided_rows(args[0][None])[0]  # at an odd offset
    choices = {
        "Hugging Face's duplicated form": (torch.cat((cos, cos), -1)[:, :32], torch.cat((sin, sin), -1)[:, :32]),
        "columns not dense": (cos.t().contiguous().t(), torch.stack((sin, cos), -1)[..., 0]),
        "one row for all": (cos[3:4].expand(7, 32), sin[3:4].expand(7, 32)),
    }
    for name, (c, s) in choices.items():
        for interleaved in FORMS:
            check_both(*inputs(2, 5), *args, c, s, EPS, interleaved=interleaved, what=name)


def test_broadcast_inputs_of_the_functional_form():
    q, k = inputs(1, 5, hq=1)
    args = (*weights(64), *tables(5, 64), EPS)
    q_out, k_out = qops.qk_norm_rotary(q.expand(3, 5, 4, 64), k.expand(3, 5, 2, 64), *args)
    want_q, want_k = unfused(q, k, *args)
    assert_bitwise(q_out, want_q.expand(3, 5, 4, 64).contiguous(), "q")
    assert_bitwise(k_out, want_k.expand(3, 5, 2, 64).contiguous(), "k")


@pytest.mark.parametrize("dim", (0, 1, 2))
def test_offsets_beyond_32_bits(dim, tmp_path):
    huge = 2**30 + 64  # offsets behind element 2^31 from the third index on; the file is sparse

    def far(values):
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

    d = 4 if dim == 2 else 16
    q, k = (far(x) for x in inputs(3, hq=3, hk=3, d=d))
    check_both(q, k, *weights(d), *tables(3, 4), EPS)


@pytest.mark.parametrize("op", ("qk_norm_rotary", "qk_norm_rotary_"))
@pytest.mark.parametrize("first_bad", (40, 49))
@pytest.mark.parametrize("bad", (40, -1, 2**31 - 1, -(2**31), 2**40, -(2**40)))
def test_positions_out_of_range(op, bad, first_bad):
    q, k = inputs(3, 50)
    before = q.clone(), k.clone()
    cos, sin = tables(40, 64)
    # Good ones that turn the heads, so that a write would show: position 0 leaves them as they are.
    positions = 1 + torch.arange(3 * 50).view(3, 50) % 39
    positions[2, first_bad:] = bad
    dtypes = (torch.int64, torch.int32) if abs(bad) < 2**40 else (torch.int64,)
    for dtype in dtypes:
        text = rf"^qops\.{op}: positions must lie in \[0, 40\), the rows of cos, got {bad}$"
        with pytest.raises(ValueError, match=text):
            getattr(qops, op)(q, k, *weights(64), cos, sin, EPS, positions=positions.to(dtype))
        assert_bitwise(q, before[0], "q")
        assert_bitwise(k, before[1], "k")


def overlapping():
    x = random_activations(4, 6, 16, dtype=torch.bfloat16, seed=0)
    other, weight = torch.zeros_like(x), torch.ones(16, dtype=x.dtype)
    cos, sin = tables(4, 16, torch.bfloat16)
    tables16 = x.flatten()[:32].view(4, 8)
    return {
        "q must hold every element once": (x[:, :1].expand(4, 6, 16), other, weight, weight, cos, sin),
        "k must hold every element once": (x, other[:1].expand(4, 6, 16), weight, weight, cos, sin),
        "k must lie apart from q": (x[:, :4], x[:, 3:], weight, weight, cos, sin),
        "q_weight must lie apart from q": (x, other, x[3, 5], weight, cos, sin),
        "k_weight must lie apart from q": (x, other, weight, x[0, 1], cos, sin),
        "k_weight must lie apart from k": (other, x, weight, x.flatten()[5:21], cos, sin),
        "cos must lie apart from q": (x, other, weight, weight, tables16, sin),
        "sin must lie apart from k": (other, x, weight, weight, cos, tables16),
        "positions must lie apart from q": (x, other, weight, weight, cos, sin, x.flatten()[:16].view(torch.int64)),
    }


@pytest.mark.parametrize("text", overlapping())
def test_in_place_on_overlapping_memory_is_refused(text):
    q, k, q_weight, k_weight, cos, sin, *rest = overlapping()[text]
    positions = rest[0] if rest else None
    before = [t.clone() for t in (q, k)]
    with pytest.raises(ValueError, match=rf"^qops\.qk_norm_rotary_: {text}"):
        qops.qk_norm_rotary_(q, k, q_weight, k_weight, cos, sin, EPS, positions=positions)
    for got, want in zip((q, k), before, strict=True):
        assert_bitwise(got, want, "nothing is written")


def test_tokens_do_not_depend_on_batch_or_threads(threads):
    q, k = inputs(257, hq=9, hk=3)
    args = (*weights(64), *tables(257, 64), EPS)
    one = unfused(q, k, *args)
    for count in (1, 2, 5):
        threads(count)
        for got, want in zip(qops.qk_norm_rotary(q, k, *args), one, strict=True):
            assert_bitwise(got, want, f"{count} threads")
        q_in_place, k_in_place = q.clone(), k.clone()
        qops.qk_norm_rotary_(q_in_place, k_in_place, *args)
        for got, want in zip((q_in_place, k_in_place), one, strict=True):
            assert_bitwise(got, want, f"{count} threads in place")
    for t in (0, 100, 256):
        alone = qops.qk_norm_rotary(q[t : t + 1], k[t : t + 1], *args, positions=torch.tensor([t]))
        for got, want in zip(alone, one, strict=True):
            assert_bitwise(got[0], want[t], "token alone")


@pytest.mark.parametrize("interleaved", FORMS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_special_heads(dtype, interleaved):
    q = torch.ones(2, 8, 40, dtype=dtype)
    q[0, 1] = 0.0
    q[0, 2, 39] = float("nan")
    q[0, 3, 0] = float("inf")
    q[0, 4] = torch.finfo(dtype).tiny / 4
    q[0, 5, 1:] = -0.0
    q[0, 6] = torch.finfo(dtype).max
    q[1] = q[0].flip(0)
    cos, sin = tables(2, 20)
    largest = torch.full((40,), torch.finfo(torch.float32).max)
    for weight, (rounding, offset) in itertools.product((torch.full((40,), 2.0), torch.zeros(40), largest), STYLES):
        args = (weight, weight, cos, sin, 1e-12)
        check_both(q.clone(), q.clone(), *args, interleaved=interleaved, rounding=rounding, weight_offset=offset)
    y, _ = qops.qk_norm_rotary(q, q, torch.ones(40), torch.ones(40), cos, sin, EPS, interleaved=interleaved)
    assert y[0, 2].isnan().all()
    nan = y[0, 3].isnan()
    assert nan.nonzero().flatten().tolist() == [0, 1 if interleaved else 10]
    assert bool((y[0, 3][~nan] == 0).all())
    assert_bitwise(y[0, 0], y[0, 7], "heads beside special ones")


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
            args = (*weights(shape_q[-1]), *tables(5, r), EPS)
            check_both(q, k, *args, positions=positions, what=f"{shape_q} R={r}")


# --- errors ----------------------------------------------------------------------------------------------------------

Q, K = inputs(2, 5)
W = torch.ones(64)
COS, SIN = tables(8, 64)
P = torch.zeros(5, dtype=torch.int64)
ERRORS = {
    "q dtype": ({"q": Q.long()}, RuntimeError, r"q must have dtype float32, float16 or bfloat16, got int64"),
    "k dtype": ({"k": K.float()}, RuntimeError, r"k must have the dtype of q = bfloat16, got float32"),
    "cos dtype": (
        {"cos": COS.half()},
        RuntimeError,
        r"cos must have dtype float32 or the dtype of q = bfloat16, got float16",
    ),
    "sin dtype": ({"sin": SIN.bfloat16()}, RuntimeError, r"sin must have the dtype of cos = float32, got bfloat16"),
    "q rank": ({"q": Q[0, 0], "k": K[0, 0]}, ValueError, r"q must have at least 3 dimensions \[T, H, D\], got 2"),
    "k tokens": (
        {"k": K[:, :4]},
        ValueError,
        r"k must have the shape of q = \[2, 5, 4, 64\] but for the number of heads, got \[2, 4, 2, 64\]",
    ),
    "cos rank": ({"cos": COS[None]}, ValueError, r"cos must have 2 dimensions \[positions, R / 2\], got 3"),
    "cos columns": ({"cos": tables(8, 66)[0]}, ValueError, r"cos must have at most D / 2 = 32 columns, got 33"),
    "sin shape": ({"sin": SIN[:7]}, ValueError, r"sin must have the shape of cos = \[8, 32\], got \[7, 32\]"),
    "cos rows": (
        {"cos": COS[:4], "sin": SIN[:4]},
        ValueError,
        r"cos must have at least T = 5 rows without positions, got 4",
    ),
    "positions dtype": (
        {"positions": P.float()},
        RuntimeError,
        r"positions must have dtype int32 or int64, got float32",
    ),
    "positions shape": (
        {"positions": P[:4]},
        ValueError,
        r"positions must have shape \[T\] = \[5\] or \[\.\.\., T\] = \[2, 5\], got \[4\]",
    ),
    "q_weight dtype": (
        {"q_weight": W.double()},
        RuntimeError,
        r"q_weight must have dtype float32, float16 or bfloat16, got float64",
    ),
    "k_weight dtype": (
        {"k_weight": W.int()},
        RuntimeError,
        r"k_weight must have dtype float32, float16 or bfloat16, got int32",
    ),
    "q_weight shape": ({"q_weight": W[:63]}, ValueError, r"q_weight must have shape \[D\] = \[64\], got \[63\]"),
    "k_weight rank": ({"k_weight": W[None]}, ValueError, r"k_weight must have shape \[D\] = \[64\], got \[1, 64\]"),
    "k_weight stride": (
        {"k_weight": torch.ones(128)[::2]},
        ValueError,
        r"k_weight must have stride 1 in its last dimension, got 2",
    ),
    "weight stride 0": (
        {"q_weight": W[:1].expand(64)},
        ValueError,
        r"q_weight must have stride 1 in its last dimension, got 0",
    ),
    "rounding": ({"rounding": "up"}, ValueError, r'rounding must be "hf" or "fp32", got "up"'),
    "offset": (
        {"weight_offset": 1.0},
        ValueError,
        r'rounding must be "fp32" with a non-zero weight_offset, got "hf"',
    ),
}


def on(device, t):
    """Tensor.to() would make a sparse view dense."""
    return t if device == "cpu" else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("op", ("qk_norm_rotary", "qk_norm_rotary_"))
def test_errors_are_the_same_with_fake_tensors(op, case):
    changes, error, text = ERRORS[case]
    arguments = {"q": Q, "k": K, "q_weight": W, "k_weight": W, "cos": COS, "sin": SIN, "eps": EPS, **changes}
    messages = []
    for device in ("cpu", "meta"):
        there = {n: on(device, a) if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
        with pytest.raises(error, match=rf"^qops\.{op}: {text}$") as caught:
            getattr(qops, op)(**there)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("op", ("qk_norm_rotary", "qk_norm_rotary_"))
def test_positions_have_to_be_named(op):
    with pytest.raises(TypeError, match="takes 7 positional arguments but 8 were given"):
        getattr(qops, op)(*inputs(5), *weights(64), *tables(5, 64), EPS, torch.arange(5))


def test_too_many_leading_dimensions():
    x = torch.zeros(4, 4, 4, 4, 4, 1, 2)[::2, ::2, ::2, ::2, ::2]
    with pytest.raises(ValueError, match=r"q must have at most 4 leading dimensions that cannot be merged"):
        qops.qk_norm_rotary(x, x, torch.ones(2), torch.ones(2), *tables(2, 2), EPS)


def test_grad_is_refused():
    with torch.inference_mode(False), torch.enable_grad():
        q, k = inputs(5, dtype=torch.float32)
        for op in (qops.qk_norm_rotary, qops.qk_norm_rotary_):
            with pytest.raises(RuntimeError, match=rf"qops\.{op.__name__}: k_weight must not require grad"):
                op(q, k, torch.ones(64), torch.ones(64, requires_grad=True), *tables(5, 64), EPS)


# --- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(dtype):
    with torch.inference_mode(False), torch.no_grad():
        q, k = inputs(2, 5, dtype=dtype)
        norms = tuple(weights(64, dtype))
        cos, sin = tables(8, 32, dtype)
        positions = torch.tensor([3, 0, 7, 1, 1])
        for op in (torch.ops.qops.qk_norm_rotary.default, torch.ops.qops.qk_norm_rotary_.default):
            torch.library.opcheck(op, (q.clone(), k.clone(), *norms, cos, sin, EPS))
            args = (q[:, :, 1:].clone(), k.transpose(0, 1).contiguous().transpose(0, 1), *norms, cos, sin, EPS)
            torch.library.opcheck(op, (*args, positions, True, 1.0, "fp32"))


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    torch._dynamo.reset()
    norms = tuple(weights(64))
    cos, sin = tables(8, 64)

    def block(qkv, positions):
        qkv = qkv + 1
        q, k, v = qkv.split((4, 2, 2), dim=-2)
        q_out, k_out = qops.qk_norm_rotary(q, k, *norms, cos, sin, EPS, positions=positions)
        qops.qk_norm_rotary_(
            q, k, *norms, cos, sin, EPS, positions=positions, interleaved=True, weight_offset=1.0, rounding="fp32"
        )
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
    args = (*weights(64), *tables(8, 64), EPS)
    compiled = torch.compile(qops.qk_norm_rotary_, fullgraph=True, backend="aot_eager")
    qkv = random_activations(5, 8, 64, dtype=torch.bfloat16, seed=0)
    want = qkv.clone()
    qops.qk_norm_rotary_(want[:, :4], want[:, 4:6], *args)
    compiled(qkv[:, :4], qkv[:, 4:6], *args)
    assert_bitwise(qkv, want, "slices of one tensor")
