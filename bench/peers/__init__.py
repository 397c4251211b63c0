"""Adapters, one module for each package that they wrap; ``README.md`` is their table.

A module has a list ``PROVIDERS`` and imports what it wraps inside ``build``, so that importing it needs nothing.
"""

# In the order of tables, ours first.
MODULES = (
    "bench.peers.ours",
    "bench.peers.pytorch.compiled",
    "bench.peers.pytorch.int4pack",
    "bench.peers.pytorch.dynamic",
    "bench.peers.cpu.ggml",
    "bench.peers.cpu.onnxruntime",
    "bench.peers.cpu.openvino",
    "bench.peers.cpu.zentorch",
    "bench.peers.cuda.humming",
    "bench.peers.cuda.vllm_gemm",
    "bench.peers.cuda.vllm_rows",
    "bench.peers.cuda.vllm_layer",
    "bench.peers.cuda.sglang",
    "bench.peers.cuda.fbgemm",
    "bench.peers.cuda.gemlite",
    "bench.peers.cuda.quack",
    "bench.peers.cuda.flashinfer",
    "bench.peers.cuda.liger",
)
