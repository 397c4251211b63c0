"""Which nvcc compiles the CUDA kernels, and for which GPUs (csrc/cuda/choose.cmake); needs no GPU.

Toolkits, torch and GPUs are invented where that is enough; the real nvcc shows what its objects hold.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.support.cuda import cuda_tools
from tests.support.cuda.cuda_tools import ROOT, checked

KNOWN = {
    "11.8": (35, 50, 70, 75, 80, 86, 89, 90),
    "12.4": (50, 70, 75, 80, 86, 89, 90),
    "12.8": (50, 70, 75, 80, 86, 89, 90, 100, 101, 120),
    "13.0": (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121),
    "13.1": (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121),
}
NGC = "7.5 8.0 8.6 9.0 10.0 12.0+PTX"


@dataclass(frozen=True)
class Choice:
    nvcc: str  # under the folder of the test
    archs: str
    missing: str
    left_out: str


class Machine:
    """A folder with invented toolkits and a torch, and what is chosen there."""

    def __init__(self, folder: Path, torch_cuda: str | None = "13.0") -> None:
        self.folder = folder
        self.path = folder / "on_path"
        self.path.mkdir()
        self.torch = folder / "site" / "torch"
        (self.torch / "lib").mkdir(parents=True)
        (self.torch / "lib/libtorch_cpu.so").touch()
        self.set_torch(torch_cuda)

    def set_torch(self, cuda: str | None) -> None:
        (self.torch / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda!r}\n")
        if cuda:
            (self.torch / "lib/libtorch_cuda.so").touch()

    def program(self, where: str, script: str) -> Path:
        path = self.folder / where
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def nvcc(self, where: str, version: str) -> Path:
        codes = " ".join(f"sm_{number}" for number in KNOWN[version])
        says = f"--version) echo 'Cuda compilation tools, release {version}, V{version}.1';;"
        return self.program(where, f'case "$1" in {says} --list-gpu-code) echo {codes};; esac')

    def choose(self, cuda: str = "AUTO", archs: str = "", **environment: object) -> Choice:
        names = ("qops_nvcc", "qops_cuda_archs", "qops_cuda_missing", "qops_left_out")
        script = self.folder / "choose.cmake"
        found = "\n".join(f'message(NOTICE "{name}=${{{name}}}")' for name in names)
        script.write_text(f"include({ROOT}/csrc/cuda/choose.cmake)\n{found}\n")
        options = {
            "QOPS_TOOLKITS": self.folder / "local/cuda*",
            "QOPS_TORCH_DIR": self.torch,
            "torch_version": "2.13.0",
            "QOPS_CUDA": cuda,
            "QOPS_CUDA_ARCHS": archs,
        }
        command = [cuda_tools.cmake(), *(f"-D{name}={value}" for name, value in options.items()), "-P", str(script)]
        env = {"PATH": str(self.path), **{name: str(value) for name, value in environment.items()}}
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        values = dict(re.findall(r"^(\w+)=(.*)$", result.stderr.replace(f"{self.folder}/", ""), flags=re.MULTILINE))
        nvcc, chosen, missing, left_out = (values[name] for name in names)
        return Choice(nvcc, chosen.replace("-real", "").replace("-virtual", "+"), missing, left_out)


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


# --- for which GPUs --------------------------------------------------------------------------------------------------

# With "+" PTX, without it machine code. The sentence leaves out "left out of TORCH_CUDA_ARCH_LIST: ".
LISTS = {
    "": ("80;90a;100;100+;120", ""),
    NGC: ("80;86;90a;100;120;120+", "7.5 (below 8.0)"),
    "Hopper": ("90a;90+", ""),
    "9.0+PTX": ("90a;90+", ""),
    "9.0a+PTX": ("90a;90+", ""),  # PTX of 9.0a serves no newer GPU
    "9.0 9.0a": ("90a", ""),
    "8.0;8.6+PTX": ("80;86;86+", ""),
    ",80, 90a,120; ": ("80;90a;120", ""),
    '"8.0 9.0"': ("80;90a", ""),
    "'8.6'": ("86", ""),
    "Ampere Ada": ("80;86;86+;89;89+", ""),
    "Ampere+Tegra;Blackwell+Tegra": ("87;110", ""),
    "Blackwell": ("100;103;120;121;121+", ""),
    "10.0f 10.3a 12.0a+PTX": ("100f;103a;120a;120+", ""),
    "Turing;Hopper": ("90a;90+", "7.5+PTX (below 8.0)"),
    "Pascal Volta+Tegra 8.0": ("80", "6.0 (below 8.0), 6.1+PTX (below 8.0), 7.2 (below 8.0)"),
    "8.0 native 20.0+PTX 8.0a": (
        "80",
        "native (no architecture), 20.0+PTX (unknown to nvcc 13.0), 8.0a (unknown to nvcc 13.0)",
    ),
}


@pytest.mark.parametrize("archs", LISTS)
def test_architectures_that_are_asked_for(machine, archs):
    chosen, left_out = LISTS[archs]
    machine.nvcc("on_path/nvcc", "13.0")
    left_out = left_out and f"left out of TORCH_CUDA_ARCH_LIST: {left_out}"
    assert machine.choose(TORCH_CUDA_ARCH_LIST=archs) == Choice("on_path/nvcc", chosen, "", left_out)


def test_our_variable_comes_before_that_of_torch(machine):
    machine.nvcc("on_path/nvcc", "13.0")
    found = machine.choose(archs="7.0 8.0", TORCH_CUDA_ARCH_LIST="9.0")
    assert (found.archs, found.left_out) == ("80", "left out of QOPS_CUDA_ARCHS: 7.0 (below 8.0)")


@pytest.mark.parametrize("archs", ("7.5", "Turing", "5.0 nothing"))
def test_no_architecture_is_left(machine, archs):
    machine.nvcc("on_path/nvcc", "13.0")
    found = machine.choose(TORCH_CUDA_ARCH_LIST=archs)
    assert re.fullmatch(
        r"built with no architecture left of TORCH_CUDA_ARCH_LIST: \d\.\d(\+PTX)? \(below 8\.0\).*", found.missing
    )
    assert (found.archs, found.left_out) == ("", "")


def test_toolkits_that_are_older_than_a_gpu(machine):
    machine.set_torch("12.9")
    machine.nvcc("on_path/nvcc", "12.4")
    assert machine.choose().archs == "80;90a;90+"  # the PTX is all that a newer one finds
    found = machine.choose(TORCH_CUDA_ARCH_LIST=NGC)
    left_out = "7.5 (below 8.0), 10.0 (unknown to nvcc 12.4), 12.0+PTX (unknown to nvcc 12.4)"
    assert (found.archs, found.left_out) == ("80;86;90a", f"left out of TORCH_CUDA_ARCH_LIST: {left_out}")
    machine.nvcc("on_path/nvcc", "12.8")
    assert machine.choose().archs == "80;90a;100;100+;120"
    assert machine.choose(archs="10.0 10.0f").left_out == "left out of QOPS_CUDA_ARCHS: 10.0f (unknown to nvcc 12.8)"


# What nvidia-smi prints, for an nvcc 12.8.
GPUS = {
    "8.9": ("89", "", ""),
    "9.0\n9.0": ("90a", "", ""),
    "7.5\n8.0": ("80", "", "left out of this machine's GPUs: 7.5 (below 8.0)"),
    "7.5\n7.5": ("", "built with no architecture left of this machine's GPUs: 7.5 (below 8.0)", ""),
    "10.3\n12.1": ("100;120", "", ""),  # whose code of the older minor version runs there
    "13.0": ("", "built with no architecture left of this machine's GPUs: 13.0 (unknown to nvcc 12.8)", ""),
    "No devices were found": ("80;90a;100;100+;120", "", ""),
}


@pytest.mark.parametrize("gpus", GPUS)
def test_the_gpus_of_the_machine(machine, gpus):
    machine.set_torch("12.9")
    machine.nvcc("on_path/nvcc", "12.8")
    machine.program("on_path/nvidia-smi", f"echo '{gpus}'")
    found = machine.choose()
    assert (found.archs, found.missing, found.left_out) == GPUS[gpus]
    assert machine.choose(TORCH_CUDA_ARCH_LIST="8.0").archs == "80"


def test_a_driver_that_does_not_answer_is_no_gpu(machine):
    machine.nvcc("on_path/nvcc", "13.0")
    machine.program("on_path/nvidia-smi", "echo 7.5; exit 9")
    assert machine.choose().archs == "80;90a;100;100+;120"


# --- by which nvcc ---------------------------------------------------------------------------------------------------


def test_a_toolkit_is_found_where_nothing_names_it(machine):
    machine.nvcc("bin/nvcc", "13.0")
    assert machine.choose(CUDA_HOME="", CUDA_PATH="").missing.startswith("built without an nvcc: none at CUDACXX, ")
    machine.nvcc("local/cuda-13.0/bin/nvcc", "13.0")
    assert machine.choose(CUDA_HOME="", CUDA_PATH="").nvcc == "local/cuda-13.0/bin/nvcc"


def test_the_major_version_decides(machine):
    machine.nvcc("on_path/nvcc", "11.8")
    machine.nvcc("local/cuda-12.4/bin/nvcc", "12.4")
    machine.nvcc("local/cuda-12.8/bin/nvcc", "12.8")
    machine.nvcc("local/cuda-13.0/bin/nvcc", "13.0")
    (machine.folder / "local/cuda").symlink_to("cuda-12.4")
    for cuda, nvcc in {"12.6": "local/cuda-12.8", "12.4": "local/cuda-12.4", "13.2": "local/cuda-13.0"}.items():
        machine.set_torch(cuda)
        assert machine.choose().nvcc in (f"{nvcc}/bin/nvcc", "local/cuda/bin/nvcc" if cuda == "12.4" else "")
    machine.set_torch("14.0")
    said = "built without an nvcc of CUDA 14, the major version of torch's CUDA 14.0: "
    found = machine.choose()
    assert (found.nvcc, found.archs) == ("", "") and found.missing.startswith(said)
    for path, version in {"on_path": "11.8", "local/cuda-13.0/bin": "13.0", "local/cuda-12.8/bin": "12.8"}.items():
        assert f"{path}/nvcc is {version}" in found.missing
    assert found.missing.count(" is ") == 4  # the link is no fifth


def test_of_one_major_version_torchs_own_or_the_newest(machine):
    machine.nvcc("on_path/nvcc", "13.1")
    machine.nvcc("local/cuda-13.0/bin/nvcc", "13.0")
    assert machine.choose().nvcc == "local/cuda-13.0/bin/nvcc"
    machine.set_torch("13.2")
    assert machine.choose().nvcc == "on_path/nvcc"


@pytest.mark.parametrize("variable", ("CUDA_HOME", "CUDA_PATH"))
def test_a_folder_that_is_named_comes_first_if_it_fits(machine, variable):
    machine.nvcc("on_path/nvcc", "13.0")
    machine.nvcc("named/bin/nvcc", "13.1")
    assert machine.choose(**{variable: machine.folder / "named"}).nvcc == "named/bin/nvcc"
    machine.nvcc("named/bin/nvcc", "12.8")
    assert machine.choose(**{variable: machine.folder / "named"}).nvcc == "on_path/nvcc"
    assert machine.choose(**{variable: machine.folder / "gone"}).nvcc == "on_path/nvcc"


def test_a_compiler_that_is_named_is_taken_or_refused(machine):
    machine.nvcc("on_path/nvcc", "13.0")
    older, newer = machine.nvcc("named/12", "12.8"), machine.nvcc("named/13", "13.1")
    assert machine.choose(CUDACXX=newer, CUDA_HOME=machine.folder / "named").nvcc == "named/13"
    found = machine.choose(CUDACXX=older)
    assert found.nvcc == "" and found.missing.endswith("the major version of torch's CUDA 13.0: named/12 is 12.8")
    broken = machine.program("named/broken", "exit 1")
    assert machine.choose(CUDACXX=broken).missing.endswith(": named/broken does not tell its version")
    gone = machine.folder / "named/gone"
    assert machine.choose(CUDACXX=gone).missing.endswith(": named/gone does not tell its version")


def test_the_compiler_of_pypi_is_taken_where_it_is_complete(machine):
    packages = machine.folder / "site/nvidia/cu13"
    machine.nvcc("site/nvidia/cu13/bin/nvcc", "13.0")
    parts = ("nvvm/bin/cicc", "include/crt/host_config.h", "include/nv/target", "lib/libcudart_static.a")
    for part in parts:
        (packages / part).parent.mkdir(parents=True, exist_ok=True)
        (packages / part).touch()
    assert machine.choose().nvcc == "site/nvidia/cu13/bin/nvcc"
    for part in parts:
        (packages / part).unlink()
        assert machine.choose().missing.startswith("built without an nvcc: none at "), part
        (packages / part).touch()


def test_without_cuda(machine):
    machine.nvcc("on_path/nvcc", "13.0")
    assert machine.choose(cuda="OFF") == Choice("", "", "built with QOPS_CUDA=OFF", "")
    (machine.torch / "lib/libtorch_cuda.so").unlink()
    machine.set_torch(None)
    assert machine.choose() == Choice("", "", "built with torch 2.13.0, which is one without CUDA", "")
    assert machine.choose(cuda="ON").nvcc == "on_path/nvcc"  # the preset cuda-check


def test_the_switch_takes_what_switches_take(machine):
    machine.nvcc("on_path/nvcc", "13.0")
    machine.set_torch(None)
    for values, missing in (
        (("OFF", "off", "0", "No", "false"), "built with QOPS_CUDA=OFF"),
        (("ON", "on", "1", "yes", "TRUE", "", "auto", " AUTO "), ""),
    ):
        for value in values:
            assert machine.choose(cuda=value).missing == missing, value
    (machine.torch / "lib/libtorch_cuda.so").unlink()
    assert [machine.choose(cuda=value).missing == "" for value in ("1", "", "auto")] == [True, False, False]
    with pytest.raises(subprocess.CalledProcessError) as failed:
        machine.choose(cuda="garbage")
    assert "QOPS_CUDA must be ON, OFF or AUTO, got garbage" in failed.value.stderr


# --- the real one ----------------------------------------------------------------------------------------------------


class Project:
    """This project in a build folder of its own, in which one can configure again and again."""

    def __init__(self, machine: Machine) -> None:
        self.folder = machine.folder / "build"
        self.options = {
            "CMAKE_MAKE_PROGRAM": cuda_tools.ninja(),
            "Python_EXECUTABLE": sys.executable,
            "QOPS_OUTPUT_DIR": machine.folder / "modules",
        }

        # A GPU of this machine would take the place of the default.
        self.path = machine.program("no_gpu/nvidia-smi", "exit 9").parent

    def configure(self, archs: str, **options: object) -> subprocess.CompletedProcess[str]:
        words = [f"-D{name}={value}" for name, value in {**self.options, **options}.items()]
        command = [cuda_tools.cmake(), "-S", str(ROOT), "-B", str(self.folder), "-G", "Ninja", *words]
        env = dict(os.environ)
        env |= {"TORCH_CUDA_ARCH_LIST": archs, "PATH": f"{self.path}:{env['PATH']}"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env)

    def command(self, source: str) -> list[str]:
        entries = json.loads((self.folder / "compile_commands.json").read_text())
        return next((shlex.split(e["command"]) for e in entries if e["file"].endswith(source)), [])


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project(Machine(tmp_path_factory.mktemp("project"), None))


def machine_code(obj: Path) -> list[str]:
    """What the object holds, with "+" PTX."""
    program = str(cuda_tools.require_cuobjdump())
    codes = re.findall(r"\.sm_(\w+)\.cubin", checked(program, "--list-elf", str(obj)))
    ptx = re.findall(r"\.sm_(\w+)\.ptx", checked(program, "--list-ptx", str(obj)))
    return sorted(codes + [f"{number}+" for number in ptx])


@pytest.mark.slow
@pytest.mark.parametrize("archs", [NGC, "Hopper", "9.0+PTX", "8.0;8.6+PTX", ""])
def test_objects_hold_what_was_chosen(project, archs, tmp_path):
    """One small file of the module, with the module's flags."""
    cuda_tools.require_nvcc()
    result = project.configure(archs, QOPS_CUDA="ON", QOPS_TORCH_DIR=Path(torch.__file__).parent)
    assert result.returncode == 0, result.stderr
    sentence = "left out of TORCH_CUDA_ARCH_LIST: 7.5 (below 8.0)" if archs == NGC else ""
    assert ("fewer GPUs than asked for" in result.stderr) == bool(sentence)
    assert f'-DQOPS_CUDA_LEFT_OUT="{sentence}"' in project.command("registration_cuda.cpp")
    words = project.command("weight_pack_int4.cu")
    source, target = tmp_path / "small.cu", tmp_path / "small.o"
    source.write_text("__global__ void kernel(float* x) { x[0] = 1; }\n")
    words = [str(source) if word.endswith("weight_pack_int4.cu") else word for word in words]
    words[words.index("-o") + 1] = str(target)
    checked(*words)
    assert machine_code(target) == sorted(LISTS[archs][0].split(";"))


