"""What is announced, and when; and that the system takes it."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

import pytest

from fsdpq.model.loading import read_ahead
from fsdpq.model.loading.checkpoint_files import ByteRange
from fsdpq.model.loading.read_ahead import ReadAhead

PATH = Path("model.safetensors")


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[ByteRange]:
    found: list[ByteRange] = []
    monkeypatch.setattr(read_ahead, "announce", found.append)
    monkeypatch.setattr(read_ahead, "can_announce", lambda: True)
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 10)
    return found


def finish(ahead: ReadAhead) -> None:
    assert ahead._thread is not None
    ahead._thread.shutdown()


def test_ranges_are_announced_once_in_order_and_at_most_a_window_ahead(
    announced: list[ByteRange],
) -> None:
    ranges = {"a": [ByteRange(PATH, 100, 125)], "b": [ByteRange(PATH, 0, 10)], "none": []}
    ranges["c"] = [ByteRange(PATH, 200, 210), ByteRange(PATH, 300, 310)]
    ahead = ReadAhead(ranges, window_bytes=20)
    counts: list[int] = []
    for name, num_bytes in (("a", 0), ("a", 5), ("a", 25), ("b", 0), ("b", 900), ("c", 0)):
        ahead.move_to(name, num_bytes)
        counts.append(ahead._next)
    finish(ahead)
    assert counts == [2, 3, 5, 5, 6, 6], "more bytes than the target has do not move it further"
    assert [(part.start, part.stop) for part in announced] == [
        (100, 110), (110, 120), (120, 125), (0, 10), (200, 210), (300, 310),
    ]  # fmt: skip


def test_a_target_that_is_left_out_moves_nothing(announced: list[ByteRange]) -> None:
    ahead = ReadAhead({"a": [ByteRange(PATH, 0, 10)]}, window_bytes=5)
    ahead.move_to("other", 100)
    finish(ahead)
    assert announced == []


def test_without_the_call_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    ReadAhead({"a": [ByteRange(PATH, 0, 10)]}).move_to("a", 0)


def test_a_file_that_is_gone_is_left_to_the_read(tmp_path: Path) -> None:
    read_ahead.announce(ByteRange(tmp_path / "gone", 0, 10))


def resident_pages(path: Path, size: int) -> int:
    """Pages of the file that lie in the page cache, by ``mincore``."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapping:
        pages = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages):
            pytest.skip("mincore is not to be had here")
        return sum(page & 1 for page in pages)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise on this system")
def test_announced_bytes_come_into_the_page_cache(tmp_path: Path) -> None:
    path, size = tmp_path / "m", 4 << 20
    with path.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
    if resident_pages(path, size) > size // mmap.PAGESIZE // 2:
        pytest.skip("this file system keeps what it was told to drop")
    ahead = ReadAhead({"a": [ByteRange(path, 0, size)]})
    ahead.move_to("a", 0)
    finish(ahead)
    deadline = time.monotonic() + 30
    while resident_pages(path, size) <= size // mmap.PAGESIZE // 2:  # the disk works meanwhile
        assert time.monotonic() < deadline
        time.sleep(0.02)
