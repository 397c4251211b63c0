"""What the cases of ``python -m qops check`` share; those of an operator stand in its file, ``cases_of_<op>``.

They cross dtypes, kinds and forms with shapes that fill no tile: sizes that leave tails, and 1 to 130 rows. Results are
held against the contract bit for bit where it names every rounding, else within its bound of the float64 reference.
Fused forms equal the operators that they save, ``out=`` and in-place forms the plain one, and few rows the same rows
among many, bit for bit.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import qops
from qops import _layout, ops
from qops._numerics import (
    FLOAT_DTYPES,
    assert_bitwise,
    assert_within,
    generator,
    random_activations,
)
from qops.ops._checks import INT4_KINDS
from qops.ops.decoder_block import ASYMMETRIC, INPUTS, linear_arguments
from qops.ops.quantize_int8 import quantize_int8_static_ref
from qops.weights import Int4Weight, Int8Weight

ROWS = (1, 3, 17, 65, 130)
EPS = 1e-5
STYLES = (("hf", 0.0), ("fp32", 1.0))
# (N, K, G): one strip of rows and more, odd and even multiples of 8, blocks of 8 to 128 columns, tails of K.
WEIGHTS = ((8, 8, 8), (40, 144, 48), (48, 320, 32), (16, 520, 520))
# A GPU adds in another order, or packs in another layout.
OWN_BITS_ON_A_GPU = (
    *("int4_gemm", "int8_weight_only_gemm"),
    *("int4_pack", "int4_unpack", "int8_pack", "int8_unpack"),
)

Results = tuple[Tensor, ...]


class Run:
    """The cases of an operator on a device: draws their inputs, and compares.

    Attributes:
        case: the last that has begun.
        digests: of the results of each case.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.gpu = device, _layout.has_gpu_layout(device)
        self.case, self.digests = "before the first case", dict[str, str]()
        self._seed, self._hash = 100_000 * seed, hashlib.blake2b()

    def begin(self, *parts: object) -> None:
        self.case = ", ".join(str(part).replace("torch.", "") for part in parts if part != "")
        assert self.case not in self.digests, "another case has this name"
        self._hash = hashlib.blake2b(digest_size=8)
        self.digests[self.case] = ""

    def random(self, *shape: int, dtype: torch.dtype, outliers: bool = True) -> Tensor:
        self._seed += 1
        return random_activations(*shape, dtype=dtype, seed=self._seed, outliers=outliers)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """low ... high - 1"""
        self._seed += 1
        return torch.randint(low, high, shape, dtype=dtype, generator=generator(self._seed))

    def scales(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        self._seed += 1
        return (torch.rand(shape, generator=generator(self._seed)) * 0.02 + 1e-3).to(dtype)

    def there(self, t: Tensor | None) -> Any:
        return None if t is None else t.to(self.device)

    def rows(self, call: Callable[..., Any], *inputs: Tensor, out: bool = True) -> Results:
        """The results of all rows of the inputs, on the CPU; every other form of the call must give the same."""
        tensors = tuple(self.there(t) for t in inputs)
        whole = _tupled(call(*tensors))
        self.keep(*whole)
        for m in ROWS[:-1]:
            self.same(call(*(t[:m] for t in tensors)), tuple(t[:m] for t in whole), f"{m} of {len(tensors[0])} rows")
        self.same(call(*map(_apart, tensors)), whole, "rows that lie apart")
        if out:
            given = tuple(torch.full_like(t, 77) for t in whole)
            call(*tensors, out=given[0] if len(given) == 1 else given)
            self.same(given, whole, "out=")
        return tuple(t.cpu() for t in whole)

    def keep(self, *results: Tensor) -> None:
        """Results that must be the same at every level."""
        for t in results:
            here = t.cpu().contiguous()
            self._hash.update(ctypes.string_at(here.data_ptr(), here.nbytes))
        self.digests[self.case] = self._hash.hexdigest()

    def same(self, got: Any, want: Any, what: str) -> None:
        for index, (a, b) in enumerate(zip(_tupled(got), _tupled(want), strict=True)):
            name = what if index == 0 else f"{what}, result {index}"
            assert_bitwise(a.cpu().contiguous(), b.cpu().contiguous(), name)

    def within(self, got: Tensor, ref: Tensor, bound: Tensor) -> None:
        assert_within(got.cpu(), ref, bound, "against float64")


def _tupled(results: Any) -> Results:
    return results if isinstance(results, tuple) else (results,)


def _apart(t: Tensor) -> Tensor:
    """The same values as a view that begins anywhere and whose rows lie apart."""
    between = float("nan") if t.is_floating_point() else 77
    return torch.nn.functional.pad(t, (4, 4), value=between)[..., 4:-4]


# Norms, quantisers, SiLU-mul -----------------------------------------------------------------------------------------


def norms(run: Run) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """x, weight and style; H within, at and beyond a vector, and with more than one turn of the tree."""
    sizes = itertools.product(FLOAT_DTYPES, (1, 63, 576, 1100), STYLES)
    for index, (dtype, h, (rounding, offset)) in enumerate(sizes):
        weight_dtype = FLOAT_DTYPES[index % 3 - 1]
        run.begin(dtype, f"H = {h}", rounding, f"weight {weight_dtype}")
        weight = run.random(h, dtype=weight_dtype, outliers=False)
        yield run.random(ROWS[-1], h, dtype=dtype), weight, {"rounding": rounding, "weight_offset": offset}


def activations(run: Run, *more: object) -> Iterator[tuple[Any, ...]]:
    """x of every dtype and some widths, for each combination of ``more``."""
    for dtype, k, *rest in itertools.product(FLOAT_DTYPES, (1, 63, 576), *more):  # pyright: ignore
        run.begin(dtype, f"K = {k}", *rest)
        yield run.random(ROWS[-1], k, dtype=dtype), *rest


# Rotary --------------------------------------------------------------------------------------------------------------


def heads(run: Run) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """qkv [T, 2 + 1 + 1, D], and the other arguments of rotary: whole, partial and odd heads."""
    forms = itertools.product(FLOAT_DTYPES, ((64, 64), (80, 32), (7, 6)), (False, True))
    for index, (dtype, (d, r), interleaved) in enumerate(forms):
        table_dtype, positions_dtype = (
            (torch.float32, dtype)[index // 2 % 2],
            (None, torch.int32, torch.int64)[index % 3],
        )
        form, given = "interleaved" if interleaved else "halves", f"positions {positions_dtype}"
        run.begin(dtype, f"D = {d}, R = {r}", form, f"tables {table_dtype}", given)
        angles = torch.arange(2 * ROWS[-1])[:, None] / 1e4 ** (torch.arange(0, r, 2) / r)
        how: dict[str, Any] = {"cos": angles.cos().to(table_dtype), "sin": angles.sin().to(table_dtype)}
        how |= {"positions": None, "interleaved": interleaved}
        if positions_dtype is not None:
            how["positions"] = run.integers(0, 2 * ROWS[-1], ROWS[-1], dtype=positions_dtype)
        yield run.random(ROWS[-1], 4, d, dtype=dtype), how


def _at(q: Tensor, k: Tensor, positions: Tensor | None = None, *, op: Callable[..., Any], **more: Any) -> Any:
    return op(q, k, positions=positions, **more)


def turned(
    run: Run, op: Callable[..., Results], op_: Callable[..., None] | None, qkv: Tensor, positions: Any, **more: Any
) -> Results:
    """q and k by ``op``, or by its form in place, which must leave v alone."""
    more = {name: run.there(value) if isinstance(value, Tensor) else value for name, value in more.items()}
    q, k = qkv[:, :2], qkv[:, 2:3]
    if op_ is None:
        given = () if positions is None else (positions,)
        return run.rows(partial(_at, op=op, **more), q, k, *given, out=False)
    for m in reversed(ROWS):
        turned, place = run.there(qkv[:m]).clone(), None if positions is None else run.there(positions[:m])
        op_(turned[:, :2], turned[:, 2:3], positions=place, **more)
        run.same(turned[:, 3:], qkv[:m, 3:], f"what lies behind k, {m} rows")
        if m == ROWS[-1]:
            run.keep(turned)
            q, k = turned[:, :2].cpu(), turned[:, 2:3].cpu()
        run.same((turned[:, :2], turned[:, 2:3]), (q[:m], k[:m]), f"{m} of {ROWS[-1]} rows")
    return q, k


# Attention -----------------------------------------------------------------------------------------------------------


def caches(run: Run) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Any]]]:
    """q, k, v and what else decode_attention takes: one to many chunks, groups of heads, tails of D."""
    shapes = ((1, 9, 3, 64, 1), (ROWS[-1], 2, 1, 16, 3), (2, 4, 1, 80, 129), (1, 8, 8, 16, 300), (1, 7, 1, 7, 500))
    forms: tuple[dict[str, Any], ...] = ({}, {"window": 5}, {"window": 130, "softcap": 2.0}, {"mask": None})
    for index, (dtype, (batch, q_heads, kv_heads, d, s), form) in enumerate(
        itertools.product(FLOAT_DTYPES, shapes, forms)
    ):
        tokens = min((1, 3, 8)[index % 3], s)
        run.begin(dtype, f"B = {batch}, T = {tokens}, heads {q_heads} / {kv_heads}, D = {d}, S = {s}", *form)
        q = run.random(batch, tokens, q_heads, d, dtype=dtype, outliers=False)
        k, v = (run.random(batch, kv_heads, s, d, dtype=dtype, outliers=False) for _ in range(2))
        how = dict(form)
        if "mask" in form:
            how["mask"] = run.integers(0, 3, batch, 1, tokens, s, dtype=torch.int64) > 0
        yield q, k, v, how


