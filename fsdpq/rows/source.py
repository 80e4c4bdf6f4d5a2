"""Where a run's rows are: what the launcher found for the recipe's ``data``, kept in the lock file.

The ranks and the process that prepares the data read it from there, so that all of them read the
same files in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SourceFile:
    """One file of rows.

    Attributes:
        path: absolute.
        sha256: hash of its content.
    """

    path: Path
    sha256: str


@dataclass(frozen=True)
class RowSource:
    """The rows of one source, all read once and found good.

    Attributes:
        name: where they came from, for people.
        files: in the order in which they are read; none where rows are made up.
        format: their format, never ``auto``.
        format_why: what told it where the recipe says ``auto``, else empty.
        num_rows: good rows.
        num_bad_rows: rows left out because they are not of the format (``data.on_bad_row: skip``).
        revision: commit of the hub's repository, None for other sources.
        split: slice of the files' rows, in rows from the start (``train[20:40]``); ``train`` is
            all. Rows are counted as they stand in the files, bad ones too.
        columns: name of a column in the format -> its name in the files.
        max_rows: use so many good rows at most, None for all.
        weight: share of the mixture, None where rows are used once each.
        key: recipe key that names the source (``data``, ``data.mixture.1``, ``data.eval``), for
            messages.
    """

    name: str
    files: tuple[SourceFile, ...]
    format: str
    num_rows: int
    num_bad_rows: int = 0
    revision: str | None = None
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    max_rows: int | None = None
    weight: float | None = None
    key: str = "data"
    format_why: str = ""


@dataclass(frozen=True)
class DataSources:
    """Everything that a recipe's ``data`` names.

    Attributes:
        train: the parts of the mixture, one where there is no mixture.
        eval: rows for evaluation from a source of their own, None where there is none.
        chat_template: text of the file that ``data.chat_template`` names, None where it names none.
    """

    train: tuple[RowSource, ...]
    eval: RowSource | None = None
    chat_template: str | None = None

    @property
    def every(self) -> tuple[RowSource, ...]:
        """The sources of training, then that of evaluation."""
        return self.train if self.eval is None else (*self.train, self.eval)

    @property
    def num_rows(self) -> int:
        """Rows to train on before any is held out."""
        return sum(source.num_rows for source in self.train)

    def as_json(self) -> dict[str, Any]:
        """Returns the same as plain JSON data."""
        return {
            "train": [_source_as_json(source) for source in self.train],
            "eval": None if self.eval is None else _source_as_json(self.eval),
            "chat_template": self.chat_template,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DataSources:
        """Returns what `as_json` wrote."""
        return cls(
            tuple(_source_from_json(entry) for entry in data["train"]),
            None if data["eval"] is None else _source_from_json(data["eval"]),
            data.get("chat_template"),
        )


def _source_as_json(source: RowSource) -> dict[str, Any]:
    files = [{"path": str(file.path), "sha256": file.sha256} for file in source.files]
    return {**vars(source), "files": files, "columns": dict(source.columns)}


def _source_from_json(entry: Mapping[str, Any]) -> RowSource:
    files = tuple(SourceFile(Path(file["path"]), file["sha256"]) for file in entry["files"])
    fields: dict[str, Any] = {**entry, "files": files}
    return RowSource(**fields)
