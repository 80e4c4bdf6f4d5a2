"""What lies in the cache: listed, removed by name, and made room in.

Only what fsdpq made is seen: directories with the cache's manifest in the folders of `SORTS`,
drafts of killed builds, and remembered hashes. Links are not followed, so nothing outside of the
cache is counted or removed, whatever ``FSDPQ_CACHE`` points to.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import FetchError, UsageError
from fsdpq.fetch.cache import MANIFEST, Report, cache_root, format_bytes
from fsdpq.fetch.drafts import is_draft, remove_whole
from fsdpq.fetch.holds import claim, is_held

BASES = "bases"
PREPARED = "prepared"
SORTS = ("models", BASES, "data", PREPARED, "smoke")
MADE_AGAIN = (BASES, PREPARED)
"""Sorts that are made again from what is here, without a network."""

HASHES = "hashes"
DEFAULT_LIMIT_BYTES = 100 * 10**9
FREE_SHARE = 0.1
"""Share of the disk that stays free where no limit was given."""

LIMIT_VARIABLE = "FSDPQ_CACHE_LIMIT"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|k|M|G|T)(i?)B?", re.IGNORECASE)
_UNFINISHED = "unfinished: a build that was killed"


@dataclass(frozen=True)
class ListedEntry:
    """One thing that the cache holds.

    Attributes:
        name: path relative to the cache, ``bases/<model>-<digest>``.
        directory: where it lies.
        num_bytes: sizes of its files.
        last_used: seconds since the epoch.
        made_by: the converter or quantizer that made it.
        in_use: a process reads or builds it now.
    """

    name: str
    directory: Path
    num_bytes: int
    last_used: float
    made_by: str
    in_use: bool


def list_entries() -> list[ListedEntry]:
    """Returns everything that the cache holds, by sort, the last used first."""
    root = cache_root()
    entries = [entry for sort in SORTS for entry in _list_sort(root / sort)]
    return [*entries, *_list_hashes(root / HASHES)]


def remove_entry(entry: ListedEntry) -> bool:
    """Removes ``entry``; returns False where a process uses it.

    Raises:
        FetchError: the cache cannot be written.
    """
    try:
        with claim(entry.directory) as free:
            if not free:
                return not entry.directory.exists()
            if entry.name == HASHES:
                for memo in entry.directory.glob("*.json"):
                    memo.unlink()
            elif is_draft(entry.directory):
                shutil.rmtree(entry.directory)
            else:
                remove_whole(entry.directory)
    except OSError as error:
        message = f"`{entry.directory}` cannot be removed: {error.strerror or error}"
        raise FetchError(message, hint="remove it by hand, with the rights that it needs") from None
    return True


def select_entries(entries: Sequence[ListedEntry], names: Sequence[str]) -> list[ListedEntry]:
    """Returns the entries with the given names; the folder (``bases/``) may be left out.

    Raises:
        UsageError: there is none of a name.
    """
    found: list[ListedEntry] = []
    for name in names:
        matching = [entry for entry in entries if name in (entry.name, entry.directory.name)]
        if not matching:
            message = f"the cache has no entry `{name}`"
            raise UsageError(message, hint="`fsdpq cache ls` lists the entries")
        found += [entry for entry in matching if entry not in found]
    return found


def cache_limit(held_bytes: int) -> int:
    """Returns how many bytes the cache may hold: as `LIMIT_VARIABLE` says and the disk allows.

    Without the variable it is `DEFAULT_LIMIT_BYTES`, and `FREE_SHARE` of the disk stays free.

    Args:
        held_bytes: what the cache holds now.

    Raises:
        UsageError: the variable holds no size.
    """
    root = cache_root()
    existing = next(path for path in (root, *root.parents) if path.exists())
    disk = shutil.disk_usage(existing)
    given = os.environ.get(LIMIT_VARIABLE)
    if given:
        return min(parse_size(given), held_bytes + disk.free)
    spare = disk.free - int(FREE_SHARE * disk.total)
    return max(0, min(DEFAULT_LIMIT_BYTES, held_bytes + spare))


def parse_size(text: str) -> int:
    """Returns the bytes of ``200GB``, ``1.5 TB`` or ``64GiB``.

    Raises:
        UsageError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        message = f"{LIMIT_VARIABLE} is `{text}`, and that is no size"
        raise UsageError(message, hint=f"write it like `{LIMIT_VARIABLE}=200GB`")
    number, prefix, binary = match.groups()
    power = ("", "k", "m", "g", "t").index(prefix.lower())
    return int(float(number) * (1024 if binary else 1000) ** power)


