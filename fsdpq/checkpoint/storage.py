"""Where torch's distributed checkpoint (DCP) writes to and reads from: safetensors and JSON.

DCP's own storage keeps its metadata as a pickle and reads it by ``pickle.load``, and every object
by ``torch.load(weights_only=False)`` (torch 2.13, ``filesystem.py``, ``default_planner.py``): a
checkpoint of a stranger could run code. Its Hugging Face storage has no pickles, but builds a
whole file in memory and keeps no sizes of whole tensors. Here a rank's tensors go to one
safetensors file, hashed on the way, and ``index.json`` says which rows of which tensor it has.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
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
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from fsdpq.protocols import Piece
from fsdpq.run_files.writing import sync, write_whole
from fsdpq.tensor_files.checkpoint_manifest import (
    INDEX_NAME,
    STATE_NAME,
    SavedCheckpoint,
    SavedFile,
    damaged,
    draft_directory,
    read_document,
    write_manifest,
)

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Names of safetensors -> dtypes of torch."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredPart:
    """Where rows went: DCP passes it from the rank that wrote them to rank 0."""

    file: str
    saved: SavedFile


class CheckpointWriter(StorageWriter):
    """Builds one checkpoint in a draft and renames it when every byte of it is on disk.

    Args:
        directory: the checkpoint; it must not exist.
        state: all that is no tensor, as JSON text, which training cannot change any more; rank
            0's is written.
        describe: returns the manifest for the files that were written.
    """

    def __init__(
        self,
        directory: Path,
        state: bytes,
        describe: Callable[[dict[str, SavedFile]], SavedCheckpoint],
    ) -> None:
        self._directory = directory
        self._draft = draft_directory(directory)
        self._state = state
        self._describe = describe
        self._rank = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *_args: Any, **kwargs: Any) -> None:
        """Makes the draft, on rank 0."""
        self._rank = int(kwargs.get("rank") or 0)
        if is_coordinator:
            self._draft.parent.mkdir(parents=True, exist_ok=True)
            remove_tree(self._draft)
            self._draft.mkdir()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leaves the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Leaves the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's part of the plan as one file, synced."""
        done: Future[list[WriteResult]] = Future()
        tensors = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        results: list[WriteResult] = []
        if tensors:
            name = f"rank-{self._rank:05d}.safetensors"
            saved = write_tensors(self._draft / name, tensors)  # pyright: ignore[reportArgumentType]
            results = [
                WriteResult(item.index, item.tensor_storage_size() or 0, StoredPart(name, saved))
                for item in plan.items
            ]
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes index, state and manifest, and puts the checkpoint in its place, on rank 0."""
        parts = {result.index: result.storage_data for each in results for result in each}
        files = {part.file: part.saved for part in parts.values()}
        index = json.dumps(_index(metadata, parts)).encode()
        for name, content in ((INDEX_NAME, index), (STATE_NAME, self._state)):
            write_whole(self._draft / name, content)
            files[name] = SavedFile(len(content), hashlib.sha256(content).hexdigest())
        write_manifest(self._draft, self._describe(files))
        remove_tree(self._directory)  # a damaged one that training has come past again
        self._draft.rename(self._directory)
        sync(self._directory.parent)

    def discard(self) -> None:
        """Removes the draft."""
        remove_tree(self._draft)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Takes any: the directory was named when the writer was made."""
        del checkpoint_id
        return True


