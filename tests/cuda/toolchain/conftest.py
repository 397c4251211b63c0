"""The build of the preset cuda-check, which the gates share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.support.cuda import cuda_tools
from tests.support.cuda.cuda_tools import ROOT, checked


@pytest.fixture(scope="session")
def log(request) -> str:
    """What the build of the preset printed."""
    cuda_tools.require_nvcc()
    archs = request.config.getoption("--cuda-archs")
    options = {
        "QOPS_CUDA_ARCHS": archs,
        "QOPS_TORCH_DIR": Path(torch.__file__).parent,
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_MAKE_PROGRAM": cuda_tools.ninja(),
    }
    cmake = cuda_tools.cmake()
    checked(cmake, "--preset", "cuda-check", *(f"-D{name}={value}" for name, value in options.items()), cwd=ROOT)
    return checked(cmake, "--build", "--preset", "cuda-check", "--clean-first", cwd=ROOT)
