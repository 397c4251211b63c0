"""What a weight is: sizes and kind, and the canonical tensors that these ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qops._layout import (
    LEVEL_GROUPS,
    LEVELS_DTYPE,
    SUPER_COLUMNS,
    group_count,
    halves_of_levels,
    levels_shape,
    widen_levels,
)
from qops.weights.noticed import Noticed
from qops.weights.requirements import (
    require_dtype,
    require_int,
    require_multiples_of_8,
    require_permutation,
    require_scale_dtype,
    require_tensor,
    resolve_group_size,
)

FLOAT_ZERO_KINDS = ("float_zero", "offset")


class WeightSpec(Noticed):
    """Everything about a weight but its numbers; a subclass says how codes are stored."""

    KINDS: tuple[str, ...]
    """How codes may become numbers."""
    _CODES_PER_ELEMENT: int
    _CODES_DTYPE: torch.dtype

    in_features: int
    """K."""
    out_features: int
    """N."""
    group_size: int
    """G, the columns that share a scale: K where there is one group per row."""
    scale_dtype: torch.dtype
    """float16, bfloat16 or float32; int8 where scales, and offsets, have two levels."""
    zero_dtype: torch.dtype = torch.float32
    """The same, of float zeros and offsets; float32 where the weight has none."""
    kind: str = "symmetric"
    """One of ``KINDS``."""
    act_order: bool = False
    """Whether stored columns are in another order than those of w, ``perm``."""
    mixed_gate_up: bool
    """Whether the packed strips mix the rows of gate and up; the canonical tensors never do."""

    def _configure(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        scale_dtype: torch.dtype,
        kind: str = "symmetric",
        act_order: bool = False,
        mixed_gate_up: bool = False,
        zero_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Everything but the buffers."""
        super().__init__()
        name = self._name()
        in_features = require_int(name, "in_features", in_features)
        out_features = require_int(name, "out_features", out_features)
        require_multiples_of_8(name, out_features, in_features)
        for dtype, label in ((scale_dtype, "scales"), (zero_dtype, "zeros")):
            if scale_dtype != LEVELS_DTYPE or dtype != LEVELS_DTYPE:
                require_scale_dtype(name, dtype, label)
        if mixed_gate_up:
            self._require_gate_up(out_features)
        self._require_kind(kind)
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = resolve_group_size(name, in_features, group_size)
        self.kind = kind
        self._set_dtypes(scale_dtype, zero_dtype)
        self.act_order = act_order
        self.mixed_gate_up = mixed_gate_up

    def _set_dtypes(self, scale_dtype: torch.dtype, zero_dtype: torch.dtype) -> None:
        """Of scales and float zeros; of two levels both or none."""
        if scale_dtype == LEVELS_DTYPE:
            self._require_levels()
            zero_dtype = LEVELS_DTYPE
        self.scale_dtype = scale_dtype
        self.zero_dtype = zero_dtype if self.kind in FLOAT_ZERO_KINDS else torch.float32

    @property
    def has_levels(self) -> bool:
        """Whether scales, and offsets, have two levels: a float16 of each 256 columns and a code of each group."""
        return self.scale_dtype == LEVELS_DTYPE

    def _config(self) -> dict[str, Any]:
        """Arguments of :meth:`_configure` for a weight like this one, out_features left out."""
        return {**self._config_of_rows(), "mixed_gate_up": self.mixed_gate_up}

    def _config_of_rows(self) -> dict[str, Any]:
        """The same for a weight of some rows of this one."""
        config = {
            "in_features": self.in_features,
            "group_size": self.group_size,
            "scale_dtype": self.scale_dtype,
            "kind": self.kind,
            "act_order": self.act_order,
        }
        return {**config, "zero_dtype": self.zero_dtype} if self.kind in FLOAT_ZERO_KINDS else config

    def _canonical_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of every canonical tensor."""
        n, k, g = self.out_features, self.in_features, self.group_size
        per_group = (n, *(levels_shape(k, g) if self.has_levels else (group_count(k, g),)))
        spec: dict[str, tuple[tuple[int, ...], torch.dtype]]
        spec = {
            "qweight": ((n, k // self._CODES_PER_ELEMENT), self._CODES_DTYPE),
            "scales": (per_group, self.scale_dtype),
        }
        if self.kind != "symmetric":
            spec["zeros"] = (per_group, torch.uint8 if self.kind == "zero_point" else self.zero_dtype)
        if self.act_order:
            spec["perm"] = ((k,), torch.int32)
        return spec

    def _state_key(self, name: str) -> str:
        """Key of a canonical tensor in a state_dict."""
        # Float zeros and offsets have one dtype and shape: only the name keeps one from being loaded as the other.
        return "offsets" if name == "zeros" and self.kind == "offset" else name

    def _row_order(self, device: torch.device) -> Tensor | None:
        """The canonical row of each packed row; None where they are the same."""
        if not self.mixed_gate_up:
            return None
        return torch.arange(self.out_features, device=device).view(2, -1, 8).transpose(0, 1).flatten()

    # Checks -----------------------------------------------------------------------------------------------------------

    @classmethod
    def _require_kind(cls, kind: str) -> None:
        if kind not in cls.KINDS:
            raise ValueError(f"{cls._name()}: kind must be one of {', '.join(cls.KINDS)}, got {kind!r}")

    @classmethod
    def _require_gate_up(cls, out_features: int) -> None:
        if out_features % 16:
            raise ValueError(f"{cls._name()}: N must be a multiple of 16, for gate and up, got {out_features}")

    @classmethod
    def _zeros_and_perm(cls, kind: str, zeros: Tensor | None, perm: Tensor | None) -> dict[str, Tensor]:
        """Those of the caller as canonical tensors, which are not looked at yet."""
        name, tensors = cls._name(), {}
        cls._require_kind(kind)
        if (zeros is None) != (kind == "symmetric"):
            raise ValueError(f"{name}: kind {kind!r} {'needs' if zeros is None else 'takes no'} zeros")
        if zeros is not None:
            require_tensor(name, "zeros", zeros)
            tensors["zeros"] = zeros.detach()
        if perm is not None:
            require_tensor(name, "perm", perm)
            perm = perm.detach()
            # Clamped: an index of more than 32 bits must not become one that fits.
            tensors["perm"] = perm.clamp(-1, 2**31 - 1).int() if perm.dtype == torch.int64 else perm
        return tensors

    def _require_levels(self) -> None:
        name, k, g = self._name(), self.in_features, self.group_size
        if k % SUPER_COLUMNS or g not in LEVEL_GROUPS:
            raise ValueError(
                f"{name}: int8 scales must be of groups of 16, 32, 64 or 128 and a K that is a multiple of 256, "
                f"got groups of {g} and K = {k}"
            )
        if self.kind not in ("symmetric", "offset"):
            raise ValueError(f"{name}: int8 scales must be of kind symmetric or offset, got {self.kind!r}")

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises unless these are canonical tensors of this weight; float zeros may have another dtype."""
        name, device = self._name(), tensors["qweight"].device
        for key, (shape, dtype) in self._canonical_spec().items():
            tensor = tensors[key]
            if tensor.device != device:
                raise RuntimeError(f"{name}: {key} must be on {device} like qweight, got {tensor.device}")
            if key == "zeros" and self.kind in FLOAT_ZERO_KINDS and not self.has_levels:
                require_scale_dtype(name, tensor.dtype, key)
            else:
                require_dtype(name, key, tensor, dtype)
            if tensor.shape != shape:
                raise ValueError(f"{name}: {key} must have shape {list(shape)}, got {list(tensor.shape)}")
            if tensor.is_meta:
                continue
            if dtype == LEVELS_DTYPE and key != "qweight":
                tensor = halves_of_levels(tensor)
            # The extremes tell, without a tensor of answers: NaN is among them.
            if tensor.is_floating_point() and tensor.numel() > 0 and not torch.stack(tensor.aminmax()).isfinite().all():
                raise ValueError(f"{name}: {key} must be finite, got NaN or infinity")
            if key == "zeros" and not tensor.is_floating_point() and (tensor > 16).any():
                raise ValueError(f"{name}: zeros must be in 0 ... 16, got {int(tensor.max())}")
            if key == "perm":
                require_permutation(name, tensor, self.group_size)

    @classmethod
    def _name(cls) -> str:
        return f"qops.{cls.__name__}"


def wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical tensors whose scales and offsets have one level: of two, float32 holds their products exactly."""
    has_levels = tensors["scales"].dtype == LEVELS_DTYPE
    return {key: widen_levels(t) if has_levels and key in ("scales", "zeros") else t for key, t in tensors.items()}
