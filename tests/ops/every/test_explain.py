"""qops.explain() and QOPS_LOG=plan: kernel, tile and split of a call. CUDA: tests/cuda/test_cuda_explain.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qops

OPS = [name for name in qops.ops.__all__ if hasattr(torch.ops.qops, name)] + ["decoder_layers"]
# A team of threads goes through their parts.
BLOCKS = ("attention_block", "decoder_layers", "mlp_block")
BF16 = torch.bfloat16
# Of what operators are asked with; other sizes are 4096.
SIZES = {"m": 40, "rows": 40, "tokens": 40, "q_heads": 32, "k_heads": 8, "d": 128, "pairs": 64, "group_size": 128}
SIZES |= {"t": 4, "kv_heads": 8}


def problem(op: str) -> dict[str, Any]:
    """With a value for each argument that has to be given: who asks with none is told their names."""
    with pytest.raises(ValueError, match=rf"qops.explain: {op} needs .*, got none") as error:
        qops.explain(op, device="cpu")
    names = str(error.value).partition(" needs ")[2].removesuffix(", got none").split(", ")
    return {name: BF16 if name.endswith("dtype") else SIZES.get(name, 4096) for name in names}


def explain(op: str, **changes: Any) -> str:
    return qops.explain(op, device="cpu", **{**problem(op), **changes})


def facts(line: str) -> dict[str, str]:
    return dict(word.split("=") for word in line.split(" -> ")[1].split())


def in_new_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(qops.__file__).parent.parent), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", **variables}
    command = [sys.executable, "-c", f"import torch, qops\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize("op", OPS)
def test_every_operator_can_be_asked(op):
    line = explain(op)
    assert line.startswith(f"qops.{op} isa={qops.build_info()['isa']} ") and "\n" not in line
    said = facts(line)
    if op not in BLOCKS:
        assert int(said["tasks"]) > 0 and int(said["grain"]) > 0
    assert 1 <= int(said["threads"]) <= torch.get_num_threads()


def test_the_operators_are_the_public_ones():
    with pytest.raises(ValueError, match=r"qops.explain: op must be one of .*, got int5_gemm") as error:
        qops.explain("int5_gemm", device="cpu")
    listed = set(str(error.value).partition("one of ")[2].rpartition(", got")[0].split(", "))
    assert listed == set(OPS)


@pytest.mark.parametrize(
    ("op", "changes", "error"),
    [
        ("rms_norm", {"h": None}, "qops.explain: rms_norm needs h, got none"),
        ("int4_gemm", {"m": None, "dtype": None}, "qops.explain: int4_gemm needs m, dtype, got none"),
        ("rms_norm", {"columns": 8}, "qops.explain: rms_norm takes rows, h, dtype, got columns"),
        ("rms_norm", {"dtype": torch.float64}, "qops.rms_norm: dtype must be one of float32, .*, got float64"),
        ("rms_norm", {"rows": -1}, r"qops.rms_norm: rows must be an integer in 0 .. 2\^31, got -1"),
        ("rms_norm", {"rows": 2.5}, r"qops.rms_norm: rows must be an integer in 0 .. 2\^31, got 2.5"),
        ("rms_norm", {"rows": True}, r"qops.rms_norm: rows must be an integer in 0 .. 2\^31, got True"),
        ("int8_gemm", {"n": 12}, "qops.int8_gemm: n must be a multiple of 8, got 12"),
        ("int4_gemm", {"group_size": 0}, "qops.int4_gemm: group_size must be K = 4096 or a multiple of 16"),
        ("int4_gemm", {"m": 2**31, "n": 2**31, "k": 4096}, "qops.int4_gemm: m must be so small that M N K <= 2"),
        ("int4_gemm", {"kind": "asymmetric"}, "qops.int4_gemm: kind must be one of symmetric, .*, got asymmetric"),
        ("int8_gemm", {"zero_point": 1}, "qops.int8_gemm: zero_point must be one of False, True, got 1"),
        ("int8_gemm", {"epilogue": "silu_mul", "n": 24}, "qops.int8_gemm: n must be a multiple of 16, for gate and up"),
        ("int8_gemm", {"epilogue": "int8", "out_dtype": torch.int32}, "epilogue must be none where out_dtype is int32"),
        ("int8_gemm", {"k": 131072}, "qops.int8_gemm: q must have at most 131071 columns, got 131072"),
        ("int4_int8_gemm", {"group_size": 131072, "k": 131072}, "group_size must be at most 131071, got 131072"),
        ("int4_int8_gemm", {"k": 2**20}, "qops.int4_int8_gemm: k must have at most 1048575 columns, got 1048576"),
        (
            "int8_weight_only_gemm",
            {"kind": "offset"},
            "int8_weight_only_gemm takes m, n, k, group_size, dtype, zeros, perm, got kind",
        ),
        ("rotary", {"pairs": 65}, "qops.rotary: pairs must be at most D / 2 = 64, got 65"),
        ("decode_attention", {"t": 9}, "qops.decode_attention: t must be at most 8, got 9"),
        ("decode_attention", {"s": 3}, "qops.decode_attention: s must be at least t = 4, got 3"),
        ("decode_attention", {"q_heads": 12}, "decode_attention: q_heads must be a multiple of kv_heads = 8, got 12"),
        *(
            (op, changes, f"qops.{op}: {error}")
            for op in ("attention_block", "decoder_layers")
            for changes, error in (
                ({"h": 0}, "h must be positive, got 0"),
                ({"q_heads": 12}, "q_heads must be a multiple of kv_heads = 8, got 12"),
                ({"q_heads": 0}, "q_heads must be positive, got 0"),
                ({"q_heads": 0, "kv_heads": 0}, "q_heads must be positive, got 0"),
                ({"kv_heads": 0}, "q_heads must be a multiple of kv_heads = 0, got 32"),
                ({"d": 0}, "d must make Hq D a positive multiple of 8, got 0"),
                ({"q_heads": 2, "kv_heads": 1, "d": 6}, "d must make Hq D a positive multiple of 8, got 6"),
                ({"d": 2**31, "q_heads": 2**31}, r"d must be so small that Hq D <= 2\^48, got 2147483648"),
                (
                    {"qkv_has_8_bits": True, "qkv_input": "torchao", "h": 131080},
                    "qkv must have at most 131071 columns for an input of int8, got 131080",
                ),
                (
                    {"o_has_8_bits": True, "o_input": "255", "q_heads": 1032},
                    "o must have at most 65793 columns for an input of int8 with zero points, got 132096",
                ),
            )
        ),
        *(
            (op, changes, f"qops.{op}: {error}")
            for op in ("mlp_block", "decoder_layers")
            for changes, error in (
                ({"h": 0}, "h must be positive, got 0"),
                (
                    {"gate_up_input": "127", "h": 2**20},
                    "gate_up must have at most 1048575 columns for an input of int8, got 1048576",
                ),
                (
                    {"down_has_8_bits": True, "down_input": "255", "columns": 65800},
                    "down must have at most 65793 columns for an input of int8 with zero points, got 65800",
                ),
            )
        ),
        (
            "decode_attention",
            {"d": 2**31, "q_heads": 2**31},
            "qops.decode_attention: d must be so small that Hq D <= 2",
        ),
    ],
)
def test_wrong_questions(op, changes, error):
    asked = {name: value for name, value in {**problem(op), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=error):
        qops.explain(op, device="cpu", **asked)


def test_what_has_no_kernel():
    blocks = [(op, "dtype") for op in BLOCKS]
    for op, dtype in (("rms_norm", "dtype"), ("int4_gemm", "dtype"), ("int4_int8_gemm", "out_dtype"), *blocks):
        with pytest.raises(RuntimeError, match=f"qops.{op}: "):
            explain(op, **{dtype: torch.int32})


def test_devices():
    norm = problem("rms_norm")
    with pytest.raises(TypeError, match="device"):
        qops.explain("rms_norm", **norm)
    with pytest.raises(ValueError, match=r"qops.explain: device must be a CPU or a GPU, got meta"):
        qops.explain("rms_norm", device="meta", **norm)
    if not qops.build_info()["cuda"]:
        with pytest.raises(RuntimeError, match=r"qops.explain: device must be cpu, as .*, got cuda"):
            qops.explain("rms_norm", device="cuda", **norm)


def test_nothing_is_computed_or_allocated():
    """Tensors of these sizes would be exabytes."""
    size = 2**20
    assert facts(explain("int8_gemm", m=size, n=size))
    for op in ("int4_gemm", "int8_weight_only_gemm"):
        assert facts(explain(op, m=size, n=size, k=size))
    for op, changes in (
        ("rms_norm_int8", {"h": 2**31}),
        ("qk_norm_rotary", {"d": 2**31}),
        ("silu_mul", {"rows": 2**31}),
        ("decode_attention", {"batch": 2**31, "s": 2**31}),
    ):
        assert facts(explain(op, **changes))


def test_what_is_not_asked_for_is_not_said():
    line = explain("int4_gemm", batch_invariant=True, epilogue="silu_mul", kind="symmetric")
    assert " dtype=bfloat16 batch_invariant=True epilogue=silu_mul -> " in line
    assert explain("int4_gemm", batch_invariant=False, perm=False, epilogue="none") == explain("int4_gemm")
    line = explain("int8_weight_only_gemm", zeros=True, perm=True)
    assert " dtype=bfloat16 zeros=True perm=True -> " in line
    assert line.replace(" zeros=True perm=True", "") == explain("int8_weight_only_gemm", zeros=False)


def test_empty_calls_compute_nothing():
    assert explain("int4_gemm", m=0).endswith(" -> nothing to compute")
    assert explain("int8_gemm", n=0).endswith(" -> nothing to compute")
    assert explain("int4_int8_gemm", m=0).endswith(" -> nothing to compute")
    assert explain("rotary", d=0, pairs=0).endswith(" -> nothing to compute")
    assert explain("decode_attention", d=0).endswith(" -> nothing to compute")
    for op in BLOCKS:
        assert explain(op, rows=0).endswith(" -> nothing to compute")


def test_no_layers():
    """Nothing of the question before."""
    explain("decoder_layers", dtype=torch.float32, h=64)
    assert explain("decoder_layers", layers=0).endswith(
        " layers=0 rows=40 h=4096 q_heads=32 kv_heads=8 d=128 dtype=bfloat16 columns=4096 -> nothing to compute"
    )


def test_small_blocks_run_on_one_thread(threads):
    threads(2)
    small = {"h": 64, "rows": 1}
    mlp, attention = {"columns": 128}, {"q_heads": 2, "kv_heads": 1, "d": 32}
    for op, sizes in (("mlp_block", mlp), ("attention_block", attention), ("decoder_layers", mlp | attention)):
        assert facts(explain(op, **small, **sizes))["threads"] == "1"
        assert facts(explain(op))["threads"] == "2"


def test_tiles_follow_the_shape_and_tasks_the_threads(threads):
    threads(1)
    assert facts(explain("rms_norm"))["threads"] == "1"
    threads(2)
    assert facts(explain("rms_norm"))["threads"] == "2"
    assert facts(explain("rms_norm", rows=1))["threads"] == "1"  # a row is not shared
    assert facts(explain("int4_gemm", m=1))["tile_rows"] == "1"
    assert facts(explain("int4_gemm", m=40))["tile_rows"] != "1"
    # Few strips: the rows are cut too.
    assert facts(explain("int8_gemm", m=512, n=16))["row_blocks"] != "1"
    assert facts(explain("int8_gemm", m=40, n=40960))["row_blocks"] == "1"


def test_amx_multiplies_many_rows():
    if "amx" not in qops.build_info()["isa_available"]:
        pytest.skip("needs AMX")
    rest = 'n=64, k=128, device="cpu"'
    asked = [
        *(f'"int8_gemm", m={m}, zero_point={z}, out_dtype=torch.float32' for z in (False, True) for m in (1, 2)),
        *(
            f'"{op}", m={m}, group_size=32, dtype=torch.{dtype}'
            for op, least in (("int4_gemm", 12), ("int8_weight_only_gemm", 9))
            for m, dtype in ((least - 1, "float16"), (least, "float16"), (99, "float32"))
        ),
        *(f'"int4_int8_gemm", m={m}, group_size=32, out_dtype=torch.float32' for m in (10, 11)),
        *(f'"int4_gemm", m={m}, group_size=128, dtype=torch.bfloat16' for m in (4, 5, 8, 9)),
    ]
    calls = [f"qops.explain({call}, {rest})" for call in asked]
    lines = in_new_process(f"print({', '.join(calls)}, sep='\\n')", QOPS_ISA="amx").stdout.splitlines()
    kernels = ["avx512", "amx", "avx512", "amx", *["avx512", "amx", "avx512"] * 2, "avx512", "amx"]
    assert [facts(line)["kernel"] for line in lines[:-4]] == kernels
    few = [facts(line) for line in lines[-4:]]
    assert [(said["kernel"], said["tile_rows"]) for said in few] == [
        ("avx512", "4"),
        *(("amx", n) for n in ("5", "8", "16")),
    ]
    (line,) = in_new_process(f"print({calls[-5]})", QOPS_ISA="scalar").stdout.splitlines()
    assert " isa=scalar " in line and facts(line)["kernel"] == "scalar"


CALLS = """
import threading
torch.manual_seed(0)
x = torch.randn(40, 256, dtype=torch.bfloat16)
w4 = qops.Int4Weight.quantize(torch.randn(64, 256), group_size=64, symmetric=False)
w8 = qops.Int8Weight.quantize(torch.randn(64, 256))
def calls():
    qops.int4_gemm(x, w4)
    qops.int4_gemm(x[:1], w4)
    qops.int8_gemm(*qops.quantize_int8(x), w8, out_dtype=torch.float32)
    qops.add_rms_norm(x, x, x[0], 1e-6)
    qops.silu_mul(x)
    qops.rotary(x.view(10, 4, 256), x.view(10, 4, 256), torch.ones(10, 64), torch.ones(10, 64))
