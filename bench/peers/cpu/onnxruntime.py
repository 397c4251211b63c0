"""ONNX Runtime: MatMulNBits for weight-only GEMMs, DynamicQuantizeMatMul for int8.

Its CPU kernels are at home in float32, which is what goes in and comes out; x is converted before the clock starts.
Equal initialisers of one process are stored once, so copies of a weight must differ, which other seeds give. All
sessions share one pool of threads: with a pool each, those of idle sessions spin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.peers.layouts import unsupported
from bench.problems import Axes, Result
from bench.problems.int4_gemm import Int4Gemm
from bench.problems.int8_gemm import Int8Gemm
from bench.problems.int8_weight_only_gemm import Int8WeightOnlyGemm
from bench.problems.shared.provider import Provider

REQUIRES = ("onnxruntime", "onnx")
CONTRIB = "com.microsoft"
BITS8_ZERO = 128


@functools.lru_cache(maxsize=1)
def _share_threads(threads: int) -> None:
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def _call(
    operator: str, x: Tensor, n: int, weights: Sequence[Tensor | None], **attributes: int
) -> Callable[[], Result]:
    """A session of one node, and buffers for its input and output."""
    import onnx
    import onnxruntime

    _share_threads(torch.get_num_threads())
    given = {f"weight_{i}": weight.cpu().numpy() for i, weight in enumerate(weights) if weight is not None}
    names = [f"weight_{i}" if f"weight_{i}" in given else "" for i in range(len(weights))]
    rows, float32 = x.shape[0], onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["x", *names], ["y"], domain=CONTRIB, **attributes)],
        operator,
        [onnx.helper.make_tensor_value_info("x", float32, list(x.shape))],
        [onnx.helper.make_tensor_value_info("y", float32, [rows, n])],
        [onnx.numpy_helper.from_array(values, name) for name, values in given.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(CONTRIB, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y = np.empty((rows, n), np.float32)
    binding: Any = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x.float().contiguous().numpy()))
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(y))
    result = torch.from_numpy(y)

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return result

    return call


def _nibbles(zeros: Tensor) -> Tensor:
    """Two to a byte along the groups of a row, the last byte of an odd row half full."""
    if zeros.shape[1] % 2:
        zeros = torch.cat((zeros, torch.zeros_like(zeros[:, :1])), dim=1)
    return zeros[:, 0::2] | (zeros[:, 1::2] << 4)


def _matmul_nbits(p: Int4Gemm | Int8WeightOnlyGemm, level: int, bits: int, weight: Tensor, zeros: Tensor | None) -> Any:
    n, groups = p.scales.shape
    return _call(
        "MatMulNBits",
        p.x,
        n,
        [weight.reshape(n, groups, -1), p.scales.float(), zeros],
        K=p.x.shape[1],
        N=n,
        bits=bits,
        block_size=p.group_size,
        accuracy_level=level,
    )


def int4_gemm(level: int, p: Int4Gemm) -> Callable[[], Result]:
    return _matmul_nbits(p, level, 4, p.qweight, None if p.zeros is None else _nibbles(p.zeros))


def int8_weight_only_gemm(level: int, p: Int8WeightOnlyGemm) -> Callable[[], Result]:
    unsigned = p.codes.view(torch.uint8) ^ BITS8_ZERO
    return _matmul_nbits(p, level, 8, unsigned, torch.full(p.scales.shape, BITS8_ZERO, dtype=torch.uint8))


def int8_gemm(p: Int8Gemm) -> Callable[[], Result]:
    x = p.q.float() * p.scale[:, None]
    return _call("DynamicQuantizeMatMul", x, p.codes.shape[0], [p.codes.T.contiguous(), p.w_scale, None, None])


def _weight_only_unsupported(device: str, axes: Axes) -> str | None:
    group = int(axes["G"])
    if group < 16 or group & (group - 1):
        return "group sizes that are powers of two, from 16, only"
    return unsupported()(device, axes)


PROVIDERS = [
    *(
        Provider(
            f"onnxruntime acc{level}",
            op,
            ("cpu",),
            functools.partial(build, level),
            f"{accuracy}; float32 in and out",
            REQUIRES,
            unsupported=_weight_only_unsupported,
            rebuilt=True,
        )
        for op, build in (
            ("int4_gemm", int4_gemm),
            ("int4_int8_gemm", int4_gemm),
            ("int8_weight_only_gemm", int8_weight_only_gemm),
        )
        for level, accuracy in ((0, "exact weights, fp32 sums"), (4, "int8 activations per group"))
        if level == 4 or op != "int4_int8_gemm"
    ),
    Provider(
        "onnxruntime DynamicQuantizeMatMul",
        "int8_gemm",
        ("cpu",),
        int8_gemm,
        "int8 activations again, one scale for all rows; float32 in and out; quantisation included",
        REQUIRES,
        rebuilt=True,
    ),
]
