"""Int4Weight and Int8Weight as modules: state, copies, casts, moves, tracing, threads, memory."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qops
from qops.testing import assert_bitwise, generator
from qops.weights import Int4Weight, Int8Weight
from tests.support.ops.random_weights import (
    KINDS,
    SCALE_DTYPES,
    assert_tensors_equal,
    buffers,
    empty_like,
    random_int4,
    random_int8,
    some_weights,
)

# State ---------------------------------------------------------------------------------------------------------------


def test_state_dict_is_canonical_and_loads_back():
    for tensors, weight in some_weights():
        model = nn.Sequential(nn.Linear(2, 2), weight)
        for _ in range(2):
            state = model.state_dict()
            assert state["1.format_version"].dtype == torch.int64 and state["1.format_version"].item() == 1
            with torch.device("meta"):  # no value could be read there
                assert model.state_dict()["1.format_version"].item() == 1
            saved = {key[2:]: t for key, t in state.items() if key.startswith("1.") and not key.endswith("version")}
            if getattr(weight, "kind", None) == "offset":
                saved["zeros"] = saved.pop("offsets")
            assert_tensors_equal(saved, tensors)
            weight.unpack()
        target = nn.Sequential(nn.Linear(2, 2), empty_like(weight))
        assert (target[1].dequantize() == 0).all()
        target.load_state_dict(state)
        assert target[1].is_packed
        for tensor in state.values():
            tensor.zero_()
        assert_tensors_equal(target[1].canonical(), tensors)


def test_state_dict_through_torch_save_and_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors, weight = random_int4(24, 64, 16, "offset", act_order=True)
    torch.save(weight.state_dict(), tmp_path / "w.pt")
    safetensors.save_file(weight.state_dict(), tmp_path / "w.safetensors")
    for state in (torch.load(tmp_path / "w.pt"), safetensors.load_file(tmp_path / "w.safetensors")):
        target = empty_like(weight)
        target.load_state_dict(state)
        assert_tensors_equal(target.canonical(), tensors)


def test_load_on_meta():
    for tensors, weight in some_weights():
        target = nn.Sequential(empty_like(weight, device="meta"))
        assert all(t.is_meta for t in target.buffers()) and target[0].is_packed
        state = nn.Sequential(weight).state_dict()
        with pytest.raises(RuntimeError, match="a weight on the meta device loads with assign=True only"):
            target.load_state_dict(state)
        target.load_state_dict(state, assign=True)
        assert target[0].is_packed and target[0].device.type == "cpu"
        assert_tensors_equal(target[0].canonical(), tensors)
    with torch.device("meta"):
        assert empty_like(weight).device.type == "meta"


@pytest.mark.parametrize("strict", (True, False))
@pytest.mark.parametrize(
    "change, message",
    (
        ({"format_version": torch.tensor(2)}, "format_version 2, this qops reads 1"),
        ({"format_version": torch.ones(2)}, "w: "),
        ({"format_version": None}, r"needs \['qweight', 'scales', 'zeros', 'format_version'\]"),
        ({"zeros": None}, r"the state has \['format_version', 'qweight', 'scales'\]"),
        ({"perm": torch.arange(64).int()}, r"the state has \['format_version', 'perm'"),
        ({"qweight": torch.zeros(24, 64, dtype=torch.uint8)}, r"qweight must have shape \[24, 32\], got \[24, 64\]"),
        ({"qweight": torch.zeros(24, 32, dtype=torch.int8)}, "qweight must have dtype uint8, got int8"),
        ({"scales": torch.ones(24, 4, dtype=torch.bfloat16)}, "scales must have dtype float16, got bfloat16"),
        ({"scales": torch.ones(24, 2, dtype=torch.float16)}, r"scales must have shape \[24, 4\], got \[24, 2\]"),
        ({"scales": torch.full((24, 4), math.nan).half()}, "scales must be finite"),
        ({"zeros": torch.zeros(24, 4)}, "zeros must have dtype uint8, got float32"),
        ({"zeros": torch.full((24, 4), 99, dtype=torch.uint8)}, "zeros must be in 0 ... 16"),
    ),
)
def test_load_refuses(change, message, strict):
    tensors, weight = random_int4(24, 64, 16, "zero_point")
    state = {k: t for k, t in {**weight.state_dict(), **change}.items() if t is not None}
    with pytest.raises(RuntimeError, match=message):
        nn.ModuleDict({"w": weight}).load_state_dict({f"w.{k}": t for k, t in state.items()}, strict=strict)
    assert_tensors_equal(weight.canonical(), tensors)  # a refused state changes nothing


@pytest.mark.parametrize("make", [random_int4, random_int8])
def test_a_state_brings_the_dtype_of_its_offsets(make):
    """Folders hold float16 ones of GGUF files, and older folders the same numbers in float32."""
    for here, there in itertools.product(SCALE_DTYPES, SCALE_DTYPES):
        tensors, weight = make(24, 64, 16, "offset", zero_dtype=there)
        _, loaded = make(24, 64, 16, "offset", zero_dtype=here, seed=1)
        loaded.load_state_dict(weight.state_dict())
        assert loaded.zero_dtype == there
        assert_tensors_equal(loaded.canonical(), tensors)
        assert_bitwise(loaded.zeros, weight.zeros)
        refused = {**weight.state_dict(), "scales": torch.ones(24, 2)}
        _, kept = make(24, 64, 16, "offset", zero_dtype=here, seed=1)
        with pytest.raises(RuntimeError, match="scales must have"):
            kept.load_state_dict(refused)
        assert kept.zero_dtype == kept.zeros.dtype == here
        assert kept.is_like(weight) == (here == there)
        if here != there:
            with pytest.raises(ValueError, match="weights must be alike"):
                type(weight).cat([weight, kept])


def test_a_pickle_without_a_dtype_of_offsets_loads():
    """Those of versions that widened them."""
    _, weight = random_int4(24, 64, 16, "offset")
    state = weight.__getstate__()
    del state["zero_dtype"]
    old = qops.Int4Weight.__new__(qops.Int4Weight)
    old.__setstate__(state)
    assert_tensors_equal(old.canonical(), weight.canonical())


def test_float_zeros_are_not_loaded_as_offsets():
    _, zeros = random_int4(24, 64, 16, "float_zero")
    _, offsets = random_int4(24, 64, 16, "offset")
    for source, target in ((zeros, offsets), (offsets, zeros)):
        with pytest.raises(RuntimeError, match=r"zeros|offsets"):
            target.load_state_dict(source.state_dict())


def test_load_reports_keys_as_torch_does():
    tensors, weight = random_int4(24, 64, 16, "symmetric")
    model = nn.ModuleDict({"w": weight, "v": nn.Linear(2, 2)})
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "w.bias"'):
        model.load_state_dict({**state, "w.bias": torch.zeros(2)})
    others = {key: t for key, t in state.items() if key.startswith("v.")}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "w.qweight", "w.scales"'):
        model.load_state_dict(others)
    keys = model.load_state_dict({**others, "w2.scales": torch.zeros(2)}, strict=False)
    assert keys.unexpected_keys == ["w2.scales"] and weight.is_packed
    assert_tensors_equal(weight.canonical(), tensors)


def copies(weight):
    stream = io.BytesIO()
    torch.save(nn.Sequential(weight), stream)
    stream.seek(0)
    yield torch.load(stream, weights_only=False)[0]
    yield pickle.loads(pickle.dumps(weight))
    yield copy.deepcopy(weight)
    yield copy.copy(weight)


def test_copies_are_equal_and_independent():
    for tensors, weight in some_weights():
        for packed in (True, False):
            (weight.pack if packed else weight.unpack)()
            for copied in copies(weight):
                assert copied.is_packed == packed and repr(copied) == repr(weight)
                assert_tensors_equal(buffers(copied), buffers(weight))
                assert_tensors_equal(copied.canonical(), tensors)
                if packed:
                    copied.packed.zero_()
                    copied.scales.zero_()
                    assert_tensors_equal(weight.canonical(), tensors)


def test_pickle_stores_canonical_tensors_and_a_version():
    tensors, weight = random_int4(24, 64, 16, "zero_point", act_order=True)
    state = weight.__getstate__()
    assert_tensors_equal(state["_buffers"], tensors)
    with pytest.raises(ValueError, match=r"qops\.Int4Weight: the state has format_version 0, this qops reads 1"):
        copy.copy(weight).__setstate__({**state, "format_version": 0})


def test_deepcopy_keeps_shared_weights_shared():
    _, weight = random_int4(24, 64, 16, "symmetric")
    model = copy.deepcopy(nn.ModuleList([weight, weight]))
    assert model[0] is model[1] and model[0] is not weight


# Casts and moves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    (
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.float,
        nn.Module.double,
        nn.Module.cpu,
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.to(torch.zeros(1, dtype=torch.float64)),
        lambda m: m.type(torch.float64),
        lambda m: m.requires_grad_(False),
        lambda m: m.eval().train(),
    ),
)
def test_casts_touch_nothing(cast):
    with torch.inference_mode(False):
        for (_, weight), packed in itertools.product(some_weights(), (True, False)):
            (weight.pack if packed else weight.unpack)()
            before = buffers(weight)
            model = nn.Sequential(nn.Linear(2, 2), weight)
            cast(model)
            after = buffers(weight)
            assert_tensors_equal(after, before)
            assert all(after[name].data_ptr() == t.data_ptr() for name, t in before.items())


def test_cast_reaches_the_neighbours():
    _, weight = random_int4(24, 64, 16, "offset", scale_dtype=torch.float32)
    with torch.inference_mode(False):
        model = nn.Sequential(nn.Linear(2, 2), weight).bfloat16()
    assert model[0].weight.dtype == torch.bfloat16 and weight.scales.dtype == weight.zeros.dtype == torch.float32


def test_moves_to_meta_and_back():
    for _, weight in some_weights():
        shapes = {name: (t.shape, t.dtype) for name, t in buffers(weight).items()}
        weight.to("meta")
        assert weight.device.type == "meta" and weight.is_packed
        assert weight.dequantize().shape == (24, 80) and weight.dequantize().is_meta
        assert {name: (t.shape, t.dtype) for name, t in buffers(weight).items()} == shapes
        with pytest.raises(NotImplementedError, match="meta"):
            weight.to("cpu")
        assert weight.device.type == "meta"
        weight.to_empty(device="cpu")
        assert weight.device.type == "cpu" and weight.is_packed
        assert {name: (t.shape, t.dtype) for name, t in buffers(weight).items()} == shapes


class QopsCalls(TorchDispatchMode):
    """Calls of this library's operators, with the device of their first argument."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "qops":
            self.calls.append((func.__name__, args[0].device.type))
        return func(*args, **(kwargs or {}))


