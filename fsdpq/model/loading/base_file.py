"""Reads a quantized base: every byte that is used has passed its checksum.

Checksums cover chunks of 1 MiB; a chunk that holds any row of this rank is read whole and compared
while it is read. Rows can be copied, or left where they are and mapped: then they are pages of the
file, which the system drops and reads again as it likes, and no memory of the process
(`fsdpq.model.loading.mapped_base` keeps watch over those).
"""

from __future__ import annotations

import mmap
import os
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fsdpq.dist import Shard, rank
from fsdpq.errors import DamagedBaseError
from fsdpq.tensor_files.base_manifest import WEIGHTS_NAME, check_files, damaged, read_manifest
from fsdpq.tensor_files.header import Entry, read_header

STAGING_BYTES = 16 << 20
"""Rows for a GPU come through host memory in pieces of this size."""


@dataclass(frozen=True)
class MappedRows:
    """Rows of one tensor, where they lie in the file.

    Attributes:
        rows: this rank's, and possibly more after them; read-only.
        entry: the tensor.
        start: offset in the file of the first byte of this rank's rows.
        stop: offset after their last byte.
    """

    rows: Tensor
    entry: Entry
    start: int
    stop: int


class BaseFile:
    """The weights of a base, opened and checked up to the rows themselves.

    Args:
        directory: of the base.

    Attributes:
        descriptor: of the weights' file; open until `close`.
        checked_bytes: read and compared with their checksums so far.
        checked_s: seconds that this took.
        opened_at: what `storage_bytes` was when it was opened.

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
        self.descriptor = os.open(path, os.O_RDONLY)
        self.checked_bytes, self.checked_s = 0, 0.0
        self.opened_at = storage_bytes()
        self._chunk = bytearray(self.manifest.chunk_bytes)
        self._chunk_index = -1
        self._mapped: Tensor | None = None

    def close(self) -> None:
        """Closes the file; mapped rows stay."""
        os.close(self.descriptor)

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

    def map_rows(self, name: str, shard: Shard, *, num_rows: int) -> MappedRows:
        """Returns rows of one tensor where they lie in the file.

        This rank's own are compared with their checksums once, here.

        Args:
            name: of the tensor in the file.
            shard: says which rows, of which dtype and shape; nothing is written to it.
            num_rows: rows to return, at least the shard's: this rank's first, and after them
                whatever follows in the file. Fewer where the file ends before.

        Raises:
            DamagedBaseError: a byte of the rows, or of a chunk that they lie in, has changed.
        """
        entry = self.entries[name]
        start, stop = _range_of(entry, shard)
        self.check(entry, start, stop)
        own_rows = shard.rows.shape[0] if shard.rows.dim() else 1
        row_bytes = _row_bytes(entry)
        if start + num_rows * row_bytes > self.manifest.num_bytes:
            num_rows = own_rows
        rows = self._map()[start : start + num_rows * row_bytes].view(shard.rows.dtype)
        shape = (num_rows, *shard.rows.shape[1:]) if shard.rows.dim() else ()
        return MappedRows(rows.view(shape), entry, start, stop)

    def check(self, entry: Entry, start: int, stop: int) -> None:
        """Compares bytes ``[start, stop)`` of the file with their checksums.

        Raises:
            DamagedBaseError: a byte of a chunk that they lie in has changed.
        """
        for index in self._chunks(start, stop):
            self._read_chunk(entry, index)

    def forget_chunk(self) -> None:
        """Makes the next check read the file even where the last one ended."""
        self._chunk_index = -1

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
        started = time.perf_counter()
        where = f"bytes {index * size} to {index * size + length} of {WEIGHTS_NAME}"
        try:
            found = os.preadv(self.descriptor, [content], index * size)
        except OSError as error:
            raise self._damaged(f"{where} cannot be read: {error.strerror}", entry) from error
        expected = int.from_bytes(self._checksums[4 * index : 4 * index + 4], "little")
        if found != length:
            raise self._damaged(f"{WEIGHTS_NAME} ends at byte {index * size + found}", entry)
        if zlib.crc32(content) != expected:
            raise self._damaged(f"{where} do not fit their checksum", entry)
        self._chunk_index = index
        self.checked_bytes += length
        self.checked_s += time.perf_counter() - started
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
            mapping = mmap.mmap(self.descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            with warnings.catch_warnings():
                # That it is not writable is the point.
                warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
                self._mapped = torch.frombuffer(mapping, dtype=torch.uint8)
        return self._mapped


def storage_bytes() -> int:
    """Returns the bytes that this process had read from disks; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def _range_of(entry: Entry, shard: Shard) -> tuple[int, int]:
    """Returns the bytes of the file that hold the rows of ``shard``."""
    if not entry.shape:
        return entry.start, entry.stop
    row_bytes = _row_bytes(entry)
    return entry.start + shard.start * row_bytes, entry.start + shard.stop * row_bytes


def _row_bytes(entry: Entry) -> int:
    return entry.num_bytes // entry.shape[0] if entry.shape else entry.num_bytes