workers = [threading.Thread(target=calls) for _ in range(3)]
for worker in workers: worker.start()
for worker in workers: worker.join()
calls()
"""


def test_the_log_says_what_explain_says():
    """Of each distinct call once, from any thread."""
    result = in_new_process(CALLS, QOPS_LOG="plan")
    assert result.returncode == 0 and result.stdout == "", result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("qops.")]
    asked = """
def ask(op, **problem): print(qops.explain(op, device="cpu", **problem))
bf16 = torch.bfloat16
for m in (40, 1): ask("int4_gemm", m=m, n=64, k=256, group_size=64, kind="zero_point", dtype=bf16)
ask("quantize_int8", rows=40, k=256, dtype=bf16)
ask("int8_gemm", m=40, n=64, k=256, out_dtype=torch.float32)
ask("add_rms_norm", rows=40, h=256, dtype=bf16)
ask("silu_mul", rows=40, columns=128, dtype=bf16)
ask("rotary", tokens=10, q_heads=4, k_heads=4, d=256, pairs=64, dtype=bf16)
"""
    explained = in_new_process(asked).stdout.splitlines()
    assert len(explained) == 7
    # Weights were packed before, and who comes first is the threads' affair.
    assert sorted(lines) == sorted(explained + [line for line in lines if "_pack " in line])


@pytest.mark.slow
def test_the_log_of_a_compiled_call():
    code = """
f = torch.compile(lambda x, w: qops.rms_norm(x, w, 1e-6), fullgraph=True)
f(torch.randn(3, 64), torch.ones(64))
"""
    result = in_new_process(code, QOPS_LOG="plan")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("qops.rms_norm ") == 1 and "rows=3 h=64 dtype=float32 -> " in result.stderr


def test_an_error_is_the_calls_own():
    code = """
cos = torch.ones(4, 8)
try: qops.rotary(torch.ones(4, 1, 16), torch.ones(4, 1, 16), cos, cos, positions=torch.tensor([0, 1, 2, 9]))
except ValueError as error: print(error)
"""
    result = in_new_process(code, QOPS_LOG="plan")
    assert "qops.rotary: positions must lie in [0, 4)" in result.stdout, result.stderr


def test_without_the_variable_nothing_is_written():
    for value in ({}, {"QOPS_LOG": ""}):
        assert "qops." not in in_new_process(CALLS, **value).stderr


def test_another_value_is_an_error():
    result = in_new_process("", QOPS_LOG="plans")
    assert "ImportError: qops: QOPS_LOG must be plan, or not be set; got plans" in result.stderr
