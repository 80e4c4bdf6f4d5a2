"""What Slurm says about jobs: one question for all of them.

``squeue`` knows what waits and runs, and what ended in the last minutes; ``sacct`` knows the rest
where a cluster keeps accounts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fsdpq.errors import EnvironmentProblemError
from fsdpq.launch.slurm.tools import complaint, run_tool

Phase = Literal["queued", "running", "ended", "unknown"]

_PHASES: dict[str, Phase] = {
    "PENDING": "queued", "CONFIGURING": "queued", "REQUEUED": "queued", "REQUEUE_FED": "queued",
    "REQUEUE_HOLD": "queued", "SPECIAL_EXIT": "queued", "RESV_DEL_HOLD": "queued",
    "RUNNING": "running", "COMPLETING": "running", "SUSPENDED": "running", "STOPPED": "running",
    "SIGNALING": "running", "STAGE_OUT": "running", "RESIZING": "running",
    "COMPLETED": "ended", "CANCELLED": "ended", "FAILED": "ended", "TIMEOUT": "ended",
    "PREEMPTED": "ended", "NODE_FAIL": "ended", "OUT_OF_MEMORY": "ended", "BOOT_FAIL": "ended",
    "DEADLINE": "ended", "REVOKED": "ended",
}  # fmt: skip
"""Slurm's states (https://slurm.schedmd.com/squeue.html#lbAG) -> what they mean here."""

_SQUEUE_FORMAT = "%F|%K|%T|%r|%N|%L|%S"
_EMPTY = ("N/A", "None", "(null)", "None assigned", "Unknown", "")


@dataclass(frozen=True)
class JobFacts:
    """What Slurm says about a job, or about one task of an array.

    Attributes:
        id: the job's number; of a task, that of its array.
        phase: what the state means.
        state: Slurm's own word, ``PENDING``.
        reason: why it waits, or ended; may be empty.
        hosts: machines that it runs on, in Slurm's short form; empty while it waits.
        time_left: until its time limit, as Slurm writes it; empty where that is not known.
        starts: when it is expected to start, or did, as Slurm writes it; may be empty.
        task: index within an array, None outside of one.
    """

    id: int
    phase: Phase
    state: str
    reason: str = ""
    hosts: str = ""
    time_left: str = ""
    starts: str = ""
    task: int | None = None

    @property
    def text(self) -> str:
        """The job in a few words: ``job 17 waits (Priority)``."""
        name = f"job {self.id}" if self.task is None else f"job {self.id}_{self.task}"
        if self.phase == "queued":
            why = f" ({self.reason})" if self.reason else ""
            return f"{name} waits{why}" + (f", starts {self.starts}" if self.starts else "")
        if self.phase == "running":
            return f"{name} on {self.hosts}" if self.hosts else name
        return f"{name} {self.state.lower().replace('_', ' ')}" if self.state else name


def query_jobs(job_ids: Sequence[int]) -> list[JobFacts]:
    """Returns what Slurm says about jobs, a row for every task of an array.

    A job that Slurm has forgotten gets a row of the phase ``unknown``.

    Raises:
        EnvironmentProblemError: there is no Slurm here, or it gives no answer.
    """
    if not job_ids:
        return []
    wanted = sorted(set(job_ids))
    found = _ask_squeue(wanted)
    missing = sorted(set(wanted) - {facts.id for facts in found})
    found += _ask_sacct(missing) if missing else []
    known = {facts.id for facts in found}
    return [*found, *(JobFacts(each, "unknown", "") for each in wanted if each not in known)]


def phase_of(state: str) -> Phase:
    """Returns what one of Slurm's states means; ``CANCELLED by 1000`` is one too."""
    return _PHASES.get(state.partition(" ")[0].rstrip("+"), "unknown")


def _ask_squeue(job_ids: Sequence[int]) -> list[JobFacts]:
    numbers = ",".join(str(each) for each in job_ids)
    done = run_tool(
        ["squeue", "--noheader", "--array", "--states=all", f"--jobs={numbers}",
         f"--format={_SQUEUE_FORMAT}"]
    )  # fmt: skip
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:  # the only one asked for, and long gone
            return []
        hint = "its controller may be down: `scontrol ping` tells"
        raise EnvironmentProblemError(f"Slurm gives no answer: {complaint(done)}", hint=hint)
    return list(_read_squeue(done.stdout.splitlines()))


def _read_squeue(lines: Iterable[str]) -> Iterable[JobFacts]:
    for line in lines:
        fields = [_known(field) for field in line.split("|")]
        if len(fields) != 7 or not fields[0].isdigit():
            continue
        number, task, state, reason, hosts, time_left, starts = fields
        yield JobFacts(
            id=int(number),
            phase=phase_of(state),
            state=state,
            reason=reason,
            hosts=hosts,
            time_left=time_left,
            starts=starts,
            task=int(task) if task.isdigit() else None,
        )


def _ask_sacct(job_ids: Sequence[int]) -> list[JobFacts]:
    numbers = ",".join(str(each) for each in job_ids)
    try:
        done = run_tool(
            ["sacct", "--noheader", "--parsable2", "--allocations", "--array", f"--jobs={numbers}",
             "--format=JobID,State,NodeList,Start"]
        )  # fmt: skip
    except EnvironmentProblemError:
        return []  # squeue answered, and that is enough
    if done.returncode != 0:
        return []  # no accounts are kept here
    found: list[JobFacts] = []
    for line in done.stdout.splitlines():
        fields = [_known(field) for field in line.split("|")]
        number, _, task = fields[0].partition("_")
        if len(fields) != 4 or not number.isdigit():
            continue
        state = fields[1].split()[0] if fields[1] else ""
        index = int(task) if task.isdigit() else None
        phase = phase_of(state)
        found.append(JobFacts(int(number), phase, state, "", fields[2], "", fields[3], index))
    return found


def _known(field: str) -> str:
    text = field.strip()
    return "" if text in _EMPTY else text
