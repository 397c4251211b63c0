"""What a call asks of CUDA's runtime: which GPU and stream its kernels run on, how much shared memory they are allowed,
when scratch comes and goes, and what becomes of a refusal. The bindings and launches are those of _C_cuda; the runtime
and torch's side of GPUs are tests/emulator/runtime.cpp and tests/emulated/gpu_torch.cpp.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qops.testing import assert_bitwise, generator, random_activations
from tests.support.cuda.cuda_backend import emulated_operators
from tests.support.cuda.int4_plans import DECODE, Gpu, Question, plans
from tests.support.cuda.launch_records import kernel_names, launches, limits
from tests.support.properties.overloads import ROW_OPS, valid_calls

KIB = 1024
OPT_IN = {80: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB}
# Multiprocessors of a GPU that no other test has: where no kernel has been allowed anything so far.
unseen = itertools.count(200)


@pytest.fixture
def runtime(emulated) -> Iterator[ModuleType]:
    """The module, whose options are put back behind the test."""
    emulated.take_calls()
    yield emulated
    emulated.place_tensors()
    emulated.place_elsewhere(0)
    emulated.set_runtime(1)
    emulated.configure(1, 2, "")


def recorded(runtime: ModuleType, call: Callable[[], Any], stream: int = 1) -> list[str]:
    runtime.set_runtime(stream, False, "", True)
    call()
    runtime.set_runtime(stream)
    return runtime.take_calls()


def int4_weight(n: int, k: int, group_size: int = 64) -> tuple[Tensor, ...]:
    codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, generator=generator(n))
    scales = torch.rand(-(-n // 16), k // group_size, 16, generator=generator(k)) / 8
    return torch.ops.qops_emu.int4_pack(codes), scales


def int4_gemm(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Callable[[], Tensor]:
    packed, scales = int4_weight(n, k)
    x = random_activations(m, k, dtype=dtype, seed=m)
    perm = torch.randperm(k, generator=generator(1)).int() if more.pop("act_order", False) else None
    return lambda: torch.ops.qops_emu.int4_gemm(x, packed, scales, None, perm, None, n, 64, 0, **more)


def int8_gemm(m: int, n: int, k: int, shift: int = 0) -> Callable[[], Tensor]:
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator(n))
    packed, scales = torch.ops.qops_emu.int8_pack(codes), torch.ones(-(-n // 16), 1, 16)
    q = torch.randint(-128, 128, (m, k + 8), dtype=torch.int8, generator=generator(m))[:, shift : k + shift]
    return lambda: torch.ops.qops_emu.int8_gemm(q, torch.ones(m), None, packed, scales, None, n, torch.float32)


def int4_int8_gemm(m: int, n: int, k: int, act_order: bool = False) -> Callable[[], Tensor]:
    packed, scales = int4_weight(n, k)
    q = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator(m))
    perm = torch.randperm(k, generator=generator(1)).int() if act_order else None
    weight = (packed, scales, None, perm, None, n, 64, 0, torch.float32)
    return lambda: torch.ops.qops_emu.int4_int8_gemm(q, torch.ones(m), *weight)


def int8_weight_only_gemm(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Tensor]:
    packed = torch.ops.qops_emu.int8_pack(torch.ones(n, k, dtype=torch.int8))
    scales, x = torch.ones(-(-n // 16), k // 64, 16), random_activations(m, k, dtype=dtype, seed=m)
    return lambda: torch.ops.qops_emu.int8_weight_only_gemm(x, packed, scales, None, None, None, n, 64)


def row_call(name: str) -> Callable[[], Any]:
    """A call of this overload that runs a kernel."""
    op, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.qops_emu, op), overload)
    arguments = next(valid_calls(name, 1)).arguments
    return lambda: operator(**arguments)


def weight_calls() -> dict[str, Callable[[], Any]]:
    packed4, scales = int4_weight(40, 128)
    packed8 = torch.ops.qops_emu.int8_pack(torch.ones(40, 72, dtype=torch.int8))
    out = torch.empty(3, 40, dtype=torch.float16)
    ops, x = torch.ops.qops_emu, random_activations(3, 128, dtype=torch.float16, seed=1)
    return {
        "int4_pack": lambda: ops.int4_pack(torch.ones(40, 64, dtype=torch.uint8)),
        "int4_unpack": lambda: ops.int4_unpack(packed4, 40),
        "int4_dequantize": lambda: ops.int4_dequantize(packed4, scales, None, 40, 64, 0, torch.float16),
        "int4_gemm.out": lambda: ops.int4_gemm.out(x, packed4, scales, None, None, None, 40, 64, 0, out=out),
        "int4_gemm decode": int4_gemm(3, 40, 576),
        "int4_gemm decode, K shared": int4_gemm(3, 24, 8192),
        "int4_gemm tiled": int4_gemm(40, 136, 576, torch.float16),
        "int4_gemm tiled, K shared": int4_gemm(28, 136, 2304, torch.float16, act_order=True, batch_invariant=True),
        "int4_gemm of float32": int4_gemm(3, 40, 576, torch.float32),
        "int4_gemm dense": int4_gemm(300, 144, 576, act_order=True),
        "int4_gemm dense of float16": int4_gemm(300, 144, 576, torch.float16),
        "int4_int8_gemm": int4_int8_gemm(40, 136, 576),
        "int4_int8_gemm, K shared": int4_int8_gemm(5, 40, 4608, act_order=True),
        "int8_weight_only_gemm": int8_weight_only_gemm(40, 136, 576),
        "int8_weight_only_gemm, K shared": int8_weight_only_gemm(3, 24, 8192),
        "int8_pack": lambda: ops.int8_pack(torch.ones(40, 64, dtype=torch.int8)),
        "int8_unpack": lambda: ops.int8_unpack(packed8, 40),
        "int8_gemm": int8_gemm(40, 136, 200),
        "int8_gemm, K shared": int8_gemm(5, 40, 4104, shift=3),
    }


WITH_SCRATCH = ("K shared", "float32", "dense")


@pytest.fixture(scope="module")
def calls(emulated) -> dict[str, Callable[[], Any]]:
    """Of every operator, and of every way that those with a weight have."""
    names = [f"{op}.{overload}" for op in ROW_OPS for overload in getattr(torch.ops.qops_emu, op).overloads()]
    found = {name: row_call(name) for name in names} | weight_calls()
    assert {name.partition(".")[0].partition(" ")[0].rstrip(",") for name in found} == emulated_operators() - {
        "check_layout"
    }
    return found


# GPUs and streams ----------------------------------------------------------------------------------------------------


def test_kernels_run_on_the_gpu_of_the_tensors_and_its_current_stream(runtime, calls):
    """Which is not the current GPU; that one is current again afterwards."""
    runtime.configure(1, 2, "", 90, 132)
    before = runtime.current_gpu()
    for turn, (arch, multiprocessors) in enumerate(((89, 133), (90, 1))):
        gpu = runtime.place_tensors(arch, multiprocessors)
        for index, (name, call) in enumerate(calls.items()):
            number = 2 + (turn + index) % 5
            record = recorded(runtime, call, number)
            seen = {(launch.gpu, launch.stream % 4096) for launch in launches(record)}
            assert seen == {(gpu, number)}, name
            assert runtime.current_gpu() == before, name


def test_plans_are_those_of_the_gpu_of_the_tensors(runtime):
    """As are sizes of scratch, in turns between GPUs of different sizes and generations."""
    m, n, k = 3, 200, 4096
    call = int4_gemm(m, n, k, batch_invariant=True)
    seen = set()
    for arch, multiprocessors in ((90, 132), (89, 5), (80, 5), (90, 132), (89, 5)):
        runtime.configure(1, 2, "", 90, 7)
        runtime.place_tensors(arch, multiprocessors)
        (plan,) = plans([Question(m, n, k, 64, 0, Gpu(multiprocessors, OPT_IN[arch], arch))])
        assert plan.kind == DECODE
        record = recorded(runtime, call)
        first, *others = launches(record)
        assert (first.grid, first.shared, len(others)) == (plan.blocks, plan.shared_bytes, plan.is_split)
        assert [f"allocate {plan.scratch_bytes}" in record] == [plan.scratch_bytes > 0]
        seen.add((first.grid, first.shared, first.gpu))
    assert len(seen) == 3
    runtime.configure(1, 2, "", 90, 7)
    for arch, is_dense in ((89, False), (90, True)):  # cuBLAS is for GPUs that have wgmma
        runtime.place_tensors(arch, 1)
        wide = recorded(runtime, int4_gemm(300, 144, 576))
        assert any(line.startswith("mm ") for line in wide) == is_dense, arch


def test_the_operator_that_multiplies_for_the_dense_plan_is_torchs(runtime):
    """The emulator has only a stand-in: aten::mm.dtype_out exists on GPUs alone, but its schema everywhere."""
    wanted = "aten::mm.dtype_out(Tensor self, Tensor mat2, ScalarType out_dtype, *, Tensor(a!) out) -> Tensor(a!)"
    assert str(torch.ops.aten.mm.dtype_out._schema) == wanted
    runtime.configure(1, 2, "", 90, 1)
    record = recorded(runtime, int4_gemm(300, 144, 576))
    assert [line for line in record if line.startswith("mm ")] == ["mm 300 144 576"]


GEMMS_AND_WEIGHTS = (
    "int4_gemm",
    "int4_int8_gemm",
    "int8_gemm",
    "int8_weight_only_gemm",
    "int4_pack",
    "int4_unpack",
    "int4_dequantize",
    "int8_pack",
    "int8_unpack",
)
OVERLOADS = [
    f"{op}.{overload}" for op in (*ROW_OPS, *GEMMS_AND_WEIGHTS) for overload in getattr(torch.ops.qops, op).overloads()
]


@pytest.mark.parametrize("name", OVERLOADS)
def test_all_tensors_have_to_be_on_one_gpu(runtime, name):
    """Each alone on another one; nothing is launched."""
    op, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.qops_emu, op), overload)
    seen = 0

    def fits(given: dict[str, Any]) -> bool:  # packed as on a GPU, float16 or bfloat16, zeros not
        if not op.startswith(("int4", "int8")):
            return True
        block = 64 * (8 if op.startswith("int4") else 16)
        return (
            ("packed" not in given or given["packed"].shape[-1] % block == 0)
            and (op != "int4_gemm" or given["x"].dtype != torch.float32)
            and getattr(given.get("zeros"), "dtype", None) in (None, torch.uint8, torch.float32)
            and getattr(given.get("scales"), "dtype", None) != torch.int8
        )

    calls = (call.arguments for call in valid_calls(name, 60) if fits(call.arguments))
    for call in itertools.islice(calls, 3):
        arguments = {arg: t.clone() if isinstance(t, torch.Tensor) else t for arg, t in call.items()}
        tensors = {arg: t for arg, t in arguments.items() if isinstance(t, torch.Tensor)}
        for arg, tensor in tensors.items() if len(tensors) > 1 else ():
            runtime.place_elsewhere(tensor.data_ptr())
            runtime.set_runtime(1, False, "", True)
            with pytest.raises(RuntimeError, match=rf"^qops\.{op}: (\w+) must be on cuda:\d+, got cuda:\d+") as caught:
                operator(**arguments)
            # Where it is the one that the others are held against, any of those is named.
            assert arg == next(iter(tensors)) or f": {arg} must be on" in str(caught.value)
            assert launches(runtime.take_calls()) == []
            seen += 1
    assert seen > 0 or len(tensors) == 1


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_kernels_that_add_shared_sums_depend_on_the_product(runtime, calls, arch):
    """From sm_90 on, and the product tells them that they may start; of no other launch is either true."""
    names, found = kernel_names(runtime.__file__), set()
    for name, call in calls.items():
        for multiprocessors in (1, 132):
            runtime.configure(1, 2, "", arch, multiprocessors)
            made = launches(recorded(runtime, call))
            # finish_kernel<T, 1> makes y of what cuBLAS has left.
            adds = [re.search(r"finish_kernel<\w+, 8>|\w+_add_kernel", names[each.kernel]) for each in made]
            found |= {each[0] for each in adds if each}
            depends = [each is not None and arch >= 90 for each in adds]
            assert [each.is_dependent for each in made] == depends, name
            assert [each.has_told for each in made] == [*depends[1:], False], name
            assert any(adds) or not (name.endswith("K shared") and multiprocessors == 132), name
    assert len(found) == 4, found


# Shared memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_a_limit_is_set_once_and_to_its_maximum(runtime, arch):
    """However large and in which order launches are; less the kernel's own arrays, which qk_norm_rotary has."""
    runtime.configure(1, 2, "", arch, next(unseen))
    x, w, table = torch.ones(2, 1, 3000), torch.ones(3000), torch.ones(2, 8)
    small, large = x[..., :600].contiguous(), x

    def heads(q: Tensor) -> Callable[[], Any]:
        d = q.shape[-1]
        return lambda: torch.ops.qops_emu.qk_norm_rotary(q, q, w[:d], w[:d], table, table, 1e-6)

    heads(small)()  # so that the emulator has seen the arrays that nvcc would know of
    heads(large)()
    runtime.configure(1, 2, "", arch, next(unseen))
    gemms = [int4_gemm(m, n, 1024, batch_invariant=True) for m, n in ((3, 8), (3, 3200), (12, 40), (3, 40), (3, 6400))]
    gemms += [int8_gemm(m, 40, 72) for m in (8, 1, 40)]
    record = recorded(runtime, lambda: [call() for call in (*gemms, *gemms, heads(small), heads(large), heads(small))])
    shared = {launch.kernel: launch.shared for launch in launches(record) if launch.shared > 0}
    found = limits(record)
    assert found.keys() == shared.keys() and len(found) >= 4
    assert {len(values) for values in found.values()} == {1}
    most = Counter(values[0] for values in found.values())
    assert most.pop(OPT_IN[arch]) >= 2
    assert most and all(OPT_IN[arch] - KIB < bytes_ < OPT_IN[arch] for bytes_ in most)
    assert len({launch.shared for launch in launches(record)}) > 4


