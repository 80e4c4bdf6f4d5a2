"""Writes a quantized base, each rank its own rows, straight to their places in the file.

No sharded model is needed: one target at a time gets memory for this rank's rows, a source fills
it as it would fill a model, and the rows go to the file. The bytes are the same for any number of
ranks. The manifest is written last: without it, what a killed writer leaves is no base.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as TensorShard

from fsdpq.dist import (
    Shard,
    all_gather_rows,
    own_shard,
    rank,
    shard_range,
    wait_for_all,
    world_size,
)
from fsdpq.errors import EnvironmentProblemError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.loading.base_layout import packed_name, plan_layout
from fsdpq.model.loading.source import BaseSource
from fsdpq.model.loading.targets import LoadingTarget, full_shape, loading_targets
from fsdpq.model.meta import count_parameters
from fsdpq.model.quantized_linear import PackedMatrix
from fsdpq.run_files.writing import write_whole
from fsdpq.tensor_files.base_layout import BaseLayout
from fsdpq.tensor_files.base_manifest import (
    CHECKSUMS_NAME,
    CHUNK_BYTES,
    WEIGHTS_NAME,
    BaseManifest,
    Key,
    write_manifest,
)
from fsdpq.tensor_files.header import Entry

WRITE_BYTES = 16 << 20
"""Rows go to the file in pieces of about this size; from a GPU through host memory."""


def write_base(
    model: CausalLM,
    source: BaseSource,
    directory: Path,
    *,
    key: Key,
    dtype: torch.dtype,
    device: torch.device,
    report: Callable[[int, int], Any],
) -> BaseManifest:
    """Writes the base of ``model`` into ``directory`` and returns its manifest.

    Ranks: all (collective).
    Memory: about this rank's rows of the largest tensor.

    Args:
        model: on meta, not sharded, with the layers of its checkpoint, all frozen; left as it was.
        source: fills the targets of ``model``.
        directory: is there and empty.
        key: what the base is made from.
        dtype: of the model; progress is counted in it.
        device: weights are quantized there.
        report: told ``(done_bytes, total_bytes)`` of about this rank's part after each tensor.

    Raises:
        EnvironmentProblemError: the disk is full, before or while writing, or cannot be written.
        CheckpointError: the source cannot be read.
    """
    layout, targets = plan_layout(model), loading_targets(model)
    mesh = init_device_mesh(device.type, (world_size(),))
    total = sum(_num_weights(target) for target in targets.values()) * dtype.itemsize
    done = 0
    if rank() == 0:
        create_file(directory / WEIGHTS_NAME, layout)
    wait_for_all()
    with WeightsFile(directory / WEIGHTS_NAME) as file:
        for name, target in targets.items():
            for tensor, shard in fill_own_rows(source, name, target, mesh, device).items():
                file.write_rows(layout.entries[tensor], shard)
            done += _num_weights(target) * dtype.itemsize
            report(done // world_size(), total // world_size())
        wait_for_all()
        checksums = file.checksum_chunks(layout.num_bytes)
    manifest = _describe(model, layout, checksums, key)
    if rank() == 0:
        with explained_disk_errors(directory):
            write_whole(directory / CHECKSUMS_NAME, checksums)
            write_manifest(directory, manifest)
    wait_for_all()
    return manifest


def create_file(path: Path, layout: BaseLayout) -> None:
    """Makes the file with its header and room for all tensors: a full disk is noticed here.

    Raises:
        EnvironmentProblemError: the disk lacks room, or cannot be written.
    """
    with explained_disk_errors(path.parent):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _reserve(descriptor, layout.num_bytes)
            _write(descriptor, memoryview(layout.header), 0)
        finally:
            os.close(descriptor)


def _reserve(descriptor: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        except OSError as error:
            # Some file systems cannot reserve room; then the writes notice a full disk.
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, num_bytes)


class WeightsFile:
    """The file of a base while its ranks fill it; a context manager.

    Args:
        path: made by `create_file`.
    """

    def __init__(self, path: Path) -> None:
        self._directory = path.parent
        with explained_disk_errors(self._directory):
            self._descriptor = os.open(path, os.O_RDWR)

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def write_rows(self, entry: Entry, shard: Shard) -> None:
        """Writes this rank's rows of one tensor to their place; of a scalar, rank 0 alone."""
        if not entry.shape and rank() != 0:
            return
        row_bytes = entry.num_bytes // entry.shape[0] if entry.shape else 0
        position = entry.start + shard.start * row_bytes
        content = shard.rows.contiguous().reshape(-1).view(torch.uint8)
        with explained_disk_errors(self._directory):
            for piece in content.split(WRITE_BYTES):
                _write(self._descriptor, piece.cpu().numpy().data, position)
                position += piece.numel()

    def checksum_chunks(self, num_bytes: int) -> bytes:
        """Returns the crc32 of every chunk of the file, which is on disk then.

        Ranks: all (collective), once all have written.
        """
        num_chunks = -(-num_bytes // CHUNK_BYTES)
        start, stop = shard_range(num_chunks, rank(), world_size())
        with explained_disk_errors(self._directory):
            own = [
                zlib.crc32(os.pread(self._descriptor, CHUNK_BYTES, index * CHUNK_BYTES))
                for index in range(start, stop)
            ]
            if rank() == 0:
                os.fsync(self._descriptor)
        every = all_gather_rows(torch.tensor(own, dtype=torch.int64), num_chunks)
        return b"".join(value.to_bytes(4, "little") for value in every.tolist())


def fill_own_rows(
    source: BaseSource, name: str, target: LoadingTarget, mesh: DeviceMesh, device: torch.device
) -> dict[str, Shard]:
    """Returns this rank's rows of one target, by the names of the tensors in the file.

    Ranks: all (collective).

    Args:
        source: fills the target.
        name: of the target.
        target: on meta; left as it was.
        mesh: of all ranks.
        device: of the rows.
    """
    if not isinstance(target, PackedMatrix):
        rows = _empty_shard(target, mesh, device)
        source.fill(name, rows)
        return {name: own_shard(rows)}
    on_meta = {packed: target.get_parameter(packed) for packed in target.packed_names}
    try:
        for packed, parameter in on_meta.items():
            target.register_parameter(packed, _empty_shard(parameter, mesh, device))
        source.fill(name, target)
        return {
            packed_name(name, packed): own_shard(target.get_parameter(packed)) for packed in on_meta
        }
    finally:
        for packed, parameter in on_meta.items():
            target.register_parameter(packed, parameter)


def _empty_shard(tensor: Tensor, mesh: DeviceMesh, device: torch.device) -> nn.Parameter:
    """Returns a tensor like ``tensor`` of which each rank has its own rows, as FSDP2 shards it."""
    if tensor.dim() == 0:
        return nn.Parameter(torch.empty_like(tensor, device=device), requires_grad=False)
    start, stop = shard_range(tensor.shape[0], mesh.get_local_rank(), mesh.size())
    local = torch.empty((stop - start, *tensor.shape[1:]), dtype=tensor.dtype, device=device)
    whole = DTensor.from_local(
        local,
        mesh,
        [TensorShard(0)],
        run_check=False,
        shape=tensor.shape,
        stride=torch.empty_like(tensor, device="meta").contiguous().stride(),
    )
    return nn.Parameter(whole, requires_grad=False)


def _num_weights(target: LoadingTarget) -> int:
    return torch.Size(full_shape(target)).numel()


def _write(descriptor: int, content: memoryview, position: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, position)
        content, position = content[written:], position + written


def _describe(model: CausalLM, layout: BaseLayout, checksums: bytes, key: Key) -> BaseManifest:
    num_parameters, num_quantized = count_parameters(model)
    return BaseManifest(
        key=key,
        num_bytes=layout.num_bytes,
        chunk_bytes=CHUNK_BYTES,
        header_bytes=len(layout.header),
        header_sha256=hashlib.sha256(layout.header).hexdigest(),
        checksums_sha256=hashlib.sha256(checksums).hexdigest(),
        num_parameters=num_parameters,
        num_quantized=num_quantized,
    )


@contextmanager
def explained_disk_errors(directory: Path) -> Iterator[None]:
    """Turns what a disk says while a base is written to ``directory`` into what a user can do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk is full" if full else (error.strerror or str(error))
        raise EnvironmentProblemError(
            f"the base {directory} cannot be written: {reason}",
            hint="free space there, or choose a directory on another disk"
            if full
            else "choose a directory that you can write to",
        ) from error
