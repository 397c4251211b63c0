"""4-bit weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qops import _layout
from qops.ops._checks import INT4_KINDS
from qops.weights.requirements import (
    group_size_from_scales,
    require_dtype,
    require_int,
    require_matrix,
    require_scales,
    require_tensor,
)
from qops.weights.rounding import add_rounding_to_odd, round_to_nearest, store_nibbles
from qops.weights.state import QuantizedWeight

if TYPE_CHECKING:
    from typing_extensions import Self


class Int4Weight(QuantizedWeight):
    """A 4-bit weight ``w [N, K]`` in groups of G columns, with a scale ``s`` for each row and group.

    The exact weight of a code q in 0 ... 15 is, by ``kind``:

    * ``"symmetric"``:  ``w = s * (q - 8)``
    * ``"zero_point"``: ``w = s * (q - z)``, z in 0 ... 16
    * ``"float_zero"``: ``w = s * (q - z)``, z a float
    * ``"offset"``:     ``w = s * q + o``, o a float

    Canonical tensors: ``qweight`` uint8 ``[N, K/2]`` (even k in the low nibble), ``scales [N, K/G]``, ``zeros
    [N, K/G]`` (uint8 zero points, float zeros or offsets; none when symmetric), ``perm`` int32 ``[K]`` (act-order
    only: stored column j is column ``perm[j]`` of w, so each product gathers x first: on a GPU 4 K bytes of indices and
    a copy of x more, M * K elements read and written. In a :class:`qops.nn.MLP` the linears before do it when loaded).
    Packed tensors, with S = ceil(N / 16) strips: ``packed`` uint8 ``[S, 8 K]``, ``scales`` and ``zeros [S, K/G, 16]``,
    ``perm``. Rows past N fill the last strip with code 8 and scale 0. On a GPU ``packed`` has room for K rounded up to
    a multiple of 64, rows r and r + 8 of a strip have their scales, and zeros, side by side, and float zeros are
    float32. Float zeros and offsets are float16, bfloat16 or float32, as the weight was given them.

    Scales, and offsets, of two levels (GGUF's K-quants; symmetric weights or offsets, K a multiple of 256, G = 16, 32,
    64 or 128) are an exact product ``s = d * c``, one float16 d for 256 columns and an int8 c for each group. Both are
    then int8: canonical ``[N, K/256, 2 + 256/G]``, the two bytes of d and the c of its groups; packed
    ``[S, K/256, 2 + 256/G, 16]``, the d of the 16 rows in the first two of their rows. CPU kernels multiply as they
    read, with the bits of :meth:`widened`; packing for a GPU widens for good.

    The constructor makes a weight of zeros to load a state into; weights come from :meth:`quantize`,
    :meth:`from_canonical` and the readers of checkpoint formats.

    Args:
        in_features: K, a multiple of 8.
        out_features: N, a multiple of 8.
        group_size: G, a multiple of 16 that divides K; -1 (or K) for one group per row.
        kind: one of ``KINDS``.
        scale_dtype: float16, bfloat16 or float32, or int8 for two levels; no cast of a module ever changes it. A state
            may have float32 in place of two levels, or these in place of float32.
        act_order: whether there is a ``perm``.
        mixed_gate_up: whether the strips mix gate and up, as :meth:`mix_gate_up` says.
        zero_dtype: the dtype of float zeros and offsets until a state is loaded, which may have another one.
        device: where the buffers live; on ``"meta"`` a state loads with ``assign=True``.

    Raises:
        ValueError: sizes, group size or kind do not fit.
        RuntimeError: a dtype of scales or zeros that no kernel reads.
    """

    KINDS = INT4_KINDS
    """The kinds of zero point: "symmetric", "zero_point", "float_zero", "offset"."""
    _CODES_PER_ELEMENT = 2
    _CODES_DTYPE = torch.uint8

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int = 128,
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
    def quantize(
        cls,
        weight: Tensor,
        group_size: int = 128,
        symmetric: bool = True,
        scale_dtype: torch.dtype | None = None,
    ) -> Self:
        """Rounds a weight to the nearest codes, with scales from the range of each group (no calibration).

        With R() the rounding to float32 and then to the scale dtype, and rne() rounding half to even, per group:

        * symmetric: ``s = R(max|w| / 7.5)``, ``q = clamp(rne(w / s) + 8, 0, 15)``;
        * asymmetric: ``lo = min(w, 0)``, ``hi = max(w, 0)``, ``s = R((hi - lo) / 15)``,
          ``z = clamp(rne(-lo / s), 0, 15)``, ``q = clamp(rne(w / s) + z, 0, 15)``.

        Args:
            weight: float16, bfloat16, float32 or float64 ``[N, K]``.
            group_size: G, as in the class.
            symmetric: kind ``"symmetric"``, else ``"zero_point"``.
            scale_dtype: default the dtype of ``weight``, float32 where that is float64.

        Returns:
            A packed weight.

        Numerics:
            Quotients are float64 and of the rounded scale: the codes are the nearest to w for the scale that is
            stored, with an error of at most s / 2 where no clamp acts. A symmetric group's largest value, when it is
            positive, is clamped from 7.5 steps to 7. A group whose scale rounds to 0, as an all-zero group's does,
            gives exact zeros.

        Raises:
            ValueError: sizes or group size do not fit; a weight is NaN or infinite, or on the meta device; a scale
                overflows its dtype.
            RuntimeError: a dtype that is not supported.
            TypeError: something else than a tensor, an integer or a boolean.

        Source:
            Scales and ranges of compressed-tensors (llm-compressor), 4-bit integers.
        """
        name = f"{cls._name()}.quantize"
        if not isinstance(symmetric, bool):
            raise TypeError(f"{name}: symmetric must be True or False, got {symmetric!r}")
        qweight, scales, zeros = round_to_nearest(
            name,
            weight,
            group_size,
            scale_dtype,
            store_nibbles,
            steps=15,
            low=0,
            high=15,
            zero=8 if symmetric else None,
        )
        in_features = weight.shape[1]
        if symmetric:
            return cls.from_canonical(qweight, scales, kind="symmetric", in_features=in_features)
        return cls.from_canonical(qweight, scales, kind="zero_point", zeros=zeros, in_features=in_features)

    @classmethod
    @torch.no_grad()
    def from_canonical(
        cls,
        qweight: Tensor,
        scales: Tensor,
        *,
        kind: str,
        zeros: Tensor | None = None,
        perm: Tensor | None = None,
        in_features: int | None = None,
        pack: bool = True,
    ) -> Self:
        """A weight from its canonical tensors, whose shapes tell N, K and G.

        Unpacked codes ``[N, K]``, one in a byte, look like packed ones of twice as many columns. ``in_features`` and
        ``perm`` tell K; without either, codes of which every byte is below 16 are refused.

        Args:
            qweight: uint8 ``[N, K/2]``, even k in the low nibble; with ``perm``, columns in stored order.
            scales: float16, bfloat16 or float32 ``[N, K/G]``; int8 ``[N, K/256, 2 + 256/G]`` of two levels.
            kind: one of ``KINDS``.
            zeros: ``[N, K/G]``, uint8 0 ... 16 for ``"zero_point"``; float16, bfloat16 or float32 for
                ``"float_zero"`` and ``"offset"``; None for ``"symmetric"``. With scales of two levels offsets are, too.
            perm: int32 or int64 ``[K]``, a permutation of 0 ... K-1; stored column j is column ``perm[j]`` of w.
            in_features: K, which says that ``qweight`` holds two codes in a byte.
            pack: False leaves the weight canonical; it may then share memory with the arguments.

        Returns:
            A weight that holds exactly these numbers.

        Raises:
            ValueError: shapes, group size or kind do not fit; the codes are, or may be, one in a byte; NaN or infinity
                in scales or zeros; a zero point above 16; ``perm`` is no permutation.
            RuntimeError: dtypes, or tensors on different devices.
            TypeError: something else than a tensor.
        """
        name = cls._name()
        require_tensor(name, "qweight", qweight)
        require_tensor(name, "scales", scales)
        require_dtype(name, "qweight", qweight, torch.uint8)
        require_matrix(name, "qweight", qweight)
        require_scales(name, "scales", scales)
        tensors = {"qweight": qweight.detach(), "scales": scales.detach(), **cls._zeros_and_perm(kind, zeros, perm)}
        stored, columns = qweight.shape[1], 2 * qweight.shape[1]
        if in_features is not None:
            columns = require_int(name, "in_features", in_features)
        elif perm is not None and perm.numel() == stored:
            columns = stored
        elif perm is None and not qweight.is_meta and qweight.numel() > 0 and int(qweight.max()) < 16:
            raise ValueError(
                f"{name}: qweight must have two codes in each byte, [N, K/2], got {list(qweight.shape)} with every "
                f"byte below 16, as unpacked codes [N, K] are; if they are packed, in_features={columns} says so"
            )
        if 2 * stored != columns:
            source = "perm has" if in_features is None else "in_features is"
            raise ValueError(
                f"{name}: qweight must have shape [N, K/2] = {[qweight.shape[0], columns // 2]}, two codes in a byte, "
                f"where {source} K = {columns}, got {list(qweight.shape)}"
            )
        config = {
            "in_features": columns,
            "group_size": group_size_from_scales(name, columns, scales),
            "scale_dtype": scales.dtype,
            "kind": kind,
            "act_order": perm is not None,
        }
        return cls._from_tensors(tensors, config, pack)

    @classmethod
    def _from_state(cls, tensors: Mapping[str, Tensor], kind: str, **more: Any) -> Self:
        columns = 2 * tensors["qweight"].shape[-1:].numel()  # a state holds packed codes
        return super()._from_state(tensors, kind, in_features=columns, **more)

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
    ) -> Int4Weight:
        """A weight from the tensors of a GPTQ checkpoint: :func:`qops.formats.gptq.int4_weight`, which tells more.

        Args:
            qweight: int32 ``[K/8, N]``.
            qzeros: int32 ``[K/G, N/8]``.
            scales: ``[K/G, N]``.
            g_idx: ``[K]``, in act-order.
            zero_add: "word" or "nibble" for version 1 of the format, "none" for version 2.
            pack: as in :meth:`from_canonical`.

        Returns:
            A weight that holds exactly these numbers.
        """
        from qops.formats import gptq

        return gptq.int4_weight(qweight, qzeros, scales, g_idx, zero_add=zero_add, pack=pack)

    @classmethod
    def from_awq(
        cls,
        qweight: Tensor,
        qzeros: Tensor | None,
        scales: Tensor,
        *,
        version: str = "gemm",
        group_size: int | None = None,
        symmetric: bool = False,
        pack: bool = True,
    ) -> Int4Weight:
        """A weight from the tensors of an AWQ checkpoint: :func:`qops.formats.awq.int4_weight`, which tells more.

        Args:
            qweight: int32 ``[K, N/8]`` of version "gemm".
            qzeros: int32 ``[K/G, N/8]``; None for a symmetric weight.
            scales: ``[K/G, N]``.
            version: "gemm", "gemv" or "gemv_fast".
            group_size: G, which the other versions need.
            symmetric: says that, without qzeros, every zero point is 8.
            pack: as in :meth:`from_canonical`.

        Returns:
            A weight that holds exactly these numbers.
        """
        from qops.formats import awq

        return awq.int4_weight(
            qweight, qzeros, scales, version=version, group_size=group_size, symmetric=symmetric, pack=pack
        )

    @classmethod
    def from_compressed_tensors(
        cls,
        weight_packed: Tensor,
        weight_scale: Tensor,
        weight_shape: Tensor | None = None,
        weight_zero_point: Tensor | None = None,
        weight_g_idx: Tensor | None = None,
        *,
        pack: bool = True,
    ) -> Int4Weight:
        """A weight from compressed-tensors: :func:`qops.formats.compressed_tensors.int4_weight`, which tells more.

        Args:
            weight_packed: int32 ``[N, K/8]``.
            weight_scale: ``[N, K/G]``.
            weight_shape: ``[2]``, N and K.
            weight_zero_point: int32 ``[N/8, K/G]``; none when symmetric.
            weight_g_idx: ``[K]``, in act-order.
            pack: as in :meth:`from_canonical`.

        Returns:
            A weight that holds exactly these numbers.
        """
        from qops.formats import compressed_tensors

        return compressed_tensors.int4_weight(
            weight_packed, weight_scale, weight_shape, weight_zero_point, weight_g_idx, pack=pack
        )

    @classmethod
    def from_gguf(cls, blocks: Tensor, qtype: str, *, pack: bool = True) -> Int4Weight:
        """A weight from GGUF blocks: :func:`qops.formats.gguf.int4_weight`, which tells more.

        Args:
            blocks: uint8 ``[N, bytes per row]``, as stored in the file.
            qtype: "Q4_0", "Q4_1", "Q2_K", "Q3_K" or "Q4_K".
            pack: as in :meth:`from_canonical`.

        Returns:
            A weight that holds exactly the stored numbers.
        """
        from qops.formats import gguf

        return gguf.int4_weight(blocks, qtype, pack=pack)

    @staticmethod
    def _pack_codes(qweight: Tensor) -> Tensor:
        return torch.ops.qops.int4_pack.default(qweight)

    @staticmethod
    def _unpack_codes(packed: Tensor, rows: int) -> Tensor:
        return torch.ops.qops.int4_unpack.default(packed, rows)

    @staticmethod
    def _pairs_rows(device: torch.device) -> bool:
        return _layout.has_gpu_layout(device)

    def _dequantize_rows(self, rows: Mapping[str, Tensor]) -> Tensor:
        qweight = rows["qweight"]
        codes = torch.stack((qweight & 15, qweight >> 4), dim=-1).double().view(*rows["scales"].shape, self.group_size)
        scales = rows["scales"].double().unsqueeze(-1)
        if self.kind == "symmetric":
            return (scales * (codes - 8)).float().view(-1, self.in_features)
        zeros = rows["zeros"].double().unsqueeze(-1)
        if self.kind == "zero_point":
            return (scales * (codes - zeros)).float().view(-1, self.in_features)
        # s * q + c, two products that float64 holds exactly; rounding their sum to odd keeps the cast the one rounding.
        constant = zeros if self.kind == "offset" else -scales * zeros
        return add_rounding_to_odd(scales * codes, constant).float().view(-1, self.in_features)
