"""OpenVINO's CPU plugin: compressed weights in a MatMul, with bfloat16 operands or with dynamically quantised rows.

Dynamic quantisation happens only under the float32 hint: with bfloat16 the plugin takes the bfloat16 kernel and ignores
the group size (the errors tell which of them ran). float32 goes in and comes out; x is converted before the clock
starts. Tensors made from arrays share their memory, so the call keeps them alive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bench.peers.layouts import SYMMETRIC_ZERO, unsupported
from bench.problems import Result
from bench.problems.int4_gemm import Int4Gemm
from bench.problems.int8_weight_only_gemm import Int8WeightOnlyGemm
from bench.problems.shared.provider import Provider

REQUIRES = ("openvino",)


def _build(hint: str, p: Int4Gemm | Int8WeightOnlyGemm, weight: Tensor, zeros: Tensor | None) -> Callable[[], Result]:
    """``weight``: bytes of the codes; ``zeros``: uint8 [N, K/G], or None where codes are int8 around 0."""
    import openvino as ov
    from openvino import opset13 as op

    (n, groups), k = p.scales.shape, p.x.shape[1]
    bits4 = isinstance(p, Int4Gemm)
    code_type = ov.Type.u4 if bits4 else ov.Type.i8
    packed = np.array(weight.numpy().reshape(-1))
    x_node = op.parameter(list(p.x.shape), ov.Type.f32)
    node = op.convert(op.constant(ov.Tensor(packed, [n, groups, p.group_size], code_type)), ov.Type.f16)
    if zeros is not None:
        node = op.subtract(node, op.convert(op.constant(zeros.numpy()[..., None]), ov.Type.f16))
    node = op.multiply(node, op.constant(p.scales.half().numpy()[..., None]))
    node = op.reshape(node, op.constant(np.array([n, k], np.int64)), False)
    y_node = op.matmul(x_node, op.convert(node, ov.Type.f32), False, True)
    compiled = ov.Core().compile_model(
        ov.Model([y_node], [x_node]),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": hint,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(p.group_size if hint == "f32" else 0),
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # the process is pinned
        },
    )
    request = compiled.create_infer_request()
    x, y = p.x.float().contiguous(), torch.empty(p.x.shape[0], n)
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(ov.Tensor(y.numpy(), shared_memory=True))

    def call(owners: tuple[object, ...] = (x, packed, compiled)) -> Tensor:
        request.infer()
        return y

    return call


def int4_gemm(hint: str, p: Int4Gemm) -> Callable[[], Result]:
    zeros = torch.full((1, 1), SYMMETRIC_ZERO, dtype=torch.uint8) if p.zeros is None else p.zeros
    return _build(hint, p, p.qweight, zeros)


def int8_weight_only_gemm(hint: str, p: Int8WeightOnlyGemm) -> Callable[[], Result]:
    return _build(hint, p, p.codes, None)


PROVIDERS = [
    Provider(
        f"openvino {name}",
        op,
        ("cpu",),
        functools.partial(build, hint),
        f"{accuracy}; float32 in and out",
        REQUIRES,
        unsupported=unsupported(),
        rebuilt=True,
    )
    for op, build in (
        ("int4_gemm", int4_gemm),
        ("int4_int8_gemm", int4_gemm),
        ("int8_weight_only_gemm", int8_weight_only_gemm),
    )
    for name, hint, accuracy in (
        ("bf16", "bf16", "bf16 weights, fp16 scales"),
        ("dynamic quant", "f32", "int8 activations per group, fp16 scales"),
    )
    if hint == "f32" or op != "int4_int8_gemm"
]