def test_a_limit_is_set_once_by_all_threads(runtime):
    multiprocessors, records, errors = next(unseen), [], []
    together = threading.Barrier(4)
    sizes = [int4_gemm(3, n, 1024, batch_invariant=True) for n in (8, 640, 40, 3200)]

    def work(thread: int) -> None:
        try:
            runtime.configure(1, 2, "", 90, multiprocessors)
            together.wait()
            with torch.inference_mode():
                for index in range(4):
                    records.append(recorded(runtime, sizes[(thread + index) % 4]))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    found = limits([line for record in records for line in record])
    assert found and {tuple(values) for values in found.values()} == {(OPT_IN[90],)}


# Scratch and captures ------------------------------------------------------------------------------------------------


def test_scratch_lives_until_the_last_launch(runtime, calls):
    """What is let go of holds NaN from then on, so that a kernel which still reads it has no chance in other tests."""
    with_scratch = [name for name in calls if name.endswith(WITH_SCRATCH)]
    assert len(with_scratch) == 7
    for name in with_scratch:
        runtime.configure(1, 2, "", 90, 1 if name.endswith("dense") else 132)
        record = [line.split()[0] for line in recorded(runtime, calls[name])]
        work = [index for index, verb in enumerate(record) if verb in ("launch", "mm")]
        assert record.count("free") == 1 and record.count("allocate") == 2, (name, record)  # and y
        assert record.index("allocate") < work[0] and work[-1] < record.index("free"), (name, record)
        assert len(work) >= 2, name


