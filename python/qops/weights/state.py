"""What Int4Weight and Int8Weight share: the two forms of a weight, its state, its moves between devices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qops import _layout
from qops._layout import (
    LEVELS_DTYPE,
    STRIP_ROWS,
    chunk_rows,
    into_strips,
    layout_of,
    levels_into_strips,
    levels_out_of_strips,
    out_of_strips,
    strips_of,
)
from qops.weights.requirements import (
    dtype_name,
    moved,
    require_int,
)
from qops.weights.spec import FLOAT_ZERO_KINDS, WeightSpec, wide

if TYPE_CHECKING:
    from typing_extensions import Self

_OPTIONAL_BUFFERS = ("zeros", "perm")


class QuantizedWeight(WeightSpec):
    """State handling that Int4Weight and Int8Weight share; a subclass says what its codes look like."""

    FORMAT_VERSION = 1
    """Version of the state; a state of another one is refused."""
    qweight: Tensor
    packed: Tensor
    _layout: str
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None

    # What a subclass defines -----------------------------------------------------------------------------------------

    @classmethod
    def from_canonical(cls, *args: Any, **more: Any) -> Self:
        """A weight from its canonical tensors."""
        raise NotImplementedError

    def _dequantize_rows(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Canonical tensors of some rows -> their weights, float32 [rows, K], columns in stored order."""
        raise NotImplementedError

    @staticmethod
    def _pack_codes(qweight: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def _unpack_codes(packed: Tensor, rows: int) -> Tensor:
        """Columns of padding, where the layout has them, included."""
        raise NotImplementedError

    @staticmethod
    def _pairs_rows(device: torch.device) -> bool:
        """Whether the scales of rows r and r + 8 of a strip stand side by side there."""
        return False

    # Form ------------------------------------------------------------------------------------------------------------

    @property
    def is_packed(self) -> bool:
        """Whether the weight is in the packed form, which the operators read."""
        return "packed" in self._buffers

    @property
    def is_offloaded(self) -> bool:
        """Whether accelerate holds the tensors; the module that computes with them fetches them for its forward."""
        return not self._tensors()

    @property
    def device(self) -> torch.device:
        """Where the tensors live: "meta" where they are offloaded."""
        return torch.device("meta") if self.is_offloaded else self.scales.device

    @torch.no_grad()
    def pack(self) -> Self:
        """Replaces the canonical tensors by the packed ones; a packed weight stays as it is.

        Not while another thread reads the weight: the tensors it reads go.

        Raises:
            RuntimeError: this build has no kernels for the weight's device.
        """
        tensors = self._tensors()
        if tensors and "packed" not in tensors:
            self._hold(self._packed_from(tensors))
        return self

    def _drop(self) -> None:
        """Forgets the tensors, for an owner that has them elsewhere and loads them as a state."""
        self._hold({})

    def _settle(self) -> None:
        """Packs anew what was moved to another type of device tensor by tensor, and so is in the layout of the old."""
        tensors = self._tensors()
        if "packed" in tensors and tensors["packed"].device.type not in (self._layout, "meta"):
            device = tensors["packed"].device
            self._hold({key: tensor.to(self._layout) for key, tensor in tensors.items()})
            self.to(device)

    @torch.no_grad()
    def unpack(self) -> Self:
        """Replaces the packed tensors by the canonical ones, bit for bit what was packed; inverse of :meth:`pack`."""
        if self.is_packed:
            self._hold(self.canonical())
        return self

    @torch.no_grad()
    def mix_gate_up(self) -> Self:
        """Makes the weight one for the matrix products with ``silu_mul=True``, in place.

        Its first N/2 rows are gate, the others up. Packed strips then take 8 rows of each, so that a kernel holds both
        at once; the canonical tensors, and with them state_dict, stay as they are. For a moment there are two copies.

        Returns:
            The weight itself; as it was where it was one already.

        Raises:
            ValueError: N is no multiple of 16.
        """
        if not self.mixed_gate_up:
            self._require_gate_up(self.out_features)
            packed, canonical = self.is_packed, self.canonical()
            self.mixed_gate_up = True
            self._hold(self._packed_from(canonical) if packed else canonical)
        return self

    @torch.no_grad()
    def canonical(self) -> dict[str, Tensor]:
        """The canonical tensors by name: unpacked for the caller, or the weight's own where it is canonical.

        Shapes and dtypes stand in the docstring of the class.
        """
        if self.is_offloaded:  # what accelerate leaves of any tensor that it offloads
            spec = self._canonical_spec().items()
            return {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in spec}
        rows, perm = self._rows(0, self.out_features), self.perm
        order = self._row_order(self.device) if self.is_packed else None
        if order is not None:
            rows = {key: torch.empty_like(tensor).index_copy_(0, order, tensor) for key, tensor in rows.items()}
        if perm is not None:
            rows["perm"] = perm.clone() if self.is_packed else perm
        return rows

    def _require_packed(self) -> None:
        """What every forward calls: packing there would copy the weight inside a compiled or captured region."""
        if not self.is_packed:
            self._require_tensors()
            raise RuntimeError(f"{self._name()}: the weight is not packed; call .pack() before the forward")
        self._name_layout()

    def _require_tensors(self) -> None:
        if self.is_offloaded:
            raise RuntimeError(f"{self._name()}: the weight is offloaded, and only there while its linear runs")

    def _name_layout(self) -> None:
        """Has an exported model refuse to run where its constants, the packed tensors, would be read another way."""
        if torch.compiler.is_exporting():
            torch.ops.qops.check_layout.default(self.packed, layout_of(self.device))

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The exact weights ``[N, K]``, in the original order of columns.

        Args:
            dtype: float32, or another floating-point dtype.

        Returns:
            ``[N, K]``, dense, a copy.

        Numerics:
            The real-number value of each stored weight is rounded once to float32, to nearest even, and once more when
            another dtype is asked for: a producer's float16 reference is ``dequantize(torch.float16)``.

        Raises:
            RuntimeError: ``dtype`` is no floating-point dtype.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise RuntimeError(f"{self._name()}.dequantize: dtype must be floating point, got {dtype_name(dtype)}")
        self._require_tensors()
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.device)
        columns = slice(None) if self.perm is None else self.perm.long()
        order = self._row_order(self.device) if self.is_packed else None
        step = chunk_rows(self.in_features)
        for start in range(0, self.out_features if self.in_features else 0, step):
            stop = min(start + step, self.out_features)
            weight[start:stop, columns] = self._dequantize_rows(wide(self._rows(start, stop))).to(dtype)
        return weight if order is None else torch.empty_like(weight).index_copy_(0, order, weight)

    @torch.no_grad()
    def widened(self) -> Self:
        """The same weight with scales, and offsets, of one level: float32 holds those of two exactly.

        Every operator computes the same bits with it; it takes more memory.

        Returns:
            A weight packed where this one is; it may share memory with this one where that is canonical, and is this
            one where it has one level.
        """
        if not self.has_levels:
            return self
        config = {**self._config(), "scale_dtype": torch.float32, "zero_dtype": torch.float32}
        return self._from_tensors(wide(self.canonical()), config, self.is_packed)

    @classmethod
    @torch.no_grad()
    def cat(cls, weights: Sequence[Self]) -> Self:
        """One packed weight with the rows of all, in order (merged q/k/v or gate/up); inverse of :meth:`split`.

        Args:
            weights: at least one, of any form; they stay as they are.

        Returns:
            A packed weight whose N is the sum of theirs.

        Raises:
            ValueError: there is none; they differ in K, group size, kind, scale dtype, device or ``perm``.
        """
        if not weights:
            raise ValueError(f"{cls._name()}.cat: needs at least one weight")
        first, parts = weights[0], [weight.canonical() for weight in weights]
        for weight in weights[1:]:
            if not first._is_configured_like(weight):
                raise ValueError(f"{cls._name()}.cat: weights must be alike, got ({first}) and ({weight})")
            if not first.is_like(weight):
                raise ValueError(f"{cls._name()}.cat: weights must share one perm")
        rows = {
            key: tensor if key == "perm" else torch.cat([part[key] for part in parts])
            for key, tensor in parts[0].items()
        }
        return cls._from_tensors(rows, first._config_of_rows(), pack=True)

    def is_like(self, other: QuantizedWeight) -> bool:
        """Whether :meth:`cat` takes both: all is the same but N and the numbers.

        Args:
            other: any.

        Returns:
            False also where columns are stored in different orders.
        """
        if not self._is_configured_like(other):
            return False
        return self.perm is None or (other.perm is not None and torch.equal(self.perm, other.perm))

    def _is_configured_like(self, other: QuantizedWeight) -> bool:
        same_class = type(self) is type(other)
        return same_class and self._config() == other._config() and self.device == other.device

    @torch.no_grad()
    def split(self, sizes: Sequence[int]) -> list[Self]:
        """Canonical weights of ``sizes`` consecutive rows each, with memory of their own; inverse of :meth:`cat`.

        Args:
            sizes: rows of each part, multiples of 8 that add up to N.

        Returns:
            One weight per size, not packed.

        Raises:
            ValueError: a size is no multiple of 8, or they do not add up to N.
        """
        sizes = [require_int(f"{self._name()}.split", "sizes", size) for size in sizes]
        if sum(sizes) != self.out_features or min(sizes, default=0) < 0:
            raise ValueError(f"{self._name()}.split: sizes must add up to N = {self.out_features}, got {list(sizes)}")
        whole, parts, start = self.canonical(), [], 0
        for size in sizes:
            rows = {k: (t if k == "perm" else t[start : start + size]).clone() for k, t in whole.items()}
            parts.append(self._from_tensors(rows, self._config_of_rows(), pack=False))
            start += size
        return parts

    @torch.no_grad()
    def with_rows(self, order: Tensor) -> Self:
        """A weight with the rows of this one in another order, for whom its outputs are wanted in that order.

        Args:
            order: int64 ``[N]``; row i of the result is row ``order[i]`` of this weight.

        Returns:
            A weight with memory of its own, packed where this one is.
        """
        rows = {key: tensor if key == "perm" else tensor[order] for key, tensor in self.canonical().items()}
        return self._from_tensors(rows, self._config_of_rows(), pack=self.is_packed)

    @torch.no_grad()
    def in_stored_order(self) -> Self:
        """A weight without ``perm`` whose columns are the stored ones, for an x that comes in their order.

        Returns:
            A weight packed where this one is; it may share memory with this one where that is canonical.
        """
        tensors = self.canonical()
        tensors.pop("perm", None)
        return self._from_tensors(tensors, {**self._config_of_rows(), "act_order": False}, self.is_packed)

    @torch.no_grad()
    def in_act_order(self, perm: Tensor) -> Self:
        """A weight that gathers an x of which the columns of this one are `x[perm]`; inverse of `in_stored_order`.

        Args:
            perm: int32 ``[K]``, as in ``from_canonical``.

        Returns:
            A weight packed where this one is; it may share memory with this one where that is canonical.
        """
        tensors = {**self.canonical(), "perm": perm}
        return self._from_tensors(tensors, {**self._config_of_rows(), "act_order": True}, self.is_packed)

    def extra_repr(self) -> str:
        form = "packed" if self.is_packed else "offloaded" if self.is_offloaded else "canonical"
        config = ", ".join(f"{key}={value}" for key, value in self._config().items())
        return f"out_features={self.out_features}, {config}, device={self.device}, {form}"

    # Buffers ---------------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in self._buffers.items() if tensor is not None}

    def _hold(self, tensors: Mapping[str, Tensor]) -> None:
        # One assignment: a thread that packs what another thread packed already sees one form or the other, whole.
        self._buffers = {**tensors, **{key: None for key in _OPTIONAL_BUFFERS if key not in tensors}}
        # state_dict holds other tensors under other names, so torch.export must take these for constants.
        self._non_persistent_buffers_set = set(self._buffers)
        self._layout = tensors["packed"].device.type if "packed" in tensors else ""

    def _packed_from(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device = tensors["qweight"].device
        if _layout.has_gpu_layout(device) and self.has_levels:
            tensors = wide(tensors)  # what its kernels read
            self._set_dtypes(torch.float32, torch.float32)
        if (order := self._row_order(device)) is not None:
            tensors = {
                key: tensor if key == "perm" else tensor.index_select(0, order) for key, tensor in tensors.items()
            }
        try:
            packed = {"packed": self._pack_codes(tensors["qweight"].contiguous())}
        except NotImplementedError as error:
            raise RuntimeError(f"{self._name()}: this build of qops has no kernels for device {device.type}") from error
        for key in ("scales", "zeros"):
            if key in tensors:
                levels = self.has_levels
                packed[key] = (
                    levels_into_strips(tensors[key]) if levels else into_strips(tensors[key], self._pairs_rows(device))
                )
        if _layout.has_gpu_layout(device) and self.kind in FLOAT_ZERO_KINDS:
            packed["zeros"] = packed["zeros"].float()  # what its kernels read
        if "perm" in tensors:
            packed["perm"] = tensors["perm"].clone()
        return packed

    def _rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Canonical tensors of the held rows start ... stop, without ``perm``; start is a multiple of 16."""
        tensors, rows = self._tensors(), {}
        strips = slice(start // STRIP_ROWS, strips_of(stop))
        if "packed" in tensors:
            (_, columns), _ = self._canonical_spec()["qweight"]
            rows["qweight"] = self._unpack_codes(tensors["packed"][strips], stop - start)[:, :columns].contiguous()
        else:
            rows["qweight"] = tensors["qweight"][start:stop]
        for key in ("scales", "zeros"):
            if key in tensors:
                whole = tensors[key]
                if "packed" not in tensors:
                    rows[key] = whole[start:stop]
                elif self.has_levels:
                    rows[key] = levels_out_of_strips(whole[strips], stop - start)
                else:
                    rows[key] = out_of_strips(whole[strips], stop - start, self._pairs_rows(self.device))
        if self.kind in FLOAT_ZERO_KINDS:
            rows["zeros"] = rows["zeros"].to(self.zero_dtype)
        return rows

    @classmethod
    def _from_state(cls, tensors: Mapping[str, Tensor], kind: str, **more: Any) -> Self:
        """A weight from the tensors of its state_dict, its ``format_version`` left out.

        Args:
            tensors: canonical ones, under the names that a state_dict gives them.
            kind: :attr:`kind` of the weight.
            more: of ``from_canonical``.

        Returns:
            A canonical weight; it may share memory with the tensors.

        Raises:
            ValueError: tensors are missing or left over, or as in ``from_canonical``.
            RuntimeError, TypeError: as there.
        """
        cls._require_kind(kind)
        zeros = {"symmetric": None, "offset": "offsets"}.get(kind, "zeros")
        given = dict(tensors)
        weight = cls.from_canonical(
            given.pop("qweight"),
            given.pop("scales"),
            kind=kind,
            zeros=given.pop(zeros, None) if zeros is not None else None,
            perm=given.pop("perm", None),
            pack=False,
            **more,
        )
        if given:
            raise ValueError(f"{cls._name()}: kind {kind!r} takes no {', '.join(given)}")
        return weight

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any], pack: bool) -> Self:
        """Where all classmethods end: checks canonical tensors and holds them."""
        weight = cls.__new__(cls)
        weight._configure(out_features=tensors["qweight"].shape[0], **config)
        weight._take(tensors, pack)
        return weight

    def _take(self, tensors: Mapping[str, Tensor], pack: bool) -> None:
        """Checks canonical tensors and holds them, float zeros in the dtype in which they come.

        Scales of two levels come as float32 from who packed them for a GPU, or from an older qops.
        """
        before = self.scale_dtype, self.zero_dtype
        try:
            if {before[0], tensors["scales"].dtype} == {LEVELS_DTYPE, torch.float32}:
                self._set_dtypes(tensors["scales"].dtype, torch.float32)
            self._check(tensors)
        except (RuntimeError, ValueError):
            self.scale_dtype, self.zero_dtype = before
            raise
        if self.kind in FLOAT_ZERO_KINDS:
            self.zero_dtype = tensors["zeros"].dtype
        self._hold(self._packed_from(tensors) if pack else {key: t.contiguous() for key, t in tensors.items()})

    def _hold_placeholder(self, device: torch.device | str | None) -> None:
        """Holds packed zeros, for load_state_dict to replace."""
        spec = self._canonical_spec()
        tensors = {key: torch.zeros(shape, dtype=dtype, device=device) for key, (shape, dtype) in spec.items()}
        if "perm" in tensors:
            tensors["perm"] = torch.arange(self.in_features, dtype=torch.int32, device=device)
        self._hold(self._packed_from(tensors))

    # Module state ----------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Only moves act: ``fn`` sees bytes, which ``.half()``, ``.bfloat16()`` and ``.to(dtype)`` leave alone.

        A layout belongs to a type of device; to another type the weight goes canonical, and is packed there.
        """
        target = fn(torch.empty(1, dtype=torch.uint8, device=self.device)).device
        repack = target.type != self.device.type
        tensors = {key: moved(tensor, fn) for key, tensor in (self.canonical() if repack else self._tensors()).items()}
        self._hold(self._packed_from(tensors) if repack else tensors)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for key, tensor in self.canonical().items():
            destination[prefix + self._state_key(key)] = tensor
        destination[prefix + "format_version"] = torch.tensor(self.FORMAT_VERSION, device="cpu")

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes canonical tensors and packs them. A state that fits only in part is an error, strict or not."""
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        spec = self._canonical_spec()
        found = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        wanted = [*map(self._state_key, spec), "format_version"]
        missing = [key for key in wanted if key not in found]
        unexpected = [key for key in found if key not in wanted]
        if strict:
            missing_keys += [prefix + key for key in missing]
            unexpected_keys += [prefix + key for key in unexpected]
        if len(missing) == len(spec) + 1:
            return
        try:
            structure = {"qweight", "scales", "zeros", "offsets", "perm"}.intersection(unexpected)
            if missing or structure:
                raise ValueError(
                    f"{self._name()}: this weight ({self.extra_repr()}) needs {wanted}, the state has {sorted(found)}"
                )
            _check_version(self, int(found["format_version"]))
            tensors = {key: found[self._state_key(key)].detach() for key in spec}
            if not local_metadata.get("assign_to_params_buffers", False):
                if self.device.type == "meta":
                    raise RuntimeError(f"{self._name()}: a weight on the meta device loads with assign=True only")
                tensors = {key: tensor.to(self.device) for key, tensor in tensors.items()}
            self._take(tensors, pack=True)
        except (RuntimeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'weight'}: {error}")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # How torch.multiprocessing sends a weight to another process. Through __getstate__ that would be canonical
        # tensors, which nobody holds: with the parent's copies go the file descriptors that the child is to inherit.
        ForkingPickler.register(cls, _shared)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {**dict.fromkeys(_OPTIONAL_BUFFERS), **self.canonical()}
        return {**state, "format_version": self.FORMAT_VERSION, "pack": self.is_packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        _check_version(self, state.pop("format_version"))
        pack = state.pop("pack")
        super().__setstate__(state)
        self._hold(self._tensors())
        if pack:
            self.pack()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Copies the form that is there. Through __getstate__, deepcopy's memo would keep the canonical tensors of every
        # layer of a model alive until the whole copy is done.
        copied = type(self).__new__(type(self))
        copied.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return copied


def _shared(weight: QuantizedWeight) -> tuple[Any, ...]:
    """For another process of this installation: the tensors that are there, packed or not, in memory that both see."""
    return _from_shared, (type(weight), weight.__dict__)


def _from_shared(cls: type[QuantizedWeight], state: dict[str, Any]) -> QuantizedWeight:
    weight = cls.__new__(cls)
    weight.__dict__.update(state)
    return weight


def _check_version(weight: QuantizedWeight, version: object) -> None:
    if version != weight.FORMAT_VERSION:
        raise ValueError(
            f"qops.{type(weight).__name__}: the state has format_version {version}, "
            f"this qops reads {weight.FORMAT_VERSION}"
        )
