"""Adapters, one module for each package that they wrap; ``README.md`` is their table.

A module has a list ``PROVIDERS`` and imports what it wraps inside ``build``, so that importing it needs nothing.
"""

# In the order of tables, ours first.
MODULES = [
    "ours",
    "vendor",
    "eager",
    "compiled",
    "decode",
    "torch_int4pack",
    "torch_dynamic",
    "ort",
    "openvino_cpu",
    "zentorch_cpu",
    "humming_cuda",
    "vllm_gemm",
    "vllm_rows",
    "vllm_layer",
    "sglang_cuda",
    "fbgemm_cuda",
    "gemlite_cuda",
    "quack_cuda",
    "flashinfer_cuda",
    "liger_cuda",
]