def test_calls_can_be_captured(runtime, calls):
    """The first call of a kernel on a GPU as well; nothing waits, and no memory comes from the driver."""
    for name in ("int4_gemm decode", "int4_gemm tiled", "int4_int8_gemm", "int8_gemm", "int4_gemm dense"):
        runtime.configure(1, 2, "", 90, 3)
        want = calls[name]()
        runtime.configure(1, 2, "", 90, next(unseen))
        runtime.set_runtime(3, True)
        assert_bitwise(calls[name](), want, name)
        runtime.set_runtime(1)
    runtime.set_runtime(3, True)
    for call in calls.values():
        call()


# Grids ---------------------------------------------------------------------------------------------------------------


def test_grids_have_a_limit(runtime):
    """What passes it goes on in blocks that exist; 65535 is the most in y. The kernels themselves do not run."""
    strips_of_block, most = 4, 65535
    n = 16 * strips_of_block * most + 16
    packed = torch.from_numpy(np.zeros((n // 16, 1, 32, 4), np.int32)).view(torch.uint8).view(n // 16, -1)
    scales = torch.from_numpy(np.zeros((n // 16, 1, 16), np.float32))

    def wide() -> None:
        runtime.set_runtime(1, False, "", True, False)
        torch.ops.qops_emu.int4_dequantize(packed, scales, None, n, 16, 0, torch.bfloat16)

    (launch,) = launches(recorded(runtime, wide))
    assert launch.grid == most


# Refusals ------------------------------------------------------------------------------------------------------------


def refusal(runtime: ModuleType, function: str, call: Callable[[], Any]) -> str:
    runtime.set_runtime(1, False, function)
    with pytest.raises(RuntimeError) as caught:
        call()
    runtime.set_runtime(1)
    return str(caught.value)


def test_a_refused_launch_is_an_error(runtime, calls):
    """Whichever of a call's launches it is, in CUDA's words."""
    for name, call in calls.items():
        op = name.partition(".")[0].partition(" ")[0].rstrip(",")
        want = f"qops.{op}: CUDA refused to launch the kernel: too many resources requested for launch"
        assert want in refusal(runtime, "cudaLaunchKernelEx", call), name
        call()


@pytest.mark.parametrize(
    "function, reason",
    [
        ("cudaGetDevice", "invalid device ordinal"),
        ("cudaDeviceGetAttribute", "invalid device ordinal"),
        ("cudaFuncGetAttributes", "invalid device function"),
        ("cudaFuncSetAttribute", "invalid argument"),
    ],
)
def test_what_a_launch_has_to_know_and_cannot_is_an_error(runtime, function, reason):
    """And not remembered as if it had been answered."""
    for op, call in (("int4_gemm", int4_gemm(3, 40, 576)), ("int8_gemm", int8_gemm(40, 136, 200))):
        runtime.configure(1, 2, "", 90, 3)
        want = call()
        runtime.configure(1, 2, "", 90, next(unseen))
        for _ in range(2):
            text = refusal(runtime, function, call)
            assert text.startswith(f"qops.{op}: CUDA refused to launch the kernel: {reason}"), text
        assert_bitwise(call(), want, op)
