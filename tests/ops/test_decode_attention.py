from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import qops
from qops.ops.decode_attention import attended, decode_attention_ref
from qops.testing import (
    FLOAT_DTYPES,
    Guarded,
    assert_bitwise,
    assert_within,
    decode_attention_bound,
    generator,
    random_activations,
)
from tests.support.ops.attention_oracle import decode_attention_exact, tanh_exact

HEADS = ((2, 2), (9, 3), (4, 1), (16, 2), (7, 1))  # groups of 1, 3, 4, 8, 7
ROWS = (1, 2, 127, 128, 129, 300, 1000)
DIMS = (1, 7, 8, 16, 64, 80, 96, 128, 256)
WAYS = tuple(itertools.product((1, 2, 8), HEADS))  # tokens, heads
NAN, INFINITY = float("nan"), math.inf


def inputs(b=1, t=1, heads=(9, 3), s=300, d=64, dtype=torch.bfloat16, seed=0, size=1.0):
    q = random_activations(b, t, heads[0], d, dtype=torch.float32, seed=seed, outliers=False) * size
    k, v = (random_activations(b, heads[1], s, d, dtype=dtype, seed=seed + i, outliers=False) for i in (1, 2))
    return q.to(dtype), k, v


def check(q, k, v, what="", **how):
    """Against float64, within the contract's bound, between guards."""
    first = how.pop("first_position", 0)
    out = Guarded(torch.full_like(q.contiguous(), NAN))
    y = qops.decode_attention(q, k, v, **how, first_position=first, out=out.tensor)
    out.check()
    assert_within(y, decode_attention_ref(q, k, v, **how), decode_attention_bound(q, k, v, **how), what)
    return y


def exact(q, k, v, scale=None, *, mask=None, window=None, softcap=None, first_position=0):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return decode_attention_exact(q, k, v, scale, mask, window or 0, softcap or 0.0, first_position)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_accuracy_against_float64(d, dtype):
    """Every S and every group with every D and dtype, in other pairs each time."""
    turn = 7 * DIMS.index(d) + 5 * FLOAT_DTYPES.index(dtype)
    for index, s in enumerate(ROWS, start=turn):
        t, heads = WAYS[index % len(WAYS)]
        check(*inputs(1, min(t, s), heads, s, d, dtype, seed=s), f"S={s} T={t} {heads}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_error_of_common_scores(dtype):
    """Half an ulp and 2^-18 of the largest value."""
    for seed, (t, d, s) in enumerate(itertools.product((1, 4), (64, 128), (17, 129, 1000))):
        q, k, v = inputs(2, t, (8, 2), s, d, dtype, seed=10 * seed)
        ref = decode_attention_ref(q, k, v)
        limit = torch.finfo(dtype).eps / 2 * ref.abs() + 2.0**-18 * v.double().abs().max()
        assert bool(((qops.decode_attention(q, k, v).double() - ref).abs() <= limit).all())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_large_scores(dtype):
    for size, softcap, scale in itertools.product((30.0, 1000.0), (None, 50.0, 3.0), (None, -1.0)):
        q, k, v = inputs(1, 3, (6, 2), 260, 80, dtype, size=size)
        y = check(q, k, v, f"{size} {softcap}", softcap=softcap, scale=scale)
        assert_bitwise(y, exact(q, k, v, scale, softcap=softcap), f"{size} {softcap}")
    rising = torch.arange(300.0).view(1, 1, 300, 1).repeat(1, 1, 1, 16).to(dtype)
    q, v = torch.ones(1, 1, 1, 16, dtype=dtype), inputs(1, 1, (1, 1), 300, 16, dtype)[2]
    assert_bitwise(check(q, rising, v, scale=10.0), v[:, None, :, 299], "the last one alone")
    assert_bitwise(check(-q, rising, v, scale=10.0), v[:, None, :, 0], "the first one alone")


def test_tanh_of_the_softcap():
    """The contract's, whose bits the operator has, within 6 * 2^-24."""
    x = np.linspace(-22, 22, 200_001).astype(np.float32)
    x = np.concatenate((x, np.float32(2) ** np.arange(-149, 128, dtype=np.float32)))
    assert np.abs(tanh_exact(x) - np.tanh(x.astype(np.float64))).max() <= 6 * 2.0**-24


def test_weights_below_exp_of_minus_87_are_none():
    """Their values take no part; masked ones are among them."""
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, -86.5, -87.5, -300.0]).view(1, 1, 4, 1)
    v = torch.tensor([0.0, 1e30, 3e38, 3e38]).view(1, 1, 4, 1)
    y = qops.decode_attention(q, k.flip(2), v.flip(2), 1.0)
    assert abs(y.item() / (1e30 * math.exp(-86.5)) - 1) < 1e-6


