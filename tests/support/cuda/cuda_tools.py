"""What CUDA tests need, and where this machine has it: nvcc, CUDA's headers, CMake. None is where it has not."""

from __future__ import annotations

import fcntl
import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
EMULATOR = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulator"
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")


@functools.cache
def nvcc() -> Path | None:
    """Of a toolkit with C++20, or None."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return Path(found) if found else None


def _toolkit() -> Path | None:
    """The folder that nvcc says it lives in: the one on PATH may be a wrapper."""
    if nvcc() is None:
        return None
    lines = subprocess.run([str(nvcc()), "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
    return next((Path(line.partition("TOP=")[2].strip()) for line in lines.splitlines() if "TOP=" in line), None)


def _site_packages() -> Iterator[Path]:
    yield from (Path(path) for path in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]) if path)


@functools.cache
def cuda_include() -> Path | None:
    """The folder of cuda_runtime.h: of the toolkit, else of the PyPI packages nvidia-cuda-{runtime,crt,cccl}."""
    toolkit = _toolkit()
    folders = [toolkit / "include"] if toolkit else []
    for packages in _site_packages():
        folders += sorted(packages.glob("nvidia/cu*/include"), reverse=True)
    needed = ("cuda_runtime.h", "crt/host_config.h", "nv/target")
    return next((folder for folder in folders if all((folder / name).is_file() for name in needed)), None)


@functools.cache
def cute_includes() -> list[Path] | None:
    """The folders of cute/ (PyPI's nvidia-cutlass) and of cuda/std/ (a toolkit, or PyPI's nvidia-cuda-cccl)."""
    spec = importlib.util.find_spec("cutlass_library")
    include = cuda_include()
    if spec is None or not spec.submodule_search_locations or include is None:
        return None
    cute = Path(spec.submodule_search_locations[0]) / "source" / "include"
    candidates = [include / "cccl", *(p / "nvidia/cu13/include/cccl" for p in _site_packages())]
    cccl = next((folder for folder in candidates if (folder / "cuda/std/utility").is_file()), None)
    return [cute, cccl] if cccl else None


def cmake() -> str:
    """The program; skips the test where its package is missing."""
    # The packages' own programs: on PATH there may be wrappers of environments that are gone.
    return str(Path(_package("cmake").CMAKE_BIN_DIR) / "cmake")


def ninja() -> str:
    """The program, likewise."""
    return str(Path(_package("ninja").BIN_DIR) / "ninja")


def _package(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs the package {name}")
    return importlib.import_module(name)


def require_cuobjdump() -> Path:
    """The program, with nvdisasm beside it: of a toolkit, else of PyPI's nvidia-cuda-{cuobjdump,nvdisasm}."""
    folders = [nvcc().resolve().parent] if nvcc() else []
    for packages in _site_packages():
        folders += packages.glob("nvidia/cu*/bin")
    for folder in folders:
        if all((folder / name).is_file() for name in ("cuobjdump", "nvdisasm")):
            return folder / "cuobjdump"
    pytest.skip("needs cuobjdump and nvdisasm: a toolkit, or `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`")


def require_nvcc() -> Path:
    path = nvcc()
    if path is None:
        pytest.skip("needs nvcc")
    return path


def require_cuda_include() -> Path:
    include = cuda_include()
    if include is None:
        pytest.skip(
            "needs CUDA's headers: a toolkit, or `pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl`"
        )
    return include


def build_emulator(variant: str = "") -> Path:
    """The folder of a build of tests/emulator, brought up to date; skips the test where it cannot be built.

    variant: sanitizers such as "address,undefined", "traced", or nothing.
    """
    return _build(EMULATOR, BUILD, variant, "all", {})


def build_emulated_operators(variant: str = "") -> Path:
    """The module of a build of tests/emulated, likewise."""
    import torch

    options: dict[str, object] = {
        "QOPS_TORCH_DIR": Path(torch.__file__).parent,
        "Python_EXECUTABLE": sys.executable,
    }
    folder = _build(ROOT / "tests" / "emulated", ROOT / "build" / "emulated", variant, "qops_emulated", options)
    return next(folder.glob("qops_emulated*.so"))


def build_hardware_tests(folder: Path) -> Path:
    """The sound cases of tests/emulator as a program for an sm_90a, by nvcc."""
    compiler = [str(require_nvcc()), "-std=c++20", "-gencode=arch=compute_90a,code=sm_90a"]
    compiler += ["-I", str(ROOT / "csrc"), "-I", str(ROOT / "tests"), "-Werror", "all-warnings"]
    sources = [*sorted(EMULATOR.glob("cases/cases_*.cpp")), EMULATOR / "cases/hardware.cu"]
    checked(*compiler, "-x", "cu", "--threads", "0", *map(str, sources), "-o", str(folder / "hardware_tests"))
    return folder / "hardware_tests"


def _build(source: Path, builds: Path, variant: str, target: str, more: dict[str, object]) -> Path:
    include = require_cuda_include()
    tool = cmake()
    folder = builds / (variant.replace(",", "_") or "plain")
    is_traced = variant == "traced"
    options: dict[str, object] = {
        **more,
        "CMAKE_MAKE_PROGRAM": ninja(),
        "CUDA_INCLUDE_DIR": include,
        "EMULATOR_SANITIZE": "" if is_traced else variant,
        "EMULATOR_TRACER": "ON" if is_traced else "OFF",
    }
    configure = [tool, "-S", str(source), "-B", str(folder), "-G", "Ninja"]
    builds.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:  # other processes of this run build the same
        fcntl.flock(lock, fcntl.LOCK_EX)
        checked(*configure, *(f"-D{name}={value}" for name, value in options.items()))
        checked(tool, "--build", str(folder), "--target", target)
    return folder


def checked(*command: str, cwd: Path | None = None) -> str:
    """What a command printed; its failure, with that, fails the test."""
    # A compiler takes half as long again with a sanitizer's allocator, which is preloaded for this process alone.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout
