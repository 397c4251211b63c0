"""Where CUDA kernels run in tests: in the emulator, on CPU tensors, or on a GPU. Its fixtures stand in conftest.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import qops
from qops import _layout
from qops.testing import assert_bitwise

POLICIES = {"fifo": 0, "random": 1, "prio": 2}


def configure(emulated: Any, **changes: int) -> None:
    """The options of the emulator: its own, but for these."""
    options = {"seed": 1, "policy": POLICIES["prio"], "arch": 90, "multiprocessors": 132} | changes
    emulated.configure(options["seed"], options["policy"], "", options["arch"], options["multiprocessors"])


@dataclass(frozen=True)
class Backend:
    """The namespace of the operators, and the device of its tensors."""

    ops: Any
    device: str

    def on_device(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value


def a_gpu() -> Backend:
    if not qops.build_info()["cuda"] or not torch.cuda.is_available():
        pytest.skip("needs a build with CUDA kernels, and a GPU")
    return Backend(torch.ops.qops, "cuda")


def planted() -> dict[str, str]:
    """Faults of emulated operators, for rehearsals of what a GPU may do: QOPS_PLANTED="silu_mul=crash rotary=hang"."""
    found = dict(word.split("=") for word in os.environ.get("QOPS_PLANTED", "").split())
    if wrong := set(found.values()) - {"crash", "hang", "wrong"}:
        raise ValueError(f"QOPS_PLANTED must plant crash, hang or wrong, got {', '.join(sorted(wrong))}")
    return found


class Faulty:
    """An operator that crashes, hangs, or changes what it has computed."""

    def __init__(self, operator: Any, fault: str) -> None:
        self.operator, self.fault = operator, fault

    def __getattr__(self, overload: str) -> Faulty:
        return Faulty(getattr(self.operator, overload), self.fault)

    def __call__(self, *args: Any, **more: Any) -> Any:
        if self.fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        while self.fault == "hang":
            time.sleep(1)
        results = self.operator(*args, **more)
        for tensor in tree_leaves(results):
            tensor.neg_()
        return results


class Emulated:
    """torch.ops.qops_emu, with what is planted."""

    def __init__(self) -> None:
        self.faults = planted()

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops.qops_emu, name)
        return Faulty(operator, self.faults[name]) if name in self.faults else operator


def the_emulator() -> Backend:
    return Backend(Emulated(), "cpu")


def assert_same(backend: Backend, op: str, *args: Any, overload: str = "default") -> None:
    """CUDA's kernel gives the CPU's bits."""
    want = getattr(getattr(torch.ops.qops, op), overload)(*args)
    got = getattr(getattr(backend.ops, op), overload)(*map(backend.on_device, args))
    got, want = ((t,) if isinstance(t, Tensor) else t for t in (got, want))
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        what = f"{op} {[list(t.shape) if isinstance(t, Tensor) else t for t in args]}, result {index}"
        assert_bitwise(a.cpu(), b, what)


def emulated_operators() -> set[str]:
    """Whatever has a CUDA kernel."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("qops_emu::"))
    with_kernels = (name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"))
    return {name.removeprefix("qops_emu::").partition(".")[0] for name in with_kernels}


class Routed:
    """An operator that is the emulated one but for meta tensors, which that has no kernels for."""

    def __init__(self, real: Any, emulated: Any) -> None:
        self.real, self.emulated = real, emulated

    def __getattr__(self, overload: str) -> Routed:
        return Routed(getattr(self.real, overload), getattr(self.emulated, overload))

    def __call__(self, *args: Any, **more: Any) -> Any:
        is_meta = any(isinstance(t, Tensor) and t.is_meta for t in (*args, *more.values()))
        return (self.real if is_meta else self.emulated)(*args, **more)


@contextmanager
def gpu(backend: Backend) -> Iterator[None]:
    """Weights that are made in here are those of a GPU, and what uses them in here are its operators."""
    with pytest.MonkeyPatch.context() as patch:
        if backend.device == "cpu":
            patch.setattr(_layout, "has_gpu_layout", lambda device: torch.device(device).type != "meta")
            for name in emulated_operators():
                patch.setattr(torch.ops.qops, name, Routed(getattr(torch.ops.qops, name), getattr(backend.ops, name)))
        yield


def made_there(backend: Backend, tensors: dict[str, Tensor], kind: str, *, pack: bool = True) -> qops.Int4Weight:
    there = {key: backend.on_device(tensor) for key, tensor in tensors.items()}
    columns = 2 * tensors["qweight"].shape[1]
    return qops.Int4Weight.from_canonical(**there, kind=kind, in_features=columns, pack=pack)
