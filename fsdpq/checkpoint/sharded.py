"""Saves and loads pieces through torch's distributed checkpoint; errors come as one, on all ranks.

``dcp.save`` is called, not ``dcp.async_save``: what follows the writing (manifest, rename, what is
deleted) belongs in the background too, and must be agreed on by all ranks. The caller copies
tensors to the host and calls from a thread of its own, with a process group of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from fsdpq.checkpoint.pieces import LoadPieces, SavePieces
from fsdpq.checkpoint.storage import CheckpointReader, CheckpointWriter
from fsdpq.errors import CheckpointError, FsdpqError
from fsdpq.protocols import Piece


def save_pieces(
    writer: CheckpointWriter, pieces: Mapping[str, Piece], group: dist.ProcessGroup | None
) -> None:
    """Writes a checkpoint: whole on disk, or not there at all.

    Ranks: all (collective).

    Args:
        writer: of the checkpoint.
        pieces: on the host; the same tensors on all ranks, each rank's rows.
        group: all ranks, over gloo; no other collectives of it may run meanwhile.

    Raises:
        CheckpointError: a rank could not write; all ranks raise the same.
    """
    try:
        dcp.save(dict(pieces), storage_writer=writer, planner=SavePieces(), process_group=group)
    except CheckpointException as error:
        if dist.get_rank(group) == 0:
            with contextlib.suppress(OSError):  # the disk that refused to write may refuse this
                writer.discard()
        raise _first_failure(error) from error


def load_pieces(
    reader: CheckpointReader, pieces: Mapping[str, Piece], group: dist.ProcessGroup | None
) -> None:
    """Fills the rows of pieces from a checkpoint that any number of ranks saved.

    Ranks: all (collective).

    Raises:
        CheckpointError: it does not fit the run, or a file is damaged; all ranks raise the same.
    """
    try:
        dcp.load(dict(pieces), storage_reader=reader, planner=LoadPieces(), process_group=group)
    except CheckpointException as error:
        raise _first_failure(error) from error


def _first_failure(error: CheckpointException) -> FsdpqError:
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    if isinstance(cause, FsdpqError):
        return cause
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    name = f" ({cause.filename})" if isinstance(cause, OSError) and cause.filename else ""
    return CheckpointError(
        f"rank {rank}: {text or type(cause).__name__}{name}",
        hint="make room on the disk, and make the run directory writable",
    )
