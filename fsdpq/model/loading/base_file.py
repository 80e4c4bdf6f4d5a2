"""Reads a quantized base: every byte that is used has passed its checksum.

Checksums cover chunks of 1 MiB; a chunk that holds any row of this rank is read whole and compared
while it is read. Rows can be copied, or left where they are and mapped: then they are pages of the
file, which the system drops and reads again as it likes, and no memory of the process.
"""

from __future__ import annotations

import mmap
import os
import warnings
import zlib
from pathlib import Path

import torch
from torch import Tensor

from fsdpq.dist import Shard, rank
from fsdpq.errors import DamagedBaseError
from fsdpq.tensor_files.base_manifest import WEIGHTS_NAME, check_files, damaged, read_manifest
from fsdpq.tensor_files.header import Entry, read_header

STAGING_BYTES = 16 << 20
"""Rows for a GPU come through host memory in pieces of this size."""


class BaseFile:
    """The weights of a base, opened and checked up to the rows themselves.

    Args:
        directory: of the base.

    Raises:
        CheckpointError: there is no base.
        DamagedBaseError: it is not what was written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory)
        self._checksums = check_files(directory, self.manifest)
        path = directory / WEIGHTS_NAME
        self.entries = read_header(path).entries
        self._descriptor = os.open(path, os.O_RDONLY)
        self._chunk = bytearray(self.manifest.chunk_bytes)
        self._chunk_index = -1
        self._mapped: Tensor | None = None

    def close(self) -> None:
        """Closes the file; mapped rows stay."""
        os.close(self._descriptor)

    def copy_rows(self, name: str, shard: Shard) -> None:
        """Fills this rank's rows of one tensor, in place.

        Args:
            name: of the tensor in the file.
            shard: with the dtype and the row shape of that tensor.

        Raises:
            DamagedBaseError: a byte of the rows, or of a chunk that they lie in, has changed.
        """
        entry = self.entries[name]
        position, _ = _range_of(entry, shard)
        # Bytes, whatever the dtype: some kernels rewrite NaNs when they copy 16-bit floats.
        rows = shard.rows.reshape(-1).view(torch.uint8)
        for piece in rows.split(STAGING_BYTES) if rows.numel() else ():
            host = piece if piece.device.type == "cpu" else torch.empty_like(piece, device="cpu")
            self._copy(entry, position, host.numpy().data)
            if host is not piece:
                piece.copy_(host)
            position += piece.numel()

    def map_rows(self, name: str, shard: Shard) -> Tensor:
        """Returns this rank's rows of one tensor where they lie in the file, read-only.

        They are compared with their checksums once, here.

        Args:
            name: of the tensor in the file.
            shard: says which rows, of which dtype and shape; nothing is written to it.

        Raises:
            DamagedBaseError: a byte of the rows, or of a chunk that they lie in, has changed.
        """
        entry = self.entries[name]
        start, stop = _range_of(entry, shard)
        for index in self._chunks(start, stop):
            self._read_chunk(entry, index)
        rows = self._map()[start:stop].view(shard.rows.dtype)
        return rows.view(shard.rows.shape)

    def _copy(self, entry: Entry, position: int, target: memoryview) -> None:
        """Copies ``len(target)`` bytes of the file, from ``position`` on."""
        size = self.manifest.chunk_bytes
        end = position + len(target)
        for index in self._chunks(position, end):
            chunk = self._read_chunk(entry, index)
            first, last = max(position, index * size), min(end, (index + 1) * size)
            piece = chunk[first - index * size : last - index * size]
            target[first - position : last - position] = piece

    def _chunks(self, start: int, stop: int) -> range:
        size = self.manifest.chunk_bytes
        return range(start // size, -(-stop // size)) if start < stop else range(0)

    def _read_chunk(self, entry: Entry, index: int) -> memoryview:
        """Returns one chunk; the last one is kept, as the next rows often begin in it."""
        size = self.manifest.chunk_bytes
        length = min(size, self.manifest.num_bytes - index * size)
        content = memoryview(self._chunk)[:length]
        if index == self._chunk_index:
            return content
        self._chunk_index = -1
        where = f"bytes {index * size} to {index * size + length} of {WEIGHTS_NAME}"
        try:
            found = os.preadv(self._descriptor, [content], index * size)
        except OSError as error:
            raise self._damaged(f"{where} cannot be read: {error.strerror}", entry) from error
        expected = int.from_bytes(self._checksums[4 * index : 4 * index + 4], "little")
        if found != length:
            raise self._damaged(f"{WEIGHTS_NAME} ends at byte {index * size + found}", entry)
        if zlib.crc32(content) != expected:
            raise self._damaged(f"{where} do not fit their checksum", entry)
        self._chunk_index = index
        return content

    def _damaged(self, what: str, entry: Entry) -> DamagedBaseError:
        needed = f"rank {rank()} needs them for `{entry.name}`"
        at = f"at bytes {entry.start} to {entry.stop}"
        return damaged(self.directory, f"{what} ({needed} {at})")

    def _map(self) -> Tensor:
        """Returns the whole file as bytes; made once.

        The mapping cannot be written to: a private one that could would count as memory against
        the system's limit, and bases are larger than that.
        """
        if self._mapped is None:
            mapping = mmap.mmap(self._descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            with warnings.catch_warnings():
                # That it is not writable is the point.
                warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
                self._mapped = torch.frombuffer(mapping, dtype=torch.uint8)
        return self._mapped


def _range_of(entry: Entry, shard: Shard) -> tuple[int, int]:
    """Returns the bytes of the file that hold the rows of ``shard``."""
    if not entry.shape:
        return entry.start, entry.stop
    row_bytes = entry.num_bytes // entry.shape[0]
    return entry.start + shard.start * row_bytes, entry.start + shard.stop * row_bytes
