"""The jobs of runs, as `fsdpq.launch.runs.status` wants them: Slurm is asked once for all."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fsdpq.errors import EnvironmentProblemError, ExitCode
from fsdpq.launch.runs.launcher_record import read_launcher
from fsdpq.launch.runs.log_files import last_lines
from fsdpq.launch.runs.status import JobOf, RunJob
from fsdpq.launch.slurm.files import JobFiles, read_record
from fsdpq.launch.slurm.query import JobFacts, query_jobs
from fsdpq.run_files.paths import RunFiles

ASK_S = 5.0
"""Time between two questions to Slurm about the same job."""

_LAST_LINES = 20


def jobs_of(runs: Sequence[RunFiles]) -> JobOf:
    """Returns a function that gives the job of each of ``runs``, as Slurm knows it now.

    A run that has come to its end is not asked about, and where Slurm gives no answer the files of
    a run are all that there is.
    """
    numbers: dict[RunFiles, int] = {}
    for files in runs:
        record, launcher = read_record(JobFiles.of(files.root)), read_launcher(files)
        if record is not None and (launcher is None or launcher.exit_code != ExitCode.OK):
            numbers[files] = record.id
    silence, facts = "", dict[int, JobFacts]()
    try:
        facts = {each.id: each for each in query_jobs(list(numbers.values()))}
    except EnvironmentProblemError as error:
        silence = error.message
    jobs = {
        files: _as_run_job(files, facts.get(number), number, silence)
        for files, number in numbers.items()
    }
    return jobs.get


class AskedNowAndThen:
    """The job of a run that is looked at again and again: Slurm is asked every few seconds."""

    def __init__(self) -> None:
        self._asked = -ASK_S
        self._known: RunJob | None = None

    def __call__(self, files: RunFiles) -> RunJob | None:
        """Returns the job of a run, None where it has none."""
        if time.monotonic() - self._asked >= ASK_S:
            self._known = jobs_of([files])(files)
            self._asked = time.monotonic()
        return self._known


def _as_run_job(files: RunFiles, facts: JobFacts | None, number: int, silence: str) -> RunJob:
    if facts is None:
        return RunJob(f"Slurm job {number} ({silence})")
    where = f"Slurm {facts.text}"
    if facts.phase in ("queued", "running"):
        return RunJob(where, waits=facts.phase == "queued", runs=facts.phase == "running")
    what = facts.state.lower().replace("_", " ") or "gone"
    return RunJob(where, error=f"job {number} is {what}: {_last_words(JobFiles.of(files.root))}")


def _last_words(files: JobFiles) -> str:
    """Returns the last line that a job printed; Slurm's own words come first, errors last."""
    try:
        lines, _ = last_lines(files.output, _LAST_LINES)
    except OSError:
        return "it printed nothing"
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
