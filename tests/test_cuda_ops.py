"""The CUDA operators in the emulator: bindings, launches and kernels as they are built for a GPU, on CPU tensors."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor

import cuda_tools
import qops  # noqa: F401  registers torch.ops.qops
from property_calls import check_one
from property_draws import HUGE, Sampler
from property_rows import ROW_OPS
from qops.testing import FLOAT_DTYPES, assert_bitwise, generator, random_activations

ROOT = cuda_tools.ROOT
POLICIES = {"fifo": 0, "random": 1, "prio": 2}
# One H or more for each shape of row.cuh: threads of a row, vectors that a thread holds, aligned or not, too many.
ALIGNED = (8, 256, 512, 1024, 1032, 2048, 4096, 8192, 8200, 16384, 20480, 32768, 33000)
UNALIGNED = (1, 7, 100, 513, 1023, 1030, 4099, 8191, 8195, 16390)


@pytest.fixture(scope="session")
def emulated(request) -> ModuleType:
    path = cuda_tools.build_emulated_operators(request.config.getoption("--emulator-sanitizers"))
    spec = importlib.util.spec_from_file_location("qops_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=POLICIES)
def policy(request, emulated):
    emulated.configure(1, POLICIES[request.param], "")
    yield request.param
    emulated.configure(1, POLICIES["prio"], "")


def assert_same(op: str, *args: Any, overload: str = "default") -> None:
    """CUDA's kernel gives the CPU's bits."""
    got, want = (getattr(getattr(ops, op), overload)(*args) for ops in (torch.ops.qops_emu, torch.ops.qops))
    got, want = ((t,) if isinstance(t, Tensor) else t for t in (got, want))
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_bitwise(a, b, f"{op} {[list(t.shape) if isinstance(t, Tensor) else t for t in args]}, result {index}")


def test_what_is_registered_has_kernels(emulated):
    registration = (ROOT / "csrc/binding/row_kernels.h").read_text()
    listed = re.findall(r'm\.impl\("([\w.]+)"', registration)
    kernels = {
        name.removeprefix("qops_emu::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("qops_emu::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    }
    assert kernels == set(listed) and len(listed) == len(kernels)
    # Everything that is bound by memory, with every overload.
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("qops::")}
    assert kernels == {name for full in names if not (name := full.removeprefix("qops::")).startswith(("int4", "int8"))}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_rows_of_every_shape(policy, dtype):
    for h in (*ALIGNED, *UNALIGNED):
        rows = 1 if h > 2048 else 6  # more than a block has where a row has a warp
        x, r = (random_activations(rows, h, dtype=dtype, seed=h + i) for i in range(2))
        w = random_activations(h, dtype=FLOAT_DTYPES[h % 3], seed=3, outliers=False)
        assert_same("rms_norm", x, w, 1e-5)
        assert_same("add_rms_norm", x, r, w, 1e-5, 1.0, "fp32")
        assert_same("rms_norm_int8", x, w, 1e-5, 0.0, "hf", ("127", "compressed-tensors", "torchao")[h % 3])
        assert_same("add_rms_norm_int8", x, r, w, 1e-5)
        for rule in ("127", "compressed-tensors", "torchao"):
            assert_same("quantize_int8", x, rule)
        assert_same("quantize_int8_asym", x)
        assert_same("quantize_int8_static", x, torch.tensor(0.02), torch.tensor(3, dtype=torch.int32))
        assert_same("silu_mul", x, r, overload="gate_up")
        assert_same("silu_mul_int8", torch.cat((x, r), dim=-1), "fp32")


def test_rows_that_begin_anywhere(policy):
    """Aligned rows, and rows one element off, of one tensor: another kernel, the same bits."""
    for dtype in FLOAT_DTYPES:
        memory = random_activations(3, 1100, dtype=dtype, seed=1)
        for start, h in ((0, 1024), (1, 1024), (8, 1000), (5, 77)):
            x = memory[:, start : start + h]
            w = memory[0, start : start + h]
            assert_same("rms_norm", x, w, 1e-5)
            assert_same("add_rms_norm_int8", x, x.flip(0), w, 1e-5)
            assert_same("quantize_int8", x)
            assert_same("silu_mul", x, x.flip(0), overload="gate_up")


def test_values_that_are_not_finite(policy):
    for dtype in FLOAT_DTYPES:
        x = random_activations(5, 300, dtype=dtype, seed=1)
        x[1, 7], x[2, 8], x[3] = float("nan"), float("-inf"), 0.0
        x[4] = torch.finfo(dtype).tiny / 4
        w = torch.ones(300)
        for rule in ("127", "compressed-tensors", "torchao"):
            assert_same("quantize_int8", x, rule)
            assert_same("rms_norm_int8", x, w, 1e-5, 0.0, "hf", rule)
        assert_same("quantize_int8_asym", x)
        assert_same("quantize_int8_static", x, torch.tensor(0.02))
        assert_same("silu_mul", x, x.flip(0), overload="gate_up")
        assert_same("rms_norm", x, w, 0.0)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_heads(policy, interleaved):
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
            assert_same("rotary", q, k, *tables, None, interleaved)
            assert_same("rotary", q, k, *tables, positions, interleaved)
            assert_same("qk_norm_rotary", q, k, w, w.flip(0), *tables, 1e-6, positions.int(), interleaved)
        got, want = qkv.clone(), qkv.clone()
        for ops, whole in ((torch.ops.qops_emu, got), (torch.ops.qops, want)):
            args = (whole[:, :, :4], whole[:, :, 4:6], w, w, cos, sin, 1e-6, positions, interleaved, 1.0, "fp32")
            ops.qk_norm_rotary_(*args)
            ops.rotary_(*args[:2], cos, sin, None, interleaved)
        assert_bitwise(got, want, f"in place, D = {d}, R = {r}")


def test_positions_out_of_range_give_nan(emulated):
    q, k = torch.ones(2, 1, 8), torch.ones(2, 1, 8)
    cos, sin = torch.ones(3, 2), torch.zeros(3, 2)
    for bad in (-1, 3, 2**62):
        got, _ = torch.ops.qops_emu.rotary(q, k, cos, sin, torch.tensor([0, bad]))
        assert bool(got[1, :, :4].isnan().all()), bad
        assert torch.equal(got[0], q[0]) and torch.equal(got[1, :, 4:], q[1, :, 4:])


# Random calls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ROW_OPS)
@given(data=st.data())
def test_random_valid_calls(emulated, op, data):
    call = ROW_OPS[op](Sampler(lambda low, high: data.draw(st.integers(low, high))))
    if call.faults or call.grad or any(t.is_meta or max(t.shape, default=0) >= HUGE for _, t in call.tensors()):
        return
    emulated.configure(data.draw(st.integers(0, 1000)), data.draw(st.integers(0, 2)), "")
    note(str(call))
    with torch.no_grad():
        expected = call.expected(call.arguments)
    operator = getattr(getattr(torch.ops.qops_emu, call.op), call.overload)
    check_one(call, "emulated", lambda: operator(**call.arguments), expected, typed=False)


# The emulator notices ------------------------------------------------------------------------------------------------


def test_every_synchronisation_is_missed_when_it_is_gone(emulated):
    def run() -> list[Tensor]:
        results: list[Tensor] = []
        for h in (64, 2048, 9000):
            x = random_activations(3, h, dtype=torch.bfloat16, seed=h)
            w = torch.ones(h)
            results += torch.ops.qops_emu.rms_norm_int8(x, w, 1e-5)
            results += torch.ops.qops_emu.quantize_int8_asym(x)
        for d in (128, 2048):
            q = random_activations(3, 2, d, dtype=torch.bfloat16, seed=d)
            # Partners in other threads; at R = D a thread of the wider head holds its own.
            cos = sin = torch.linspace(0, 1, 3 * d // 4).view(3, d // 4)
            results += torch.ops.qops_emu.qk_norm_rotary(q, q.flip(0), torch.ones(d), torch.ones(d), cos, sin, 1e-6)
        return results

    emulated.configure(1, POLICIES["prio"], "")
    want = run()
    places = [place for place in emulated.synchronisations() if ".cu" in place]
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


def test_errors_are_those_of_the_cpu(emulated):
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
        for ops in (torch.ops.qops, torch.ops.qops_emu):
            with pytest.raises((ValueError, RuntimeError)) as caught:
                getattr(ops, op).default(*args)
            texts.append(str(caught.value))
        assert texts[0] == texts[1] and texts[0].startswith(f"qops.{op}: ")
