"""Reading a file of JSON lines from its beginning, while it grows."""

from __future__ import annotations

import json
from pathlib import Path

from fsdpq.reports.run_record import Row


class FollowedFile:
    """A file of JSON lines; a line counts once its newline is there.

    Args:
        path: of the file, which may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._position = 0, 0

    def read_new(self) -> list[Row]:
        """Returns the rows that came since the last call; see `is_another` too."""
        rows: list[Row] = []
        if not self._path.exists():
            return rows
        with self._path.open("rb") as file:
            self._inode = self._inode_now()
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._position += len(line)
                rows.append(json.loads(line))
        return rows

    def is_another(self) -> bool:
        """Whether another file is in its place since the last call of `read_new`."""
        return bool(self._inode) and self._inode_now() not in (0, self._inode)

    def rewind(self) -> None:
        """Reads from the beginning again."""
        self._inode, self._position = 0, 0

    def _inode_now(self) -> int:
        return self._path.stat().st_ino if self._path.exists() else 0
