"""Where rank 0 writes what the screen and the report read; see `fsdpq.run_files`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsdpq.run_files import append_json_line


class JsonlSink:
    """Appends rows to a JSON-lines file, with the time in seconds since the epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row."""
        append_json_line(self.path, {**row, "time": time.time()})


class NoSink:
    """Takes rows and drops them: what ranks other than 0 have."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Drops one row."""
