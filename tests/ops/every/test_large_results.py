"""Results past the size of the caches are written another way: the bits are those of their parts."""

import re
from pathlib import Path

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


ROWS, H = 2049, 4096
ANGLES = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
WEIGHT = torch.randn(H, generator=torch.Generator().manual_seed(5)).bfloat16()


def rotated(call, x: torch.Tensor, y: torch.Tensor, first: int, *weights) -> tuple[torch.Tensor, ...]:
    positions = torch.arange(first, first + len(x))
    return call(x.view(-1, 32, 128), y.view(-1, 32, 128), *weights, ANGLES, ANGLES.flip(0), positions=positions)


# Of rows x and y, the first being row `first` of all.
CALLS = {
    "rms_norm": lambda x, y, first: qops.rms_norm(x, WEIGHT, 1e-5),
    "add_rms_norm": lambda x, y, first: qops.add_rms_norm(x, y, WEIGHT, 1e-5),
    "rms_norm_int8": lambda x, y, first: qops.rms_norm_int8(x, WEIGHT, 1e-5),
    "add_rms_norm_int8": lambda x, y, first: qops.add_rms_norm_int8(x, y, WEIGHT, 1e-5),
    "quantize_int8": lambda x, y, first: qops.quantize_int8(x),
    "quantize_int8_asym": lambda x, y, first: qops.quantize_int8_asym(x),
    "quantize_int8_static": lambda x, y, first: qops.quantize_int8_static(x, torch.tensor(0.03)),
    "silu_mul": lambda x, y, first: qops.silu_mul(x, y),
    "silu_mul_int8": lambda x, y, first: qops.silu_mul_int8(x, y),
    "rotary": lambda x, y, first: rotated(qops.rotary, x, y, first),
    "qk_norm_rotary": lambda x, y, first: rotated(
        lambda q, k, a, b, *rest, **positions: qops.qk_norm_rotary(q, k, a, b, *rest, 1e-5, **positions),
        x,
        y,
        first,
        WEIGHT[:128],
        WEIGHT[128:256],
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_parts_of_many_rows_have_their_bits(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    x, y = (torch.randn(ROWS, H, generator=generator).to(dtype) for _ in range(2))
    if "rotary" in name and dtype != torch.bfloat16:
        pytest.skip("cos and sin have one dtype here")
    whole = CALLS[name](x, y, 0)
    for begin in range(0, ROWS, 512):
        part = CALLS[name](x[begin : begin + 512], y[begin : begin + 512], begin)
        pairs = [(whole, part)] if isinstance(whole, torch.Tensor) else zip(whole, part, strict=True)
        assert all(torch.equal(bits(a[begin : begin + 512]), bits(b)) for a, b in pairs)


def flags_of_mapping(address: int) -> list[str]:
    """Of the memory mapping there, as /proc/self/smaps shows them."""
    there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            there = int(found[1], 16) <= address < int(found[2], 16)
        elif there and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages in this kernel")
def test_large_results_lie_in_huge_pages() -> None:
    if not flags_of_mapping(torch.empty(1).data_ptr()):
        pytest.skip("this kernel shows no flags of mappings")
    size = 48 << 20  # malloc gives back so much, and gets it anew
    for _ in range(2):
        y = qops.rms_norm(torch.ones(size // 4096 // 4, 4096), torch.ones(4096), 1e-5)
        assert "hg" in flags_of_mapping(y.data_ptr() + size // 2)
    # The first and last page may hold something else as well.
    assert "hg" not in flags_of_mapping(y.data_ptr())
