"""What an installation without CUDA kernels says to a tensor on a GPU; needs no GPU, and no torch with CUDA."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qops
from qops import _native
from qops.__main__ import info

pytestmark = pytest.mark.skipif(qops.build_info()["cuda"], reason="this build has CUDA kernels")
PACKAGES = Path(qops.__file__).parent.parent
OVERLOADS = sorted(
    name.removeprefix("qops::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("qops::")
)


class OnGpu(torch.Tensor):
    """Of no memory; the dispatcher takes it for a tensor on cuda:1, where its own key is switched off."""

    @staticmethod
    def __new__(cls, *size: int) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(cls, size, device=torch.device("cuda:1"))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} is none of ours")


def argument(schema_type: str) -> object:
    """A value that the schema takes."""
    if schema_type == "Tensor":
        return OnGpu(2, 8)
    if schema_type.startswith("List"):
        return [OnGpu(2, 8)] if "Tensor" in schema_type else []
    known = {"int": 8, "float": 1.0, "bool": False, "str": "127", "ScalarType": torch.float32}
    return None if schema_type.startswith("Optional") else known[schema_type]


def refusal(op: str, arg: str) -> str:
    return (
        rf"qops\.{op}: {arg} must be on a CPU, as qops has no CUDA kernels here "
        rf"\({re.escape(qops.build_info()['cuda_reason'])}; from its source, `QOPS_CUDA=ON pip install .* \.` builds "
        r"them or says what is missing\), got cuda:1"
    )


@pytest.mark.parametrize("overload", OVERLOADS)
def test_every_operator_says_why(overload):
    name, _, variant = overload.partition(".")
    operator = getattr(getattr(torch.ops.qops, name), variant or "default")
    given = {a.name: argument(str(a.type)) for a in operator._schema.arguments}
    on_cpu = {
        arg: [torch.ones(2, 8)] if isinstance(value, list) else torch.ones(2, 8)
        for arg, value in given.items()
        if isinstance(value, OnGpu) or (isinstance(value, list) and value)
    }
    names = list(on_cpu)
    for moved in (names[0], names[-1]):  # one tensor on a GPU is enough
        here = {**given, **{arg: tensors for arg, tensors in on_cpu.items() if arg != moved}}
        with pytest.raises(RuntimeError, match=f"^{refusal(name, moved)}$"), torch._C._DisableTorchDispatch():
            operator(**here)


def test_functions_say_why():
    x, one = OnGpu(2, 8), OnGpu(8)
    calls = {
        "silu_mul": ("gate_up", lambda: qops.silu_mul(x)),
        "rms_norm": ("x", lambda: qops.rms_norm(x, one, 1e-6)),
        "quantize_int8": ("x", lambda: qops.quantize_int8(x)),
        "int4_gemm": ("x", lambda: qops.int4_gemm(OnGpu(2, 16), qops.Int4Weight.quantize(torch.ones(16, 16), 16))),
    }
    for op, (arg, call) in calls.items():
        with pytest.raises(RuntimeError, match=f"^{refusal(op, arg)}$"), torch._C._DisableTorchDispatch():
            call()


def test_info_says_why():
    assert f"build: CPU kernels only ({qops.build_info()['cuda_reason']}), " in info()


def in_new_process(code: str) -> str:
    """With a torch that says it is one with CUDA."""
    code = f"import sys, torch; sys.path.insert(0, {str(PACKAGES)!r}); torch.version.cuda = '13.0'\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_reason_is_that_of_the_build_or_of_torch():
    build = _native._C.build_info()
    assert build["cuda_missing"].startswith("built with")
    assert in_new_process("import qops; print(qops.build_info()['cuda_reason'])").strip() == build["cuda_missing"]
    if torch.version.cuda is None:
        assert qops.build_info()["cuda_reason"] == f"torch {torch.__version__} is one without CUDA"


def test_an_operator_that_the_module_lacks_says_so(monkeypatch):
    monkeypatch.setattr(_native, "_C_cuda", object())
    text = "^qops.silu_mul: gate_up must be on a CPU, as qops has no CUDA kernel of this operator, got cuda:1$"
    with pytest.raises(RuntimeError, match=text):
        _native._refuse_cuda("qops::silu_mul")(OnGpu(2, 8))


def test_with_the_module_what_it_lacks_is_refused():
    """And what it was not built for is told. This one has the kernel of one operator."""
    out = in_new_process("""
import importlib.machinery, types
module = types.ModuleType("qops._C_cuda")
module.__spec__ = importlib.machinery.ModuleSpec("qops._C_cuda", None)
left_out = "left out of TORCH_CUDA_ARCH_LIST: 7.5 (below 8.0)"
module.build_info = lambda: {"archs": "80-real", "nvcc": "13.0", "left_out": left_out}
sys.modules["qops._C_cuda"] = module
kernels = torch.library.Library("qops", "IMPL")
kernels.impl("rms_norm", lambda *arguments: None, "CUDA")
import qops
from qops.__main__ import info
build = qops.build_info()
print(build["cuda"], build["cuda_archs"], build["cuda_reason"] == left_out)
names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("qops::")}
print(names - qops._native.without_cuda)
print(info())
""")
    assert out.startswith("True 80-real True\n{'qops::rms_norm'}\n")
    assert "\nbuild: CPU and CUDA kernels for 80-real by nvcc 13.0 (left out of TORCH_CUDA_ARCH_LIST: 7.5 (below" in out
