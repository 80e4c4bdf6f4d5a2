"""Half-quadratic quantization by hqq, sharded by rows.

The only module that imports hqq. The library's optimizer stops early by the mean error of all that
it is given, so its result for a row depends on the rows beside it. To make that independent of the
ranks, a matrix is quantized in blocks of whole rows whose borders depend on its shape only. The
reference, equal bit for bit for any number of ranks, is ``hqq.core.quantize.Quantizer.quantize``
of each block (`HqqQuantizer.rows_per_block`) with the parameters of ``BaseQuantizeConfig``, which
is what ``HQQLinear`` makes of it, scales and zeros rounded to fp16. A rank whose rows cut a block
quantizes all of it and keeps its rows.

With ``axis: 0`` groups run down the columns: hqq reshapes the ``(out_features, in_features)``
weight to ``(group_size, -1)``, so that a group holds rows ``r, r + R, r + 2R, ...`` of one column,
``R = out_features / group_size``. Such rows cannot be told apart by shards of the weight. Here they
are stored side by side, as one of ``R`` stored rows, and those are what ranks and blocks share.

Scales and zeros are stored in fp16: on a GPU the optimizer works in fp16 itself, so nothing is
lost. (On a CPU it works in fp32: the two devices give slightly different codes.)

``BitPack`` packs the first half of a tensor against its second half, which no shard of rows could
unpack. Here each row is packed so by itself; 3 bits are 2 bits and 1 bit, without waste.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fsdpq.dist import Shard
from fsdpq.errors import CheckpointError
from fsdpq.plan.costs.quantization import hqq_shapes, packed_row_bytes, stored_fold
from fsdpq.protocols import RowReader
from fsdpq.recipe.sections.quantization import HqqOptions

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # hqq 0.2.8 imports torch.jit's modules
    from hqq.core.quantize import Quantizer as HqqLibrary

BLOCK_WEIGHTS = 1 << 22
"""Weights quantized at once, about. The optimizer needs some 30 bytes for each."""


class HqqQuantizer:
    """Packs matrices as hqq quantizes them, into byte tensors that FSDP2 can shard.

    The byte tensors of a ``(out_features, in_features)`` matrix with ``axis: 1``:

    - ``codes``: each row packed by itself, ``(out_features, bytes a row)``;
    - ``scale``, ``zero``: fp16 bytes, ``(out_features, groups a row * 2)``; a weight is
      ``(code - zero) * scale``.

    With ``axis: 0``, and ``R = out_features / group_size``:

    - ``codes``: packed rows ``r, r + R, r + 2R, ...`` of the weight side by side in stored row
      ``r``, ``(R, group_size * bytes a row)``;
    - ``scale``, ``zero``: fp16 bytes, ``(R, in_features * 2)``.
    """

    def __init__(self, options: HqqOptions) -> None:
        self.options = options
        self.nbits = options.nbits
        self.group_size = options.group_size
        self.axis = options.axis
        self.modules_to_not_convert = options.modules_to_not_convert
        self.block_weights = BLOCK_WEIGHTS
        self._fold = stored_fold(options)

    def packed_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
        """Names and shapes of the byte tensors of one matrix.

        Raises:
            CheckpointError: the group size does not divide the side of the matrix that groups run
                along: a shard could not be dequantized by itself.
        """
        return hqq_shapes(self.options, out_features, in_features)

    def rows_per_block(self, in_features: int) -> int:
        """Stored rows that the optimizer sees together; block ``b`` starts at row ``b`` times that.

        With ``axis: 1`` these are rows of the weight.
        """
        return max(1, self.block_weights // (self._fold * in_features))

    def quantize_shards(
        self, read: RowReader, shape: tuple[int, int], shards: Mapping[str, Shard]
    ) -> None:
        """Fills this rank's shards of one matrix; see `fsdpq.protocols.Quantizer`.

        Memory: about 30 bytes for each of the `BLOCK_WEIGHTS` weights of one block.

        Raises:
            CheckpointError: a scale or zero is too large for fp16.
        """
        own, stored_rows = shards["codes"], shape[0] // self._fold
        for start, stop in self._blocks(own, (stored_rows, shape[1])):
            pieces = [
                read(first + start, first + stop) for first in range(0, shape[0], stored_rows)
            ]
            weight = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            codes, scale, zero = self._quantize(weight)
            first, last = max(start, own.start), min(stop, own.stop)
            cut = slice(first - start, last - start)
            kept = slice(first - own.start, last - own.start)
            packed = pack_rows(codes[cut].reshape(-1, shape[1]), self.nbits)
            own.rows[kept] = packed.view(last - first, -1)
            shards["scale"].rows[kept] = scale[cut].contiguous().view(torch.uint8)
            shards["zero"].rows[kept] = zero[cut].contiguous().view(torch.uint8)

    def dequantize(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Returns the whole matrix with shape ``shape``, as ``Quantizer.dequantize`` makes it."""
        return self.dequantize_rows(packed, shape, 0, shape[0], dtype)

    def dequantize_rows(
        self,
        packed: Mapping[str, Tensor],
        shape: tuple[int, int],
        start: int,
        stop: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Returns rows ``[start, stop)`` of the matrix, computed in ``dtype``."""
        if self.axis == 0:
            codes, zero, scale = self._strided_rows(packed, start, stop)
        else:
            codes, zero, scale = (packed[name][start:stop] for name in ("codes", "zero", "scale"))
        num_groups = zero.shape[1] // 2
        weight = unpack_rows(codes, self.nbits, shape[1]).to(dtype)
        # Rows and groups of a row; with `axis: 0` a row has as many groups as columns, and whole
        # runs of rows share their scales.
        runs = weight.reshape(-1, zero.shape[0], num_groups, shape[1] // num_groups)
        zero, scale = (
            each.contiguous().view(torch.float16).to(dtype).unsqueeze(-1) for each in (zero, scale)
        )
        return runs.sub_(zero).mul_(scale).view(stop - start, shape[1])

    def _strided_rows(
        self, packed: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what `dequantize_rows` needs of an ``axis: 0`` matrix, in order of its rows.

        Returns:
            Packed codes, ``(stop - start, bytes a row)``; bytes of zeros and scales, as many rows
            or, of the whole matrix, the stored rows that repeat ``group_size`` times.
        """
        stored_rows = packed["codes"].shape[0]
        by_run = packed["codes"].view(stored_rows, self._fold, -1)
        if stop - start == stored_rows * self._fold:
            return by_run.transpose(0, 1).flatten(0, 1), packed["zero"], packed["scale"]
        rows = torch.arange(start, stop, device=by_run.device)
        stored = rows % stored_rows
        return by_run[stored, rows // stored_rows], packed["zero"][stored], packed["scale"][stored]

    def _blocks(self, own: Shard, shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Yields the blocks ``[start, stop)`` of stored rows that hold rows of ``own``."""
        step = self.rows_per_block(shape[1])
        if own.start == own.stop:
            return
        for start in range(own.start // step * step, own.stop, step):
            yield start, min(start + step, shape[0])

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes the rows of one block.

        Returns:
            By stored row: codes, uint8 ``(rows, rows of the weight in each, in_features)``; scales
            and zeros, fp16 ``(rows, groups)``.
        """
        codes, meta = HqqLibrary.quantize(
            weight,
            nbits=self.nbits,
            group_size=self.group_size,  # pyright: ignore[reportArgumentType]
            axis=self.axis,
            round_zero=self.nbits == 4,  # before the optimizer starts, as `BaseQuantizeConfig` says
            bitpack=False,
            device=str(weight.device),
        )
        rows = weight.shape[0] // self._fold
        scale = meta["scale"].reshape(rows, -1).half()
        zero = meta["zero"].reshape(rows, -1).half()
        if not (scale.isfinite().all() and zero.isfinite().all()):
            raise CheckpointError(
                f"hqq cannot quantize a weight of {weight.shape[1]} input features: a scale or "
                "zero point exceeds fp16",
                hint="use `quantization: {kind: bnb}`, or name the layer in "
                "`quantization.modules_to_not_convert`",
            )
        by_run = codes.to(torch.uint8).reshape(self._fold, rows, weight.shape[1])
        return by_run.transpose(0, 1), scale, zero


def pack_rows(codes: Tensor, nbits: int) -> Tensor:
    """Packs each row by itself.

    The row is cut into ``8 / nbits`` pieces; byte ``i`` holds element ``i`` of each, the first
    piece in the highest bits, as ``BitPack`` does with a whole tensor. 3 bits are the lower two
    bits of all codes, then the third bits.

    Args:
        codes: ``(rows, in_features)``, uint8, below ``2 ** nbits``.
        nbits: 8, 4, 3, 2 or 1.
    """
    if nbits == 3:
        return torch.cat([pack_rows(codes & 3, 2), pack_rows(codes >> 2, 1)], dim=1)
    rows, in_features = codes.shape
    pieces, row_bytes = 8 // nbits, packed_row_bytes(in_features, nbits)
    padded = codes.new_zeros(rows, pieces * row_bytes)
    padded[:, :in_features] = codes
    packed = codes.new_zeros(rows, row_bytes)
    for index, piece in enumerate(padded.view(rows, pieces, row_bytes).unbind(1)):
        packed |= piece << (8 - nbits * (index + 1))
    return packed


def unpack_rows(packed: Tensor, nbits: int, in_features: int) -> Tensor:
    """Undoes `pack_rows`; returns ``(rows, in_features)``, uint8."""
    if nbits == 3:
        low = packed_row_bytes(in_features, 2)
        high = unpack_rows(packed[:, low:], 1, in_features)
        return unpack_rows(packed[:, :low], 2, in_features) | (high << 2)
    rows, row_bytes = packed.shape
    pieces, mask = 8 // nbits, (1 << nbits) - 1
    codes = packed.new_empty(rows, pieces, row_bytes)
    for index in range(pieces):
        codes[:, index] = (packed >> (8 - nbits * (index + 1))) & mask
    return codes.view(rows, pieces * row_bytes)[:, :in_features]
