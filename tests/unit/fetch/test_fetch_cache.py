"""The cache holds whole entries or none: killed builds, two builders, damage, full disks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fsdpq.errors import EnvironmentProblemError, FetchError
from fsdpq.fetch.cache import MANIFEST, cache_root, cached_directory, format_bytes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    root = tmp_path / "cache"
    monkeypatch.setenv("FSDPQ_CACHE", str(root))
    return root


class Builder:
    """Writes one file and counts how often it was asked to."""

    def __init__(self, content: str = "content"):
        self.calls = 0
        self.content = content

    def __call__(self, draft: Path) -> None:
        self.calls += 1
        (draft / "file.txt").write_text(self.content)


def get(build, **arguments):
    lines: list[str] = []
    entry = cached_directory("models/one", build, report=lines.append, **arguments)
    return entry, lines


def hidden(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").glob(".one.building-*")]


def test_second_use_builds_nothing_and_says_nothing():
    build = Builder()
    first, _ = get(build)
    second, lines = get(build)
    assert build.calls == 1
    assert lines == []
    assert first == second
    assert (second.directory / "file.txt").read_text() == "content"
    assert list(second.files) == ["file.txt"]


def test_same_content_has_the_same_hash_anywhere(tmp_path, monkeypatch):
    first, _ = get(Builder())
    monkeypatch.setenv("FSDPQ_CACHE", str(tmp_path / "other"))
    second, _ = get(Builder())
    assert first.sha256 == second.sha256
    monkeypatch.setenv("FSDPQ_CACHE", str(tmp_path / "third"))
    third, _ = get(Builder("other"))
    assert third.sha256 != first.sha256


def test_failed_or_interrupted_build_leaves_nothing(cache):
    def interrupted(draft: Path) -> None:
        (draft / "file.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(interrupted)
    assert not (cache / "models" / "one").exists()
    assert hidden(cache) == []
    entry, _ = get(Builder())
    assert (entry.directory / "file.txt").read_text() == "content"


def run_python(code: str, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "FSDPQ_CACHE": str(cache)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_killed_build_is_not_taken_for_whole_and_is_removed(cache):
    code = """
        import os, signal
        from fsdpq.fetch.cache import cached_directory
        def build(draft):
            (draft / "file.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        cached_directory("models/one", build, report=print)
    """
    process = run_python(code, cache)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (cache / "models" / "one").exists()
    assert len(hidden(cache)) == 1
    entry, _ = get(Builder())
    assert (entry.directory / "file.txt").read_text() == "content"
    assert hidden(cache) == []


def test_another_machine_whose_lock_does_not_reach_here_is_no_clash(cache):
    theirs = cache / "models" / ".one.building-another-host-1234"
    theirs.mkdir(parents=True)

    def build(draft: Path) -> None:
        Builder()(draft)
        theirs.rename(cache / "models" / "one")  # it is done first, while this one builds
        for name in ("file.txt", MANIFEST):
            (cache / "models" / "one" / name).write_text((whole / name).read_text())

    whole = get(Builder())[0].directory.rename(cache / "whole")
    assert theirs.exists(), "it may still build"
    entry, _ = get(build)
    assert (entry.directory / "file.txt").read_text() == "content"
    assert hidden(cache) == []
    theirs.mkdir()
    os.utime(theirs, (0, 0))
    (entry.directory / MANIFEST).unlink()
    get(Builder())
    assert hidden(cache) == [], "it was killed, long ago"


def test_two_processes_at_once_build_once_and_the_second_says_that_it_waits(cache):
    code = """
        import time
        from pathlib import Path
        from fsdpq.fetch.cache import cached_directory
        def build(draft):
            print("built", flush=True)
            time.sleep(1.5)
            (draft / "file.txt").write_text("content")
        cached_directory("models/one", build, report=lambda line: print(line, flush=True))
        print("done", flush=True)
    """
    first = run_python(code, cache)
    assert first.stdout is not None
    assert first.stdout.readline() == "built\n"
    second = run_python(code, cache)
    outputs = [first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]]
    assert outputs[0] == "done\n"
    assert outputs[1] == "waiting for another process that makes `one`\ndone\n"


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_damaged_entry_is_named_and_built_again(damage):
    build = Builder()
    entry, _ = get(build)
    if damage == "truncate":
        (entry.directory / "file.txt").write_text("c")
    elif damage == "remove":
        (entry.directory / "file.txt").unlink()
    else:
        (entry.directory / MANIFEST).write_text("{")
    entry, lines = get(build)
    assert build.calls == 2
    assert len(lines) == 1
    assert "damaged" in lines[0]
    assert str(entry.directory) in lines[0]
    assert (entry.directory / "file.txt").read_text() == "content"


def test_other_version_of_the_converter_builds_again():
    build = Builder()
    get(build, converter="gguf 1")
    get(build, converter="gguf 2")
    assert build.calls == 2


def test_too_little_free_space_is_said_before_anything_is_built(cache):
    build = Builder()
    with pytest.raises(FetchError) as caught:
        get(build, needed_bytes=10**18)
    assert build.calls == 0
    assert "1000000000.0 GB are needed" in caught.value.message
    assert str(cache) in caught.value.message
    assert "FSDPQ_CACHE" in caught.value.hint


def test_disk_that_fills_up_names_path_free_and_needed_bytes(cache):
    def build(draft: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FetchError) as caught:
        get(build, needed_bytes=5_000)
    assert str(cache) in caught.value.message
    assert "5.0 kB are needed" in caught.value.message
    assert "free" in caught.value.message
    assert "FSDPQ_CACHE" in caught.value.hint
    assert hidden(cache) == []


def test_cache_that_cannot_be_written_names_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FSDPQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentProblemError) as caught:
        get(Builder())
    assert str(tmp_path / "file") in caught.value.message
    assert "FSDPQ_CACHE" in caught.value.hint


def test_root_follows_the_user_and_the_system(tmp_path, monkeypatch):
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("FSDPQ_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "fsdpq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "fsdpq"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_root() == Path.home() / "Library" / "Caches" / "fsdpq"


def test_sizes_are_given_as_downloads_are():
    assert [format_bytes(n) for n in (5, 345_706, 92_871_040)] == ["5 bytes", "345.7 kB", "92.9 MB"]
