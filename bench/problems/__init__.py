"""What is computed: the inputs of every operator, made from a seed, and the exact results.

``make`` is a pure function of its arguments, so each process makes its own inputs and none are sent around. Another
seed gives other numbers everywhere: copies with equal contents would be merged by libraries that look for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.problems import models
from bench.problems.shared.draws import Random
from qops.ops.qk_norm_rotary import qk_norm_rotary_ref
from qops.ops.quantize_int8 import quantize_int8_asym_ref, quantize_int8_ref, quantize_int8_static_ref
from qops.ops.rms_norm import rms_norm_ref
from qops.ops.rotary import rotary_ref
from qops.ops.silu_mul import silu_mul_ref

Axes = Mapping[str, int | str]
Result = Tensor | tuple[Tensor, ...]

EPS = 1e-5
# A larger reference is computed at so many rows and columns alone: the first, the last and some between.
SAMPLE_FROM = 1 << 18
SAMPLED_ROWS, SAMPLED_COLUMNS = 48, 256


@dataclass(frozen=True)
class Int4Gemm:
    """``y[M, N] = x[M, K] @ w[N, K].T``; w as in ``qops.Int4Weight.from_canonical``.

    Codes are 0 ... 15, even k in the low nibble. By kind, w is ``s * (q - 8)`` ("symmetric"), ``s * (q - z)`` with z
    uint8 ("zero_point") or ``s * q + z`` with z float32 ("offset").
    """

    x: Tensor
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    kind: str


@dataclass(frozen=True)
class Int8WeightOnlyGemm:
    """``y[M, N] = x[M, K] @ w[N, K].T``, ``w = s * code`` with a scale for each row and group."""

    x: Tensor
    codes: Tensor
    scales: Tensor
    group_size: int


@dataclass(frozen=True)
class Int8Gemm:
    """``y[m, n] = scale[m] * w_scale[n] * sum_k q[m, k] * codes[n, k]`` in ``out_dtype``."""

    q: Tensor
    scale: Tensor
    codes: Tensor
    w_scale: Tensor
    out_dtype: torch.dtype


@dataclass(frozen=True)
class Norm:
    """RMSNorm of x [T, H], or of x + residual; with int8 results, quantised per token by rule 127."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Quantize:
    """x [T, K] to int8 by ``rule``: "127", "compressed-tensors", "torchao", "asym", "static" (with the last two)."""

    x: Tensor
    rule: str
    scale: Tensor | None
    zero_point: Tensor | None


@dataclass(frozen=True)
class Rotary:
    """q and k [T, heads, D] are slices of one qkv tensor; cos and sin [T, D/2] in their dtype, token t at row t."""

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float


@dataclass(frozen=True)
class SiluMul:
    """gate_up [T, 2 I], gate first; with int8 results, quantised per token by rule 127."""

    gate_up: Tensor


Problem = (
    Int4Gemm | Int8WeightOnlyGemm | Int8Gemm | Norm | Quantize | Rotary | SiluMul | models.Int8Layer | models.Int4Decode
)

WEIGHT_ONLY = ("int4_gemm", "int8_weight_only_gemm")
GEMMS = (*WEIGHT_ONLY, "int8_gemm")
DEQUANTIZERS = ("int4_dequantize",)
NORMS = ("rms_norm", "add_rms_norm", "rms_norm_int8", "add_rms_norm_int8")
QUANTIZERS = ("quantize_int8", "quantize_int8_asym", "quantize_int8_static")
# What a row's scale and zero point take.
SCALE_BYTES = {"quantize_int8": 4, "quantize_int8_asym": 8, "quantize_int8_static": 0}
ROTARIES = ("rotary", "qk_norm_rotary")
SILUS = ("silu_mul", "silu_mul_int8")
OPS = (*GEMMS, *DEQUANTIZERS, *NORMS, *QUANTIZERS, *ROTARIES, *SILUS, *models.OPS)


def dtype_of(axes: Axes) -> torch.dtype:
    return getattr(torch, str(axes["dtype"]))


def _sizes(axes: Axes, names: str) -> list[int]:
    return [int(axes[name]) for name in names.split()]


