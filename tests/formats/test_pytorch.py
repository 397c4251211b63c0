"""PyTorch's own quantised tensors."""

import pytest
import torch
from torch import Tensor

from qops.formats import pytorch
from qops.nn import Int8WeightOnlyLinear
from tests.support.package_weights import random_weight

SHAPE = (24, 96)
ROWS = torch.arange(SHAPE[0])


def every_code(dtype: torch.dtype) -> Tensor:
    """[24, 256] integers of which each row has all codes."""
    low = torch.iinfo(torch.int8 if dtype == torch.qint8 else torch.uint8).min
    return (torch.arange(256) + low).expand(SHAPE[0], -1)


@pytest.mark.parametrize("zero_point", [0, 7, -30])
@pytest.mark.parametrize("scale", [0.037, 1e-2, 3.0])
def test_per_tensor(scale, zero_point):
    tensor = torch.quantize_per_tensor(random_weight(SHAPE, torch.float32, 0), scale, zero_point, torch.qint8)
    weight = pytorch.int8_weight(tensor)
    assert weight.kind == "symmetric"
    assert torch.equal(weight.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8])
def test_per_channel_takes_every_code_where_the_difference_fits_in_a_byte(dtype):
    middle = 0 if dtype == torch.qint8 else 128
    scales = (torch.rand(SHAPE[0], generator=torch.Generator().manual_seed(1)) + 0.01).double()
    values = (every_code(dtype) - middle) * scales.unsqueeze(1)
    tensor = torch.quantize_per_channel(values.float(), scales, torch.full((SHAPE[0],), middle), 0, dtype)
    weight = pytorch.int8_weight(tensor)
    assert weight.kind == "symmetric"
    assert weight.canonical()["qweight"].unique().numel() == 256
    assert torch.equal(weight.dequantize(), tensor.dequantize())


def test_differences_that_pass_a_byte_become_offsets_where_a_float32_holds_them():
    scales = torch.full((SHAPE[0],), 0.375, dtype=torch.float64)
    values = (every_code(torch.quint8) - 3) * 0.375
    tensor = torch.quantize_per_channel(values, scales, torch.full((SHAPE[0],), 3), 0, torch.quint8)
    weight = pytorch.int8_weight(tensor)
    assert weight.kind == "offset"
    assert torch.equal(weight.dequantize(), tensor.dequantize())
    tensor = torch.quantize_per_channel(values, (scales + 0.1).float(), torch.full((SHAPE[0],), 3), 0, torch.quint8)
    with pytest.raises(
        ValueError, match=r"pytorch.int8_weight: offsets must fit in float32.* row 0, group 0 .*zero 3\.0"
    ):
        pytorch.int8_weight(tensor)


@pytest.mark.parametrize("dtype", [torch.quint4x2, torch.quint8])
def test_float_qparams(dtype):
    random = torch.Generator().manual_seed(2)
    scales, zeros = torch.rand(SHAPE[0], generator=random) + 0.01, torch.rand(SHAPE[0], generator=random) * 15
    codes = torch.randint(0, 16, SHAPE, generator=random)
    codes[:, :16] = torch.arange(16)
    values = (codes - zeros.unsqueeze(1)) * scales.unsqueeze(1)
    tensor = torch.quantize_per_channel(values, scales, zeros, 0, dtype)
    weight = pytorch.int4_weight(tensor)
    assert weight.kind == "float_zero"
    found, theirs = weight.dequantize(), tensor.dequantize()
    exact = codes.double() - zeros.unsqueeze(1).double()
    once = (codes - zeros.unsqueeze(1)).double() == exact  # where PyTorch's own difference rounds nothing
    assert once.any() and not once.all()
    assert torch.equal(found[once], theirs[once])
    assert ((found - theirs).abs() <= 2**-23 * theirs.abs()).all()
    assert torch.equal(found, (exact * scales.unsqueeze(1).double()).float())


def test_float_qparams_of_8_bits():
    scales, zeros = torch.full((SHAPE[0],), 0.25), 60 + ROWS / 8
    values = (every_code(torch.quint8) - zeros.unsqueeze(1)) * 0.25
    tensor = torch.quantize_per_channel(values, scales, zeros, 0, torch.quint8)
    weight = pytorch.int8_weight(tensor)
    assert weight.kind == "offset"
    assert torch.equal(weight.dequantize(), tensor.dequantize())


