"""Giving a job to Slurm."""

from __future__ import annotations

import time

from fsdpq.errors import EnvironmentProblemError
from fsdpq.launch.slurm.files import JobRecord, read_record, write_record
from fsdpq.launch.slurm.job import Job
from fsdpq.launch.slurm.script import render_script
from fsdpq.launch.slurm.tools import complaint, run_tool
from fsdpq.run_files.writing import write_whole


def submit(job: Job) -> int:
    """Writes the job's script into its folder, gives it to Slurm and returns the job's number.

    Raises:
        UsageError: the folder's name cannot be told to Slurm.
        EnvironmentProblemError: there is no Slurm, or it refuses the job.
        OSError: the folder cannot be written.
    """
    files, script = job.files, render_script(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    write_whole(files.script, script.encode())
    files.cancelled.unlink(missing_ok=True)
    done = run_tool(["sbatch", "--parsable", str(files.script)])
    if done.returncode != 0:
        hint = "`sinfo` lists the partitions; the settings are those of `launch.slurm`"
        raise EnvironmentProblemError(f"Slurm refuses the job: {complaint(done)}", hint=hint)
    job_id = _read_number(done.stdout)
    before = read_record(files)
    record = JobRecord(
        id=job_id,
        name=job.name,
        submitted=time.time(),
        num_tasks=job.num_tasks,
        options=job.options.model_dump(mode="json"),
        num_nodes=job.num_nodes,
        earlier=[*before.earlier, before.id] if before is not None else [],
    )
    write_record(files, record)
    return job_id


def _read_number(answer: str) -> int:
    """Returns the number in ``123`` or ``123;cluster``; a site's plugin may say more before it."""
    words = answer.split()
    number = words[-1].partition(";")[0] if words else ""
    if not number.isdigit():
        message = f"`sbatch` gave no number of a job: {answer.strip() or 'it printed nothing'}"
        raise EnvironmentProblemError(message, hint="look for the job with `squeue --me`")
    return int(number)
