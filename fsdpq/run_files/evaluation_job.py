"""What the ranks of ``fsdpq eval`` are to do, and the record that they leave; for both halves.

The launcher writes a job beside the resolved recipe and the lock; the ranks write the record, for a
run into its folder ``evals``. `Record` is the contract of that file, of ``fsdpq eval --json`` and
of the report.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import write_whole

FORMAT = 1
"""Version of the record."""

JOB_NAME = "evaluation.json"
"""File of the job in the run directory of the ranks."""

BASE, TRAINED = "base", "trained"
"""The models that are measured, in this order: before what was trained is loaded, and after."""


CHECKPOINT = "checkpoint"
"""How what was trained is stored where no run exported it."""


@dataclass(frozen=True)
class EvaluationJob:
    """What is measured.

    Attributes:
        output: file of the record.
        about: what the launcher knows of it, part of the record.
        rows: ``held_out`` or ``train`` of the run directory's data, ``text`` for the whole text of
            its files, ``none``.
        stride: tokens that each window of a text scores; 0 where rows are measured.
        models: `BASE`, `TRAINED` or both.
        trained: directory of what was trained, None for the base alone.
        trained_format: how it is stored: a value of ``export.format``, or `CHECKPOINT`.
        include_path: folder of tasks that the command line named, None for none.
        run_dir: of the run, whose report is made anew; None for a recipe.
    """

    output: Path
    about: Mapping[str, Any]
    rows: str = "held_out"
    stride: int = 0
    models: Sequence[str] = (TRAINED,)
    trained: Path | None = None
    trained_format: str = "peft"
    include_path: Path | None = None
    run_dir: Path | None = None

    def write(self, files: RunFiles) -> None:
        """Writes it into the run directory of the ranks."""
        plain = dataclasses.asdict(self)
        write_whole(files.root / JOB_NAME, json.dumps(plain, default=str).encode())

    @classmethod
    def read(cls, files: RunFiles) -> EvaluationJob:
        """Returns what `write` wrote."""
        fields = json.loads((files.root / JOB_NAME).read_text(encoding="utf-8"))
        for name in ("output", "trained", "include_path", "run_dir"):
            fields[name] = None if fields[name] is None else Path(fields[name])
        return cls(**fields)


@dataclass(frozen=True)
class SourceLoss:
    """The loss over the rows of one source.

    Attributes:
        name: of the source.
        loss: mean over its tokens that carry loss, in nats.
        perplexity: exp of it.
        num_tokens: tokens that carry loss.
        num_rows: rows, or windows of a text.
    """

    name: str
    loss: float
    perplexity: float
    num_tokens: int
    num_rows: int


@dataclass(frozen=True)
class ModelResult:
    """What one model got.

    Attributes:
        loss: mean over all tokens that carry loss, in nats; None where no rows were measured.
        perplexity: exp of it.
        num_tokens: tokens that carry loss.
        num_rows: rows, or windows of a text.
        sources: the same for each source where there are several.
        tasks: task of lm-evaluation-harness -> its metrics, as the harness names them
            (``acc,none``, ``acc_stderr,none``).
    """

    loss: float | None = None
    perplexity: float | None = None
    num_tokens: int = 0
    num_rows: int = 0
    sources: Sequence[SourceLoss] = ()
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Record:
    """One evaluation, as it is kept.

    Attributes:
        about: ``name``, ``run`` or ``recipe``, ``model``, ``data``, ``stride``, ``seq_len``,
            ``trained``, ``step``, ``evaluation``, ``overrides``, ``versions``, ``created``.
        setup: ``world_size``, ``device``, ``dtype``, ``data_digest``, ``seconds``.
        models: `BASE` or `TRAINED` -> what it got.
    """

    about: Mapping[str, Any]
    setup: Mapping[str, Any]
    models: Mapping[str, ModelResult]

    def as_json(self) -> dict[str, Any]:
        """Returns it as plain JSON data."""
        models = {name: dataclasses.asdict(result) for name, result in self.models.items()}
        return {"format": FORMAT, **self.about, **self.setup, "models": models}