def test_deepcopy_makes_no_canonical_copy():
    with torch.inference_mode(False):
        model = nn.ModuleList([weight for _, weight in some_weights()])
        with QopsCalls() as seen:
            copy.deepcopy(model)
        assert seen.calls == []
        with QopsCalls() as seen:
            copy.copy(model[0])
        assert seen.calls != []


def test_move_to_another_device_type_packs_there():
    """The order of a move, seen on the meta device: unpack here, move canonical tensors, pack there."""
    _, weight = random_int4(24, 64, 16, "zero_point", act_order=True)
    with torch.inference_mode(False), QopsCalls() as seen:
        weight.to("cpu")
        assert seen.calls == []
        weight.to("meta")
    assert seen.calls == [("int4_unpack.default", "cpu"), ("int4_pack.default", "meta")]
    canonical = random_int4(24, 64, 16, "zero_point", pack=False)[1]
    assert canonical.to("cpu").is_packed is False and canonical.to("meta").is_packed is True


def test_a_move_without_kernels_there_changes_nothing(monkeypatch):
    def no_kernel(qweight):
        raise NotImplementedError("Could not run 'qops::int4_pack' with arguments from the 'Meta' backend")

    tensors, weight = random_int4(24, 64, 16, "zero_point")
    monkeypatch.setattr(Int4Weight, "_pack_codes", staticmethod(no_kernel))
    with pytest.raises(RuntimeError, match=r"qops\.Int4Weight: this build of qops has no kernels for device meta"):
        weight.to("meta")
    assert weight.is_packed
    assert_tensors_equal(weight.canonical(), tensors)


