"""8-bit weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qops import _layout
from qops._layout import STRIP_ROWS, group_count, strips_of
from qops.weights import gguf
from qops.weights.requirements import (
    dtype_name,
    group_size_from_scales,
    require_dtype,
    require_matrix,
    require_scale_dtype,
    require_tensor,
)
from qops.weights.rounding import round_to_nearest, scale_codes
from qops.weights.state import QuantizedWeight

if TYPE_CHECKING:
    from typing_extensions import Self


class Int8Weight(QuantizedWeight):
    """An 8-bit weight ``w [N, K] = s * q``, q int8, with a scale ``s`` for each row and group of G columns.

    Canonical tensors: ``qweight`` int8 ``[N, K]``, ``scales [N, K/G]``.
    Packed tensors, with S = ceil(N / 16) strips: ``packed`` int8 ``[S, 16 K]``, ``scales [S, K/G, 16]``. Rows past N
    fill the last strip with zeros.

    The constructor makes a weight of zeros to load a state into, as that of :class:`Int4Weight` does.

    Args:
        in_features: K, a multiple of 8.
        out_features: N, a multiple of 8.
        group_size: G, a multiple of 16 that divides K; -1 (or K) for one group per row.
        scale_dtype: float16, bfloat16 or float32; no cast of a module ever changes it.
        mixed_gate_up: whether the strips mix gate and up, as :meth:`mix_gate_up` says.
        device: where the buffers live; on ``"meta"`` a state loads with ``assign=True``.

    Raises:
        ValueError: sizes or group size do not fit.
        RuntimeError: a scale dtype that no kernel reads.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int = -1,
        *,
        scale_dtype: torch.dtype,
        mixed_gate_up: bool = False,
        device: torch.device | str | None = None,
    ):
        self._configure(in_features, out_features, group_size, scale_dtype, mixed_gate_up)
        self._hold_placeholder(device)

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight: Tensor, group_size: int = -1, scale_dtype: torch.dtype = torch.float32) -> Self:
        """Rounds a weight to the nearest codes: ``s = R(max|w| / 127)``, ``q = clamp(rne(w / s), -127, 127)``.

        Per group, with R() the rounding to float32 and then to the scale dtype, and rne() rounding half to even.

        Args:
            weight: float16, bfloat16, float32 or float64 ``[N, K]``.
            group_size: G, as in the class.
            scale_dtype: of the scales.

        Returns:
            A packed weight.

        Numerics:
            As in :meth:`Int4Weight.quantize`; no positive value is clamped below the group's largest.

        Raises:
            ValueError: sizes or group size do not fit; a weight is NaN or infinite, or on the meta device; a scale
                overflows its dtype.
            RuntimeError: a dtype that is not supported.
            TypeError: something else than a tensor, an integer or a boolean.

        Source:
            Per-channel weights of compressed-tensors and torchao with the range -127 ... 127.
        """
        name = f"{cls._name()}.quantize"
        require_scale_dtype(name, scale_dtype)
        qweight, scales, _ = round_to_nearest(
            name,
            weight,
            group_size,
            scale_dtype,
            lambda codes: codes.to(torch.int8),
            steps=254,
            low=-127,
            high=127,
            zero=0,
        )
        return cls.from_canonical(qweight, scales)

    @classmethod
    @torch.no_grad()
    def from_canonical(cls, qweight: Tensor, scales: Tensor, *, pack: bool = True) -> Self:
        """A weight from its canonical tensors, whose shapes tell N, K and G.

        Args:
            qweight: int8 ``[N, K]``.
            scales: float16, bfloat16 or float32 ``[N, K/G]``; or ``[]``, one for the whole weight, which each row then
                repeats.
            pack: False leaves the weight canonical; it may then share memory with the arguments.

        Returns:
            A weight that holds exactly these numbers.

        Raises:
            ValueError: shapes or group size do not fit; NaN or infinity in scales.
            RuntimeError: dtypes, or tensors on different devices.
            TypeError: something else than a tensor.
        """
        name = cls._name()
        require_tensor(name, "scales", scales)
        require_matrix(name, "qweight", qweight)
        require_dtype(name, "qweight", qweight, torch.int8)
        require_scale_dtype(name, scales.dtype)
        if scales.dim() == 0:
            scales = scales.expand(qweight.shape[0], min(qweight.shape[1], 1))
        require_matrix(name, "scales", scales)
        config = {
            "in_features": qweight.shape[1],
            "group_size": group_size_from_scales(name, qweight.shape[1], scales),
            "scale_dtype": scales.dtype,
        }
        return cls._from_tensors({"qweight": qweight.detach(), "scales": scales.detach()}, config, pack)

    @classmethod
    def _from_state(cls, tensors: Mapping[str, Tensor], kind: str = "") -> Self:
        given = dict(tensors)
        weight = cls.from_canonical(given.pop("qweight"), given.pop("scales"), pack=False)
        if kind or given:
            raise ValueError(f"{cls._name()}: the state has no {', '.join((*([kind] if kind else ()), *given))}")
        return weight

    @classmethod
    def from_gguf(cls, blocks: Tensor, qtype: str = "Q8_0", *, pack: bool = True) -> Self:
        """A weight from GGUF blocks; nothing is rounded.

        Args:
            blocks: uint8 ``[N, bytes per row]``, as stored in the file.
            qtype: "Q8_0".
            pack: as in :meth:`from_canonical`.

        Returns:
            A weight in groups of 32 with float16 scales.

        Raises:
            ValueError: another type, or blocks that do not fill rows of it.
        """
        return cls.from_canonical(**gguf.int8_tensors(f"{cls._name()}.from_gguf", blocks, qtype), pack=pack)

    @torch.no_grad()
    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Looks up rows, as an embedding does: ``dequantize(dtype)[ids]`` without the other rows.

        Args:
            ids: int32 or int64 ``[...]``, in 0 ... N-1.
            dtype: of the result.

        Returns:
            ``[..., K]``, bit for bit the rows of :meth:`dequantize`.

        Raises:
            IndexError: an id out of range (on a GPU the indexing kernel asserts).
            RuntimeError: ``ids`` are not int32 or int64.
        """
        if ids.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"{self._name()}.rows: ids must have dtype int32 or int64, got {dtype_name(ids.dtype)}")
        if self.is_packed:
            self._name_layout()
        n, k, strips = self.out_features, self.in_features, strips_of(self.out_features)
        ids = ids.long()
        inside, row = (ids >= 0) & (ids < n), ids
        if self.is_packed and self.mixed_gate_up:
            half = max(n // 2, 1)
            row = ids % half // 8 * STRIP_ROWS + ids // half * 8 + ids % 8
        # An id out of range, the padding rows' too, becomes a strip that does not exist, so that indexing itself
        # refuses it: no look at the values, which would break the graph or wait for a GPU.
        strip = torch.where(inside, row // STRIP_ROWS, strips)
        lane = row % STRIP_ROWS
        if self.is_packed and _layout.has_gpu_layout(self.device):
            # A row is four lanes of one half of their registers: blocks of 32 columns, four columns of each lane.
            words = self.packed.view(strips, -1, STRIP_ROWS // 2, 4, 2, 2, 4)[strip, :, lane % 8, :, :, lane // 8]
            qweight = words.transpose(-3, -2).flatten(-4)[..., :k]
            scales = self.scales[strip, :, lane]
        elif self.is_packed:
            qweight = self.packed.view(strips, k // 4, STRIP_ROWS, 4)[strip, :, lane]
            scales = self.scales[strip, :, lane]
        else:
            row = torch.where(inside, ids, n)
            qweight, scales = self.qweight[row], self.scales[row]
        return scale_codes(qweight.reshape(*ids.shape, k), scales, self.group_size).to(dtype)

    def _canonical_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = self.out_features, self.in_features
        per_group = (n, group_count(k, self.group_size))
        return {"qweight": ((n, k), torch.int8), "scales": (per_group, self.scale_dtype)}

    @staticmethod
    def _pack_codes(qweight: Tensor) -> Tensor:
        return torch.ops.qops.int8_pack.default(qweight)

    @staticmethod
    def _unpack_codes(packed: Tensor, rows: int) -> Tensor:
        return torch.ops.qops.int8_unpack.default(packed, rows)

    def _dequantize_rows(self, rows: Mapping[str, Tensor]) -> Tensor:
        return scale_codes(rows["qweight"], rows["scales"], self.group_size)
