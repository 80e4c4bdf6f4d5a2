"""`fsdpq cache`: lists what the cache holds, and asks before it removes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fsdpq.cli.main import cli
from fsdpq.fetch.cache import cached_directory
from fsdpq.fetch.holds import hold


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FSDPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FSDPQ_CACHE_LIMIT", "2MB")
    for name in ("bases/one", "bases/two", "models/three"):
        cached_directory(name, lambda _: None, converter="bnb nf4, bf16", report=print)
    return tmp_path / "cache"


def run(*arguments: str, answer: str = "") -> tuple[int, str, str]:
    done = CliRunner().invoke(cli, ["cache", *arguments], input=answer)
    return done.exit_code, done.stdout, done.stderr


def left(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("*/*") if path.is_dir()}


def test_ls_shows_entries_total_and_limit(cache: Path) -> None:
    code, out, _ = run("ls")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["entry", "size", "last", "used", "made", "by"]
    assert [line.split()[0] for line in lines[1:4]] == ["models/three", "bases/two", "bases/one"]
    assert lines[1].endswith("bnb nf4, bf16")
    assert lines[-1].startswith(f"{cache}: ")
    assert lines[-1].endswith(" of 2.0 MB")
    answer = json.loads(run("ls", "--json")[1])
    assert answer["limit_bytes"] == 2 * 10**6
    assert answer["total_bytes"] == sum(entry["bytes"] for entry in answer["entries"])
    assert answer["entries"][0].keys() == {
        "name", "directory", "bytes", "last_used", "made_by", "in_use"
    }  # fmt: skip


def test_clear_asks_first(cache: Path) -> None:
    code, out, err = run("clear", "one", answer="n\n")
    assert (code, out) == (1, "")
    assert "bases/one" in err
    assert left(cache) == {"one", "two", "three"}
    assert run("clear", "one", answer="y\n")[:2] == (0, "bases/one\n")
    assert left(cache) == {"two", "three"}


def test_clear_takes_bases_or_all(cache: Path) -> None:
    assert run("clear", "--bases", "--yes")[1].split() == ["bases/two", "bases/one"]
    assert left(cache) == {"three"}
    assert run("clear", "--all", "--yes")[1] == "models/three\n"
    assert left(cache) == set()
    assert "holds nothing of that" in run("clear", "--all", "--yes")[2]


def test_clear_takes_prepared_data(cache: Path) -> None:
    cached_directory("prepared/rows-1", lambda _: None, converter="fsdpq prepare", report=print)
    assert "prepared/rows-1" in run("ls")[1]
    assert run("clear", "--prepared", "--yes")[1] == "prepared/rows-1\n"
    assert left(cache) == {"one", "two", "three"}


def test_clear_keeps_what_is_in_use(cache: Path) -> None:
    with hold(cache / "bases" / "one"):
        assert "in use" in run("ls")[1]
        code, out, err = run("clear", "--bases", "--yes")
    assert (code, out) == (0, "bases/two\n")
    assert err == "kept `bases/one`: it is in use\n"
    assert left(cache) == {"one", "three"}