@pytest.mark.skipif(
    not torch.cuda.is_available() or not torch._C._dispatch_has_kernel_for_dispatch_key("qops::int4_pack", "CUDA"),
    reason="needs a GPU, and CUDA kernels that pack",
)
def test_moves_to_cuda_and_back():
    for tensors, weight in some_weights():
        weight.cuda()
        assert weight.is_packed and weight.device.type == "cuda"
        assert_tensors_equal({key: t.cpu() for key, t in weight.canonical().items()}, tensors)
        assert_tensors_equal(weight.cpu().canonical(), tensors)


def test_share_memory_reaches_the_buffers():
    with torch.inference_mode(False):
        for tensors, weight in some_weights():
            weight.share_memory()
            assert all(t.is_shared() for t in weight.buffers())
            assert_tensors_equal(weight.canonical(), tensors)


# Forward, compile, threads -------------------------------------------------------------------------------------------


def test_forward_needs_packed():
    for _, weight in some_weights():
        weight._require_packed()
        weight.unpack()
        with pytest.raises(RuntimeError, match=rf"qops.{type(weight).__name__}: .* call \.pack\(\) before the forward"):
            weight._require_packed()
        weight.pack()._require_packed()


class Lookup(nn.Module):
    def __init__(self, weight: Int8Weight):
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        self.weight._require_packed()
        return self.weight.rows(ids, torch.bfloat16) * 2


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_traces_in_compile(backend):
    with torch.inference_mode(False), torch.no_grad():
        model = Lookup(random_int8(40, 48, 16)[1])
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for ids in (torch.tensor([39, 0, 7]), torch.tensor([1])):
            assert_bitwise(compiled(ids), model(ids))
        model.weight.unpack()
        with pytest.raises(Exception, match=r"call \.pack\(\)"):
            compiled(ids)


