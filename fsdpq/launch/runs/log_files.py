"""What a run printed: its job, torchrun and every rank; the end of it, and what comes next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fsdpq.errors import UsageError
from fsdpq.launch.slurm.files import JobFiles
from fsdpq.run_files.paths import RunFiles

_BLOCK_BYTES = 64 * 1024


def log_files(files: RunFiles, *, rank: int | None = None) -> list[Path]:
    """Returns the logs of a run that are there: of its job, of torchrun, of its ranks in order.

    Args:
        files: the run.
        rank: only that one's.

    Raises:
        UsageError: that rank has printed nothing.
    """
    ranks = {_number(path): path for path in files.logs.glob("rank-*.log")}
    if rank is not None:
        if rank not in ranks:
            known = f"it has logs of the ranks {', '.join(map(str, sorted(ranks)))}"
            hint = known if ranks else "its ranks have not started yet"
            raise UsageError(f"`{files.root}` has no log of rank {rank}", hint=hint)
        return [ranks[rank]]
    launchers = sorted(files.logs.glob("*torchrun.log"))
    return [*JobFiles.of(files.root).outputs, *launchers, *(ranks[key] for key in sorted(ranks))]


def last_lines(path: Path, count: int) -> tuple[list[str], int]:
    """Returns the last lines of a file, at most ``count``, and how many bytes it has.

    Reads no more of it than that needs. A line that is not ended yet counts.
    """
    with path.open("rb") as file:
        end = position = file.seek(0, 2)
        tail = b""
        while position > 0 and tail.count(b"\n") <= count:
            step = min(_BLOCK_BYTES, position)
            position -= step
            file.seek(position)
            tail = file.read(step) + tail
    lines = tail.decode(errors="replace").split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    return (lines[-count:] if count else []), end


@dataclass
class LogTail:
    """Reads what is appended to several files; one that is emptied is read from its start."""

    positions: dict[Path, int] = field(default_factory=dict[Path, int])

    def read_new(self, paths: Sequence[Path]) -> Iterator[tuple[Path, list[str]]]:
        """Yields the whole lines that came to each of ``paths`` since the last call."""
        for path in paths:
            lines = self._read(path)
            if lines:
                yield path, lines

    def _read(self, path: Path) -> list[str]:
        try:
            with path.open("rb") as file:
                size, start = file.seek(0, 2), self.positions.get(path, 0)
                start = start if start <= size else 0
                file.seek(start)
                new = file.read()
        except OSError:
            return []  # moved away at this moment: a restart puts the logs of the last one aside
        whole = new[: new.rfind(b"\n") + 1]
        self.positions[path] = start + len(whole)
        return whole.decode(errors="replace").split("\n")[:-1]


def _number(path: Path) -> int:
    digits = path.name.removeprefix("rank-").removesuffix(".log")
    return int(digits) if digits.isdigit() else -1
