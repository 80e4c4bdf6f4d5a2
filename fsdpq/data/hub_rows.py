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

READABLE_MODULES = ("arrow", "csv", "json", "parquet", "text")
BATCH_ROWS = 1000
MAX_ERROR_CHARACTERS = 240


class HubRowsError(ValueError):
    """The dataset cannot be read; the text says why."""


def write_rows(directory: Path, split: str, target: Path) -> int:
    """Writes the rows of ``split`` (``train``, ``train[:100]``) to ``target``; returns how many.

    Raises:
        HubRowsError: no such split, several configurations, or files of another sort.
    """
    import datasets

    library: Any = datasets
    library.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=target.parent) as cache:
        try:
            builder = library.load_dataset_builder(str(directory), cache_dir=cache)
            _check_builder(builder, directory)
            builder.download_and_prepare()
            known = list(builder.info.splits)
            if split.partition("[")[0] not in known:
                raise HubRowsError(f"it has no split `{split}`, only {_listed(known)}")
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
    arguments = parser.parse_args()
    try:
        answer: dict[str, Any] = {
            "num_rows": write_rows(arguments.directory, arguments.split, arguments.target)
        }
    except HubRowsError as error:
        answer = {"error": str(error)}
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