def make(op: str, axes: Axes, device: str = "cpu", seed: int = 0) -> Problem:
    """The inputs of one case."""
    rng, dtype = Random(device, seed), dtype_of(axes)
    if op in GEMMS:
        return _gemm(op, axes, rng, dtype)
    if op in DEQUANTIZERS:  # the weight of int4_gemm; x says the dtype of the result
        return _gemm("int4_gemm", {**axes, "M": 1}, rng, dtype)
    if op in NORMS:
        t, h = _sizes(axes, "T H")
        residual = rng.activations(t, h).to(dtype) if op.startswith("add_") else None
        return Norm(rng.activations(t, h).to(dtype), residual, rng.normal(h).to(dtype), EPS)
    if op in QUANTIZERS:
        x, static = rng.activations(*_sizes(axes, "T K")).to(dtype), op == "quantize_int8_static"
        scale = torch.tensor(0.05, device=device) if static else None
        zero_point = torch.tensor(3, dtype=torch.int32, device=device) if static else None
        return Quantize(x, str(axes["rule"]), scale, zero_point)
    if op in ROTARIES:
        return _rotary(op, axes, rng, dtype)
    if op in SILUS:
        t, columns = _sizes(axes, "T I")
        return SiluMul(rng.activations(t, 2 * columns).to(dtype))
    if op in models.OPS:
        return models.make(op, axes, rng, dtype)
    raise ValueError(f"no operator {op!r}; there are {', '.join(OPS)}")