def make_room(
    num_bytes: int, *, target: Path, report: Report, what: str = "a quantized base"
) -> None:
    """Removes entries of `MADE_AGAIN`, the least recently used first, until there is room.

    That is when ``num_bytes`` more are within the limit. Entries in use stay, and so does
    everything else: models and rows may need a network to be had again. Nothing is removed where
    that would not be enough.

    Args:
        num_bytes: size of the entry that is about to be made.
        target: where it goes; what lies there is replaced and does not count.
        report: told of each entry that is removed.
        what: the new entry, for people.

    Raises:
        FetchError: it does not fit.
        UsageError: `LIMIT_VARIABLE` holds no size.
    """
    entries = [entry for entry in list_entries() if entry.directory != target]
    held = sum(entry.num_bytes for entry in entries)
    limit = cache_limit(held)
    spare = [e for e in entries if e.name.partition("/")[0] in MADE_AGAIN and not e.in_use]
    if held - sum(entry.num_bytes for entry in spare) + num_bytes > limit:
        raise FetchError(
            f"{what} of {format_bytes(num_bytes)} does not fit into the cache "
            f"`{cache_root()}`, which may hold {format_bytes(limit)}",
            hint=f"raise {LIMIT_VARIABLE}, free some space, or set FSDPQ_CACHE to another disk",
        )
    for entry in sorted(spare, key=lambda entry: entry.last_used):
        if held + num_bytes <= limit:
            return
        if remove_entry(entry):
            held -= entry.num_bytes
            size, most = format_bytes(entry.num_bytes), format_bytes(limit)
            report(f"removed `{entry.name}` ({size}) from the cache, which may hold {most}")


def _list_sort(folder: Path) -> list[ListedEntry]:
    found = [entry for path in _own_directories(folder) if (entry := _describe(path))]
    return sorted(found, key=lambda entry: -entry.last_used)


def _own_directories(folder: Path) -> Iterator[Path]:
    if folder.is_symlink() or not folder.is_dir():
        return
    for item in sorted(folder.iterdir()):
        if item.is_dir() and not item.is_symlink():
            yield item


def _describe(directory: Path) -> ListedEntry | None:
    """Returns what lies in ``directory``, None where it is not ours or was removed meanwhile."""
    name = f"{directory.parent.name}/{directory.name}"
    try:
        if is_draft(directory):
            used, made_by = directory.stat().st_mtime, _UNFINISHED
        else:
            used, made_by = (directory / MANIFEST).stat().st_mtime, _maker(directory)
    except OSError:
        return None
    return ListedEntry(name, directory, _size(directory), used, made_by, is_held(directory))


def _maker(directory: Path) -> str:
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return str(manifest["converter"])
    except (ValueError, KeyError, TypeError):
        return "damaged: it will be made again"


def _list_hashes(folder: Path) -> list[ListedEntry]:
    if folder.is_symlink() or not any(folder.glob("*.json")):
        return []
    used = max(memo.lstat().st_mtime for memo in folder.glob("*.json"))
    return [ListedEntry(HASHES, folder, _size(folder), used, "sha256 of local models", False)]


def _size(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            stat = path.lstat()
            total += stat.st_size if path.is_file() and not path.is_symlink() else 0
    return total
