"""Frozen rows that stay in a base's file while a model trains, and a watch over that file.

What is mapped is read again whenever the system has dropped it, so a file that is written to
changes the weights of a running model. The checksums were compared at the start; afterwards size
and time of change are looked at, and only where they differ the rows are compared once more: a file
that was merely touched stops nothing. A file whose name is gone lives on until it is closed. What
no check can come before is a page that is read after the file was cut: the system ends the process
with SIGBUS then, and the launcher explains it (`fsdpq.launch.ranks.failure`).

FSDP2 pads a copy of a local shard that is smaller than those of other ranks. What is put in front
of it here is as large as theirs: this rank's rows and whatever follows them in the file, which is
cut off again after the gather, as zeros would be.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fsdpq.dist import Shard, own_shard, placement
from fsdpq.errors import DamagedBaseError
from fsdpq.model.loading.base_file import BaseFile, MappedRows, storage_bytes
from fsdpq.tensor_files.base_manifest import WEIGHTS_NAME, damaged


@dataclass(frozen=True)
class FileState:
    """What tells that a file was written to: both change with every write."""

    num_bytes: int
    changed_ns: int


class MappedBase:
    """The rows of a model that are pages of a base's file.

    Args:
        file: the base; stays open.
        modules: every Parameter's module, by the Parameter's ``id``.
    """

    def __init__(self, file: BaseFile, modules: Mapping[int, nn.Module]) -> None:
        self._file = file
        self._modules = modules
        self._mapped: dict[int, MappedRows] = {}
        self._parameters: list[nn.Parameter] = []
        self._state = _state_of(file)
        self._is_gone = False

    @property
    def descriptor(self) -> int:
        """Descriptor of the file."""
        return self._file.descriptor

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return self._file.manifest.num_bytes

    @property
    def ranges(self) -> dict[int, tuple[int, int]]:
        """First byte of this rank's rows and the one after their last, by a Parameter's ``id``."""
        return {key: (mapped.start, mapped.stop) for key, mapped in self._mapped.items()}

    @property
    def disk_bytes_per_s(self) -> float:
        """How fast this rank's rows came from the disk while they were checked.

        0 where most of them were in the page cache, which says nothing about the disk.
        """
        file = self._file
        was_read = storage_bytes() - file.opened_at > file.checked_bytes / 2
        return file.checked_bytes / file.checked_s if was_read and file.checked_s else 0.0

    def map_parameter(self, parameter: nn.Parameter, name: str) -> None:
        """Makes this rank's rows of a frozen parameter pages of the file, in place.

        Args:
            parameter: sharded by FSDP2, on meta.
            name: of the tensor in the file.

        Raises:
            DamagedBaseError: the rows do not fit their checksums.
        """
        shard = own_shard(parameter)
        mapped = self._file.map_rows(name, shard, num_rows=_padded_rows(parameter, shard))
        own_rows = shard.rows.shape[0] if shard.rows.dim() else 1
        if shard.rows.dim() and mapped.rows.shape[0] > own_rows:
            replace_own_rows(parameter, mapped.rows)
            # FSDP2 takes what it finds when something was loaded, and later, where it finds
            # the same storage, pads nothing.
            self._modules[id(parameter)].load_state_dict({}, strict=False)
            replace_own_rows(parameter, mapped.rows[:own_rows])
        else:
            replace_own_rows(parameter, mapped.rows)
        self._mapped[id(parameter)] = mapped
        self._parameters.append(parameter)

    def count_copied_bytes(self) -> int:
        """Returns the bytes of mapped rows that are memory of this process after all.

        Of use after the first step: FSDP2 makes its copies when the model first runs.
        """
        return sum(
            own_shard(parameter).rows.nbytes
            for parameter in self._parameters
            if own_shard(parameter).rows.untyped_storage().data_ptr()
            != self._mapped[id(parameter)].rows.untyped_storage().data_ptr()
        )

    def check_unchanged(self) -> list[str]:
        """Checks that the file is what was mapped; returns notices for the user.

        Raises:
            DamagedBaseError: this rank's rows are not what they were.
        """
        state = _state_of(self._file)
        notices: list[str] = []
        if state != self._state:
            self._check_rows(state)
            self._state = state
            notices.append(
                f"{self._path} was written to or touched while this run uses it; its weights are "
                "what they were"
            )
        if not self._is_gone and not self._has_name():
            self._is_gone = True
            notices.append(
                f"{self._path} was deleted or replaced: this run goes on with the file that it "
                "opened, whose room on the disk is free once it ends"
            )
        return notices

    @property
    def _path(self) -> Path:
        return self._file.directory / WEIGHTS_NAME

    def _check_rows(self, state: FileState) -> None:
        what = f"{WEIGHTS_NAME} was changed while this run uses it: "
        if state.num_bytes < self.file_bytes:
            size = f"it has {state.num_bytes} bytes instead of {self.file_bytes}"
            raise damaged(self._file.directory, what + size)
        self._file.forget_chunk()
        try:
            for mapped in self._mapped.values():
                self._file.check(mapped.entry, mapped.start, mapped.stop)
        except DamagedBaseError as error:
            cause = error.message.partition("is damaged: ")[2]
            raise damaged(self._file.directory, what + cause) from error

    def _has_name(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self.descriptor))
        except OSError:
            return False


def parameter_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Maps the ``id`` of every parameter to the first module that holds it, as FSDP2 does."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), module)
    return found


def replace_own_rows(parameter: nn.Parameter, rows: Tensor) -> None:
    """Makes ``rows`` the local shard of a frozen parameter, in place, without copying them.

    Args:
        parameter: sharded by FSDP2.
        rows: this rank's rows; may be read-only.
    """
    whole: Tensor = rows
    if isinstance(parameter, DTensor):
        # `DTensor.from_local` would copy rows of the host to the mesh's GPU (torch 2.13); FSDP2
        # makes its offloaded shards by the constructor too.
        whole = DTensor(rows, parameter._spec, requires_grad=False)
    # The parameter stays the same object: tied modules and FSDP know it by its identity.
    torch.utils.swap_tensors(parameter, nn.Parameter(whole, requires_grad=False))


def _padded_rows(parameter: nn.Parameter, shard: Shard) -> int:
    """Returns the rows of the ranks that have most of a parameter."""
    if not shard.rows.dim():
        return 1
    return -(-parameter.shape[0] // placement(parameter).size)


def _state_of(file: BaseFile) -> FileState:
    try:
        found = os.fstat(file.descriptor)
    except OSError as error:
        what = f"{WEIGHTS_NAME} cannot be looked at: {error.strerror}"
        raise damaged(file.directory, what) from error
    return FileState(found.st_size, found.st_mtime_ns)