# Blocks --------------------------------------------------------------------------------------------------------------


def blocks(run: Run) -> Iterator[tuple[torch.dtype, dict[str, Any], Callable[..., Any], str]]:
    """dtype, how the norms round, what draws a weight [N, K] of each width and kind of this case, and its input."""
    widths = [(4, kind, "float") for kind in INT4_KINDS] + [(8, kind, "float") for kind in ("symmetric", "offset")]
    widths += [(4, "zero_point", "127"), (4, "offset", "torchao")] + [(8, "symmetric", given) for given in INPUTS[1:]]
    for index, ((bits, kind, given), dtype) in enumerate(itertools.product(widths, FLOAT_DTYPES)):
        rounding, offset = STYLES[index % 2]
        run.begin(dtype, f"{bits} bits", kind, rounding, f"x {given}")
        whole = bits == 8 and given != "float"

        def weight(
            n: int,
            k: int,
            bits: int = bits,
            kind: str = kind,
            whole: bool = whole,
            act_order: bool = index % 5 == 0 and not whole,
        ) -> Any:
            make = int4_weight if bits == 4 else int8_weight
            return make(run, n, k, k if whole else 16, kind, torch.float16, act_order)

        yield dtype, {"eps": EPS, "rounding": rounding, "weight_offset": offset}, weight, given