def test_exports():
    with torch.inference_mode(False), torch.no_grad():
        model = Lookup(random_int8(40, 48, 16)[1])
        ids = torch.tensor([39, 0, 7])
        exported = torch.export.export(model, (ids,))
        assert set(exported.constants) == {"weight.packed", "weight.scales"}  # not state: state is canonical
        stream = io.BytesIO()
        torch.export.save(exported, stream)
        stream.seek(0)
        assert_bitwise(torch.export.load(stream).module()(ids), model(ids))


def test_two_threads_share_a_weight():
    """Readers of every sort at once, and two threads that pack the same weight."""
    for _ in range(10):
        tensors, weight = random_int4(104, 240, 16, "offset", act_order=True, pack=False)
        x, expected, errors = torch.randn(2, 240), weight.dequantize(), []
        y = qops.int4_gemm(x, copy.deepcopy(weight).pack())
        barrier = threading.Barrier(4)

        def work(weight=weight, tensors=tensors, x=x, y=y, expected=expected, errors=errors, barrier=barrier):
            try:
                barrier.wait()
                weight.pack()
                for _ in range(5):
                    assert torch.equal(qops.int4_gemm(x, weight), y)
                    assert torch.equal(weight.dequantize(), expected)
                    assert_tensors_equal(weight.canonical(), tensors)
                    assert torch.equal(copy.deepcopy(weight).dequantize(), expected)
                    assert weight.half().pack().is_packed and len(weight.state_dict()) == 5
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors


# Memory --------------------------------------------------------------------------------------------------------------


def reachable_bytes(root: object) -> int:
    """Bytes of all distinct storages that can be reached from an object, modules and functions of Python aside."""
    seen, todo, storages = set(), [root.__dict__], {}
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, type(gc), type(reachable_bytes))):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        todo.extend(gc.get_referents(item))
    return sum(storages.values())


@pytest.mark.parametrize("n", (64, 72, 8))
def test_one_copy_is_resident(n):
    """At most 1.02 x packed. N = 72 and 8 end in half a strip: those 8 padding rows count as packed bytes here."""
    k, g = 256, 32
    padded = -(-n // 16) * 16
    for act_order, kind in itertools.product((False, True), KINDS):
        tensors, weight = random_int4(n, k, g, kind, act_order=act_order)
        zero_bytes = {"symmetric": 0, "zero_point": 1, "float_zero": 4, "offset": 4}[kind]
        packed_bytes = padded * (k // 2 + (2 + zero_bytes) * (k // g)) + 4 * k * act_order
        made = (
            weight,
            copy.deepcopy(weight),
            pickle.loads(pickle.dumps(weight)),
            Int4Weight.cat([weight]),
            empty_like(weight),
            weight.split([n])[0].pack(),
        )
        made[-2].load_state_dict(weight.state_dict())
        for one in made:
            one.dequantize()
            one.state_dict()
            assert sum(t.nbytes for t in one.buffers()) == reachable_bytes(one) <= 1.02 * packed_bytes
        if n == 64:
            assert packed_bytes == sum(t.nbytes for t in tensors.values())  # nothing but the canonical information
    tensors, weight = random_int8(n, k, g)
    assert reachable_bytes(weight) == padded * (k + 2 * (k // g))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that an operator hands out."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_quantize_and_dequantize_work_in_chunks():
    """No float64 copy of the weight: the largest tensor is the weight itself, here 16 chunks of float64."""
    w = torch.randn(1024, 2048, generator=generator(0), dtype=torch.bfloat16)
    with torch.inference_mode(False):
        with LargestTensor() as quantizing:
            weight = Int4Weight.quantize(w, 128)
        assert quantizing.largest <= w.nbytes
        with LargestTensor() as dequantizing:
            weight.dequantize(torch.bfloat16)
        assert dequantizing.largest <= w.nbytes
