"""The cache directory: entries that are either whole or not there.

An entry is built in a temporary sibling directory under a file lock, synced to disk, described by a
manifest that is written last, and renamed into place. A killed build leaves a temporary directory
that no one reads and that the next build removes. Every use checks the sizes of the files (hashing
hundreds of megabytes at every launch would be slow) and rebuilds what is damaged.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import EnvironmentProblemError, FetchError
from fsdpq.fetch.drafts import draft_of, remove_drafts, remove_whole
from fsdpq.fetch.hashes import hash_file, hash_of_hashes
from fsdpq.run_files.writing import sync

MANIFEST = "fsdpq-cache.json"
MANIFEST_FORMAT = 1
WAY_OUT = "set FSDPQ_CACHE to a directory on a disk with more room"

Report = Callable[[str], None]


@dataclass(frozen=True)
class CacheEntry:
    """A whole directory of the cache.

    Attributes:
        directory: where it lies.
        files: name of each file, relative to ``directory`` -> its sha256, "" where another file
            of the entry holds its checksums.
    """

    directory: Path
    files: dict[str, str]

    @property
    def sha256(self) -> str:
        """One hash for all files."""
        return hash_of_hashes(self.files)


def cache_root() -> Path:
    """Returns the cache directory: ``FSDPQ_CACHE``, or ``fsdpq`` in the user's cache."""
    if chosen := os.environ.get("FSDPQ_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fsdpq"
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser().absolute() / "fsdpq"
    return Path.home() / ".cache" / "fsdpq"


def cached_directory(
    key: str,
    build: Callable[[Path], None],
    *,
    needed_bytes: int = 0,
    converter: str = "",
    self_checked: Collection[str] = (),
    report: Report,
) -> CacheEntry:
    """Returns the finished cache entry ``key``, building it first where it is not there.

    Two processes at once build once: the second waits for the first.

    Args:
        key: path of the entry relative to the cache, ``models/<name>-<hash>``.
        build: fills the empty directory that it is given; runs under a lock, may be killed.
        needed_bytes: most disk space in use at any time while building.
        converter: version of what ``build`` does, for the manifest; an entry made by another
            version is built again.
        self_checked: files that ``build`` wrote with checksums of their own, in another file of
            the entry: they are not read again to hash them, and have no sha256 here.
        report: told in one line what happens.

    Raises:
        FetchError: the disk is full, before or while building, or ``build`` says so.
        EnvironmentProblemError: the cache cannot be written.
    """
    final = cache_root() / key
    entry, _ = _read_entry(final, converter)
    if entry is not None:
        _mark_used(final)
        return entry
    with _translated_errors(final, needed_bytes):
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final, report):
            entry, damage = _read_entry(final, converter)  # another process may have built it
            if entry is not None:
                return entry
            if damage:
                report(f"`{final}` is damaged ({damage}), making it again")
            _make_place(final, needed_bytes)
            try:
                with draft_of(final) as draft:
                    build(draft)
                    _write_manifest(draft, converter, self_checked)
            except OSError as error:
                # Another machine was sooner: not every shared file system shows its lock here.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            return _check_new_entry(final, converter)


def format_bytes(num_bytes: int) -> str:
    """Returns ``num_bytes`` for people, in decimal units as downloads are given: ``92.9 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"


def _read_entry(final: Path, converter: str) -> tuple[CacheEntry | None, str]:
    """Returns the entry where it is whole; else None, and what is wrong ("" for not there)."""
    if not final.is_dir():
        return None, ""
    try:
        manifest: dict[str, Any] = json.loads((final / MANIFEST).read_text(encoding="utf-8"))
        if (manifest["format"], manifest["converter"]) != (MANIFEST_FORMAT, converter):
            return None, "made by another version"
        files: list[dict[str, Any]] = manifest["files"]
        for file in files:
            size = (final / file["name"]).stat().st_size
            if size != file["bytes"]:
                return None, f"`{file['name']}` has {size} bytes instead of {file['bytes']}"
        return CacheEntry(final, {file["name"]: file["sha256"] for file in files}), ""
    except FileNotFoundError as error:
        return None, f"`{Path(error.filename).name}` is missing"
    except (ValueError, KeyError, TypeError):
        return None, f"`{MANIFEST}` cannot be read"


def _make_place(final: Path, needed_bytes: int) -> None:
    """Removes a damaged entry and what killed builds left; the lock is held, so nobody builds."""
    if final.exists():
        remove_whole(final)
    remove_drafts(final)
    _check_free_space(final.parent, needed_bytes)


def _check_new_entry(final: Path, converter: str) -> CacheEntry:
    entry, damage = _read_entry(final, converter)
    if entry is None:
        raise FetchError(f"`{final}` is damaged right after it was made: {damage}", hint=WAY_OUT)
    return entry


def _write_manifest(draft: Path, converter: str, self_checked: Collection[str]) -> None:
    paths = sorted(path for path in draft.rglob("*") if path.is_file())
    files: list[dict[str, Any]] = []
    for path in paths:
        name = path.relative_to(draft).as_posix()
        sync(path)
        sha256 = "" if name in self_checked else hash_file(path)
        files.append({"name": name, "bytes": path.stat().st_size, "sha256": sha256})
    manifest = {"format": MANIFEST_FORMAT, "converter": converter, "files": files}
    target = draft / MANIFEST
    target.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync(target)


def _mark_used(directory: Path) -> None:
    """Notes the time of use, where the cache can be written."""
    with contextlib.suppress(OSError):
        os.utime(directory / MANIFEST)


def _check_free_space(directory: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise FetchError(
            f"`{directory}` has {format_bytes(free)} free, {format_bytes(needed_bytes)} are needed",
            hint=WAY_OUT,
        )


@contextlib.contextmanager
def _locked(final: Path, report: Report) -> Generator[None, None, None]:
    from filelock import FileLock, Timeout

    lock: Any = FileLock(final.parent / f".{final.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"waiting for another process that makes `{final.name}`")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _translated_errors(final: Path, needed_bytes: int) -> Generator[None, None, None]:
    """Turns what a disk says into what a user can do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(final.parent, needed_bytes) from error
        raise EnvironmentProblemError(
            f"the cache `{cache_root()}` cannot be written: {error.strerror or error}",
            hint="set FSDPQ_CACHE to a directory that you can write",
            details=str(error),
        ) from error


def disk_full(directory: Path, needed_bytes: int) -> FetchError:
    """Returns the error for a disk that became full while writing to ``directory``."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    need = f", {format_bytes(needed_bytes)} are needed" if needed_bytes else ""
    return FetchError(
        f"the disk of `{directory}` is full: {format_bytes(free)} free{need}", hint=WAY_OUT
    )
