"""Writes one split of a downloaded hub dataset as JSON lines: the one caller of ``datasets``.

A program of its own: the launcher starts it before any rank, since the front half imports neither
this room nor ``datasets``. It reads files that are there and reaches no network. Only plain files
of rows are read, never pickles or dataset scripts, and only inside the dataset's directory,
whatever its README says. https://huggingface.co/docs/datasets/repository_structure
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from fsdpq.recipe.describe import suggest

READABLE_MODULES = ("arrow", "csv", "json", "parquet", "text")
BATCH_ROWS = 1000
MAX_ERROR_CHARACTERS = 240
MAX_LISTED = 10


class HubRowsError(ValueError):
    """The dataset cannot be read; the text says why, ``hint`` what to do (may be empty)."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def write_rows(directory: Path, split: str, target: Path, *, config: str | None = None) -> int:
    """Writes the rows of ``split`` (``train``, ``train[:100]``) to ``target``; returns how many.

    Args:
        directory: the downloaded dataset.
        split: its name, and a slice.
        target: gets JSON lines.
        config: name of a configuration; None is the only or the default one.

    Raises:
        HubRowsError: no such split or configuration, or files of another sort.
    """
    import datasets

    library: Any = datasets
    library.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=target.parent) as cache:
        try:
            names = library.get_dataset_config_names(str(directory))
            default = library.get_dataset_default_config_name(str(directory))
            _check_config(config, [str(name) for name in names], default)
            builder = library.load_dataset_builder(str(directory), config, cache_dir=cache)
            _check_builder(builder, directory)
            builder.download_and_prepare()
            known = list(builder.info.splits)
            _check_split(split.partition("[")[0], known)
            table = builder.as_dataset(split=split).with_format("arrow")
        except HubRowsError:
            raise
        except Exception as error:  # datasets' own errors share no base class
            raise HubRowsError(_short(error)) from error
        with target.open("w", encoding="utf-8", newline="\n") as file:
            for batch in table.iter(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    file.write(json.dumps(row, ensure_ascii=False, default=_stand_in) + "\n")
        return table.num_rows


def _check_config(config: str | None, known: list[str], default: str | None) -> None:
    if config is None and (default is not None or len(known) < 2):
        return
    if config not in known:
        guess = suggest(config, known) if config else None
        hint = f"did you mean `config: {guess}`?" if guess else f"write `config: {known[0]}`"
        what = "it has several configurations" if config is None else f"it has no `{config}`"
        what = f"{what}: {_listed(known[:MAX_LISTED])}"
        more = f" and {len(known) - MAX_LISTED} more" if len(known) > MAX_LISTED else ""
        raise HubRowsError(what + more, hint)


def _check_split(split: str, known: list[str]) -> None:
    if split not in known:
        guess = suggest(split, known)
        hint = f"did you mean `split: {guess}`?" if guess else ""
        raise HubRowsError(f"it has no split `{split}`, only {_listed(known)}", hint)


def _check_builder(builder: Any, directory: Path) -> None:
    module = type(builder).__module__.rpartition(".")[2]
    if module not in READABLE_MODULES:
        raise HubRowsError(f"its files are of the sort `{module}`, not {_listed(READABLE_MODULES)}")
    inside = os.path.normpath(directory) + os.sep
    for files in (builder.config.data_files or {}).values():
        for file in files:
            if not os.path.normpath(file).startswith(inside):
                raise HubRowsError(f"its README names `{file}`, which is not its own file")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_ERROR_CHARACTERS else f"{text[:MAX_ERROR_CHARACTERS]}..."


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _stand_in(value: Any) -> str:
    """Returns text for what JSON cannot hold; the formats read text columns only."""
    return str(value) if not isinstance(value, bytes) else f"<{len(value)} bytes>"


def main() -> int:
    """Reads the command line; the last line on stdout is JSON: ``num_rows`` or ``error``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("split")
    parser.add_argument("target", type=Path)
    parser.add_argument("--config")
    given = parser.parse_args()
    try:
        num_rows = write_rows(given.directory, given.split, given.target, config=given.config)
        answer: dict[str, Any] = {"num_rows": num_rows}
    except HubRowsError as error:
        answer = {"error": str(error), "hint": error.hint}
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
