"""The cache in which block operators append: room behind the keys and values that a layer of Transformers' own holds.

Keys and values of a layer of the cache become the beginning of larger tensors, which take the next token without a
copy.

This module imports Transformers.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Positions that a cache gets room for at a time, at least; half of what it holds, if that is more.
_POSITIONS = 256
# Of layers of caches. Not in them: copies would have rooms that are not theirs.
_ROOMS: weakref.WeakKeyDictionary[Any, Room] = weakref.WeakKeyDictionary()
# Of caches, where all their layers have rooms.
STACKS: weakref.WeakKeyDictionary[Any, Stack] = weakref.WeakKeyDictionary()


class Growth(NamedTuple):
    """Keys and values that a layer of a cache is to get.

    Attributes:
        layer: of the cache.
        keys, values: that it has.
        room: with the new ones.
    """

    layer: Any
    keys: torch.Tensor
    values: torch.Tensor
    room: Room

    @property
    def holds(self) -> bool:
        """Whether the layer is as it was."""
        return self.layer.keys is self.keys and self.layer.values is self.values

    @property
    def is_in_place(self) -> bool:
        """Whether the room is that of the keys and values that the layer has, and no copy of them."""
        return self.room.last[0] is self.keys

    def take(self, x: torch.Tensor) -> None:
        """Those of x [B, T, H] are there."""
        self.room.take(self.layer, x.shape[1])


class Room:
    """Keys and values [B, Hkv, room, D] of a layer of a cache, of which it shows rows begin ... end - 1.

    Whoever else has made views of its own, or copies, is noticed by the views that the layer had at last: where it has
    them still, the rows behind are free.
    """

    __slots__ = (
        "all_keys",
        "all_values",
        "begin",
        "end",
        "first_position",
        "keys",
        "last",
        "offset",
        "size",
        "strides",
        "values",
    )

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, end: int) -> None:
        self.all_keys, self.all_values, self.begin, self.end = keys, values, 0, end
        self.size, self.strides, self.offset = (
            keys.shape[2],
            keys.stride(),
            (keys.storage_offset(), values.storage_offset()),
        )
        self.last: tuple[Any, Any] = (None, None)
        self.keys = self.values = keys  # until open() makes views
        self.first_position = 0

    def has_room(self, layer: Any, tokens: int) -> bool:
        """Whether these rows are the layer's, and so many more fit behind them."""
        is_its = self.last[0] is layer.keys and self.last[1] is layer.values
        return is_its and self.end + tokens <= self.size

    @property
    def written(self) -> int:
        """Counts writes."""
        return self.all_keys._version + self.all_values._version

    def open(self, layer: Any, tokens: int) -> Room:
        """Makes views with room for new tokens, which are the layer's after :meth:`take`."""
        rows = self.end + tokens - self.begin
        batch, heads, _, dim = self.all_keys.shape
        # Half of the time of narrow().
        where, begin = ((batch, heads, rows, dim), self.strides), self.begin * dim
        self.keys = self.all_keys.as_strided(*where, begin + self.offset[0])
        self.values = self.all_values.as_strided(*where, begin + self.offset[1])
        if type(layer) is DynamicSlidingWindowLayer:
            # A cache that Transformers has reset holds rows of zeros, and counts from 0.
            self.first_position = max(0, layer.cumulative_length - (rows - tokens))
        return self

    def take(self, layer: Any, tokens: int) -> None:
        """The new tokens are there."""
        keys, values, begin, end = self.keys, self.values, self.begin, self.end + tokens
        if type(layer) is DynamicSlidingWindowLayer:
            layer.cumulative_length += tokens
            dropped = end - begin - (layer.sliding_window - 1)
            if dropped > 0:
                begin += dropped
                keys, values = keys.narrow(2, dropped, end - begin), values.narrow(2, dropped, end - begin)
        layer.keys, layer.values = keys, values
        # Last what says that all this belongs together: who is interrupted before has a layer without room.
        self.begin, self.end = begin, end
        self.last = keys, values


