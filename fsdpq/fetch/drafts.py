"""Directories that are either whole or not there: built beside their place, renamed when whole."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from fsdpq.fetch.holds import claim
from fsdpq.run_files.writing import sync


@contextmanager
def draft_of(final: Path) -> Generator[Path, None, None]:
    """Gives an empty directory that becomes ``final`` where the block ends without an error.

    Its parent must exist. What is in it must be synced to disk by the block (`sync`).

    Raises:
        OSError: ``final`` holds something by now, or the disk refuses.
    """
    draft = Path(tempfile.mkdtemp(prefix=_prefix(final), dir=final.parent))
    try:
        with claim(draft):
            yield draft
            sync(draft)
            draft.chmod(0o755)
            draft.rename(final)
            sync(final.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def remove_drafts(final: Path) -> None:
    """Removes what killed builds of ``final`` left; drafts that somebody builds stay."""
    for draft in final.parent.glob(f"{_prefix(final)}*"):
        with claim(draft) as free:
            if free:
                shutil.rmtree(draft, ignore_errors=True)


def remove_whole(final: Path) -> None:
    """Removes ``final`` so that nobody sees a half of it."""
    doomed = final.parent / f"{_prefix(final)}doomed"
    shutil.rmtree(doomed, ignore_errors=True)
    final.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def is_draft(directory: Path) -> bool:
    """Whether ``directory`` is one that somebody builds, or was killed building."""
    return directory.name.startswith(".") and ".building-" in directory.name


def _prefix(final: Path) -> str:
    return f".{final.name}.building-"
