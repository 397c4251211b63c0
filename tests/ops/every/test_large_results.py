"""Results past the size of the caches are written another way: the bits are those of their parts."""

import pytest
import torch

import qops


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_of_large_weights_have_their_bits(symmetric: bool, dtype: torch.dtype) -> None:
    w = torch.randn(1032, 4096, generator=torch.Generator().manual_seed(3))
    whole = qops.Int4Weight.quantize(w, 32, symmetric).dequantize(dtype)
    for begin in range(0, 1032, 256):
        part = slice(begin, begin + 256)
        of_part = qops.Int4Weight.quantize(w[part], 32, symmetric).dequantize(dtype)
        assert torch.equal(bits(whole[part]), bits(of_part))