class CheckpointReader(StorageReader):
    """Reads one checkpoint whose bytes have been checked.

    Args:
        directory: of the checkpoint.
        saved: its manifest.
    """

    def __init__(self, directory: Path, saved: SavedCheckpoint) -> None:
        self._directory = directory
        self._saved = saved
        self.metadata = read_index(directory, saved)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.metadata.state_dict_metadata)

    def empty_piece(self, name: str) -> Piece:
        """Returns memory on the host for the whole of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        saved = self.metadata.state_dict_metadata.get(name)
        if not isinstance(saved, TensorStorageMetadata):
            raise damaged(self._directory, f"it has no `{name}`")
        rows = torch.zeros(saved.size, dtype=saved.properties.dtype)
        return Piece(rows, tuple(saved.size))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing: a reader reads one checkpoint."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Returns the index as DCP wants it."""
        return self.metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_kwargs: Any
    ) -> None:
        """Does nothing: the index was read when the reader was made."""
        del metadata, is_coordinator

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leaves the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leaves the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies saved rows into the pieces that want them.

        Raises:
            CheckpointError: a file does not hold what the index says.
        """
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.metadata.storage_data[item.storage_index], []).append(item)
        for name, items in by_file.items():
            try:
                with safe_open(self._directory / name, framework="pt") as opened:
                    for item in items:
                        planner.resolve_tensor(item).copy_(_read_part(opened, item))
            except (SafetensorError, OSError, RuntimeError) as error:
                raise damaged(self._directory, f"{name} does not fit its index: {error}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Takes any: the directory was named when the reader was made."""
        del checkpoint_id
        return True


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> SavedFile:
    """Writes a safetensors file, synced to disk, and returns its size and hash.

    ``safetensors.torch.save_file`` does not say what it wrote; reading it again costs as much as
    writing it. Memory: nothing, for tensors on the host that are contiguous.

    Args:
        path: must not exist.
        tensors: on the host.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        entry = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("xb") as file:
        for part in (len(text).to_bytes(8, "little"), text, *map(_bytes_of, tensors.values())):
            digest.update(part)
            file.write(part)
            num_bytes += len(part)
        file.flush()
        os.fsync(file.fileno())
    return SavedFile(num_bytes, digest.hexdigest())


def read_index(directory: Path, saved: SavedCheckpoint) -> Metadata:
    """Returns ``index.json`` as DCP's metadata; its storage data maps parts to file names.

    Raises:
        CheckpointError: it is not what `CheckpointWriter` writes.
    """
    document = read_document(directory, INDEX_NAME)
    tensors: dict[str, Any] = {}
    files: dict[MetadataIndex, str] = {}
    try:
        for name, entry in document["tensors"].items():
            chunks = [
                ChunkStorageMetadata(torch.Size(part["offsets"]), torch.Size(part["shape"]))
                for part in entry["parts"]
            ]
            properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
            size = torch.Size(entry["shape"])
            tensors[name] = TensorStorageMetadata(properties, size, chunks)
            for part in entry["parts"]:
                if part["file"] not in saved.files:
                    raise ValueError(f"{part['file']} is not in the manifest")
                files[MetadataIndex(name, part["offsets"])] = part["file"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(directory, f"{INDEX_NAME} cannot be understood ({error})") from error
    return Metadata(tensors, storage_data=files, storage_meta=StorageMeta())


def remove_tree(directory: Path) -> None:
    """Removes a directory if it is there; nobody sees a half of a checkpoint meanwhile.

    Raises:
        OSError: it cannot be removed.
    """
    if not directory.exists():
        return
    if not directory.name.startswith("."):
        doomed = directory.with_name(f".{directory.name}.{time.time_ns()}.partial")
        directory.rename(doomed)
        directory = doomed
    shutil.rmtree(directory)


def _index(metadata: Metadata, parts: Mapping[MetadataIndex, StoredPart]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise TypeError(f"`{name}` is no tensor")
        tensors[name] = {
            "dtype": NAMES[tensor.properties.dtype],
            "shape": list(tensor.size),
            "parts": [
                {
                    "file": parts[MetadataIndex(name, chunk.offsets)].file,
                    "offsets": list(chunk.offsets),
                    "shape": list(chunk.sizes),
                }
                for chunk in tensor.chunks
            ],
        }
    return {"tensors": tensors}


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # pyright: ignore[reportArgumentType]


def _read_part(opened: Any, item: ReadItem) -> Tensor:
    name, lengths = item.storage_index.fqn, item.lengths
    if not lengths:
        return opened.get_tensor(name)
    ranges = zip(item.storage_offsets, lengths, strict=True)
    return opened.get_slice(name)[tuple(slice(at, at + length) for at, length in ranges)]
