"""What only a GPU can show of the CUDA operators: streams, graphs, compilation, tensors past 2^31 elements. That they
give the CPU's bits is in test_cuda_ops.py, with and without one.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qops
from qops.nn import MLP, Int4Linear, Int8Linear, RMSNorm
from qops.testing import assert_accurate, assert_bitwise, generator, random_activations
from tests.support.cuda import cuda_tools
from tests.support.properties.overloads import SIZED, overloads, sized_call, tensor_arguments, valid_calls
from tests.support.properties.property_calls import Call

pytestmark = pytest.mark.skipif(
    not qops.build_info()["cuda"] or not torch.cuda.is_available(), reason="needs a build with CUDA kernels, and a GPU"
)
EPS = 1e-5
T, H, HEADS, D = 33, 1000, 4, 64
Inputs = dict[str, Tensor]
# Long enough for work that has not waited to overtake it.
SLEEP_CYCLES = 200_000_000


ON_ROWS = [name.removesuffix(".default") for name in SIZED if name.endswith(".default")]


def on_rows(op: str, seed: int = 0) -> Call:
    call = sized_call(f"{op}.default", T, H, torch.bfloat16, seed=seed)
    assert call is not None
    return call


def inputs(seed: int = 0, device: str = "cuda") -> Inputs:
    made = {name: random_activations(T, H, dtype=torch.bfloat16, seed=seed + i) for i, name in enumerate("xr")}
    made["w"] = random_activations(H, dtype=torch.float32, seed=2, outliers=False)
    made["qkv"] = random_activations(T, 2 * HEADS, D, dtype=torch.bfloat16, seed=seed + 3)
    made["cos"], made["sin"] = (f(torch.arange(T * D // 2).view(T, D // 2) / 7.0) for f in (torch.cos, torch.sin))
    made |= {f"{op} {name}": t for op in ON_ROWS for name, t in on_rows(op, seed).tensors()}
    return {name: t.to(device) for name, t in made.items()}


def heads(i: Inputs) -> tuple[Tensor, Tensor]:
    return i["qkv"][:, :HEADS], i["qkv"][:, HEADS:]


def in_place(i: Inputs, run: Callable[[Tensor, Tensor], None]) -> tuple[Tensor, Tensor]:
    q, k = (t.clone() for t in heads(i))
    run(q, k)
    return q, k


WEIGHTS: dict[str, qops.Int8Weight] = {}


@pytest.fixture(autouse=True)
def weights():
    """Packed before the first test, as under capture it would be an error; not by an import, which ends all tests."""
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        if device not in WEIGHTS:
            weight = qops.Int8Weight.quantize(random_activations(72, H, dtype=torch.float32, seed=4))
            WEIGHTS[device] = weight.to(device)


def public(op: str) -> Callable[[Inputs], Any]:
    """The function, with the tensors of that name."""
    call = on_rows(op)
    names, typed = [name for name, _ in call.tensors()], call.typed
    assert typed is not None
    return lambda i: typed({**call.arguments, **{name: i[f"{op} {name}"] for name in names}})


OPS: dict[str, Callable[[Inputs], Tensor | tuple[Tensor, ...]]] = {
    **{op: public(op) for op in ON_ROWS},
    "int8_gemm": lambda i: qops.int8_gemm(*qops.quantize_int8(i["x"]), WEIGHTS[str(i["x"].device)]),
    "rotary": lambda i: qops.rotary(*heads(i), i["cos"], i["sin"]),
    "rotary_": lambda i: in_place(i, lambda q, k: qops.rotary_(q, k, i["cos"], i["sin"])),
    "qk_norm_rotary": lambda i: qops.qk_norm_rotary(*heads(i), i["w"][:D], i["w"][:D], i["cos"], i["sin"], EPS),
    "qk_norm_rotary_": lambda i: in_place(
        i, lambda q, k: qops.qk_norm_rotary_(q, k, i["w"][:D], i["w"][:D], i["cos"], i["sin"], EPS)
    ),
}
each_op = pytest.mark.parametrize("op", OPS)


def tupled(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def on_the_cpu(op: str, seed: int = 0) -> tuple[Tensor, ...]:
    return tupled(OPS[op](inputs(seed, "cpu")))


def assert_equal(op: str, got: Tensor | tuple[Tensor, ...], seed: int = 0) -> None:
    for index, (a, b) in enumerate(zip(tupled(got), on_the_cpu(op, seed), strict=True)):
        assert_bitwise(a.cpu(), b, f"{op}, result {index}")


def test_a_gpu_computes_what_the_emulator_does(tmp_path):
    """Every form of every instruction, every sound kernel of tests/emulator: the one result that is right."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an sm_90a, which has all the instructions")
    program = cuda_tools.build_hardware_tests(tmp_path)
    result = subprocess.run([str(program), "20"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr


@each_op
def test_runs_on_the_current_stream_and_waits_for_nobody(op):
    """On a side stream, behind a copy that comes late; and the host does not wait."""
    there, host = inputs(), inputs(1, "cpu")
    late = {name: t.pin_memory() for name, t in host.items()}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        for name, t in there.items():
            t.copy_(late[name], non_blocking=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = OPS[op](there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not stream.query(), "the host has waited for the stream"
    stream.synchronize()
    assert_equal(op, got, 1)


@each_op
def test_is_captured_into_a_graph(op):
    static = inputs()
    OPS[op](static)  # loads the kernels, which capture does not allow
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = OPS[op](static)
    for seed in (5, 9):
        for name, t in inputs(seed).items():
            static[name].copy_(t)
        graph.replay()
        assert_equal(op, got, seed)


@each_op
def test_gives_the_same_bits_every_time(op):
    first = tupled(OPS[op](inputs()))
    for _ in range(20):
        for a, b in zip(tupled(OPS[op](inputs())), first, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def in_eight_threads(work: Callable[[int], None]) -> None:
    """``work(seed)``, each on a stream of its own."""
    errors: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                work(seed)
        except BaseException as error:  # what a thread raises is lost
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


@each_op
def test_runs_in_eight_threads_on_their_own_streams(op):
    def work(seed: int) -> None:
        there = inputs(seed)
        for _ in range(8):
            got = OPS[op](there)
        torch.cuda.current_stream().synchronize()
        assert_equal(op, got, seed)

    in_eight_threads(work)


@each_op
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(op, backend):
    if op.endswith("_") and backend == "inductor":
        pytest.skip("functionalised like the others; aot_eager shows it")
    torch._dynamo.reset()
    assert_equal(op, torch.compile(OPS[op], fullgraph=True, backend=backend)(inputs()))


@pytest.mark.parametrize("op", ["quantize_int8", "rms_norm", "silu_mul"])
def test_opcheck(op):
    with torch.inference_mode(False), torch.no_grad():
        x, w = inputs()["x"].clone(), inputs()["w"].clone()
        args = {"rms_norm": (x, w, EPS)}.get(op, (x,))
        torch.library.opcheck(getattr(torch.ops.qops, op).default, args)


def test_tensors_past_two_to_the_31():
    """The last rows of 2^31 elements and more; the first ones are the same values."""
    rows, columns = (1 << 31) // 4096 + 3, 4096
    free, _ = torch.cuda.mem_get_info()
    if free < 5 * rows * columns:
        pytest.skip("needs 20 GiB of GPU memory")
    tail = random_activations(3, columns, dtype=torch.bfloat16, seed=0)
    w = torch.ones(columns, dtype=torch.bfloat16)
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[:3], x[-3:] = tail.cuda(), tail.cuda()
    for got, want in (
        (qops.rms_norm(x, w.cuda(), EPS), qops.rms_norm(tail, w, EPS)),
        (qops.quantize_int8(x)[0], qops.quantize_int8(tail)[0]),
        (qops.silu_mul(x), qops.silu_mul(tail)),
    ):
        assert_bitwise(got[-3:].cpu(), want)
        assert_bitwise(got[:3].cpu(), want)


def test_a_stride_past_two_to_the_31():
    base = torch.zeros((1 << 31) + 4096, dtype=torch.float16, device="cuda")
    tail = random_activations(2, 1000, dtype=torch.float16, seed=0)
    x = base.as_strided((2, 1000), ((1 << 31) + 8, 1))
    x.copy_(tail)
    assert_bitwise(
        qops.rms_norm(x, torch.ones(1000, device="cuda"), EPS).cpu(), qops.rms_norm(tail, torch.ones(1000), EPS)
    )


def test_tensors_of_two_devices_are_refused():
    x, w = inputs()["x"], inputs()["w"]
    for wrong in (w.cpu(), w.to("meta")):
        with pytest.raises(RuntimeError, match=r"qops\.rms_norm: weight must be on cuda:0, got (cpu|meta)"):
            qops.rms_norm(x, wrong, EPS)


def refuses_each_tensor_elsewhere(operator, arguments: dict[str, object]) -> set[str]:
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        with pytest.raises(RuntimeError, match=rf": {name} must be on (cuda:0|a CUDA device), got cpu"):
            operator(**{**arguments, name: tensor.cpu()})
    return set(tensors)


OF_ROWS = {name: op for name, op in overloads().items() if not name.startswith(("check_layout", "int4_", "int8_"))}


@pytest.mark.parametrize("name", OF_ROWS)
def test_each_tensor_of_an_operator_on_rows_must_be_on_the_gpu(name):
    operator, seen = OF_ROWS[name], set()
    for call in valid_calls(name, 20):
        if sum(1 for _ in call.tensors()) > 1:  # a lone one tells where it runs
            seen |= refuses_each_tensor_elsewhere(operator, call.on("cuda").arguments)
    assert seen == set(tensor_arguments(operator)) or len(tensor_arguments(operator)) == 1


def test_each_tensor_of_a_product_must_be_on_the_gpu():
    n, k, m = 32, 64, 3
    dense = torch.randn(n, k, generator=generator(1))
    tensors = qops.Int4Weight.quantize(dense, 32, False).canonical()
    int4 = qops.Int4Weight.from_canonical(**tensors, kind="zero_point", perm=torch.arange(k)).to("cuda")
    int8 = qops.Int8Weight.quantize(dense).to("cuda")
    ones = torch.ones(n, device="cuda")
    common = {"bias": ones, "out_features": n}
    ends = [
        {"residual": torch.zeros(m, n, dtype=torch.bfloat16, device="cuda")},
        {"out_scale": ones[:1], "out_zero_point": torch.zeros(1, dtype=torch.int32, device="cuda")},
    ]
    for end in ends:
        out = torch.empty(m, n, dtype=torch.bfloat16 if "residual" in end else torch.int8, device="cuda")
        x = torch.ones(m, k, dtype=torch.bfloat16, device="cuda")
        weight = {"packed": int4.packed, "scales": int4.scales, "zeros": int4.zeros, "perm": int4.perm}
        arguments = {"x": x, **weight, **common, "group_size": 32, "kind": 1, **end, "out": out}
        seen = refuses_each_tensor_elsewhere(torch.ops.qops.int4_gemm.fused_out, arguments)
        assert {"zeros", "perm", "bias", *end, "out"} <= seen
        rows = {
            "q": x.to(torch.int8),
            "scale": ones[:m],
            "zero_point": torch.zeros(m, dtype=torch.int32, device="cuda"),
            "packed": int8.packed,
            "w_scale": int8.scales,
        }
        both = {name: rows[name] for name in ("q", "scale")} | weight | common | {"group_size": 32, "kind": 1}
        arguments = {**both, "out_dtype": torch.bfloat16, **end, "out": out}
        seen = refuses_each_tensor_elsewhere(torch.ops.qops.int4_int8_gemm.fused_out, arguments)
        assert {"scale", "zeros", "perm", "bias", *end, "out"} <= seen
        arguments = {**rows, **common, "out_dtype": torch.bfloat16, **end, "out": out}
        seen = refuses_each_tensor_elsewhere(torch.ops.qops.int8_gemm.fused_out, arguments)
        assert {"scale", "zero_point", "w_scale", "bias", *end, "out"} <= seen


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_a_device_that_is_not_current():
    with torch.cuda.device(0):
        for op in OPS:
            assert_equal(op, OPS[op](inputs(device="cuda:1")))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 8192), (5, 64, 8192), (33, 64, 8192), (2048, 2048, 2048)])
def test_int4_gemm_in_graphs_on_streams_and_behind_late_inputs(m, n, k):
    """Against a call alone, bit for bit; permuted columns, a split K and cuBLAS take scratch."""
    weight = qops.Int4Weight.quantize(torch.randn(n, k, generator=generator(1)), group_size=64)
    perm = torch.randperm(k, generator=generator(2)).int()
    w = qops.Int4Weight.from_canonical(**weight.canonical(), perm=perm, kind="symmetric").to("cuda")
    x, other = (random_activations(m, k, dtype=torch.bfloat16, seed=seed).cuda() for seed in (0, 1))
    want = [qops.int4_gemm(t, w) for t in (x, other)]
    static = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = qops.int4_gemm(static, w)
    for t, expected in zip((other, x), reversed(want), strict=True):
        static.copy_(t)
        graph.replay()
        assert_bitwise(got.cpu(), expected.cpu())
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        static.copy_(other)
        results = [qops.int4_gemm(static, w) for _ in range(8)]
    stream.synchronize()
    for result in results:
        assert_bitwise(result.cpu(), want[1].cpu())


def test_int4_gemm_in_eight_threads_that_need_little_and_much_shared_memory():
    """One kernel, launched with more of it by one thread than by another."""
    weights = [
        qops.Int4Weight.quantize(random_activations(n, 1024, dtype=torch.float32, seed=n), group_size=128).to("cuda")
        for n in (8, 512, 4096, 28672)
    ]
    x = random_activations(3, 1024, dtype=torch.bfloat16, seed=1).cuda()
    want = [qops.int4_gemm(x, w).cpu() for w in weights]

    def work(seed: int) -> None:
        for index in range(seed, seed + 200):
            got = qops.int4_gemm(x, weights[index % 4])
        assert_bitwise(got.cpu(), want[index % 4], f"thread {seed}")

    in_eight_threads(work)


def test_int4_gemm_of_many_rows():
    """Through cuBLAS where it has faster instructions, but not if a row's bits must not depend on M."""
    w = qops.Int4Weight.quantize(torch.randn(2048, 2048, generator=generator(1)), group_size=128).to("cuda")
    wide = random_activations(2048, 2048 + 24, dtype=torch.bfloat16, seed=1).cuda()
    columns = wide[:, 8 : 2048 + 8]
    x, dense = columns.contiguous(), w.dequantize(torch.bfloat16)
    exact = x.double() @ w.dequantize().double().T
    y, invariant = qops.int4_gemm(x, w), qops.int4_gemm(x, w, batch_invariant=True)
    for result in (y, invariant, qops.int4_gemm(columns, w)):
        assert_accurate(result.cpu(), exact.cpu(), (x @ dense.T).cpu(), "2048 rows")
    assert_bitwise(qops.int4_gemm(x[-5:], w, batch_invariant=True).cpu(), invariant[-5:].cpu(), "five of them")
    through_cublas = torch.cuda.get_device_capability()[0] in (9, 10)
    assert torch.equal(y, invariant) == (not through_cublas)


@pytest.mark.parametrize("m", [1, 33])
def test_int4_gemm_in_eight_threads_on_their_own_streams(m):
    """The scratch of a call is its own: against the same calls one after the other."""
    w = qops.Int4Weight.quantize(torch.randn(64, 8192, generator=generator(1)), group_size=64).to("cuda")
    xs = [random_activations(m, 8192, dtype=torch.bfloat16, seed=seed).cuda() for seed in range(8)]
    want = [qops.int4_gemm(x, w).cpu() for x in xs]

    def work(seed: int) -> None:
        results = [qops.int4_gemm(xs[seed], w) for _ in range(20)]
        torch.cuda.current_stream().synchronize()
        for result in results:
            assert_bitwise(result.cpu(), want[seed])

    in_eight_threads(work)


def random_mlp(scheme: str) -> MLP:
    def linear(n: int, k: int, seed: int) -> Int4Linear | Int8Linear:
        weight = torch.randn(n, k, generator=generator(seed)) / k**0.5
        if scheme == "int4":
            return Int4Linear(qops.Int4Weight.quantize(weight, 64))
        return Int8Linear(qops.Int8Weight.quantize(weight))

    return MLP(linear(704, 512, 1), linear(704, 512, 2), linear(512, 704, 3))


@pytest.mark.parametrize("m", [1, 16, 33])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_a_chain_compiles_with_max_autotune_and_its_cuda_graphs(scheme, m):
    """Norm, gate and up, SiLU-mul, down, addition: the bits of eager mode, with other inputs in the same graph."""
    rule = "127" if scheme == "int8" else None
    norm = RMSNorm(random_activations(512, dtype=torch.bfloat16, seed=4, outliers=False), EPS, int8=rule)
    norm, mlp = norm.cuda(), random_mlp(scheme).cuda()

    def chain(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, z = norm.add(x, residual)
        return mlp(y), z

    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, mode="max-autotune")
    for seed in range(6):  # two to warm up, one to record, the rest to replay
        x, residual = (random_activations(m, 512, dtype=torch.bfloat16, seed=2 * seed + i).cuda() for i in range(2))
        torch.compiler.cudagraph_mark_step_begin()
        got = [t.clone() for t in compiled(x, residual)]
        for a, b in zip(got, chain(x, residual), strict=True):
            assert_bitwise(a.cpu(), b.cpu(), f"{scheme}, {m} rows, call {seed}")
