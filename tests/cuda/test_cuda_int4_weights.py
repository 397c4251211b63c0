"""4-bit weights as they lie on a GPU: packing, unpacking and dequantising kernels, and Int4Weight on top of them.

In the emulator CPU tensors stand for those of a GPU: Int4Weight is told that the CPU has the GPU's layout, and its
operators are taken from the emulated namespace.
"""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import qops
from qops.testing import FLOAT_DTYPES, assert_bitwise, generator, random_activations
from tests.support.cuda.cuda_backend import POLICIES, gpu, made_there
from tests.support.ops.contracts import nibbles, packed_for_gpu
from tests.support.ops.random_weights import (
    KINDS,
    SCALE_DTYPES,
    assert_tensors_equal,
    empty_like,
    group_sizes,
    random_int4,
    random_levels,
)

# Half a strip and less than a block, whole ones, a block and 8 columns, more strips and blocks than a thread block has.
PADDINGS = ((8, 8), (16, 64), (24, 72), (16, 120), (40, 200), (136, 136), (8, 1032), (200, 64), (0, 64), (16, 0))
DEQUANTIZED = ((8, 8), (24, 80), (48, 144), (136, 72), (16, 576))


def random_qweight(n: int, k: int) -> Tensor:
    return torch.randint(256, (n, k // 2), dtype=torch.uint8, generator=generator(n + k))


@pytest.mark.parametrize("n, k", PADDINGS)
def test_packed_codes_stand_where_the_layout_says(each, n, k):
    qweight = random_qweight(n, k)
    stored = -(-k // 64) * 64
    want = packed_for_gpu(nibbles(qweight)) if n and k else torch.empty((n + 15) // 16, 8 * stored, dtype=torch.uint8)
    packed = each.ops.int4_pack(each.on_device(qweight))
    assert packed.shape == want.shape
    assert_bitwise(packed.cpu(), want)
    back = each.ops.int4_unpack(packed, n).cpu()
    assert back.shape == (n, stored // 2)
    assert_bitwise(back[:, : k // 2].contiguous(), qweight)
    assert bool((back[:, k // 2 :] == 0x88).all())


def test_every_code_of_every_place_comes_back(backend):
    """One block, each code alone: no other place changes."""
    for code in range(0, 1024, 7):
        codes = torch.full((16, 64), 8, dtype=torch.uint8)
        codes.view(-1)[code] = 1 + code % 7
        qweight = codes[:, 0::2] | codes[:, 1::2] << 4
        packed = backend.ops.int4_pack(backend.on_device(qweight))
        assert int((packed != 0x88).sum()) == 1
        assert_bitwise(backend.ops.int4_unpack(packed, 16).cpu(), qweight, str(code))


def test_codes_may_begin_anywhere(backend):
    """Canonical bytes that are not aligned are read one by one."""
    memory = backend.on_device(random_qweight(24, 80).view(-1))
    for start in range(4):
        qweight = memory[start : start + 16 * 40].view(16, 40)
        assert_bitwise(backend.ops.int4_pack(qweight).cpu(), packed_for_gpu(nibbles(qweight.cpu())), str(start))


def test_packed_bytes_must_be_aligned_and_whole(backend):
    for op, rest in ((backend.ops.int4_unpack, (16,)), (backend.ops.int4_dequantize, (None, 16, 64, 0, torch.float16))):
        scales = () if op is backend.ops.int4_unpack else (backend.on_device(torch.zeros(1, 1, 16)),)
        memory = backend.on_device(torch.zeros(1024, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"packed must begin at a multiple of 16 bytes, got an address 4 past one"):
            op(memory[4:516].view(1, 512), *scales, *rest)
        with pytest.raises(
            ValueError, match=r"packed must (have strips of|hold) a multiple of (512|64 columns .*), got 640"
        ):
            op(memory[:640].view(1, 640), *scales, *rest)


def test_each_device_refuses_the_layout_of_the_other(backend):
    """K = 72 shows it: 576 bytes of a strip on the CPU, 1024 on a GPU."""
    scales = torch.zeros(1, 1, 16)
    for ops, device, wrong in ((backend.ops, backend.device, 576), (torch.ops.qops, "cpu", 1024)):
        packed = torch.zeros(1, wrong, dtype=torch.uint8, device=device)
        with pytest.raises(ValueError, match=r"qops\.int4_dequantize: (packed|group_size) must "):
            ops.int4_dequantize(packed, scales.to(device), None, 16, 72, 0, torch.float16)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_gives_the_bits_of_the_cpu(each, kind, dtype):
    for seed, (n, k) in enumerate(DEQUANTIZED):
        for group_size in group_sizes(k)[:4]:
            dtypes = {"scale_dtype": SCALE_DTYPES[seed % 3], "zero_dtype": SCALE_DTYPES[seed % 2 * 2]}
            options = {**dtypes, "act_order": seed % 2 == 1, "seed": seed}
            tensors, here = random_int4(n, k, group_size, kind, **options)
            want = qops.int4_dequantize(here, dtype)
            with gpu(each):
                there = made_there(each, tensors, kind)
                assert_bitwise(qops.int4_dequantize(there, dtype).cpu(), want, str(here))
                if n % 16 == 0:
                    assert_bitwise(qops.int4_dequantize(there.mix_gate_up(), dtype).cpu(), want, str(there))


# Int4Weight ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_of_a_gpu(backend, kind):
    """Float zeros of any dtype are float32 there, which its kernels read."""
    tensors, _ = random_int4(24, 80, 16, kind, act_order=True, zero_dtype=torch.float16)
    with gpu(backend):
        weight = made_there(backend, tensors, kind)
    assert_bitwise(weight.packed.cpu(), packed_for_gpu(nibbles(tensors["qweight"])))
    for name in tensors.keys() & {"scales", "zeros"}:
        strips = getattr(weight, name).cpu()
        widened = torch.float32 if name == "zeros" and kind != "zero_point" else tensors[name].dtype
        assert strips.shape == (2, 5, 16) and strips.is_contiguous() and strips.dtype == widened
        for row, group in itertools.product(range(32), range(5)):
            place = 2 * (row % 8) + row % 16 // 8
            assert strips[row // 16, group, place] == (tensors[name][row, group] if row < 24 else 0)
    assert_bitwise(weight.perm.cpu(), tensors["perm"])


@pytest.mark.parametrize("gate_up", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_comes_back_in_every_way(backend, kind, gate_up):
    for seed, (n, k) in enumerate(((48, 80), (16, 8), (32, 192), (1040, 136))):
        options = {"act_order": seed % 2 == 0, "zero_dtype": SCALE_DTYPES[seed % 3]}
        tensors, here = random_int4(n, k, group_sizes(k)[-1], kind, **options, seed=seed)
        want, rows = here.dequantize(), {key: t for key, t in tensors.items() if key != "perm"}
        with gpu(backend):
            weight = made_there(backend, tensors, kind)
            if gate_up:
                weight.mix_gate_up()
            assert_tensors_equal({key: t.cpu() for key, t in weight.canonical().items()}, tensors)
            assert_bitwise(weight.dequantize().cpu(), want)
            loaded = empty_like(weight, backend.device)
            loaded.load_state_dict(weight.state_dict())
            for other in (loaded, copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
                assert_tensors_equal(dict(other.named_buffers()), dict(weight.named_buffers()))
            first, second = weight.split([n // 16 * 8, n - n // 16 * 8])
            assert not first.mixed_gate_up
            assert_bitwise(first.qweight.cpu(), rows["qweight"][: n // 16 * 8])
            whole = type(weight).cat([first, second])
            assert_tensors_equal({key: t.cpu() for key, t in whole.canonical().items()}, tensors)
            assert_bitwise(weight.unpack().dequantize().cpu(), want)
            assert_bitwise(weight.pack().dequantize().cpu(), want)


def test_a_move_to_another_type_of_device_changes_the_layout(each):
    if each.device == "cpu":
        pytest.skip("needs two types of device")
    tensors, here = random_int4(48, 80, 16, "offset", act_order=True, zero_dtype=torch.float16)
    buffers = {key: t.clone() for key, t in here.named_buffers()}
    there = here.to(each.device)
    assert_bitwise(there.packed.cpu(), packed_for_gpu(nibbles(tensors["qweight"])))
    assert_tensors_equal(dict(there.cpu().named_buffers()), buffers)


@pytest.mark.parametrize("bits, kind", [*itertools.product((4, 8), ("symmetric", "offset"))])
def test_scales_of_two_levels_are_float32_there(backend, bits, kind):
    tensors, here = random_levels(48, 512, 32, kind, bits=bits, act_order=True)
    wide, dense, state = here.widened().canonical(), here.dequantize(), here.state_dict()
    for gate_up in (False, True):
        with gpu(backend):
            there = {key: backend.on_device(t) for key, t in tensors.items()}
            weight = type(here).from_canonical(**there, kind=kind)
            if gate_up:
                weight.mix_gate_up()
            assert not weight.has_levels and weight.scales.dtype == torch.float32
            canonical = {key: t.cpu() for key, t in weight.canonical().items()}
            assert_tensors_equal(canonical, wide)
            assert_bitwise(weight.dequantize().cpu(), dense)
            loaded = empty_like(weight, backend.device)
            loaded.load_state_dict(state)
            assert_tensors_equal(dict(loaded.named_buffers()), dict(weight.named_buffers()))
        back = empty_like(here)
        back.load_state_dict(canonical_state(canonical, weight))
        assert not back.has_levels
        assert_bitwise(back.dequantize(), dense)


def canonical_state(tensors: dict[str, Tensor], weight: qops.Int4Weight | qops.Int8Weight) -> dict[str, Tensor]:
    named = {weight._state_key(key): t for key, t in tensors.items()}
    return {**named, "format_version": torch.tensor(1)}


def test_kernels_refuse_scales_of_two_levels(backend):
    x = backend.on_device(torch.zeros(1, 256, dtype=torch.float16))
    packed, scales = (
        torch.zeros(shape, dtype=dtype) for shape, dtype in (((1, 2048), torch.uint8), ((1, 1, 10, 16), torch.int8))
    )
    weight = [backend.on_device(t) for t in (packed, scales, scales)]
    out = backend.on_device(torch.full((1, 16), 7, dtype=torch.float16))
    with pytest.raises(RuntimeError, match=r"int4_gemm: scales must have dtype float32, float16 or bfloat16, got int8"):
        backend.ops.int4_gemm.out(x, *weight, None, None, 16, 32, 3, out=out)
    assert bool((out == 7).all())
    with pytest.raises(RuntimeError, match=r"int4_dequantize: scales must have dtype float32, float16 or .*, got int8"):
        backend.ops.int4_dequantize(*weight, 16, 32, 3, torch.float16)


def test_kernels_refuse_narrow_zeros(backend):
    tensors, _ = random_int4(16, 64, 16, "offset", zero_dtype=torch.float16)
    with gpu(backend):
        w = made_there(backend, tensors, "offset")
    weight = (w.packed, w.scales, w.zeros.half())
    x = backend.on_device(torch.zeros(1, 64, dtype=torch.float16))
    with pytest.raises(RuntimeError, match=r"int4_gemm: zeros must have dtype float32, got float16"):
        backend.ops.int4_gemm(x, *weight, None, None, 16, 16, 3)
    with pytest.raises(RuntimeError, match=r"int4_dequantize: zeros must have dtype float32, got float16"):
        backend.ops.int4_dequantize(*weight, 16, 16, 3, torch.float16)


def test_fake_tensors_have_the_layout_of_their_device():
    with FakeTensorMode():
        for device, stored in (("cpu", 72), ("cuda", 128)):
            packed = torch.ops.qops.int4_pack(torch.empty(24, 36, dtype=torch.uint8, device=device))
            assert packed.shape == (2, 8 * stored) and packed.device.type == device
            assert torch.ops.qops.int4_unpack(packed, 24).shape == (24, stored // 2)
            scales = torch.empty(2, 1, 16, device=device)
            w = torch.ops.qops.int4_dequantize(packed, scales, None, 24, 72, 0, torch.bfloat16)
            assert w.shape == (24, 72)
            y = torch.ops.qops.int4_gemm(w, packed, scales, None, None, None, 24, 72, 0)
            assert y.shape == (24, 24) and y.dtype == torch.bfloat16
            narrow = scales.half()
            if device == "cpu":
                assert torch.ops.qops.int4_gemm(w, packed, scales, narrow, None, None, 24, 72, 3).shape == (24, 24)
            else:
                with pytest.raises(RuntimeError, match=r"zeros must have dtype float32, got float16"):
                    torch.ops.qops.int4_gemm(w, packed, scales, narrow, None, None, 24, 72, 3)
            with pytest.raises(ValueError, match=r"x must have last dimension K = 72, got 80"):
                torch.ops.qops.int4_gemm(torch.empty(1, 80, device=device), packed, scales, None, None, None, 24, 72, 0)


# The emulator notices ------------------------------------------------------------------------------------------------


def test_every_synchronisation_is_missed_when_it_is_gone(emulated):
    ops = torch.ops.qops_emu
    emulated.configure(1, POLICIES["prio"], "")
    qweight = random_qweight(40, 200)
    packed, scales = ops.int4_pack(qweight), random_activations(3, 1, 16, dtype=torch.float16, seed=0)

    def run() -> list[Tensor]:
        weights = [ops.int4_dequantize(packed, scales, None, 40, 200, 0, dtype) for dtype in FLOAT_DTYPES]
        return [ops.int4_pack(qweight), ops.int4_unpack(packed, 40), *weights]

    want = run()
    files = ("weight_pack_int4.cu", "int4_dequantize.cu")
    places = [place for place in emulated.synchronisations() if any(file in place for file in files)]
    assert len(places) == 4, places
    for place in places:
        missed = 0
        for seed in range(6):
            emulated.configure(seed, seed % 3, place)
            missed += any(
                not torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(run(), want, strict=True)
            )
        emulated.configure(1, POLICIES["prio"], "")
        assert missed > 0, f"{place}: nothing shows that it is there"
