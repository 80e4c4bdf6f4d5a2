"""4-bit NF4 and FP4 by bitsandbytes, sharded by rows.

The only module that imports bitsandbytes. Codes and scales are what
``bitsandbytes.functional.quantize_4bit`` makes of the whole matrix, bit for bit, whatever the
number of ranks:

- rows quantize by themselves when ``in_features`` is a multiple of the block size: each rank reads
  and quantizes only its own rows, a chunk at a time;
- otherwise blocks cross rows: each rank quantizes the whole matrix and keeps its slice (correct,
  and as slow and big as one matrix);
- double quantization subtracts the mean of all scales: the scales of the one matrix, 1/32 of its
  bf16 size, are gathered, quantized as the library does, and sliced.

bitsandbytes' ``Linear4bit`` is never used: on some CPUs its eval-mode forward repacks the weight
in place. Only the functional API is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from fsdpq.dist import Shard
from fsdpq.plan.costs.quantization import NESTED_BLOCK_SIZE, bnb_shapes, is_row_local
from fsdpq.protocols import RowReader
from fsdpq.recipe.sections.quantization import BnbOptions

MAX_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Weights quantized at once. ``quantize_4bit`` on a CPU needs about 20 bytes for each."""

MIN_CHUNKS = 16
"""A rank's rows are read in at least so many pieces, so that its working memory stays below the
bytes of the rows themselves."""


