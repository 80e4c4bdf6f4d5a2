"""Rows of a hub dataset: one commit is downloaded, a process of its own writes its rows as lines.

`datasets` has no place in this half, so `fsdpq.data.hub_rows` reads the files, offline.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import FetchError
from fsdpq.fetch import hub
from fsdpq.fetch.cache import Report, cached_directory
from fsdpq.recipe.sections.source import SourceOptions

HUB_ROWS_VERSION = 2
"""Part of the cache key: raise it when `fsdpq.data.hub_rows` writes other rows."""

EXPANSION = 6
"""Disk for reading a hub dataset, over the size of its (often compressed) files, at most."""

DATA_FILE = "data.jsonl"


@dataclass(frozen=True)
class HubRows:
    """Rows of the hub on this machine.

    Attributes:
        name: where they came from, for people.
        file: JSON lines.
        revision: the commit.
    """

    name: str
    file: Path
    revision: str


def fetch_hub_rows(name: str, options: SourceOptions, *, key: str, report: Report) -> HubRows:
    """Returns the rows of one split of the hub dataset ``name``.

    Args:
        name: ``org/name``.
        options: ``revision``, ``config`` and ``split`` of the source.
        key: recipe key of the source, for messages.
        report: told one short line per thing done.

    Raises:
        FetchError: it cannot be downloaded or read; says why and what to do.
        EnvironmentProblemError: the cache cannot be written.
    """
    if not hub.REPOSITORY_PATTERN.fullmatch(name):
        raise FetchError(f"`{name}` is no dataset of the hub", hint="its name is `org/name`")
    snapshot = hub.download_snapshot(
        name, revision=options.revision, report=report, sort=hub.DATASET
    )
    what = f"split {options.split}"
    what = f"configuration {options.config}, {what}" if options.config else what

    def build(draft: Path) -> None:
        report(f"reading {what} of {name}")
        _convert(name, snapshot, options, draft / DATA_FILE, key=key)

    text = f"{name}@{snapshot.name}:{options.config or ''}:{options.split}"
    entry = cached_directory(
        f"data/{name.replace('/', '--')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}",
        build,
        needed_bytes=EXPANSION * sum(f.stat().st_size for f in snapshot.rglob("*") if f.is_file()),
        converter=f"hub rows {HUB_ROWS_VERSION}",
        report=report,
    )
    path = entry.directory / DATA_FILE
    report(f"{name} is in {path}")
    return HubRows(f"{hub.DATASET.page}{name} ({what})", path, snapshot.name)


def _convert(name: str, snapshot: Path, options: SourceOptions, target: Path, *, key: str) -> None:
    command = [sys.executable, "-m", "fsdpq.data.hub_rows", str(snapshot), options.split]
    command += [str(target), *([f"--config={options.config}"] if options.config else [])]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, env=os.environ | offline, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    last_line = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode != 0 or not last_line.startswith("{"):
        error = FetchError(
            f"`{name}` cannot be read: the process that reads it ended with {done.returncode}",
            hint=f"give the rows as a file: `{key}.path`",
        )
        error.details = done.stderr[-4000:]
        raise error
    answer: dict[str, Any] = json.loads(last_line)
    if "error" in answer:
        hint = f"choose another `{key}.split`, `{key}.config` or `{key}.revision`, or give a file: "
        hint = answer["hint"] or f"{hint}`{key}.path`"
        raise FetchError(f"`{name}` cannot be read: {answer['error']}", hint=hint)
