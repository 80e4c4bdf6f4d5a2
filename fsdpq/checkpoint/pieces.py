"""Plans of torch's distributed checkpoint (DCP) over `Piece`s: who writes what, who reads what.

DCP deals the copies of replicated rows out to ranks, checks that the parts make up the whole of
every tensor, and finds which saved parts cover the rows that a rank wants, for any number of ranks
on both sides (https://docs.pytorch.org/docs/stable/distributed.checkpoint.html). Its own planners
take DTensors and plain tensors, which do not load into each other's place, and pickle everything
else. These take pieces only: rows of host copies, and no objects.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from fsdpq.errors import CheckpointError
from fsdpq.protocols import Piece


class SavePieces(DefaultSavePlanner):
    """Plans the writing of pieces; the state dict that DCP passes around maps names to them."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces: Mapping[str, Piece] = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,  # noqa: ARG002
        is_coordinator: bool = False,
    ) -> None:
        """Takes this rank's pieces."""
        self._pieces = state_dict
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """Plans to write every piece that has rows; DCP leaves one copy of each in the end."""
        items = [_write_item(name, piece) for name, piece in self._pieces.items()]
        self.plan = SavePlan([item for item in items if item is not None])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Returns the rows to write."""
        return self._pieces[write_item.index.fqn].rows


class LoadPieces(DefaultLoadPlanner):
    """Plans the reading of pieces, into the memory of their rows."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces: Mapping[str, Piece] = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Takes this rank's pieces and what the checkpoint has."""
        self._pieces = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Plans to read the saved parts that make up every piece.

        Raises:
            CheckpointError: a tensor is not in the checkpoint, has another shape or dtype there, or
                rows of it are missing.
        """
        saved = self.metadata.state_dict_metadata if self.metadata else {}
        items: list[ReadItem] = []
        for name, piece in self._pieces.items():
            items += _read_items(name, piece, saved.get(name))
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Returns the part of a piece's rows that one saved part fills."""
        rows = self._pieces[read_item.dest_index.fqn].rows
        for axis, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            rows = rows.narrow(axis, start, length)
        return rows


def chunk_of(piece: Piece) -> ChunkStorageMetadata:
    """Returns where the piece's rows are in the whole tensor."""
    offsets = (piece.start, *(0 for _ in piece.shape[1:])) if piece.shape else ()
    return ChunkStorageMetadata(torch.Size(offsets), piece.rows.shape)


def _write_item(name: str, piece: Piece) -> WriteItem | None:
    if piece.rows.numel() == 0 and math.prod(piece.shape):
        return None  # others have the rows
    chunk = chunk_of(piece)
    properties = TensorProperties(dtype=piece.rows.dtype)
    data = TensorWriteData(chunk, properties, torch.Size(piece.shape))
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _read_items(name: str, piece: Piece, saved: Any) -> list[ReadItem]:
    if not isinstance(saved, TensorStorageMetadata):
        raise CheckpointError(
            f"the checkpoint has no `{name}`",
            hint="go on with the recipe that it was saved with: something else is trained now",
        )
    if tuple(saved.size) != piece.shape or saved.properties.dtype != piece.rows.dtype:
        raise CheckpointError(
            f"`{name}` is {saved.properties.dtype} of shape {list(saved.size)} in the checkpoint, "
            f"and {piece.rows.dtype} of shape {list(piece.shape)} in this run",
            hint="go on with the recipe that it was saved with",
        )
    if piece.rows.numel() == 0:
        return []
    items = create_read_items_for_chunk_list(name, saved, [chunk_of(piece)])
    if sum(math.prod(item.lengths) for item in items) != piece.rows.numel():
        raise CheckpointError(
            f"the checkpoint does not have all rows of `{name}`",
            hint="use the checkpoint before it",
        )
    return items
