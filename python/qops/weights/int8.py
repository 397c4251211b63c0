"""8-bit weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qops import _layout
from qops._layout import STRIP_ROWS, strips_of, widen_levels
from qops.ops._checks import FLOAT_DTYPES
from qops.weights.requirements import (
    dtype_name,
    group_size_from_scales,
    require_dtype,
    require_matrix,
    require_scale_dtype,
    require_scales,
    require_tensor,
)
from qops.weights.rounding import round_to_nearest, scale_codes
from qops.weights.state import QuantizedWeight

if TYPE_CHECKING:
    from typing_extensions import Self


class Int8Weight(QuantizedWeight):
    """An 8-bit weight ``w [N, K]`` in groups of G columns, with a scale ``s`` for each row and group.

    The exact weight of a code q in -128 ... 127 is, by ``kind``:

    * ``"symmetric"``:  ``w = s * q``
    * ``"offset"``:     ``w = s * q + o``, o a float

    Unsigned codes with zero points, s * (q - z) with q in 0 ... 255, are of kind ``"offset"`` with codes q - 128 where
    float32 holds s * (128 - z), as it does with float16 and bfloat16 scales.

    Canonical tensors: ``qweight`` int8 ``[N, K]``, ``scales [N, K/G]``, ``zeros [N, K/G]`` (the offsets, float16,
    bfloat16 or float32; none when symmetric), ``perm`` int32 ``[K]`` (act-order only: stored column j is column
    ``perm[j]`` of w).
    Packed tensors, with S = ceil(N / 16) strips: ``packed`` int8 ``[S, 16 K]``, ``scales`` and ``zeros [S, K/G, 16]``,
    ``perm``. Rows past N fill the last strip with zeros. On a GPU ``packed`` has room for K rounded up to a multiple of
    64; ``scales`` and ``zeros`` are as on a CPU. Scales and offsets may have two levels, as in :class:`Int4Weight`.

    :func:`qops.int8_weight_only_gemm` takes all of them, :func:`qops.int8_gemm` symmetric ones without a ``perm``.

    The constructor makes a weight of zeros to load a state into, as that of :class:`Int4Weight` does.

    Args:
        in_features: K, a multiple of 8.
        out_features: N, a multiple of 8.
        group_size: G, a multiple of 16 that divides K; -1 (or K) for one group per row.
        kind: one of ``KINDS``.
        scale_dtype: float16, bfloat16 or float32, or int8 for two levels; no cast of a module ever changes it.
        act_order: whether there is a ``perm``.
        mixed_gate_up: whether the strips mix gate and up, as :meth:`mix_gate_up` says.
        zero_dtype: the dtype of float zeros and offsets until a state is loaded, which may have another one.
        device: where the buffers live; on ``"meta"`` a state loads with ``assign=True``.

    Raises:
        ValueError: sizes, group size or kind do not fit.
        RuntimeError: a dtype of scales or zeros that no kernel reads.
    """

    KINDS = ("symmetric", "offset")
    """The kinds of zero point: "symmetric", "offset"."""
    _CODES_PER_ELEMENT = 1
    _CODES_DTYPE = torch.int8

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int = -1,
        kind: str = "symmetric",
        *,
        scale_dtype: torch.dtype,
        act_order: bool = False,
        mixed_gate_up: bool = False,
        zero_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        self._configure(in_features, out_features, group_size, scale_dtype, kind, act_order, mixed_gate_up, zero_dtype)
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
    def from_canonical(
        cls,
        qweight: Tensor,
        scales: Tensor,
        *,
        kind: str = "symmetric",
        zeros: Tensor | None = None,
        perm: Tensor | None = None,
        pack: bool = True,
    ) -> Self:
        """A weight from its canonical tensors, whose shapes tell N, K and G.

        Args:
            qweight: int8 ``[N, K]``; with ``perm``, columns in stored order.
            scales: float16, bfloat16 or float32 ``[N, K/G]``; or ``[]``, one for the whole weight, which each row then
                repeats; int8 ``[N, K/256, 2 + 256/G]`` of two levels.
            kind: one of ``KINDS``.
            zeros: float16, bfloat16 or float32 ``[N, K/G]``, the offsets; None for ``"symmetric"``. With scales of two
                levels offsets are, too.
            perm: int32 or int64 ``[K]``, a permutation of 0 ... K-1; stored column j is column ``perm[j]`` of w.
            pack: False leaves the weight canonical; it may then share memory with the arguments.

        Returns:
            A weight that holds exactly these numbers.

        Raises:
            ValueError: shapes, group size or kind do not fit; NaN or infinity in scales or zeros; ``perm`` is no
                permutation.
            RuntimeError: dtypes, or tensors on different devices.
            TypeError: something else than a tensor.
        """
        name = cls._name()
        require_tensor(name, "scales", scales)
        require_matrix(name, "qweight", qweight)
        require_dtype(name, "qweight", qweight, torch.int8)
        if scales.dim() == 0:
            scales = scales.expand(qweight.shape[0], min(qweight.shape[1], 1))
        require_scales(name, "scales", scales)
        tensors = {"qweight": qweight.detach(), "scales": scales.detach(), **cls._zeros_and_perm(kind, zeros, perm)}
        config = {
            "in_features": qweight.shape[1],
            "group_size": group_size_from_scales(name, qweight.shape[1], scales),
            "scale_dtype": scales.dtype,
            "kind": kind,
            "act_order": perm is not None,
        }
        return cls._from_tensors(tensors, config, pack)

    @classmethod
    def from_gptq(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor | None = None,
        *,
        zero_add: str | None = None,
        pack: bool = True,
    ) -> Int8Weight:
        """A weight from the tensors of an 8-bit GPTQ checkpoint: :func:`qops.formats.gptq.int8_weight`.

        Args:
            qweight: int32 ``[K/4, N]``.
            qzeros: int32 ``[K/G, N/4]``.
            scales: ``[K/G, N]``.
            g_idx: ``[K]``, in act-order.
            zero_add: "word" or "nibble" for version 1 of the format, "none" for version 2.
            pack: as in :meth:`from_canonical`.

        Returns:
            A weight that holds exactly these numbers.
        """
        from qops.formats import gptq

        return gptq.int8_weight(qweight, qzeros, scales, g_idx, zero_add=zero_add, pack=pack)

    @classmethod
    def from_compressed_tensors(
        cls,
        weight: Tensor,
        weight_scale: Tensor,
        weight_shape: Tensor | None = None,
        weight_zero_point: Tensor | None = None,
        weight_g_idx: Tensor | None = None,
        *,
        pack: bool = True,
    ) -> Int8Weight:
        """A weight from compressed-tensors: :func:`qops.formats.compressed_tensors.int8_weight`, which tells more.

        Args:
            weight: int8 ``[N, K]``, or int32 ``[N, K/4]``.
            weight_scale: ``[N, K/G]``, or one for the whole weight.
            weight_shape: ``[2]``, N and K.
            weight_zero_point: none when symmetric.
            weight_g_idx: ``[K]``, in act-order.
            pack: as in :meth:`from_canonical`.

        Returns:
            A weight that holds exactly these numbers.
        """
        from qops.formats import compressed_tensors

        return compressed_tensors.int8_weight(
            weight, weight_scale, weight_shape, weight_zero_point, weight_g_idx, pack=pack
        )

    @classmethod
    def from_torchao(cls, tensor: Tensor, *, pack: bool = True) -> Int8Weight:
        """A weight from an `Int8Tensor` of torchao: :func:`qops.formats.torchao.weight`, which tells more.

        Args:
            tensor: `linear.weight` after `torchao.quantization.quantize_`.
            pack: as in :meth:`from_canonical`.

        Returns:
            A weight with torchao's own bits.

        Raises:
            RuntimeError: a tensor of another class.
        """
        from qops.formats import torchao

        found = torchao.weight(tensor, pack=pack)
        if not isinstance(found, Int8Weight):
            raise RuntimeError(f"{cls._name()}.from_torchao: tensor must be of 8 bits, got {type(tensor).__name__}")
        return found

    @classmethod
    def from_gguf(cls, blocks: Tensor, qtype: str = "Q8_0", *, pack: bool = True) -> Int8Weight:
        """A weight from GGUF blocks: :func:`qops.formats.gguf.int8_weight`, which tells more.

        Args:
            blocks: uint8 ``[N, bytes per row]``, as stored in the file.
            qtype: "Q8_0", "Q5_0", "Q5_1", "Q5_K" or "Q6_K".
            pack: as in :meth:`from_canonical`.

        Returns:
            A weight that holds exactly the stored numbers.
        """
        from qops.formats import gguf

        return gguf.int8_weight(blocks, qtype, pack=pack)

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Looks up rows, as an embedding does: ``dequantize(dtype)[ids]`` without the other rows.

        Args:
            ids: int32 or int64 ``[...]``, in 0 ... N-1.
            dtype: of the result.

        Returns:
            ``[..., K]``, bit for bit the rows of :meth:`dequantize`.

        Raises:
            IndexError: an id out of range (on a GPU the indexing kernel asserts).
            TypeError: ``ids`` are no tensor.
            RuntimeError: ``ids`` are not int32 or int64.
        """
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
            name = f"{self._name()}.rows"
            require_tensor(name, "ids", ids)
            raise RuntimeError(f"{name}: ids must have dtype int32 or int64, got {dtype_name(ids.dtype)}")
        try:
            return self._rows_at(ids, dtype)
        except IndexError:
            wrong = ids[(ids < 0) | (ids >= self.out_features)].flatten()
            if wrong.numel() == 0:
                raise
            text = f"ids must lie in 0 ... N - 1, with N = {self.out_features} rows, got {wrong[0].item()}"
            raise IndexError(f"{self._name()}.rows: {text}") from None

    def _rows_at(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        # Module.__getattr__ would take 0.6 us for each of them.
        buffers = self._buffers
        packed, perm = buffers.get("packed"), buffers["perm"]
        if packed is not None:
            self._name_layout()
        if packed is None or _layout.has_gpu_layout(packed.device):
            found = self._rows_by_torch(ids.long())
        else:
            numbers, config = (buffers["scales"], buffers["zeros"]), (self.out_features, self.group_size)
            written = dtype if dtype in FLOAT_DTYPES else torch.float32
            args = (ids.contiguous(), packed, *numbers, *config, written, self.mixed_gate_up)
            found = torch.ops.qops.int8_embedding.default(*args)
        found = found if found.dtype == dtype else found.to(dtype)
        return found if perm is None else torch.empty_like(found).index_copy_(-1, perm.long(), found)

    @torch.no_grad()
    def _rows_by_torch(self, ids: Tensor) -> Tensor:
        """Of a weight that is not packed, or lies on a GPU; columns in stored order."""
        n, k, strips = self.out_features, self.in_features, strips_of(self.out_features)
        inside, row = (ids >= 0) & (ids < n), ids
        # An id out of range, the padding rows' too, becomes a row or strip that does not exist, so that indexing itself
        # refuses it: no look at the values, which would break the graph or wait for a GPU.
        if self.is_packed:
            if self.mixed_gate_up:
                half = max(n // 2, 1)
                row = ids % half // 8 * STRIP_ROWS + ids // half * 8 + ids % 8
            strip, lane = torch.where(inside, row // STRIP_ROWS, strips), row % STRIP_ROWS
            at: Any = (strip, slice(None), lane)
            # A row is four lanes of one half of their registers: blocks of 32 columns, four columns of each lane.
            words = self.packed.view(strips, -1, STRIP_ROWS // 2, 4, 2, 2, 4)[strip, :, lane % 8, :, :, lane // 8]
            qweight = words.transpose(-3, -2).flatten(-4)[..., :k]
        else:
            at = torch.where(inside, ids, n)
            qweight = self.qweight[at]
        scales, zeros = (None if t is None else self._numbers_at(t, at) for t in (self.scales, self.zeros))
        assert scales is not None
        return scale_codes(qweight.reshape(*ids.shape, k), scales, zeros, may_look=False)

    def _numbers_at(self, numbers: Tensor, at: Any) -> Tensor:
        """Scales or offsets of some rows, [..., K/G]; a GPU's are of one level."""
        return widen_levels(numbers[at]) if self.has_levels else numbers[at]

    @staticmethod
    def _pack_codes(qweight: Tensor) -> Tensor:
        return torch.ops.qops.int8_pack.default(qweight)

    @staticmethod
    def _unpack_codes(packed: Tensor, rows: int) -> Tensor:
        return torch.ops.qops.int8_unpack.default(packed, rows)

    def _dequantize_rows(self, rows: Mapping[str, Tensor]) -> Tensor:
        return scale_codes(rows["qweight"], rows["scales"], rows.get("zeros"))
