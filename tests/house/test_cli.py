from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qops
from qops.__main__ import info, main


def test_info(capsys):
    assert main(["info"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    build = qops.build_info()
    assert lines["qops"] == build["version"]
    assert lines["torch"] == f"{torch.__version__} (built with {build['built_with_torch']})"
    assert lines["isa"] == f"{build['isa']} (available: {build['isa_available']})"
    assert lines["python"].startswith(sys.version.split()[0])
    kernels = "CPU and CUDA kernels for " if build["cuda"] else f"CPU kernels only ({build['cuda_reason']}), "
    assert lines["build"].startswith(kernels)
    assert lines["cpu"].endswith(" threads")
    assert len([name for name in lines if name.startswith("cuda")]) == torch.cuda.device_count()


# By the names of machine code and PTX, the compute capabilities that find code in them, and some that do not.
CODE = {
    "80-real": ([(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
    "86-real": ([(8, 6), (8, 9)], [(8, 0)]),
    "90a-real": ([(9, 0)], [(8, 0), (10, 0)]),
    "100-real": ([(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
    "100f-real": ([(10, 0), (10, 3)], [(11, 0)]),
    "103a-real": ([(10, 3)], [(10, 0), (10, 4)]),
    "100-virtual": ([(10, 0), (10, 3), (11, 0), (12, 1), (13, 0)], [(9, 0)]),
    "80-real 100-virtual": ([(8, 6), (11, 0)], [(9, 0)]),
}


@pytest.mark.parametrize("archs", CODE)
def test_info_tells_which_gpus_have_no_code(archs, monkeypatch):
    build = {**qops.build_info(), "cuda": True, "cuda_archs": archs, "nvcc": "13.0", "cuda_reason": ""}
    for module in ("qops.__main__", "qops.check"):
        monkeypatch.setattr(f"{module}.build_info", lambda: build)
    gpus = [(capability, use) for use, some in zip(("", " (not used"), CODE[archs], strict=True) for capability in some]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index][0])
    lines = dict(line.split(": ", 1) for line in info().splitlines())
    for index, ((major, minor), use) in enumerate(gpus):
        why = f"{use}: no code for compute capability {major}.{minor} in this build)" if use else ""
        assert lines[f"cuda:{index}"] == f"GPU{why}"
    build.update(cuda=False, cuda_archs="")
    assert info().splitlines()[-1].endswith(": GPU (not used: no CUDA kernels in this build)")


def test_info_as_a_command():
    command = [sys.executable, "-m", "qops", "info"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(qops.__file__).parent.parent)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("qops: ")


def test_the_script_is_the_same(monkeypatch, capsys):
    tree = Path(qops.__file__).parents[2]
    if not (tree / "pyproject.toml").exists():
        pytest.skip("qops is installed, and not run from its tree")
    scripts = re.search(r"\[project\.scripts\]\n((?:.+\n)+)", (tree / "pyproject.toml").read_text())
    assert scripts is not None
    name, module, function = re.fullmatch(r'(\w+) = "([\w.]+):(\w+)"', scripts[1].strip()).groups()
    assert (name, getattr(sys.modules[module], function)) == ("qops", main)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/qops", "info"])
    assert main() == 0 and capsys.readouterr().out.startswith("qops: ")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/qops"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("usage: qops [-h]")


@pytest.mark.parametrize("arguments", ([], ["explain"], ["info", "more"]), ids=str)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("usage: python -m qops")


def in_new_process(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(Path(qops.__file__).parent.parent)!r})\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "QOPS_ISA": isa})


PRINT_ISA = "import qops; build = qops.build_info(); print(build['isa'], 'of', build['isa_available'])"


def test_every_isa_level_can_be_forced():
    available = qops.build_info()["isa_available"]
    for level in available.split():
        assert in_new_process(PRINT_ISA, level).stdout.strip() == f"{level} of {available}"
    assert in_new_process(PRINT_ISA, "").stdout.strip() == f"{available.split()[-1]} of {available}"


def test_amx_needs_the_permission_of_the_kernel():
    """Linux refuses tiles to a process with a signal stack too small for them; then the level is not there."""
    available = qops.build_info()["isa_available"].split()
    if "amx" not in available:
        pytest.skip("this machine has no AMX")
    small_stack = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(8192)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 8192)), None) == 0
"""
    result = in_new_process(small_stack + PRINT_ISA, "")
    available.remove("amx")
    assert result.stdout.strip() == f"{available[-1]} of {' '.join(available)}", result.stderr


def test_unknown_isa_level_is_an_import_error():
    result = in_new_process("import qops", "sse9")
    assert result.returncode == 1
    assert "ImportError: qops: QOPS_ISA must be one of: scalar" in result.stderr
    assert result.stderr.rstrip().endswith("got sse9")
