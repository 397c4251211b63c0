"""What random calls are made of: values, layouts in memory, and the ways in which one argument can be wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from qops.testing import FLOAT_DTYPES, generator, random_activations
from tests.support.properties.property_calls import Call, Fault

T = TypeVar("T")
OTHER_DTYPES = (
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint16,
    torch.float8_e4m3fn,
    torch.uint4,
)
INT64 = (0, 1, -1, -8, 2**31, 2**31 - 8, 2**62, 2**63 - 1, 2**63 - 8, -(2**63))
HUGE = 2**40  # rows that no memory holds
COLUMNS = (0, 1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 130)


class Sampler:
    """Everything is drawn from integers, tensors from a seed among them.

    Args:
        integer: an integer in low ... high; hypothesis shrinks what it gave, `random.randint` is as good otherwise.
    """

    def __init__(self, integer: Callable[[int, int], int]) -> None:
        self.integer = integer

    def choice(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def one_in(self, n: int) -> bool:
        return self.integer(0, n - 1) == n - 1

    def dtype(self) -> torch.dtype:
        return self.choice(FLOAT_DTYPES)

    # Shapes and values -----------------------------------------------------------------------------------------------

    def leading(self, most: int = 4) -> tuple[int, ...]:
        """0 to ``most`` dimensions, some of them of size 0 or 1."""
        sizes = [self.choice((2, 1, 3, 5, 0)) for _ in range(self.integer(0, most))]
        while any(sizes) and torch.Size(sizes).numel() > 40:
            sizes[sizes.index(max(sizes))] = 1
        return tuple(sizes)

    def rows_of_any_number(self) -> tuple[int, ...]:
        return (0, HUGE) if self.one_in(20) else self.leading()

    def columns(self, options: Sequence[int] = COLUMNS) -> int:
        """The size of a last dimension."""
        return self.choice(options)

    def values(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Normal numbers of some size, or numbers among which are NaN, infinities, zeros, the largest, the least."""
        rng = generator(self.integer(0, 2**20))
        if not dtype.is_floating_point:
            low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
            return torch.randint(low, high, tuple(shape), generator=rng).to(dtype)
        t = torch.randn(tuple(shape), generator=rng) * self.choice(
            (1.0, 1.0, 1e-3, 40.0, 0.0, 1e-12, 3e-38, 1e19, 1e37)
        )
        t = t.to(dtype)
        if t.numel() > 0 and self.one_in(3):
            info = torch.finfo(dtype)
            specials = [float("nan"), float("inf"), -float("inf"), -0.0, info.max, -info.max, info.smallest_normal]
            specials += [info.smallest_normal * info.eps, 1.0]
            for _ in range(self.integer(1, 3)):
                t.view(-1)[self.integer(0, t.numel() - 1)] = self.choice(specials)
        return t

    # Layouts ---------------------------------------------------------------------------------------------------------

    def buffer(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory of NaN, or of a large number."""
        return torch.full((count,), float("nan") if dtype.is_floating_point else 99).to(dtype)

    def contiguous(self, t: Tensor) -> Tensor:
        """Contiguous, perhaps in the middle of a larger storage."""
        if self.one_in(2):
            return t.clone()
        before = self.integer(1, 5)
        view = self.buffer(before + t.numel() + 3, t.dtype)[before : before + t.numel()].view(t.shape)
        return view.copy_(t)

    def rows(self, t: Tensor, trailing: int = 1, *, writable: bool = False) -> Tensor:
        """Any strides of the leading dimensions; the last `trailing` ones are dense. Expanded ones change values."""
        kind = self.choice((0, 1, 2, 4) if writable else (0, 1, 2, 3, 4, 5))
        leading = t.dim() - trailing
        if kind == 1 and t.dim() > 0:
            wide = self.buffer(2 * t.numel() + 64, t.dtype)
            before, step = self.integer(0, 3), t.shape[-1] + self.integer(0, 4)
            shape, strides = list(t.shape), [1] * t.dim()
            for d in reversed(range(t.dim() - 1)):
                strides[d] = step if d == t.dim() - 2 else strides[d + 1] * max(shape[d + 1], 1)
            if t.numel() == 0 or before + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) >= len(wide):
                return self.contiguous(t)
            return wide.as_strided(shape, strides, before).copy_(t)
        if kind == 2 and leading >= 2:
            a, b = self.integer(0, leading - 1), self.integer(0, leading - 1)
            return t.transpose(a, b).contiguous().transpose(a, b)
        if kind == 3 and leading >= 1:
            d = self.integer(0, leading - 1)
            if t.shape[d] > 0:
                return t.narrow(d, 0, 1).clone().expand(t.shape)
        if kind == 4 and leading >= 1 and t.numel() > 0:
            return torch.stack((t, t), dim=leading).unbind(leading)[self.integer(0, 1)]
        if kind == 5 and t.dtype.is_floating_point and t.dim() > 0 and self.one_in(3):
            return torch._neg_view(-t)
        return self.contiguous(t)

    def strided(self, t: Tensor, *, writable: bool = False) -> Tensor:
        """Strides of all dimensions are free."""
        if t.dim() == 0 or t.shape[-1] < 2 or self.one_in(2):
            return self.rows(t, 0, writable=writable) if t.dim() > 0 else self.contiguous(t)
        return torch.stack((t, t), dim=-1)[..., self.integer(0, 1)]

    def unmergeable(self, t: Tensor, leading: int) -> Tensor:
        """Every second index of each of the leading dimensions, which then are as many to the kernel, too."""
        wide = self.buffer(2**leading * t.numel(), t.dtype).view(
            *(2 * n for n in t.shape[:leading]), *t.shape[leading:]
        )
        return wide[(slice(None, None, 2),) * leading].copy_(t)

    # Faults ----------------------------------------------------------------------------------------------------------

    def break_one(self, call: Call, ways: Sequence[tuple[str, Callable[[], Fault | None]]]) -> Call:
        """Applies one of the ways, which name the arguments that they touch; now and then a second one elsewhere.

        A way that does not fit this call gives None, and another one is tried.
        """
        touched: set[str] = set()
        wanted = 2 if self.one_in(8) else 1
        for _ in range(6):
            names, way = self.choice(ways)
            if len(call.faults) == wanted or not touched.isdisjoint(names.split()):
                continue
            fault = way()
            if fault is not None:
                touched.update(names.split(), fault.arguments)
                call.faults.append(fault)
        return call

    def tensor_faults(
        self,
        call: Call,
        dtypes: dict[str, tuple[torch.dtype, ...]],
        related: Sequence[str] = (),
        optional: Sequence[str] = (),
    ) -> list[tuple[str, Callable[[], Fault | None]]]:
        """None, another type, another dtype, another device, another layout, for each tensor.

        Args:
            dtypes: what each tensor argument may have.
            related: arguments that a message about a dtype may name instead: those that must have the same one.
            optional: arguments that may be None.
        """
        ways: list[tuple[str, Callable[[], Fault | None]]] = []
        for name, t in call.tensors():

            def none(name: str = name) -> Fault:
                call.arguments[name], call.typed = None, None
                return Fault((name,), (RuntimeError,))

            def other_type(name: str = name) -> Fault:
                call.arguments[name], call.typed = self.choice(("text", [1, 2], object())), None
                return Fault((name,), (RuntimeError, TypeError))

            def other_dtype(name: str = name, t: Tensor = t) -> Fault:
                dtype = self.choice([dtype for dtype in OTHER_DTYPES if dtype not in dtypes[name]])
                # Deterministic torch.empty cannot fill a uint4.
                call.arguments[name] = (
                    torch.zeros(t.shape, dtype=torch.uint8).view(dtype)
                    if dtype == torch.uint4
                    else (torch.zeros(t.shape, dtype=dtype))
                )
                return Fault((name, *related), (RuntimeError,))

            def other_device(name: str = name, t: Tensor = t) -> Fault | None:
                if sum(1 for _ in call.tensors()) == 1:
                    return None
                call.arguments[name] = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
                return Fault(tuple(name for name, _ in call.tensors()), (RuntimeError,))

            def sparse(name: str = name, t: Tensor = t) -> Fault | None:
                if not t.dtype.is_floating_point or t.dim() == 0 or max(t.shape) >= HUGE:
                    return None
                call.arguments[name] = t.detach().contiguous().to_sparse()
                return Fault((name,), (RuntimeError,))

            ways += [(name, way) for way in (other_type, other_dtype, other_device)]
            if name not in optional:
                ways.append((name, none))
            if name not in call.written:
                ways.append((name, sparse))
        return ways

    def last_dim(self, call: Call, *names: str) -> list[tuple[str, Callable[[], Fault | None]]]:
        """A last dimension that is not dense."""

        def spread(name: str) -> Fault | None:
            t = call.arguments[name]
            if t.dim() == 0 or t.shape[-1] < 2 or t.numel() == 0:
                return None
            apart = torch.stack((t, t), dim=-1)[..., 0]
            call.arguments[name] = apart if self.one_in(2) else t[..., :1].clone().expand(t.shape)
            return Fault((name,), (ValueError,))

        return [(name, lambda name=name: spread(name)) for name in names]

    def not_contiguous(self, call: Call, *names: str) -> list[tuple[str, Callable[[], Fault | None]]]:
        def spread(name: str) -> Fault | None:
            t = call.arguments[name]
            t = torch.stack((t, t), dim=-1)[..., 0]
            if t.is_contiguous():
                return None
            call.arguments[name] = t
            return Fault((name,), (ValueError,))

        return [(name, lambda name=name: spread(name)) for name in names]

    def shapes(self, call: Call, names: Sequence[str], blamed: Sequence[str] = ()) -> list[Any]:
        """A shape that differs in one size or in the number of dimensions."""

        def reshape(name: str) -> Fault | None:
            t = call.arguments[name]
            kind = self.integer(0, 3)
            if max(t.shape, default=0) >= HUGE:
                return None
            if kind == 0:
                t = torch.empty((*t.shape, 2), dtype=t.dtype)
            elif kind == 1:
                t = torch.empty((2, *t.shape), dtype=t.dtype)
            elif t.dim() > 0:
                d = self.integer(0, t.dim() - 1)
                sizes = list(t.shape)
                sizes[d] += 1
                t = torch.empty(sizes if kind == 2 else sizes[:d] + sizes[d + 1 :], dtype=t.dtype)
            else:
                return None
            call.arguments[name] = t
            return Fault((name, *blamed), (ValueError,))

        return [(name, lambda name=name: reshape(name)) for name in names]

    def shapes_of_one(self, call: Call, name: str) -> list[Any]:
        """Not one element."""

        def replace() -> Fault:
            shape = self.choice(((2,), (0,), (1, 3)))
            call.arguments[name] = torch.ones(shape, dtype=call.arguments[name].dtype)
            return Fault((name,), (ValueError,))

        return [(name, replace)]

    def scalar(
        self, call: Call, name: str, bad: Sequence[Any], kinds: tuple[type[Exception], ...] = (ValueError,)
    ) -> list[Any]:
        def replace() -> Fault:
            call.arguments[name] = self.choice(bad)
            return Fault((name,), kinds)

        def other_type() -> Fault:
            call.arguments[name] = self.choice(([1], object(), 1j))
            return Fault((name,), (RuntimeError, TypeError, ValueError))

        return [(name, replace), (name, replace), (name, other_type)]

    def overlap(self, call: Call, *pairs: tuple[str, str]) -> list[Any]:
        """A tensor that is written and another one in the same memory."""

        def lay(written: str, other: str) -> Fault | None:
            a, b = call.arguments[written], call.arguments[other]
            size, other_size = a.numel() * a.element_size(), b.numel() * b.element_size()
            if size == 0 or other_size == 0 or b.dtype == torch.bool:
                return None
            memory = torch.zeros(64 + size + other_size, dtype=torch.uint8)
            start = self.integer(0, (size - 1) // 8) * 8
            if start == 0 and (written, other) in call.replaces:
                return None
            call.arguments[written] = memory[:size].view(a.dtype).view(a.shape)
            call.arguments[other] = memory[start : start + other_size].view(b.dtype).view(b.shape)
            return Fault((written, other), (ValueError,), fake=False)

        return [(f"{written} {other}", lambda w=written, o=other: lay(w, o)) for written, other in pairs]

    def requires_grad(self, call: Call, *names: str) -> list[Any]:
        def require(name: str) -> Fault:
            # A tensor made in inference mode is none that autograd follows.
            with torch.inference_mode(False):
                call.arguments[name] = call.arguments[name].detach().clone().requires_grad_()
            call.grad = True
            return Fault((name, "gate"), (RuntimeError,))

        floats = [name for name in names if call.arguments[name] is not None]
        return [(name, lambda name=name: require(name)) for name in floats]


class Sized(Sampler):
    """Draws valid calls of the sizes that are given, of tensors that lie as torch lays them.

    Args:
        dtype: of what is drawn first; at turn 0 of all, later the others take turns.
        turn: which of the options is taken, and the digits of all that is so or not; 0, 1, 2 ... come to each form.
        seed: of the values.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, turn: int = 0, seed: int = 0) -> None:
        super().__init__(lambda low, high: low)
        self.size, self.turn, self.digits, self.seed = (rows, columns), turn, turn, seed
        self.dtypes = itertools.chain((dtype,), itertools.cycle(FLOAT_DTYPES if turn else (dtype,)))
        self.asked = False

    def choice(self, options: Sequence[T]) -> T:
        return options[self.turn % len(options)]

    def one_in(self, n: int) -> bool:
        self.digits, digit = divmod(self.digits, n)
        return digit == n - 1

    def dtype(self) -> torch.dtype:
        return next(self.dtypes)

    def leading(self, most: int = 4) -> tuple[int, ...]:
        return self.size[:1]

    def rows_of_any_number(self) -> tuple[int, ...]:
        return self.size[:1]

    def columns(self, options: Sequence[int] = COLUMNS) -> int:
        self.asked = True
        return self.size[1]

    def values(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.seed += 1
        return random_activations(*shape, dtype=dtype, seed=self.seed)

    def contiguous(self, t: Tensor) -> Tensor:
        return t

    def rows(self, t: Tensor, trailing: int = 1, *, writable: bool = False) -> Tensor:
        return t


Strategy = Callable[[Sampler], Call]
