"""Every instance of every CUDA kernel once, on one small shape: what sanitizers and the tracer look at in CI.

`--emulator-tracer` adds what it counts: that each instance has run, without a race, and what its accesses cost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

import qops
from qops.ops.int4_gemm import int4_gemm_ref
from qops.ops.int8_weight_only_gemm import int8_weight_only_gemm_ref
from qops.testing import (
    FLOAT_DTYPES,
    assert_bitwise,
    assert_within,
    random_activations,
    strided_rows,
    weight_only_bound,
)
from tests.support.cuda.cuda_backend import POLICIES, Backend, assert_same, gpu, made_there
from tests.support.cuda.cuda_budgets import budget, shape_of
from tests.support.cuda.cuda_tools import ROOT, build_emulated_operators, checked
from tests.support.cuda.launch_records import kernel_names, launches
from tests.support.ops.int8_gemm_oracle import activations, by_contract, make_weight
from tests.support.ops.random_weights import KINDS, random_int4, random_int8
from tests.support.properties.overloads import SIZED, sized_call

EMULATED = Backend(torch.ops.qops_emu, "cpu")
# One H for each shape of row.cuh.
ALIGNED = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 33024)
UNALIGNED = (100, 1030, 8195)
# (M, N, K, multiprocessors, arch): tiles of 8, 16, 24, 32, 64 and 128 tokens; rings of three stages and more are filled
# again.
INT4 = (
    *((m, n, 1152, 1, 90) for m in (5, 13, 21) for n in (112, 24)),  # 4 strips a warp, and 2
    (32, 144, 640, 1, 89),
    (64, 144, 640, 1, 89),
    (200, 272, 1152, 2, 90),
)
INT4_SPLIT = ((5, 32, 4608, 132, 89), (32, 32, 576, 8, 89))
# Tiles of 8, 16, 32, 64 and 128 tokens.
INT8_WEIGHTS = (
    *((m, 48, 1152, 1, 90) for m in (5, 13)),
    (32, 144, 640, 1, 90),
    (64, 144, 640, 1, 89),
    (200, 272, 1152, 2, 90),
)
INT4_INT8 = tuple((m, 144, 640, 1, 90) for m in (8, 32, 64, 128))
INT4_INT8_SPLIT = ((5, 32, 4608, 8, 89), (40, 32, 2304, 8, 90))
INT8 = tuple((m, 144, 640, 1, 89) for m in (8, 16, 32, 64, 128))
INT8_SPLIT = (
    (8, 32, 1024, 8, 89),
    (17, 32, 1024, 8, 89),
    (64, 32, 2048, 8, 89),
    (33, 32, 2048, 8, 89),
    (65, 32, 2048, 8, 89),
)


@pytest.fixture(scope="module", autouse=True)
def before(emulated) -> None:
    """What other tests have left is not counted here."""
    emulated.take_trace()


@pytest.fixture
def fifo(emulated):
    """The order of threads in which a missing synchronisation changes no result.

    No launch has more threads than its kernel's launch bounds, which test_cuda_compile.py finds in the machine code: a
    GPU would refuse it.
    """
    emulated.configure(1, POLICIES["fifo"], "")
    emulated.set_runtime(1, False, "", True)
    yield emulated
    emulated.set_runtime(1)
    emulated.configure(1, POLICIES["prio"], "")
    for each in launches(emulated.take_calls()):
        name = kernel_names(emulated.__file__)[each.kernel]
        assert each.threads <= budget(shape_of(name))["threads"], name


# One call of each ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", (*ALIGNED, *UNALIGNED))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_rows(fifo, dtype, h):
    for name in SIZED:
        call = sized_call(name, 5 if h <= 1024 else 1, h, dtype)
        if call is not None and not call.written:
            assert_same(EMULATED, call.op, *call.arguments.values(), overload=call.overload)


@pytest.mark.parametrize("d", (64, 128, 256, 512, 1024, 2048, 4096, 8192, 12288, 24576, 6, 1030, 8198))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_heads(fifo, dtype, d):
    if d * dtype.itemsize > 48 * 1024:
        pytest.skip("a head that has no kernel")
    q, k = (random_activations(2, heads, d, dtype=dtype, seed=heads) for heads in (3, 2))
    w = random_activations(d, dtype=dtype, seed=5, outliers=False)
    # Half of a head turns: no thread holds both elements of a pair, and the other half is copied.
    cos, sin = (torch.linspace(i, 1, 2 * (d // 4)).view(2, d // 4).to(dtype) for i in range(2))
    assert_same(EMULATED, "rotary", q, k, cos, sin)
    for interleaved in (False, True) if d <= 256 else (False,):  # of which longer heads have no instance
        assert_same(EMULATED, "qk_norm_rotary", q, k, w, w, cos, sin, 1e-6, None, interleaved)
        # In place: what a lane writes, another one has read.
        heads = [(q.clone(), k.clone()) for _ in range(2)]
        for ops, into in zip((EMULATED.ops, torch.ops.qops), heads, strict=True):
            ops.qk_norm_rotary_(*into, w, w, cos, sin, 1e-6, None, interleaved)
        for got, want in zip(*heads, strict=True):
            assert_bitwise(got, want)


@pytest.mark.parametrize("kind", ("zero_point", "offset"))
@pytest.mark.parametrize("fine", (False, True), ids=("coarse", "fine"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_int4_gemm(fifo, dtype, fine, kind):
    split = INT4_SPLIT if kind == "zero_point" and not fine else ()
    for index, (m, n, k, multiprocessors, arch) in enumerate((*INT4, *split)):
        tensors, here = random_int4(n, k, 32 if fine else 64, kind, seed=index)
        with gpu(EMULATED):
            w = made_there(EMULATED, tensors, kind)
        fifo.configure(1, POLICIES["fifo"], "", arch, multiprocessors)
        x = random_activations(m, k, dtype=dtype, seed=index)
        weight = (w.packed, w.scales, w.zeros, None, None, n, w.group_size, KINDS.index(kind))
        y = EMULATED.ops.int4_gemm(x, *weight)
        rounded_to = dtype if (arch, dtype) == (90, torch.bfloat16) else None  # through cuBLAS
        bound = weight_only_bound(x, here, gpu=True, rounded_to=rounded_to)
        assert_within(y, int4_gemm_ref(x, here), bound, f"{here}, M = {m}")
        if m == INT4[0][0]:  # from a copy
            assert_bitwise(EMULATED.ops.int4_gemm(strided_rows(x, 1), *weight), y)
            in_parts = EMULATED.ops.int4_gemm(x.float(), *weight)
            assert_within(in_parts, int4_gemm_ref(x, here), weight_only_bound(x.float(), here, gpu=True))


@pytest.mark.parametrize(("fine", "kind"), ((False, "symmetric"), (True, "symmetric"), (True, "offset")), ids=str)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_int8_weight_only_gemm(fifo, dtype, fine, kind):
    for index, (m, n, k, multiprocessors, arch) in enumerate(INT8_WEIGHTS):
        tensors, here = random_int8(n, k, 32 if fine else 64, kind, seed=index)
        with gpu(EMULATED):
            w = qops.Int8Weight.from_canonical(**tensors, kind=kind)
        fifo.configure(1, POLICIES["fifo"], "", arch, multiprocessors)
        x = random_activations(m, k, dtype=dtype, seed=index)
        y = EMULATED.ops.int8_weight_only_gemm(x, w.packed, w.scales, w.zeros, None, None, n, w.group_size)
        bound = weight_only_bound(x, here, gpu=True)
        assert_within(y, int8_weight_only_gemm_ref(x, here), bound, f"{here}, M = {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fine", (False, True), ids=("coarse", "fine"))
def test_int4_int8_gemm(fifo, fine, kind):
    for index, (m, n, k, multiprocessors, arch) in enumerate((*INT4_INT8, *INT4_INT8_SPLIT)):
        split = (m, n, k, multiprocessors, arch) in INT4_INT8_SPLIT
        tensors, here = random_int4(n, k, 32 if fine else k if split else 64, kind, seed=index)
        with gpu(EMULATED):
            w = made_there(EMULATED, tensors, kind)
        fifo.configure(1, POLICIES["fifo"], "", arch, multiprocessors)
        q, scale, _ = activations(m, k, index)
        weight = (w.packed, w.scales, w.zeros, None, None, n, w.group_size, KINDS.index(kind), torch.bfloat16)
        y = EMULATED.ops.int4_int8_gemm(q, scale, *weight)
        assert_bitwise(y, qops.int4_int8_gemm(q, scale, here), f"{here}, M = {m}")
        if m == INT4_INT8[0][0]:  # from a copy
            far = torch.zeros(m, k + 8, dtype=torch.int8)[:, 1 : k + 1].copy_(q)
            assert_bitwise(EMULATED.ops.int4_int8_gemm(far, scale, *weight), y)


@pytest.mark.parametrize("asymmetric", (False, True), ids=("symmetric", "asymmetric"))
def test_int8_gemm(fifo, asymmetric):
    for index, (m, n, k, multiprocessors, arch) in enumerate((*INT8, *INT8_SPLIT)):
        w, (q, scale, zero_point) = make_weight(n, k, index), activations(m, k, index)
        z = zero_point if asymmetric else None
        fifo.configure(1, POLICIES["fifo"], "", arch, multiprocessors)
        packed = EMULATED.ops.int8_pack(w.canonical()["qweight"])
        weight = (packed, w.scales, None, n, torch.bfloat16)
        y = EMULATED.ops.int8_gemm(q, scale, z, *weight)
        assert_bitwise(y, by_contract(q, scale, w, zero_point=z, out_dtype=torch.bfloat16))
        if m == INT8[0][0]:
            far = torch.zeros(m, k + 8, dtype=torch.int8)[:, 1 : k + 1].copy_(q)
            assert_bitwise(EMULATED.ops.int8_gemm(far, scale, z, *weight), y)


def test_weights(fifo):
    tensors, here = random_int4(48, 192, 64, "zero_point")
    want = [qops.int4_dequantize(here, dtype) for dtype in FLOAT_DTYPES]
    with gpu(EMULATED):
        w = made_there(EMULATED, tensors, "zero_point")
        for weights in want:
            assert_bitwise(qops.int4_dequantize(w, weights.dtype), weights)
        assert_bitwise(w.unpack().qweight, tensors["qweight"])
    qweight = make_weight(48, 192, 0).canonical()["qweight"]
    assert_bitwise(EMULATED.ops.int8_unpack(EMULATED.ops.int8_pack(qweight), 48), qweight)


# What the tracer has counted -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Requests:
    """Of all executions of one line of a kernel, by the lanes of a warp together."""

    kernel: str
    memory: str
    instruction: str
    place: str  # the line, and those that it is inlined into
    requests: int
    taken: int  # wavefronts of shared memory, or sectors of global memory
    least: int


@pytest.fixture(scope="module")
def trace(emulated, request, before) -> list[Requests]:
    if not request.config.getoption("--emulator-tracer"):
        pytest.skip("needs --emulator-tracer")
    lines = [line.split("\t") for line in emulated.take_trace()]
    return [Requests(unqualified(line[1]), *line[2:5], *map(int, line[5:])) for line in lines if line[0] == "requests"]


def unqualified(name: str) -> str:
    """`norm_kernel<float, RowShape<32, 1, true>, false>` of what nm and addr2line print of that function."""
    for noise in ("(anonymous namespace)::", "qops::cuda::", "void "):
        name = name.replace(noise, "")
    return name.partition("(")[0].replace("> >", ">>")


# Their heads would not fit into shared memory.
UNREACHABLE = {
    "qk_norm_rotary_kernel<float, RowShape<512, 8, true>>",
    *(f"qk_norm_rotary_kernel<{t}, RowShape<512, 0, true>>" for t in ("float", "__half", "__nv_bfloat16")),
}


def test_every_instance_has_run(trace):
    """Whatever the module holds: a new instance needs a shape above."""
    lines = checked("nm", "-C", str(build_emulated_operators("traced"))).splitlines()
    functions = {unqualified(line[19:]) for line in lines if line[17:18].lower() in "tw"}
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu"))
    kernels = set(re.findall(r"__global__ void\s+(?:__launch_bounds__\([^;{]*?\)\s+)?(\w+)\(", sources))
    assert len(kernels) >= 15
    compiled = {name for name in functions if name.partition("<")[0] in kernels}
    assert compiled - {r.kernel for r in trace} == UNREACHABLE


@dataclass(frozen=True)
class Waste:
    """Accesses that take more wavefronts or sectors than their bytes need, up to `most` times as many."""

    kernel: str
    memory: str
    place: str
    most: float
    why: str

    def excuses(self, r: Requests) -> bool:
        patterns = ((self.kernel, r.kernel), (self.memory, r.memory), (self.place, r.place))
        return all(re.search(*pair) for pair in patterns) and r.taken <= self.most * r.least


WASTE = (
    Waste(r"RowShape<\d+, 0, false>|^rotary_kernel<\w+, false>", "", "", 9, "rows that begin anywhere, one by one"),
    Waste("^(int4_int8_)?gather_kernel|^(split|int8_gemm_copy)_kernel", "global", "", 9, "likewise"),
    Waste(
        "_kernel<float",
        "",
        r"^(elements|rotate_head)\.cuh",
        2,
        "32 bytes a lane: its second access takes the rest of a sector",
    ),
    Waste("^finish_kernel", "global", r"^elements\.cuh.* < int4_gemm\.cu", 2, "likewise, of sums"),
    Waste(
        "^(int8_)?(decode|tiled)_kernel",
        "shared",
        r"< weight_only_gemm\.cuh",
        2.5,
        "sums, once a tile: 32 bytes a lane",
    ),
    Waste(
        "^(int8_)?decode_kernel",
        "global",
        r"^elements\.cuh.* < weight_only_gemm\.cuh",
        2,
        "sums of float32 activations: 32 bytes a lane, its second access takes the rest of a sector",
    ),
    Waste(
        "^(int8_)?decode_kernel",
        "global",
        r"^weight_only_(fragment|decode)\.cuh",
        1.34,
        "scales and zeros of a strip: 16 bytes or 32",
    ),
    Waste("^int8_gemm_kernel", "shared", r"^int8_gemm_fragment\.cuh:\d+ < int8_gemm_tiled\.cu", 2, "sums, once a tile"),
    Waste(
        "^int8_gemm_(add_)?kernel", "global", r"^elements\.cuh", 4, "scales of four columns, once a tile, one by one"
    ),
    Waste("^int4_int8_add_kernel", "global", r"^elements\.cuh", 2, "scales of one group, once a row of w, one by one"),
    Waste("^int8_pack_kernel", "global", r"^weight_pack_int8\.cu", 2, "two instructions use each sector up"),
    Waste("^pack_kernel", "shared", r"^weight_pack_int4\.cu", 2, "once a weight"),
)


def test_accesses_take_what_their_bytes_need(trace):
    """Wavefronts of shared memory, sectors of global memory: WASTE lists what takes more, and nothing that does not."""
    used = set()
    for r in trace:
        if r.taken == r.least:
            continue
        excuse = next((waste for waste in WASTE if waste.excuses(r)), None)
        assert excuse is not None, r
        used.add(excuse)
    assert used == set(WASTE)


def test_main_loops_have_no_bank_conflicts(trace):
    """No entry of WASTE may ever excuse them."""
    counts = {"decode_kernel": 40, "tiled_kernel": 20, "int4_int8_gemm_kernel": 8, "int8_gemm_kernel": 10}
    counts |= {"int8_decode_kernel": 12, "int8_tiled_kernel": 16}
    in_loops = ("ldmatrix", "ld.shared", "cp.async")
    for kernel, at_least in counts.items():
        loops = [r for r in trace if r.kernel.startswith(kernel) and r.instruction.startswith(in_loops)]
        assert len({r.kernel for r in loops}) == at_least
        assert all(r.taken == r.least for r in loops if r.memory == "shared")
