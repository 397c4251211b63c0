"""Eight Python threads on the same weights: every operator gives each of them the bits that one thread alone gets."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qops
from qops.testing import assert_bitwise, random_activations

THREADS, CALLS = 8, 12
N, K, H, D = 64, 256, 4, 32
Run = Callable[[int], tuple[Tensor, ...]]


def x(seed: int, *shape: int) -> Tensor:
    return random_activations(*(shape or (1 + seed % 5, K)), dtype=(torch.bfloat16, torch.float32)[seed % 2], seed=seed)


def tupled(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def cases() -> dict[str, Run]:
    dense = random_activations(N, K, dtype=torch.float32, seed=1)
    int4 = qops.Int4Weight.quantize(dense, 32, symmetric=False)
    int8, groups = qops.Int8Weight.quantize(dense), qops.Int8Weight.quantize(dense, 32)
    mixed = qops.Int8Weight.quantize(dense).mix_gate_up()
    w, bias, eps = torch.linspace(0.5, 2, K), torch.linspace(-1, 1, N), 1e-5
    cos, sin = torch.linspace(-1, 1, 64 * D // 2).view(64, D // 2), torch.linspace(1, -1, 64 * D // 2).view(64, D // 2)
    ops = torch.ops.qops
    bytes4, bytes8 = int4.canonical()["qweight"], int8.canonical()["qweight"]

    def heads(seed: int) -> tuple[Tensor, Tensor]:
        return x(seed, 2, 5, H, D), x(seed, 2, 5, 1, D)

    def rotary_(seed: int) -> tuple[Tensor, ...]:
        q, k = (t.clone() for t in heads(seed))
        qops.rotary_(q, k, cos, sin)
        return q, k

    def qk_norm_rotary_(seed: int) -> tuple[Tensor, ...]:
        q, k = (t.clone() for t in heads(seed))
        qops.qk_norm_rotary_(q, k, w[:D], w[D : 2 * D], cos, sin, eps)
        return q, k

    def int8_gemm(seed: int) -> tuple[Tensor, ...]:
        q, scale = qops.quantize_int8(x(seed))
        out = torch.empty(len(q), N, dtype=torch.bfloat16)
        ops.int8_gemm.out(q, scale, None, int8.packed, int8.scales, bias, N, out=out)
        return qops.int8_gemm(q, scale, int8, bias), qops.int8_gemm(q, scale, mixed, silu_mul=True), out

    static = torch.tensor(0.05)
    runs: dict[str, Callable[[int], Tensor | tuple[Tensor, ...]]] = {
        "check_layout": lambda s: ops.check_layout(int8.packed, "cpu 1") or (),
        "int4_dequantize": lambda s: qops.int4_dequantize(int4, torch.bfloat16),
        "int4_gemm": lambda s: qops.int4_gemm(x(s), int4, bias),
        "int4_pack": lambda s: ops.int4_pack(bytes4),
        "int4_unpack": lambda s: ops.int4_unpack(int4.packed, N),
        "int8_gemm": int8_gemm,
        "int8_pack": lambda s: ops.int8_pack(bytes8),
        "int8_unpack": lambda s: ops.int8_unpack(int8.packed, N),
        "int8_weight_only_gemm": lambda s: qops.int8_weight_only_gemm(x(s), groups, bias),
        "quantize_int8": lambda s: qops.quantize_int8(x(s)),
        "quantize_int8_asym": lambda s: qops.quantize_int8_asym(x(s)),
        "quantize_int8_static": lambda s: qops.quantize_int8_static(x(s), static),
        "rms_norm": lambda s: qops.rms_norm(x(s), w, eps),
        "add_rms_norm": lambda s: qops.add_rms_norm(x(s), x(s + 2, *x(s).shape), w, eps),
        "rms_norm_int8": lambda s: qops.rms_norm_int8(x(s), w, eps),
        "add_rms_norm_int8": lambda s: qops.add_rms_norm_int8(x(s), x(s + 2, *x(s).shape), w, eps),
        "rotary": lambda s: qops.rotary(*heads(s), cos, sin),
        "rotary_": rotary_,
        "qk_norm_rotary": lambda s: qops.qk_norm_rotary(*heads(s), w[:D], w[D : 2 * D], cos, sin, eps),
        "qk_norm_rotary_": qk_norm_rotary_,
        "silu_mul": lambda s: qops.silu_mul(x(s)),
        "silu_mul_int8": lambda s: qops.silu_mul_int8(x(s)),
    }
    return {op: lambda seed, run=run: tupled(run(seed)) for op, run in runs.items()}


CASES = cases()


def test_every_operator_is_here():
    registered = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("qops::"))
    names = {name.removeprefix("qops::").split(".")[0] for name in registered}
    assert names == set(CASES)


@pytest.mark.parametrize("op", CASES)
def test_eight_threads_get_the_bits_of_one(op):
    run = CASES[op]
    want = [run(seed) for seed in range(CALLS)]
    errors: list[BaseException] = []
    start = threading.Barrier(THREADS)

    def work(first: int) -> None:
        try:
            start.wait()
            with torch.inference_mode():
                for index in range(CALLS):
                    seed = (first + index) % CALLS
                    for got, expected in zip(run(seed), want[seed], strict=True):
                        assert_bitwise(got, expected, f"{op}, input {seed}")
        except BaseException as error:  # what a thread raises is lost
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
