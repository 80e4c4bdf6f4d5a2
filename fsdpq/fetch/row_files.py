"""Which files a ``data.path`` means: a file, a directory, a pattern, or a list of these.

Directories are read as the hub and ``datasets`` lay them out: a split is named by a file or a
directory (``train.jsonl``, ``validation-00000-of-00002.parquet``, ``test/rows.csv``), and what
``save_to_disk`` wrote lists its own files. What is not read is said in a note.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.describe import list_words, suggest
from fsdpq.rows.files.kinds import READERS, kind_of

MAX_FILES = 100_000
"""Files of a source."""

TRAIN = "train"
"""The split of rows that no name assigns to another."""

_SPLIT_WORDS = {
    "train": TRAIN, "training": TRAIN,
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Words in names, as ``datasets`` takes them."""

_SHARD = re.compile(r"(?P<split>.+)-[0-9]{5}-of-[0-9]{5}")
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_ABOUT = (_STATE, _SPLITS, "dataset_info.json", "dataset_infos.json")
"""Files about a dataset that hold no rows."""


@dataclass
class RowFiles:
    """The files of a source.

    Attributes:
        files: absolute, in the order in which they are read.
        notes: what is not read, one sentence each.
    """

    files: list[Path] = field(default_factory=list[Path])
    notes: list[str] = field(default_factory=list[str])


@dataclass
class _Directory:
    """What is in a directory, at any depth."""

    files: list[Path] = field(default_factory=list[Path])
    others: list[Path] = field(default_factory=list[Path])
    broken: list[Path] = field(default_factory=list[Path])
    seen: set[Path] = field(default_factory=set[Path])


def find_row_files(paths: str | Sequence[str], *, split: str, base_dir: Path, key: str) -> RowFiles:
    """Returns the files that ``paths`` mean.

    Args:
        paths: as ``data.path`` says it.
        split: name of the split.
        base_dir: what relative paths start from.
        key: recipe key of the source, for messages.

    Raises:
        RecipeError: nothing is there, a file's ending is not known, or a directory has no such
            split.
    """
    found = RowFiles()
    given = [paths] if isinstance(paths, str) else list(paths)
    for index, text in enumerate(given):
        where = f"{key}.path" if isinstance(paths, str) else f"{key}.path.{index}"
        try:
            _find(text, split=split, base_dir=base_dir, key=where, found=found)
        except OSError as error:
            name = error.filename or text
            raise _refuse(
                f"`{name}` cannot be read: {error.strerror}", where, "check it"
            ) from error
    twice = next((file for file, count in Counter(found.files).items() if count > 1), None)
    if twice is not None:
        hint = "name it once; to use rows more often, give `weight` in a `mixture`"
        raise _refuse(f"`{key}.path` means `{twice}` twice", f"{key}.path", hint)
    return found


def _find(text: str, *, split: str, base_dir: Path, key: str, found: RowFiles) -> None:
    path = Path(os.path.abspath(base_dir / Path(text).expanduser()))  # noqa: PTH100 - keeps links
    if path.is_dir():
        _find_in_directory(path, split=split, key=key, found=found)
        return
    if split != TRAIN:
        hint = "only a directory has other splits; name the file of that split instead"
        message = f"`{key}: {text}` has no split `{split}`: rows of files are all `{TRAIN}`"
        raise _refuse(message, key.rpartition(".path")[0] + ".split", hint)
    if is_pattern(text) and not path.exists():
        matches = [match for match in expand_pattern(text, base_dir) if match.is_file()]
        if not matches:
            hint = "a relative pattern starts from the recipe's directory"
            raise _refuse(f"`{key}: {text}` matches no file", key, hint)
        found.files += matches
        return
    if not path.is_file():
        what = "is a link to nothing" if path.is_symlink() else "is no file"
        what = what if path.exists() or path.is_symlink() else "is not there"
        hint = "a relative path starts from the recipe's directory"
        raise _refuse(f"`{path}` {what}", key, hint)
    found.files.append(path)


def is_pattern(text: str) -> bool:
    """Whether ``text`` may mean several files."""
    return any(character in text for character in "*?[")


def expand_pattern(text: str, base_dir: Path) -> list[Path]:
    """Returns what the pattern ``text`` matches, sorted; ``**`` is any depth."""
    import glob

    root = "" if Path(text).expanduser().is_absolute() else str(base_dir)
    pattern = str(Path(text).expanduser())
    found = glob.glob(pattern, root_dir=root or None, recursive=True)  # noqa: PTH207 - root_dir
    return [Path(os.path.abspath(base_dir / name)) for name in sorted(found)]  # noqa: PTH100


