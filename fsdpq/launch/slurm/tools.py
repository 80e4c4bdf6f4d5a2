"""Running Slurm's own commands."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from fsdpq.errors import EnvironmentProblemError

TIMEOUT_S = 60.0
"""A controller that is busy, or being restarted, answers late."""

HERE = "run this where `sbatch` and `squeue` work, a login machine of the cluster"


def run_tool(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs one of Slurm's commands to its end, whatever its exit code.

    Raises:
        EnvironmentProblemError: it is not installed, or does not answer.
    """
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    except OSError as error:
        message = f"Slurm's `{command[0]}` cannot be run: {error.strerror}"
        raise EnvironmentProblemError(message, hint=HERE) from None
    except subprocess.TimeoutExpired:
        message = f"Slurm's `{command[0]}` gave no answer for {TIMEOUT_S:.0f} s"
        hint = "its controller may be down: `scontrol ping` tells"
        raise EnvironmentProblemError(message, hint=hint) from None


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """Returns what a command of Slurm's complained about, in one line and without its own name."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    own = str(done.args[0])
    texts = [line.removeprefix(f"{own}: ").removeprefix("error: ") for line in lines]
    return "; ".join(dict.fromkeys(texts)) or f"`{own}` exits with {done.returncode}"