FORMS = (
    {},
    {"window": 1},
    {"window": 3},
    {"window": 128},
    {"window": 131},
    {"window": 10**6},
    {"softcap": 30.0},
    {"window": 40, "softcap": 1.5},
    {"scale": -0.3},
)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bits_follow_the_contract(form, dtype):
    cases = zip((1, 2, 5, 8), ((9, 3), (4, 4), (8, 1), (14, 2)), (64, 7, 80, 16), (1, 129, 300, 141), strict=True)
    masks = (False,) if "window" in form else (False, True)
    for turn, ((t, heads, d, s), masked) in enumerate(itertools.product(cases, masks)):
        first = (0, 1, 5000)[(turn + FORMS.index(form) + FLOAT_DTYPES.index(dtype)) % 3]
        q, k, v = inputs(2, t, heads, s, d, dtype, seed=s)
        how = {**form, "first_position": first}
        if masked:
            how["mask"] = torch.rand(2, 1, t, s, generator=generator(s)) < 0.6
        y = check(q, k, v, f"T={t} S={s} from {first}", **how)
        assert_bitwise(y, exact(q, k, v, **how), f"T={t} S={s} from {first}")


@pytest.mark.parametrize("t", range(1, 9))
def test_tokens_together_or_one_after_another(t):
    for turn, (s, window) in enumerate(itertools.product((8, 128, 133, 300), (None, 2, 5, 140)), start=t):
        first = (0, 77, 123)[turn % 3]
        q, k, v = inputs(2, t, (6, 2), s, 48, seed=s)
        y = qops.decode_attention(q, k, v, window=window, first_position=first)
        for token in range(t):
            end = s - t + token + 1
            alone = q[:, token : token + 1], k[:, :, :end], v[:, :, :end]
            got = qops.decode_attention(*alone, window=window, first_position=first)
            assert_bitwise(got, y[:, token : token + 1], f"token {token} S={s} window={window}")
            if window is None or end <= window:
                continue
            # What no token attends to may have been dropped, or be anything.
            dropped = end - window
            part = alone[0], *(x[:, :, dropped:end] for x in (k, v))
            got = qops.decode_attention(*part, window=window, first_position=first + dropped)
            assert_bitwise(got, y[:, token : token + 1], "a sliding cache")


def test_positions_before_the_window_are_not_read():
    q, k, v = inputs(1, 3, s=400)
    y = qops.decode_attention(q, k, v, window=150)
    for x in (k, v):
        x[:, :, : 400 - 3 + 1 - 150] = NAN
    assert_bitwise(qops.decode_attention(q, k, v, window=150), y, "NaN before the window")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("bad", (NAN, INFINITY, -INFINITY))
def test_masked_rows_take_no_part(bad, dtype):
    for t, s in ((1, 200), (4, 300), (8, 129)):
        q, k, v = inputs(2, t, (6, 2), s, 80, dtype)
        mask = torch.rand(2, 1, 1, s, generator=generator(t)) < 0.5
        y = check(q, k, v, mask=mask)
        poisoned = [torch.where(mask.mT, x, bad) for x in (k, v)]
        assert_bitwise(qops.decode_attention(q, *poisoned, mask=mask), y, f"T={t}")
        for x in (k, v):
            x[:, :, s - t + 1 :] = bad  # of the future of token 0
        first = qops.decode_attention(q, k, v)[:, :1]
        end = s - t + 1
        alone = qops.decode_attention(q[:, :1], k[:, :, :end], v[:, :, :end])
        assert_bitwise(first, alone, "NaN in the future")


