"""Reads the headers of all tensor files of a checkpoint directory, and its index. No torch.

A checkpoint is one ``model.safetensors``, or several files and ``model.safetensors.index.json``,
or simply several files. Where the first is there transformers reads nothing else; so does this
module. All that is wrong with any of the files is said at once. Pickles are never opened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fsdpq.errors import CheckpointError
from fsdpq.tensor_files.header import (
    MAX_HEADER_BYTES,
    Entry,
    Header,
    check_header,
    join_problems,
    shorten,
)

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PICKLE_HINT = (
    "pickle files can run code; convert them once on a machine where you trust them: "
    "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)`"
)
DOWNLOAD_HINT = "download the model again, or complete the directory"


@dataclass(frozen=True)
class TensorDirectory:
    """The tensors of a checkpoint directory.

    Attributes:
        path: the directory.
        headers: of its files, in order of their names.
        entries: dtype, shape and byte range of every tensor, by name.
        files: the file of every tensor, by name.
        lost: names of tensors that an index or a header names, and that cannot be read.
    """

    path: Path
    headers: tuple[Header, ...]
    entries: dict[str, Entry]
    files: dict[str, Path]
    lost: frozenset[str] = frozenset()


def read_directory(directory: Path) -> TensorDirectory:
    """Returns the tensors of ``directory``; no tensor's bytes are read.

    Raises:
        CheckpointError: there are pickles only, or no tensors; a file is missing, damaged or cut
            short; the index names what is not there; a tensor is there twice. Names all of it.
    """
    if holds_pickles_only(directory):
        raise CheckpointError(pickles_only(directory), hint=PICKLE_HINT)
    found, problems = check_directory(directory)
    if problems:
        raise CheckpointError(
            join_problems(f"the checkpoint `{directory}` is not whole", problems),
            hint=DOWNLOAD_HINT,
        )
    return found


def check_directory(directory: Path) -> tuple[TensorDirectory, list[str]]:
    """Returns the tensors that can be read, and all that is wrong with the files."""
    paths, weight_map, problems = _list_files(directory)
    headers: list[Header] = []
    entries: dict[str, Entry] = {}
    files: dict[str, Path] = {}
    damaged: set[str] = set()
    for path in paths:
        header, wrong = check_header(path)
        problems += wrong
        if wrong:
            damaged.add(path.name)
        if header is None:
            continue
        headers.append(header)
        for name, entry in header.entries.items():
            if name in files:
                both = f"`{files[name].name}` and in `{path.name}`"
                problems.append(f"tensor `{shorten(name)}` is in {both}")
            entries[name], files[name] = entry, path
    held = {header.path.name: header.entries for header in headers}
    problems += [
        f"`{file}` lacks tensor `{shorten(name)}`, the index says it is there"
        for name, file in sorted(weight_map.items())
        if file in held and file not in damaged and name not in held[file]
    ]
    named = weight_map.keys() | {name for header in headers for name in header.damaged}
    lost = frozenset(named - entries.keys())
    return TensorDirectory(directory, tuple(headers), entries, files, lost), problems


def holds_pickles_only(directory: Path) -> bool:
    """Whether ``directory`` has weights as pickles and none as safetensors."""
    if any(directory.glob("*.safetensors")) or (directory / INDEX_NAME).exists():
        return False
    return any(any(directory.glob(pattern)) for pattern in PICKLE_PATTERNS)


def pickles_only(directory: Path) -> str:
    """Returns the message for such a directory; `PICKLE_HINT` says what to do."""
    return f"`{directory}` holds pickle weights only, no safetensors"


def _list_files(directory: Path) -> tuple[list[Path], dict[str, str], list[str]]:
    """Returns the files that are there, what the index says, and what is wrong with them."""
    index = directory / INDEX_NAME
    if (directory / SINGLE_NAME).exists():
        return [directory / SINGLE_NAME], {}, []
    if not index.exists():
        paths = sorted(directory.glob("*.safetensors"))
        return paths, {}, [] if paths else ["there are no weights (`*.safetensors`)"]
    try:
        weight_map = _read_index(index)
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        return [], {}, [f"the index `{INDEX_NAME}` cannot be read: {reason}"]
    names = sorted(set(weight_map.values()))
    there = [name for name in names if (directory / name).exists()]
    problems = [
        f"`{shorten(name)}` is missing, the index names it" for name in names if name not in there
    ]
    if not names:
        problems.append(f"the index `{INDEX_NAME}` names no file")
    return [directory / name for name in there], weight_map, problems


def _read_index(path: Path) -> dict[str, str]:
    """Returns the file of every tensor; file names are plain, inside the directory."""
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise ValueError(f"it has more than {MAX_HEADER_BYTES} bytes")
    document: Any = json.loads(path.read_text(encoding="utf-8"))
    table = cast("dict[str, Any]", document) if isinstance(document, dict) else {}
    weight_map: Any = table.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError("it has no table `weight_map`")
    for name in cast("dict[str, Any]", weight_map).values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"`{shorten(str(name))}` is no name of a file in the directory")
        if not name.endswith(".safetensors"):
            raise ValueError(f"`{shorten(name)}` is no safetensors file")
    return cast("dict[str, str]", weight_map)
