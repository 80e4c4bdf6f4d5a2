"""What a job leaves in its folder: ``slurm/`` of a run directory, or of a sweep's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fsdpq.launch.runs.run_dir import JOB_FOLDER
from fsdpq.recipe.sections.launch import SlurmOptions
from fsdpq.run_files.writing import write_whole


@dataclass(frozen=True)
class JobFiles:
    """The paths of a job's folder; nothing is created by naming them."""

    folder: Path

    @classmethod
    def of(cls, directory: Path) -> JobFiles:
        """Returns those of the job that works for a directory: a run's, or a sweep's."""
        return cls(directory / JOB_FOLDER)

    @property
    def recipe(self) -> Path:
        """The recipe as it was when the job was submitted: what the job trains."""
        return self.folder / "recipe.yaml"

    @property
    def script(self) -> Path:
        """What was given to ``sbatch``."""
        return self.folder / "job.sh"

    @property
    def record(self) -> Path:
        """Number and settings of the job (`JobRecord`), as JSON."""
        return self.folder / "job.json"

    @property
    def cancelled(self) -> Path:
        """Exists once somebody cancelled the job: it is not queued again."""
        return self.folder / "cancelled"

    @property
    def output(self) -> Path:
        """What the job printed, all its starts one after another; not of an array's tasks."""
        return self.folder / "output.txt"

    @property
    def outputs(self) -> list[Path]:
        """All files that the job printed to, those of an array's tasks too."""
        return sorted(self.folder.glob("output*.txt"))


@dataclass(frozen=True)
class JobRecord:
    """A job that was submitted.

    Attributes:
        id: its number; of an array, the number that all tasks share.
        name: as ``squeue`` shows it.
        submitted: seconds since the epoch.
        num_tasks: of an array, None for a single job.
        options: ``launch.slurm`` of the recipe, what was asked for.
        num_nodes: machines.
        earlier: numbers of jobs that were submitted for the same directory before.
    """

    id: int
    name: str
    submitted: float
    num_tasks: int | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    num_nodes: int = 1
    earlier: list[int] = field(default_factory=list[int])

    @property
    def slurm_options(self) -> SlurmOptions:
        """What was asked for.

        Raises:
            ValidationError: another version of fsdpq wrote it, or somebody changed it.
        """
        return SlurmOptions.model_validate(self.options, strict=True)


def write_record(files: JobFiles, record: JobRecord) -> None:
    """Writes the record of a job into its folder."""
    write_whole(files.record, (json.dumps(asdict(record), indent=2) + "\n").encode())


def read_record(files: JobFiles) -> JobRecord | None:
    """Returns the record of the folder's job; None where none was submitted, or it is damaged."""
    try:
        content = json.loads(files.record.read_text(encoding="utf-8"))
        return JobRecord(**content)
    except (OSError, ValueError, TypeError):
        return None