def test_masks():
    b, t, s = 3, 4, 140
    q, k, v = inputs(b, t, s=s)
    rng = generator(0)
    whole = torch.rand(b, 1, t, s, generator=rng) < 0.5
    padding = torch.arange(s).expand(b, 1, 1, s) >= torch.tensor([0, 130, 77]).view(b, 1, 1, 1)
    wide = torch.zeros(b, 1, t, 2 * s, dtype=torch.bool)
    wide[..., ::2] = whole
    choices = {
        "whole": whole,
        "of one token": whole[:, :, :1],
        "of one sequence": whole[:1],
        "[1, 1, 1, S]": whole[:1, :, 1:2],
        "expanded": whole[:1, :, :1].expand(b, 1, t, s),
        "strided": wide[..., ::2],
        "transposed": whole.mT.contiguous().mT,
        "left padding": padding,
    }
    for name, mask in choices.items():
        y = check(q, k, v, name, mask=mask)
        full = mask.expand(b, 1, t, s)
        assert_bitwise(y, exact(q, k, v, mask=full), name)


def test_a_mask_decides_alone():
    """Also about rows behind a token: those of drafted trees are not in the order of their positions."""
    t, s = 4, 140
    q, k, v = inputs(2, t, s=s)
    assert_bitwise(
        qops.decode_attention(q, k, v, mask=attended(t, s)[:, None]), qops.decode_attention(q, k, v), "the causal one"
    )
    assert_bitwise(
        qops.decode_attention(q, k, v, mask=attended(t, s, window=9)[:, None]),
        qops.decode_attention(q, k, v, window=9),
        "that of a window",
    )
    everything = qops.decode_attention(q, k, v, mask=torch.ones(1, 1, 1, s, dtype=torch.bool))
    for token in range(t):
        one = slice(token, token + 1)
        assert_bitwise(everything[:, one], qops.decode_attention(q[:, one], k, v), f"token {token} attends to all")
    # Two branches: rows 0 and 2 of the new ones, rows 1 and 3, each attending to its own and to what was before.
    branches = torch.zeros(1, 1, t, s, dtype=torch.bool)
    branches[..., : s - t] = True
    for token, attends_to in enumerate(((0,), (1,), (2, 0), (3, 1))):
        for row in attends_to:
            branches[..., token, s - t + row] = True
    y = check(q, k, v, mask=branches)
    for leaf, path in ((2, (0, 2)), (3, (1, 3))):
        rows = [*range(s - t), *(s - t + row for row in path)]
        alone = q[:, leaf : leaf + 1], k[:, :, rows], v[:, :, rows]
        assert_within(y[:, leaf : leaf + 1], decode_attention_ref(*alone), decode_attention_bound(*alone))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_rows_that_attend_to_nothing_are_zero(dtype):
    q, k, v = inputs(2, 3, s=150, dtype=dtype)
    mask = torch.ones(2, 1, 3, 150, dtype=torch.bool)
    mask[0, :, 1] = False
    y = check(q, k, v, mask=mask)
    assert bool((y[0, 1] == 0).all())
    assert bool((y[0, 0] != 0).any()) and bool((y[1, 1] != 0).any())
    nothing = qops.decode_attention(q, k * NAN, v * NAN, mask=torch.zeros_like(mask))
    assert_bitwise(nothing, torch.zeros_like(q), "nothing at all")


def test_nan_and_infinity_as_in_float64():
    base = inputs(1, 2, (4, 2), 260, 32, torch.float32)
    specials = (NAN, INFINITY, -INFINITY)
    for which, bad, position in itertools.product(range(3), specials, (0, 3, 130, 258, 259)):
        tensors = [x.clone() for x in base]
        if which == 0:
            tensors[0][0, position % 2, 1, 5] = bad
        else:
            tensors[which][0, 1, position, 5] = bad
        y = qops.decode_attention(*tensors)
        ref = decode_attention_ref(*tensors).float()
        assert torch.equal(y.isnan(), ref.isnan()), (which, bad, position)
        assert torch.equal(y.isinf(), ref.isinf()), (which, bad, position)
        assert torch.equal(y.sign().nan_to_num(), ref.sign().nan_to_num()) or y.isfinite().all()
        assert_bitwise(y, exact(*tensors), f"{which} {bad} {position}")
    # A vector of NaN, then one of NaN and of masked positions.
    q, k, v = inputs(1, 1, (2, 1), 19, 16, torch.float32)
    q[0, 0, 1, 3] = NAN
    y = qops.decode_attention(q, k, v)
    assert bool(y[0, 0, 1].isnan().all()) and bool(y[0, 0, 0].isfinite().all())
    # Scores of -infinity alone: in one chunk these weigh nothing, in all they are NaN.
    q, k, v = (x.clone() for x in inputs(1, 1, (1, 1), 260, 16, torch.float32))
    q[:] = 1
    k[:, :, :128] = -INFINITY
    assert_bitwise(
        qops.decode_attention(q, k, v),
        qops.decode_attention(q, k[:, :, 128:], v[:, :, 128:], first_position=128),
        "a chunk of -infinity",
    )
    k[:] = -INFINITY
    assert bool(qops.decode_attention(q, k, v).isnan().all())


