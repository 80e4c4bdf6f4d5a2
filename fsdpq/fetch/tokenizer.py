"""Brings a model's tokenizer here without its weights, and hashes the files that make it up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fsdpq.errors import FetchError
from fsdpq.fetch import hub
from fsdpq.fetch.cache import Report
from fsdpq.fetch.hashes import hash_file
from fsdpq.fetch.local import CODE_PATTERNS
from fsdpq.fetch.resolve import PACKAGED, fetch_model

TOKENIZER_PATTERNS = (
    "config.json", "tokenizer*.json", "*.model", "*.jinja", "added_tokens.json",
    "special_tokens_map.json", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
"""The files that decide about a token; ``config.json`` names the tokenizer's class."""

_HUB = replace(
    hub.MODEL,
    allow_patterns=TOKENIZER_PATTERNS,
    needed_endings=("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    lack="has no tokenizer",
    lack_hint="name a model of the hub that has one (`tokenizer.json`)",
)


def fetch_tokenizer(
    name_or_path: str,
    *,
    revision: str | None,
    base_dir: Path,
    report: Report,
    with_code: bool = False,
) -> Path:
    """Returns a directory with the tokenizer of the model that a recipe names.

    Of a repository of the hub only the tokenizer's files are downloaded. A packaged model is small
    and comes whole. For the arguments see `fsdpq.fetch.resolve.fetch_model`.

    Raises:
        FetchError: it cannot be brought here; says why and what to do.
    """
    directory = base_dir / Path(name_or_path).expanduser()
    packaged = name_or_path.startswith(PACKAGED)
    if not packaged and directory.is_dir():
        found = directory.resolve()
        if not any(name.endswith(_HUB.needed_endings) for name in hash_tokenizer(found)):
            hint = "complete the directory, or name a model of the hub (`org/name`)"
            raise FetchError(f"`{found}` has no tokenizer (`tokenizer.json`)", hint=hint)
        return found
    if packaged or not hub.REPOSITORY_PATTERN.fullmatch(name_or_path):
        model = fetch_model(name_or_path, revision=revision, base_dir=base_dir, report=report)
        return model.directory
    return hub.download_snapshot(
        name_or_path, revision=revision, report=report, sort=_HUB, with_code=with_code
    )


def hash_tokenizer(directory: Path, *, with_code: bool = False) -> dict[str, str]:
    """Returns the sha256 of every file in a model's directory that decides about a token.

    Args:
        directory: of the model, or of its tokenizer alone.
        with_code: its Python files decide too.
    """
    patterns = (*TOKENIZER_PATTERNS, *(CODE_PATTERNS if with_code else ()))
    paths = {path.name: path for pattern in patterns for path in directory.glob(pattern)}
    return {name: hash_file(path) for name, path in sorted(paths.items())}
