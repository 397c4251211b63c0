"""The cases of ``python -m qops check``, operator by operator.

They cross dtypes, kinds and forms with shapes that fill no tile: sizes that leave tails, and 1 to 130 rows. Results are
held against the contract bit for bit where it names every rounding, else within its bound of the float64 reference.
Fused forms equal the operators that they save, ``out=`` and in-place forms the plain one, and few rows the same rows
among many, bit for bit.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import qops
from qops import _layout
from qops._numerics import (
    FLOAT_DTYPES,
    assert_bitwise,
    assert_within,
    generator,
    random_activations,
    rms_norm_bound,
    rms_norm_exact,
    rotary_bound,
    rotary_exact,
    silu_mul_bound,
    weight_only_bound,
)
from qops.ops._checks import INT4_KINDS
from qops.ops.int4_gemm import int4_gemm_ref
from qops.ops.int8_weight_only_gemm import int8_weight_only_gemm_ref
from qops.ops.quantize_int8 import quantize_int8_asym_ref, quantize_int8_ref, quantize_int8_static_ref
from qops.ops.rms_norm import rms_norm_ref
from qops.ops.rotary import rotary_ref
from qops.ops.silu_mul import silu_mul_ref
from qops.weights import Int4Weight, Int8Weight
from qops.weights.rounding import add_rounding_to_odd

ROWS = (1, 3, 17, 65, 130)
EPS = 1e-5
RULES = ("127", "compressed-tensors", "torchao")
STYLES = (("hf", 0.0), ("fp32", 1.0))
# (N, K, G): one strip of rows and more, odd and even multiples of 8, blocks of 8 to 128 columns, tails of K.
WEIGHTS = ((8, 8, 8), (40, 144, 48), (48, 320, 32), (16, 520, 520))
# A GPU adds in another order, or packs in another layout.
OWN_BITS_ON_A_GPU = ("int4_gemm", "int4_pack", "int4_unpack", "int8_pack", "int8_unpack")
WITHOUT_CUDA_KERNEL = ("int8_weight_only_gemm",)

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


def _norms(run: Run) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """x, weight and style; H within, at and beyond a vector, and with more than one turn of the tree."""
    sizes = itertools.product(FLOAT_DTYPES, (1, 63, 576, 1100), STYLES)
    for index, (dtype, h, (rounding, offset)) in enumerate(sizes):
        weight_dtype = FLOAT_DTYPES[index % 3 - 1]
        run.begin(dtype, f"H = {h}", rounding, f"weight {weight_dtype}")
        weight = run.random(h, dtype=weight_dtype, outliers=False)
        yield run.random(ROWS[-1], h, dtype=dtype), weight, {"rounding": rounding, "weight_offset": offset}


def _rms_norm(run: Run) -> None:
    for x, weight, style in _norms(run):
        w = run.there(weight)
        (y,) = run.rows(partial(qops.rms_norm, weight=w, eps=EPS, **style), x)
        run.same(y, rms_norm_exact(x, weight, EPS, **style), "the contract's operations")
        offset, bound = style["weight_offset"], rms_norm_bound(x, weight, EPS, **style)
        run.within(y, rms_norm_ref(x, weight, EPS, weight_offset=offset, rounding="fp32"), bound)
        z = run.there(x).clone()
        run.same(qops.rms_norm(z, w, EPS, **style, out=z), y, "in place")


def _add_rms_norm(run: Run) -> None:
    for x, weight, style in _norms(run):
        w, residual = run.there(weight), run.random(*x.shape, dtype=x.dtype)
        z = x + residual
        results = run.rows(partial(qops.add_rms_norm, weight=w, eps=EPS, **style), x, residual)
        run.same(results, (rms_norm_exact(z, weight, EPS, **style), z), "x + residual, and rms_norm of it")
        a, b = run.there(x).clone(), run.there(residual).clone()
        run.same(qops.add_rms_norm(a, b, w, EPS, **style, out=(a, b)), results, "in place")


def _rms_norm_int8(run: Run) -> None:
    for index, (x, weight, style) in enumerate(_norms(run)):
        w, rule = run.there(weight), RULES[index % 3]
        results = run.rows(partial(qops.rms_norm_int8, weight=w, eps=EPS, rule=rule, **style), x)
        want = quantize_int8_ref(rms_norm_exact(x, weight, EPS, **style), rule)
        run.same(results, want, f"rms_norm, then quantize_int8 by {rule}")


def _add_rms_norm_int8(run: Run) -> None:
    for index, (x, weight, style) in enumerate(_norms(run)):
        w, rule, residual = run.there(weight), RULES[index % 3], run.random(*x.shape, dtype=x.dtype)
        z = x + residual
        results = run.rows(partial(qops.add_rms_norm_int8, weight=w, eps=EPS, rule=rule, **style), x, residual)
        want = (*quantize_int8_ref(rms_norm_exact(z, weight, EPS, **style), rule), z)
        run.same(results, want, f"x + residual, rms_norm, then quantize_int8 by {rule}")


def _activations(run: Run, *more: object) -> Iterator[tuple[Any, ...]]:
    """x of every dtype and some widths, for each combination of ``more``."""
    for dtype, k, *rest in itertools.product(FLOAT_DTYPES, (1, 63, 576), *more):  # pyright: ignore
        run.begin(dtype, f"K = {k}", *rest)
        yield run.random(ROWS[-1], k, dtype=dtype), *rest


def _quantize_int8(run: Run) -> None:
    for x, rule in _activations(run, RULES):
        results = run.rows(partial(qops.quantize_int8, rule=rule), x)
        run.same(results, quantize_int8_ref(x, rule), "the contract's operations")


def _quantize_int8_asym(run: Run) -> None:
    for (x,) in _activations(run):
        results = run.rows(qops.quantize_int8_asym, x)
        run.same(results, quantize_int8_asym_ref(x), "the contract's operations")


def _quantize_int8_static(run: Run) -> None:
    scale = torch.tensor(0.037)
    for x, zero_point in _activations(run, ("", -7)):
        zero = torch.tensor(zero_point, dtype=torch.int32) if zero_point else None
        static = {"scale": run.there(scale), "zero_point": run.there(zero)}
        results = run.rows(partial(qops.quantize_int8_static, **static), x)
        run.same(results, quantize_int8_static_ref(x, scale, zero), "the contract's operations")


def _silu_mul(run: Run) -> None:
    for x, rounding in _activations(run, ("hf", "fp32")):
        gate_up = torch.cat((x, run.random(*x.shape, dtype=x.dtype)), dim=-1)
        gate, up = gate_up.chunk(2, dim=-1)
        (y,) = run.rows(partial(qops.silu_mul, rounding=rounding), gate_up)
        apart = run.rows(partial(qops.silu_mul, rounding=rounding), gate, up)
        run.same(apart, y, "gate and up apart")
        bound = silu_mul_bound(gate, up, x.dtype, rounding=rounding)
        run.within(y, silu_mul_ref(gate, up, rounding="fp32"), bound)
        g, u = run.there(gate).clone(), run.there(up)
        run.same(qops.silu_mul(g, u, rounding=rounding, out=g), y, "in place")


def _silu_mul_int8(run: Run) -> None:
    for x, rounding, rule in _activations(run, ("hf", "fp32"), RULES):
        call = partial(qops.silu_mul_int8, rounding=rounding, rule=rule)
        gate_up = torch.cat((x, run.random(*x.shape, dtype=x.dtype)), dim=-1)
        results = run.rows(call, gate_up)
        run.same(run.rows(call, *gate_up.chunk(2, dim=-1)), results, "gate and up apart")
        y = qops.silu_mul(run.there(gate_up), rounding=rounding).cpu()
        run.same(results, quantize_int8_ref(y, rule), "silu_mul, then quantize_int8")


# Rotary --------------------------------------------------------------------------------------------------------------


def _heads(run: Run) -> Iterator[tuple[Tensor, dict[str, Any]]]:
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


def _turned(
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


def _rotary(run: Run, in_place: Callable[..., None] | None = None) -> None:
    for qkv, how in _heads(run):
        results = _turned(run, qops.rotary, in_place, qkv, **how)
        for y, x in zip(results, (qkv[:, :2], qkv[:, 2:3]), strict=True):
            run.same(y, rotary_exact(x, **how), "the contract's operations")
            run.within(y, rotary_ref(x, **how), rotary_bound(x, **how))


def _qk_norm_rotary(run: Run, in_place: Callable[..., None] | None = None) -> None:
    for index, (qkv, how) in enumerate(_heads(run)):
        rounding, offset = STYLES[index // 2 % 2]
        style = {"rounding": rounding, "weight_offset": offset}
        q_weight, k_weight = (
            run.random(qkv.shape[-1], dtype=FLOAT_DTYPES[(index + i) % 3], outliers=False) for i in range(2)
        )
        weights = {"q_weight": q_weight, "k_weight": k_weight, "eps": EPS}
        results = _turned(run, qops.qk_norm_rotary, in_place, qkv, **how, **weights, **style)
        parts = (qkv[:, :2], q_weight), (qkv[:, 2:3], k_weight)
        want = tuple(rotary_exact(rms_norm_exact(x, w, EPS, **style), **how) for x, w in parts)
        run.same(results, want, "rms_norm, then rotary")


# Matrix products -----------------------------------------------------------------------------------------------------


def _int4_weight(run: Run, n: int, k: int, g: int, kind: str, scale_dtype: torch.dtype, act_order: bool) -> Int4Weight:
    groups = (n, k // g)
    zeros = {
        "symmetric": lambda: None,
        "zero_point": lambda: run.integers(0, 17, *groups, dtype=torch.uint8),
        "float_zero": lambda: run.integers(0, 1 << 20, *groups, dtype=torch.int32) * (15 / 2**20),
        "offset": lambda: run.random(*groups, dtype=torch.float32, outliers=False) * 0.1,
    }[kind]()
    return Int4Weight.from_canonical(
        run.integers(0, 256, n, k // 2, dtype=torch.uint8),
        run.scales(*groups, dtype=scale_dtype),
        kind=kind,
        zeros=zeros,
        perm=run.integers(0, 1 << 40, k, dtype=torch.int64).argsort() if act_order else None,
    )


def _moved(run: Run, w: Any, mixed: bool = False) -> Any:
    """The weight on the device of the run."""
    there: dict[str, Any] = {key: run.there(t) for key, t in w.canonical().items()}
    if isinstance(w, Int4Weight):
        there["kind"] = w.kind
    moved = type(w).from_canonical(**there)
    return moved.mix_gate_up() if mixed else moved


def _int4_cases(run: Run) -> Iterator[tuple[Int4Weight, torch.dtype, int]]:
    dtypes = tuple(dtype for dtype in FLOAT_DTYPES if not run.gpu or dtype != torch.float32)
    for index, ((n, k, g), kind, dtype) in enumerate(itertools.product(WEIGHTS, INT4_KINDS, dtypes)):
        scale_dtype, act_order = FLOAT_DTYPES[index // 2 % 3], index % 5 == 0
        order = "act-order" if act_order else ""
        run.begin(dtype, f"N = {n}, K = {k}, G = {g}", kind, f"scales {scale_dtype}", order)
        yield _int4_weight(run, n, k, g, kind, scale_dtype, act_order), dtype, index


def _residual_last(*a: Tensor, product: Callable[..., Any], **more: Any) -> Any:
    return product(*a[:-1], residual=a[-1], **more)


def _epilogues(run: Run, product: Callable[..., Any], mixed: Callable[..., Any] | None, y: Tensor, *a: Tensor) -> None:
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


def _int4_gemm(run: Run) -> None:
    for w, dtype, index in _int4_cases(run):
        n, k = w.out_features, w.in_features
        x = run.random(ROWS[-1], k, dtype=dtype)
        bias = run.random(n, dtype=FLOAT_DTYPES[index % 3], outliers=False) if index % 2 else None
        # On a GPU another route may be taken for many rows.
        there, more = _moved(run, w), {"bias": run.there(bias), "batch_invariant": run.gpu}
        product = partial(qops.int4_gemm, weight=there, **more)
        (y,) = run.rows(product, x)
        ref = int4_gemm_ref(x, w, bias)
        run.within(y, ref, weight_only_bound(x, w, bias, gpu=run.gpu))
        if run.gpu:
            bound = weight_only_bound(x, w, bias, gpu=True, rounded_to=dtype)
            for m in ROWS:
                run.within(product(run.there(x[:m]), batch_invariant=False), ref[:m], bound[:m])
        mixed = partial(product, weight=_moved(run, w, mixed=True)) if n % 16 == 0 else None
        _epilogues(run, product, mixed, y, x)


def _int8_weight_only_gemm(run: Run) -> None:
    for index, ((n, k, g), dtype) in enumerate(itertools.product(WEIGHTS, FLOAT_DTYPES)):
        scale_dtype = FLOAT_DTYPES[index // 2 % 3]
        run.begin(dtype, f"N = {n}, K = {k}, G = {g}", f"scales {scale_dtype}")
        codes, scales = run.integers(-128, 128, n, k, dtype=torch.int8), run.scales(n, k // g, dtype=scale_dtype)
        w = Int8Weight.from_canonical(codes, scales)
        bias = run.random(n, dtype=FLOAT_DTYPES[index % 3], outliers=False) if index % 2 else None
        x = run.random(ROWS[-1], k, dtype=dtype)
        (y,) = run.rows(partial(qops.int8_weight_only_gemm, weight=_moved(run, w), bias=run.there(bias)), x)
        run.within(y, int8_weight_only_gemm_ref(x, w, bias), weight_only_bound(x, w, bias, gpu=run.gpu))


def _int8_gemm(run: Run) -> None:
    sizes = (*WEIGHTS, (80, 200, 200))  # more than a tile of 64 rows
    cases = itertools.product(sizes, (*FLOAT_DTYPES, torch.int32), (False, True))
    for index, ((n, k, _), dtype, asymmetric) in enumerate(cases):
        run.begin(dtype, f"N = {n}, K = {k}", "zero points" if asymmetric else "")
        codes, w_scale = run.integers(-128, 128, n, k, dtype=torch.int8), run.scales(n, 1)
        w = Int8Weight.from_canonical(codes, w_scale)
        q, scale = run.integers(-128, 128, ROWS[-1], k, dtype=torch.int8), run.scales(ROWS[-1])
        zero_point = (run.integers(-128, 128, ROWS[-1], dtype=torch.int32),) if asymmetric else ()
        has_bias = dtype != torch.int32 and index % 3 > 0
        bias = run.random(n, dtype=FLOAT_DTYPES[index % 3], outliers=False) if has_bias else None
        product = partial(_int8_product, weight=_moved(run, w), bias=run.there(bias), out_dtype=dtype)
        (y,) = run.rows(product, q, scale, *zero_point)
        run.same(y, _int8_gemm_exact(q, scale, zero_point, codes, w_scale, bias, dtype), "the contract's operations")
        if dtype != torch.int32:
            mixed = partial(product, weight=_moved(run, w, mixed=True)) if n % 16 == 0 else None
            _epilogues(run, product, mixed, y, q, scale, *zero_point)


def _int8_product(
    q: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, weight: Int8Weight, **more: Any
) -> Any:
    return qops.int8_gemm(q, scale, weight, zero_point=zero_point, **more)


def _int8_gemm_exact(
    q: Tensor,
    scale: Tensor,
    zero_point: tuple[Tensor, ...],
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The contract: integers in int64, float32 steps one by one."""
    x = q.long() - sum(z.long()[:, None] for z in zero_point)
    acc = (x @ codes.long().T).int()
    if dtype == torch.int32:
        return acc
    t = acc.float() * w_scale.view(-1)
    s = scale[:, None]
    # One rounding of s * t + bias: float64 holds the product, and a sum that was rounded to odd is rounded once.
    y = s * t if bias is None else add_rounding_to_odd(s.double() * t.double(), bias.double()).float()
    return y.to(dtype)