def test_scores_and_sums_beyond_float32():
    big = torch.full((1, 1, 2, 16), 3e38)
    q = torch.full((1, 1, 1, 16), 3e38)
    assert bool(qops.decode_attention(q, big, torch.ones_like(big)).isnan().all())
    assert bool((qops.decode_attention(q, big, torch.ones_like(big), softcap=5.0) == 1).all())
    assert bool(qops.decode_attention(torch.zeros_like(q), big, big).isinf().all())


LAYOUTS = {
    "contiguous": lambda b, h, s, d, dtype: torch.empty(b, h, s, d, dtype=dtype),
    "of a cache with room": lambda b, h, s, d, dtype: torch.full((b, h, s + 37, d), NAN, dtype=dtype)[:, :, 3 : s + 3],
    "tokens before heads": lambda b, h, s, d, dtype: torch.empty(b, s, h, d, dtype=dtype).transpose(1, 2),
    "k and v in turn": lambda b, h, s, d, dtype: torch.full((b, h, s, 2 * d), NAN, dtype=dtype)[..., d:],
    "odd strides": lambda b, h, s, d, dtype: torch.full((h, b, s, d + 3), NAN, dtype=dtype).transpose(0, 1)[..., 1:-2],
    "backwards batch": lambda b, h, s, d, dtype: torch.full((2 * b, h, s, d), NAN, dtype=dtype)[::2],
}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype):
    for d, t in ((64, 1), (20, 3)):
        q, k, v = inputs(2, t, (6, 2), 200, d, dtype)
        y = check(q, k, v)
        views = [LAYOUTS[layout](*x.shape, dtype).copy_(x) for x in (k, v)]
        assert_bitwise(qops.decode_attention(q, *views), y, layout)
        wide = torch.full((2, t, 10, d + 4), NAN, dtype=dtype)
        wide[:, :, 2:8, 2:-2] = q
        assert_bitwise(qops.decode_attention(wide[:, :, 2:8, 2:-2], *views), y, "q of a merged qkv")
        assert_bitwise(qops.decode_attention(q.transpose(1, 2).contiguous().transpose(1, 2), *views), y, "q by heads")
    one = k[:1, :1, :1].expand_as(k)
    assert_bitwise(qops.decode_attention(q, one, v), qops.decode_attention(q, one.contiguous(), v), "expanded")


def test_offsets_beyond_32_bits(tmp_path):
    huge = 2**30 + 64
    file = tmp_path / "sparse"
    file.touch()
    storage = torch.from_file(str(file), shared=True, size=4 * huge, dtype=torch.bfloat16)
    q, k, v = inputs(2, 1, (2, 2), 2, 16)
    y = qops.decode_attention(q, k, v)
    for strides in ((2 * huge, 64, 16, 1), (64, 2 * huge, 16, 1), (64, 32, 2 * huge, 1)):
        far = storage.as_strided(k.shape, strides).copy_(k)
        assert_bitwise(qops.decode_attention(q, far, v), y, f"k {strides}")
        storage.as_strided(v.shape, strides).copy_(v)
        assert_bitwise(qops.decode_attention(q, k, far), y, f"v {strides}")


