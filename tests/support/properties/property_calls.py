"""One random call of an operator, and what must come of it.

A strategy (property_rows.py, property_gemm.py, property_weights.py) builds a :class:`Call`: arguments that fit the
contract, what they must give, and then :class:`Fault` s, each of which breaks one rule. So whether a call is valid is
decided by how it was made, not by the library. :func:`check_call` makes the call through ``torch.ops.qops``, through
the typed function and with fake tensors, and looks at results, errors and memory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qops.testing import assert_bitwise

# Larger storages are not compared before and after; nothing that an operator writes is.
COMPARED_BYTES = 1 << 20
# Shape and dtype of a result.
Result = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Fault:
    """A broken rule.

    Attributes:
        arguments: the message must name one of them.
        kinds: the error is one of these.
        fake: fake tensors show it too. They have no values and no addresses, and take no memory.
        typed_only: a rule of the typed function, which ``torch.ops.qops`` does not have.
    """

    arguments: tuple[str, ...]
    kinds: tuple[type[Exception], ...]
    fake: bool = True
    typed_only: bool = False


@dataclass
class Call:
    """Attributes:
    op: as messages name it.
    overload: of ``torch.ops.qops.<op>``.
    arguments: by the names of the schema, outputs that the caller gives included.
    expected: the results, then what is written, from the arguments; called only where the call is valid.
    results: shapes and dtypes of what is returned; of what is written, where the operator returns nothing.
    written: names of the arguments that the operator writes.
    replaces: (written, read) that may be one tensor.
    typed: makes the call through the public function; None where the arguments cannot be put into it.
    typed_with: as typed, with a weight that takes the place of several arguments.
    grad: grad mode is on.
    """

    op: str
    overload: str
    arguments: dict[str, Any]
    expected: Callable[[dict[str, Any]], tuple[Tensor, ...]]
    results: list[Result]
    written: tuple[str, ...] = ()
    replaces: tuple[tuple[str, str], ...] = ()
    typed: Callable[[dict[str, Any]], object] | None = None
    typed_with: Callable[[dict[str, Any], Any], object] | None = None
    grad: bool = False
    faults: list[Fault] = field(default_factory=list)

    @property
    def name(self) -> str:
        """With its overload: "rms_norm.out"."""
        return f"{self.op}.{self.overload}"

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in self.arguments.items() if isinstance(value, Tensor))

    def on(self, device: str) -> Call:
        """The same call there: every storage copied whole, so that views still share what they shared."""
        copies: dict[int, Tensor] = {}

        def moved(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            storage = value.untyped_storage()
            if storage.data_ptr() not in copies:
                copies[storage.data_ptr()] = _bytes_of(storage).to(device, copy=True)
            there = copies[storage.data_ptr()].untyped_storage()
            view = torch.empty(0, dtype=value.dtype, device=device)
            view = view.set_(there, value.storage_offset(), value.shape, value.stride())
            return torch._neg_view(view) if value.is_neg() else view

        return dataclasses.replace(self, arguments={name: moved(value) for name, value in self.arguments.items()})

    def __str__(self) -> str:
        def shown(value: object) -> object:
            if not isinstance(value, Tensor):
                return repr(value)
            return f"{value.dtype} {list(value.shape)} strides {list(value.stride())} on {value.device}"

        title = f"{self.op}.{self.overload} {'with' if self.grad else 'without'} grad"
        lines = [f"  {name}: {shown(value)}" for name, value in self.arguments.items()]
        return "\n".join([title, *lines, *map(str, self.faults)])


def check_call(call: Call) -> None:
    """Raises AssertionError unless the call does what it must, each way it can be made."""
    grad = torch.enable_grad() if call.grad else torch.no_grad()
    on_meta = any(t.is_meta for _, t in call.tensors())
    valid = not [fault for fault in call.faults if not fault.typed_only]
    detached = {name: t.detach() if isinstance(t, Tensor) else t for name, t in call.arguments.items()}
    expected = call.expected(detached) if valid and not on_meta else None
    operator = getattr(getattr(torch.ops.qops, call.op), call.overload)
    with torch.inference_mode(False), grad:
        check_one(call, "torch.ops", lambda: operator(**call.arguments), expected, typed=False)
        if call.typed is not None:
            typed = call.typed
            check_one(call, "typed", lambda: typed(call.arguments), expected, typed=True)
        _check_fake(call, operator)


def check_one(
    call: Call, how: str, run: Callable[[], object], expected: tuple[Tensor, ...] | None, *, typed: bool
) -> None:
    faults = [fault for fault in call.faults if typed or not fault.typed_only]
    before = _snapshot(call)
    try:
        returned = run()
    except Exception as error:
        assert faults, f"{how}: a valid call failed: {type(error).__name__}: {error}\n{call}"
        _check_error(call, how, error, faults)
        assert _snapshot(call) == before, f"{how}: memory was written before the error\n{call}"
        return
    assert not faults, f"{how}: an invalid call returned\n{call}"
    got = _results(call, returned, typed)
    _check_metadata(call, how, got)
    written = [t.detach().clone() for name, t in call.tensors() if name in call.written]
    if expected is not None:
        for index, (actual, want) in enumerate(zip(got, expected, strict=True)):
            if actual.numel() > 0:
                assert_bitwise(actual.detach(), want, f"{how}: result {index} of {call}")
    after = _snapshot(call)
    # Put the old bytes back, write the results alone: nothing else may have changed.
    with torch.no_grad():
        _restore(call, before)
        targets = [t.detach() for name, t in call.tensors() if name in call.written]
        for target, value in zip(targets, written, strict=True):
            target.copy_(value)
        assert _snapshot(call) == after, f"{how}: more was written than the results\n{call}"
        _restore(call, before)


def _returns(call: Call) -> bool:
    operator = getattr(getattr(torch.ops.qops, call.op), call.overload)
    return len(operator._schema.returns) > 0


def _results(call: Call, returned: object, typed: bool) -> list[Tensor]:
    """What is returned, then what is written."""
    written = [call.arguments[name] for name in call.written]
    if call.written and not _returns(call):
        assert returned is None or typed, f"{call.op} returned {returned}"
        return written
    if returned is None:
        return written
    given: Any = returned
    return [*(given if isinstance(given, tuple) else (given,)), *written]


def _check_metadata(call: Call, how: str, got: list[Tensor]) -> None:
    results = [*call.results]
    if call.written and _returns(call):
        results += [(tuple(t.shape), t.dtype) for name, t in call.tensors() if name in call.written]
    assert len(got) == len(results), f"{how}: {len(got)} results\n{call}"
    device = next(t for _, t in call.tensors()).device
    for actual, (shape, dtype) in zip(got, results, strict=True):
        found = (tuple(actual.shape), actual.dtype, actual.device)
        assert found == (shape, dtype, device), f"{how}: got {found}, expected {shape} {dtype} {device}\n{call}"
        assert call.written or actual.is_contiguous(), f"{how}: strides {actual.stride()}\n{call}"


def _check_error(call: Call, how: str, error: Exception, faults: list[Fault]) -> None:
    kinds = tuple({kind for fault in faults for kind in fault.kinds})
    assert isinstance(error, kinds), f"{how}: {type(error).__name__} is none of {kinds}: {error}\n{call}"
    names = "|".join(re.escape(name) for fault in faults for name in fault.arguments)
    forms = [
        # Ours: op, argument, requirement, what it got.
        rf"qops\.{call.op}: ({names}) must .+, got .+",
        # torch's, where the schema does not take the value.
        rf"qops::{call.op}\(\) (Expected a value of type .* for argument '({names})' but instead found type .+)",
        # torch's, where there is no tensor to find a kernel by, or none for the layout.
        rf"There were no tensor arguments to this function .* schema qops::{call.op}\b",
        rf"Could not run 'qops::{call.op}(\.\w+)?' with arguments from the '\w+' backend",
    ]
    text = str(error)
    assert any(re.match(form, text, flags=re.DOTALL) for form in forms), f"{how}: message: {text}\n{call}"


def _check_fake(call: Call, operator: Any) -> None:
    mode = FakeTensorMode()
    arguments = {
        name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in call.arguments.items()
    }
    faults = [fault for fault in call.faults if fault.fake and not fault.typed_only]
    try:
        with mode:
            returned = operator(**arguments)
    except Exception as error:
        assert faults, f"fake: a valid call failed: {type(error).__name__}: {error}\n{call}"
        _check_error(call, "fake", error, faults)
        return
    assert not faults, f"fake: an invalid call returned\n{call}"
    if call.written and not _returns(call):
        assert returned is None
        return
    _check_metadata(call, "fake", _results(call, returned, typed=False))


# --- memory ----------------------------------------------------------------------------------------------------------


def _storages(call: Call) -> dict[int, Any]:
    storages = (t.untyped_storage() for _, t in call.tensors() if not t.is_meta and t.layout == torch.strided)
    return {s.data_ptr(): s for s in storages if 0 < s.nbytes() <= COMPARED_BYTES}


def _bytes_of(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _snapshot(call: Call) -> dict[int, bytes]:
    return {address: _bytes_of(s).cpu().numpy().tobytes() for address, s in _storages(call).items()}


def _restore(call: Call, before: dict[int, bytes]) -> None:
    for address, storage in _storages(call).items():
        _bytes_of(storage).copy_(torch.frombuffer(bytearray(before[address]), dtype=torch.uint8))
