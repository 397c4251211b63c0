"""The kernels of csrc/cuda: the unit of work of each, and the path that does it. All that this tool knows of qops.

A kernel's row says in `least` what its steady path has to hold. A rewritten kernel that does its work otherwise (by
bulk copies, say) fails with what is missing, and its row is changed with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.cuda.sass.count import Work
from tests.cuda.sass.flow import Goal

# Elements of a vector of a lane, and of the vectors of a warp.
_VECTOR, _WARP_VECTOR = 8, 256
_HEAD = "a warp's vector, 256 elements"


def _bytes(element: str) -> int:
    return 4 if element == "float" else 2


# --- products --------------------------------------------------------------------------------------------------------

# Groups of 128 columns: with every second block of 64 one begins and one ends, so its scales are copied and read and
# its sums are scaled. Where groups are not multiples of 64 they may end with each of the four steps of a block: groups
# of 16 are what is counted.
# 16-bit scales: of 4-bit weights a lane reads those of its two rows as 32 bits, of 8-bit ones as two of 16; float32
# would be shorter.
_GROUP = ("TENSOR", "COPY", "FFMA", "LDS", "LDS.32")


def _group_ways(
    fine: bool, strips: int, tiles: int, offset: bool, copies: int, bits: int = 4
) -> tuple[tuple[float, Goal], ...]:
    """Of a warp of so many strips of w and tiles of eight tokens. `copies`: but for those of scales."""
    # Each fragment of codes meets each tile of tokens, and so does that of ones.
    products = {"TENSOR": 4 * tiles * (strips + offset), "COPY": copies}
    if fine:
        return ((1, Goal(most=(*_GROUP, "LDS.16"), least=products)),)
    scales = {"LDS.32": strips} if bits == 4 else {"LDS.16": 2 * strips}
    # Four sums of a tile and strip are scaled once, and have the sum of x added.
    boundary = products | {"COPY": copies + 1, "FFMA": 4 * tiles * strips * (1 + offset), **scales}
    return (0.5, Goal(most=(), least=products)), (0.5, Goal(most=(), least=boundary))


def _scale_bytes(strips: int, fine: bool, offset: bool) -> float:
    """Of 64 columns, with scales of two bytes and float zeros of four."""
    return strips * 16 * (4 if fine else 0.5) * (6 if offset else 2)


def _decode(tiles: str, strips: str, fine: str, offset: str, bits: int = 4) -> list[Work]:
    n, tokens, is_fine, has_offset = int(strips), 8 * int(tiles), fine == "true", offset == "true"
    weights = 128 * bits * n + _scale_bytes(n, is_fine, has_offset)
    return [
        Work(
            f"64 columns x {n} strips of a warp",
            _group_ways(is_fine, n, int(tiles), has_offset, bits // 4 * n + tokens // 4, bits),
            dram=weights,
            l2=weights + 128 * tokens,
            blocks=1,
        )
    ]


def _int8_decode(tiles: str, fine: str, offset: str) -> list[Work]:
    return _decode(tiles, "2", fine, offset, bits=8)


def _tiled(tokens: str, fine: str, offset: str, bits: int = 4) -> list[Work]:
    n, is_fine, has_offset = int(tokens), fine == "true", offset == "true"
    strips, tiles = (1, n // 8) if n <= 64 else (2, n // 16)
    weights = 1024 * bits + _scale_bytes(8, is_fine, has_offset)
    return [
        Work(
            f"64 columns x 128 rows x {n} tokens of a block",
            _group_ways(is_fine, strips, tiles, has_offset, bits // 4 + n // 32, bits),
            warps=8,
            dram=weights,
            l2=weights + 128 * n,
            blocks=2 if n == 32 and not has_offset else 1,
        )
    ]


def _int8_tiled(tokens: str, fine: str, offset: str) -> list[Work]:
    return _tiled(tokens, fine, offset, bits=8)


def _int8(tokens: str, zero_points: str) -> list[Work]:
    n = int(tokens)
    warps = 4 if n >= 64 else 8
    products = {8: 2, 16: 4, 32: 8, 64: 32, 128: 64}[n]
    copies = 8 * 2 // warps + -(-n * 4 // (32 * warps))
    least = {"TENSOR": products, "COPY": copies, **({"IDP": products // 2} if zero_points == "true" and n < 64 else {})}
    return [
        Work(
            f"64 columns x 128 rows x {n} tokens of a block",
            ((1, Goal(most=("TENSOR",), least=least)),),
            warps=warps,
            dram=8192 if n <= 64 else 0,
            l2=8192 + 64 * n,
            blocks=2,
        )
    ]


def _int4_int8(tokens: str, fine: str) -> list[Work]:
    n, is_fine = int(tokens), fine == "true"
    strips, tiles = (1, n // 8) if n <= 32 else (2, n // 16)
    # A warp that puts x in order: of 16 and 32 tokens not all do. Groups of 16 end within an instruction's columns.
    reordered = 4 if n <= 64 else 8
    products = {"TENSOR": 2 * strips * tiles * (2 if is_fine else 1), "COPY": 1 + -(-n // 64), "PRMT": reordered}
    ways: tuple[tuple[float, Goal], ...] = ((1, Goal(most=_GROUP, least=products)),)
    if not is_fine:
        boundary = products | {"COPY": products["COPY"] + 1, "FFMA": 4 * tiles * strips}
        ways = ((0.5, Goal(most=(), least=products)), (0.5, Goal(most=(), least=boundary)))
    weights = 4096 + _scale_bytes(8, is_fine, False)
    return [
        Work(
            f"64 columns x 128 rows x {n} tokens of a block",
            ways,
            warps=8,
            dram=weights,
            l2=weights + 64 * n,
            blocks=2 if n <= 64 else 1,
        )
    ]


# --- rows ------------------------------------------------------------------------------------------------------------


class _Row:
    """RowShape<threads, chunks, aligned> with elements of a type: how many accesses move its vectors.

    Where no vector is held, a row of one vector a lane is what is counted.
    """

    def __init__(self, element: str, threads: str, chunks: str, aligned: str) -> None:
        self.aligned = aligned == "true"
        self.held = int(chunks)
        self.vectors = self.held or 1
        self.warps = int(threads) // 32
        self.passes = 1 if self.held else 2  # over x, where it is not held
        self.size = _bytes(element)
        # Accesses of a vector: 16 bytes each, or an element.
        self.wide = self.vectors * (self.size // 2 if self.aligned else _VECTOR)
        self.codes = self.vectors * (1 if self.aligned else _VECTOR)

    def work(self, least: dict[str, int], bytes_of_element: float, label: str = "") -> Work:
        # All warps of a row take the same path; a unit is a vector of one of them.
        goal = Goal(most=(), least=least)
        return Work(
            _HEAD,
            ((1, goal),),
            in_loop=False,
            units=self.vectors,
            dram=_WARP_VECTOR * bytes_of_element,
            label=label,
        )


def _norm(element: str, threads: str, chunks: str, aligned: str, is_int8: str) -> list[Work]:
    row = _Row(element, threads, chunks, aligned)
    coded = is_int8 == "true"
    passes = row.passes + (1 if coded and not row.held else 0)
    out = row.codes if coded else row.wide
    weights = row.wide * (passes - 1 if not row.held else 1)
    sizes = row.size + (1 if coded else row.size)
    least = {"LOAD": passes * row.wide + weights, "STORE": out + (1 if coded else 0)}
    more = {"LOAD": least["LOAD"] + row.wide, "STORE": least["STORE"] + row.wide}
    if coded:
        # Squares, norm and codes.
        least, more = ({**each, "FMUL": 3 * _VECTOR * row.vectors} for each in (least, more))
    return [row.work(least, sizes), row.work(more, sizes + 2 * row.size, "residual")]


def _quantize(element: str, threads: str, chunks: str, aligned: str) -> list[Work]:
    row = _Row(element, threads, chunks, aligned)
    least = {"LOAD": row.passes * row.wide, "STORE": row.codes + 1, "FMUL": _VECTOR * row.vectors}
    return [row.work(least, row.size + 1)]


def _asym(element: str, threads: str, chunks: str, aligned: str) -> list[Work]:
    row = _Row(element, threads, chunks, aligned)
    least = {"LOAD": row.passes * row.wide, "STORE": row.codes + 2, "FMUL": _VECTOR * row.vectors}
    return [row.work(least, row.size + 1)]


def _static(element: str, threads: str, chunks: str, aligned: str) -> list[Work]:
    row = _Row(element, threads, chunks, aligned)
    return [row.work({"LOAD": row.wide, "STORE": row.codes, "FMUL": _VECTOR * row.vectors}, row.size + 1)]


def _silu(element: str, threads: str, chunks: str, aligned: str, is_int8: str) -> list[Work]:
    row = _Row(element, threads, chunks, aligned)
    if is_int8 == "false":
        return [row.work({"LOAD": 2 * row.wide, "STORE": row.wide}, 3 * row.size)]
    least = {"LOAD": 2 * row.passes * row.wide, "STORE": row.codes + 1, "FMUL": 4 * _VECTOR * row.vectors}
    return [row.work(least, 2 * row.size + 1)]


def _heads(element: str, threads: str, chunks: str, aligned: str) -> list[Work]:
    """Halves, with cos and sin of the same type, one position a token. A lane turns two vectors at a time."""
    row = _Row(element, threads, chunks, aligned)
    turns = max(1, row.vectors // 2)
    of_turn = row.size // 2 if row.aligned else _VECTOR
    least = {"LOAD": (row.passes + 1) * row.wide + 2 * turns * of_turn, "STORE": 2 * turns * of_turn}
    size = _WARP_VECTOR * row.vectors * row.warps
    return [
        Work(
            f"a head of {size}" + (", or one of 128, which leaves half of the lanes idle" if size == 256 else ""),
            ((1, Goal(most=(), least=least, trips={"STORE": turns})),),
            in_loop=False,
            warps=row.warps,
            dram=2 * row.size * size,
        )
    ]


def _small_heads(element: str, lanes: str, _: str) -> list[Work]:
    """Likewise, of a vector a lane, with weights of the same type."""
    wide = _bytes(element) // 2
    # x, weights, and cos and sin by two guarded loads each; by one in float32, with both words of a position.
    least = {"LOAD": 2 * wide + 4, "STORE": wide}
    size = _VECTOR * int(lanes)
    return [
        Work(
            f"a head of {size}",
            ((1, Goal(most=(), least=least)),),
            in_loop=False,
            units=32 // int(lanes),
            dram=2 * _bytes(element) * size,
        )
    ]


def _rotary(element: str, aligned: str) -> list[Work]:
    n = _bytes(element) // 2 if aligned == "true" else _VECTOR
    goal = Goal(most=(), least={"LOAD": 4 * n, "STORE": 2 * n})
    return [Work("two vectors of a warp, 512 elements", ((1, goal),), dram=1024 * _bytes(element))]


# --- what comes before and after -------------------------------------------------------------------------------------


def _once(unit: str, loads: int, stores: int, dram: float, in_loop: bool = False) -> list[Work]:
    goal = Goal(most=(), least={"LOAD": loads, "STORE": stores})
    return [Work(unit, ((1, goal),), in_loop=in_loop, dram=dram)]


def _dequantize(element: str, _: str) -> list[Work]:
    stores = 2 * _bytes(element)
    return _once("16 x 64 weights of a warp", 2, stores, 512 + 1024 * _bytes(element), in_loop=True)


def _pack(packs: str) -> list[Work]:
    loads, stores = (4, 1) if packs == "true" else (1, 4)
    return _once("a block of 16 x 64 weights of a warp", loads, stores, 1024)


def _int8_pack(packs: str) -> list[Work]:
    loads, stores = (4, 1) if packs == "true" else (1, 4)
    return _once("a fragment of 16 x 32 weights of a warp", loads, stores, 1024)


def _finish(_: str, slices: str) -> list[Work]:
    return _once("256 sums of a warp", 2 * int(slices), 1, 0)


_T, _BOOL, _INT = r"(float|__half|__nv_bfloat16)", r"(true|false)", r"(\d+)"
_SHAPE = rf"qops::cuda::RowShape<{_INT}, {_INT}, {_BOOL}> ?"
_TABLE: dict[str, Callable[..., list[Work]]] = {
    rf"decode_kernel<\w+, {_INT}, {_INT}, {_BOOL}, {_BOOL}>": _decode,
    rf"tiled_kernel<\w+, {_INT}, {_BOOL}, {_BOOL}>": _tiled,
    rf"int8_decode_kernel<\w+, {_INT}, {_BOOL}, {_BOOL}>": _int8_decode,
    rf"int8_tiled_kernel<\w+, {_INT}, {_BOOL}, {_BOOL}>": _int8_tiled,
    rf"int8_gemm_kernel<{_INT}, {_BOOL}>": _int8,
    rf"int4_int8_gemm_kernel<{_INT}, {_BOOL}>": _int4_int8,
    rf"norm_kernel<{_T}, {_SHAPE}, {_BOOL}>": _norm,
    rf"quantize_kernel<{_T}, {_SHAPE}>": _quantize,
    rf"asym_kernel<{_T}, {_SHAPE}>": _asym,
    rf"static_kernel<{_T}, {_SHAPE}>": _static,
    rf"silu_mul_kernel<{_T}, {_SHAPE}, {_BOOL}>": _silu,
    rf"qk_norm_rotary_kernel<{_T}, {_SHAPE}>": _heads,
    rf"heads_kernel<{_T}, {_INT}, {_BOOL}>": _small_heads,
    rf"rotary_kernel<{_T}, {_BOOL}>": _rotary,
    rf"dequantize_kernel<{_T}, {_BOOL}>": _dequantize,
    rf"int8_pack_kernel<{_BOOL}>": _int8_pack,
    rf"pack_kernel<{_BOOL}>": _pack,
    rf"finish_kernel<{_T}, {_INT}>": _finish,
    r"gather_kernel<\w+>": lambda: _once("256 elements of a warp", 8, 1, 1024),
    r"row_factor_kernel": lambda: _once("4 groups of the 16 rows of a warp", 1, 0, 256, in_loop=True),
    r"split_kernel": lambda: _once("256 elements of a warp", 8, 3, 2560),
    r"int8_gemm_add_kernel": lambda: _once("128 sums of a warp, of two blocks", 2, 1, 0),
    r"int4_int8_add_kernel": lambda: _once("128 sums of a warp", 8, 1, 0),
    r"int4_int8_gather_kernel": lambda: _once("256 elements of a warp", 8, 1, 512),
    r"int8_gemm_copy_kernel": lambda: _once("256 elements of a warp", 8, 1, 512),
}


# What a reader looks for first: bfloat16, groups of whole blocks, no zero points, rows of 4096 and heads of 128.
SHOWN = (
    *(f"decode_kernel<bf16, {tiles}, {strips}, false, false>" for tiles in (1, 2, 3) for strips in (4, 2)),
    *(f"tiled_kernel<bf16, {tokens}, false, false>" for tokens in (32, 64, 128)),
    *(f"int8_decode_kernel<bf16, {tiles}, false, false>" for tiles in (1, 2)),
    *(f"int8_tiled_kernel<bf16, {tokens}, false, false>" for tokens in (32, 64, 128)),
    *(f"int4_int8_gemm_kernel<{tokens}, false>" for tokens in (16, 32, 64, 128)),
    *(f"int8_gemm_kernel<{tokens}, false>" for tokens in (8, 16, 32, 64, 128)),
    "norm_kernel<bf16, RowShape<128, 4, true>",
    "quantize_kernel<bf16, RowShape<128, 4, true>",
    "asym_kernel<bf16, RowShape<128, 4, true>",
    "static_kernel<bf16, RowShape<128, 4, true>",
    "silu_mul_kernel<bf16, RowShape<128, 4, true>",
    "heads_kernel<bf16, 16, false>",
    "rotary_kernel<bf16, true>",
    "dequantize_kernel<bf16, false>",
)


def short(name: str) -> str:
    """`norm_kernel<float, RowShape<32, 1, true>, false>` of a demangled name."""
    for noise in ("(anonymous namespace)::", "qops::cuda::", "void "):
        name = name.replace(noise, "")
    return name.partition("(")[0].replace("> >", ">>").replace("__nv_bfloat16", "bf16").replace("__half", "half")


# Instances that are compiled to nothing from an architecture on: max_tile_tokens() of weight_only_config.h.
_EMPTY = ((r"(?:int8_)?tiled_kernel<\w+, 128,", 120),)


def works_of(name: str, arch: str) -> list[Work] | None:
    """Of a kernel, by its demangled name; none for an instance that has no work on this architecture ("90a"); None for
    one that has no row."""
    if any(re.search(pattern, name) and int(arch.rstrip("af")) >= first for pattern, first in _EMPTY):
        return []
    for pattern, works in _TABLE.items():
        if found := re.search(rf"(?<!\w){pattern}", name):
            return works(*found.groups())
    return None
