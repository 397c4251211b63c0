"""int4_pack, int4_unpack, int8_pack, int8_unpack, int8_embedding, check_layout: fake kernels of what weights call.

The layouts stand in csrc/cpu/weight_pack.cpp, for a GPU in csrc/int4_layout.h and csrc/int8_layout.h. A GPU's pads K
to a multiple of 64, and unpacking gives the columns of padding too. These ops have no public wrapper: Int4Weight and
Int8Weight call them. check_layout stands in exported models alone, before each use of a packed weight. int8_embedding
is Int8Weight.rows() on a CPU, but for the order of columns.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from qops import _native as _native
from qops._layout import STRIP_ROWS, column_step, layout_of, stored_columns, strips_of
from qops.ops._checks import (
    FLOAT_DTYPES,
    INT4_KINDS,
    Checker,
    Results,
    check_packed_weight,
    check_zeros,
    fake,
)

if TYPE_CHECKING:
    from qops._check_cases import Run

# It has no result, for which a graph would drop it.
has_side_effect(torch.ops.qops.check_layout.default)


def cases_of_check_layout(run: Run) -> None:
    check, packed = torch.ops.qops.check_layout.default, run.there(torch.zeros(1, 1024, dtype=torch.uint8))
    here = layout_of(run.device)
    run.begin(f"layout {here}")
    check(packed, here)
    for other in ("cpu 0", "cuda 0", ""):
        run.begin(f"layout {other!r}")
        try:
            check(packed, other)
        except ValueError:
            continue
        raise AssertionError(f"another layout than {here!r} must be refused")


def _cases(run: Run, bits: int) -> None:
    from qops._check_cases import WEIGHTS

    pack, unpack = (getattr(torch.ops.qops, f"int{bits}_{name}").default for name in ("pack", "unpack"))
    for n, k, _ in WEIGHTS:
        run.begin(f"N = {n}, K = {k}")
        low, high, dtype = (0, 256, torch.uint8) if bits == 4 else (-128, 128, torch.int8)
        codes = run.integers(low, high, n, k * bits // 8, dtype=dtype)
        packed = pack(run.there(codes))
        run.keep(packed)
        run.same(unpack(packed, n)[:, : codes.shape[1]], codes, "what was packed, unpacked")


def cases_of_int4_pack(run: Run) -> None:
    _cases(run, 4)


def cases_of_int8_pack(run: Run) -> None:
    _cases(run, 8)


cases_of_int4_unpack, cases_of_int8_unpack = cases_of_int4_pack, cases_of_int8_pack


def cases_of_int8_embedding(run: Run) -> None:
    from qops._check_cases import ROWS, int8_cases, moved

    for w, dtype, index in int8_cases(run):
        n, mixed = w.out_features, index % 2 == 0 and w.out_features % 16 == 0
        ids = run.integers(0, n, ROWS[-1], dtype=(torch.int32, torch.int64)[index % 2])
        buffers = moved(run, w, mixed)._buffers
        weight = {name: buffers[name] for name in ("packed", "scales", "zeros")}
        config = {"out_features": n, "group_size": w.group_size, "dtype": dtype, "mixed_gate_up": mixed}
        (rows,) = run.rows(partial(torch.ops.qops.int8_embedding.default, **weight, **config), ids, out=False)
        want = w.dequantize(dtype)[ids.long()]
        run.same(rows, want if w.perm is None else want[:, w.perm.long()], "rows of Int8Weight.dequantize")


@fake("int4_pack", "int8_pack")
def _(check: Checker, qweight: Tensor) -> Results:
    dtype, codes = (torch.uint8, 2) if check.op == "int4_pack" else (torch.int8, 1)
    check.dtype(qweight, "qweight", dtype)
    check.require(qweight.dim() == 2, "qweight", "have 2 dimensions", lambda: str(qweight.dim()))
    n, elements = qweight.shape
    check.require(n % 8 == 0, "qweight", "have a multiple of 8 rows", lambda: str(n))
    check.require(elements < 1 << 58, "qweight", "have fewer than 2^58 elements in a row", lambda: str(elements))
    k = elements * codes
    check.require(k % 8 == 0, "qweight", "have a multiple of 8 columns", lambda: str(k))
    check.contiguous(qweight, "qweight")
    return check.new_empty(qweight, (strips_of(n), stored_columns(k, qweight.device) // codes * STRIP_ROWS))


@fake("int4_unpack", "int8_unpack")
def _(check: Checker, packed: Tensor, out_features: int) -> Results:
    dtype, codes = (torch.uint8, 2) if check.op == "int4_unpack" else (torch.int8, 1)
    check.dtype(packed, "packed", dtype)
    check.require(packed.dim() == 2, "packed", "have 2 dimensions", lambda: str(packed.dim()))
    ok = out_features >= 0 and out_features % 8 == 0
    check.require(ok, "out_features", "be a multiple of 8", lambda: str(out_features))
    strips = strips_of(out_features)
    requirement = f"have ceil(out_features / 16) = {strips} strips"
    check.require(packed.shape[0] == strips, "packed", requirement, lambda: str(packed.shape[0]))
    row = column_step(packed.device) // codes * STRIP_ROWS
    requirement = f"have strips of a multiple of {row}"
    check.require(packed.shape[1] % row == 0, "packed", requirement, lambda: str(packed.shape[1]))
    check.contiguous(packed, "packed")
    return check.new_empty(packed, (out_features, packed.shape[1] // STRIP_ROWS))


@fake("int8_embedding")
def _(
    check: Checker,
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out_features: int,
    group_size: int,
    dtype: torch.dtype,
    mixed_gate_up: bool = False,
) -> Results:
    check.index_dtype(ids, "ids")
    check.supported(
        dtype in FLOAT_DTYPES, "dtype", "be float32, float16 or bfloat16", str(dtype).removeprefix("torch.")
    )
    k = check_packed_weight(check, packed, scales, out_features, group_size, bits=8)
    check_zeros(check, INT4_KINDS.index("symmetric" if zeros is None else "offset"), zeros, scales, bits=8)
    requirement = "be a multiple of 16, for gate and up, with mixed_gate_up"
    check.require(not mixed_gate_up or out_features % 16 == 0, "out_features", requirement, lambda: str(out_features))
    check.contiguous(ids, "ids")
    return check.new_empty(ids, (*ids.shape, k), dtype)


@fake("check_layout")
def _(check: Checker, packed: Tensor, layout: str) -> None:
    here = layout_of(packed.device)
    requirement = f"be '{here}', as weights are packed on this device by this build"
    check.require(layout == here, "layout", requirement, lambda: f"'{layout}': export the model again")
