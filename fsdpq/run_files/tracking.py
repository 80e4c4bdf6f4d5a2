"""``wandb.json`` of a run directory: what became of sending the run to Weights & Biases."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fsdpq.run_files.writing import write_whole

OUTCOME_CODES = {"finished": 0, "stopped": 75, "failed": 1}
"""How a run ended, as the launcher tells its tracker -> the exit code that the service shows."""


@dataclass
class TrackerState:
    """What the tracker's process says of itself.

    Attributes:
        run_id: of the run at the service; a resumed run goes on there.
        mode: ``online`` or ``offline``, as it is done.
        url: where the run can be seen; empty offline, and before the service has answered.
        directory: wandb's own files of it, which ``wandb sync`` sends.
        state: ``starting``, ``sending``, ``done`` or ``failed``.
        notices: what the user should know, oldest first.
    """

    run_id: str
    mode: str = ""
    url: str = ""
    directory: str = ""
    state: str = "starting"
    notices: list[str] = field(default_factory=list[str])


def read_tracker_state(path: Path) -> TrackerState | None:
    """Returns what ``path`` says, None where it is not there or no such file."""
    try:
        return TrackerState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_tracker_state(path: Path, state: TrackerState) -> None:
    """Writes ``path``, whole."""
    write_whole(path, json.dumps(asdict(state), indent=1).encode())


def first_line(error: Exception) -> str:
    """Returns what an error says in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
