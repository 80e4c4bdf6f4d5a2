"""Where a base comes from: a checkpoint whose rows are quantized while they are read, here.

A source of another kind (weights that are quantized already) is another class with the same
`BaseSource.fill`; `fsdpq.model.loading.stream` does not know which one it has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fsdpq.dist import Shard, own_shard
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.expansion import source_name
from fsdpq.model.loading.checkpoint_files import ByteRange, CheckpointFiles, to_device
from fsdpq.model.loading.checkpoint_names import ModelTensors
from fsdpq.model.loading.read_ahead import ReadAhead
from fsdpq.model.loading.targets import (
    LoadingTarget,
    full_shape,
    loading_targets,
    own_matrix_rows,
    packed_shards,
    tied_names,
)
from fsdpq.model.quantized_linear import PackedMatrix
from fsdpq.protocols import RowReader

COPY_ROWS_BYTES = 16 << 20
"""Rows of an unquantized tensor are copied in pieces of about this size."""


class BaseSource(Protocol):
    """Fills the targets of a base."""

    def fill(self, name: str, target: LoadingTarget) -> None:
        """Fills this rank's rows of one target, in place.

        Ranks: all, with the targets in the same order (collective).

        Args:
            name: of the target, as `loading_targets` gives it.
            target: has memory, without content.
        """
        ...


class TensorRows(Protocol):
    """Weights by rows, under the names of `source_name`: `ModelTensors` is one."""

    @property
    def num_read_bytes(self) -> int:
        """Bytes that were read so far."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows ``[start, stop)`` of the first dimension, on the host."""
        ...

    def read_matrix_rows(self, name: str, start: int, stop: int) -> Tensor:
        """As `read_rows`, with all but the last dimension flattened to one."""
        ...


class CheckpointSource:
    """An unquantized checkpoint: each rank reads its own rows and quantizes them on its device.

    Opening it compares all names and shapes, so that nothing is loaded where they do not fit.

    Args:
        model: whose base it is; on meta.
        directory: the checkpoint.
        dtype: what weights are cast to before they are quantized.
        device: rows are quantized there.

    Attributes:
        notice: empty, nothing is out of the ordinary.

    Raises:
        CheckpointError: names or shapes do not fit, or a file is damaged.
    """

    notice = ""

    def __init__(
        self, model: CausalLM, directory: Path, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = model
        self._tensors = open_checkpoint(model, directory)
        self._dtype = dtype
        self._device = device
        self._ahead = ReadAhead(self._own_ranges())

    def fill(self, name: str, target: LoadingTarget) -> None:
        """Fills this rank's rows of one target; see `BaseSource`.

        Memory: about the rank's rows of the target.
        """
        read = row_reader(
            self._tensors,
            source_name(self._model, name),
            target,
            dtype=self._dtype,
            device=self._device,
            on_read=functools.partial(self._ahead.move_to, name),
        )
        self._ahead.move_to(name, 0)
        if isinstance(target, PackedMatrix):
            shape = (target.out_features, target.in_features)
            target.quantizer.quantize_shards(read, shape, packed_shards(target))
        else:
            copy_rows(read, own_shard(target))

    def _own_ranges(self) -> dict[str, list[ByteRange]]:
        """Returns the bytes of this rank's rows of every target, in the order of filling."""
        ranges: dict[str, list[ByteRange]] = {}
        for name, target in loading_targets(self._model).items():
            start, stop = own_matrix_rows(target)
            source = source_name(self._model, name)
            ranges[name] = self._tensors.matrix_ranges(source, start, stop)
        return ranges


def open_checkpoint(model: CausalLM, directory: Path) -> ModelTensors:
    """Returns the checkpoint's tensors, by the names of `source_name`, after checking them.

    Raises:
        CheckpointError: names or shapes do not fit, or a file is damaged.
    """
    return open_tensors(model, CheckpointFiles(directory))


def open_tensors(model: CausalLM, files: CheckpointFiles) -> ModelTensors:
    """As `open_checkpoint`, of files that are open."""
    targets = loading_targets(model)
    shapes = {source_name(model, n): full_shape(target) for n, target in targets.items()}
    ignored = {source_name(model, name) for name in tied_names(model, targets)}
    return ModelTensors(files, model.hf, shapes, ignored=ignored)


def row_reader(
    tensors: TensorRows,
    name: str,
    target: LoadingTarget,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_read: Callable[[int], Any] = lambda _num_bytes: None,
) -> RowReader:
    """Reads rows in ``dtype`` where they are quantized, else in the precision of the target.

    ``on_read`` is told how many bytes of the tensor have been read so far.
    """
    before = tensors.num_read_bytes
    packed = isinstance(target, PackedMatrix)
    read_dtype = dtype if packed else target.dtype
    read_rows = tensors.read_matrix_rows if packed else tensors.read_rows

    def read(start: int, stop: int) -> Tensor:
        rows = read_rows(name, start, stop)
        on_read(tensors.num_read_bytes - before)
        return to_device(rows, dtype=read_dtype, device=device)

    return read


def copy_rows(read: RowReader, shard: Shard) -> None:
    """Fills the rows of ``shard``, in pieces of about `COPY_ROWS_BYTES`."""
    if shard.rows.dim() == 0:
        shard.rows.copy_(read(0, 1))
        return
    row_bytes = max(1, shard.rows[:1].nbytes)
    step = max(1, min(COPY_ROWS_BYTES // row_bytes, (shard.stop - shard.start) // 4))
    for start in range(shard.start, shard.stop, step):
        stop = min(start + step, shard.stop)
        shard.rows[start - shard.start : stop - shard.start] = read(start, stop)
