"""The house: which layer may use what. The rules stand in tests/support/house/rules.py."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qops
from tests.support.house import rules
from tests.support.house.tree import CPP, FILES, PYTHON, STEMS, assert_none

# --- C++ layers ------------------------------------------------------------------------------------------------------

BAD_CPP = {
    "torch in a kernel": ("csrc/cpu/silu_mul.cpp", "#include <torch/csrc/stable/tensor.h>"),
    "torch's namespace in a kernel": ("csrc/cpu/silu_mul.cpp", "torch::stable::Tensor t;"),
    "OpenMP": ("csrc/cpu/silu_mul.cpp", "#pragma omp parallel for"),
    "threads": ("csrc/cpu/silu_mul.cpp", "#include <thread>"),
    "another operator's header": ("csrc/cpu/silu_mul.cpp", '#include "cpu/rms_norm.h"'),
    "assembly in a kernel": ("csrc/cpu/silu_mul.cpp", 'asm volatile("pause");'),
    "a system call in a kernel": ("csrc/cpu/silu_mul.cpp", "#include <unistd.h>"),
    "a binding's header in a kernel": ("csrc/cpu/silu_mul.cpp", '#include "binding/checks.h"'),
    "a container in kernels.h": ("csrc/kernels.h", "std::vector<int> sizes;"),
    "a container's header in kernels.h": ("csrc/kernels.h", "#include <vector>"),
    "ATen's header in a binding": ("csrc/binding/silu_mul.cpp", "#include <ATen/ATen.h>"),
    "c10 in a binding": ("csrc/binding/silu_mul.cpp", "c10::IntArrayRef sizes;"),
    "unstable torch in a binding": ("csrc/binding/silu_mul.cpp", "#include <torch/library.h>"),
    "a system call in a binding": ("csrc/binding/silu_mul.cpp", "#include <sys/mman.h>"),
    "a build path in a message": ("csrc/binding/silu_mul.cpp", "STD_TORCH_CHECK(false);"),
    "shapes compared": ("csrc/binding/silu_mul.cpp", "bool same = up.sizes() == gate_sizes;"),
    "strides compared": ("csrc/binding/silu_mul.cpp", "if (expected != gate->strides()) return;"),
    "Python in a binding": ("csrc/binding/silu_mul.cpp", "#include <Python.h>"),
    "output": ("csrc/binding/silu_mul.cpp", 'printf("%d", n);'),
    "exit": ("csrc/cpu/silu_mul.cpp", "std::exit(1);"),
    "torch in CUDA": ("csrc/cuda/silu_mul.cu", "#include <torch/csrc/stable/tensor.h>"),
    "a launch": ("csrc/cuda/silu_mul.cu", "kernel<<<1, 32, 0, stream>>>(p);"),
    "assembly in CUDA": ("csrc/cuda/silu_mul.cu", 'asm("bar.sync 0;");'),
    "shared memory in CUDA": ("csrc/cuda/silu_mul.cuh", "__shared__ float tile[32];"),
    "the default stream by name": ("csrc/cuda/silu_mul.cu", "launch(kernel, 1, 32, 0, cudaStreamPerThread, p);"),
    "the default stream by a copy": ("csrc/cuda/silu_mul.cu", "cudaMemcpy(to, from, n, cudaMemcpyDeviceToDevice);"),
    "the emulator in CUDA": ("csrc/cuda/silu_mul.cuh", '#include "emulator/emu.h"'),
    "the project in the emulator": ("tests/emulator/emu.cpp", '#include "kernels.h"'),
    "a name of the project in the emulator": ("tests/emulator/emu.cpp", "qops::Status status;"),
    "no layer": ("csrc/misc/silu_mul.cpp", "int x;"),
}
GOOD_CPP = {
    "csrc/cpu/silu_mul.cpp": '#include "cpu/simd.h"\n#include "exp_poly.h"\n// torch, asm, c10:: or printf( here\n',
    "csrc/cpu/rms_norm_tables.cpp": '#include "cpu/rms_norm.h"',
    "csrc/cpu/cpu_dispatch.cpp": "#include <sys/syscall.h>\n#include <unistd.h>\n",
    "csrc/cpu/simd_avx2.h": '#include <immintrin.h>\nasm("");',
    "csrc/binding/huge_pages.h": "#include <sys/mman.h>",
    "csrc/binding/silu_mul.cpp": '#include <torch/csrc/stable/tensor.h>\n#include "kernels.h"\nauto s = "c10::";',
    "csrc/binding/rotary.cpp": "return a.sizes().equals(b) && n == a.sizes().size() && a.sizes()[0] == b.sizes()[0];",
    "csrc/cuda/ptx.cuh": '#include "emulator/ptx/ptx_emu.h"\nasm("bar.sync 0;");',
    "csrc/cuda/port.cuh": "#define QOPS_SHARED(T, name, n) __shared__ T name[n]",
    "csrc/cuda/launch.h": "cudaLaunchKernelExC(&config, kernel, arguments);",
    "csrc/cuda/rms_norm.cu": '#include "cuda/ptx.cuh"\ncudaMemcpyAsync(to, from, n, kind, stream);',
    "tests/emulator/fiber.cpp": '#include <sys/mman.h>\nasm("ret");',
    "csrc/kernels.h": "#include <cstdint>",
}


@pytest.mark.parametrize("case", BAD_CPP)
def test_cpp_rules_can_fail(case):
    assert rules.cpp_layer_violations(*BAD_CPP[case], ops=["rms_norm", "silu_mul"])


def test_cpp_layers():
    assert_none({path: rules.cpp_layer_violations(path, text, ["rms_norm"]) for path, text in GOOD_CPP.items()})
    assert_none({path: rules.cpp_layer_violations(path, text, STEMS) for path, text in CPP.items()})
    emulator = {path: text for path, text in FILES.items() if re.fullmatch(rules.EMULATOR.files, path)}
    assert "tests/emulator/emu.cpp" in emulator
    assert_none({path: rules.cpp_layer_violations(path, text) for path, text in emulator.items()})


def includes_of(layer: rules.Layer) -> set[str]:
    texts = (rules.strip_cpp_comments(text) for path, text in FILES.items() if re.fullmatch(layer.files, path))
    lines = (line for text in texts for _, line in rules.matching_lines(text, r"#\s*include\b"))
    return {line.split("include", 1)[1].strip() for line in lines}


def test_cpp_rules_are_about_what_is_there():
    for pattern, (home, what) in rules.CONFINED.items():
        texts = (rules.strip_cpp_comments(text) for path, text in FILES.items() if re.fullmatch(home, path))
        assert home == rules.NOWHERE or any(re.search(pattern, text) for text in texts), what
    used, allowed = set[str](), set[str]()
    for layer in rules.LAYERS:
        headers = includes_of(layer)
        assert headers, layer.files
        allowed.update(layer.includes)
        used.update(pattern for pattern in layer.includes if any(re.fullmatch(pattern, h) for h in headers))
    assert used == allowed


# --- Python layers ---------------------------------------------------------------------------------------------------

BAD_PYTHON = {
    "numpy in an operator": ("python/qops/ops/rotary.py", "import numpy as np"),
    "transformers in an operator": ("python/qops/ops/rotary.py", "from transformers import LlamaConfig"),
    "another operator": ("python/qops/ops/rotary.py", "from qops.ops.rms_norm import rms_norm_ref"),
    "testing in an operator": ("python/qops/ops/rotary.py", "def f():\n    import qops.testing"),
    "testing in the package": ("python/qops/models/load.py", "from qops.testing import generator"),
    "testing by name": ("python/qops/models/load.py", "from qops import testing"),
    "an integration in the package": (
        "python/qops/models/load.py",
        "def f():\n    import qops.integrations.transformers",
    ),
    "the check's numerics in the package": ("python/qops/nn.py", "from qops._numerics import generator"),
    "the check's numerics in an operator": ("python/qops/ops/rotary.py", "from qops._numerics import generator"),
    "more than torch in the check": ("python/qops/_check_cases.py", "import numpy"),
    "more than torch at import": ("python/qops/__init__.py", "import transformers"),
    "relative": ("python/qops/models/load.py", "from .weights import Int4Weight"),
    "a test file": ("tests/ops/test_rotary.py", "from test_rms_norm import X"),
    "a test file by its package": ("tests/ops/test_rotary.py", "from tests.ops.test_rms_norm import X"),
    "a peer in a problem": ("bench/problems/rotary.py", "def f():\n    from bench.peers import ours"),
    "a clock in a peer": ("bench/peers/cpu/openvino.py", "from bench.timing.samplers import Sampler"),
    "torch where results are read": ("bench/reporting/tables.py", "import torch"),
    "a benchmark": ("bench/conftest.py", "from bench.bench_operators import benchmark_of"),
}
GOOD_PYTHON = {
    "python/qops/ops/rotary.py": "import torch\nfrom qops import _native\nfrom qops.ops._checks import Checker",
    "python/qops/ops/rms_norm.py": "def cases_of_rms_norm(run):\n    from qops._numerics import rms_norm_bound",
    "python/qops/nn.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers",
    "python/qops/formats/gguf/file.py": "import numpy",
    "python/qops/integrations/parallel/styles.py": "from qops.integrations.parallel import linears",
    "python/qops/integrations/peft.py": "from qops.integrations import transformers",
    "python/qops/integrations/vllm/config.py": "from qops.integrations.vllm import shards",
    "python/qops/check.py": "from qops._numerics import generator",
    "bench/reporting/stats.py": "import numpy as np\nfrom bench.reporting.records import LIMIT",
    "bench/problems/rotary.py": "from bench.harness import compare\nfrom qops.testing import generator",
}


@pytest.mark.parametrize("case", BAD_PYTHON)
def test_python_rules_can_fail(case):
    assert rules.python_layer_violations(*BAD_PYTHON[case])


def test_python_layers():
    assert_none({path: rules.python_layer_violations(path, text) for path, text in GOOD_PYTHON.items()})
    assert_none({path: rules.python_layer_violations(path, text) for path, text in PYTHON.items()})


def test_the_library_never_prints():
    assert rules.prints("def f():\n    print(1)") and not rules.prints("console.print(1)")
    command_lines = ("python/qops/demo/", "python/qops/__main__.py")
    library = {
        path: text for path, text in PYTHON.items() if path.startswith("python/") and not path.startswith(command_lines)
    }
    assert_none({path: rules.prints(text) for path, text in library.items()})


def in_new_process(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    path = [str(Path(qops.__file__).parent.parent), *sys.path]
    command = [sys.executable, *options, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_import_needs_torch_alone():
    blocked = ("transformers", "gguf", "safetensors", "numpy.testing", "pytest")
    result = in_new_process(f"for name in {blocked}: sys.modules[name] = None\nimport qops, qops.nn, qops.weights")
    assert result.returncode == 0, result.stderr


def test_logging_is_silent_by_default():
    assert in_new_process("import logging; logging.getLogger('other').warning('x')").stderr == "x\n"
    result = in_new_process("import qops, logging; logging.getLogger('qops.any').warning('x')")
    assert result.returncode == 0 and result.stderr == ""
    assert logging.getLogger("qops").level == logging.NOTSET
