"""Weights in several processes: torch.multiprocessing shares their memory, where pickle stores canonical tensors."""

from __future__ import annotations

import io
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import qops
from qops.nn import MLP, Int4Linear, Int8Embedding, Int8Linear
from qops.testing import assert_bitwise, generator
from tests.support.ops.random_weights import some_weights

K = 64


class OwnWeight(qops.Int4Weight):
    """A class of a user."""


def dense(n: int, k: int = K) -> Tensor:
    return torch.randn(n, k, generator=generator(n))


def linears() -> nn.Module:
    int4 = [Int4Linear(qops.Int4Weight.quantize(dense(n), 32, False)) for n in (96, 104)]
    int8 = [Int8Linear(qops.Int8Weight.quantize(dense(n))) for n in (96, 96)]
    down = Int8Linear(qops.Int8Weight.quantize(dense(K, 96)))
    table = Int8Embedding(qops.Int8Weight.quantize(dense(40), 16))
    own = Int4Linear(OwnWeight.quantize(dense(24), 16))
    return nn.ModuleDict({"a": int4[0], "b": int4[1], "mlp": MLP(*int8, down), "table": table, "own": own})


def weights_of(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, (qops.Int4Weight, qops.Int8Weight))]


def child(module: nn.Module, x: Tensor, answers: Any, may_end: Any) -> None:
    """Says what it sees, and writes into each weight."""
    with torch.inference_mode():
        result = module["mlp"](module["a"](x)[..., :K])
        weights = weights_of(module)
        forms = [(weight.is_packed, weight.packed.is_shared(), type(weight).__name__) for weight in weights]
        for weight in weights:
            weight.packed.view(-1)[:3] = torch.tensor([1, 2, 3], dtype=weight.packed.dtype)
    answers.put((result.tolist(), forms))
    may_end.wait(60)


@pytest.mark.parametrize("share", [True, False])
def test_a_spawned_process_shares_the_packed_memory(share):
    """Also without share_memory(): torch moves what it sends."""
    module, x = linears(), torch.randn(3, K, generator=generator(1))
    packed = [weight.packed for weight in weights_of(module)]
    want = module["mlp"](module["a"](x)[..., :K])
    if share:
        assert module.share_memory() is module
        assert all(weight.packed.is_shared() for weight in weights_of(module))
    context = mp.get_context("spawn")
    answers, may_end = context.Queue(), context.Event()
    process = context.Process(target=child, args=(module, x, answers, may_end))
    process.start()
    result, forms = answers.get(timeout=120)
    may_end.set()
    process.join(60)
    assert process.exitcode == 0
    assert_bitwise(torch.tensor(result), want)
    assert forms == [(True, True, type(weight).__name__) for weight in weights_of(module)]
    for tensor, weight in zip(packed, weights_of(module), strict=True):
        assert weight.packed is tensor  # nothing was unpacked or copied here
        assert tensor.view(-1)[:3].tolist() == [1, 2, 3]


def test_a_queue_takes_every_kind_of_weight_in_either_form():
    """In one process: what is put and what is got are two modules on the same memory."""
    queue = mp.get_context("spawn").SimpleQueue()
    for packed, (_, weight) in itertools.product((True, False), some_weights()):
        if not packed:
            weight.unpack()
        queue.put(weight)
        twin = queue.get()
        assert type(twin) is type(weight) and twin._config() == weight._config()
        assert twin.is_packed == packed and twin.out_features == weight.out_features
        for name, tensor in weight.named_buffers():
            tensor.view(torch.uint8).fill_(7)
            assert_bitwise(getattr(twin, name), tensor, name)


def test_pickle_and_torch_save_store_canonical_tensors():
    for _, weight in some_weights():
        for saved in (pickle.dumps, lambda weight: torch.save(weight, stream := io.BytesIO()) or stream.getvalue()):
            weight.pack()
            data = saved(weight)
            assert b"qweight" in data and b"format_version" in data and b"_from_shared" not in data
        twin = pickle.loads(pickle.dumps(weight))
        assert twin.is_packed and all(not t.is_shared() for t in twin.buffers())