def block_product(x: Tensor, weight: Any, bias: Tensor | None, given: str) -> Tensor:
    """x @ w.T + bias by the operator for that input."""
    has_4_bits, points = type(weight).__name__ == "Int4Weight", None
    if given == "float":
        return (ops.int4_gemm if has_4_bits else ops.int8_weight_only_gemm)(x, weight, bias)
    if INPUTS.index(given) < ASYMMETRIC:
        q, scale = ops.quantize_int8(x, given)
    else:
        q, scale, points = ops.quantize_int8_asym(x, given.removesuffix("-asymmetric"))
    if has_4_bits:
        return ops.int4_int8_gemm(q, scale, weight, bias, out_dtype=x.dtype)
    return ops.int8_gemm(q, scale, weight, bias, zero_point=points, out_dtype=x.dtype)


def mlp_chain(
    x: Tensor, norm: Tensor, post_norm: Tensor | None, weights: Any, biases: Any, style: dict[str, Any], given: str
) -> Tensor:
    """mlp_block of linears with one kind of input, operator by operator."""
    y = ops.silu_mul(block_product(ops.rms_norm(x, norm, **style), weights[0], biases[0], given))
    y = block_product(y, weights[1], biases[1], given)
    return x + (y if post_norm is None else ops.rms_norm(y, post_norm, **style))


def layer_parts(
    run: Run,
    dtype: torch.dtype,
    norms: dict[str, int],
    shapes: dict[str, tuple[int, int]],
    weight: Callable[..., Any],
    given: str,
) -> dict[str, Any]:
    """Norms and linears of a layer as arguments of decoder_layers, gate and up mixed."""
    parts: dict[str, Any] = {name: run.there(run.random(n, dtype=dtype, outliers=False)) for name, n in norms.items()}
    for name, shape in shapes.items():
        made = moved(run, weight(*shape), mixed=name == "gate_up")
        linear = linear_arguments("decoder_layers", name, made, None, given, may_be_mixed=True)
        arguments = ("", "_scales", "_zeros", "_perm", "_bias", "_kind", "_input")
        parts |= dict(zip((name + of for of in arguments), linear, strict=True))
    return parts


# Matrix products -----------------------------------------------------------------------------------------------------


