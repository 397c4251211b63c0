"""The CUDA operators against the CPU's, bit for bit: in the emulator, which runs bindings, launches and kernels as they
are built for a GPU on CPU tensors, and on a GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor

from qops._native import WITHOUT_CUDA_KERNEL
from qops.testing import FLOAT_DTYPES, assert_bitwise, generator, random_activations
from tests.support.cuda import cuda_tools
from tests.support.cuda.cuda_backend import POLICIES, Backend, a_gpu, assert_same
from tests.support.house import rules
from tests.support.properties.overloads import ROW_OPS, SIZED, STRATEGIES, sized_call
from tests.support.properties.property_calls import Call, check_one
from tests.support.properties.property_draws import HUGE, Sampler

# One H or more for each shape of row.cuh: threads of a row, vectors that a thread holds, aligned or not, too many.
ALIGNED = (8, 256, 512, 1024, 1032, 2048, 4096, 8192, 8200, 16384, 20480, 32768, 33000)
UNALIGNED = (1, 7, 100, 513, 1023, 1030, 4099, 8191, 8195, 16390)


def test_what_is_registered_has_kernels(emulated):
    bindings = {path.name: path.read_text() for path in (cuda_tools.ROOT / "csrc/binding").iterdir()}
    kernels = {
        name.removeprefix("qops_emu::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("qops_emu::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    }
    assert kernels == rules.kernels(bindings, "CUDA")
    # Everything but two GEMMs, with every overload.
    names = {name.removeprefix("qops::") for name in torch._C._dispatch_get_all_op_names() if "qops::" in name}
    assert kernels == {name for name in names if name.partition(".")[0] not in WITHOUT_CUDA_KERNEL}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZED)
def test_rows_of_every_shape(each, name, dtype):
    for h in (*ALIGNED, *UNALIGNED):
        rows = 1 if h > 2048 else 6  # more than a block has where a row has a warp
        call = sized_call(name, rows, h, dtype, turn=h, seed=h)
        assert call is not None
        check_valid(call, call.on(each.device), each)


def test_rows_that_begin_anywhere(each):
    """Aligned rows, and rows one element off, of one tensor: another kernel, the same bits."""
    for dtype in FLOAT_DTYPES:
        memory = random_activations(3, 1100, dtype=dtype, seed=1)
        for start, h in ((0, 1024), (1, 1024), (8, 1000), (5, 77)):
            x = memory[:, start : start + h]
            w = memory[0, start : start + h]
            assert_same(each, "rms_norm", x, w, 1e-5)
            assert_same(each, "add_rms_norm_int8", x, x.flip(0), w, 1e-5)
            assert_same(each, "quantize_int8", x)
            assert_same(each, "silu_mul", x, x.flip(0), overload="apart")


def test_values_that_are_not_finite(each):
    for dtype in FLOAT_DTYPES:
        x = random_activations(5, 300, dtype=dtype, seed=1)
        x[1, 7], x[2, 8], x[3] = float("nan"), float("-inf"), 0.0
        x[4] = torch.finfo(dtype).tiny / 4
        w = torch.ones(300)
        for rule in ("127", "compressed-tensors", "torchao"):
            assert_same(each, "quantize_int8", x, rule)
            assert_same(each, "rms_norm_int8", x, w, 1e-5, 0.0, "hf", rule)
        for rule in ("255", "compressed-tensors"):
            assert_same(each, "quantize_int8_asym", x, rule)
        for rule in ("torchao", "compressed-tensors"):
            assert_same(each, "quantize_int8_static", x, torch.tensor(0.02), torch.tensor(-7, dtype=torch.int32), rule)
        assert_same(each, "silu_mul", x, x.flip(0), overload="apart")
        assert_same(each, "rms_norm", x, w, 0.0)


def test_short_divisions_have_the_bits_of_divisions(tmp_path):
    """All gates and magnitudes of 16 bits, with whatever reciprocal the hardware may have; what is far off shows."""
    root, program = cuda_tools.ROOT, str(tmp_path / "quotients")
    include = [f"-I{path}" for path in (root / "csrc", root / "tests", cuda_tools.require_cuda_include())]
    options = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", *include]
    cuda_tools.checked("g++", *options, str(root / "tests/support/cuda/quotients.cpp"), "-o", program)
    assert cuda_tools.checked(program, "2").splitlines() == ["1301120 tried, 0 differ"]
    assert not cuda_tools.checked(program, "200").endswith(" 0 differ\n")


def test_what_lies_behind_a_row_does_not_count(each):
    """The squares underflow, so with eps = 0 the factor is infinite, and 0 times it NaN."""
    for rule in ("127", "compressed-tensors", "torchao"):
        for h in (1, 7, 1030, 8195):
            x, w = torch.full((2, h), 1e-30), torch.ones(h)
            assert_same(each, "rms_norm_int8", x, w, 0.0, 0.0, "hf", rule)
            assert_same(each, "add_rms_norm_int8", x, torch.zeros(2, h), w, 0.0, 0.0, "fp32", rule)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_heads(each, interleaved):
    positions = torch.tensor([[1, 8, 3], [0, 2, 2]])
    for index, (d, r) in enumerate(
        ((64, 64), (128, 128), (64, 32), (100, 60), (16, 6), (6, 2), (256, 256), (1040, 512))
    ):
        dtype = FLOAT_DTYPES[index % 3]
        qkv = random_activations(2, 3, 7, d, dtype=dtype, seed=d)
        q, k = qkv[:, :, :4], qkv[:, :, 4:6]
        cos, sin = (torch.randn(9, r // 2, generator=generator(i)) for i in range(2))
        w = random_activations(d, dtype=dtype, seed=5, outliers=False)
        for table in (torch.float32, dtype):
            tables = (cos.to(table), sin.to(table))
            assert_same(each, "rotary", q, k, *tables, None, interleaved)
            assert_same(each, "rotary", q, k, *tables, positions, interleaved)
            assert_same(each, "qk_norm_rotary", q, k, w, w.flip(0), *tables, 1e-6, positions.int(), interleaved)
        got, want = qkv.clone().to(each.device), qkv.clone()
        for ops, whole in ((each.ops, got), (torch.ops.qops, want)):
            heads = (whole[:, :, :4], whole[:, :, 4:6])
            weights, tables, at = ([t.to(whole.device) for t in ts] for ts in ((w, w), (cos, sin), (positions,)))
            ops.qk_norm_rotary_(*heads, *weights, *tables, 1e-6, *at, interleaved, 1.0, "fp32")
            ops.rotary_(*heads, *tables, None, interleaved)
        assert_bitwise(got.cpu(), want, f"in place, D = {d}, R = {r}")


def test_positions_out_of_range_give_nan(backend):
    q, k, cos, sin = (
        backend.on_device(torch.full(s, v)) for s, v in (((2, 1, 8), 1.0),) * 2 + (((3, 2), 1.0), ((3, 2), 0.0))
    )
    for bad in (-1, 3, 2**62):
        got, _ = backend.ops.rotary(q, k, cos, sin, backend.on_device(torch.tensor([0, bad])))
        assert bool(got[1, :, :4].isnan().all()), bad
        assert torch.equal(got[0], q[0]) and torch.equal(got[1, :, 4:], q[1, :, 4:])


# Random calls --------------------------------------------------------------------------------------------------------


def draw_valid(data: st.DataObject, op: str) -> Call | None:
    call = STRATEGIES[op](Sampler(lambda low, high: data.draw(st.integers(low, high))))
    usable = not (
        call.faults or call.grad or any(t.is_meta or max(t.shape, default=0) >= HUGE for _, t in call.tensors())
    )
    if usable:
        note(str(call))
    return call if usable else None


@pytest.mark.parametrize("op", ROW_OPS)
@given(data=st.data())
def test_random_valid_calls(emulated, op, data):
    if call := draw_valid(data, op):
        emulated.configure(data.draw(st.integers(0, 1000)), data.draw(st.integers(0, 2)), "")
        check_valid(call, call, Backend(torch.ops.qops_emu, "cpu"))


@pytest.mark.parametrize("op", ROW_OPS)
@given(data=st.data())
def test_random_valid_calls_on_a_gpu(op, data):
    gpu = a_gpu()
    if call := draw_valid(data, op):
        check_valid(call, call.on(gpu.device), gpu)


def check_valid(call: Call, there: Call, backend: Backend) -> None:
    with torch.no_grad():
        expected = tuple(backend.on_device(t) for t in call.expected(call.arguments))
    operator = getattr(getattr(backend.ops, call.op), call.overload)
    check_one(there, backend.device, lambda: operator(**there.arguments), expected, typed=False)


@pytest.mark.parametrize("op", ROW_OPS)
@given(data=st.data())
def test_a_call_moved_to_a_device_is_the_same_call(op, data):
    """What the test on a GPU relies on, tried where there is none."""
    if call := draw_valid(data, op):
        there = call.on("cpu")
        check_valid(call, there, Backend(torch.ops.qops, "cpu"))
        for (name, a), (_, b) in zip(call.tensors(), there.tensors(), strict=True):
            assert a.stride() == b.stride() and a.storage_offset() == b.storage_offset(), name
            assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or a.numel() == 0, name


# The emulator notices ------------------------------------------------------------------------------------------------


def test_every_synchronisation_is_missed_when_it_is_gone(emulated):
    def run() -> list[Tensor]:
        results: list[Tensor] = []
        for h in (64, 2048, 9000):
            x = random_activations(3, h, dtype=torch.bfloat16, seed=h)
            w = torch.ones(h)
            results += torch.ops.qops_emu.rms_norm_int8(x, w, 1e-5)
            results += torch.ops.qops_emu.quantize_int8_asym(x)
        for d in (128, 512, 2048):  # in registers, for a warp, for more
            q = random_activations(3, 2, d, dtype=torch.bfloat16, seed=d)
            # Partners in other threads; at R = D a thread of the wider head holds its own.
            cos = sin = torch.linspace(0, 1, 3 * d // 4).view(3, d // 4)
            results += torch.ops.qops_emu.qk_norm_rotary(q, q.flip(0), torch.ones(d), torch.ones(d), cos, sin, 1e-6)
        return results

    emulated.configure(1, POLICIES["prio"], "")
    want = run()
    others = ("int4_", "int8_gemm", "weight_only", "weight_pack")  # that tests of theirs have come past
    places = [place for place in emulated.synchronisations() if ".cu" in place and not place.startswith(others)]
    assert len(places) >= 3, places
    for place in places:
        missed = 0
        for seed in range(12):
            emulated.configure(seed, seed % 3, place)
            try:
                got = run()
            except RuntimeError:  # a fault
                missed += 1
                continue
            missed += any(
                not torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True)
            )
        emulated.configure(1, POLICIES["prio"], "")
        assert missed > 0, f"{place}: nothing shows that it is there"


def test_errors_are_those_of_the_cpu(backend):
    x = torch.ones(2, 8)
    cases = [
        ("rms_norm", (x, torch.ones(7), 1e-5)),
        ("rms_norm", (x, torch.ones(8), float("nan"))),
        ("quantize_int8", (x, "128")),
        ("silu_mul", (torch.ones(2, 7),)),
        ("rotary", (x, x, x, x)),
    ]
    for op, args in cases:
        texts = []
        for where in (Backend(torch.ops.qops, "cpu"), backend):
            with pytest.raises((ValueError, RuntimeError)) as caught:
                getattr(where.ops, op).default(*map(where.on_device, args))
            texts.append(str(caught.value))
        assert texts[0] == texts[1] and texts[0].startswith(f"qops.{op}: ")
