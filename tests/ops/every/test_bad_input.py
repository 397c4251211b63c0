"""Errors that the property test found missing or misleading, each by its text, for real and for fake tensors."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import qops
from qops._numerics import rms_norm_exact, rotary_exact
from qops.testing import FLOAT_DTYPES, assert_bitwise

HUGE = 2**40
MOST = torch.finfo(torch.float32).max
ops = torch.ops.qops
ROW = torch.ones(1, 16)
WEIGHT = torch.ones(16)


def fake(call, arguments):
    mode = FakeTensorMode()
    with mode:
        return call(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def codes(*shape, dtype=torch.uint8):
    return torch.zeros(*shape, dtype=dtype)


Q = codes(2, 16, dtype=torch.int8)
SCALE = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "arguments", "kind", "text"),
    [
        # One tensor on meta brings the call to the fake kernel, which gave an uninitialised result on the CPU.
        (ops.rms_norm, (ROW, meta(16), 1e-5), RuntimeError, "rms_norm: weight must be on cpu, got meta"),
        (ops.rms_norm, (meta(1, 16), WEIGHT, 1e-5), RuntimeError, "rms_norm: weight must be on meta, got cpu"),
        (ops.silu_mul.apart, (ROW, meta(1, 16)), RuntimeError, "silu_mul: up must be on cpu, got meta"),
        # None passes the dispatcher where a schema says Tensor.
        (ops.rms_norm, (None, WEIGHT, 1e-5), RuntimeError, "rms_norm: x must be a tensor, got None"),
        (ops.silu_mul.apart, (ROW, None), RuntimeError, "silu_mul: up must be a tensor, got None"),
        (ops.silu_mul_int8.apart, (None, ROW), RuntimeError, "silu_mul_int8: gate must be a tensor, got None"),
        (ops.add_rms_norm_int8, (ROW, None, WEIGHT, 1e-5), RuntimeError, "residual must be a tensor, got None"),
        (ops.rms_norm, (ROW, WEIGHT, float("nan")), ValueError, "eps must be a float32 that is .*, got nan"),
        (ops.rms_norm, (ROW, WEIGHT, -1e-9), ValueError, "eps must be a float32 that is finite .*, got -1e-09"),
        (ops.rms_norm, (ROW, WEIGHT, 1e39), ValueError, r"eps must be a float32 that is finite .*, got 1e\+39"),
        (ops.rms_norm, (ROW, WEIGHT, 0.0, -1e40, "fp32"), ValueError, r"weight_offset must be .*, got -1e\+40"),
        # Sizes whose products pass 2^63.
        (
            ops.rms_norm,
            (ROW.expand(2**57, 16), WEIGHT, 1e-5),
            ValueError,
            "the result must take fewer than 2\\^63 byte",
        ),
        (ops.int4_unpack, (codes(1, 64), 2**63 - 8), ValueError, "ceil.* = 576460752303423488 strips, got 1"),
        (ops.int4_pack, (codes(0, 2**62),), ValueError, "qweight must have fewer than 2\\^58 elements in a row"),
        (
            ops.int8_gemm,
            (Q, SCALE, None, codes(1, 256, dtype=torch.int8), torch.ones(1, 1, 16), None, 2**63 - 8, torch.float32),
            ValueError,
            r"packed must have shape \[S, 16 K\] = \[576460752303423488, 256\], got \[1, 256\]",
        ),
        (
            ops.quantize_int8,
            (torch.zeros(4, 4, 4, 4, 4, 8)[::2, ::2, ::2, ::2, ::2],),
            ValueError,
            "x must have at most 4 leading dimensions that cannot be merged, got strides",
        ),
        (ops.quantize_int8, (ROW.to(torch.float8_e4m3fn),), RuntimeError, "x must have dtype .*, got float8_e4m3fn"),
    ],
)
def test_errors_are_named(call, arguments, kind, text):
    with pytest.raises(kind, match=text) as real:
        call(*arguments)
    assert str(real.value).startswith("qops.")
    with pytest.raises(kind, match=re.escape(str(real.value))):
        fake(call, arguments)


@pytest.mark.parametrize("offset", [0.0, MOST, -MOST])
def test_the_largest_float32_is_finite(offset):
    arguments = (ROW, WEIGHT, MOST, offset, "fp32")
    assert_bitwise(ops.rms_norm(*arguments), rms_norm_exact(*arguments))
    assert fake(ops.rms_norm, arguments).shape == ROW.shape


def test_sparse_tensors_have_no_kernel_and_no_fake_one():
    with pytest.raises(NotImplementedError, match=r"Could not run 'qops::quantize_int8' .* 'SparseCPU'"):
        ops.quantize_int8(ROW.to_sparse())
    with pytest.raises(RuntimeError, match="quantize_int8: x must have layout strided, got sparse_coo"):
        fake(ops.quantize_int8, (ROW.to_sparse(),))


def test_a_dtype_that_the_stable_abi_does_not_know():
    x = torch.zeros(1, 16, dtype=torch.uint8).view(torch.uint4)
    with pytest.raises(RuntimeError, match=r"qops\.quantize_int8: x must have dtype .*, got another dtype"):
        qops.quantize_int8(x)


def test_results_that_do_not_fit_into_memory():
    x = ROW.expand(HUGE, 16)
    with pytest.raises(
        RuntimeError, match=r"rms_norm: the result must fit into memory, got float32 \[1099511627776, 1"
    ):
        qops.rms_norm(x, WEIGHT, 1e-5)
    assert fake(ops.rms_norm.default, (x, WEIGHT, 1e-5)).shape == (HUGE, 16)
    assert ops.rms_norm(meta(HUGE, 16), meta(16), 1e-5).shape == (HUGE, 16)


def test_scratch_that_does_not_fit_into_memory():
    """In a process that may grow by 40 MB: q takes 16 of them, a row in float32 64."""
    code = (
        "import resource, torch, qops\n"
        "x = torch.zeros(1, 2 << 24, dtype=torch.float16)\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (40 << 20),) * 2)\n"
        "qops.silu_mul_int8(x)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    text = "RuntimeError: qops.silu_mul_int8: out of memory for the scratch of this call"
    assert ended.stderr.splitlines()[-1:] == [text] and ended.returncode == 1, ended.stderr


def test_any_number_of_empty_rows_takes_no_time():
    assert qops.rms_norm(torch.empty(HUGE, 0), torch.empty(0), 1e-5).shape == (HUGE, 0)
    assert ops.int8_pack(torch.empty(HUGE, 0, dtype=torch.int8)).shape == (HUGE // 16, 0)
    q, table = torch.empty(HUGE, 0, 8), torch.zeros(1, 4).expand(HUGE, 4)
    assert qops.rotary(q, q, table, table)[0].shape == (HUGE, 0, 8)
    # 2^64 rows are no tensor of torch's, but 2^63 are.
    with pytest.raises(RuntimeError, match="overflow"):
        torch.empty(HUGE, HUGE, 0)
    arguments = (torch.empty(2**62, 2, 0), torch.empty(0), 1e-5)
    with pytest.raises(ValueError, match=r"qops.rms_norm: x must have fewer than 2\^63 rows, got shape"):
        ops.rms_norm(*arguments)
    with pytest.raises(ValueError, match=r"qops.rms_norm: the result must take fewer than 2\^63 bytes, got"):
        fake(ops.rms_norm, arguments)
    # Strides of an empty tensor may be any, their products included.
    x = torch.empty(0).as_strided((2, 3, 0), (2**62, 2**61, 1))
    assert qops.quantize_int8(x)[1].tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("shape", [(3, 0, 4), (0, 2, 3, 4), (3, 2, 0)])
def test_empty_results_have_the_strides_of_torch(shape):
    x = torch.empty(shape)
    for result in (ops.quantize_int8(x)[0], fake(ops.quantize_int8, (x,))[0]):
        assert result.stride() == x.stride()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_rotary_copies_what_it_does_not_rotate_when_q_has_no_heads(dtype):
    # An empty q and its result have the same address, which was taken for in place.
    q, k = torch.empty(2, 0, 8, dtype=dtype), torch.randn(2, 3, 8).to(dtype)
    table = torch.zeros(2, 1)
    assert_bitwise(qops.rotary(q, k, table, table)[1], rotary_exact(k, table, table, None, False))


def test_perm_error_shows_the_index():
    weight = qops.Int4Weight.quantize(torch.randn(16, 32), group_size=16)
    b = weight._buffers
    perm = torch.arange(32, dtype=torch.int32)
    perm[7] = -5
    with pytest.raises(ValueError, match=r"int4_gemm: perm must hold indices in 0 \.\. 31, got -5"):
        ops.int4_gemm(torch.ones(1, 32), b["packed"], b["scales"], None, perm, None, 16, 16, 0)


def test_typed_functions_name_what_is_no_weight_and_no_outputs():
    x = torch.ones(1, 16)
    int8 = qops.Int8Weight.quantize(torch.ones(16, 16))
    for weight in (x, None, int8):
        with pytest.raises(TypeError, match=r"qops\.int4_gemm: weight must be a qops\.Int4Weight, got (T|N|Int8W)"):
            qops.int4_gemm(x, weight)
    with pytest.raises(TypeError, match=r"int8_weight_only_gemm: weight must be a qops\.Int8Weight, got Tensor"):
        qops.int8_weight_only_gemm(x, x)
    with pytest.raises(TypeError, match=r"int8_gemm: weight must be a qops\.Int8Weight, got Tensor"):
        qops.int8_gemm(Q, SCALE, x)
    with pytest.raises(RuntimeError, match=r"int8_gemm: out_dtype must be .*, got uint4"):
        qops.int8_gemm(Q, SCALE, int8, out_dtype=torch.uint4)
    text = r"qops\.quantize_int8: out must be a tuple of 2 tensors \(q, scale\), got "
    with pytest.raises(TypeError, match=text + "Tensor"):
        qops.quantize_int8(x, out=x)
    with pytest.raises(TypeError, match=text + "3 of them"):
        qops.quantize_int8(x, out=(x, x, x))


X, ROWS8, NORM = torch.ones(1, 32), torch.zeros(1, 32, dtype=torch.int8), torch.ones(32)
HEADS, TABLE, CACHE = torch.ones(1, 2, 16), torch.ones(1, 8), torch.zeros(1, 2, 5, 16)
W4 = {n: qops.Int4Weight.quantize(torch.ones(n, 32), 16) for n in (32, 64, 96)}
W8 = qops.Int8Weight.quantize(torch.eye(32))
NORMED, TURNED = {"x": X, "weight": NORM, "eps": 0.1}, {"q": HEADS, "k": HEADS, "cos": TABLE, "sin": TABLE}
TURNED_NORMED = {**TURNED, "q_weight": TABLE[0].repeat(2), "k_weight": TABLE[0].repeat(2), "eps": 0.1}
CALLS = {
    "add_rms_norm": {**NORMED, "residual": X},
    "add_rms_norm_int8": {**NORMED, "residual": X},
    "attention_block": {
        **{"x": X[None], "norm": NORM, "eps": 0.1, "qkv": W4[96], "o": W4[32]},
        **{"keys": CACHE, "values": CACHE.clone()},
    },
    "decode_attention": {"q": HEADS[None], "k": CACHE, "v": CACHE},
    "int4_dequantize": {"weight": W4[32]},
    "int4_gemm": {"x": X, "weight": W4[32]},
    "int4_int8_gemm": {"q": ROWS8, "scale": X[0, :1], "weight": W4[32]},
    "int8_gemm": {"q": ROWS8, "scale": X[0, :1], "weight": W8},
    "int8_weight_only_gemm": {"x": X, "weight": W8},
    "mlp_block": {"x": X, "norm": NORM, "eps": 0.1, "gate_up": W4[64], "down": W4[32]},
    "qk_norm_rotary": TURNED_NORMED,
    "qk_norm_rotary_": TURNED_NORMED,
    "quantize_int8": {"x": X},
    "quantize_int8_asym": {"x": X},
    "quantize_int8_static": {"x": X, "scale": torch.tensor(1.0)},
    "rms_norm": NORMED,
    "rms_norm_int8": NORMED,
    "rotary": TURNED,
    "rotary_": TURNED,
    "silu_mul": {"gate": X, "up": X},
    "silu_mul_int8": {"gate": X, "up": X},
}


@pytest.mark.parametrize("op", qops.ops.__all__)
def test_arguments_that_are_no_tensors_are_named(op):
    """With what was expected and what came, whatever it is."""
    call, given = getattr(qops, op), CALLS[op]
    call(**{name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()})
    optional = {
        name: parameter
        for name, parameter in inspect.signature(call).parameters.items()
        if "Tensor" in str(parameter.annotation) and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY
    }
    for name in {*given, *optional} - {"eps", *({"gate_up"} if "gate" in given else ())}:
        for value in (None, [1.0], numpy.ones((1, 32)), "text", 3, torch.nn.Linear(2, 2), qops.Int4Weight):
            if value is None and (name not in given or name in ("gate", "up")):
                continue
            with pytest.raises((TypeError, RuntimeError)) as error:
                call(**{**given, name: value})
            text, kind = str(error.value), type(value).__name__
            assert re.match(rf"qops(\.{op}:|::{op}\(\)) ", text), text
            assert re.search(rf"\b{name}\b", text) and re.search(r"[Tt]ensor|qops\.Int[48]Weight", text), text
            assert re.search(rf"\b(got|found type) '?({kind}|{value if value is None else 1})\b", text), text


def test_attention_of_tensors_without_dimensions():
    one = torch.ones(())
    with pytest.raises(ValueError, match=r"qops.decode_attention: q must have 4 dimensions \[B, T, Hq, D\], got 0"):
        qops.decode_attention(one, CACHE, CACHE)
    with pytest.raises(ValueError, match=r"qops.attention_block: keys must have 4 dimensions .*, got 0"):
        qops.attention_block(**{**CALLS["attention_block"], "keys": one})


def test_a_subclass_of_a_weight_is_one():
    class Named(qops.Int8Weight):
        pass

    weight = Named.quantize(torch.eye(16))
    assert qops.int8_weight_only_gemm(torch.ones(1, 16), weight)[0, 0] == 1


def test_grad_errors_name_the_argument():
    with torch.inference_mode(False), torch.enable_grad():
        weight = torch.ones(16, requires_grad=True)
        with pytest.raises(
            RuntimeError, match=r"qops\.rms_norm: weight must not require grad, .* got requires_grad = "
        ):
            qops.rms_norm(ROW.clone(), weight, 1e-5)