def _gemm(op: str, axes: Axes, rng: Random, dtype: torch.dtype) -> Problem:
    """Weights are drawn first, so that they do not depend on M. They are of a size that gives results of about 1."""
    m, n, k = _sizes(axes, "M N K")
    if op == "int8_gemm":
        codes = rng.int8_codes(n, k)
        w_scale = rng.int8_scales(k, n)
        q = rng.int8_codes(m, k)
        return Int8Gemm(q, rng.uniform(0.01, 0.05, m), codes, w_scale, dtype)
    group = int(axes["G"])
    if op == "int8_weight_only_gemm":
        codes = rng.int8_codes(n, k)
        scales = rng.int8_scales(k, n, k // group).to(dtype)
        return Int8WeightOnlyGemm(rng.activations(m, k).to(dtype), codes, scales, group)
    kind = str(axes["kind"])
    qweight = rng.bytes(n, k // 2)
    scales = rng.int4_scales(k, n, k // group).to(dtype)
    zeros = None
    if kind == "zero_point":
        zeros = rng.uniform(6, 10, n, k // group).to(torch.uint8)
    elif kind == "offset":
        # A file stores them in 16 bits.
        zeros = (-scales.float() * rng.uniform(7, 8, n, k // group)).to(dtype).float()
    elif kind != "symmetric":
        raise ValueError(f"no kind {kind!r}")
    return Int4Gemm(rng.activations(m, k).to(dtype), qweight, scales, zeros, group, kind)


def _rotary(op: str, axes: Axes, rng: Random, dtype: torch.dtype) -> Rotary:
    t, q_heads, k_heads, d = _sizes(axes, "T Hq Hk D")
    q, k, _ = rng.activations(t, q_heads + 2 * k_heads, d).to(dtype).split((q_heads, k_heads, k_heads), dim=1)
    positions = torch.arange(t, device=rng.device)[:, None]
    angles = positions * 10000.0 ** (-torch.arange(0, d, 2, device=rng.device) / d)
    normed = op == "qk_norm_rotary"
    q_weight, k_weight = (rng.normal(d).to(dtype) if normed else None for _ in range(2))
    return Rotary(q, k, angles.cos().to(dtype), angles.sin().to(dtype), q_weight, k_weight, EPS)


def _places(size: int, limit: int) -> Tensor:
    """All indices, or the first and last quarters of ``limit`` and as many spread over what lies between."""
    if size <= limit:
        return torch.arange(size)
    edge = limit // 4
    middle = torch.linspace(edge, size - edge - 1, limit - 2 * edge).long()
    return torch.cat((torch.arange(edge), middle, torch.arange(size - edge, size)))


def _sampled(op: str, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Rows and columns where the reference is computed; only GEMMs leave out columns, as their outputs stand alone."""
    if op in DEQUANTIZERS:
        assert isinstance(problem, Int4Gemm)
        return _places(problem.scales.shape[0], SAMPLED_ROWS), None
    if isinstance(problem, Int4Gemm | Int8WeightOnlyGemm | Int8Gemm):
        a, w = (problem.q, problem.codes) if isinstance(problem, Int8Gemm) else (problem.x, problem.scales)
        m, n = a.shape[0], w.shape[0]
        if n * a.shape[1] <= SAMPLE_FROM and m * n <= SAMPLE_FROM:
            return torch.arange(m), torch.arange(n)
        return _places(m, SAMPLED_ROWS), _places(n, SAMPLED_COLUMNS)
    if isinstance(problem, models.Int8Layer | models.Int4Decode):
        return _places(problem.rows, SAMPLED_ROWS), None
    x = problem.gate_up if isinstance(problem, SiluMul) else problem.q if isinstance(problem, Rotary) else problem.x
    return _places(x.shape[0], SAMPLED_ROWS if x.numel() > SAMPLE_FROM else x.shape[0]), None


def sample(op: str, problem: Problem, outputs: Result) -> tuple[Tensor, ...]:
    """The part of an operator's results that ``reference`` gives, on the CPU. Other shapes are a ValueError."""
    rows, columns = _sampled(op, problem)
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    sizes = tuple(int(places[-1]) + 1 for places in (rows, columns) if places is not None)
    for tensor in tensors:
        if tensor.shape[: len(sizes)] != sizes:
            raise ValueError(f"wrong result: shape {tuple(tensor.shape)}, expected to start with {sizes}")
    taken = [tensor[rows.to(tensor.device)] for tensor in tensors]
    if columns is not None:
        taken = [tensor[:, columns.to(tensor.device)] for tensor in taken]
    return tuple(tensor.cpu() for tensor in taken)


def reference(op: str, problem: Problem) -> tuple[Tensor, ...]:
    """The exact results in float64, before any rounding; of a large problem at the rows and columns of ``sample``."""
    rows, columns = _sampled(op, problem)

    def at(tensor: Tensor, index: Tensor = rows) -> Tensor:
        return tensor[index.to(tensor.device)].cpu()

    if op in DEQUANTIZERS:
        assert isinstance(problem, Int4Gemm)
        return (dequantize(problem, rows).cpu(),)
    if isinstance(problem, models.Int8Layer | models.Int4Decode):
        return tuple(tensor.cpu() for tensor in problem.reference(rows.to(problem.device)))
    if isinstance(problem, Int8Gemm):
        assert columns is not None
        sums = at(problem.q).double() @ at(problem.codes, columns).double().T
        return (sums * at(problem.w_scale, columns).double() * at(problem.scale).double()[:, None],)
    if isinstance(problem, Int4Gemm | Int8WeightOnlyGemm):
        assert columns is not None
        return (at(problem.x).double() @ dequantize(problem, columns).cpu().T,)
    if isinstance(problem, Norm):
        z, weight = at(problem.x), problem.weight.cpu()
        if problem.residual is not None:
            z = z + at(problem.residual)
        y = rms_norm_ref(z, weight, problem.eps, rounding="fp32")
        results = _int8_rows(y) if op.endswith("_int8") else (y,)
        return (*results, z.double()) if problem.residual is not None else results
    if isinstance(problem, Quantize):
        return _quantized(at(problem.x), problem)
    if isinstance(problem, Rotary):
        cos, sin = at(problem.cos), at(problem.sin)
        positions = torch.arange(len(rows))
        if problem.q_weight is None or problem.k_weight is None:
            return tuple(rotary_ref(at(x), cos, sin, positions) for x in (problem.q, problem.k))
        heads = ((problem.q, problem.q_weight), (problem.k, problem.k_weight))
        return tuple(qk_norm_rotary_ref(at(x), w.cpu(), cos, sin, problem.eps, positions) for x, w in heads)
    gate, up = at(problem.gate_up).chunk(2, dim=-1)
    y = silu_mul_ref(gate, up, rounding="fp32")
    return _int8_rows(y) if op.endswith("_int8") else (y,)


def dequantize(
    problem: Int4Gemm | Int8WeightOnlyGemm, rows: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The weight ``[N, K]``, or the named rows of it, computed in ``dtype``: float64 is exact."""

    def at(tensor: Tensor) -> Tensor:
        return tensor if rows is None else tensor[rows.to(tensor.device)]

    scales = at(problem.scales).to(dtype)[..., None]
    if isinstance(problem, Int8WeightOnlyGemm):
        codes = at(problem.codes).to(dtype).view(*scales.shape[:2], problem.group_size)
        return (codes * scales).flatten(1)
    qweight = at(problem.qweight)
    codes = torch.stack((qweight & 15, qweight >> 4), dim=-1).to(dtype).view(*scales.shape[:2], problem.group_size)
    if problem.zeros is None:
        return (scales * (codes - 8)).flatten(1)
    zeros = at(problem.zeros).to(dtype)[..., None]
    weight = scales * codes + zeros if problem.kind == "offset" else scales * (codes - zeros)
    return weight.flatten(1)


def _int8_rows(y: Tensor) -> tuple[Tensor, Tensor]:
    """q before it is rounded to an integer, and scale."""
    scale = y.abs().amax(-1, keepdim=True) / 127
    return y / scale, scale.squeeze(-1)


def _quantized(x: Tensor, problem: Quantize) -> tuple[Tensor, ...]:
    if problem.rule == "static":
        assert problem.scale is not None
        zero_point = None if problem.zero_point is None else problem.zero_point.cpu()
        return (quantize_int8_static_ref(x, problem.scale.cpu(), zero_point).double(),)
    results = quantize_int8_asym_ref(x) if problem.rule == "asym" else quantize_int8_ref(x, problem.rule)
    return tuple(tensor.double() for tensor in results)


def bytes_and_flops(op: str, axes: Axes) -> tuple[int, int]:
    """What must be read and written at least, and the multiplications and additions."""
    if op in models.OPS:
        return models.bytes_and_flops(op, axes)
    size = dtype_of(axes).itemsize
    if op in GEMMS:
        m, n, k = _sizes(axes, "M N K")
        moved = m * n * size + weight_bytes(op, axes)
        return moved + (m * (k + 4) if op == "int8_gemm" else m * k * size), 2 * m * n * k
    if op in DEQUANTIZERS:
        n, k = _sizes(axes, "N K")
        return weight_bytes("int4_gemm", axes) + n * k * size, 2 * n * k
    if op in NORMS:
        t, h = _sizes(axes, "T H")
        added, quantized = op.startswith("add_"), op.endswith("_int8")
        row = h * size * (3 if added else 1) + (h + 4 if quantized else h * size)
        return t * row + h * size, t * h * (4 + added + 3 * quantized)
    if op in QUANTIZERS:
        t, k = _sizes(axes, "T K")
        return t * (k * (size + 1) + SCALE_BYTES[op]), 3 * t * k
    if op in ROTARIES:
        t, q_heads, k_heads, d = _sizes(axes, "T Hq Hk D")
        elements = t * (q_heads + k_heads) * d
        return (2 * elements + t * d) * size, elements * (7 if op == "qk_norm_rotary" else 3)
    t, columns = _sizes(axes, "T I")
    outputs = t * columns
    if op == "silu_mul_int8":
        return outputs * (2 * size + 1) + 4 * t, 8 * outputs
    return 3 * outputs * size, 5 * outputs


def written_bytes(op: str, axes: Axes) -> int:
    """The part of the bytes that are results."""
    if op in models.OPS:
        return models.written_bytes(op, axes)
    size = dtype_of(axes).itemsize
    if op in GEMMS:
        m, n = _sizes(axes, "M N")
        return m * n * size
    if op in DEQUANTIZERS:
        n, k = _sizes(axes, "N K")
        return n * k * size
    if op in NORMS:
        t, h = _sizes(axes, "T H")
        return t * ((h + 4 if op.endswith("_int8") else h * size) + (h * size if op.startswith("add_") else 0))
    if op in QUANTIZERS:
        t, k = _sizes(axes, "T K")
        return t * (k + SCALE_BYTES[op])
    if op in ROTARIES:
        t, q_heads, k_heads, d = _sizes(axes, "T Hq Hk D")
        return t * (q_heads + k_heads) * d * size
    t, columns = _sizes(axes, "T I")
    return t * (columns + 4 if op == "silu_mul_int8" else columns * size)


def weight_bytes(op: str, axes: Axes, bits: int | None = None) -> int:
    """Of quantised weights as the problem stores them, or dense with so many bits a value; 0 for other operators."""
    if op in models.OPS:
        return models.weight_bytes(op, axes, bits)
    if op not in GEMMS:
        return 0
    n, k = _sizes(axes, "N K")
    if bits is not None:
        return n * k * bits // 8
    if op == "int8_gemm":
        return n * k + 4 * n
    groups = n * (k // int(axes["G"]))
    if op == "int8_weight_only_gemm":
        return n * k + groups * dtype_of(axes).itemsize
    zeros = {"symmetric": 0, "zero_point": 1, "offset": 4}[str(axes["kind"])]
    return n * k // 2 + groups * (dtype_of(axes).itemsize + zeros)
