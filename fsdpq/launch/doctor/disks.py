"""Disks: room for downloads and runs, what kind of file system they are on, how fast it is."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fsdpq.fetch.cache import cache_root, format_bytes
from fsdpq.launch.doctor.finding import FAIL, OK, WARN, Finding
from fsdpq.launch.machine.gpus import GpuFacts
from fsdpq.launch.runs.run_dir import MIN_FREE_BYTES, RUNS

LOW_DISK_BYTES = 5 * 10**9
MOUNTS = Path("/proc/self/mounts")
NETWORK_KINDS = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "afs", "fuse.sshfs", "drvfs"})
MEMORY_KINDS = frozenset({"tmpfs", "ramfs"})

TRIED_BYTES = 256 * 2**20
TRIED_S = 1.0
"""Writing and reading get so long each, at most."""

BLOCK_BYTES = 4 * 2**20
SLOW_BANDWIDTH = 100e6
"""Bytes/s of a hard disk; a model of 16 GB takes minutes to load from it."""

LARGE_BASE_BYTES = 37e9
"""70 billion weights in 4 bits with their scales: what ``offload: disk`` reads twice a step."""


def find_disks(_gpus: Sequence[GpuFacts] = ()) -> Iterator[Finding]:
    """Room for downloads and for runs."""
    yield disk_finding("cache", cache_root(), "set FSDPQ_CACHE to a directory on another disk")
    yield disk_finding("runs", RUNS.absolute(), "give `fsdpq train` a `--run-dir` on another disk")


def disk_finding(name: str, directory: Path, remedy: str) -> Finding:
    """Returns how much room there is for ``directory``, which need not exist yet."""
    place = nearest_directory(directory)
    free, kind = shutil.disk_usage(place).free, file_system_kind(place)
    value = f"{format_bytes(free)} free for {directory}" + f" ({kind})" * bool(kind)
    if not can_write(place):
        return Finding("disk", name, FAIL, f"{place} cannot be written", remedy)
    if free < MIN_FREE_BYTES:
        return Finding("disk", name, FAIL, value, f"free some, or {remedy}")
    if free < LOW_DISK_BYTES:
        return Finding("disk", name, WARN, value, f"models are larger: free some, or {remedy}")
    if kind in MEMORY_KINDS:
        return Finding("disk", name, WARN, f"{value}: it takes host memory", remedy)
    if kind in NETWORK_KINDS:
        value += ": slow to load from, and locks of other machines may not count"
        return Finding("disk", name, WARN, value, remedy)
    return Finding("disk", name, OK, value)


def find_disk_speed(_gpus: Sequence[GpuFacts] = ()) -> Iterator[Finding]:
    """How fast the disk of the cache writes and reads, tried for a second each."""
    place = nearest_directory(cache_root())
    if not can_write(place) or shutil.disk_usage(place).free < MIN_FREE_BYTES + TRIED_BYTES:
        return  # `find_disks` says so
    try:
        written, read = measure_disk(place)
    except OSError as error:
        value = f"{place} fails when it is written and read: {error.strerror}"
        remedy = "look at the disk (`dmesg`), or set FSDPQ_CACHE to a directory on another one"
        yield Finding("disk", "speed", WARN, value, remedy)
        return
    value = f"writes {format_bytes(int(written))}/s, reads {format_bytes(int(read))}/s"
    if read < SLOW_BANDWIDTH:
        remedy = "set FSDPQ_CACHE to a directory on a faster disk; do not use `fsdp.offload: disk`"
        yield Finding("disk", "speed", WARN, value, remedy)
    else:
        seconds = 2 * LARGE_BASE_BYTES / read
        value += f" (`fsdp.offload: disk` of 70B reads {seconds:.0f} s a step)"
        yield Finding("disk", "speed", OK, value)


def measure_disk(
    directory: Path, *, num_bytes: int = TRIED_BYTES, seconds: float = TRIED_S
) -> tuple[float, float]:
    """Returns bytes/s that ``directory`` writes and reads, with a file that is removed again.

    Pages are written out and dropped before they are read, so that memory is not what is measured;
    a disk's own cache may be.

    Args:
        directory: exists and can be written.
        num_bytes: of the file, at most.
        seconds: for each direction, at most.
    """
    block = os.urandom(BLOCK_BYTES)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        descriptor, started, total = file.fileno(), time.perf_counter(), 0
        while total < num_bytes and time.perf_counter() - started < seconds:
            total += file.write(block)
            os.fdatasync(descriptor)
        written = total / (time.perf_counter() - started)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        started, found = time.perf_counter(), 0
        file.seek(0)
        while (got := len(file.read(BLOCK_BYTES))) and time.perf_counter() - started < seconds:
            found += got
        return written, found / (time.perf_counter() - started)


def file_system_kind(place: Path) -> str:
    """Returns the kind of file system that ``place`` is on, ``ext4``; empty: not known."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    kinds: dict[Path, str] = {}
    for line in lines:
        fields = line.split(" ")
        if len(fields) > 2:
            kinds[Path(fields[1].replace("\\040", " "))] = fields[2]
    where = place.resolve()
    return next((kinds[part] for part in (where, *where.parents) if part in kinds), "")


def nearest_directory(path: Path) -> Path:
    """Returns the deepest directory on the way to ``path`` that exists."""
    return next(place for place in (path, *path.parents) if place.is_dir())


def can_write(directory: Path) -> bool:
    """Whether files can be made in ``directory``; tries it."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False
