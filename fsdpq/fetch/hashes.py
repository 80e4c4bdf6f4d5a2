"""sha256 of files and of sets of files, and the remembered hashes of large local files.

A local checkpoint can be hundreds of gigabytes; reading all of it at every launch would take
minutes. Its hashes are therefore remembered in the cache by path, size and time of change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from fsdpq.run_files.writing import write_whole

REPORT_BYTES = 2 * 1024**3
"""Hashing more than this is announced: it takes seconds."""


def hash_file(path: Path) -> str:
    """Returns the sha256 of the file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1024 * 1024):
            digest.update(chunk)
    return digest.hexdigest()


def hash_of_hashes(files: Mapping[str, str]) -> str:
    """Returns one sha256 for a set of files, given name -> sha256; the order does not matter."""
    digest = hashlib.sha256()
    for name, sha256 in sorted(files.items()):
        digest.update(f"{sha256}  {name}\n".encode())
    return digest.hexdigest()


def hash_local_files(
    files: Mapping[str, Path], *, memo: Path, report: Callable[[str], None]
) -> str:
    """Returns one sha256 for ``files``, reading only those that changed since the last time.

    Args:
        files: name -> path.
        memo: JSON file with the hashes found before; an unreadable or unwritable one only costs
            the time to hash again.
        report: told when there is much to read.
    """
    known = _read_memo(memo)
    found: dict[str, list[object]] = {}
    stale: dict[str, Path] = {}
    for name, path in files.items():
        stat = path.stat()
        found[name] = [stat.st_size, stat.st_mtime_ns, ""]
        entry = known.get(name)
        if isinstance(entry, list) and entry[:2] == found[name][:2]:
            found[name] = entry
        else:
            stale[name] = path
    num_bytes = sum(path.stat().st_size for path in stale.values())
    if num_bytes > REPORT_BYTES:
        report(f"hashing {num_bytes / 1024**3:.1f} GiB, once")
    for name, path in stale.items():
        found[name][2] = hash_file(path)
    if stale:
        _write_memo(memo, found)
    return hash_of_hashes({name: str(entry[2]) for name, entry in found.items()})


def _read_memo(memo: Path) -> dict[str, list[object]]:
    try:
        content: Any = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, list[object]]", content) if isinstance(content, dict) else {}


def _write_memo(memo: Path, content: Mapping[str, object]) -> None:
    """Replaces the memo at once; a full or read-only cache is no reason to stop a run."""
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memo, json.dumps(content).encode())