def _find_in_directory(directory: Path, *, split: str, key: str, found: RowFiles) -> None:
    if (directory / _SPLITS).is_file():
        names = [str(name) for name in _read_about(directory / _SPLITS, "splits", key)]
        _check_split(directory, split, names, key)
        directory = directory / split
    if (directory / _STATE).is_file():
        entries = _read_about(directory / _STATE, "_data_files", key)
        names = [str(cast("dict[str, Any]", entry).get("filename")) for entry in entries]
        if not names or not all((directory / Path(name).name).is_file() for name in names):
            message = f"`{directory}` lacks files that its `{_STATE}` lists"
            raise _refuse(message, key, "save it again (`save_to_disk`)")
        found.files += [directory / Path(name).name for name in names]
        return
    inside = _Directory()
    _walk(directory, inside)
    if inside.broken:
        hint = "remove the link, or bring back what it points to"
        raise _refuse(f"`{inside.broken[0]}` is a link to nothing", key, hint)
    if not inside.files:
        hint = f"readable are files that end in {list_words(READERS)}"
        what = f", only {_listed(inside.others, directory)}" if inside.others else ""
        raise _refuse(f"`{directory}` has no file of rows{what}", key, hint)
    labels = {file: split_of(file.relative_to(directory)) for file in inside.files}
    _check_split(directory, split, sorted(set(labels.values())), key)
    found.files += [file for file in inside.files if labels[file] == split]
    left = [file for file in inside.files if labels[file] != split]
    if left:
        listed = _listed(left, directory)
        found.notes.append(f"{directory}: {listed} not read: other splits than `{split}`")
    if inside.others:
        found.notes.append(f"{directory}: {_listed(inside.others, directory)} not read")


def split_of(path: Path) -> str:
    """Returns the split that the name of a file, or else of a directory above it, tells."""
    name = path.name
    for ending in (s for s in reversed(path.suffixes) if kind_of(path) and not s[1:].isdigit()):
        name = name.removesuffix(ending)
    if shard := _SHARD.fullmatch(name):
        return shard["split"]
    for part in (name, *reversed(path.parts[:-1])):
        for word in re.split(r"[^A-Za-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return TRAIN


def _walk(directory: Path, inside: _Directory) -> None:
    """Collects the files below ``directory``, sorted; a directory that is linked twice once."""
    real = directory.resolve()
    if real in inside.seen:
        return
    inside.seen.add(real)
    for path in sorted(directory.iterdir()):
        if path.name in _ABOUT:
            continue
        if path.name.startswith((".", "_")):
            inside.others.append(path)
        elif path.is_dir():
            _walk(path, inside)
        elif not path.exists():
            inside.broken.append(path)
        elif path.is_file() and kind_of(path):
            inside.files.append(path)
        else:
            inside.others.append(path)
        if len(inside.files) > MAX_FILES:
            message = f"`{directory}` has more than {MAX_FILES} files"
            raise _refuse(message, "data.path", "put their rows into fewer files")


def _read_about(file: Path, name: str, key: str) -> list[Any]:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        entries: Any = content[name]
        if not isinstance(entries, list):
            raise TypeError(f"`{name}` is no list")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        hint = "save the dataset again (`save_to_disk`), or name its files"
        raise _refuse(f"`{file}` cannot be read: {error}", key, hint) from error
    return cast("list[Any]", entries)


def _check_split(directory: Path, split: str, known: list[str], key: str) -> None:
    if split not in known:
        message = f"`{directory}` has no split `{split}`, only {list_words(known, 'and')}"
        guess = suggest(split, known)
        hint = f"did you mean `{guess}`?" if guess else f"choose {list_words(known)} as `split`"
        raise _refuse(message, key.rpartition(".path")[0] + ".split", hint)


def _listed(paths: list[Path], directory: Path) -> str:
    names = [f"`{path.relative_to(directory)}`" for path in paths[:3]]
    more = [f"{len(paths) - 3} more"] if len(paths) > 3 else []
    return ", ".join([*names, *more])


def _refuse(message: str, key: str, hint: str) -> RecipeError:
    return RecipeError([Problem(message, key, None, hint)])