def test_integer_zero_points_of_4_bits():
    codes = torch.arange(16).repeat(6).expand(SHAPE)
    zeros = ROWS % 17
    values = (codes - zeros.unsqueeze(1)) * 0.1
    tensor = torch.quantize_per_channel(values, torch.full((SHAPE[0],), 0.1), zeros, 0, torch.quint8)
    weight = pytorch.int4_weight(tensor)
    assert weight.kind == "zero_point"
    assert torch.equal(weight.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("engine", [name for name in torch.backends.quantized.supported_engines if name != "none"])
def test_dynamic_linear(engine, monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", engine)
    dense = torch.nn.Linear(96, 24)
    dense.weight.data.copy_(random_weight(SHAPE, torch.float32, 3))
    layer = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(dense), dtype=torch.qint8)[0]
    weight = pytorch.int8_weight(layer.weight())
    assert torch.equal(weight.dequantize(), layer.weight().dequantize())
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(4))
    # What the module's text says of its activations: one scale for the input, and the range of the engine.
    steps = 255 if engine == "qnnpack" else 127
    low, high = min(float(x.min()), 0), max(float(x.max()), 0)
    scale = (high - low) / steps
    zero = round(-low / scale)
    rounded = ((x / scale).round() + zero).clamp(0, steps) - zero
    wanted = rounded * scale @ weight.dequantize().T + layer.bias()
    assert (layer(x) - wanted).abs().max() < 1e-4
    exact = Int8WeightOnlyLinear(weight, layer.bias())(x)
    assert (layer(x) - exact).abs().max() > 1e-3  # so none of our linears computes the same


REFUSED = {
    "dense": (pytorch.int8_weight, torch.zeros(8, 32), RuntimeError, "tensor must be quantised to qint8 or quint8"),
    "qint32": (
        pytorch.int8_weight,
        torch.quantize_per_tensor(torch.zeros(8, 32), 0.1, 0, torch.qint32),
        RuntimeError,
        "got dtype qint32",
    ),
    "columns": (
        pytorch.int8_weight,
        torch.quantize_per_channel(torch.zeros(8, 32), torch.ones(32), torch.zeros(32).long(), 1, torch.qint8),
        ValueError,
        "by rows, axis 0, got axis 1",
    ),
    "scales": (
        pytorch.int8_weight,
        torch.quantize_per_channel(
            torch.zeros(8, 32), torch.full((8,), 0.1, dtype=torch.float64), torch.zeros(8).long(), 0, torch.qint8
        ),
        ValueError,
        "scales must fit in float32.* in row 0",
    ),
    "codes": (
        pytorch.int4_weight,
        torch.quantize_per_tensor(torch.full((8, 32), 1.6), 0.1, 0, torch.quint8),
        ValueError,
        r"codes 0 \.\.\. 15, got 16",
    ),
    "zeros": (
        pytorch.int4_weight,
        torch.quantize_per_tensor(torch.full((8, 32), -3.0), 0.1, 17, torch.quint8),
        ValueError,
        r"zero points must be 0 \.\.\. 16, got 17",
    ),
    "vector": (
        pytorch.int8_weight,
        torch.quantize_per_tensor(torch.zeros(8), 0.1, 0, torch.qint8),
        ValueError,
        "2 dim",
    ),
    "empty": (
        pytorch.int8_weight,
        torch.quantize_per_tensor(torch.zeros(0, 32), 0.1, 0, torch.qint8),
        ValueError,
        "both positive",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    function, tensor, error, said = REFUSED[case]
    with pytest.raises(error, match=rf"^qops\.formats\.pytorch\.int._weight: .*{said}"):
        function(tensor)


def test_the_caller_s_default_dtype_is_not_the_scale_s():
    tensor = torch.quantize_per_tensor(torch.randn(8, 16), 0.037, 0, torch.qint8)
    wanted = tensor.dequantize()
    torch.set_default_dtype(torch.float16)
    try:
        weight = pytorch.int8_weight(tensor)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(weight.dequantize(), wanted)
