"""What a run directory cannot do without, kept so that it can be made anew where it was removed."""

from __future__ import annotations

from fsdpq import dist
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import write_whole


class Essentials:
    """The recipe, as given and resolved, and the lock: with a checkpoint, all that resuming needs.

    Args:
        files: of the run; read at once, on rank 0.
    """

    def __init__(self, files: RunFiles) -> None:
        self._logs = files.logs
        paths = (files.recipe, files.resolved, files.lock) if dist.rank() == 0 else ()
        self._contents = {path: path.read_bytes() for path in paths if path.exists()}

    def put_back(self) -> None:
        """Writes those that are not there any more.

        Raises:
            OSError: they cannot be written.
        """
        for path, content in self._contents.items():
            if not path.exists():
                self._logs.mkdir(parents=True, exist_ok=True)
                write_whole(path, content)