def test_threads_and_batches(threads):
    q, k, v = inputs(5, 2, (9, 3), 700, 64)
    threads(1)
    y = qops.decode_attention(q, k, v)
    for count in (2, 3):
        threads(count)
        assert_bitwise(qops.decode_attention(q, k, v), y, f"{count} threads")
    for b in range(5):
        one = slice(b, b + 1)
        assert_bitwise(qops.decode_attention(q[one], k[one], v[one]), y[one], f"sequence {b} alone")
    for head in range(3):
        one = slice(head, head + 1)
        got = qops.decode_attention(q[:, :, 3 * head : 3 * head + 3], k[:, one], v[:, one])
        assert_bitwise(got, y[:, :, 3 * head : 3 * head + 3], f"heads of {head} alone")


def test_empty_tensors():
    for b, t, heads, s, d in (
        (0, 1, (2, 1), 5, 8),
        (1, 0, (2, 1), 0, 8),
        (1, 1, (0, 0), 3, 8),
        (1, 1, (0, 2), 3, 8),
        (2, 3, (2, 1), 3, 0),
    ):
        q, k = torch.ones(b, t, heads[0], d), torch.ones(b, heads[1], s, d)
        assert qops.decode_attention(q, k, k).shape == q.shape


def test_torch_computes_the_same():
    q, k, v = inputs(2, 5, (8, 2), 300, 64, torch.float32)
    mask = attended(5, 300)[:, None]
    want = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(qops.decode_attention(q, k, v), want, rtol=1e-5, atol=1e-5)


