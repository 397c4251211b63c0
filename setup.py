"""Bridge from setuptools to CMake: finds torch and calls cmake. Sources and flags live in CMakeLists.txt."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_torch() -> Path | None:
    """The folder of the torch that qops will run with.

    Found through sysconfig and not by import: pip's isolated build environment has no torch of its own, but sysconfig
    still names the site-packages of the environment that is being installed into.
    """
    if chosen := os.environ.get("QOPS_TORCH_DIR"):
        return Path(chosen)
    for scheme in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(scheme)) / "torch"
        if (folder / "lib" / "libtorch_cpu.so").exists():
            return folder
    return None


def refuse_unsupported() -> None:
    """Stop with one sentence while pip only reads metadata, before it resolves gigabytes of dependencies."""
    if sys.platform != "linux":
        sys.exit(f"qops: builds on Linux only, this is {sys.platform}.")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        sys.exit("qops: free-threaded CPython is not supported yet; use a build with the GIL.")
    torch = find_torch()
    if torch is None or not (torch / "lib" / "libtorch_cpu.so").exists():
        where = f"QOPS_TORCH_DIR={torch} holds no" if torch else "this environment has no"
        sys.exit(
            f"qops: {where} torch (lib/libtorch_cpu.so): install it first, e.g. `pip install torch`, "
            "or set QOPS_TORCH_DIR to the folder of an installed torch package."
        )


class CMakeBuild(build_ext):
    """Configures and builds the native module into the place where setuptools expects the extension."""

    def build_extension(self, ext: Extension) -> None:
        import cmake
        import ninja

        binary = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # A cache from an earlier isolated build remembers the ninja of an environment that is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        tool = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.check_call(
            [
                tool,
                "-S",
                str(ROOT),
                "-B",
                str(build),
                "-G",
                "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
                f"-DCMAKE_BUILD_TYPE={os.environ.get('QOPS_BUILD_TYPE', 'Release')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DQOPS_TORCH_DIR={find_torch()}",
                f"-DQOPS_VERSION={self.distribution.get_version()}",
                f"-DQOPS_OUTPUT_DIR={binary.parent}",
                f"-DQOPS_CUDA={os.environ.get('QOPS_CUDA', 'AUTO')}",
                f"-DQOPS_CUDA_ARCHS={os.environ.get('QOPS_CUDA_ARCHS', '')}",
            ]
        )
        subprocess.check_call([tool, "--build", str(build), "-j", jobs])
        if not binary.exists():
            sys.exit(f"qops: the build finished without {binary.name}")


if not {"sdist", "egg_info", "clean"} & set(sys.argv) or {"bdist_wheel", "build_ext"} & set(sys.argv):
    refuse_unsupported()

setup(
    ext_modules=[Extension("qops._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
