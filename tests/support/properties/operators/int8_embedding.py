"""Random calls of int8_embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qops._layout import LEVEL_GROUPS, SUPER_COLUMNS, levels_into_strips, widen_levels, with_levels
from qops.testing import FLOAT_DTYPES, generator
from tests.support.ops.contracts import int8_embedding_exact, mix_gate_up, packed
from tests.support.properties.property_calls import Call, Fault
from tests.support.properties.property_draws import Sampler, Strategy
from tests.support.properties.property_gemm import ROWS, SIZES, scales_of, size_ways, strips
from tests.support.properties.property_rows import INT8, Ways, finish


def int8_embedding(s: Sampler) -> Call:
    mixed_gate_up = s.one_in(3)
    n, k, dtype = s.choice((16, 48, 0, 80) if mixed_gate_up else ROWS), s.choice(SIZES), s.dtype()
    leading = s.rows_of_any_number() if n > 0 else (s.choice((0, 2)), 0)
    groups = s.choice([1, *(k // g for g in range(16, k, 16) if k % g == 0)]) if k > 0 else 0
    group_size, exact = k // groups if groups else 0, not s.one_in(6)
    rng = generator(s.integer(0, 2**20))
    codes = torch.randint(-128, 128, (n, k), generator=rng).to(INT8)
    two_levels = k == SUPER_COLUMNS and group_size in LEVEL_GROUPS and s.one_in(2)
    stored: dict[str, Tensor] = {}
    for name in ("scales", "zeros")[: s.choice((1, 2))]:
        if two_levels:
            halves = scales_of(s, (n, 1), torch.float16, exact=exact)
            stored[name] = with_levels(halves, torch.randint(-128, 128, (n, 1, groups), generator=rng).to(INT8))
        else:
            stored[name] = scales_of(s, (n, groups), s.dtype(), exact=exact)
    numbers = {name: widen_levels(t) if two_levels else t for name, t in stored.items()}
    mixed: Callable[[Tensor], Tensor] = mix_gate_up if mixed_gate_up else lambda rows: rows
    ids = torch.randint(max(n, 1), leading, generator=rng).to(s.choice((torch.int64, torch.int32)))
    arguments: dict[str, Any] = {
        "ids": s.contiguous(ids),
        "packed": s.contiguous(packed(mixed(codes), 8)),
        "zeros": None,
        **{name: (levels_into_strips if two_levels else strips)(mixed(t)) for name, t in stored.items()},
        "out_features": n,
        "group_size": group_size,
        "dtype": dtype,
        "mixed_gate_up": mixed_gate_up,
    }

    def expected(a: dict[str, Any]) -> tuple[Tensor, ...]:
        rows = int8_embedding_exact(codes, numbers["scales"], numbers.get("zeros"), a["dtype"])
        return (rows[a["ids"].long()],)

    call = Call("int8_embedding", "default", arguments, expected, [((*leading, k), dtype)])
    return finish(s, call, lambda: int8_embedding_ways(s, call, n, k, two_levels))


def int8_embedding_ways(s: Sampler, call: Call, n: int, k: int, two_levels: bool) -> Ways:
    a = call.arguments
    inner = [name for name in ("packed", "scales", "zeros") if a[name] is not None]
    dtypes = {"ids": (torch.int32, torch.int64), "packed": (INT8,), "scales": (*FLOAT_DTYPES, INT8)}
    dtypes["zeros"] = (INT8,) if two_levels else FLOAT_DTYPES

    def bad_id() -> Fault | None:
        if a["ids"].numel() == 0:
            return None
        a["ids"] = a["ids"].clone()
        most = torch.iinfo(a["ids"].dtype)
        a["ids"].view(-1)[s.integer(0, a["ids"].numel() - 1)] = s.choice((-1, n, n + 7, most.max, most.min))
        return Fault(("ids",), (IndexError,), fake=False)

    def half_a_strip() -> Fault | None:
        if n % 16 == 0:
            return None
        a["mixed_gate_up"] = True
        return Fault(("out_features",), (ValueError,))

    dtype = s.scalar(call, "dtype", (torch.float64, INT8, torch.int64, torch.bool, torch.float8_e5m2), (RuntimeError,))
    return [
        *s.tensor_faults(call, dtypes, (), ["zeros"]),
        *s.not_contiguous(call, "ids", *inner),
        *s.shapes(call, inner, ["scales"]),
        *size_ways(s, call, k, grouped=True),
        *[("ids", bad_id)] * 3,
        ("out_features packed mixed_gate_up", half_a_strip),
        *dtype[:2],
    ]


CALLS: dict[str, Strategy] = {"int8_embedding": int8_embedding}