class BnbQuantizer:
    """Packs matrices as bitsandbytes does, into byte tensors that FSDP2 can shard.

    The byte tensors of a ``(out_features, in_features)`` matrix with ``blocks`` scales:

    - ``codes``: two 4-bit codes a byte, ``(out_features, in_features / 2)``;
    - ``absmax``: the scales, as fp32 bytes or, with double quantization, as 8-bit codes,
      ``(out_features, blocks a row * bytes each)``;
    - ``nested_absmax``, ``nested_offset``: fp32 bytes of the second-level scales and of the mean
      that was subtracted, ``(ceil(blocks / 256), 4)`` and ``(1, 4)``; double quantization only.

    Where blocks cross rows, codes and scales are flat: ``(ceil(weights / 2), 1)`` and
    ``(blocks, bytes each)``.
    """

    def __init__(self, options: BnbOptions) -> None:
        self.options = options
        self.quant_type = options.quant_type
        self.block_size = options.block_size
        self.double_quant = options.double_quant
        self.modules_to_not_convert = options.modules_to_not_convert
        if self.double_quant:
            _host_map()  # now: a trace has no values of tensors (`fsdpq.worker.plan_trace`)

    def packed_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
        """Names and shapes of the byte tensors of one matrix."""
        return bnb_shapes(self.options, out_features, in_features)

    def quantize_shards(
        self, read: RowReader, shape: tuple[int, int], shards: Mapping[str, Shard]
    ) -> None:
        """Fills this rank's shards of one matrix; see `fsdpq.protocols.Quantizer`.

        Ranks: all (collective).
        Memory: at most 1.5 times the rank's rows; the whole matrix where blocks cross rows.
        """
        if is_row_local(self.options, shape[1]):
            own_absmax = self._quantize_own_rows(read, shape[1], shards["codes"])
            if not self.double_quant:
                shards["absmax"].rows.copy_(own_absmax.view(torch.uint8))
                return
            absmax = shards["codes"].gather(own_absmax, shape[0]).reshape(-1)
        else:
            codes, state = self._quantize(read(0, shape[0]))
            _keep_slice(codes.reshape(-1, 1), shards["codes"])
            absmax = state.absmax
            if not self.double_quant:
                _keep_slice(absmax.reshape(-1, 1).view(torch.uint8), shards["absmax"])
                return
        self._quantize_scales(absmax, shards)

    def dequantize(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Returns the whole matrix with shape ``shape``, as ``dequantize_4bit`` makes it."""
        state = self._whole_state(packed, shape, dtype)
        return bnb.dequantize_4bit(packed["codes"].reshape(-1, 1), state).reshape(shape)

    def dequantize_rows(
        self,
        packed: Mapping[str, Tensor],
        shape: tuple[int, int],
        start: int,
        stop: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Returns rows ``[start, stop)`` of what `dequantize` returns, bit for bit.

        Memory: those rows; the whole matrix where blocks cross rows.
        """
        if not is_row_local(self.options, shape[1]):
            return self.dequantize(packed, shape, dtype)[start:stop]
        per_row = shape[1] // self.block_size
        state = bnb.QuantState(
            absmax=self._scales(packed, start * per_row, stop * per_row),
            shape=torch.Size((stop - start, shape[1])),
            dtype=dtype,
            blocksize=self.block_size,
            quant_type=self.quant_type,
        )
        return bnb.dequantize_4bit(packed["codes"][start:stop].reshape(-1, 1), state)

    def library_tables(self) -> dict[str, Tensor]:
        """Returns the values of the 4-bit and of the 8-bit codes, by their names in checkpoints.

        Both fp32 on the host, with shapes ``(16,)`` and ``(256,)``.
        """
        host = torch.device("cpu")
        quant_map = bnb.get_4bit_type(self.quant_type, device=host)
        return {"quant_map": quant_map, "nested_quant_map": _dynamic_map(host)}

    def library_parts(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Returns a whole packed matrix as the tensors that bitsandbytes saves.

        Args:
            packed: the byte tensors, whole, on the host.
            shape: ``(out_features, in_features)``.
            dtype: of the weight that was quantized.

        Returns:
            ``""`` for the codes, and what follows ``weight.`` for the others.
        """
        state = self._whole_state(packed, shape, dtype)
        state.code = self.library_tables()["quant_map"]
        return {"": packed["codes"].reshape(-1, 1)} | state.as_dict(packed=True)

    def _whole_state(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> bnb.QuantState:
        """Returns the library's description of a whole packed matrix, without its 16 values."""
        absmax = packed["absmax"].reshape(-1)
        state = bnb.QuantState(
            absmax=absmax if self.double_quant else absmax.view(torch.float32),
            shape=torch.Size(shape),
            dtype=dtype,
            blocksize=self.block_size,
            quant_type=self.quant_type,
        )
        if self.double_quant:
            state.nested = True
            state.offset = packed["nested_offset"].view(torch.float32).reshape(())
            state.state2 = bnb.QuantState(
                absmax=packed["nested_absmax"].view(torch.float32).reshape(-1),
                code=_dynamic_map(absmax.device),
                blocksize=NESTED_BLOCK_SIZE,
                dtype=torch.float32,
            )
        return state

    def _scales(self, packed: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
        """Returns scales ``[start, stop)`` of the matrix, fp32."""
        if not self.double_quant:
            return packed["absmax"].reshape(-1).view(torch.float32)[start:stop]
        nested = start // NESTED_BLOCK_SIZE
        first = nested * NESTED_BLOCK_SIZE
        scales = bnb.dequantize_blockwise(
            packed["absmax"].reshape(-1)[first:stop],
            absmax=packed["nested_absmax"].view(torch.float32).reshape(-1)[nested:],
            code=_dynamic_map(packed["absmax"].device),
            blocksize=NESTED_BLOCK_SIZE,
        )
        return scales[start - first :] + packed["nested_offset"].view(torch.float32).reshape(())

    def _quantize(self, weight: Tensor) -> tuple[Tensor, bnb.QuantState]:
        return bnb.quantize_4bit(
            weight.contiguous(), blocksize=self.block_size, quant_type=self.quant_type
        )

    def _quantize_own_rows(self, read: RowReader, in_features: int, codes: Shard) -> Tensor:
        """Fills ``codes``; returns the rank's scales, fp32 with shape ``(rows, blocks a row)``.

        They lie where rows are read to, on every rank, also on one that has none.
        """
        num_rows = codes.stop - codes.start
        # Under CPU offload shards lie on the host, and rows are read to the device.
        device = read(codes.start, codes.start).device
        absmax = torch.empty(num_rows, in_features // self.block_size, device=device)
        for start, stop in _row_chunks(num_rows, in_features, device.type):
            packed, state = self._quantize(read(codes.start + start, codes.start + stop))
            codes.rows[start:stop] = packed.view(stop - start, -1)
            absmax[start:stop] = state.absmax.view(stop - start, -1)
        return absmax

    def _quantize_scales(self, absmax: Tensor, shards: Mapping[str, Shard]) -> None:
        """Quantizes the scales of the whole matrix as ``quantize_4bit`` does; keeps the slices.

        Source: ``compress_statistics`` in bitsandbytes/functional.py, version 0.50.
        """
        offset = absmax.mean()
        scale_codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
        width = shards["absmax"].rows.shape[1]
        _keep_slice(scale_codes.view(-1, width), shards["absmax"])
        nested_absmax = state.absmax.reshape(-1, 1).view(torch.uint8)
        _keep_slice(nested_absmax, shards["nested_absmax"])
        _keep_slice(offset.reshape(1, 1).view(torch.uint8), shards["nested_offset"])


def _keep_slice(whole: Tensor, shard: Shard) -> None:
    shard.rows.copy_(whole[shard.start : shard.stop])


def _row_chunks(num_rows: int, row_size: int, device_type: str) -> Iterator[tuple[int, int]]:
    """Yields ``[start, stop)`` of row chunks that bound the working memory."""
    by_size = MAX_CHUNK_ELEMENTS[device_type] // row_size
    step = max(1, min(by_size, num_rows // MIN_CHUNKS))
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


@functools.lru_cache(maxsize=8)
def _dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of an 8-bit scale code, as ``quantize_blockwise`` uses them by default."""
    return _host_map().to(device)


@functools.lru_cache(maxsize=1)
def _host_map() -> Tensor:
    return bnb.create_dynamic_map()
