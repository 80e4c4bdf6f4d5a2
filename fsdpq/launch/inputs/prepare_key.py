"""What prepared data is made from, as plain JSON data: its key in the cache.

Everything that decides about a token or a row is in it, by content: files and not their names,
the texts of tokenizer and templates, the options, the seed where it is used, and the versions of
the libraries and of our own code. So a file that is edited in place gives another key, and the
difference between two keys says why data must be prepared anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import fsdpq
from fsdpq.cards.chat_templates import BUILT_IN_TEMPLATES
from fsdpq.fetch.hashes import hash_file, hash_of_hashes
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.recipe.sections.source import SourceOptions
from fsdpq.rows.prepared_files import FORMAT
from fsdpq.rows.source import DataSources, RowSource

Key = dict[str, Any]

PACKAGES = ("jinja2", "tokenizers", "torch", "transformers")
"""Packages whose version may decide about a token, or about which rows are held out."""

OWN_CODE = ("data", "rows")
"""Rooms whose code decides about tokens and rows."""

NOT_IN_KEY = ("mixture", "eval", "shuffle", "streaming", "stream_window")
"""Options of ``data`` that the sources say already, or that decide about nothing here."""


def prepare_key(recipe: Recipe, sources: DataSources, tokenizer: Mapping[str, str]) -> Key:
    """Returns what the prepared data of a recipe is made from.

    Args:
        recipe: the recipe.
        sources: what the launcher found for its ``data``.
        tokenizer: file of the tokenizer -> sha256.
    """
    options = recipe.data
    draws = bool(options.eval_fraction) or any(s.weight is not None for s in sources.train)
    return {
        "format": FORMAT,
        "train": [_source_key(source) for source in sources.train],
        "eval": None if sources.eval is None else _source_key(sources.eval),
        "options": _options_key(options),
        "seed": recipe.training.seed if draws else None,
        "template": _hash_template(options, sources),
        "tokenizer": dict(sorted(tokenizer.items())),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "code": hash_own_code(),
    }


def key_digest(key: Key) -> str:
    """Returns 16 hex digits for a directory's name: equal for keys without `key_differences`."""
    sources = [*key["train"], key["eval"]]
    text = json.dumps(
        {**key, "train": [_content(s) for s in sources], "eval": None}, sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def key_differences(found: Key, wanted: Key) -> list[str]:
    """Returns in words what changed since ``found`` was made; empty for equal content."""
    if found["format"] != wanted["format"]:
        return ["another version of fsdpq made it"]
    differences = _sources_differences(found["train"], wanted["train"], "data")
    own_eval = [[key["eval"]] if key["eval"] else [] for key in (found, wanted)]
    differences += _sources_differences(own_eval[0], own_eval[1], "data.eval")
    old, new = found["options"], wanted["options"]
    for name in sorted({*old, *new}):
        differences += _was(f"data.{name}", old.get(name), new.get(name))
    differences += _was("training.seed", found["seed"], wanted["seed"])
    if found["template"] != wanted["template"] and old == new:
        differences.append(f"{new['chat_template']} changed")
    differences += _tokenizer_differences(found["tokenizer"], wanted["tokenizer"])
    for name, version in wanted["versions"].items():
        differences += _was(name, found["versions"].get(name), version)
    if found["code"] != wanted["code"]:
        differences.append("fsdpq's own code for data changed")
    return differences


def shares_files(found: Key, wanted: Key) -> bool:
    """Whether two keys have a file of rows in common, by its path or its content."""
    return any(
        {file[part] for file in _all_files(found)} & {file[part] for file in _all_files(wanted)}
        for part in ("path", "sha256")
    )


@cache
def hash_own_code() -> str:
    """Returns one hash over fsdpq's code that decides about tokens and rows."""
    root = Path(fsdpq.__file__).parent
    files = {
        path.relative_to(root).as_posix(): hash_file(path)
        for room in OWN_CODE
        for path in sorted((root / room).rglob("*"))
        if path.suffix in (".py", ".jinja")
    }
    return hash_of_hashes(files)


def _source_key(source: RowSource) -> dict[str, Any]:
    return {
        "name": source.name,
        "files": [{"path": str(file.path), "sha256": file.sha256} for file in source.files],
        "format": source.format,
        "split": source.split,
        "columns": dict(sorted(source.columns.items())),
        "max_rows": source.max_rows,
        "weight": source.weight,
    }


def _options_key(options: DataOptions) -> dict[str, Any]:
    left_out = {*SourceOptions.model_fields, *NOT_IN_KEY}
    return options.model_dump(mode="json", exclude=left_out)


def _hash_template(options: DataOptions, sources: DataSources) -> str | None:
    """Returns the hash of a template's text, None for the tokenizer's own, in its files."""
    built_in = BUILT_IN_TEMPLATES.get(options.chat_template or "")
    text = built_in.source if built_in is not None else sources.chat_template
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _content(source: dict[str, Any] | None) -> Any:
    """Returns a source without the names of its files."""
    if source is None:
        return None
    return {**source, "name": "", "files": [file["sha256"] for file in source["files"]]}


def _all_files(key: Key) -> list[dict[str, str]]:
    return [file for source in key["train"] for file in source["files"]]


def _sources_differences(
    found: list[dict[str, Any]], wanted: list[dict[str, Any]], key: str
) -> list[str]:
    if len(found) != len(wanted):
        return _was(f"number of sources of `{key}`", len(found), len(wanted))
    differences: list[str] = []
    for number, (old, new) in enumerate(zip(found, wanted, strict=True)):
        place = key if len(found) == 1 else f"{key}.mixture.{number}"
        differences += _files_differences(old["files"], new["files"])
        for name in ("format", "split", "columns", "max_rows", "weight"):
            differences += _was(f"{place}.{name}", old[name], new[name])
    return differences


def _files_differences(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> list[str]:
    if [file["sha256"] for file in found] == [file["sha256"] for file in wanted]:
        return []
    old = {file["path"]: file["sha256"] for file in found}
    new = {file["path"]: file["sha256"] for file in wanted}
    same_path = [path for path in new if path in old]
    changed = [f"{Path(path).name} changed" for path in same_path if old[path] != new[path]]
    added = [f"{Path(path).name} is new" for path in _others(new, old)]
    gone = [f"{Path(path).name} is not used any more" for path in _others(old, new)]
    return [*changed, *added, *gone] or ["the order of the files changed"]


def _others(files: Mapping[str, str], than: Mapping[str, str]) -> list[str]:
    """Returns the files that are not among the others, by their path or their content."""
    contents = set(than.values())
    return [path for path, sha256 in files.items() if path not in than and sha256 not in contents]


def _tokenizer_differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    names = sorted({*found, *wanted})
    changed = [name for name in names if found.get(name) != wanted.get(name)]
    return [f"the tokenizer is another ({', '.join(changed)})"] if changed else []


def _was(name: str, old: Any, new: Any) -> list[str]:
    return [] if old == new else [f"{name} was {_shown(old)} and is {_shown(new)}"]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