def int4_weight(run: Run, n: int, k: int, g: int, kind: str, scale_dtype: torch.dtype, act_order: bool) -> Int4Weight:
    groups = (n, k // g)
    zeros = {
        "symmetric": lambda: None,
        "zero_point": lambda: run.integers(0, 17, *groups, dtype=torch.uint8),
        "float_zero": lambda: run.integers(0, 1 << 20, *groups, dtype=torch.int32) * (15 / 2**20),
        "offset": lambda: (run.random(*groups, dtype=torch.float32, outliers=False) * 0.1).to(scale_dtype),
    }[kind]()
    return Int4Weight.from_canonical(
        run.integers(0, 256, n, k // 2, dtype=torch.uint8),
        run.scales(*groups, dtype=scale_dtype),
        kind=kind,
        zeros=zeros,
        perm=run.integers(0, 1 << 40, k, dtype=torch.int64).argsort() if act_order else None,
    )


def moved(run: Run, w: Any, mixed: bool = False) -> Any:
    """The weight on the device of the run."""
    there = {key: run.there(t) for key, t in w.canonical().items()}
    moved = type(w).from_canonical(**there, kind=w.kind)
    return moved.mix_gate_up() if mixed else moved


def int4_cases(run: Run, dtypes: Sequence[torch.dtype]) -> Iterator[tuple[Int4Weight, torch.dtype, int]]:
    for index, ((n, k, g), kind, dtype) in enumerate(itertools.product(WEIGHTS, INT4_KINDS, dtypes)):
        scale_dtype, act_order = FLOAT_DTYPES[index // 2 % 3], index % 5 == 0
        order = "act-order" if act_order else ""
        run.begin(dtype, f"N = {n}, K = {k}, G = {g}", kind, f"scales {scale_dtype}", order)
        yield int4_weight(run, n, k, g, kind, scale_dtype, act_order), dtype, index
    for (index, kind), dtype in itertools.product(enumerate(("symmetric", "offset")), dtypes):
        n, k, g = 48, 512, 32
        run.begin(dtype, f"N = {n}, K = {k}, G = {g}", kind, "scales of two levels", "")
        yield two_level_weight(run, n, k, g, kind), dtype, index


def two_level_weight(run: Run, n: int, k: int, g: int, kind: str) -> Int4Weight:
    def levels() -> Tensor:
        blocks = (n, k // _layout.SUPER_COLUMNS)
        codes = run.integers(-32, 64, *blocks, _layout.SUPER_COLUMNS // g, dtype=_layout.LEVELS_DTYPE)
        return _layout.with_levels(run.scales(*blocks, dtype=torch.float16) / 64, codes)

    qweight = run.integers(0, 256, n, k // 2, dtype=torch.uint8)
    return Int4Weight.from_canonical(qweight, levels(), kind=kind, zeros=levels() if kind == "offset" else None)


def int8_weight(run: Run, n: int, k: int, g: int, kind: str, scale_dtype: torch.dtype, act_order: bool) -> Int8Weight:
    groups = (n, k // g)
    return Int8Weight.from_canonical(
        run.integers(-128, 128, n, k, dtype=torch.int8),
        run.scales(*groups, dtype=scale_dtype),
        kind=kind,
        zeros=run.random(*groups, dtype=scale_dtype, outliers=False) if kind == "offset" else None,
        perm=run.integers(0, 1 << 40, k, dtype=torch.int64).argsort() if act_order else None,
    )


def int8_cases(run: Run) -> Iterator[tuple[Int8Weight, torch.dtype, int]]:
    for index, ((n, k, g), kind, dtype) in enumerate(itertools.product(WEIGHTS, Int8Weight.KINDS, FLOAT_DTYPES)):
        scale_dtype, act_order = FLOAT_DTYPES[index // 2 % 3], index % 5 == 0
        order = "act-order" if act_order else ""
        run.begin(dtype, f"N = {n}, K = {k}, G = {g}", kind, f"scales {scale_dtype}", order)
        yield int8_weight(run, n, k, g, kind, scale_dtype, act_order), dtype, index


def _residual_last(*a: Tensor, product: Callable[..., Any], **more: Any) -> Any:
    return product(*a[:-1], residual=a[-1], **more)


def epilogues(run: Run, product: Callable[..., Any], mixed: Callable[..., Any] | None, y: Tensor, *a: Tensor) -> None:
    """``product(*a, residual=...)`` and so on against the operators that follow ``y = product(*a)``."""
    residual = run.random(*y.shape, dtype=y.dtype)
    added = run.rows(partial(_residual_last, product=product), *a, residual)
    run.same(added, y + residual, "residual")
    r = run.there(residual).clone()
    run.same(product(*map(run.there, a), residual=r, out=r), added, "residual in place")
    scale, zero_point = torch.tensor(0.05), torch.tensor(-7, dtype=torch.int32)
    static = {"out_scale": run.there(scale), "out_zero_point": run.there(zero_point)}
    codes = run.rows(partial(product, **static), *a)
    run.same(codes, quantize_int8_static_ref(y, scale, zero_point), "out_scale and out_zero_point")
    codes = product(*map(run.there, a), out_scale=static["out_scale"])
    run.same(codes, quantize_int8_static_ref(y, scale), "out_scale")
    if mixed is not None:
        activated = run.rows(partial(mixed, silu_mul=True), *a)
        run.same(activated, qops.silu_mul(run.there(y)), "silu_mul")


def checks() -> dict[str, Callable[[Run], None]]:
    """Operator -> its cases: ``cases_of_<op>`` in the operator's file."""
    modules = (importlib.import_module(f"qops.ops.{found.name}") for found in pkgutil.iter_modules(ops.__path__))
    found = {name: function for module in modules for name, function in vars(module).items()}
    return {name.removeprefix("cases_of_"): found[name] for name in sorted(found) if name.startswith("cases_of_")}


CHECKS = checks()
