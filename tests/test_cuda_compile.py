"""What ptxas makes of the CUDA kernels; needs nvcc, no GPU."""

from __future__ import annotations

import re
import subprocess

import pytest

from cuda_tools import ROOT, require_nvcc

KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
GATED = ("80", "90a")
# Launch bounds see to it that a block fits. With more, fewer than three blocks of 128 threads would share an SM.
MAX_REGISTERS = 168


@pytest.mark.slow
@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_compile_without_spills(path, tmp_path):
    command = [str(require_nvcc()), "-std=c++20", "-fmad=false", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
    command += ["-Werror", "all-warnings", "--threads", "2", "-I", str(ROOT / "csrc"), "-c", str(path)]
    command += ["-o", str(tmp_path / "kernels.o")]
    for arch in GATED:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    log = result.stdout + result.stderr
    assert result.returncode == 0, "\n".join(line for line in log.splitlines() if "error" in line)
    # Information of ptxas that is no warning: something was ignored or injected.
    assert re.findall(r".*C75\d\d.*", log) == []
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    assert registers and max(registers) <= MAX_REGISTERS, max(registers)
    assert set(re.findall(r"(\d+) bytes spill", log)) <= {"0"}
