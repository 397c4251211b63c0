"""What the emulated module says of plans, against what its kernels are launched with and what the planner gives."""

from __future__ import annotations

import pytest
import torch

from qops.testing import generator, random_activations
from tests.support.cuda.int4_plans import DECODE, DENSE, TILED, Gpu, Question, plans
from tests.support.cuda.launch_records import launches

KIB = 1024
ROUTES = {DECODE: "decode", TILED: "tiled", DENSE: "dense"}


@pytest.fixture
def runtime(emulated):
    emulated.take_calls()
    emulated.configure(1, 2, "", 90, 132)
    yield emulated
    emulated.set_runtime(1)
    emulated.configure(1, 2, "")


def facts(line: str) -> dict[str, str]:
    return dict(word.split("=") for word in line.split(" -> ")[1].split())


def explain(module, op: str, **problem: object) -> dict[str, str]:
    line = module.explain(op, "\n".join(f"{name}={value}" for name, value in problem.items()))
    assert line.startswith(f"qops.{op} ")
    return facts(line)


def first_launch(runtime, call):
    runtime.set_runtime(1, False, "", True)
    call()
    runtime.set_runtime(1)
    return launches(runtime.take_calls())[0]


@pytest.mark.parametrize(("m", "n", "k"), [(1, 4096, 4096), (3, 24, 8192), (40, 136, 576), (2048, 4096, 4096)])
def test_int4_gemm_says_its_plan(runtime, m, n, k):
    said = explain(runtime, "int4_gemm", m=m, n=n, k=k, group_size=64, dtype="bfloat16")
    (plan,) = plans([Question(m, n, k, 64, 0, Gpu(132, 227 * KIB, 90), may_round=True)])
    assert said["route"] == ROUTES[plan.kind] and (said["sm"], said["multiprocessors"]) == ("90", "132")
    assert int(said["scratch_bytes"]) == plan.scratch_bytes and said["copies_x"] == "no"
    if plan.kind != DENSE:
        assert [int(said[name]) for name in ("blocks", "k_parts", "stages", "shared_bytes")] == [
            plan.blocks,
            plan.k_parts,
            plan.stages,
            plan.shared_bytes,
        ]


def test_routes_are_those_of_the_gpu(runtime):
    problem = {"m": 2048, "n": 4096, "k": 4096, "group_size": 64, "dtype": "bfloat16"}
    assert explain(runtime, "int4_gemm", **problem)["route"] == "dense"
    assert explain(runtime, "int4_gemm", **problem, batch_invariant=True)["route"] == "tiled"
    runtime.configure(1, 2, "", 80, 108)
    said = explain(runtime, "int4_gemm", **problem)
    assert (said["route"], said["sm"], said["multiprocessors"]) == ("tiled", "80", "108")


@pytest.mark.parametrize("m", [3, 40])
def test_what_is_said_is_what_is_launched(runtime, m):
    x = random_activations(m, 512, dtype=torch.bfloat16, seed=m)
    ops, n = torch.ops.qops_emu, 136
    q = torch.randint(-128, 128, (m, 512), dtype=torch.int8, generator=generator(m))
    packed4 = ops.int4_pack(torch.ones(n, 256, dtype=torch.uint8))
    packed8 = ops.int8_pack(torch.ones(n, 512, dtype=torch.int8))
    scales4, scales8 = torch.ones(9, 8, 16), torch.ones(9, 1, 16)
    one_row = {"rows": m, "dtype": "bfloat16"}
    calls = {
        "int4_gemm": (
            {"m": m, "n": n, "k": 512, "group_size": 64, "dtype": "bfloat16"},
            lambda: ops.int4_gemm(x, packed4, scales4, None, None, None, n, 64, 0),
        ),
        "int4_int8_gemm": (
            {"m": m, "n": n, "k": 512, "group_size": 64, "out_dtype": "bfloat16"},
            lambda: ops.int4_int8_gemm(q, torch.ones(m), packed4, scales4, None, None, None, n, 64, 0, torch.bfloat16),
        ),
        "int8_weight_only_gemm": (
            {"m": m, "n": n, "k": 512, "group_size": 64, "dtype": "bfloat16"},
            lambda: ops.int8_weight_only_gemm(x, packed8, torch.ones(9, 8, 16), None, None, None, n, 64),
        ),
        "int8_gemm": (
            {"m": m, "n": n, "k": 512, "out_dtype": "bfloat16"},
            lambda: ops.int8_gemm(q, torch.ones(m), None, packed8, scales8, None, n, torch.bfloat16),
        ),
        "rms_norm": ({**one_row, "h": 512}, lambda: ops.rms_norm(x, x[0], 1e-6)),
        "silu_mul": ({**one_row, "columns": 256}, lambda: ops.silu_mul(x)),
        "quantize_int8_asym": ({**one_row, "k": 512}, lambda: ops.quantize_int8_asym(x)),
        "rotary": (
            {"tokens": m, "q_heads": 4, "k_heads": 4, "d": 128, "pairs": 64, "dtype": "bfloat16"},
            lambda: ops.rotary(x.view(m, 4, 128), x.view(m, 4, 128), torch.ones(m, 64), torch.ones(m, 64)),
        ),
    }
    for op, (problem, call) in calls.items():
        runtime.set_runtime(1, False, "", True)
        said = explain(runtime, op, **problem)
        assert launches(runtime.take_calls()) == [], op
        launch = first_launch(runtime, call)
        assert (launch.grid, launch.threads) == (int(said["blocks"]), int(said["threads"])), op
        assert launch.shared == int(said["shared_bytes"]), op


def test_what_a_gpu_has_no_kernel_for(runtime):
    with pytest.raises(ValueError, match=r"op must be one of .*, got decode_attention"):
        runtime.explain("decode_attention", "")
    with pytest.raises(RuntimeError, match=r"qops.int4_gemm: "):
        explain(runtime, "int4_gemm", m=1, n=64, k=64, group_size=64, dtype="int32")


def test_rows_of_float32_are_three(runtime):
    """As many as fit into scratch at a time; and an offset of 8-bit weights is another kernel's."""
    for op, more in (("int4_gemm", {"kind": "offset"}), ("int8_weight_only_gemm", {"zeros": True})):
        for m, rows, tokens in ((1, 1, 8), (5, 5, 16), (2000, 500, 64)):
            said = explain(runtime, op, m=m, n=4096, k=512, group_size=64, dtype="float32", **more)
            assert (int(said["rows"]), said["parts_of_x"], int(said["tokens"])) == (rows, "3", tokens), (op, m)
            least = 3 * rows * (4 * 4096 + 2 * 512)
            assert least <= int(said["scratch_bytes"]) <= least + (32 << 20), (op, m)
