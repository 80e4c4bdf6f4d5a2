"""Directories that are either whole or not there: built beside their place, renamed when whole."""

from __future__ import annotations

import shutil
import socket
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from fsdpq.fetch.holds import claim
from fsdpq.run_files.writing import sync

FOREIGN_S = 24 * 3600.0
"""Age of another machine's draft from which on nobody builds it any more."""

_HOST = socket.gethostname()


@contextmanager
def draft_of(final: Path) -> Generator[Path, None, None]:
    """Gives an empty directory that becomes ``final`` where the block ends without an error.

    Its parent must exist. What is in it must be synced to disk by the block (`sync`).

    Raises:
        OSError: ``final`` holds something by now, or the disk refuses.
    """
    draft = Path(tempfile.mkdtemp(prefix=f"{_prefix(final)}{_HOST}-", dir=final.parent))
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
    """Removes what killed builds of ``final`` left; drafts that somebody builds stay.

    Those of other machines stay for a day: not every shared file system shows their locks here.
    """
    for draft in final.parent.glob(f"{_prefix(final)}*"):
        is_own = draft.name.startswith(f"{_prefix(final)}{_HOST}-")
        if not is_own and not _is_old(draft):
            continue
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


def _is_old(draft: Path) -> bool:
    try:
        return time.time() - draft.stat().st_mtime > FOREIGN_S
    except OSError:
        return False


def _prefix(final: Path) -> str:
    return f".{final.name}.building-"