class Stack:
    """Layers of a cache whose rooms are alike and fill in step, as those of a model without windows are.

    What :func:`layer_of` and :func:`room_for` ask of each layer is asked of all at once.

    Args:
        indices: of two layers or more.
        growths: of each, in place.
    """

    def __init__(self, indices: tuple[int, ...], growths: list[Growth]) -> None:
        self.indices, self.found = indices, operator.itemgetter(*indices)
        self.layers = tuple(growth.layer for growth in growths)
        self.rooms = [growth.room for growth in growths]
        self.states = [layer.__dict__ for layer in self.layers]
        self.sizes = list(map(len, self.states))
        self.keys = [room.keys for room in self.rooms]
        self.values = [room.values for room in self.rooms]
        self.end = self.keys[0].shape[2]

    @staticmethod
    def of_growths(indices: tuple[int, ...], growths: list[Growth]) -> Stack | None:
        """None where rooms differ."""
        if len(growths) < 2 or not all(type(growth.layer) is DynamicLayer for growth in growths):
            return None
        rooms = [growth.room for growth in growths]
        alike = {(room.begin, room.end, room.strides, room.all_keys.shape) for room in rooms}
        return Stack(indices, growths) if len(alike) == 1 else None

    def growths(self, indices: tuple[int, ...], cache: Any, tokens: int) -> list[Growth] | None:
        """Of these layers, with room for so many tokens more; None where anything is not as this has left it."""
        room, states, get = self.rooms[0], self.states, dict.get
        rows = self.end + tokens
        if self.indices != indices or rows > room.size or cache.offloading or "update" in cache.__dict__:
            return None
        # A layer of the cache that has got an attribute may do something else.
        is_theirs = len(cache.layers) > max(indices) and self.found(cache.layers) == self.layers
        is_theirs = is_theirs and set(map(type, self.layers)) == {DynamicLayer}
        if not is_theirs or list(map(len, states)) != self.sizes:
            return None
        for name, last in (("keys", self.keys), ("values", self.values)):
            if not all(map(operator.is_, map(get, states, itertools.repeat(name)), last)):
                return None
            if any(map(_REQUIRES_GRAD, last)):
                return None
        if not all(map(get, states, itertools.repeat("is_initialized"))):
            return None
        batch, heads, _, dim = room.all_keys.shape
        where = (batch, heads, rows, dim), room.strides
        keys = [room.all_keys.as_strided(*where, room.offset[0]) for room in self.rooms]
        values = [room.all_values.as_strided(*where, room.offset[1]) for room in self.rooms]
        growths = list(map(Growth, self.layers, self.keys, self.values, self.rooms))
        for room, k, v in zip(self.rooms, keys, values, strict=True):
            room.keys, room.values = k, v
        self.keys, self.values, self.end = keys, values, rows
        return growths


_REQUIRES_GRAD = operator.attrgetter("requires_grad")


def layer_of(cache: Any, index: int) -> Any:
    """A layer of a cache of which it is known how it grows, with keys and values; None of another."""
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer: Any = cache.layers[index]
    if "update" in cache.__dict__ or "update" in layer.__dict__:
        return None
    known = type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and not layer.record_past)
    return layer if known and layer.is_initialized and layer.keys is not None and layer.keys.dim() == 4 else None


def room_for(layer: Any, x: torch.Tensor, kv_heads: int, head_dim: int) -> Room | None:
    """Room in a layer of a cache for the tokens of x [B, T, H]; None where what it holds does not fit to them."""
    tokens, held = x.shape[1], layer.keys
    if held.requires_grad or layer.values.requires_grad:
        return None
    room = _ROOMS.get(layer)
    if room is not None and room.has_room(layer, tokens):
        return room.open(layer, tokens)
    rows = held.shape[2]
    shape = (x.shape[0], kv_heads, rows, head_dim)
    fits = held.shape == shape and layer.values.shape == shape and held.dtype == layer.values.dtype == x.dtype
    if not fits or held.device != x.device:
        return None
    sizes = (x.shape[0], kv_heads, rows + tokens + max(_POSITIONS, rows // 2), head_dim)
    with writes_counted():
        room = Room(_zeros(sizes, x), _zeros(sizes, x), rows)
        room.all_keys[:, :, :rows], room.all_values[:, :, :rows] = held, layer.values
    _ROOMS[layer] = room
    return room.open(layer, tokens)


def _zeros(sizes: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros, as who saves a view saves all of it, in memory of Python's own.

    torch aligns its own by posix_memalign, whose memory glibc before 2.38 does not find again once it is free: a server
    that answers many would grow by 10 KB a layer and answer without end.
    """
    align, size = 64, like.element_size() * math.prod(sizes)
    if size == 0:
        return like.new_zeros(sizes)
    memory = torch.frombuffer(bytearray(size + align), dtype=torch.uint8)
    begin = -memory.data_ptr() % align
    return memory[begin : begin + size].view(like.dtype).view(sizes)


def first_position(cache: Any, index: int, keys: torch.Tensor) -> int:
    """Of the first of the keys [B, Hkv, S, D] that a cache has given, new ones included."""
    layers = getattr(cache, "layers", None)
    if layers and type(layers[index]) is DynamicSlidingWindowLayer:
        return max(0, layers[index].cumulative_length - keys.shape[2])
    return 0


@contextlib.contextmanager
def writes_counted() -> Iterator[None]:
    """Tensors made within have a version, in inference mode too."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
