"""Which release of each GPU peer is measured, what of it an offline machine needs, and the machine it is for.

The machine: Linux on x86-64, Python 3.12, torch 2.11 for CUDA 13, Triton 3.6, nvcc 13.0, and the usual packages (numpy,
safetensors, jinja2, tqdm, tabulate, einops, ninja, requests, packaging, protobuf, cuda-bindings). What a peer needs
besides stands in its stage.
"""

from __future__ import annotations

from dataclasses import dataclass

PYTHON = "3.12"
ABIS = ("cp312", "abi3", "none")
# pip takes each number alone.
PLATFORMS = (
    "manylinux1_x86_64",
    "manylinux2014_x86_64",
    *(f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34)),
)


@dataclass(frozen=True)
class Pin:
    """A distribution.

    Attributes:
        name, version: as ``pip download`` takes them.
        cut: files that are taken out, to be loaded without their package; empty for the whole distribution.
        source: there is no wheel.
    """

    name: str
    version: str
    cut: tuple[str, ...] = ()
    source: bool = False


@dataclass(frozen=True)
class Stage:
    """What is carried and unpacked together.

    Attributes:
        pins: its distributions.
        links: name beside the packages -> what it stands for, for packages that find their parts through a ``.pth``
            file, which PYTHONPATH does not read.
    """

    pins: tuple[Pin, ...]
    links: tuple[tuple[str, str], ...] = ()


TVM_FFI = Pin("apache-tvm-ffi", "0.1.15.post2")

STAGES = {
    "humming": Stage((Pin("humming-kernels", "0.1.19"),)),
    "vllm_gemm": Stage((Pin("vllm", "0.23.0", cut=("vllm/_C.abi3.so",)),)),
    "vllm_rows": Stage((Pin("vllm", "0.23.0", cut=("vllm/_C_stable_libtorch.abi3.so",)),)),
    "sglang": Stage((Pin("sglang-kernel", "0.4.2.post2", cut=("sgl_kernel/sm90/common_ops.abi3.so",)),)),
    "fbgemm": Stage(
        (
            Pin(
                "fbgemm-gpu-genai",
                "1.6.0",
                cut=("fbgemm_gpu/experimental/gen_ai/fbgemm_gpu_experimental_gen_ai.so",),
            ),
        )
    ),
    "gemlite": Stage((Pin("gemlite", "0.6.0.post2", source=True),)),
    "liger": Stage((Pin("liger-kernel", "0.8.5"),)),
    "quack": Stage(
        (
            Pin("quack-kernels", "0.6.5"),
            Pin("nvidia-cutlass-dsl", "4.7.1"),
            Pin("nvidia-cutlass-dsl-libs-core", "4.7.1"),
            Pin("nvidia-cutlass-dsl-libs-base", "4.7.1"),
            Pin("nvidia-cutlass-dsl-libs-cu13", "4.7.1"),
            TVM_FFI,
            Pin("torch-c-dlpack-ext", "0.1.5"),
        ),
        links=(
            ("cutlass", "nvidia_cutlass_dsl/dsl_packages/cutlass"),
            ("iket", "nvidia_cutlass_dsl/dsl_packages/iket"),
        ),
    ),
    "flashinfer": Stage(
        (
            Pin("flashinfer-python", "0.6.12"),
            TVM_FFI,
            Pin("cuda-tile", "1.7.0"),
            Pin("nvidia-cudnn-frontend", "1.32.0"),
            Pin("nvidia-ml-py", "13.615.71"),
        )
    ),
}