Q, K = torch.ones(2, 3, 4, 16), torch.ones(2, 2, 7, 16)
MASK = torch.ones(2, 1, 3, 7, dtype=torch.bool)
ERRORS = {
    "q dtype": ((Q.double(), K, K), {}, RuntimeError, r"q must have dtype float32, float16 or bfloat16, got float64"),
    "k dtype": ((Q, K.half(), K), {}, RuntimeError, r"k must have the dtype of q = float32, got float16"),
    "v dtype": ((Q, K, K.half()), {}, RuntimeError, r"v must have the dtype of q = float32, got float16"),
    "q rank": ((Q[0], K, K), {}, ValueError, r"q must have 4 dimensions \[B, T, Hq, D\], got 3"),
    "k rank": ((Q, K[0], K), {}, ValueError, r"k must have 4 dimensions \[B, Hkv, S, D\], got 3"),
    "tokens": ((torch.ones(2, 9, 4, 16), K, K), {}, ValueError, r"q must have at most 8 tokens T, got 9"),
    "batch": (
        (Q[:1], K, K),
        {},
        ValueError,
        r"k must have shape \[B, Hkv, S, D\] with B = 1, D = 16, got \[2, 2, 7, 16\]",
    ),
    "heads": ((Q[:, :, :3], K, K), {}, ValueError, r"q must have a multiple of Hkv = 2 heads, got 3"),
    "no heads": ((Q, K[:, :0], K[:, :0]), {}, ValueError, r"q must have a multiple of Hkv = 0 heads, got 4"),
    "rows": ((Q, K[:, :, :2], K), {}, ValueError, r"k must have at least T = 3 rows, got 2"),
    "v shape": (
        (Q, K, K[:, :, 1:]),
        {},
        ValueError,
        r"v must have the shape of k = \[2, 2, 7, 16\], got \[2, 2, 6, 16\]",
    ),
    "q stride": ((Q.mT.contiguous().mT, K, K), {}, ValueError, r"q must have stride 1 in its last dimension, got 4"),
    "k stride": ((Q, K.mT.contiguous().mT, K), {}, ValueError, r"k must have stride 1 in its last dimension, got 7"),
    "v stride": ((Q, K, K.mT.contiguous().mT), {}, ValueError, r"v must have stride 1 in its last dimension, got 7"),
    "mask dtype": ((Q, K, K), {"mask": MASK.float()}, RuntimeError, r"mask must have dtype bool, got float32"),
    "mask rank": (
        (Q, K, K),
        {"mask": MASK[0]},
        ValueError,
        r"mask must have 4 dimensions \[B or 1, 1, T or 1, S\], got 3",
    ),
    "mask shape": (
        (Q, K, K),
        {"mask": MASK.expand(2, 4, 3, 7)},
        ValueError,
        r"mask must have shape \[B or 1, 1, T or 1, S\] = \[2 or 1, 1, 3 or 1, 7\], got \[2, 4, 3, 7\]",
    ),
    "mask rows": ((Q, K, K), {"mask": MASK[..., :1]}, ValueError, r"mask must have shape .*, got \[2, 1, 3, 1\]"),
    "scale": ((Q, K, K, NAN), {}, ValueError, r"scale must be a finite float32, got nan"),
    "large scale": ((Q, K, K, 1e39), {}, ValueError, r"scale must be a finite float32, got 1e\+39"),
    "window and mask": ((Q, K, K), {"mask": MASK, "window": 5}, ValueError, r"window must be 0 with a mask, got 5"),
    "window": ((Q, K, K), {"window": -1}, ValueError, r"window must lie in 0 \.\. 2\^62, got -1"),
    "softcap": (
        (Q, K, K),
        {"softcap": -1.0},
        ValueError,
        r"softcap must be a float32 that is finite and not negative, got -1",
    ),
    "first": ((Q, K, K), {"first_position": -3}, ValueError, r"first_position must lie in 0 \.\. 2\^62, got -3"),
    "out dtype": ((Q, K, K), {"out": Q.half()}, RuntimeError, r"out must have dtype float32, got float16"),
    "out shape": (
        (Q, K, K),
        {"out": Q[1:]},
        ValueError,
        r"out must have shape \[B, T, Hq, D\] = \[2, 3, 4, 16\], got \[1, 3, 4, 16\]",
    ),
    "out strides": ((Q, K, K), {"out": Q.mT.contiguous().mT}, ValueError, r"out must be contiguous, got strides"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_the_same_with_fake_tensors(case):
    args, kwargs, error, text = ERRORS[case]
    messages = []
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=rf"^qops\.decode_attention: {text}") as caught:
            there = {n: a.to(device) if isinstance(a, torch.Tensor) else a for n, a in kwargs.items()}
            qops.decode_attention(*(a.to(device) if isinstance(a, torch.Tensor) else a for a in args), **there)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_out_that_overlaps():
    q, k, v = inputs(1, 2, (2, 1), 16, 16)
    buffer = torch.zeros(2 * q.numel() + 2 * k.numel(), dtype=q.dtype)
    out = buffer[: q.numel()].view_as(q)
    for name in ("q", "k", "v"):
        tensors = {"q": q, "k": k, "v": v}
        tensors[name] = buffer[8 : 8 + tensors[name].numel()].view_as(tensors[name])
        with pytest.raises(ValueError, match=rf"decode_attention: out must lie apart from {name} in memory"):
            qops.decode_attention(**tensors, out=out)


def test_grad_is_refused():
    with torch.inference_mode(False), torch.enable_grad():
        tensors = [torch.ones(1, 1, 1, 8) for _ in range(3)]
        for index, name in enumerate("qkv"):
            args = [t.clone().requires_grad_(index == i) for i, t in enumerate(tensors)]
            for call in (qops.decode_attention, torch.ops.qops.decode_attention):
                with pytest.raises(RuntimeError, match=rf"qops\.decode_attention: {name} must not require grad"):
                    call(*args, 1.0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(dtype):
    with torch.inference_mode(False), torch.no_grad():
        q, k, v = inputs(2, 3, (4, 2), 20, 16, dtype)
        mask = torch.ones(1, 1, 3, 20, dtype=torch.bool)
        torch.library.opcheck(torch.ops.qops.decode_attention.default, (q, k, v, 0.25))
        torch.library.opcheck(torch.ops.qops.decode_attention.default, (q, k, v, 0.25, mask, 0, 2.0, 5))
        torch.library.opcheck(torch.ops.qops.decode_attention.default, (q, k, v, 0.25, None, 4, 2.0, 5))
        torch.library.opcheck(torch.ops.qops.decode_attention.out, (q, k, v, 0.25), {"out": torch.empty_like(q)})


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    torch._dynamo.reset()

    def block(q, k, v):
        y = qops.decode_attention(q, k, v)
        out = torch.empty_like(y)
        qops.decode_attention(q * 2, k, v, window=3, softcap=4.0, out=out)
        return torch.stack((y, out))

    torch.use_deterministic_algorithms(False)  # inductor does not know the poisoned torch.empty
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    for s in (20, 133):
        q, k, v = inputs(2, 3, (4, 2), s, 16)
        assert_bitwise(compiled(q, k, v), block(q, k, v), f"S = {s}")
