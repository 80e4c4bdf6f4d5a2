"""Which modules a piece of code imports, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported_by(code: str, names: Sequence[str]) -> list[str]:
    """Returns those of ``names`` that are imported once ``code`` has run."""
    code += f"\nimport sys\nprint(*(name for name in {list(names)!r} if name in sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()
