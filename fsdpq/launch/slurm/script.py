"""The batch script of a job: what Slurm is asked for, then one launcher on every machine.

The launcher runs as a step of the job (``srun``) on one machine too: when a job is preempted,
Slurm (22.05 to 25.05) gives steps the partition's grace time to end after SIGTERM, and tells the
script itself only when that time is over (https://slurm.schedmd.com/preempt.html). ``--signal``
reaches steps as well. The launcher saves and ends with exit code 75; the script then queues the job
again where it was asked to, and Slurm has not done so.

Every value is quoted, and checked against a pattern where a recipe gives it. A recipe brings no
lines of shell: those are the user's own (``Job.setup``).
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import fsdpq
from fsdpq.errors import ExitCode, UsageError
from fsdpq.launch.slurm.job import Job

MAX_EMPTY_STARTS = 5
"""So often a job that is stopped before it trains is queued again: it may have been preempted
early, or its time limit may be too short to start in."""

FIRST_PORT, NUM_PORTS = 20000, 12000
"""Where ranks of several machines meet: below the ports that Linux gives to connections."""

_CHANGED_MIND = (130, 138, 143)
"""Exit codes of a launcher that was stopped with nothing to save: its own, SIGUSR1, SIGTERM."""


def render_script(job: Job) -> str:
    """Returns the batch script of a job.

    Raises:
        UsageError: a path that Slurm cannot be told: it has a line break in it.
    """
    parts = [_directives(job), _about(), _setup(job), _command(job), _start(job)]
    if job.options.requeue:
        parts.append(_requeue(job))
    return "\n".join([*parts, 'exit "$code"', ""])


def _directives(job: Job) -> str:
    options, files = job.options, job.files
    task = "" if job.num_tasks is None else "-%a"
    output = f"{_pattern(files.folder)}/output{task}.txt"
    wanted: list[tuple[str, object]] = [
        ("job-name", job.name),
        ("comment", f"fsdpq {files.folder.parent}"),
        ("chdir", job.work_dir),
        ("output", output),
        ("open-mode", "append"),
        ("nodes", job.nodes),
        ("ntasks-per-node", 1),
        ("cpus-per-task", job.cpus_per_node),
        ("gres", f"gpu:{job.gpus_per_node}" if job.gpus_per_node else None),
        ("mem", f"{options.memory_gib_per_node}G" if options.memory_gib_per_node else None),
        ("partition", options.partition),
        ("account", options.account),
        ("qos", options.qos),
        ("constraint", options.constraint),
        ("time", options.time_minutes),
        ("signal", f"USR1@{options.signal_lead_s}"),
        ("array", _array(job)),
    ]
    lines = [f"#SBATCH --{name}={_quoted(value)}" for name, value in wanted if value is not None]
    lines.append("#SBATCH --requeue" if options.requeue else "#SBATCH --no-requeue")
    return "\n".join(["#!/bin/bash", *lines])


def _array(job: Job) -> str | None:
    if job.num_tasks is None:
        return None
    return f"0-{job.num_tasks - 1}" + (f"%{job.most_at_once}" if job.most_at_once else "")


def _about() -> str:
    text = "One launcher on every machine of the job starts its ranks."
    return f"\n# Written by fsdpq {fsdpq.__version__}. {text}"


def _setup(job: Job) -> str:
    if not job.setup.strip():
        return ""
    return f"\n# The user's own lines.\n{job.setup.rstrip()}\n"


def _command(job: Job) -> str:
    words = "\n".join(f"  {shlex.quote(word)}" for word in job.command)
    return f"command=(\n{words}\n)"


def _start(job: Job) -> str:
    """Slurm's SIGTERM ends a shell and what it would do after, so this one only notes it."""
    number = "1" if job.num_nodes == 1 else '"$SLURM_JOB_NUM_NODES"'
    step = (
        f"srun --nodes={number} --ntasks={number} --ntasks-per-node=1 "
        f"--cpus-per-task={job.cpus_per_node} --kill-on-bad-exit=0 --unbuffered"
    )
    if job.num_nodes == 1:
        return f"""trap : TERM USR1
{step} "${{command[@]}}"
code=$?"""
    return f"""# The ranks meet on the first machine, at a port that another job hardly has.
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$(({FIRST_PORT} + SLURM_JOB_ID % {NUM_PORTS}))
command+=("launch.nnodes=$SLURM_JOB_NUM_NODES" "launch.rdzv_endpoint=$host:$port")
trap : TERM USR1
{step} bash -c 'exec "$@" --node-rank "$SLURM_PROCID"' launcher "${{command[@]}}"
code=$?"""


def _requeue(job: Job) -> str:
    early = "|".join(str(code) for code in _CHANGED_MIND)
    cancelled = shlex.quote(str(job.files.cancelled))
    return f"""
# {int(ExitCode.SAVED)} is saved. The others were stopped with nothing to save yet.
again=no
case "$code" in
  {int(ExitCode.SAVED)}) again=yes ;;
  {early}) [ "${{SLURM_RESTART_COUNT:-0}}" -lt {MAX_EMPTY_STARTS} ] && again=yes ;;
esac
[ -e {cancelled} ] && again=no
# A job that Slurm itself is ending is queued again by Slurm, or was cancelled.
if [ "$again" = yes ]; then
  case "$(scontrol show job -o "$SLURM_JOB_ID")" in
    *" JobState=RUNNING "*)
      echo "queueing the job again"
      scontrol requeue "$SLURM_JOB_ID" ;;
  esac
fi"""


def _quoted(value: object) -> str:
    """Returns a value as ``sbatch`` reads it in a line of the script."""
    text = str(value)
    if re.fullmatch(r"[\w./:@%+,=&|-]+", text, re.ASCII):
        return text
    if any(ord(letter) < ord(" ") for letter in text):
        raise UsageError(f"`{text!r}` cannot be told to Slurm", hint="name another directory")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _pattern(path: Path) -> str:
    """Returns a path in Slurm's pattern for output files, where ``%j`` is the job's number."""
    return str(path).replace("%", "%%")
