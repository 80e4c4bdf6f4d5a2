"""Brings a base model's tokenizer here without its weights: all that looking at data needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from fsdpq.errors import FetchError
from fsdpq.fetch import hub
from fsdpq.fetch.hashes import hash_file, hash_of_hashes
from fsdpq.fetch.local import CODE_PATTERNS, TOKENIZER_PATTERNS, TOKENIZERS
from fsdpq.fetch.resolve import PACKAGED, FetchedModel, fetch_model
from fsdpq.tensor_files.directory import INDEX_NAME

Report = Callable[[str], None]

TOKENIZER = dataclasses.replace(
    hub.MODEL,
    allow_patterns=TOKENIZER_PATTERNS,
    needed_endings=TOKENIZERS,
    lack="has no tokenizer",
    lack_hint="name a repository with a `tokenizer.json`",
)


def fetch_tokenizer(
    name_or_path: str,
    *,
    revision: str | None,
    base_dir: Path,
    report: Report,
    with_code: bool = False,
) -> FetchedModel:
    """Returns config and tokenizer of the model that the recipe names; see `fetch_model`.

    The directory may lack weights, and the hash is that of the files without them. A packaged model
    comes whole: its tokenizer is in the same file.

    Raises:
        FetchError: it cannot be brought here, or has no tokenizer.
        EnvironmentProblemError: the cache cannot be written.
    """
    directory = (base_dir / Path(name_or_path).expanduser()).absolute()
    source = str(directory)
    if name_or_path.startswith(PACKAGED) or not (
        directory.is_dir() or hub.REPOSITORY_PATTERN.fullmatch(name_or_path)
    ):
        return fetch_model(name_or_path, revision=revision, base_dir=base_dir, report=report)
    found_revision = None
    if not directory.is_dir():
        directory = hub.download_snapshot(
            name_or_path, revision=revision, report=report, sort=TOKENIZER, with_code=with_code
        )
        source, found_revision = f"{hub.MODEL.page}{name_or_path}", directory.name
    elif revision is not None:
        raise FetchError(
            f"`model.revision` has no meaning for `{name_or_path}`",
            hint="remove it: only repositories of the hub have revisions",
        )
    patterns = (*TOKENIZER_PATTERNS, *(CODE_PATTERNS if with_code else ()))
    files = {path.name: path for pattern in patterns for path in directory.glob(pattern)}
    files.pop(INDEX_NAME, None)
    if not any(name in files for name in TOKENIZERS):
        hint = "complete the directory, or name a model of the hub (`org/name`)"
        raise FetchError(f"`{directory}` has no tokenizer (`tokenizer.json`)", hint=hint)
    digest = hash_of_hashes({name: hash_file(path) for name, path in files.items()})
    return FetchedModel(directory, source, digest, "", found_revision)
