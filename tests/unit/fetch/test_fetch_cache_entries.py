"""What the cache holds is listed, removed by name, and makes room for new bases."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fsdpq.errors import FetchError, UsageError
from fsdpq.fetch.cache import MANIFEST, cached_directory
from fsdpq.fetch.cache_entries import (
    cache_limit,
    list_entries,
    make_room,
    parse_size,
    remove_entry,
    select_entries,
)
from fsdpq.fetch.holds import hold


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    root = tmp_path / "cache"
    monkeypatch.setenv("FSDPQ_CACHE", str(root))
    monkeypatch.delenv("FSDPQ_CACHE_LIMIT", raising=False)
    return root


def add(name: str, *, num_bytes: int = 1000, age: int = 0, converter: str = "bnb nf4") -> Path:
    """Makes an entry that was last used ``age`` seconds before some moment."""

    def build(draft: Path) -> None:
        (draft / "file").write_bytes(b"x" * num_bytes)

    entry = cached_directory(name, build, converter=converter, report=print)
    os.utime(entry.directory / MANIFEST, (10**9 - age, 10**9 - age))
    return entry.directory


def names() -> list[str]:
    return [entry.name for entry in list_entries()]


def test_entries_say_what_made_them_when_and_how_large_they_are(cache):
    add("bases/old", age=9)
    add("bases/new", num_bytes=5000)
    add("models/m", converter="gguf 1")
    (cache / "hashes").mkdir()
    (cache / "hashes" / "a.json").write_text("{}")
    (cache / "bases" / ".x.building-123").mkdir()
    entries = {entry.name: entry for entry in list_entries()}
    assert list(entries) == [
        "models/m",
        "bases/.x.building-123",
        "bases/new",
        "bases/old",
        "hashes",
    ]
    new = entries["bases/new"]
    assert (new.made_by, new.last_used, new.in_use) == ("bnb nf4", 1e9, False)
    sizes = [path.stat().st_size for path in new.directory.iterdir()]
    assert new.num_bytes == sum(sizes) > 5000
    assert entries["models/m"].made_by == "gguf 1"
    assert "killed" in entries["bases/.x.building-123"].made_by


def test_nothing_but_its_own_is_seen_or_removed(cache, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / MANIFEST).write_text("{}")
    add("bases/mine")
    (cache / "bases" / "link").symlink_to(foreign)
    (cache / "data").symlink_to(tmp_path)
    (cache / "bases" / "photos").mkdir()
    (cache / "mine.txt").write_text("")
    (cache / "bases" / "mine" / "link").symlink_to(foreign)
    assert names() == ["bases/mine"]
    for entry in list_entries():
        assert remove_entry(entry)
    assert names() == []
    assert (foreign / MANIFEST).exists()
    assert (cache / "bases" / "photos").is_dir()
    assert (cache / "mine.txt").exists()


def test_entry_in_use_stays_until_it_is_not():
    directory = add("bases/one")
    (entry,) = list_entries()
    with hold(directory) as there, hold(directory) as also:
        assert there
        assert also
        assert list_entries()[0].in_use
        assert not remove_entry(entry)
        assert directory.exists()
    assert not list_entries()[0].in_use
    assert remove_entry(entry)
    with hold(directory) as there:
        assert not there


def test_use_is_noted():
    add("bases/one", age=100)
    before = list_entries()[0].last_used
    cached_directory("bases/one", lambda _: None, converter="bnb nf4", report=print)
    assert list_entries()[0].last_used > before


def test_least_recently_used_bases_make_room(monkeypatch, cache):
    add("models/m", age=99)
    for name, age in (("bases/oldest", 9), ("bases/middle", 5), ("bases/newest", 1)):
        add(name, age=age)
    total = sum(entry.num_bytes for entry in list_entries())
    monkeypatch.setenv("FSDPQ_CACHE_LIMIT", str(total))
    lines: list[str] = []
    make_room(1500, target=cache / "bases" / "new", report=lines.append)
    assert names() == ["models/m", "bases/newest"]
    assert [line.split("`")[1] for line in lines] == ["bases/oldest", "bases/middle"]


def test_base_in_use_makes_no_room(monkeypatch, cache):
    held, _ = add("bases/held", age=9), add("bases/free", age=1)
    total = sum(entry.num_bytes for entry in list_entries())
    monkeypatch.setenv("FSDPQ_CACHE_LIMIT", str(total))
    with hold(held):
        make_room(500, target=cache / "bases" / "new", report=print)
        assert names() == ["bases/held"]


def test_nothing_is_removed_where_it_would_not_help(monkeypatch, cache):
    add("bases/one")
    monkeypatch.setenv("FSDPQ_CACHE_LIMIT", "1MB")
    with pytest.raises(FetchError, match=r"2\.0 MB does not fit .* may hold 1\.0 MB"):
        make_room(2 * 10**6, target=cache / "bases" / "new", report=print)
    assert names() == ["bases/one"]


def test_entry_that_is_replaced_does_not_count(monkeypatch, cache):
    add("bases/one", num_bytes=5000)
    monkeypatch.setenv("FSDPQ_CACHE_LIMIT", "5500")
    make_room(5000, target=cache / "bases" / "one", report=print)
    assert names() == ["bases/one"]


def test_limit_leaves_a_share_of_the_disk_free(monkeypatch):
    usage = shutil.disk_usage("/")._replace(total=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=15 * 10**10))
    assert cache_limit(0) == 50 * 10**9
    assert cache_limit(10**10) == 60 * 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**12))
    assert cache_limit(0) == 100 * 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    assert cache_limit(0) == 0
    monkeypatch.setenv("FSDPQ_CACHE_LIMIT", "200GB")
    assert cache_limit(10**9) == 2 * 10**9


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("200GB", 200 * 10**9),
        ("1.5 TB", 15 * 10**11),
        ("64GiB", 64 * 2**30),
        ("7", 7),
        ("3k", 3000),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["much", "-1GB", "5 PB", "1e9", "GB"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert text in caught.value.message
    assert "200GB" in caught.value.hint


def test_names_with_and_without_folder():
    add("bases/one")
    add("models/one")
    entries = list_entries()
    assert [e.name for e in select_entries(entries, ["bases/one"])] == ["bases/one"]
    assert len(select_entries(entries, ["one", "bases/one"])) == 2
    with pytest.raises(UsageError, match="no entry `two`"):
        select_entries(entries, ["two"])


def test_files_with_checksums_of_their_own_are_not_hashed():
    def build(draft: Path) -> None:
        (draft / "large").write_bytes(b"x")
        (draft / "small").write_bytes(b"x")

    entry = cached_directory("bases/one", build, self_checked=("large",), report=print)
    assert entry.files["large"] == ""
    assert len(entry.files["small"]) == 64
