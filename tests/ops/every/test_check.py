"""``python -m qops check``: passes here, and notices whatever a kernel does wrong."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qops
from qops import _check_cases, _native, check
from qops.__main__ import info, main
from qops._check_cases import CHECKS, OWN_BITS_ON_A_GPU, ROWS, Run
from tests.support.cuda.cuda_backend import Backend, emulated_operators, gpu

HERE = qops.build_info()["isa"]
NAMES = sorted(
    name.removeprefix("qops::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("qops::")
)
OVERLOADS = [(op, overload or "default") for op, _, overload in (name.partition(".") for name in NAMES)]
WEIGHTS = ("check_layout", "int4_dequantize", "int4_pack", "int4_unpack", "int8_pack", "int8_unpack")
# The emulator takes a minute for them.
SLOW = ("int4_gemm", "int8_gemm")


def element(t: Tensor) -> None:
    """A wrong first element."""
    first = t.view(-1)[:1] if t.is_contiguous() else t[(0,) * (t.dim() - 1)][:1]
    first.copy_(first * 1.5 + 1 if t.is_floating_point() else first ^ 1)


def last_of_130_rows(t: Tensor) -> None:
    if len(t) == ROWS[-1]:
        last = t[(-1,) * (t.dim() - 1)][-1:]
        last.copy_(last * 1.5 + 1 if t.is_floating_point() else last ^ 1)


def unwritten_row(t: Tensor) -> None:
    t[len(t) // 2] = float("nan") if t.is_floating_point() else 0


class Faulty:
    """An operator, one overload of which spoils its first or last result; one that has none does nothing at all."""

    def __init__(self, op: Any, overload: str, spoil: Callable[[Tensor], None]) -> None:
        self._op, self._overload, self._spoil = op, overload, spoil

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._op, name)
        if name != self._overload:
            return real

        def call(*args: Any, **more: Any) -> Any:
            arguments = real._schema.arguments
            given = {**dict(zip((a.name for a in arguments), args, strict=False)), **more}
            written = [given[a.name] for a in arguments if a.alias_info is not None and a.alias_info.is_write]
            if not written and not real._schema.returns:
                return None
            results = real(*args, **more)
            outputs = [results] if isinstance(results, Tensor) else list(results or ())
            self._spoil((outputs or written)[0 if self._spoil is element else -1])
            return results

        return call


def lines_of(text: str) -> dict[str, str]:
    """The report of a failure: name -> value."""
    return dict(re.findall(r"^ *(FAILED|case|what|again|qops|isa|cpu): (.*)$", text, flags=re.MULTILINE))


# Of weights and of the tokens of a step there are never so many rows, and a plan has none: it stands for a list.
FAULTS = [
    pytest.param(op, overload, spoil, id=f"{op}.{overload} {spoil.__name__}")
    for (op, overload), spoil in itertools.product(OVERLOADS, (element, last_of_130_rows, unwritten_row))
    if op != "decoder_plan"
    if spoil is not last_of_130_rows or op not in (*WEIGHTS, "attention_block", "decoder_layers")
]


@functools.cache
def healthy(op: str) -> check.Outcome:
    return check.outcome(op, HERE, 0)


@pytest.mark.parametrize(("op", "overload", "spoil"), FAULTS)
def test_a_fault_is_noticed_and_what_is_printed_shows_it_again(monkeypatch, capsys, op, overload, spoil):
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.qops, op, Faulty(getattr(torch.ops.qops, op), overload, spoil))
        assert main(["check", "--op", op, "--at", HERE]) == 1
        report = lines_of(capsys.readouterr().out)
        assert report["FAILED"] == f"{op} at {HERE}, seed 0"
        assert report["again"] == f"python -m qops check --op {op} --at {HERE} --seed 0"
        assert report["qops"] == qops.build_info()["version"] and report["isa"].startswith(HERE)
        assert main(shlex.split(report["again"])[3:]) == 1
        assert lines_of(capsys.readouterr().out) == report
    assert healthy(op).failed is None and report["case"] in healthy(op).cases


@pytest.mark.slow
def test_a_run_at_every_level_names_every_operator(capsys):
    start = time.monotonic()
    assert main(["check", "--seed", "5"]) == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    levels = qops.build_info()["isa_available"].replace(" ", ", ")
    assert head.startswith(f"qops {qops.build_info()['version']}, torch {torch.__version__}, ")
    assert head.endswith(f": {', '.join(check.places())}") and levels in head
    found = {line.split()[0]: line for line in lines}
    assert set(found) == {op for op, _ in OVERLOADS} and len(lines) == len(found)
    for line in lines:
        assert re.search(rf"^\w+ +[1-9]\d* cases passed: {levels}\b", line), line
    assert re.fullmatch(rf"operators: {len(lines)}, failures: 0, seconds: [\d.]+", last)
    assert 0 < float(last.rpartition(" ")[2]) <= time.monotonic() - start + 0.1


@pytest.mark.parametrize(
    ("archs", "gpus"),
    [
        ("", []),
        ("86-real", ["cuda:0"]),
        ("75-real 86-real", ["cuda:0", "cuda:1"]),
        ("70-virtual", ["cuda:0", "cuda:1"]),
    ],
)
def test_places_are_the_levels_and_the_gpus_that_have_kernels(monkeypatch, archs, gpus):
    monkeypatch.setattr(check, "build_info", lambda: {"isa_available": "scalar avx2", "cuda_archs": archs})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((8, 6), (7, 5))[index])
    assert check.places() == ["scalar", "avx2", *gpus]


@pytest.mark.parametrize("seed", ("-1", str(2**46), "9" * 30))
def test_seeds_that_torch_does_not_take_are_refused(capsys, seed):
    with pytest.raises(SystemExit) as stopped:
        main(["check", f"--seed={seed}"])
    assert stopped.value.code == 2 and f"must be 0 ... 2**46 - 1, got {seed}" in capsys.readouterr().err


def test_outputs_are_poisoned_while_a_check_runs(monkeypatch):
    def case(run: Run) -> None:
        seen.append("case")
        raise ValueError

    seen: list[object] = []
    monkeypatch.setattr(_native._C, "poison_outputs", seen.append)
    monkeypatch.setitem(CHECKS, "rms_norm", case)
    assert check.outcome("rms_norm", HERE, 0).what == "ValueError: "
    assert seen == [True, "case", False]


def test_an_operator_without_a_check_fails(monkeypatch, capsys):
    monkeypatch.delitem(CHECKS, "rotary")
    monkeypatch.setitem(CHECKS, "rotery", CHECKS["rms_norm"])
    assert {"rotary", "rotery"} <= set(check.operators())
    for op, what in (("rotary", "has no check"), ("rotery", "has a check, but is not registered")):
        assert main(["check", "--op", op, "--at", HERE]) == 1
        assert lines_of(capsys.readouterr().out)["what"] == what


def test_kernels_are_there_for_all_overloads(monkeypatch):
    def has(which: str) -> Callable[[str, str], bool]:
        return lambda name, key: re.search(which, f"{name} {key}") is None

    monkeypatch.setattr(_native, "without_cuda", frozenset())
    names = "qops::rms_norm.out"
    for at, lacks, what in (
        (HERE, names, f"no CPU kernel for {names}"),
        ("cuda:0", names, f"no CUDA kernel for {names}"),
    ):
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", has(lacks))
        assert check.outcome("rms_norm", at, 0).what == what


def test_what_has_no_cuda_kernel_is_known(monkeypatch, capsys):
    """Another operator that a build has lost on GPUs fails there, also where its place was taken by our refusal."""
    monkeypatch.setattr(check, "_Child", Level)
    monkeypatch.setattr(check, "places", lambda: ["scalar", "cuda:0"])
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    overloads = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("qops::")}
    monkeypatch.setattr(_native, "without_cuda", frozenset(overloads))
    assert main(["check", "--op", "decode_attention"]) == 0
    assert re.search(r"cases passed: scalar; no kernel: cuda:0$", capsys.readouterr().out, re.MULTILINE)
    assert main(["check", "--op", "rms_norm"]) == 1
    assert lines_of(capsys.readouterr().out)["what"].startswith("no CUDA kernel for qops::rms_norm, qops::rms_norm.out")


def test_an_error_of_a_kernel_is_a_failure_of_its_case(monkeypatch, capsys):
    def rms_norm(*args: object, **more: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(sys.modules["qops.ops.rms_norm"], "rms_norm", rms_norm)
    assert main(["check", "--op", "rms_norm", "--at", HERE]) == 1
    report = lines_of(capsys.readouterr().out)
    assert report["what"] == "RuntimeError: no kernel image" and report["case"].startswith("float32, H = 1, ")


class Level:
    """In the place of the process of another level."""

    def __init__(self, place: str, ops: list[str], seed: int) -> None:
        self.found = [check.outcome(op, place, seed) for op in ops]
        if place == "avx2":
            case = sorted(self.found[0].cases)[3]
            self.found[0].cases[case] = "another digest"

    def outcomes(self) -> list[check.Outcome]:
        return self.found


def test_levels_must_agree(monkeypatch, capsys):
    monkeypatch.setattr(check, "_Child", Level)
    monkeypatch.setattr(check, "places", lambda: ["scalar", "avx2", "avx512"])
    assert main(["check", "--op", "silu_mul"]) == 1
    out = capsys.readouterr().out
    report, cases = lines_of(out), sorted(healthy("silu_mul").cases)
    assert report["FAILED"] == "silu_mul at avx2, seed 0" and report["case"] == cases[3]
    assert report["what"] == "other bits than at scalar"
    assert report["again"] == "python -m qops check --op silu_mul --seed 0"
    assert "cases passed: scalar, avx512; FAILED: avx2" in out
    # Where the first place fails, the others are compared with each other.
    monkeypatch.setattr(check, "places", lambda: ["cuda:7", "avx512", "avx2"])
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: key == "CPU")
    assert main(["check", "--op", "silu_mul"]) == 1
    assert lines_of(capsys.readouterr().out)["what"] == "other bits than at avx512"


def test_a_process_that_dies_is_a_failure_of_the_operator_it_was_at(monkeypatch, capsys, tmp_path):
    dying = tmp_path / "python"
    result = '{"op": "add_rms_norm", "place": "scalar", "cases": {"a": ""}}'
    called = 'shift 2; echo "$QOPS_ISA $OMP_WAIT_POLICY: $*" >&2'
    dying.write_text(f"#!/bin/sh\necho '{result}'\necho worse >&2\n{called}\nkill -ILL $$\n")
    dying.chmod(0o755)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setattr(check, "places", lambda: ["scalar"])
    monkeypatch.setattr(check, "build_info", lambda: {"isa": "avx2"})
    monkeypatch.setattr(check.sys, "executable", str(dying))
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert "add_rms_norm             1 cases passed: scalar\n" in out
    report = lines_of(out)
    assert report["FAILED"] == "add_rms_norm_int8 at scalar, seed 0"
    assert report["what"] == ("its process ended with signal SIGILL scalar passive: check --json --at scalar --seed 0")
    dying.write_text(f"#!/bin/sh\necho '{result}'\nexit 3\n")  # after the last operator
    assert main(["check", "--op", "add_rms_norm"]) == 1
    assert lines_of(capsys.readouterr().out)["what"] == "its process ended with exit status 3"


@pytest.mark.parametrize("option", ("--op", "--at"))
def test_unknown_names_are_refused(capsys, option):
    with pytest.raises(SystemExit) as stopped:
        main(["check", option, "nothing"])
    assert stopped.value.code == 2 and f"{option} must be one of " in capsys.readouterr().err


def test_inputs_depend_on_the_seed():
    first, again, other = (check.outcome("quantize_int8", HERE, seed).cases for seed in (0, 0, 1))
    assert first == again and first.keys() == other.keys() and not set(first.values()) & set(other.values())


def test_the_report_is_what_info_prints(monkeypatch, capsys):
    monkeypatch.delitem(CHECKS, "rotary")
    main(["check", "--op", "rotary", "--at", HERE])
    assert f"\n{info()}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=pytest.mark.slow if op in SLOW else ()) for op in sorted(CHECKS)]
)
def test_cases_hold_on_a_gpu(emulated, monkeypatch, op):
    """In the emulator: the same bits as on the CPU, where a GPU has no order or layout of its own."""
    if op not in emulated_operators():
        pytest.skip("has no CUDA kernel")
    # Enough to leave the kernels of few rows. 130 take minutes here; tests/cuda has every tile of every kernel.
    monkeypatch.setattr(_check_cases, "ROWS", (1, 3, 17, 33))
    run = Run(torch.device("cpu"), 0)
    with gpu(Backend(torch.ops.qops_emu, "cpu")):
        there = Run(torch.device("cpu"), 0)
        CHECKS[op](there)
    CHECKS[op](run)
    assert there.gpu and not run.gpu
    if op not in OWN_BITS_ON_A_GPU:
        assert {case: run.digests.get(case, digest) for case, digest in there.digests.items()} == there.digests