# Weights -------------------------------------------------------------------------------------------------------------


def _int4_dequantize(run: Run) -> None:
    for index, ((n, k, g), kind, dtype) in enumerate(itertools.product(WEIGHTS, INT4_KINDS, FLOAT_DTYPES)):
        run.begin(dtype, f"N = {n}, K = {k}, G = {g}", kind)
        w = _int4_weight(run, n, k, g, kind, FLOAT_DTYPES[index // 2 % 3], act_order=index % 5 == 0)
        dense = qops.int4_dequantize(_moved(run, w), dtype)
        run.keep(dense)
        run.same(dense, w.dequantize(dtype), "Int4Weight.dequantize")
        if n % 16 == 0:
            run.same(qops.int4_dequantize(_moved(run, w, mixed=True), dtype), dense, "gate and up mixed")


def _packing(bits: int) -> Callable[[Run], None]:
    def check(run: Run) -> None:
        pack, unpack = (getattr(torch.ops.qops, f"int{bits}_{name}").default for name in ("pack", "unpack"))
        for n, k, _ in WEIGHTS:
            run.begin(f"N = {n}, K = {k}")
            low, high, dtype = (0, 256, torch.uint8) if bits == 4 else (-128, 128, torch.int8)
            codes = run.integers(low, high, n, k * bits // 8, dtype=dtype)
            packed = pack(run.there(codes))
            run.keep(packed)
            run.same(unpack(packed, n)[:, : codes.shape[1]], codes, "what was packed, unpacked")

    return check


def _check_layout(run: Run) -> None:
    check, packed = torch.ops.qops.check_layout.default, run.there(torch.zeros(1, 1024, dtype=torch.uint8))
    here = _layout.layout_of(run.device)
    run.begin(f"layout {here}")
    check(packed, here)
    for other in ("cpu 0", "cuda 0", ""):
        run.begin(f"layout {other!r}")
        try:
            check(packed, other)
        except ValueError:
            continue
        raise AssertionError(f"another layout than {here!r} must be refused")


CHECKS: dict[str, Callable[[Run], None]] = {
    "add_rms_norm": _add_rms_norm,
    "add_rms_norm_int8": _add_rms_norm_int8,
    "check_layout": _check_layout,
    "int4_dequantize": _int4_dequantize,
    "int4_gemm": _int4_gemm,
    "int4_pack": _packing(4),
    "int4_unpack": _packing(4),
    "int8_gemm": _int8_gemm,
    "int8_pack": _packing(8),
    "int8_unpack": _packing(8),
    "int8_weight_only_gemm": _int8_weight_only_gemm,
    "qk_norm_rotary": _qk_norm_rotary,
    "qk_norm_rotary_": lambda run: _qk_norm_rotary(run, qops.qk_norm_rotary_),
    "quantize_int8": _quantize_int8,
    "quantize_int8_asym": _quantize_int8_asym,
    "quantize_int8_static": _quantize_int8_static,
    "rms_norm": _rms_norm,
    "rms_norm_int8": _rms_norm_int8,
    "rotary": _rotary,
    "rotary_": lambda run: _rotary(run, qops.rotary_),
    "silu_mul": _silu_mul,
    "silu_mul_int8": _silu_mul_int8,
}