@pytest.mark.slow
def test_an_installation_goes_on_without_cuda_and_keeps_the_reason(project, machine):
    """Configured for a torch with CUDA, of which only the files that CMake looks at are there."""
    asked = {"QOPS_CUDA": "AUTO", "QOPS_TORCH_DIR": machine.torch}
    machine.set_torch("99.0")
    # What an earlier build has left would be installed once more.
    earlier = project.options["QOPS_OUTPUT_DIR"] / "_C_cuda.abi3.so"
    earlier.parent.mkdir(exist_ok=True)
    earlier.touch()
    result = project.configure("", **asked, CMAKE_CUDA_COMPILER='/a "folder"/nvcc')
    assert result.returncode == 0, result.stderr
    assert "qops has no CUDA kernels: built without an nvcc" in result.stderr and not earlier.exists()
    definition = next(w for w in project.command("registration.cpp") if w.startswith("-DQOPS_CUDA_MISSING="))
    assert re.fullmatch(r'-DQOPS_CUDA_MISSING="built without an nvcc(?:[^"\\]|\\.)*"', definition), definition
    assert r"/a \"folder\"/nvcc" in definition
    result = project.configure("", **{**asked, "QOPS_CUDA": "ON"})
    assert result.returncode != 0 and "QOPS_CUDA=ON, but there are no CUDA kernels: built" in result.stderr
